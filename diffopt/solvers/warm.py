"""The method from an earlier solution: its active set first, then iterates from near it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffopt.linalg.saddle import Saddle
from diffopt.shapes import matvec, max_abs, rmatvec
from diffopt.solvers import interior_point
from diffopt.solvers.interior_point import Outcome
from diffopt.solvers.polish import Polished, polish
from diffopt.solvers.scaled_qp import ScaledQP, State
from diffopt.warm_start import Start

HELD_FROM = 1e-7
"""Multiplier, in equilibrated units, from which its row is held."""

ROUNDS = 10
"""Active sets that are tried: that of the earlier solution is wrong in places, and each round mends some."""

LARGEST_ERROR = 100.0
"""Error of the earlier solution on the new data, in equilibrated units, up to which to begin near it."""

SMALLEST_ERROR = 1e-8
"""What its error counts at least: to begin in the interior."""

STEPS = 15
"""Steps after which such a beginning is given up."""


class Near(NamedTuple):
    """An earlier solution in equilibrated units, and where it can be used, ``(*batch,)``. Its s only says which rows
    are held: 0, else 1."""

    state: State
    usable: Tensor


def near(qp: ScaledQP, start: Start) -> Near:
    """Return a start in the units and rows of a problem."""
    usable = start.finite()
    x, nu, lam, lower, upper = (torch.where(usable.unsqueeze(-1), v, 0.0) for v in start)
    d, eq, rows, cost = qp.scaling
    cost = cost / qp.force
    x, nu, lam = x / (d * qp.size), cost * nu / eq, cost * lam / rows
    lower, upper = cost * d * lower, cost * d * upper
    pieces = [lam] + ([lower] if qp.has_lower else []) + ([upper] if qp.has_upper else [])
    z = torch.where(qp.on, torch.cat(pieces, -1).clamp_min(0), 0.0)
    y = qp.target
    if qp.fixed.shape[-1]:
        x = torch.where(qp.fixed, qp.target, x)
        y = torch.where(qp.fixed, upper - lower, 0.0)
    s = torch.where(z > HELD_FROM, 0.0, 1.0)
    return Near(State(x, nu, y, s, z), usable)


def by_active_set(qp: ScaledQP, system: Saddle, at: Near, run: Tensor, tolerance: float) -> Polished:
    """Solve those whose active set is that of the earlier solution, or nearly."""
    allowed = torch.full(qp.batch, tolerance, dtype=qp.q.dtype, device=qp.q.device)
    return polish(qp, system, at.state, allowed, run & at.usable, ROUNDS)


def from_near(
    qp: ScaledQP, system: Saddle, at: Near, run: Tensor, tolerance: float, most: int, bounded: bool
) -> Outcome:
    """Iterate from near the earlier solution, where all products s z are at least its error on the new data."""
    x, nu, y, _, z = at.state
    slack = qp.d - qp.apply_C(x)
    worst = torch.maximum(
        max_abs(qp.Q.matvec(x) + qp.q + rmatvec(qp.A, nu) + qp.apply_Ct(z, y)), max_abs(matvec(qp.A, x) - qp.b)
    )
    worst = torch.maximum(worst, max_abs(torch.where(qp.on, torch.minimum(slack, z), 0.0)))
    run = run & at.usable & (worst <= LARGEST_ERROR)
    product = worst.clamp_min(SMALLEST_ERROR).unsqueeze(-1)
    slack, held = slack.clamp_min(0), z > slack
    large_s, large_z = torch.maximum(slack, product.sqrt()), torch.maximum(z, product.sqrt())
    s = torch.where(qp.on, torch.where(held, torch.maximum(slack, product / large_z), large_s), 1.0)
    z = torch.where(qp.on, torch.where(held, large_z, torch.maximum(z, product / large_s)), 1.0)
    steps = min(STEPS, most)
    return interior_point.solve(qp, system, run, tolerance, steps, bounded=bounded, begin=State(x, nu, y, s, z))
