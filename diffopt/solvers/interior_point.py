"""The batched primal-dual interior-point method."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffopt import waiting
from diffopt.linalg.saddle import Saddle
from diffopt.shapes import matvec, max_abs, rmatvec
from diffopt.solvers.newton_system import NewtonSystem
from diffopt.solvers.scaled_qp import ScaledQP, State, fall
from diffopt.solvers.step import complementarity, interior_start, longest_step

FARKAS = 1e-9
"""Relative size of a certificate's error at which an iterate proves that there is no solution."""


AHEAD = 1e-4
"""How far the average complementarity may fall below the relative residual before it is held."""


FAR = 1e6
"""Side of a row, in equilibrated units, beyond which it counts less at the start."""


class Outcome(NamedTuple):
    """Where the iteration ended, per instance.

    ``residual``: worst relative residual of ``state``; ``iterations``; ``primal_infeasible`` and
    ``dual_infeasible``: ``state`` holds a direction that proves it; ``failed``: linear algebra broke down; ``limited``:
    the last iteration that was allowed has been made.
    """

    state: State
    residual: Tensor
    iterations: Tensor
    primal_infeasible: Tensor
    dual_infeasible: Tensor
    failed: Tensor
    limited: Tensor


def solve(
    qp: ScaledQP,
    system: Saddle,
    run: Tensor,
    tolerance: float,
    max_iterations: int,
    bounded: bool = False,
    hold: bool = False,
    begin: State | None = None,
) -> Outcome:
    """Solve the instances marked in ``run`` by Mehrotra's predictor-corrector method.

    Every instance stops by its own residuals; one that has stopped is frozen, and nothing that
    happens to it or to any other instance changes it again.

    Args:
        qp: the problem, equilibrated.
        system: its saddle-point system; decides the reduction.
        run: ``(*batch,)`` bool.
        tolerance: worst relative residual, in original and in equilibrated units.
        max_iterations: at least 1.
        bounded: the objective is known to be strictly convex, so unboundedness is not looked for.
        hold: give every row an equation of its own in the n x n form. Slower; does not lose flat directions of Q
            where weights are large.
        begin: the first iterate, inside the cone; by default that of `start`.

    References:
        Mehrotra (1992), "On the implementation of a primal-dual interior point method"; for QPs and
        common steps Nocedal and Wright (2006), section 16.6. Different here: a step factor that
        tends to 1 with mu, but is 0.9 for blocked steps once two steps have gained little. (Plain Mehrotra
        cycles with period 4 on about 1 problem in 2,000; a larger sigma after slow steps cures most of
        these, but not all, and costs iterations.)
    """
    # The n x n form loses what stands between its smallest and largest weight; the others need no refinement.
    refinements = 2 if system.reduction == "primal" else 0
    state = start(qp, system, hold) if begin is None else begin
    shape = qp.batch
    best, best_residual = state, torch.full(shape, torch.inf, dtype=qp.q.dtype, device=qp.q.device)
    stopped = ~run.expand(shape)
    flag = torch.zeros(shape, dtype=torch.bool, device=qp.q.device)
    primal_infeasible, dual_infeasible, failed = flag, flag, flag
    iterations = torch.zeros(shape, dtype=torch.int64, device=qp.q.device)
    last_mu = torch.full_like(best_residual, torch.inf)
    stalled, slow = torch.zeros_like(iterations), torch.zeros_like(iterations)

    for count in range(max_iterations + 1):
        residual, infeasible = qp.relative_residuals(state)
        gained = residual < best_residual
        best, best_residual = state.where(gained, best), torch.where(gained, residual, best_residual)
        infeasible, unbounded = _certificates(qp, state)
        unbounded = unbounded & (not bounded)
        proven = ~stopped & (residual > tolerance) & (infeasible | unbounded)
        best = state.where(proven, best)
        primal_infeasible = primal_infeasible | (proven & infeasible)
        dual_infeasible = dual_infeasible | (proven & unbounded & ~infeasible)
        stopped = stopped | (residual <= tolerance) | proven | (stalled >= 3)
        if count == max_iterations or waiting.every(stopped):
            break

        r_dual = qp.Q.matvec(state.x) + qp.q + rmatvec(qp.A, state.nu) + qp.apply_Ct(state.z * qp.on, state.y)
        r_eq = matvec(qp.A, state.x) - qp.b
        r_row = torch.where(qp.on, qp.apply_C(state.x) + state.s - qp.d, 0.0)
        mu = complementarity(state.s, state.z, qp.on)

        newton = NewtonSystem(qp, system, state, refinements, hold)
        affine = newton.step(r_dual, r_eq, r_row, torch.zeros_like(state.s))
        alpha = longest_step(state.s, state.z, affine.s, affine.z, qp.on).unsqueeze(-1)
        mu_affine = complementarity(state.s + alpha * affine.s, state.z + alpha * affine.z, qp.on)
        sigma = (mu_affine / torch.where(mu > 0, mu, 1.0)).clamp(0, 1) ** 3

        # Complementarity must not run ahead of feasibility: the weights s/z would drown flat directions. (The gap is
        # complementarity itself, in other units.)
        sigma = torch.where(mu < AHEAD * infeasible, 1.0, sigma)
        target = (sigma * mu).unsqueeze(-1) - affine.s * affine.z
        direction = newton.step(r_dual, r_eq, r_row, target)
        reach = longest_step(state.s, state.z, direction.s, direction.z, qp.on)
        eta = (1 - mu).clamp(0.995, 1 - 1e-7)
        # An iterate far from the centre is blocked again and again; short steps let the centring work.
        slow = slow + (mu > 0.7 * last_mu).long()
        eta = torch.where((slow >= 2) & (reach < 0.9), 0.9, eta)
        # Without inequalities the full step is exact; with them it stays inside.
        alpha = torch.where((reach < 1) | (mu > 0), (eta * reach).clamp_max(1), reach)
        moved = State(*(v + alpha.unsqueeze(-1) * dv for v, dv in zip(state, direction, strict=True)))

        sound = torch.stack([torch.isfinite(v).all(-1) for v in moved if v.shape[-1]]).all(0)
        broken = ~stopped & ~(sound & ~newton.factor.failed)
        failed, stopped = failed | broken, stopped | broken
        state = moved.where(~stopped, state)
        iterations = iterations + (~stopped).long()
        stalled = torch.where(alpha < 1e-4, stalled + 1, 0)
        last_mu = mu

    limited = iterations >= max_iterations
    return Outcome(best, best_residual, iterations, primal_infeasible, dual_infeasible, failed, limited)


def start(qp: ScaledQP, system: Saddle, hold: bool = False, weight: float = 1.0) -> State:
    """Return the minimiser of the objective plus weight/2 |Cx - d|^2 over the rows, and s and z from its distances.

    A row whose side is far away counts less, so that a bound of 1e12 that nobody will meet does
    not pull x there.
    """
    one = torch.ones_like(qp.d)
    far = (qp.d.abs() / FAR).clamp_min(1).square() / weight
    at = State(qp.q.new_zeros(*qp.batch, qp.n), torch.zeros_like(qp.b), torch.zeros_like(qp.target), far, one)
    newton = NewtonSystem(qp, system, at, refinements=1, hold=hold)
    # With s = far, z = 1 and target = far the row equation reads C dx - far dz = d.
    step = newton.step(qp.q, -qp.b, -qp.d, far)
    s, z = interior_start(qp.d - qp.apply_C(step.x), step.z, qp.on)
    z = torch.where(qp.on & (s > FAR), torch.minimum(z, FAR / s), z)  # else such rows alone would set mu
    usable = torch.isfinite(step.x).all(-1) & torch.isfinite(s).all(-1) & torch.isfinite(z).all(-1)
    usable = usable & ~newton.factor.failed
    return State(step.x, step.nu, step.y, s, z).where(usable, at._replace(s=one))


def large_start(qp: ScaledQP) -> State:
    """Return x = 0, and s and z ten times as large as anything in the data but far sides: far inside the cone.

    A slack that has to grow by a factor makes Newton's step lower its multiplier by the same, which blocks it where the
    solution has both large, as where soft constraints have a high price. From above there is no such growth.
    """
    sides = torch.where(qp.on & (qp.d.abs() <= FAR), qp.d, 0.0)
    size = torch.cat([qp.q, qp.b, qp.target, sides], -1).abs().amax(-1, keepdim=True).clamp_min(1)
    far = torch.where(qp.on, 10 * size, 1.0)
    zero = torch.zeros_like
    return State(zero(qp.q), zero(qp.b), zero(qp.target), far, far)


def _certificates(qp: ScaledQP, state: State) -> tuple[Tensor, Tensor]:
    """Return where an iterate proves primal infeasibility, and where unboundedness, ``(*batch,)`` each.

    Primal: with z >= 0, A'nu + C'z = 0 and b'nu + d'z < 0 no x can satisfy the constraints.
    Dual: with Qx = 0, Ax = 0, Cx <= 0 and q'x < 0 the objective falls without end along x.
    """
    z = state.z * qp.on
    pull = rmatvec(qp.A, state.nu) + qp.apply_Ct(z, state.y)
    depth = fall(qp.b * state.nu, qp.d * z, qp.target * state.y)
    primal = (depth > 0) & (max_abs(pull) * qp.reach(state, depth) <= FARKAS * depth)
    slope = fall(qp.q * state.x)
    outside = torch.where(qp.on, qp.apply_C(state.x), 0.0).clamp_min(0)
    error = torch.maximum(max_abs(qp.Q.matvec(state.x)), max_abs(matvec(qp.A, state.x)))
    error = torch.maximum(error, max_abs(outside))
    if qp.fixed.shape[-1]:
        error = torch.maximum(error, max_abs(torch.where(qp.fixed, state.x, 0.0)))
    return primal, (slope > 0) & (error <= FARKAS * qp.stride(state.x, slope))
