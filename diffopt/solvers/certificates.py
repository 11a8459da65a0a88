"""Proofs that there is no solution: two auxiliary problems, solved by the same method.

Both always have a solution, and their solution is the proof:

- least infeasibility, min 1/2 |Ax - b|^2 + 1/2 |t|^2 subject to Gx - t <= h and the bounds. Where
  its optimal value is positive, nu = Ax - b, lam = t and the multipliers of the bounds satisfy
  A'nu + G'lam + bounds = 0 and b'nu + h'lam + ... = -(|Ax - b|^2 + |t|^2) < 0;
- steepest recession, min 1/2 |v + q|^2 subject to Qv = 0, Av = 0, Gv <= 0, v staying inside finite
  bounds: the projection of -q on the directions in which nothing stops. Where v is not 0,
  q'v = -|v|^2 < 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffopt.linalg.matrices import Diagonal
from diffopt.shapes import matvec, max_abs, rmatvec
from diffopt.solvers.scaled_qp import ScaledQP, State, fall

TOLERANCE = 1e-8
"""Largest error of a normalised certificate, in equilibrated units, for which it is claimed."""

FLAT = 1e-12
"""Curvature along a direction, relative to its length, that is nothing but rounding error."""


class Proof(NamedTuple):
    """``holds`` ``(*batch,)``; ``ray``: the normalised direction, in equilibrated units, zero where none."""

    holds: Tensor
    ray: State


def check_primal(qp: ScaledQP, state: State, run: Tensor) -> Proof:
    """Check (nu, z, y) of a state as a Farkas certificate, normalised to depth -1.

    What is left of A'nu + C'z is absorbed into the multipliers of finite bounds where that is possible.
    """
    z = torch.where(qp.on, state.z, 0.0).clamp_min(0)
    y = state.y
    for _ in range(2):
        pull = rmatvec(qp.A, state.nu) + qp.apply_Ct(z, y)
        if qp.fixed.shape[-1]:
            y = y - torch.where(qp.fixed, pull, 0.0)
            pull = torch.where(qp.fixed, 0.0, pull)
        general, lower, upper = qp.split(z)
        _, on_lower, on_upper = qp.split(qp.on)
        pieces = [general]
        if qp.has_lower:
            pieces.append(torch.where(on_lower, (lower + pull).clamp_min(0), 0.0))
            pull = pull + lower - pieces[-1]
        if qp.has_upper:
            pieces.append(torch.where(on_upper, (upper - pull).clamp_min(0), 0.0))
        z = torch.cat(pieces, -1)
    depth = fall(qp.b * state.nu, qp.d * z, qp.target * y)
    scale = torch.where(depth > 0, 1 / torch.where(depth > 0, depth, 1.0), 0.0).unsqueeze(-1)
    ray = State(torch.zeros_like(state.x), state.nu * scale, y * scale, torch.zeros_like(z), z * scale)
    error = max_abs(rmatvec(qp.A, ray.nu) + qp.apply_Ct(ray.z, ray.y))
    far = qp.reach(ray, torch.ones_like(depth))
    holds = run & (depth > 0) & torch.isfinite(depth) & (error * far <= TOLERANCE)
    return Proof(holds, ray)


def check_dual(qp: ScaledQP, direction: Tensor, run: Tensor, convex: Tensor) -> Proof:
    """Check a direction as a proof of unboundedness, normalised to q'x = -1.

    Args:
        convex: ``(*batch,)`` where Q seems to be definite. Such an objective is bounded below, whatever a direction of
            tiny curvature suggests; one of none at all shows that the pivots took a singular Q for a definite one.
    """
    slope = fall(qp.q * direction)
    scale = torch.where(slope > 0, 1 / torch.where(slope > 0, slope, 1.0), 0.0).unsqueeze(-1)
    v = direction * scale
    bend = max_abs(qp.Q.matvec(v))
    run = run & (~convex | (bend <= FLAT * max_abs(v)))
    error = torch.maximum(bend, max_abs(matvec(qp.A, v)))
    error = torch.maximum(error, max_abs(torch.where(qp.on, qp.apply_C(v), 0.0).clamp_min(0)))
    if qp.fixed.shape[-1]:
        error = torch.maximum(error, max_abs(torch.where(qp.fixed, v, 0.0)))
    holds = run & (slope > 0) & torch.isfinite(slope) & (error <= TOLERANCE * qp.stride(v, torch.ones_like(slope)))
    none = torch.zeros_like(qp.d)
    return Proof(holds, State(v, torch.zeros_like(qp.b), torch.zeros_like(qp.target), none, none))


class Auxiliary(NamedTuple):
    """The data of an auxiliary quadratic program, for the solver to solve."""

    Q: Diagonal
    q: Tensor
    A: Tensor
    b: Tensor
    G: Tensor
    h: Tensor
    lower: Tensor | None
    upper: Tensor | None


def least_infeasibility(qp: ScaledQP) -> Auxiliary:
    """Return the first auxiliary problem, over (x, r, t): Ax - r = b, Gx - t <= h, bounds on x.

    x need not be unique; r and t are, and the certificate with them. (A ridge on x would spoil its balance.)
    """
    n, p, m, batch = qp.n, qp.p, qp.m, qp.batch
    size = n + p + m
    weight = torch.cat([qp.q.new_zeros(n), qp.q.new_ones(p + m)])
    eye_p, eye_m = (
        torch.eye(p, dtype=qp.q.dtype, device=qp.q.device),
        torch.eye(m, dtype=qp.q.dtype, device=qp.q.device),
    )
    A = torch.cat([qp.A, (-eye_p).expand(*qp.A.shape[:-2], p, p), qp.A.new_zeros(*qp.A.shape[:-2], p, m)], -1)
    G = torch.cat([qp.G, qp.G.new_zeros(*qp.G.shape[:-2], m, p), (-eye_m).expand(*qp.G.shape[:-2], m, m)], -1)
    general, lower, upper = qp.split(torch.where(qp.on, qp.d, torch.inf))
    free = qp.q.new_full((*batch, p + m), torch.inf)
    low = torch.cat([-lower, -free], -1) if qp.has_lower else None
    high = torch.cat([upper, free], -1) if qp.has_upper else None
    if qp.fixed.shape[-1] and low is not None and high is not None:
        pad = torch.cat([qp.fixed, qp.fixed.new_zeros(*batch, p + m)], -1)
        target = torch.cat([qp.target, qp.target.new_zeros(*batch, p + m)], -1)
        low, high = torch.where(pad, target, low), torch.where(pad, target, high)
    return Auxiliary(Diagonal(weight), qp.q.new_zeros(*batch, size), A, qp.b, G, general, low, high)


def seen_closer(problem: Auxiliary, x: Tensor, nu: Tensor, lam: Tensor, n: int) -> Auxiliary:
    """Return the first auxiliary problem in variables around its solution and in units of the largest violation.

    Its multipliers are as large as the violations, and only as accurate as rounding errors of x allow. A combination of
    the rows that contradicts itself contradicts itself here too, and is found to full accuracy.

    Args:
        problem, x, nu, lam: the problem and its solution; the first ``n`` of its variables are those of the program.
    """
    size = torch.maximum(max_abs(nu), max_abs(lam)).unsqueeze(-1)
    unit = torch.where((size > 0) & torch.isfinite(size), size, 1.0)
    x = torch.where(torch.isfinite(x), x, 0.0)[..., :n]
    shift = torch.nn.functional.pad(x, (0, problem.q.shape[-1] - n))
    lower, upper = (None if side is None else (side - shift) / unit for side in (problem.lower, problem.upper))
    if lower is not None and upper is not None:
        fixed = problem.lower == problem.upper
        lower, upper = torch.where(fixed, 0.0, lower), torch.where(fixed, 0.0, upper)
    b, h = (problem.b - matvec(problem.A, shift)) / unit, (problem.h - matvec(problem.G, shift)) / unit
    return problem._replace(b=b, h=h, lower=lower, upper=upper)


def steepest_recession(qp: ScaledQP) -> Auxiliary:
    """Return the second auxiliary problem, over the direction v."""
    batch, n = qp.batch, qp.n
    Q = qp.Q.dense()
    lead = torch.broadcast_shapes(Q.shape[:-2], qp.A.shape[:-2])
    A = torch.cat([Q.expand(*lead, n, n), qp.A.expand(*lead, *qp.A.shape[-2:])], -2)
    on_general, on_lower, on_upper = qp.split(qp.on)
    zero = qp.q.new_zeros(())
    low = torch.where(on_lower, zero, -torch.inf) if qp.has_lower else None
    high = torch.where(on_upper, zero, torch.inf) if qp.has_upper else None
    if qp.fixed.shape[-1] and low is not None and high is not None:
        low, high = torch.where(qp.fixed, zero, low), torch.where(qp.fixed, zero, high)
    side = torch.where(on_general, zero, torch.inf)
    size = qp.q.abs().amax(-1, keepdim=True)
    q = qp.q / torch.where(size > 0, size, 1.0)
    return Auxiliary(Diagonal(qp.q.new_ones(n)), q, A, qp.q.new_zeros(*batch, n + qp.p), qp.G, side, low, high)
