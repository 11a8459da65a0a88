"""The Newton step of the interior-point method, on top of the saddle-point system."""

from __future__ import annotations

import torch
from torch import Tensor

from diffopt.linalg.saddle import Blocks, Factor, Saddle
from diffopt.solvers.scaled_qp import ScaledQP, State


class NewtonSystem:
    """The linearised optimality conditions at one iterate, factored for several right-hand sides.

    With r the residuals, each step solves

        Q dx + A' dnu + C' dz = -r_dual,   A dx = -r_eq,   C dx + ds = -r_row,
        z ds + s dz = -s z + target

    Eliminating ds leaves C dx - (s/z) dz = -r_row + s - target / z, the form of `Saddle`.
    """

    def __init__(self, qp: ScaledQP, system: Saddle, state: State, refinements: int, hold: bool = False) -> None:
        self.qp, self.state, self.refinements = qp, state, refinements
        self.ratio = torch.where(qp.on, state.s / state.z, 1.0)
        self.factor: Factor = system.factor(qp.rows(qp.on, self.ratio), held=hold)

    def step(self, r_dual: Tensor, r_eq: Tensor, r_row: Tensor, target: Tensor) -> State:
        """Return the direction for the given residuals and complementarity target (rows of C)."""
        qp, state = self.qp, self.state
        side = torch.where(qp.on, -r_row + state.s - target / state.z, 0.0)
        right = right_side(qp, self.ratio, self.factor.rows.bound_e, side, -r_dual, -r_eq, state.x)
        u = self.factor.solve(right, self.refinements)
        dz, dy = spread(qp, u, side, self.ratio)
        # Where s is small its change is taken from complementarity, elsewhere from feasibility: each
        # is the one that keeps the relative accuracy of s.
        by_complementarity = -state.s + target / state.z - self.ratio * dz
        ds = torch.where(state.s < state.z, by_complementarity, -r_row - qp.apply_C(u.x))
        return State(u.x, u.eq, dy, torch.where(qp.on, ds, 0.0), dz)


def right_side(qp: ScaledQP, ratio: Tensor, bound_e: Tensor, side: Tensor, x: Tensor, eq: Tensor, at: Tensor) -> Blocks:
    """Return the right-hand side of `Saddle` for per-row sides ``C dx - e dz = side``.

    Args:
        ratio: e of each row of C; bound_e: that of the combined bounds.
        at: the current x, from which fixed variables still have to move to their target.
    """
    general, lower, upper = qp.split(side)
    if not qp.with_bounds:
        return Blocks(x, eq, general, side[..., :0])
    # Two bounds of one variable: w_u (dx - side_u) - w_l (-dx - side_l) = (w_l + w_u)(dx - bound).
    _, take_lower, take_upper = qp.split(qp.on)
    _, e_lower, e_upper = qp.split(ratio)
    weight_l = torch.where(take_lower, 1 / e_lower, 0.0)
    weight_u = torch.where(take_upper, 1 / e_upper, 0.0)
    bound = qp.bound_rows(-weight_l * lower, weight_u * upper) * bound_e
    if qp.fixed.shape[-1]:
        bound = torch.where(qp.fixed, qp.target - at, bound)
    return Blocks(x, eq, general, bound)


def spread(qp: ScaledQP, u: Blocks, side: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Return the multiplier step of every row of C, and of the fixed variables, from a solution u.

    Of a variable's two bounds the one with the smaller weight is computed directly; the other
    takes the rest of the combined force, which the system knows accurately.
    """
    _, lower, upper = qp.split(side)
    _, e_lower, e_upper = qp.split(ratio)
    _, on_lower, on_upper = qp.split(qp.on)
    pieces = [u.row]
    force = torch.where(qp.fixed, 0.0, u.bound) if qp.fixed.shape[-1] else u.bound
    if qp.has_lower and qp.has_upper:
        direct_l = torch.where(on_lower, (-u.x - lower) / e_lower, 0.0)
        direct_u = torch.where(on_upper, (u.x - upper) / e_upper, 0.0)
        lower_is_light = on_upper & (~on_lower | (e_lower >= e_upper))
        pieces.append(torch.where(lower_is_light, direct_l, direct_u - force))
        pieces.append(torch.where(lower_is_light, force + direct_l, direct_u))
    elif qp.has_lower:
        pieces.append(-force)
    elif qp.has_upper:
        pieces.append(force)
    dz = torch.where(qp.on, torch.cat(pieces, -1), 0.0)
    dy = torch.where(qp.fixed, u.bound, 0.0) if qp.fixed.shape[-1] else qp.target
    return dz, dy
