"""The point of the central path at a given complementarity, for gradients of relaxed problems."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffopt.linalg.saddle import Saddle
from diffopt.linalg.scaling import regularisation
from diffopt.shapes import matvec, max_abs, rmatvec
from diffopt.solvers import interior_point, pdipm
from diffopt.solvers.executor import Data
from diffopt.solvers.newton_system import NewtonSystem
from diffopt.solvers.scaled_qp import ScaledQP, State
from diffopt.solvers.step import complementarity, longest_step

SETTLED = 1e-13
"""Relative residual at which an instance stops: little more than rounding leaves of sums of some tens of terms."""

MOST = 100
"""Newton steps: a tenth of the complementarity each, or a half after a step that was blocked; then a handful."""


class CentralPoint(NamedTuple):
    """x ``(*batch, n)``, nu ``(*batch, p)`` in original units; ``residual`` ``(*batch,)``: the worst of the relative
    residuals of stationarity and constraints, and of s_i lam_i / kappa - 1, in equilibrated units."""

    x: Tensor
    nu: Tensor
    residual: Tensor


def solve(data: Data, kappa: float) -> CentralPoint:
    """Return the central points of a batch: s_i lam_i = kappa for every inequality with a finite side.

    An instance without strictly feasible points, primal and dual, has none: its residual stays large.

    Args:
        data: float64 tensors without a graph.
        kappa: in units of the objective, positive.

    References:
        Nocedal and Wright (2006), "Numerical Optimization", sections 14.1 and 16.6; the target is held at kappa here.
    """
    screened, nonfinite, crossed = pdipm.screen(data)
    qp = pdipm.scale(screened)
    system = Saddle(qp.Q, qp.A, qp.G, "primal", regularisation(qp.scaling, "primal"))
    # (Scaling rows and variables leaves s lam alone; scaling the objective, or the size of solutions, does not.)
    goal = (kappa * qp.scaling.cost / (qp.size * qp.force)).expand(*qp.batch, 1)
    state = interior_point.start(qp, system)
    best, best_residual = state, torch.full(qp.batch, torch.inf, dtype=qp.q.dtype, device=qp.q.device)
    blocked = torch.ones_like(goal, dtype=torch.bool)
    stopped = nonfinite | crossed
    since = torch.zeros_like(best_residual)
    for _ in range(MOST):
        r_dual = qp.Q.matvec(state.x) + qp.q + rmatvec(qp.A, state.nu) + qp.apply_Ct(state.z * qp.on, state.y)
        r_eq = matvec(qp.A, state.x) - qp.b
        r_row = torch.where(qp.on, qp.apply_C(state.x) + state.s - qp.d, 0.0)
        residual = _residual(qp, state, goal, r_dual, r_eq, r_row)
        gained = ~stopped & (residual < best_residual)
        since = torch.where(residual < 0.5 * best_residual, 0.0, since + 1)
        best, best_residual = state.where(gained, best), torch.where(gained, residual, best_residual)
        # Where it is as good as solved, and no longer gets better, rounding is all that is left.
        stopped = stopped | (residual <= SETTLED) | ((best_residual <= 1e-9) & (since >= 3))
        if bool(stopped.all()):
            break
        mu = complementarity(state.s, state.z, qp.on).unsqueeze(-1)
        target = torch.maximum(goal, torch.where(blocked, 0.5, 0.1) * mu)
        newton = NewtonSystem(qp, system, state, refinements=2)
        step = newton.step(r_dual, r_eq, r_row, target.expand_as(state.s))
        reach = longest_step(state.s, state.z, step.s, step.z, qp.on).unsqueeze(-1)
        alpha = torch.where(reach < 1, 0.99 * reach, 1.0)
        blocked = alpha < 0.9
        moved = State(*(v + alpha * dv for v, dv in zip(state, step, strict=True)))
        sound = torch.stack([torch.isfinite(v).all(-1) for v in moved if v.shape[-1]]).all(0)
        stopped = stopped | ~(sound & ~newton.factor.failed)
        state = moved.where(~stopped, state)
    x, nu = pdipm.original(qp, best)[:2]
    return CentralPoint(x, nu, best_residual)


def _residual(qp: ScaledQP, state: State, goal: Tensor, r_dual: Tensor, r_eq: Tensor, r_row: Tensor) -> Tensor:
    z = torch.where(qp.on, state.z, 0.0)
    slope = [qp.Q.matvec(state.x), qp.q, rmatvec(qp.A, state.nu), qp.apply_Ct(z, state.y)]
    dual = max_abs(r_dual) / (1 + torch.stack([max_abs(v) for v in slope]).amax(0))
    # Of each row its own side, or a far one would hide what the others miss.
    Cx = torch.where(qp.on, qp.apply_C(state.x), 0.0)
    size = 1 + torch.maximum(max_abs(qp.b), max_abs(Cx))
    row = r_row.abs() / torch.maximum(size.unsqueeze(-1), torch.where(qp.on, torch.maximum(qp.d.abs(), state.s), 0.0))
    primal = torch.maximum(max_abs(r_eq) / size, max_abs(row))
    if qp.fixed.shape[-1]:
        stray = torch.where(qp.fixed, state.x - qp.target, 0.0)
        primal = torch.maximum(primal, max_abs(stray) / (1 + max_abs(qp.target)))
    centring = max_abs(torch.where(qp.on, state.s * state.z / goal - 1, 0.0))
    return torch.maximum(torch.maximum(dual, primal), centring)
