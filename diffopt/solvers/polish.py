"""From the end of the interior-point method to the exact point of its active set."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffopt import waiting
from diffopt.linalg.saddle import Blocks, Factor, Rows, Saddle
from diffopt.shapes import matvec, rmatvec
from diffopt.solvers.scaled_qp import ScaledQP, State

ROUNDS = 4


class Polished(NamedTuple):
    """``state``: the polished point where ``accepted``, else the given one. ``factor``: the system
    factored for the rows in ``active`` ``(*batch, M)``, for use by the backward pass."""

    state: State
    residual: Tensor
    accepted: Tensor
    active: Tensor
    factor: Factor


def polish(qp: ScaledQP, system: Saddle, state: State, residual: Tensor, run: Tensor, rounds: int = ROUNDS) -> Polished:
    """Solve for the point where the active rows hold with equality and the others have no multiplier.

    The active set is read in equilibrated units, z > s. A row whose multiplier or slack then
    comes out negative changes sides, up to a few rounds. An instance accepts its polished
    point only if signs hold and its residual is no worse than before or at rounding level.

    Args:
        state, residual: where the interior-point method ended, and its worst relative residual.
        run: ``(*batch,)`` the instances to polish.
        rounds: how many active sets to try.
    """
    dtype = qp.q.dtype
    slack = 1e-10 if dtype == torch.float64 else 1e-5
    enough = 1e-12 if dtype == torch.float64 else 1e-6
    active = qp.on & (state.z > state.s)
    best, best_residual, accepted = state, residual, torch.zeros_like(run)
    best_active, pending, candidate = active, run, state
    factor = _factor(qp, system, active)
    for round_ in range(rounds):
        if round_:
            factor = _factor(qp, system, active)
        candidate = _solve(qp, factor, active, candidate)
        z_size = 1 + candidate.z.abs().amax(-1, keepdim=True) if qp.d.shape[-1] else 1.0
        # (A far side that the point meets must not make room for what it violates.)
        near = torch.where(active | (candidate.s < 0), qp.d, 0.0)
        s_size = 1 + near.abs().amax(-1, keepdim=True) if qp.d.shape[-1] else 1.0
        wrong_z = active & (candidate.z < -slack * z_size)
        wrong_s = qp.on & ~active & (candidate.s < -slack * s_size)
        clipped = candidate._replace(s=candidate.s.clamp_min(0), z=candidate.z.clamp_min(0))
        error, _ = qp.relative_residuals(clipped)
        signs = ~(wrong_z | wrong_s).any(-1)
        good = pending & signs & ~factor.failed & ((error <= best_residual) | (error <= enough))
        best, best_residual = clipped.where(good, best), torch.where(good, error, best_residual)
        accepted, pending = accepted | good, pending & ~good & ~signs & torch.isfinite(error)
        best_active = torch.where(good.unsqueeze(-1), active, best_active)
        if not waiting.some(pending):
            break
        # Rows of instances that are settled stay as they are, so that one factor serves all in the end.
        flipped = (active & ~wrong_z) | wrong_s
        active = torch.where(pending.unsqueeze(-1), flipped, best_active)
    if not waiting.every(active == best_active):
        factor = _factor(qp, system, best_active)
    return Polished(best, best_residual, accepted, best_active, factor)


def _factor(qp: ScaledQP, system: Saddle, active: Tensor) -> Factor:
    return system.factor_active(active_rows(qp, active))


def active_rows(qp: ScaledQP, active: Tensor) -> Rows:
    """Return the participation of the rows of an active set: e = 0."""
    row, lower, upper = qp.split(active)
    zero = torch.zeros_like(qp.q[..., :1])
    bound = qp.bound_rows(lower, upper).bool()
    bound = bound | qp.fixed if qp.fixed.shape[-1] else bound
    return Rows(row, zero.expand(row.shape), bound, zero.expand(bound.shape))


def _solve(qp: ScaledQP, factor: Factor, active: Tensor, state: State) -> State:
    """One Newton step on the conditions of the active set; for a quadratic program it is exact."""
    z = torch.where(active, state.z, 0.0)
    general, lower, upper = qp.split(active)
    if qp.has_lower and qp.has_upper:
        upper = upper & ~lower  # both at once only by rounding: the variable is held once
    Cx = qp.apply_C(state.x)
    off = torch.where(active, qp.d - Cx, 0.0)
    off_general, off_lower, off_upper = qp.split(off)
    bound = qp.target
    if qp.with_bounds:
        # A lower-bound row reads -x <= -lower: its distance has the opposite sign of x.
        bound = qp.bound_rows(-off_lower, torch.where(upper, off_upper, 0.0))
    if qp.fixed.shape[-1]:
        bound = torch.where(qp.fixed, qp.target - state.x, bound)
    stationarity = qp.Q.matvec(state.x) + qp.q + rmatvec(qp.A, state.nu) + qp.apply_Ct(z, state.y)
    residual = Blocks(-stationarity, qp.b - matvec(qp.A, state.x), off_general, bound)
    u, _ = factor.solve_accurately(residual)
    pieces = [torch.where(general, u.row, 0.0)]
    if qp.has_lower:
        pieces.append(torch.where(lower, -u.bound, 0.0))
    if qp.has_upper:
        pieces.append(torch.where(upper, u.bound, 0.0))
    y = state.y + torch.where(qp.fixed, u.bound, 0.0) if qp.fixed.shape[-1] else state.y
    x = state.x + u.x
    s = torch.where(active, 0.0, qp.d - qp.apply_C(x))
    s = torch.where(qp.on, s, 1.0)
    return State(x, state.nu + u.eq, y, s, z + torch.cat(pieces, -1))
