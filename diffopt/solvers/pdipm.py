"""The whole solver: screen, equilibrate, iterate, polish, certify, and return to original units."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from diffopt import waiting
from diffopt.linalg.cholesky import cholesky, pivots
from diffopt.linalg.matrices import Dense
from diffopt.linalg.saddle import Factor, Mixed, Saddle
from diffopt.linalg.scaling import Scaling, regularisation
from diffopt.shapes import max_abs
from diffopt.solution import INDEFINITE, Status
from diffopt.solvers import certificates, interior_point, warm
from diffopt.solvers.executor import Data
from diffopt.solvers.polish import Polished, active_rows, polish
from diffopt.solvers.scaled_qp import NOISE, ScaledQP, State
from diffopt.solvers.settings import Settings
from diffopt.warm_start import Start

SAFE_CONDITION = 1e8
"""Estimated condition of Q up to which it is eliminated first (residuals stall above: at 1e10 near 1e-7)."""

WIDEST = 1.9
"""Rows per variable up to which the m x m form needs fewer operations than the n x n form."""


WORTH_POLISHING = 1e-2
"""Relative residual up to which the end point of the iteration is tried for its active set."""

ENOUGH, FURTHER = 1e-12, 5
"""Relative residual below which no better point is looked for, and steps below the tolerance in search of the active
set."""

LIGHT = 1e-8
"""Weight of the rows at the last start, which almost forgets them."""


class ActiveSystem(NamedTuple):
    """The equilibrated KKT system of the final active sets, factored: what a derivative solves with.

    ``row``, ``lower``, ``upper``: the active rows that it was factored for.
    """

    factor: Factor
    scaling: Scaling
    row: Tensor
    lower: Tensor | None
    upper: Tensor | None


class Result(NamedTuple):
    """Original units. ``ray``: certificates (x, nu, lam, lam_lower, lam_upper) or ``None``."""

    x: Tensor
    nu: Tensor
    lam: Tensor
    lam_lower: Tensor
    lam_upper: Tensor
    s: Tensor
    status: Tensor
    iterations: Tensor
    ray: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None
    system: ActiveSystem | None
    reduction: str


class Screen(NamedTuple):
    """``data`` with harmless values in the place of impossible ones, and where those were."""

    data: Data
    nonfinite: Tensor
    crossed: Tensor


def solve(data: Data, settings: Settings, tolerance: float, start: Start | None = None) -> Result:
    """Solve a batch of convex quadratic programs; one status per instance, nothing raised for values.

    Args:
        data: float64 tensors without a graph.
        settings: limits and choices; ``tolerance`` in its place for the residuals.
        start: an earlier solution, in float64 and with all batch dimensions.
    """
    screened, nonfinite, crossed = screen(data)
    run = ~(nonfinite | crossed)
    qp = scale(screened)
    near = None if start is None else warm.near(qp, start)
    outcome, parts = _solve_scaled(qp, run, settings, tolerance, near=near)
    state = outcome.state
    # What stopped before its last iteration broke down or made no more progress.
    limit = outcome.limited & ~outcome.failed
    status = torch.where(limit, int(Status.MAX_ITERATIONS), int(Status.NUMERICAL_ERROR))
    solved = run & (outcome.residual <= tolerance)
    ray = None
    open_ = run & ~solved
    if waiting.some(open_):
        status, ray = _certify(qp, outcome, open_, status)
        # What could not be proven infeasible keeps the best point that was found.
    status = torch.where(solved, Status.SOLVED, status)
    status = torch.where(crossed, Status.PRIMAL_INFEASIBLE, status)
    status = torch.where(nonfinite, Status.NONFINITE_INPUT, status).to(torch.int8)
    rays = _original_rays(qp, ray, data, crossed) if ray is not None or waiting.some(crossed) else None
    point = original(qp, state)
    return Result(*point, status, outcome.iterations, rays, *parts)


def screen(data: Data) -> Screen:
    """Replace what no solver can take: NaN, infinite entries outside the absent sides, crossed bounds."""
    bad = torch.zeros(data.batch, dtype=torch.bool, device=data.q.device)

    def clean(tensor: Tensor, dims: int, allowed: float | None = None) -> Tensor:
        nonlocal bad
        wrong = ~torch.isfinite(tensor) if allowed is None else torch.isnan(tensor) | (tensor == -allowed)
        where = wrong.flatten(tensor.dim() - dims).any(-1) if dims else wrong
        bad = bad | where
        # One layout in either case: other kernels would change the neighbours' last bits.
        return torch.where(wrong, 0.0, tensor).contiguous()

    Q = data.Q.with_tensors(*(clean(t, k) for t, k in zip(data.Q.tensors(), data.Q.core_dims(), strict=True)))
    q, b = clean(data.q, 1), clean(data.b, 1)
    A, G = clean(data.A, 2), clean(data.G, 2)
    h = clean(data.h, 1, torch.inf)
    lower = None if data.lower is None else clean(data.lower, 1, -torch.inf)
    upper = None if data.upper is None else clean(data.upper, 1, torch.inf)
    crossed = torch.zeros_like(bad)
    if lower is not None and upper is not None:
        over = lower > upper
        crossed = crossed | over.any(-1)
        if waiting.some(over):
            lower, upper = torch.where(over, -torch.inf, lower), torch.where(over, torch.inf, upper)
    return Screen(Data(Q, q, A, b, G, h, lower, upper, data.batch), bad, crossed & ~bad)


def scale(data: Data, scaling: Scaling | None = None) -> ScaledQP:
    """Equilibrate."""
    return ScaledQP(data.Q, data.q, data.A, data.b, data.G, data.h, data.lower, data.upper, data.batch, scaling)


def choose_reduction(qp: ScaledQP, wanted: str) -> tuple[str, Tensor]:
    """Return the reduction for a batch, and the instances ``(*batch,)`` for which it is safe.

    The choice rests on structure and shapes; only safety looks at values, per instance, so that
    no instance is solved in another way because of its neighbours. The others go by ``"primal"``.
    """
    everywhere = torch.ones(qp.batch, dtype=torch.bool, device=qp.q.device)
    structured = not isinstance(qp.Q, Dense)
    rows = qp.m + (qp.n if qp.with_bounds else 0)
    if wanted == "auto":
        wanted = "diagonal" if structured else ("dual" if rows <= WIDEST * qp.n else "primal")
    if wanted == "diagonal" and not structured:
        wanted = "primal"
    return wanted, everywhere if wanted == "primal" else everywhere & _strictly_convex(qp)


def _strictly_convex(qp: ScaledQP) -> Tensor:
    """Return where Q is positive definite with an estimated condition up to `SAFE_CONDITION`."""
    if isinstance(qp.Q, Dense):
        factor, failed = cholesky(qp.Q.dense())
        size = pivots(factor)
    else:
        size = qp.Q.tensors()[0]
        failed = ~(size > 0).all(-1)
    return ~failed & (size.amin(-1) * SAFE_CONDITION >= size.amax(-1))


def _solve_scaled(
    qp: ScaledQP,
    run: Tensor,
    settings: Settings,
    tolerance: float,
    thorough: bool = True,
    near: warm.Near | None = None,
) -> tuple[interior_point.Outcome, tuple[ActiveSystem | None, str]]:
    """Solve the marked instances; return the outcome, and (system, reduction).

    ``thorough``: try those that stay unsolved once more, by a slower elimination. ``near``: an earlier solution.
    """
    first, safe = choose_reduction(qp, settings.reduction)
    groups = [(first, run & safe), ("primal", run & ~safe)]
    # Whether a group is empty decides what is worth running, not what any instance gets.
    groups = [group for group in groups if waiting.some(group[1])] or groups[:1]
    saddles: dict[str, Saddle] = {}

    def saddle(reduction: str) -> Saddle:
        if reduction not in saddles:
            saddles[reduction] = Saddle(qp.Q, qp.A, qp.G, reduction, regularisation(qp.scaling, reduction))
        return saddles[reduction]

    outcome: interior_point.Outcome | None = None
    # Of an instance the last counts. All but the first group go by "primal".
    polished: list[tuple[Tensor, Polished | None]] = []
    first_try = _attempt if near is None else partial(_attempt_near, near)
    for reduction, group in groups:
        if reduction == "primal":
            group = group & ~_nonconvex(qp)
        convex = reduction != "primal"
        found, done = first_try(qp, saddle(reduction), group, settings, tolerance, convex)
        outcome = found if outcome is None else _merged(group, found, outcome)
        polished.append((group, done))
        lost = group
        # Twice more, holding every row: from far inside, then from a start that almost forgets the rows.
        for light in (False, True):
            lost = lost & (outcome.residual > tolerance) & ~outcome.primal_infeasible & ~outcome.dual_infeasible
            if not thorough or not waiting.some(lost):
                break
            primal = saddle("primal")
            begin = (
                interior_point.start(qp, primal, hold=True, weight=LIGHT) if light else interior_point.large_start(qp)
            )
            found, done = _attempt(qp, primal, lost, settings, tolerance, convex=False, hold=True, begin=begin)
            better = lost & (found.residual < outcome.residual)
            outcome = _merged(better, found, outcome)
            polished.append((better, done))
    assert outcome is not None
    system = _active_system(qp, saddles, polished) if thorough else None
    return outcome, (system, "+".join(reduction for reduction, _ in groups))


def _active_system(
    qp: ScaledQP, saddles: dict[str, Saddle], polished: list[tuple[Tensor, Polished | None]]
) -> ActiveSystem | None:
    """Return the system of the final active sets, of each instance by the reduction that solved it, whatever the
    others needed; ``None`` if nobody polished.

    Args:
        saddles: those in use, by their reductions; that of the first group first.
        polished: what solved where; all but the first by ``"primal"``.
    """
    _, done = polished[0]
    if done is None:
        return None
    active, factor = done.active, done.factor
    if polished[1:]:
        others = torch.zeros(qp.batch, dtype=torch.bool, device=qp.q.device)
        for where, done in polished[1:]:
            assert done is not None
            others, active = others | where, torch.where(where.unsqueeze(-1), done.active, active)
        first = next(iter(saddles.values()))
        saddle = first if first.reduction == "primal" else Mixed(others, saddles["primal"], first)
        factor = saddle.factor_active(active_rows(qp, active))
    row, lower, upper = qp.split(active)
    return ActiveSystem(factor, qp.scaling, row, lower if qp.has_lower else None, upper if qp.has_upper else None)


def _merged(where: Tensor, new: interior_point.Outcome, old: interior_point.Outcome) -> interior_point.Outcome:
    rest = [torch.where(where, a, b) for a, b in zip(new[1:], old[1:], strict=True)]
    return interior_point.Outcome(new.state.where(where, old.state), *rest)


Attempt = tuple[interior_point.Outcome, Polished | None]


def _either(qp: ScaledQP, saddle: Saddle, where: Tensor, one: Attempt, other: Attempt) -> Attempt:
    """Return ``one`` where ``where`` ``(*batch,)`` holds, else ``other``."""
    outcome, first, second = _merged(where, one[0], other[0]), one[1], other[1]
    if first is None or second is None:
        return outcome, second
    active = torch.where(where.unsqueeze(-1), first.active, second.active)
    return outcome, second._replace(active=active, factor=saddle.factor_active(active_rows(qp, active)))


def _attempt(
    qp: ScaledQP, saddle: Saddle, run: Tensor, settings: Settings, tolerance: float, convex: bool, hold: bool = False,
    begin: interior_point.State | None = None,
) -> Attempt:  # fmt: skip
    """Iterate, and polish if that is wanted."""
    outcome = interior_point.solve(qp, saddle, run, tolerance, settings.max_iterations, convex, hold, begin)
    return _polished(qp, saddle, run, settings, outcome, tolerance, convex, hold)


def _attempt_near(
    near: warm.Near, qp: ScaledQP, saddle: Saddle, run: Tensor, settings: Settings, tolerance: float, convex: bool
) -> Attempt:
    """Solve what can be solved from an earlier solution, and the rest as if there were none."""
    attempts: list[tuple[Tensor, Attempt]] = []
    all_served, spent = torch.zeros_like(run), torch.zeros(qp.batch, dtype=torch.int64, device=qp.q.device)
    if settings.polish:
        done = warm.by_active_set(qp, saddle, near, run, tolerance)
        served = run & done.accepted & (done.residual <= tolerance)
        none = torch.zeros_like(served)
        attempts.append((served, (interior_point.Outcome(done.state, done.residual, spent, *[none] * 4), done)))
        all_served = served
    rest = run & near.usable & ~all_served
    if waiting.some(rest):
        outcome = warm.from_near(qp, saddle, near, rest, tolerance, settings.max_iterations, convex)
        outcome, done = _polished(qp, saddle, rest, settings, outcome, tolerance, convex)
        served = rest & (outcome.residual <= tolerance)
        attempts.append((served, (outcome, done)))
        all_served, spent = all_served | served, torch.where(rest, outcome.iterations, 0)
    # (Those that are not to be solved are in the last outcome too: as they would be without a start.)
    if not waiting.every(all_served):
        outcome, done = _attempt(qp, saddle, run & ~all_served, settings, tolerance, convex)
        attempts.append((run & ~all_served, (outcome._replace(iterations=outcome.iterations + spent), done)))
    _, found = attempts[-1]
    for served, attempt in attempts[:-1]:
        found = _either(qp, saddle, served, attempt, found)
    return found


def _polished(
    qp: ScaledQP, saddle: Saddle, run: Tensor, settings: Settings, outcome: interior_point.Outcome, tolerance: float,
    convex: bool, hold: bool = False,
) -> Attempt:  # fmt: skip
    if not settings.polish:
        return outcome, None
    # An active set can be right long before the point is; whether it is, the polish finds out.
    close = run & (outcome.residual <= WORTH_POLISHING) & ~outcome.primal_infeasible
    done = polish(qp, saddle, outcome.state, outcome.residual, close)
    outcome = outcome._replace(state=done.state, residual=done.residual)
    # Where small multipliers meet small slacks, a point this accurate does not tell yet which rows are active.
    unsure = close & ~done.accepted & (outcome.residual <= tolerance) & (outcome.residual > ENOUGH)
    if not waiting.some(unsure):
        return outcome, done
    more = interior_point.solve(qp, saddle, unsure, ENOUGH, FURTHER, convex, hold, begin=outcome.state)
    again = polish(qp, saddle, more.state, more.residual, unsure)
    outcome = outcome._replace(iterations=outcome.iterations + more.iterations)
    found = outcome._replace(state=again.state, residual=again.residual)
    return _either(qp, saddle, unsure & (again.residual < outcome.residual), (found, again), (outcome, done))


def _nonconvex(qp: ScaledQP) -> Tensor:
    """Return where Q, equilibrated, has an eigenvalue clearly below zero, ``(*batch,)``."""
    Q = qp.Q.dense()
    # The largest sum of magnitudes in a row is no less than the largest eigenvalue; rounding errs by eps of it at most.
    largest = Q.abs().sum(-1).amax(-1).clamp(min=1)[..., None, None]
    _, failed = cholesky(Q + INDEFINITE * largest * torch.eye(qp.n, dtype=Q.dtype, device=Q.device))
    return failed


def _certify(
    qp: ScaledQP, outcome: interior_point.Outcome, open_: Tensor, status: Tensor
) -> tuple[Tensor, State | None]:
    """Look for proofs for the unsolved instances: first in their last iterates, then by auxiliary problems.

    (Where the host must not wait, the latter would have to be solved always, and are not.)
    """
    rays: State | None = None

    def claim(proof: certificates.Proof, code: Status) -> None:
        nonlocal open_, status, rays
        status = torch.where(proof.holds, int(code), status)
        open_ = open_ & ~proof.holds
        if waiting.some(proof.holds):
            nothing = State(*(torch.zeros_like(v) for v in proof.ray))
            rays = proof.ray.where(proof.holds, nothing if rays is None else rays)

    nonconvex = _nonconvex(qp)
    status = torch.where(open_ & nonconvex, Status.NUMERICAL_ERROR, status)
    open_ = open_ & ~nonconvex
    claim(certificates.check_primal(qp, outcome.state, open_ & outcome.primal_infeasible), Status.PRIMAL_INFEASIBLE)
    if waiting.allowed() and waiting.some(open_):
        # Before unboundedness: an instance can be both, and then there is no x at all.
        problem = certificates.least_infeasibility(qp)
        found = _auxiliary(problem, qp.batch, open_)
        claim(_contradiction(qp, outcome.state, found, open_), Status.PRIMAL_INFEASIBLE)
        violated = torch.maximum(max_abs(found.nu), max_abs(found.lam)) > NOISE
        if waiting.some(open_ & violated):
            closer = certificates.seen_closer(problem, found.x, found.nu, found.lam, qp.n)
            found = _auxiliary(closer, qp.batch, open_ & violated)
            claim(_contradiction(qp, outcome.state, found, open_ & violated), Status.PRIMAL_INFEASIBLE)
    convex = _strictly_convex(qp)
    claim(certificates.check_dual(qp, outcome.state.x, open_ & outcome.dual_infeasible, convex), Status.DUAL_INFEASIBLE)
    if waiting.allowed() and waiting.some(open_):
        x = _auxiliary(certificates.steepest_recession(qp), qp.batch, open_).x
        claim(certificates.check_dual(qp, x, open_, convex), Status.DUAL_INFEASIBLE)
    return status, rays


class _Multipliers(NamedTuple):
    x: Tensor
    nu: Tensor
    lam: Tensor
    lam_lower: Tensor
    lam_upper: Tensor


def _auxiliary(problem: certificates.Auxiliary, batch: torch.Size, run: Tensor) -> _Multipliers:
    qp = ScaledQP(*problem, batch)
    outcome, _ = _solve_scaled(qp, run, Settings(max_iterations=60), 1e-12, thorough=False)
    return _Multipliers(*original(qp, outcome.state)[:5])


def _contradiction(qp: ScaledQP, state: State, found: _Multipliers, run: Tensor) -> certificates.Proof:
    """Check the multipliers of a least-infeasibility problem as a proof."""
    nu, z, y = _infeasibility_multipliers(qp, found)
    return certificates.check_primal(qp, state._replace(nu=nu, z=z, y=y), run)


def _infeasibility_multipliers(qp: ScaledQP, found: _Multipliers) -> tuple[Tensor, Tensor, Tensor]:
    """Return (nu, z, y) of the problem itself from the solution of its least-infeasibility problem."""
    n = qp.n
    pieces = [found.lam]
    lower, upper = found.lam_lower[..., :n], found.lam_upper[..., :n]
    if qp.has_lower:
        pieces.append(lower)
    if qp.has_upper:
        pieces.append(upper)
    y = torch.where(qp.fixed, upper - lower, 0.0) if qp.fixed.shape[-1] else qp.target
    return found.nu, torch.where(qp.on, torch.cat(pieces, -1), 0.0), y


def original(qp: ScaledQP, state: State) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (x, nu, lam, lam_lower, lam_upper, s) in original units."""
    d, eq, rows, cost = qp.scaling
    x, s, nu, y, z = state.x * qp.size, state.s * qp.size, *(v * qp.force for v in (state.nu, state.y, state.z))
    state = State(x, nu, y, s, z)
    general, lower, upper = qp.split(torch.where(qp.on, state.z, 0.0))
    slack = qp.split(torch.where(qp.on, state.s, torch.inf))[0]
    none = state.x.new_zeros(state.x.shape)
    lam_lower = lower / (cost * d) if qp.has_lower else none
    lam_upper = upper / (cost * d) if qp.has_upper else none
    x = state.x * d
    if qp.fixed.shape[-1]:
        force = state.y / (cost * d)
        lam_lower = lam_lower + (-force).clamp_min(0)
        lam_upper = lam_upper + force.clamp_min(0)
        x = torch.where(qp.fixed, qp.target * d * qp.size, x)
    return x, eq * state.nu / cost, rows * general / cost, lam_lower, lam_upper, slack / rows


def _original_rays(
    qp: ScaledQP, ray: State | None, data: Data, crossed: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return certificates in original units, normalised there, NaN where there is none."""
    zero = torch.zeros_like
    if ray is None:
        ray = State(zero(qp.q), zero(qp.b), zero(qp.target), zero(qp.d), zero(qp.d))
    _, nu, lam, lam_lower, lam_upper, _ = original(qp, ray)
    nu, lam, lam_lower, lam_upper = (v / (qp.size * qp.force) for v in (nu, lam, lam_lower, lam_upper))
    x = ray.x * qp.scaling.d / qp.force
    has_x, has_dual = (ray.x != 0).any(-1), (ray.nu != 0).any(-1) | (ray.z != 0).any(-1) | (ray.y != 0).any(-1)
    if data.lower is not None and data.upper is not None:
        # lower_i > upper_i: the two bounds of the worst variable contradict each other.
        width = (data.lower - data.upper).expand_as(qp.q)
        one = torch.nn.functional.one_hot(width.argmax(-1), qp.n).to(width.dtype)
        unit = one / torch.where(crossed.unsqueeze(-1), width.amax(-1, keepdim=True), 1.0)
        lam_lower = torch.where(crossed.unsqueeze(-1), unit, lam_lower)
        lam_upper = torch.where(crossed.unsqueeze(-1), unit, lam_upper)
        nu, lam = (torch.where(crossed.unsqueeze(-1), 0.0, v) for v in (nu, lam))
        has_x, has_dual = has_x & ~crossed, has_dual | crossed
    # Scaled depth is cost times the original one for duals, and for x the cost times q'x.
    cost = torch.where(crossed.unsqueeze(-1), 1.0, qp.scaling.cost)

    def shown(v: Tensor, has: Tensor) -> Tensor:
        return torch.where(has.unsqueeze(-1), v * cost, torch.nan)

    duals = shown(nu, has_dual), shown(lam, has_dual), shown(lam_lower, has_dual), shown(lam_upper, has_dual)
    return shown(x, has_x), *duals
