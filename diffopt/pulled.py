"""Solutions whose reverse pass is their solver's own: plain first-order gradients are one call of it.

When the reverse pass is itself to be differentiated, the solution is attached anew by its Newton step
(`diffopt.implicit`), which is right to every order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt import kkt, optimal_value, transforms
from diffopt.gates import aliases
from diffopt.implicit import Prepared, attach, forward_mode, over_leaves, prepare
from diffopt.packed import Arrangement, Packed
from diffopt.problems.forms import Form, QPForm
from diffopt.solution import Report, Solution


def attach_solved(form: Form, found: kkt.Solved, attached: bool, kink_rule: str, weak_tolerance: float) -> Solution:
    """Return the solution, attached to every tensor of ``form``; where no transform of ``torch.func`` is at work.

    With the solver's own pullback, if it has one and the kink rule allows: then a plain first-order reverse pass is
    one call of it, and `prepare` and `attach` serve when a graph of the reverse pass is asked for (``create_graph``).

    Args:
        form: the problem, attached to its parameters.
        found: its solution, given away.
        attached: whether anything asks for derivatives.
        kink_rule, weak_tolerance: see `diffopt.Settings`.

    Differentiable in: see `attach`.
    """
    packed = found.packed
    # (Which way is taken must not depend on values: one instance's kink would change its neighbours' last bits.)
    if packed is None or (attached and (found.pullback is None or kink_rule != "inactive" or forward_mode(form))):
        return attach(form, prepare(form.detach(), found, kink_rule, weak_tolerance))
    others = _others(form, found, kink_rule, weak_tolerance)
    tied = packed
    if attached:
        tied = _pulled(form, found, packed, others, kink_rule, weak_tolerance)

    def later(name: str) -> tuple[Any, bool]:
        if name == "report":
            return Report(packed.residuals, packed.counts), not transforms.active()
        # With the graph that x has, wherever this is asked; what a transform may wrap does not outlive it.
        with torch.inference_mode(False), torch.set_grad_enabled(attached):
            return getattr(tied, name), not transforms.active()

    def value() -> Tensor:
        failed = kkt.failed(packed.status)
        with torch.set_grad_enabled(attached):
            point = kkt.Point(*tied.vectors())
            plain = kkt.Point(*(v.detach() for v in point))
            return optimal_value.lagrangian_value(form, point, plain, kkt.safe(plain, failed), failed, attached)

    def adjoint() -> Tensor:
        point = kkt.Point(*(v.detach() for v in tied.vectors()))
        plain = found.replace(
            point=point, status=packed.status, residuals=packed.residuals, counts=packed.counts, packed=None
        )
        return prepare(form.detach(), plain, kink_rule, weak_tolerance).system.adjoint()

    seen = {"x": tied.x, "s, nu or lam": tied.rest} if attached else {"x": tied.x}
    return Solution.later(
        later,
        x=tied.x,
        certificate=found.certificate,
        backend=found.backend,
        executor=found.executor,
        _value=optimal_value.unless_changed(form, seen, value),
        _hessian=form.Q if isinstance(form, QPForm) else None,
        _adjoint=adjoint,
    )


def _others(form: Form, found: kkt.Solved, kink_rule: str, weak_tolerance: float) -> list[tuple[kkt.Rest, Prepared]]:
    """Prepare the instances that another solver solved, and complete their counts."""
    others = []
    for rest in found.others:
        assert isinstance(form, QPForm) and found.counts is not None
        prepared = prepare(form.part(slice(rest.begin, rest.end)).detach(), rest.found, kink_rule, weak_tolerance)
        target = found.counts.view(3, -1)[1:, rest.begin : rest.end]
        target.copy_(torch.where(rest.mine, prepared.counts[1:], target))
        others.append((rest, prepared))
    return others


class Reverse(NamedTuple):
    """The reverse pass of a solution whose outputs and data are kept elsewhere."""

    task: _Task
    prepared: Prepared | None

    def first_order(
        self, form: Form, point: kkt.Point, gradients: tuple[Tensor | None, ...], needed: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients for those tensors of ``form`` (plain) that need one, from those for the point."""
        task = self.task
        if task.found.pullback is not None and self.prepared is None:
            return _pull(task, form, point, gradients, needed)
        with torch.no_grad():
            return self.with_graph(over_leaves(form, needed), point, gradients, needed)

    def with_graph(
        self, form: Form, point: kkt.Point, gradients: tuple[Tensor | None, ...], needed: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        """Return the same for attached tensors of a form, itself attached where gradients are recorded."""
        task = self.task._replace(tracked=needed, inputs=places(needed))
        found = iter(_differentiated(task, form, point, gradients, self.prepared))
        return tuple(next(found) if need else None for need in needed)


def apart(
    form: Form, found: kkt.Solved, kink_rule: str, weak_tolerance: float, keep: bool
) -> tuple[Tensor, Reverse | None]:
    """Return the counts of a solution (see `Report`), and if ``keep`` its reverse pass, for an operator of torch.

    Args:
        form: the problem, detached.
        found: its solution; it may keep the memory of the outputs, not the outputs.
    """
    found = found.unpacked().replace(point=kkt.Point(*(v.detach() for v in found.point)), packed=None)
    task = _Task(form, found, (), (), [], kink_rule, weak_tolerance)
    counts = found.counts
    if counts is None or (keep and (found.pullback is None or kink_rule != "inactive")):
        prepared = prepare(form, found, kink_rule, weak_tolerance)
        return prepared.counts, Reverse(task, prepared) if keep else None
    others = _others(form, found, kink_rule, weak_tolerance)
    return counts, Reverse(task._replace(others=others), None) if keep else None


class _Task(NamedTuple):
    """What a reverse pass needs beside the tensors that autograd saves: the form; the solution, without its point;
    which of its tensors are inputs, and their places; the instances that another solver solved; how kinks are read."""

    form: Form
    found: kkt.Solved
    tracked: tuple[bool, ...]
    inputs: tuple[int, ...]
    others: list[tuple[kkt.Rest, Prepared]]
    kink_rule: str
    weak_tolerance: float


def _pulled(
    form: Form, found: kkt.Solved, packed: Packed, others: list[tuple[kkt.Rest, Prepared]], kink_rule: str,
    weak_tolerance: float,
) -> Packed:  # fmt: skip
    """Return the answer, attached to the form by the solver's own reverse pass."""
    # Every tensor that autograd handles costs a microsecond or more: the answer goes as two, and of the data only what
    # needs a gradient.
    tensors = tuple(form.tensors().values())
    tracked = tuple([tensor.requires_grad for tensor in tensors])
    inputs = places(tracked)
    # The graph of the outputs holds the task, so the task must not hold the outputs.
    found.packed = Packed(packed.arrangement, _EMPTY, _EMPTY, packed.report)
    task = _Task(form, found, tracked, inputs, others, kink_rule, weak_tolerance)
    # (In a list they are no inputs, and autograd makes no views of them.)
    x, rest = _apply(task, [packed.x, packed.rest], *[tensors[i] for i in inputs])
    return Packed(packed.arrangement, x, rest, packed.report)


_EMPTY = torch.empty(0)


@lru_cache(1000)
def places(flags: tuple[bool, ...]) -> tuple[int, ...]:
    """Return the places of the flags that are set."""
    return tuple(place for place, flag in enumerate(flags) if flag)


class _Pulled(torch.autograd.Function):
    """The values of a solution, whose reverse pass is the solver's own.

    When the reverse pass is itself to be differentiated, the solution is attached anew by its Newton step, and that
    is differentiated: it is right to every order.
    """

    @staticmethod
    def forward(ctx: Any, task: _Task, outputs: list[Tensor], *data: Tensor) -> tuple[Tensor, ...]:
        ctx.task = task
        ctx.save_for_backward(*outputs, *data)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, for_x: Tensor | None, for_rest: Tensor | None) -> tuple[Tensor | None, ...]:
        task: _Task = ctx.task
        if for_x is None and for_rest is None:  # (the value alone was asked for)
            return (None,) * (2 + len(task.inputs))
        x, rest, *data = ctx.saved_tensors
        hollow = task.found.packed
        assert hollow is not None
        arrangement = hollow.arrangement
        point = Packed(arrangement, x, rest, hollow.report)
        if torch.is_grad_enabled() or transforms.any_wrapped(for_x, for_rest):
            form, whole = _with_saved(task, data), kkt.Point(*point.vectors())

            def again(for_x: Tensor | None, for_rest: Tensor | None) -> tuple[Tensor | None, ...]:
                return _differentiated(task, form, whole, _gradients(arrangement, for_x, for_rest))

            return (None, None, *transforms.many_at_once(again, (for_x, for_rest)))
        needed, wanted = task.tracked, ctx.needs_input_grad[2:]
        if not all(wanted):
            which = dict(zip(task.inputs, wanted, strict=True))
            needed = tuple([which.get(place, False) for place in range(len(needed))])
        form = _with_saved(task, data) if task.others else task.form
        found = _pull(task, form, point, _gradients(arrangement, for_x, for_rest), needed)
        return None, None, *[found[i] for i in task.inputs]


# (That of `torch.autograd.Function` looks for transforms first, which takes half as long as a small solve.)
_plain: Any = super(torch.autograd.Function, _Pulled)
_apply: Callable[..., tuple[Tensor, Tensor]] = _plain.apply


def _gradients(arrangement: Arrangement, for_x: Tensor | None, for_rest: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the gradients for x, s, nu, lam, lam_lower, lam_upper."""
    if for_rest is None:
        return for_x, None, None, None, None, None
    return for_x, *(arrangement.piece(for_rest, which) for which in range(5))


def _pull(
    task: _Task, form: Form, point: kkt.Point | Packed, gradients: tuple[Tensor | None, ...], needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Return what the solver's own reverse pass gives for those tensors of the form that need a gradient."""
    assert task.found.pullback is not None
    found = task.found.pullback.run(point, gradients, needed)
    for rest, prepared in task.others:
        _add_rest(form, rest, prepared, gradients, found)
    return found


def _with_saved(task: _Task, saved: Sequence[Tensor]) -> Form:
    """Return the form with the tensors that need a gradient as autograd saved them."""
    tensors = dict(task.form.tensors())
    names = list(tensors)
    for place, tensor in zip(task.inputs, saved, strict=True):
        tensors[names[place]] = tensor
    return task.form.with_tensors(tensors)


def _add_rest(
    whole: Form, rest: kkt.Rest, prepared: Prepared, grads: tuple[Tensor | None, ...], found: tuple[Tensor | None, ...]
) -> None:
    """Add the gradients of instances that another solver solved to those of the batch."""
    assert isinstance(whole, QPForm)
    begin, end, mine, _ = rest
    form, batch, count = whole.part(slice(begin, end)), whole.batch_shape, whole.batch_shape.numel()
    with torch.enable_grad():
        form = form.with_tensors({k: v.detach().requires_grad_() for k, v in form.tensors().items()})
        some = attach(form, prepared)
        outputs = (some.x, some.s, some.nu, some.lam, some.lam_lower, some.lam_upper)
        used = [
            (v, torch.where(mine.unsqueeze(-1), g.reshape(count, g.shape[-1])[begin:end], 0.0))
            for v, g in zip(outputs, grads, strict=True)
            if g is not None and v.requires_grad
        ]
        own = torch.autograd.grad(
            [v for v, _ in used], list(form.tensors().values()), [g for _, g in used], materialize_grads=True
        )
    for target, gradient, tensor, dims in zip(found, own, whole.tensors().values(), whole.core_dims(), strict=True):
        if target is None:
            continue
        lead, core = tensor.shape[: tensor.dim() - dims], tensor.shape[tensor.dim() - dims :]
        if lead == batch and lead:
            target.view(count, *core)[begin:end] += gradient
        elif lead.numel() == 1:
            target += gradient.reshape(target.shape)
        else:  # shared by some instances
            full = gradient.new_zeros(count, *core)
            full[begin:end] = gradient
            target += full.reshape(*batch, *core).sum_to_size(target.shape)


def _differentiated(
    task: _Task, form: Form, point: kkt.Point, grads: tuple[Tensor | None, ...], prepared: Prepared | None = None
) -> tuple[Tensor | None, ...]:
    """Return the reverse pass in torch operations, with a graph of its own where one is asked for."""
    create_graph = torch.is_grad_enabled()
    found = task.found.replace(point=kkt.Point(*(v.detach() for v in point)))
    with torch.enable_grad():
        if prepared is None:
            prepared = prepare(form.detach(), found, task.kink_rule, task.weak_tolerance)
        form = form.with_tensors(aliases(form.tensors()))
        again = attach(form, prepared)
        outputs = (again.x, again.s, again.nu, again.lam, again.lam_lower, again.lam_upper)
        used = [(v, g) for v, g in zip(outputs, grads, strict=True) if g is not None and v.requires_grad]
        tensors = list(form.tensors().values())
        return torch.autograd.grad(
            [v for v, _ in used], [tensors[i] for i in task.inputs], [g for _, g in used],
            create_graph=create_graph, allow_unused=True, materialize_grads=True,
        )  # fmt: skip
