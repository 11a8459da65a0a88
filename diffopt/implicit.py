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

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from diffopt import kkt, optimal_value, transforms, waiting
from diffopt.active_solve import Bound, Solve
from diffopt.active_system import ActiveSystem
from diffopt.errors import ADJOINT
from diffopt.gates import Gate, only_derivative
from diffopt.linalg.saddle import Blocks
from diffopt.problems.forms import Form, QPForm
from diffopt.solution import Certificate, Report, Solution

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
    system: ActiveSystem
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
    failed = kkt.failed(found.status)
    safe = kkt.safe(found.point, failed)
    iterations = found.iterations if found.counts is None else found.counts[0]
    assert iterations is not None
    with waiting.allow(found.sync):
        saddle, scaling = (None, found.system.scaling) if found.system else kkt.assemble(form, safe)
        active = kkt.activity(form, safe, scaling, weak_tolerance)
        weakly_active = torch.where(failed, 0, active.weak_count())
        system = ActiveSystem(form.dtype, found.system, _all_rows(active, failed), kink_rule, failed, saddle, scaling)
        counts = torch.stack([iterations, weakly_active, torch.where(failed, -1, system.dependent())])
        if kink_rule == "nan":
            # What has no derivative is treated as what has no solution, but for its values.
            adjoint = system.adjoint()
            failed = failed | (counts[1:] > 0).any(0) | (adjoint > ADJOINT)
            safe = kkt.safe(found.point, failed)
            system = ActiveSystem(
                form.dtype, found.system, _all_rows(active, failed), kink_rule, failed, saddle, scaling
            )
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
            return optimal_value.lagrangian_value(form, point, found.point, safe, failed, attached)

    return Solution(
        *(point.x, point.s, point.lam, point.nu, point.lam_lower, point.lam_upper),
        status=found.status,
        report=Report(found.residuals, prepared.counts),
        certificate=found.certificate,
        backend=found.backend,
        executor=found.executor,
        _value=optimal_value.unless_changed(form, point._asdict(), value),
        _hessian=form.Q if isinstance(form, QPForm) else None,
        _adjoint=None if transformed else prepared.system.adjoint,
    )


def _attached_point(form: Form, prepared: Prepared) -> kkt.Point:
    system, safe, values = prepared.system, prepared.safe, prepared.found.point
    failed, active, equation, *ratios = prepared.rule
    w = Blocks(safe.x, safe.nu, safe.lam, kkt.bound_force(form, safe))
    for _ in range(1 if isinstance(form, QPForm) else NONLINEAR_STEPS):
        F = kkt.conditions(form, active, w, *ratios)
        d = kkt.derivatives(form, w.x, w.row, w.eq)
        data = (*d.hessian.tensors(), d.equality_jacobian, d.inequality_jacobian)
        masks = (equation, active.row, failed.unsqueeze(-1))
        step = Blocks(*Solve.apply(Bound(system, d.hessian), True, False, *F, *masks, *data))
        w = w.minus(step)
    moved_lower, moved_upper = kkt.bound_duals(form, active, w.bound)
    if w.bound.shape[-1]:
        bad = failed.unsqueeze(-1)
        moved_lower, moved_upper = torch.where(bad, -w.bound, moved_lower), torch.where(bad, w.bound, moved_upper)
    slack = only_derivative(-form.inequalities(w.x))
    slack = Gate.apply(slack, failed)
    return kkt.Point(
        values.x + (w.x - safe.x),
        values.s + slack,
        values.nu + (w.eq - safe.nu),
        values.lam + (w.row - safe.lam),
        values.lam_lower + only_derivative(moved_lower),
        values.lam_upper + only_derivative(moved_upper),
    )


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


def forward_mode(form: Form) -> bool:
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
    return forward_mode(form)


def over_leaves(form: Form, needed: tuple[bool, ...]) -> Form:
    """Return the form over detached tensors, of which those that are needed require a gradient."""
    named = zip(form.tensors().items(), needed, strict=True)
    return form.with_tensors({name: tensor.detach().requires_grad_(need) for (name, tensor), need in named})
