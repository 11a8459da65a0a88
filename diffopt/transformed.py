"""A solution inside the derivatives of ``torch.func``, by the derivative that its solver has.

``jacrev``, ``jacfwd``, ``vmap(grad)`` and the like call a solver once and its derivative at many vectors. Where nobody
wants a derivative of that again, it is one call of compiled code, past the transforms; otherwise the solution is
attached by its Newton step, which torch transforms as any function (`diffopt.implicit`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt import implicit, kkt, optimal_value, transforms
from diffopt.active_solve import outer
from diffopt.gates import moved_like
from diffopt.packed import Packed
from diffopt.problems.forms import QPForm
from diffopt.shapes import matvec, rmatvec
from diffopt.solution import Certificate, Report, Solution


class _Task(NamedTuple):
    """What a derivative needs: the form as the transforms show it and plain; its solution, plain; the transforms; the
    places of those of the form's tensors that have a derivative; the outputs; and how kinks are read.

    ``outputs``: which of x, s, nu, lam, lam_lower, lam_upper each of them is; ``None``: they are x, and all others as
    one.
    """

    form: QPForm
    plain: QPForm
    found: kkt.Solved
    layers: transforms.Layers
    inputs: tuple[int, ...]
    outputs: tuple[int, ...] | None
    weak_tolerance: float

    def six(self, each: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return what belongs to x, s, nu, lam, lam_lower, lam_upper, ``(many, *batch, size)``, from what belongs to
        the outputs."""
        if self.outputs is None:
            for_x, for_rest = each
            if for_rest is None:
                return [for_x, None, None, None, None, None]
            arrangement, rest = _packed(self.found).arrangement, for_rest.flatten(1)
            return [for_x, *(arrangement.piece(rest, which) for which in range(5))]
        found: list[Tensor | None] = [None] * 6
        for place, vector in zip(self.outputs, each, strict=True):
            found[place] = vector
        return found

    def arranged(self, point: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the outputs that a point has."""
        if self.outputs is None:
            return point[0], torch.cat([v.flatten() for v in point[1:]])
        return tuple(point[place] for place in self.outputs)


def _packed(found: kkt.Solved) -> Packed:
    assert found.packed is not None
    return found.packed


def takes(found: kkt.Solved, kink_rule: str) -> bool:
    """Return whether a solution (of a plain form) can be attached by its solver's derivative."""
    many = found.pullback is not None and found.pullback.many is not None and found.packed is not None
    return many and kink_rule == "inactive" and not found.others


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
    # (Every tensor that passes a transform, and every view that is made inside one, takes as long as a small product of
    # matrices. So the answer stays packed where it can, and most of it is made when it is asked for.)
    tensors = tuple(form.tensors().values())
    inputs = tuple(i for i, tensor in enumerate(tensors) if transforms.followed(tensor, layers))
    packed, outputs = _packed(found), None
    if layers.mapped or layers.forward:
        bounded = form.lower is not None or form.upper is not None
        there = (True, form.m, form.p, form.m, bounded, bounded)
        outputs = tuple(i for i in range(6) if there[i])
    task = _Task(form, plain, found, layers, inputs, outputs, weak_tolerance)
    if outputs is None:
        values = (packed.x, packed.rest)
    else:
        with transforms.outside():
            values = tuple(torch.zeros_like(packed.x) if i == 1 and layers.forward else found.point[i] for i in outputs)
    attached = transforms.apply_at_one_level(
        _Direct, task, [layers.output(v) for v in values], *[tensors[i] for i in inputs]
    )

    def plain_piece(name: str) -> Tensor:
        with transforms.outside():
            piece = getattr(packed, name)
        return layers.covered(piece, second=name in ("residuals", "counts"))

    def vector(place: int) -> Tensor:
        if outputs is None:
            return attached[0] if place == 0 else packed.arrangement.piece(attached[1], place - 1)
        if place in outputs:
            return slack(outputs.index(1)) if place == 1 and layers.forward else attached[outputs.index(place)]
        return plain_piece(_NAMES[place])

    def slack(at: int) -> Tensor:
        # (Its tangent is a product with G, as large as all the rest. In an instance that failed x may be NaN, which
        # must not meet a tangent that is zero: hence the step, which has the tangent alone.)
        with transforms.outside():
            safe = kkt.safe(found.point, kkt.failed(found.status)).x
        return moved_like(plain_piece("s"), -form.inequalities(layers.covered(safe) + attached[at]))

    def later(name: str) -> tuple[Any, bool]:
        if name == "report":
            made: Any = Report(plain_piece("residuals"), plain_piece("counts"))
        else:
            made = plain_piece(name) if name == "status" else vector(_NAMES.index(name))
        return made, transforms.inside_still(layers, transforms.kinds())

    def value() -> Tensor:
        point, plain_point = kkt.Point(*map(vector, range(6))), kkt.Point(*map(plain_piece, _NAMES))
        return optimal_value.value_through(form, point, plain_point, plain_piece("status"))

    return Solution.later(
        later,
        x=attached[0],
        certificate=None if found.certificate is None else Certificate(*map(layers.covered, found.certificate)),
        backend=found.backend,
        executor=found.executor,
        _value=value,
    )


_NAMES = ("x", "s", "nu", "lam", "lam_lower", "lam_upper")


class _Direct(transforms.OneLevel):
    """The values of a solution, past the transforms."""

    @staticmethod
    def forward(ctx: Any, task: _Task, outputs: list[Tensor], *data: Tensor) -> tuple[Tensor, ...]:
        ctx.task = task
        ctx.shapes = [tensor.shape for tensor in data]
        ctx.save_for_backward(*data)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        task: _Task = ctx.task
        needed, wanted = [False] * len(task.form.core_dims()), ctx.needs_input_grad[2:]
        for place, need in zip(task.inputs, wanted, strict=True):
            needed[place] = need
        kinds = transforms.kinds()
        with transforms.outside():
            vectors = transforms.vectors_of(task.layers, kinds, grads, task.plain.batch_shape, (1,) * len(grads))
            pulled = None if vectors is None else _pulled(task, vectors, tuple(needed))
        if vectors is None or pulled is None:
            return None, None, *_with_graph(task, transforms.alive(ctx.saved_tensors), grads, wanted)
        found = [pulled[place] for place in task.inputs]
        if not vectors.here:
            shapes = zip(found, ctx.shapes, strict=True)
            found = [None if g is None else vectors.covered(task.layers, g, shape) for g, shape in shapes]
        if not transforms.inside_still(task.layers, kinds):
            return None, None, *found
        # Inside the function of which this is the derivative (`torch.func.grad`), another can still be taken.
        ready = [None if g is None else transforms.at_level(g, task.layers.level) for g in found]
        if not torch.is_grad_enabled():
            return None, None, *ready
        again = _Again(task, tuple(i for i, grad in enumerate(grads) if grad is not None), wanted)
        tensors = (*(grads[i] for i in again.used), *ctx.saved_tensors)
        attached = iter(transforms.apply_at_one_level(_Slope, again, [g for g in ready if g is not None], *tensors))
        return None, None, *(None if g is None else next(attached) for g in ready)

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        task: _Task = ctx.task
        layers, plain, outputs = task.layers, task.plain, task.outputs
        assert outputs is not None
        cores = plain.core_dims()
        kinds = transforms.kinds()
        with transforms.outside():
            own = tuple(cores[place] for place in task.inputs)
            vectors = transforms.vectors_of(layers, kinds, tangents, plain.batch_shape, own)
            assert vectors is not None  # (`transforms.layers_of` has looked at them)
            moved = _pushed(task, vectors)
        shape = task.form.batch_shape
        covered = (vectors.covered(layers, moved[i], (*shape, moved[i].shape[-1])) for i in outputs)
        return tuple(transforms.at_level(v, layers.level) for v in covered)


class _Again(NamedTuple):
    """What a derivative of a derivative needs: which outputs had a gradient, and which data need one."""

    task: _Task
    used: tuple[int, ...]
    needed: tuple[bool, ...]

    def first(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the first derivative, in operations that can be differentiated, from gradients and data."""
        grads: list[Tensor | None] = [None] * len(self.task.outputs or (0, 1))
        for i, grad in zip(self.used, tensors, strict=False):
            grads[i] = grad
        found = _with_graph(self.task, tensors[len(self.used) :], grads, self.needed)
        return tuple(g for g in found if g is not None)


class _Slope(transforms.OneLevel):
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
    """Return the gradients, plain, for those tensors of the form that need one."""
    form, plain, found = task.form, task.plain, task.found
    assert found.pullback is not None and found.pullback.many is not None
    keep, batch = 1 + len(task.layers.mapped), plain.batch_shape
    # (What is one for all instances of a batch is written out; what is packed has no batch dimensions.)
    each = vectors.vectors if task.outputs is None else [
        None if v is None else v.expand(len(v), *batch, v.shape[-1]) for v in vectors.vectors
    ]  # fmt: skip
    full = task.six(each)
    if vectors.here:
        return list(found.pullback.run(found.point, tuple(None if v is None else v[0] for v in full), needed))
    own = _data_gradients(plain, found, found.pullback.many(tuple(full), False), needed)
    places = zip(own, form.tensors().values(), form.core_dims(), strict=True)
    return [None if g is None else _summed(g, t.shape[: t.dim() - core], keep, core) for g, t, core in places]


def _data_gradients(
    form: QPForm, solved: kkt.Solved, vectors: kkt.Sides, needed: tuple[bool, ...]
) -> list[Tensor | None]:
    """Return the gradients for those tensors of a form (plain) that need one, from those of q, b, h, lower and upper.

    Args:
        solved: its solution.
        vectors: ``(many, *batch, size)``, of each instance its own.

    Returns:
        For each tensor ``(many, *batch, ...)``, of each instance its own, too: `_summed` adds up shared ones.
    """
    dq, db, dh, dlower, dupper = vectors
    count = len(form.Q.tensors())
    sides = [v for v, bound in ((dlower, form.lower), (dupper, form.upper)) if bound is not None]
    found: list[Tensor | None] = [*[None] * count, dq, None, db, None, dh, *sides]
    at_A, at_G = count + 1, count + 3
    if any(needed[:count]) or needed[at_A] or needed[at_G]:
        # (An instance that failed has zeros here, or NaN if its derivative was asked for.)
        x, _, nu, lam, *_ = kkt.safe(solved.point, kkt.failed(solved.status))
        if any(needed[:count]):
            found[:count] = form.Q.pairing_gradient(dq, x)
        if needed[at_A]:
            found[at_A] = outer(nu, dq) - outer(db, x)
        if needed[at_G]:
            found[at_G] = outer(lam, dq) - outer(dh, x)
    return [v if need else None for v, need in zip(found, needed, strict=True)]


def _summed(gradient: Tensor, lead: torch.Size, keep: int, dims: int) -> Tensor:
    """Return a gradient summed over what a tensor was broadcast along.

    Args:
        gradient: its first ``keep`` dimensions stay, its last ``dims`` too.
        lead: the batch dimensions of the tensor, which may be fewer.
    """
    if gradient.shape[keep : gradient.dim() - dims] == lead:
        return gradient
    first, core = gradient.shape[:keep], gradient.shape[gradient.dim() - dims :]
    missing = gradient.dim() - keep - dims - len(lead)
    return gradient.sum_to_size(*first, *[1] * missing, *lead, *core).reshape(*first, *lead, *core)


def _pushed(task: _Task, vectors: transforms.Vectors) -> list[Tensor]:
    """Return the tangents of x, of a step from there (in place of s), of nu, lam, lam_lower and lam_upper, ``(many,
    *batch, size)``."""
    form, found = task.plain, task.found
    assert found.pullback is not None and found.pullback.many is not None
    names = list(form.tensors())
    tangents = dict.fromkeys(names) | dict(zip((names[i] for i in task.inputs), vectors.vectors, strict=True))
    parts = tuple(tangents[name] for name in names[: len(form.Q.tensors())])
    number = next(len(t) for t in vectors.vectors if t is not None)
    shape = (number, *form.batch_shape)
    dA, dG, slope, eq, row = (tangents[name] for name in ("A", "G", "q", "b", "h"))

    def total(*terms: Tensor | None) -> Tensor | None:
        there = [t for t in terms if t is not None]
        return sum(there[1:], there[0]) if there else None

    if dA is not None or dG is not None or any(t is not None for t in parts):
        x, _, nu, lam, *_ = kkt.safe(found.point, kkt.failed(found.status))
        slope = total(
            slope, form.Q.tangent_matvec(parts, x),
            None if dA is None else rmatvec(dA, nu), None if dG is None else rmatvec(dG, lam),
        )  # fmt: skip
        eq = total(eq, None if dA is None else -matvec(dA, x))
        row = total(row, None if dG is None else -matvec(dG, x))
    sides = (slope, None, eq, row, tangents.get("lower"), tangents.get("upper"))
    full = tuple(None if t is None else t.expand(*shape, t.shape[-1]) for t in sides)
    of_x, of_nu, of_lam, of_lower, of_upper = found.pullback.many(full, True)
    none = of_x.new_zeros(()).expand(*shape, form.n)
    return [of_x, of_x, of_nu, of_lam, none if of_lower is None else of_lower, none if of_upper is None else of_upper]


def _with_graph(
    task: _Task, data: tuple[Tensor, ...], grads: Sequence[Tensor | None], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients by the Newton step, in operations that can be differentiated again, for those inputs that
    want one."""
    names = [list(task.form.tensors())[place] for place in task.inputs]
    known = dict(zip(names, data, strict=True))
    form = task.form.with_tensors(task.form.tensors() | known)
    used = [i for i, grad in enumerate(grads) if grad is not None]
    asked = [name for name, want in zip(names, wanted, strict=True) if want]

    with transforms.outside():
        found = task.found.unpacked()

    def prepare(plain: Any) -> implicit.Prepared:
        return implicit.prepare(plain, found, "inactive", task.weak_tolerance)

    prepared = implicit.prepared_inside(form, prepare)

    def outputs(*values: Tensor) -> tuple[Tensor, ...]:
        tensors = form.tensors() | dict(zip(asked, values, strict=True))
        again = implicit.attach(form.with_tensors(tensors), prepared, transformed=True)
        each = task.arranged((again.x, again.s, again.nu, again.lam, again.lam_lower, again.lam_upper))
        return tuple(each[i] for i in used)

    pull = torch.func.vjp(outputs, *(known[name] for name in asked))[1]
    gradients = iter(pull(tuple(grads[i] for i in used)))
    return [next(gradients) if want else None for want in wanted]
