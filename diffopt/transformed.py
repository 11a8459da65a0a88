"""A solution inside the derivatives of ``torch.func``, by the derivative that its solver has.

``jacrev``, ``jacfwd``, ``vmap(grad)`` and the like call a solver once and its derivative at many vectors. Where nobody
wants a derivative of that again, it is one call of compiled code, past the transforms; otherwise the solution is
attached by its Newton step, which torch transforms as any function (`diffopt.implicit`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt import implicit, kkt, transforms
from diffopt.problems.forms import QPForm
from diffopt.shapes import matvec, rmatvec
from diffopt.solution import Certificate, Report, Solution


class _Task(NamedTuple):
    """What a derivative needs: the form as the transforms show it and plain; its solution, plain; the transforms; which
    of x, s, nu, lam, lam_lower, lam_upper are outputs; and how kinks are read."""

    form: QPForm
    plain: QPForm
    found: kkt.Solved
    layers: transforms.Layers
    live: tuple[int, ...]
    weak_tolerance: float


def takes(form: Any, found: kkt.Solved, kink_rule: str) -> bool:
    """Return whether a solution (of a plain form) can be attached by its solver's derivative."""
    many = found.pullback is not None and found.pullback.many is not None
    return many and kink_rule == "inactive" and not found.others and isinstance(form, QPForm)


def attach(
    form: QPForm, plain: QPForm, found: kkt.Solved, layers: transforms.Layers, weak_tolerance: float
) -> Solution:
    """Return the solution, attached to every tensor of ``form``.

    Args:
        form: the problem as the transforms show it.
        plain, found: the problem outside of them, and its solution, which `takes` accepts.
        layers: the transforms.
        weak_tolerance: see `diffopt.Settings`.

    Differentiable in: see `implicit.attach`.
    """
    assert found.counts is not None
    bounded = form.lower is not None or form.upper is not None
    there = (True, form.m, form.p, form.m, bounded, bounded)
    live = tuple(i for i in range(6) if there[i])
    task = _Task(form, plain, found, layers, live, weak_tolerance)
    outputs = [layers.output(found.point[i]) for i in live]
    attached = iter(transforms.apply_at_one_level(_Direct, task, outputs, *form.tensors().values()))
    values = kkt.Point(*map(layers.covered, found.point))
    point = kkt.Point(*(next(attached) if i in live else v for i, v in enumerate(values)))
    status = layers.covered(found.status)

    def value() -> Tensor:
        return implicit.optimal_value(form, point, values, status)

    return Solution(
        *(point.x, point.s, point.lam, point.nu, point.lam_lower, point.lam_upper),
        status=status,
        report=Report(layers.covered(found.residuals, second=True), layers.covered(found.counts, second=True)),
        certificate=None if found.certificate is None else Certificate(*map(layers.covered, found.certificate)),
        backend=found.backend,
        executor=found.executor,
        _value=value,
    )


class _Direct(transforms.OneLevel or object):
    """The values of a solution, past the transforms."""

    @staticmethod
    def forward(ctx: Any, task: _Task, outputs: list[Tensor], *data: Tensor) -> tuple[Tensor, ...]:
        ctx.task = task
        ctx.save_for_backward(*data)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        task: _Task = ctx.task
        needed = ctx.needs_input_grad[2:]
        given = [None] * 6
        for i, grad in zip(task.live, grads, strict=True):
            given[i] = grad  # type: ignore[call-overload]
        vectors = transforms.vectors_of(task.layers, given, task.plain.batch_shape, (1,) * 6)
        if vectors is None:
            return None, None, *_with_graph(task, transforms.alive(ctx.saved_tensors), given, needed)
        found = _pulled(task, vectors, needed)
        if not transforms.inside_still(task.layers):
            return None, None, *found
        # Inside the function of which this is the derivative (`torch.func.grad`), another can still be taken.
        ready = [None if g is None else transforms.at_level(g, task.layers.level) for g in found]
        if not torch.is_grad_enabled():
            return None, None, *ready
        again = _Again(task, tuple(i for i, grad in enumerate(given) if grad is not None), needed)
        tensors = (*(given[i] for i in again.used), *ctx.saved_tensors)
        attached = iter(transforms.apply_at_one_level(_Slope, again, [g for g in ready if g is not None], *tensors))
        return None, None, *(None if g is None else next(attached) for g in ready)

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        task: _Task = ctx.task
        layers, plain = task.layers, task.plain
        vectors = transforms.vectors_of(layers, tangents, plain.batch_shape, plain.core_dims())
        assert vectors is not None  # (`transforms.layers_of` has looked at them)
        with transforms.outside():
            moved = _pushed(task, vectors)
        shape = task.form.batch_shape
        covered = (vectors.covered(layers, moved[i], (*shape, moved[i].shape[-1])) for i in task.live)
        return tuple(transforms.at_level(v, layers.level) for v in covered)


class _Again(NamedTuple):
    """What a derivative of a derivative needs: which outputs had a gradient, and which data need one."""

    task: _Task
    used: tuple[int, ...]
    needed: tuple[bool, ...]

    def first(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the first derivative, in operations that can be differentiated, from gradients and data."""
        grads: list[Tensor | None] = [None] * 6
        for i, grad in zip(self.used, tensors, strict=False):
            grads[i] = grad
        found = _with_graph(self.task, tensors[len(self.used) :], grads, self.needed)
        return tuple(g for g in found if g is not None)


class _Slope(transforms.OneLevel or object):
    """The values of a first derivative, which is differentiated by its Newton step."""

    @staticmethod
    def forward(ctx: Any, again: _Again, outputs: list[Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.again = again
        ctx.save_for_backward(*tensors)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        tensors = transforms.alive(ctx.saved_tensors)
        return None, None, *torch.func.vjp(ctx.again.first, *tensors)[1](grads)


def _pulled(task: _Task, vectors: transforms.Vectors, needed: tuple[bool, ...]) -> list[Tensor | None]:
    """Return the gradients for those tensors of the form that need one."""
    form, plain, found = task.form, task.plain, task.found
    assert found.pullback is not None and found.pullback.many is not None
    keep = 1 + len(task.layers.mapped)
    with transforms.outside():
        full = [None if v is None else v.expand(len(v), *plain.batch_shape, v.shape[-1]) for v in vectors.vectors]
        if not vectors.many and keep == 1:
            alone = tuple(None if v is None else v[0] for v in full)
            return list(found.pullback.run(found.point, alone, needed))
        each = found.pullback.many(tuple(full), False)
        own = implicit.data_gradients(plain, found.point, found.status, each, needed)
        leads = (t.shape[: t.dim() - core] for t, core in zip(form.tensors().values(), form.core_dims(), strict=True))
        places = zip(own, leads, form.core_dims(), strict=True)
        ready = [None if g is None else implicit.summed(g, lead, keep, core) for g, lead, core in places]
    return [
        None if g is None else vectors.covered(task.layers, g, t.shape)
        for g, t in zip(ready, form.tensors().values(), strict=True)
    ]


def _pushed(task: _Task, vectors: transforms.Vectors) -> list[Tensor]:
    """Return the tangents of x, s, nu, lam, lam_lower and lam_upper, ``(many, *batch, size)``."""
    form, found = task.plain, task.found
    assert found.pullback is not None and found.pullback.many is not None
    tangents = dict(zip(form.tensors(), vectors.vectors, strict=True))
    x, _, nu, lam, *_ = implicit.safe_point(found.point, found.status)
    parts = tuple(tangents[name] for name in list(tangents)[: len(form.Q.tensors())])
    number = next(len(t) for t in vectors.vectors if t is not None)
    shape = (number, *form.batch_shape)

    def total(size: int, *terms: Tensor | None) -> Tensor:
        return sum((t for t in terms if t is not None), x.new_zeros(*shape, size))  # type: ignore[return-value]

    dA, dG = tangents["A"], tangents["G"]
    slope = total(
        form.n, tangents["q"], form.Q.tangent_matvec(parts, x) if any(t is not None for t in parts) else None,
        None if dA is None else rmatvec(dA, nu), None if dG is None else rmatvec(dG, lam),
    )  # fmt: skip
    eq = total(form.p, tangents["b"], None if dA is None else -matvec(dA, x))
    row = total(form.m, tangents["h"], None if dG is None else -matvec(dG, x))
    sides = [tangents.get(name) for name in ("lower", "upper")]
    lower, upper = (None if t is None else t.expand(*shape, form.n) for t in sides)
    of_x, of_nu, of_lam, of_lower, of_upper = found.pullback.many((-slope, None, eq, row, lower, upper), True)
    # (A side at infinity has no slack that could move.)
    of_s = torch.where(torch.isinf(form.h), 0.0, row - matvec(form.G, of_x))
    none = x.new_zeros(*shape, form.n)
    return [of_x, of_s, of_nu, of_lam, none if of_lower is None else of_lower, none if of_upper is None else of_upper]


def _with_graph(
    task: _Task, data: tuple[Tensor, ...], grads: list[Tensor | None], needed: tuple[bool, ...]
) -> list[Tensor | None]:
    """Return the gradients by the Newton step, in operations that can be differentiated again."""
    names = list(task.form.tensors())
    form = task.form.with_tensors(dict(zip(names, data, strict=True)))
    used = [i for i, grad in enumerate(grads) if grad is not None]
    wanted = [i for i, need in enumerate(needed) if need]

    def prepare(plain: Any) -> implicit.Prepared:
        return implicit.prepare(plain, task.found, "inactive", task.weak_tolerance)

    prepared = implicit.prepared_inside(form, prepare)

    def outputs(*values: Tensor) -> tuple[Tensor, ...]:
        tensors = dict(zip(names, data, strict=True)) | dict(zip((names[i] for i in wanted), values, strict=True))
        again = implicit.attach(form.with_tensors(tensors), prepared, transformed=True)
        point = (again.x, again.s, again.nu, again.lam, again.lam_lower, again.lam_upper)
        return tuple(point[i] for i in used)

    pull = torch.func.vjp(outputs, *(data[i] for i in wanted))[1]
    found = iter(pull(tuple(grads[i] for i in used)))
    return [next(found) if need else None for need in needed]
