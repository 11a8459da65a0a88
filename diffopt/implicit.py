"""How a solution moves with its parameters: the only place of gradients, for all problem classes.

At a solution w = (x, nu, lam, bound forces) the optimality conditions of its active set hold,
F(w; theta) = 0. One Newton step w - K(theta)^-1 F(w; theta), K = dF/dw, does not move the
value, and its derivative is that of the solution (the implicit function theorem). So the solution is
attached to theta by that step: the step's value is known to be zero, and only its derivative is ever
computed, by one solve with K. F and K are ordinary torch functions of theta, and the solve is closed
under differentiation, so reverse and forward mode and higher derivatives follow. For a quadratic program
the conditions are linear in w and one step is exact to every order; otherwise k steps are exact to
order 2^k - 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from diffopt import kkt, transforms, waiting
from diffopt.errors import ADJOINT, ChangedDataError, warn_of_gradients
from diffopt.linalg.central import central_ratio
from diffopt.linalg.matrices import SymmetricMatrix
from diffopt.linalg.saddle import Blocks, Factor, Saddle, solve_minimum_norm
from diffopt.linalg.scaling import Scaling
from diffopt.packed import Arrangement, Packed
from diffopt.problems.forms import Form, QPForm
from diffopt.solution import Certificate, Report, Solution, Status

NONLINEAR_STEPS = 2
"""Newton steps by which a nonlinear problem is attached: derivatives are exact up to order 3."""


class Rule(NamedTuple):
    """Which rows the derivatives of a batch hold, as tensors with the batch's leading dimensions.

    ``failed`` ``(*batch,)``; ``active``; ``equation`` ``(*batch, m)``, the inequality rows that are equations (fewer
    than the active ones only under the kink rule ``"minimum_norm"``); ``ratio_row``, ``ratio_bound``: s/lam of weakly
    active rows under the rule ``"central"``, else zeros.
    """

    failed: Tensor
    active: kkt.Activity
    equation: Tensor
    ratio_row: Tensor
    ratio_bound: Tensor


class Prepared(NamedTuple):
    """A solved batch with its active sets decided: all that `attach` needs.

    ``system`` computes on plain tensors. Inside the transforms of ``torch.func`` the others are as the transforms
    show them, so they may lack batch dimensions that ``system`` has; see `flatten` and `unflatten`.
    """

    found: kkt.Solved
    safe: kkt.Point
    system: _KKT
    counts: Tensor
    rule: Rule


@torch.no_grad()
def prepare(form: Form, found: kkt.Solved, kink_rule: str, weak_tolerance: float) -> Prepared:
    """Decide which rows are active at a solution, by the kink rule where that is open.

    Args:
        form: the problem, detached. Inside ``torch.func`` transforms this must run where tensors are plain.
        found: its solution.
        kink_rule, weak_tolerance: see `diffopt.Settings`.
    """
    failed = _failed(found.status)
    safe = _safe(found.point, failed)
    iterations = found.iterations if found.counts is None else found.counts[0]
    assert iterations is not None
    with waiting.allow(found.sync):
        saddle, scaling = (None, found.system.scaling) if found.system else kkt.assemble(form, safe)
        active = kkt.activity(form, safe, scaling, weak_tolerance)
        weakly_active = torch.where(failed, 0, active.weak_count())
        system = _KKT(form.dtype, found.system, _all_rows(active, failed), kink_rule, failed, saddle, scaling)
        counts = torch.stack([iterations, weakly_active, torch.where(failed, -1, system.dependent())])
        if kink_rule == "nan":
            # What has no derivative is treated as what has no solution, but for its values.
            adjoint = system.adjoint()
            failed = failed | (counts[1:] > 0).any(0) | (adjoint > ADJOINT)
            safe = _safe(found.point, failed)
            system = _KKT(form.dtype, found.system, _all_rows(active, failed), kink_rule, failed, saddle, scaling)
            system.residual = adjoint
    ratios = (ratio.to(form.dtype) for ratio in (system.ratio_row, system.ratio_bound))
    return Prepared(found, safe, system, counts, Rule(failed, system.active, system.equation_row, *ratios))


def prepared_inside(form: Form, prepare: Callable[[Form], Prepared]) -> Prepared:
    """Return what ``prepare`` makes of a form over plain tensors, as the transforms of ``torch.func`` show it."""
    done: list[Prepared] = []

    def run(inner: Form) -> tuple[Tensor, ...]:
        done.append(prepare(inner.detach()))
        return flatten(done[0])

    call = transforms.Call(form, run, BATCH_SECOND, all_layers=True)
    outputs = transforms.Unwrapped.apply(call, *(tensor.detach() for tensor in form.tensors().values()))
    return unflatten(done[0], outputs)


BATCH_SECOND = 2
"""How many of the tensors of `flatten` have one other dimension before those of the batch."""


def flatten(prepared: Prepared) -> tuple[Tensor, ...]:
    """Return the tensors of a prepared batch, for a way through a transform; the first `BATCH_SECOND` of them,
    ``(3, *batch)``, have their batch dimensions second. `unflatten` is the way back."""
    found, rule = prepared.found, prepared.rule
    certificate = () if found.certificate is None else tuple(found.certificate)
    return (
        prepared.counts, found.residuals, found.status, *found.point, *prepared.safe,
        rule.failed, *rule.active, rule.equation, rule.ratio_row, rule.ratio_bound, *certificate,
    )  # fmt: skip


def unflatten(prepared: Prepared, tensors: tuple[Tensor, ...]) -> Prepared:
    """Return the batch with the tensors of `flatten` as they came out of a transform."""
    counts, residuals, status, *rest = tensors
    point, safe = kkt.Point(*rest[:6]), kkt.Point(*rest[6:12])
    rule = Rule(rest[12], kkt.Activity(*rest[13:20]), *rest[20:23])
    certificate = Certificate(*rest[23:]) if rest[23:] else None
    found = prepared.found.replace(point=point, status=status, residuals=residuals, certificate=certificate)
    return Prepared(found, safe, prepared.system, counts, rule)


def attach(form: Form, prepared: Prepared, transformed: bool = False) -> Solution:
    """Return the solution, attached to every tensor of ``form``.

    Args:
        form: the problem, attached to its parameters.
        transformed: attach it whether or not a derivative can be seen coming (inside ``torch.func`` it cannot always).

    Differentiable in:
        every tensor of the form, in x, s, lam, nu, lam_lower, lam_upper and value. A failed instance
        passes NaN to whatever asks for its derivative, and exactly zero where the incoming gradient is zero.
    """
    found, safe, failed = prepared.found, prepared.safe, prepared.rule.failed
    attached = transformed or needs_graph(form)
    point = _attached_point(form, prepared) if attached else found.point

    def value() -> Tensor:
        # Computed on access, with the graph that the other fields have, wherever that is.
        with torch.set_grad_enabled(attached):
            return _value(form, point, found.point, safe, failed, attached)

    return Solution(
        *(point.x, point.s, point.lam, point.nu, point.lam_lower, point.lam_upper),
        status=found.status,
        report=Report(found.residuals, prepared.counts),
        certificate=found.certificate,
        backend=found.backend,
        executor=found.executor,
        _value=_unless_changed(form, point._asdict(), value),
        _hessian=form.Q if isinstance(form, QPForm) else None,
        _adjoint=None if transformed else prepared.system.adjoint,
    )


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
    if packed is None or (attached and (found.pullback is None or kink_rule != "inactive" or _forward_mode(form))):
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
        failed = _failed(packed.status)
        with torch.set_grad_enabled(attached):
            point = kkt.Point(*tied.vectors())
            plain = kkt.Point(*(v.detach() for v in point))
            return _value(form, point, plain, _safe(plain, failed), failed, attached)

    def adjoint() -> Tensor:
        point = kkt.Point(*(v.detach() for v in tied.vectors()))
        plain = found.replace(
            point=point, status=packed.status, residuals=packed.residuals, counts=packed.counts, packed=None
        )
        return prepare(form.detach(), plain, kink_rule, weak_tolerance).system.adjoint()

    return Solution.later(
        later,
        x=tied.x,
        certificate=found.certificate,
        backend=found.backend,
        executor=found.executor,
        _value=_unless_changed(form, {"x": tied.x, "s, nu or lam": tied.rest} if attached else {"x": tied.x}, value),
        _hessian=form.Q if isinstance(form, QPForm) else None,
        _adjoint=adjoint,
    )


def _others(form: Form, found: kkt.Solved, kink_rule: str, weak_tolerance: float) -> list[tuple[kkt.Rest, Prepared]]:
    """Prepare the instances that another solver solved, and complete their counts."""
    others = []
    for rest in found.others:
        assert isinstance(form, QPForm) and found.counts is not None
        prepared = prepare(form.part(rest.begin, rest.end).detach(), rest.found, kink_rule, weak_tolerance)
        target = found.counts.view(3, -1)[1:, rest.begin : rest.end]
        target.copy_(torch.where(rest.mine, prepared.counts[1:], target))
        others.append((rest, prepared))
    return others


def over_leaves(form: Form, needed: tuple[bool, ...]) -> Form:
    """Return the form over detached tensors, of which those that are needed require a gradient."""
    named = zip(form.tensors().items(), needed, strict=True)
    return form.with_tensors({name: tensor.detach().requires_grad_(need) for (name, tensor), need in named})


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


def value_gradients(
    form: Form, point: kkt.Point, status: Tensor, gradient: Tensor, create_graph: bool
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return the gradients that the optimal value passes to the tensors of the form and to the point.

    To the first go the partial derivatives of the Lagrangian. To the second goes zero, of which the derivative is none.
    """
    with torch.enable_grad():
        form = form.with_tensors(aliases(form.tensors()))
        point = kkt.Point(*aliases(point._asdict()).values())
        failed = _failed(status)
        plain = kkt.Point(*(v.detach() for v in point))
        total = _value(form, point, plain, _safe(plain, failed), failed, attached=True)
        inputs = (*form.tensors().values(), *point)
        tracked = [v for v in inputs if v.requires_grad]
        found = iter(
            torch.autograd.grad(
                total, tracked, gradient, create_graph=create_graph, materialize_grads=True, allow_unused=True
            )
        )
        gradients = tuple(next(found) if v.requires_grad else torch.zeros_like(v) for v in inputs)
    return gradients[: -len(point)], gradients[-len(point) :]


class _Task(NamedTuple):
    """What a reverse pass needs beside the tensors that autograd saves: the form; the solution, without its point; the
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
    form, batch, count = whole.part(begin, end), whole.batch_shape, whole.batch_shape.numel()
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


def aliases(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under names of their own for autograd: one that was computed from another is not to collect
    its part twice."""
    return {name: tensor.view_as(tensor) for name, tensor in tensors.items()}


def safe_point(point: kkt.Point, status: Tensor) -> kkt.Point:
    """Return a point with harmless values in instances that failed."""
    return _safe(point, _failed(status))


def optimal_value(form: Form, point: kkt.Point, values: kkt.Point, status: Tensor) -> Tensor:
    """Return the optimal value, attached to the form and through the point.

    Args:
        point: the attached solution; values: the same without a derivative.
    """
    failed = _failed(status)
    return _value(form, point, values, _safe(values, failed), failed, attached=True)


def data_gradients(
    form: QPForm, point: kkt.Point, status: Tensor, vectors: kkt.Sides, needed: tuple[bool, ...]
) -> list[Tensor | None]:
    """Return the gradients for those tensors of a form (plain) that need one, from those of q, b, h, lower and upper.

    Args:
        vectors: ``(many, *batch, size)``, of each instance its own.

    Returns:
        For each tensor ``(many, *batch, ...)``, of each instance its own, too: `summed` adds up shared ones.
    """
    dq, db, dh, dlower, dupper = vectors
    names = list(form.tensors())
    count = len(form.Q.tensors())
    found: dict[str, Tensor | None] = {"q": dq, "b": db, "h": dh, "lower": dlower, "upper": dupper}
    if not (any(needed[:count]) or needed[names.index("A")] or needed[names.index("G")]):
        return [found[name] if need else None for name, need in zip(names, needed, strict=True)]
    # (An instance that failed has zeros here, or NaN if its derivative was asked for.)
    x, _, nu, lam, *_ = safe_point(point, status)
    if any(needed[:count]):
        found |= dict(zip(names, form.Q.pairing_gradient(dq, x), strict=False))
    if needed[names.index("A")]:
        found["A"] = _outer(nu, dq) - _outer(db, x)
    if needed[names.index("G")]:
        found["G"] = _outer(lam, dq) - _outer(dh, x)
    return [found[name] if need else None for name, need in zip(names, needed, strict=True)]


def summed(gradient: Tensor, lead: torch.Size, keep: int, dims: int) -> Tensor:
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


def _failed(status: Tensor) -> Tensor:
    return (status != Status.SOLVED) & (status != Status.ALMOST_SOLVED)


def _forward_mode(form: Form) -> bool:
    # Outside any level no tensor has a tangent; asking that costs less than asking every tensor.
    if not transforms.forward_mode():
        return False
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in form.tensors().values())


def needs_graph(form: Form) -> bool:
    """Return whether anything asks for derivatives in the form's tensors."""
    if torch.is_grad_enabled():
        for tensor in form.tensors().values():
            if tensor.requires_grad:
                return True
    return _forward_mode(form)


def _safe(point: kkt.Point, failed: Tensor) -> kkt.Point:
    """Return the point with harmless values, all different, in failed instances: NaN times 0 is not 0."""

    def filled(v: Tensor) -> Tensor:
        filler = torch.linspace(0.7, 1.3, v.shape[-1], dtype=v.dtype, device=v.device)
        return torch.where(failed.unsqueeze(-1), filler, v)

    return kkt.Point(*(filled(v) for v in point))


def _all_rows(active: kkt.Activity, failed: Tensor) -> kkt.Activity:
    """Let every row of a failed instance take part, so that a tangent in any of its data is seen."""
    bad = failed.unsqueeze(-1)
    if active.fixed.shape[-1]:
        # Held at the mean of its bounds, x depends on both.
        active = active._replace(
            fixed=active.fixed | bad, lower=active.lower & ~bad, upper=active.upper & ~bad,
            weak_lower=active.weak_lower & ~bad, weak_upper=active.weak_upper & ~bad,
        )  # fmt: skip
    return active._replace(row=active.row | bad, weak_row=active.weak_row & ~bad)


def _attached_point(form: Form, prepared: Prepared) -> kkt.Point:
    system, safe, values = prepared.system, prepared.safe, prepared.found.point
    failed, active, equation, *ratios = prepared.rule
    w = Blocks(safe.x, safe.nu, safe.lam, kkt.bound_force(form, safe))
    for _ in range(1 if isinstance(form, QPForm) else NONLINEAR_STEPS):
        F = kkt.conditions(form, active, w, *ratios)
        d = kkt.derivatives(form, w.x, w.row, w.eq)
        data = (*d.hessian.tensors(), d.equality_jacobian, d.inequality_jacobian)
        masks = (equation, active.row, failed.unsqueeze(-1))
        step = Blocks(*_Solve.apply(_Bound(system, d.hessian), True, False, *F, *masks, *data))
        w = w.minus(step)
    moved_lower, moved_upper = kkt.bound_duals(form, active, w.bound)
    if w.bound.shape[-1]:
        bad = failed.unsqueeze(-1)
        moved_lower, moved_upper = torch.where(bad, -w.bound, moved_lower), torch.where(bad, w.bound, moved_upper)
    slack = _only_derivative(-form.inequalities(w.x))
    slack = _Gate.apply(slack, failed)
    return kkt.Point(
        values.x + (w.x - safe.x),
        values.s + slack,
        values.nu + (w.eq - safe.nu),
        values.lam + (w.row - safe.lam),
        values.lam_lower + _only_derivative(moved_lower),
        values.lam_upper + _only_derivative(moved_upper),
    )


def _only_derivative(v: Tensor) -> Tensor:
    """Return zeros that carry the derivative of v; where v is infinite it has none. (NaN stays NaN: it
    belongs to a failed instance, whose derivative must not vanish unseen.)"""
    return torch.where(torch.isinf(v), 0.0, v - v.detach())


def _unless_changed(form: Form, point: dict[str, Tensor], value: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return ``value``, with an error where data or point were changed in place between now and the call."""
    tensors = form.tensors()
    try:
        before = [tensor._version for tensor in tensors.values()] + [tensor._version for tensor in point.values()]
    except RuntimeError:  # tensors of inference mode do not count their changes
        return value

    def checked() -> Tensor:
        for (name, tensor), version in zip((tensors | point).items(), before, strict=True):
            freed = _is_freed(tensor)
            if tensor._version != version or freed:
                raise ChangedDataError(
                    f"`{name}` was {'freed' if freed else 'changed in place'} after the solve and before "
                    f"`Solution.value` was first read, which is computed then. Read `value` right after the solve"
                    f"{', or let FSDP shard the module around the layer and not the layer itself' if freed else ''}."
                )
        return value()

    return checked


def _is_freed(tensor: Tensor) -> bool:
    try:
        return tensor.untyped_storage().nbytes() == 0 < tensor.numel()
    except RuntimeError:  # a tensor inside a transform of torch.func has no storage of its own
        return False


def value(form: Form, point: kkt.Point, status: Tensor) -> Tensor:
    """Return the optimal value ``(*batch,)`` at an attached point, with its derivative, that of the Lagrangian."""
    failed, attached = _failed(status), needs_graph(form)
    plain = kkt.Point(*(v.detach() for v in point))
    return _value(form, point, plain, _safe(plain, failed), failed, attached)


def _value(form: Form, point: kkt.Point, values: kkt.Point, safe: kkt.Point, failed: Tensor, attached: bool) -> Tensor:
    """Return the optimal value. Its derivative is that of the Lagrangian, whose slope in x, lam, nu is 0."""
    objective = form.detach().objective(values.x)
    if not attached:
        return objective
    bad = failed.unsqueeze(-1)
    x, _, nu, lam, lower, upper = (
        _Stationary.apply(torch.where(bad, a, b - (v - c)))
        for a, b, v, c in zip(safe, point, values, safe, strict=True)
    )
    g = form.inequalities(x)
    total = form.objective(x) + (nu * form.equalities(x)).sum(-1)
    # (What is infinite must not meet its multiplier, or the gradient of that is NaN.)
    total = total + (lam * torch.where(torch.isfinite(g), g, 0.0)).sum(-1)
    for bound, dual, sign in ((form.lower, lower, -1), (form.upper, upper, 1)):
        if bound is not None:
            total = total + sign * (dual * torch.where(torch.isfinite(bound), x - bound, 0.0)).sum(-1)
    change = _Gate.apply(_only_derivative(total).unsqueeze(-1), failed).squeeze(-1)
    return objective + change


class _KKT:
    """The KKT system of the active sets of a batch, in original units: factored when first needed.

    ``kink_rule`` decides what weakly active rows do; see `diffopt.Settings`.
    """

    def __init__(
        self, dtype: torch.dtype, prepared: kkt.System | None, active: kkt.Activity, kink_rule: str, failed: Tensor,
        saddle: Saddle | None, scaling: Scaling,
    ) -> None:  # fmt: skip
        self.failed, self.scaling, self.dtype = failed, scaling, dtype
        self.sync = waiting.allowed()
        self.prepared = prepared
        self._saddle = saddle if prepared is None else prepared.factor.system
        self.weak = active.weak_count() > 0
        weak_any = kink_rule not in ("inactive", "nan") and bool(self.weak.any())
        self.dense_rule = kink_rule == "minimum_norm" and weak_any
        self.weak_row = active.weak_row
        none_row, none_bound = torch.zeros_like(active.row), torch.zeros_like(active.lower)
        strict = active
        if weak_any:
            active = active._replace(
                row=active.row | active.weak_row,
                lower=active.lower | active.weak_lower,
                upper=active.upper | (active.weak_upper & ~(active.lower | active.weak_lower)),
            )
        self.active = active
        # Rows that are equations of the system, and columns that are unknowns: they differ only
        # under "minimum_norm", which leaves weakly active rows undecided.
        self.equation_row = strict.row if self.dense_rule else active.row
        self.equation_bound = _held(strict if self.dense_rule else active)
        zero = torch.zeros((), dtype=torch.float64, device=failed.device)
        self.ratio_row, self.ratio_bound = zero.expand(none_row.shape), zero.expand(none_bound.shape)
        self._scaled_ratios = (self.ratio_row, self.ratio_bound)
        if weak_any and kink_rule == "central":
            self._use_central(strict)
        self._factor: Factor | None = None
        self.residual: Tensor | None = None  # what `adjoint` returns, once known

    def _use_central(self, strict: kkt.Activity) -> None:
        d, _, rows, cost = self.scaling
        up, down = strict.weak_upper & ~_held(strict), strict.weak_lower & ~_held(strict)
        sign = up.long() - (down & ~up).long()
        e_row, e_bound = central_ratio(self.saddle(), kkt.rows_of(strict), self.weak_row, sign)
        self._scaled_ratios = (e_row, e_bound)
        self.ratio_row = e_row * cost / rows.square()
        self.ratio_bound = e_bound * cost * d.square() if e_bound.shape[-1] else e_bound

    def saddle(self) -> Saddle:
        """Return the equilibrated saddle-point system of the data."""
        assert self._saddle is not None
        return self._saddle

    def factor(self) -> Factor:
        """Return the factored system; that of the backend where it has the same rows."""
        if self._factor is None:
            prepared = self.prepared
            if prepared is not None and self._same_rows(prepared.active):
                self._factor = prepared.factor
            else:
                rows = kkt.rows_of(self.active, *self._scaled_ratios)
                self._factor = self.saddle().factor(rows, final=True)
        return self._factor

    def _same_rows(self, other: kkt.Activity) -> bool:
        if not waiting.allowed():
            return False
        if bool((self._scaled_ratios[0] != 0).any()) or bool((self._scaled_ratios[1] != 0).any()):
            return False
        same = torch.equal(self.active.row, other.row)
        return same and torch.equal(_held(self.active), _held(other))

    def dependent(self) -> Tensor:
        """Return the number of dependent active rows of each instance."""
        return self.factor().dependent().expand(self.failed.shape)

    def adjoint(self) -> Tensor:
        """Return the relative residual, ``(*batch,)``, of K u = r, refined, for a fixed r in x: see `Solution.adjoint`.

        (The probe has a part along any direction; where K is singular along one, the residual keeps that part.)
        """
        if self.residual is not None:
            return self.residual
        saddle, shape = self.saddle(), self.failed.shape
        probe = torch.cos(1 + torch.arange(saddle.Q.n, dtype=torch.float64, device=self.failed.device).square())
        sizes = (saddle.A.shape[-2], saddle.G.shape[-2], self.active.lower.shape[-1])
        r = Blocks(probe.expand(*shape, -1), *(probe.new_zeros(*shape, size) for size in sizes))
        factor = self.factor()
        error = torch.where(factor.failed, torch.inf, factor.solve_accurately(r)[1])
        self.residual = torch.where(self.failed, torch.nan, error.expand(shape))
        return self.residual

    def solve(self, r: Blocks, transpose: bool) -> Blocks:
        """Return K^-1 r (or K'^-1 r): zero where r is zero, NaN where a failed instance has r != 0."""
        with waiting.allow(self.sync):
            return self._solve(r, transpose)

    def _solve(self, r: Blocks, transpose: bool) -> Blocks:
        asked = torch.stack([(v != 0).any(-1) for v in r if v.shape[-1]]).any(0)
        if not waiting.some(asked):
            return Blocks(*(torch.zeros_like(v) for v in r))
        bad = self.failed.unsqueeze(-1)
        # NaN that comes in goes out, and must not meet a factor that neighbours share.
        poisoned = ~torch.stack([torch.isfinite(v).all(-1) for v in r if v.shape[-1]]).all(0) & asked
        skip = bad | poisoned.unsqueeze(-1)
        clean = Blocks(*(torch.where(skip, 0.0, v.double()) for v in r))
        scaled = kkt.to_scaled(clean, self.scaling)
        found, residual = solve_minimum_norm(self.factor(), scaled)
        # (Which way an instance goes depends on its own kinks alone.)
        dense = self.weak if self.dense_rule else torch.zeros_like(self.failed)
        if waiting.allowed() and (poor := int(((residual > ADJOINT) & ~(self.failed | dense)).sum())):
            warn_of_gradients(poor, residual.numel())
        u = kkt.to_original(found, self.scaling)
        if self.dense_rule:
            u = self._solve_dense(clean, transpose).where(dense, u)
        spoiled = ((self.failed & asked) | poisoned).unsqueeze(-1)
        return Blocks(*(torch.where(spoiled, torch.nan, v).to(self.dtype) for v in u))

    def _solve_dense(self, r: Blocks, transpose: bool) -> Blocks:
        """Return the minimum-norm solution in original units, by a pseudo-inverse of all of K."""
        matrix = self._dense()
        sizes = [v.shape[-1] for v in r]
        shape = torch.broadcast_shapes(self.failed.shape, *(v.shape[:-1] for v in r))
        right = torch.cat([v.expand(*shape, v.shape[-1]) for v in r], -1).unsqueeze(-1)
        inverse = torch.linalg.pinv(matrix.mT if transpose else matrix, rtol=1e-11)
        return Blocks(*(inverse @ right).squeeze(-1).split(sizes, -1))

    def _dense(self) -> Tensor:
        """Return K as ``(*batch, N, N)`` in original units, one column per unknown."""
        saddle = self.saddle()
        d, eq, rows, cost = self.scaling
        n, p = saddle.Q.n, saddle.A.shape[-2]
        m, k = self.active.row.shape[-1], self.active.lower.shape[-1]
        shape = self.failed.shape
        column = torch.cat([v.expand(*shape, v.shape[-1]) for v in (1 / d, cost / eq, cost / rows)], -1)
        row = torch.cat([v.expand(*shape, v.shape[-1]) for v in (1 / (cost * d), 1 / eq, 1 / rows)], -1)
        K = torch.zeros(*shape, n + p + m + k, n + p + m + k, dtype=torch.float64, device=d.device)
        K[..., :n, :n] = saddle.Q.dense()
        K[..., :n, n : n + p], K[..., n : n + p, :n] = saddle.A.mT, saddle.A
        K[..., :n, n + p : n + p + m], K[..., n + p : n + p + m, :n] = saddle.G.mT, saddle.G
        K[..., : n + p + m, : n + p + m] *= row.unsqueeze(-1) * column.unsqueeze(-2)
        eye = torch.eye(n, dtype=K.dtype, device=K.device)[:, :k]
        K[..., :n, n + p + m :], K[..., n + p + m :, :n] = eye, eye.mT
        equation = torch.cat([torch.ones_like(column[..., : n + p]), self.equation_row, self.equation_bound], -1)
        unknown = torch.cat([torch.ones_like(column[..., : n + p]), self.active.row, _held(self.active)], -1)
        return K * equation.unsqueeze(-1) * unknown.unsqueeze(-2)


def _held(active: kkt.Activity) -> Tensor:
    return active.lower | active.upper | active.fixed


class _Bound(NamedTuple):
    """A `_KKT` with the structure in which K's tensors come."""

    system: _KKT
    hessian: SymmetricMatrix


class _Solve(torch.autograd.Function):
    """u = K^-1 r (or the transpose), differentiable in r and in K's data, to any order.

    du = K^-1 (dr - dK u). Inputs: the operator; whether r is known to be zero (then u is zero, and
    only its derivatives matter); transpose; the blocks of r; which inequality rows are equations, and which of their
    multipliers are unknowns; which instances failed; K's data (Q's tensors, A, G). The batch dimensions of r end with
    those of the operator: others before them are many right-hand sides of one system.
    """

    @staticmethod
    def forward(op: _Bound, zero: bool, transpose: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        r = Blocks(*tensors[:4])
        if zero:
            return tuple(torch.zeros_like(v) for v in r)
        return tuple(op.system.solve(r, transpose))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.op, ctx.zero, ctx.transpose = inputs[0], inputs[1], inputs[2]
        kept = inputs[7:]
        ctx.count = len(kept)
        ctx.save_for_backward(*kept, *output)
        ctx.save_for_forward(*kept, *output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        op: _Bound = ctx.op
        # (Read once: checkpointing gives each tensor a single time.)
        saved = ctx.saved_tensors
        kept, u = saved[: ctx.count], Blocks(*saved[ctx.count :])
        needed = ctx.needs_input_grad[10:]
        if ctx.zero and not torch.is_grad_enabled():
            # A step that is zero has a first derivative that does not see K's own change.
            needed = (False,) * len(needed)
        # A failed instance whose derivative nobody asked for (u = 0) adds nothing to a higher one: y may be NaN there.
        idle = kept[2] & ~torch.stack([(v != 0).any(-1, keepdim=True) for v in u if v.shape[-1]]).any(0)

        def pulled(*grads: Tensor) -> tuple[Tensor | None, ...]:
            y = Blocks(*_Solve.apply(op, False, not ctx.transpose, *grads, *kept))
            used = Blocks(*(torch.where(idle, 0.0, v) for v in y)) if any(needed) else y
            return (*y, None, None, None, *_data_gradients(op, kept, needed, used, u, ctx.transpose))

        return None, None, None, *transforms.many_at_once(pulled, grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        op: _Bound = ctx.op
        saved = transforms.primals(ctx.saved_tensors)
        kept, u = saved[: ctx.count], Blocks(*saved[ctx.count :])

        def pushed(*tangents: Tensor | None) -> tuple[Tensor, ...]:
            r = [torch.zeros_like(v) if t is None else t for v, t in zip(u, tangents[:4], strict=True)]
            right = Blocks(*r).minus(_matrix_tangent(op, kept, tangents[7:], u, ctx.transpose))
            return _Solve.apply(op, False, ctx.transpose, *right, *kept)

        with transforms.seen_by_other_forward_modes():
            return transforms.many_at_once(pushed, tangents[3:])  # type: ignore[return-value]

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], op: _Bound, zero: bool, transpose: bool, *tensors: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        dims = in_dims[3:]
        cores = (1, 1, 1, 1, 1, 1, 1, *op.hessian.core_dims(), 2, 2)
        leads = [v.dim() - core - (dim is not None) for v, core, dim in zip(tensors, cores, dims, strict=True)]
        # The batch dimensions of the operator itself, as far as this level shows them; r may have others before those.
        own, all_of_r = leads[4], leads[0]
        # A dimension of the operator goes first among the operator's. Any other makes many right-hand sides for one
        # factor, and goes first of all.
        is_own = dims[4] is not None
        place = all_of_r - own if is_own else 0
        moved = []
        for i, (v, dim, lead) in enumerate(zip(tensors, dims, leads, strict=True)):
            at = max(0, lead - own) if is_own else 0
            if dim is None:
                # Right-hand sides are counted; other things are shared by what they lack a dimension for.
                moved.append(v.unsqueeze(at) if i < 4 or at else v)
                continue
            v = v.movedim(dim, 0)
            missing = (own if is_own else all_of_r) - lead
            if missing > 0:
                v = v.reshape(info.batch_size, *[1] * missing, *v.shape[1:])
            moved.append(v.movedim(0, at))
        shape = torch.broadcast_shapes(*(v.shape[:-1] for v in moved[:4]))
        right = (v.expand(*shape, v.shape[-1]) for v in moved[:4])
        return _Solve.apply(op, zero, transpose, *right, *moved[4:]), (place,) * 4


def _data_gradients(
    op: _Bound, kept: tuple[Tensor, ...], needed: tuple[bool, ...], y: Blocks, u: Blocks, transpose: bool
) -> tuple[Tensor | None, ...]:
    """Return the gradient of -y'Ku with respect to those of K's data that need one."""
    *masks, A, G = kept
    equation, unknown, _, *parts = masks
    if transpose:
        equation, unknown = unknown, equation
    gradients: list[Tensor | None] = [None] * len(needed)
    if any(needed[:-2]):
        gradients[:-2] = op.hessian.with_tensors(*parts).pairing_gradient(y.x, u.x)
    if needed[-2]:
        gradients[-2] = _outer(y.eq, u.x) + _outer(u.eq, y.x)
    if needed[-1]:
        y_row, u_row = torch.where(equation, y.row, 0.0), torch.where(unknown, u.row, 0.0)
        gradients[-1] = _outer(y_row, u.x) + _outer(u_row, y.x)
    return tuple(
        -g.sum_to_size(t.shape) if need and g is not None else None
        for g, t, need in zip(gradients, kept[3:], needed, strict=True)
    )


def _matrix_tangent(
    op: _Bound, kept: tuple[Tensor, ...], tangents: tuple[Tensor | None, ...], u: Blocks, transpose: bool
) -> Blocks:
    """Return dK u for tangents of K's data."""
    equation, unknown, _, *parts = kept[:-2]
    if transpose:
        equation, unknown = unknown, equation
    *d_parts, dA, dG = tangents
    x = op.hessian.with_tensors(*parts).tangent_matvec(tuple(d_parts), u.x)
    x = torch.zeros_like(u.x) if x is None else x
    eq, row = torch.zeros_like(u.eq), torch.zeros_like(u.row)
    if dA is not None:
        x, eq = x + kkt.rmatvec(dA, u.eq), kkt.matvec(dA, u.x)
    if dG is not None:
        x = x + kkt.rmatvec(dG, torch.where(unknown, u.row, 0.0))
        row = torch.where(equation, kkt.matvec(dG, u.x), 0.0)
    return Blocks(x, eq, row, torch.zeros_like(u.bound))


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a.unsqueeze(-1) * b.unsqueeze(-2)


class _Stationary(torch.autograd.Function):
    """The identity on a point at which the function to follow is stationary: its slope there is zero.

    So a first derivative stops here, and no system is solved for it; higher ones go on.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor) -> Tensor:
        return v.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor | None:
        return grad if torch.is_grad_enabled() else None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent


class _Gate(torch.autograd.Function):
    """The identity, but a failed instance turns an incoming derivative that is not zero into NaN."""

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, failed: Tensor) -> Tensor:
        return v.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (failed,) = ctx.saved_tensors
        return _gated(grad, failed), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        (failed,) = ctx.saved_tensors
        with transforms.seen_by_other_forward_modes():
            return _gated(tangent, failed)


@torch.library.custom_op("diffopt::gate", mutates_args=())
def _compiled_gate(v: Tensor, failed: Tensor) -> Tensor:
    """Return v; in reverse mode the same as `_Gate`. (``torch.compile`` takes no function that has a forward mode.)"""
    return v.clone()


_compiled_gate.register_fake(lambda v, failed: torch.empty_like(v))
_compiled_gate.register_autograd(
    lambda ctx, grad: (_gated(grad, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[1]),
)


@_compiled_gate.register_vmap
def _(info: Any, in_dims: tuple[int | None, int | None], v: Tensor, failed: Tensor) -> tuple[Tensor, int]:
    first = [
        t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
        for t, dim in zip((v, failed), in_dims, strict=True)
    ]
    return _compiled_gate(*first), 0


def moved_like(value: Tensor, other: Tensor) -> Tensor:
    """Return ``value`` with the derivative of ``other``, both ``(*batch, k)``."""
    return value + _only_derivative(other)


def gate(v: Tensor, failed: Tensor) -> Tensor:
    """Return v ``(*batch, k)``, whose derivative in instances marked ``failed`` is NaN unless it is not asked for."""
    return _compiled_gate(v, failed) if torch.compiler.is_compiling() else _Gate.apply(v, failed)


def _gated(v: Tensor, failed: Tensor) -> Tensor:
    return torch.where((failed & (v != 0).any(-1)).unsqueeze(-1), torch.nan, v)
