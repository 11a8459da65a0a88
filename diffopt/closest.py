"""The closest problem that has a solution: the sides of the program are shifted as little as makes it feasible."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from diffopt import kkt, transforms
from diffopt.gates import gate
from diffopt.linalg.matrices import Diagonal
from diffopt.problems.forms import Form, QPForm
from diffopt.shapes import stacked, where_instance
from diffopt.solution import ALMOST, Certificate, Report, Shifts, Solution, Status, graded, no_shifts, succeeded


class _Sides(NamedTuple):
    """Something for each constraint: equalities, rows, lower and upper bounds (of no entries where there are none)."""

    eq: Tensor
    row: Tensor
    low: Tensor
    high: Tensor


CLEAR = 1e-7
"""Violation, relative to the sides, from which on an instance counts as infeasible without trying to solve it; below it
(and above what the first phase can tell from zero) only if it cannot be solved. Also the largest relative error of the
proof."""

LEAST = 1e-9
"""Shift, relative to the sides, that is told from zero in the first phase: the tolerance of float64. To take a larger
one for zero, such as the tolerance of float32, would leave a shifted problem that misses being feasible by as much."""


def solve(form: QPForm, inner: Callable[[QPForm], Solution], tolerance: float) -> Solution:
    """Find the least shifts of the sides that some x satisfies, and solve: for these, where any is needed.

    First phase. With C x <= d all constraints (equalities too), the least shifts are t = y, the solution of

        minimise 1/2 |y|^2 + d'y subject to C'y = 0, y >= 0 for inequalities,

    the dual of minimise 1/2 |t|^2 subject to Cx - t <= d: strictly convex whatever C is.

    Second phase. Constraints with y > 0 hold with equality wherever the shifts are least. As inequalities they would
    leave a feasible set without interior, so they are held as equalities. These depend on each other (C'y = 0), but
    their sides d + t are consistent, and stay so when the data moves: so the minimum-norm derivative of these dependent
    rows (see ``optimal_value``) is the derivative.
    """
    # In float64: sides that were rounded to float32 would contradict each other again.
    exact = form.widened()
    d = _sides(exact)
    if not sum(v.shape[-1] for v in d):
        first = inner(form)
        return replace(first, shifts=no_shifts(first), _value=lambda: first.value)
    problem = _least_shifts(exact)
    least = inner(problem)
    joined = torch.where(least.ok.unsqueeze(-1), least.x, 0.0)
    y = _split(joined, exact)
    with torch.no_grad():
        size = 1 + torch.where(torch.isfinite(problem.q), problem.q.abs(), 0.0).amax(-1, keepdim=True)
        most = (joined.abs() / size).amax(-1)
        depth = -(torch.where(joined == 0, 0.0, problem.q) * joined).sum(-1)
        # That d'y < 0 where C'y = 0 and y >= 0 proves it; rounding errors of an unpolished y = 0 do not.
        error = torch.where(least.ok, problem.equalities(joined).abs().amax(-1), torch.inf)
        clear = (most > CLEAR) & (error <= CLEAR * depth)
        # (A first phase that was not polished errs by its residuals, in each shift that is zero too.)
        noise = torch.nan_to_num(10 * least.report.residuals.amax(0)).clamp(min(LEAST, tolerance), tolerance)
    # (Instances that clearly have no solution are not tried: proving it once more would cost the most of all.)
    first = inner(_made_feasible(form, clear))
    codes = (Status.PRIMAL_INFEASIBLE, Status.NUMERICAL_ERROR, Status.MAX_ITERATIONS)
    failed = torch.stack([first.status == int(code) for code in codes]).any(0)
    use = clear | (failed & (most > noise))
    zero = no_shifts(first)
    if _nowhere(use):
        return replace(first, shifts=zero, _value=lambda: first.value)
    none = zero.low
    held = _Sides(*(((v.abs() > noise.unsqueeze(-1) * size) & use.unsqueeze(-1)).detach() for v in y))
    # Equalities are held anyway, so all of their shift counts.
    counted = held._replace(eq=use.unsqueeze(-1))
    t = _Sides(*(torch.where(mask, v, 0.0) for mask, v in zip(counted, y, strict=True)))

    shifted = _shifted(exact, t)
    second = inner(_with_held(shifted, held))
    point, dependent = _unheld(shifted, held, t, second)
    detached = kkt.Point(*(v.detach() for v in point))
    # (For forward mode, which torch.compile has not; that of torch 2.11 cannot make the detached twin.)
    judge = shifted if torch.compiler.is_compiling() else shifted.detach()
    found = _judged(judge, detached, form.dtype, least, second, tolerance)
    status, residuals, spoiled = found
    counts = torch.stack([first.iterations + least.iterations + second.iterations, second.weakly_active, dependent])
    point = kkt.Point(*(gate(v, spoiled) for v in point))
    value = gate(second.value.unsqueeze(-1), spoiled).squeeze(-1)

    def merged(new: Tensor, old: Tensor) -> Tensor:
        return where_instance(use, new.to(old.dtype), old)

    status = merged(status, first.status)
    bound = [v if v.shape[-1] else none.to(v.dtype) for v in (t.low, t.high)]
    executors = dict.fromkeys([first.executor, least.executor, second.executor])
    return Solution(
        *(merged(getattr(point, k), getattr(first, k)) for k in ("x", "s", "lam", "nu", "lam_lower", "lam_upper")),
        status=status,
        report=Report(
            torch.where(use, residuals.to(first.report.residuals.dtype), first.report.residuals),
            torch.where(use, counts, first.report.counts),
        ),
        certificate=_remaining(first, second, use, status),
        backend=first.backend,
        executor="+".join(executors),
        _value=lambda: merged(value, first.value),
        shifts=Shifts(*(v.to(form.dtype) for v in (t.eq, t.row, *bound))),
    )


def _nowhere(mask: Tensor) -> bool:
    """Return whether a mask is known to be true nowhere. (While a graph is traced there are no values.)"""
    return not torch.compiler.is_compiling() and not bool(transforms.plain(mask).any())


def _made_feasible(form: QPForm, where: Tensor) -> QPForm:
    """Return the form with sides that x = 0 satisfies in the marked instances."""
    if _nowhere(where):
        return form
    mask = where.unsqueeze(-1)
    b, h = torch.where(mask, 0.0, form.b), torch.where(mask, form.h.detach().clamp_min(1), form.h)
    lower = None if form.lower is None else torch.where(mask, form.lower.detach().clamp_max(-1), form.lower)
    upper = None if form.upper is None else torch.where(mask, form.upper.detach().clamp_min(1), form.upper)
    return QPForm(form.Q, form.q, form.A, b, form.G, h, lower, upper)


def _sides(form: QPForm) -> _Sides:
    none = form.q[..., :0]
    low = none if form.lower is None else -form.lower
    sides = (form.b, form.h, low, none if form.upper is None else form.upper)
    return _Sides(*(v.expand(*form.batch_shape, v.shape[-1]) for v in sides))


def _split(y: Tensor, form: QPForm) -> _Sides:
    sizes = [form.p, form.m, *(0 if bound is None else form.n for bound in (form.lower, form.upper))]
    return _Sides(*y.split(sizes, -1))


def _least_shifts(form: QPForm) -> QPForm:
    """Return the problem of the first phase, over y in the order of `_Sides`; see `solve`."""
    d = torch.cat(_sides(form), -1)
    # An infinite side is no constraint; NaN and the wrong infinity stay, and make the instance fail.
    absent = d == torch.inf
    eye = torch.eye(form.n, dtype=form.dtype, device=form.device)
    rows = [form.A, form.G]
    rows += [] if form.lower is None else [-eye]
    rows += [] if form.upper is None else [eye]
    size = d.shape[-1]
    upper = torch.where(absent, d.new_zeros(()), torch.inf)
    lower = torch.cat([d.new_full((form.p,), -torch.inf), d.new_zeros(size - form.p)])
    cost = torch.where(absent, 0.0, d)
    return QPForm(Diagonal(d.new_ones(size)), cost, A=stacked(rows).mT, b=0.0, lower=lower, upper=upper)


def _shifted(form: QPForm, t: _Sides) -> QPForm:
    lower = None if form.lower is None else form.lower - t.low
    upper = None if form.upper is None else form.upper + t.high
    return QPForm(form.Q, form.q, form.A, form.b + t.eq, form.G, form.h + t.row, lower, upper)


def _with_held(form: QPForm, held: _Sides) -> QPForm:
    """Return the form with some of its inequalities as equalities. Rows that are not held are rows of zeros."""
    A = stacked([form.A, torch.where(held.row.unsqueeze(-1), form.G, 0.0)])
    b = torch.cat([form.b, torch.where(held.row, form.h, 0.0)], -1)
    h = torch.where(held.row, torch.inf, form.h)
    lower, upper = form.lower, form.upper
    # (Bounds that crossed now meet: either is as good.)
    at = upper if lower is None else lower
    if lower is not None and upper is not None:
        at = torch.where(held.low, lower, upper)
    if at is not None:
        low, high = held.low if lower is not None else held.high, held.high if upper is not None else held.low
        infinite = form.q.new_full((form.n,), torch.inf)
        lower = torch.where(low | high, at, -infinite if lower is None else lower)
        upper = torch.where(low | high, at, infinite if upper is None else upper)
    return QPForm(form.Q, form.q, A, b, form.G, h, lower, upper)


def _unheld(form: QPForm, held: _Sides, t: _Sides, found: Solution) -> tuple[kkt.Point, Tensor]:
    """Return the solution of the second phase as a point of the shifted problem, and its dependent rows.

    The multipliers of held constraints have any sign. They are not unique: C't = 0, so a multiple of the shifts, which
    are positive, can be added. The smallest that leaves none negative is.
    """
    p, n = form.p, form.n
    nu, lam = found.nu[..., :p], found.lam + torch.where(held.row, found.nu[..., p:], 0.0)
    force = found.lam_upper - found.lam_lower
    low, high = (
        torch.where(_wide(held.low, n), -force, found.lam_lower),
        torch.where(_wide(held.high, n), force, found.lam_upper),
    )
    both = _wide(held.low, n) & _wide(held.high, n)
    low, high = torch.where(both, found.lam_lower, low), torch.where(both, found.lam_upper, high)
    low, high = torch.where(_wide(held.high, n) & ~both, 0.0, low), torch.where(_wide(held.low, n) & ~both, 0.0, high)
    shifts = [t.row, *(v if v.shape[-1] else torch.zeros_like(low) for v in (t.low, t.high))]
    masks = [held.row, _wide(held.low, n), _wide(held.high, n)]
    ratios = [
        torch.where(mask, -dual / torch.where(mask, shift, 1.0), 0.0)
        for mask, dual, shift in zip(masks, (lam, low, high), shifts, strict=True)
    ]
    more = torch.cat(ratios, -1).amax(-1, keepdim=True).clamp_min(0)
    lam, low, high = (
        # (Never below zero, for want of rounding.)
        torch.where(mask, (dual + more * shift).clamp_min(0), dual)
        for mask, dual, shift in zip(masks, (lam, low, high), shifts, strict=True)
    )
    s = torch.where(held.row, 0.0, found.s)
    # (Each row of zeros counts as dependent.)
    dependent = torch.where(found.dependent < 0, -1, found.dependent - (~held.row).sum(-1))
    return kkt.Point(found.x, s, nu + more * t.eq, lam, low, high), dependent


def _wide(mask: Tensor, n: int) -> Tensor:
    return mask if mask.shape[-1] else mask.new_zeros(*mask.shape[:-1], n)


class _Verdict(NamedTuple):
    status: Tensor
    residuals: Tensor
    spoiled: Tensor


@torch.no_grad()
def _judged(
    form: Form, point: kkt.Point, dtype: torch.dtype, least: Solution, found: Solution, tolerance: float
) -> _Verdict:
    """Return status and residuals: those of the shifted problem, and not below those of the first phase.

    Both are those of the point rounded to ``dtype``. Multipliers of constraints that depend on each other can be large
    and cancel, and their rounding then costs more than the tolerance, but not x: the instance is ALMOST_SOLVED.

    ``spoiled``: instances that the second phase solved and that fail all the same.
    """
    residuals = torch.stack(kkt.residuals(form, kkt.Point(*(v.to(dtype).to(v.dtype) for v in point))))
    residuals = torch.maximum(residuals, least.report.residuals)
    status = graded(residuals.amax(0), tolerance)
    if dtype != form.dtype:
        exact = torch.maximum(torch.stack(kkt.residuals(form, point)), least.report.residuals).amax(0)
        status = torch.where(~succeeded(status) & (exact <= ALMOST), int(Status.ALMOST_SOLVED), status)
    status = torch.where(found.ok, status, found.status)
    return _Verdict(status, residuals, found.ok & ~succeeded(status))


def _remaining(first: Solution, second: Solution, use: Tensor, status: Tensor) -> Certificate | None:
    """Return the certificates of instances that have no solution still: of an unbounded closest problem, too."""
    if torch.compiler.is_compiling():
        return None  # (operators return none)
    known = Certificate(*(v.new_full(v.shape, torch.nan) for v in (first.x, first.nu, first.s, first.x, first.x)))
    known = known if first.certificate is None else first.certificate
    keep = ~use & ((status == int(Status.PRIMAL_INFEASIBLE)) | (status == int(Status.DUAL_INFEASIBLE)))
    kept = Certificate(*(torch.where(keep.unsqueeze(-1), v, torch.nan) for v in known))
    if second.certificate is not None:
        falls = use & (status == int(Status.DUAL_INFEASIBLE))
        kept = kept._replace(x=torch.where(falls.unsqueeze(-1), second.certificate.x.to(kept.x.dtype), kept.x))
        keep = keep | falls
    return None if _nowhere(keep) else kept
