"""A quadratic program in equilibrated units, with its inequalities seen as one list of rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffopt.linalg.matrices import SymmetricMatrix
from diffopt.linalg.saddle import Rows
from diffopt.linalg.scaling import Scaling, equilibrate, power_of_two
from diffopt.shapes import matvec, max_abs, rmatvec


class State(NamedTuple):
    """An iterate, or a direction: x, nu, y (force of fixed variables), and slack s and multiplier z
    of all inequality rows, in the order general rows, lower bounds, upper bounds."""

    x: Tensor
    nu: Tensor
    y: Tensor
    s: Tensor
    z: Tensor

    def where(self, mask: Tensor, other: State) -> State:
        """Return self where ``mask`` ``(*batch,)`` holds, else other."""
        mask = mask.unsqueeze(-1)
        return State(*(torch.where(mask, a, b) for a, b in zip(self, other, strict=True)))


LARGE = 1e6
"""Size of a solution, in equilibrated units, from which it is the unit."""

SHARE = 1e-6
"""Of the depth of a certificate, from which a term takes part in it."""

NOISE = 1e-12
"""Share of the sizes of its terms up to which a sum is taken for rounding error, of the data too."""


def fall(*products: Tensor) -> Tensor:
    """Return minus the sum of all entries of the products, ``(*batch,)``; 0 where that is a rise, or rounding error.

    What a certificate is normalised by: one that rests on rounding errors proves nothing.
    """
    terms = torch.cat(products, -1)
    total = -terms.sum(-1)
    return torch.where(total > NOISE * terms.abs().sum(-1), total, 0.0)


class ScaledQP:
    """minimise 1/2 x'Qx + q'x subject to Ax = b, Cx <= d, x = target where fixed; C = [G; -I; I].

    All data is scaled (`equilibrate`). Rows of C that an instance does not have (infinite sides,
    fixed variables' bounds) are switched off by ``on``, so that shapes never depend on values.

    Args:
        data: finite except for infinite h, lower, upper; lower and upper may be ``None``.
        batch: the batch shape that all vectors get; matrices keep theirs.
    """

    def __init__(
        self,
        Q: SymmetricMatrix,
        q: Tensor,
        A: Tensor,
        b: Tensor,
        G: Tensor,
        h: Tensor,
        lower: Tensor | None,
        upper: Tensor | None,
        batch: torch.Size,
        scaling: Scaling | None = None,
    ) -> None:
        self.scaling = scaling = equilibrate(Q, A, G, q) if scaling is None else scaling
        d, eq, rows, cost = scaling
        n, p, m = q.shape[-1], A.shape[-2], G.shape[-2]
        self.Q = scaling.hessian(Q)
        self.A = eq.unsqueeze(-1) * A * d.unsqueeze(-2)
        self.G = rows.unsqueeze(-1) * G * d.unsqueeze(-2)
        self.q = (cost * d * q).expand(*batch, n)
        self.b = (eq * b).expand(*batch, p)
        self.batch, self.n, self.p, self.m = batch, n, p, m
        inf = q.new_full((n,), torch.inf)
        low, high = (-inf if lower is None else lower) / d, (inf if upper is None else upper) / d
        fixed = (low == high).expand(*batch, n)
        both = lower is not None and upper is not None
        self.fixed = fixed if both else fixed[..., :0]
        self.target = torch.where(fixed, low, 0.0).expand(*batch, n) if both else q.new_zeros(*batch, 0)
        sides = [rows * h] + ([-low] if lower is not None else []) + ([high] if upper is not None else [])
        side = torch.cat([side.expand(*batch, side.shape[-1]) for side in sides], -1)
        self.has_lower, self.has_upper = lower is not None, upper is not None
        self.with_bounds = self.has_lower or self.has_upper
        self.sizes = [m, n if self.has_lower else 0, n if self.has_upper else 0]
        self.on = torch.isfinite(side)
        if both:
            self.on = self.on & ~torch.cat([fixed.new_zeros(*batch, m), fixed, fixed], -1)
        self.d = torch.where(self.on, side, 0.0)
        self.size, self.force = self._shrink()
        # How much an original unit is worth here: original = scaled * unit.
        ones = d.expand(*batch, n)
        units = [(1 / rows).expand(*batch, m)] + [ones] * (int(self.has_lower) + int(self.has_upper))
        self.slope_unit, self.eq_unit, self.row_unit = (
            self.force / (cost * d),
            self.size / eq,
            self.size * torch.cat(units, -1),
        )
        self.x_unit, self.value_unit = self.size * d, (self.size * self.force / cost).squeeze(-1)

    def _shrink(self) -> tuple[Tensor, Tensor]:
        """Divide b, d and target, and so x and s, and q and so the multipliers, by powers of two; return these,
        ``(*batch, 1)`` each.

        Solutions grow with q, b and the sides; without curvature, q moves the multipliers alone. Where they must be
        large, their unit becomes what they must be at least: steps and proofs know of sizes near 1.
        """
        curved = self.Q.column_norms().amax(-1, keepdim=True) > 0
        pieces = [torch.where(curved, self.q, 0.0), self.b, self.target, self.d.clamp_max(0)]  # (sides violated at 0)
        most = max_abs(torch.cat(pieces, -1)).unsqueeze(-1)
        if self.d.shape[-1]:
            # A linear program ends at sides, if not at those that are violated at 0.
            least = torch.where(self.d > 0, self.d, torch.inf).amin(-1, keepdim=True)
            most = torch.where(curved | torch.isinf(least), most, torch.maximum(most, least))
        size = torch.where(most > LARGE, power_of_two(most), 1.0)
        force = torch.where(curved, size, 1.0)
        self.q, self.b, self.d, self.target = self.q / force, self.b / size, self.d / size, self.target / size
        return size, force

    def reach(self, state: State, depth: Tensor) -> Tensor:
        """Return how far away from 0 the contradiction of a Farkas direction of this depth lies, at least 1.

        It is the largest side that has a share in it: one row with a side of 1e10 contradicts nothing, although 1e-10
        times the row is almost zero.
        """
        sides = torch.cat([self.b, self.d, self.target], -1)
        multipliers = torch.cat([state.nu, torch.where(self.on, state.z, 0.0), state.y], -1)
        share = (sides * multipliers).abs() >= SHARE * depth.unsqueeze(-1)
        return max_abs(torch.where(share, sides, 0.0)).clamp_min(1)

    def stride(self, x: Tensor, fall: Tensor) -> Tensor:
        """Return the length, of what has a share in the fall, of a direction along which the objective falls by this
        much; at most the fall itself."""
        share = (self.q * x).abs() >= SHARE * fall.unsqueeze(-1)
        return torch.minimum(fall, max_abs(torch.where(share, x, 0.0)))

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split a vector over the rows of C into general rows, lower bounds, upper bounds."""
        general, lower, upper = rows.split(self.sizes, -1)
        return general, lower, upper

    def apply_C(self, x: Tensor) -> Tensor:
        """Return Cx."""
        pieces = [matvec(self.G, x)] + ([-x] if self.has_lower else []) + ([x] if self.has_upper else [])
        return torch.cat(pieces, -1)

    def apply_Ct(self, z: Tensor, y: Tensor) -> Tensor:
        """Return C'z, plus the force y of the fixed variables."""
        general, lower, upper = self.split(z)
        total = rmatvec(self.G, general)
        if self.has_lower:
            total = total - lower
        if self.has_upper:
            total = total + upper
        return total + y if y.shape[-1] else total

    def bound_rows(self, weight_lower: Tensor, weight_upper: Tensor) -> Tensor:
        """Return the sum over a variable's bounds of a quantity that is given per bound row."""
        if not self.with_bounds:
            return self.q[..., :0]
        if not self.has_lower:
            return weight_upper
        return weight_lower + weight_upper if self.has_upper else weight_lower

    def rows(self, take: Tensor, ratio: Tensor) -> Rows:
        """Return the participation of rows for the saddle-point system.

        Args:
            take: boolean over the rows of C; ratio: e = s/z of each.
        """
        row_in, lower_in, upper_in = self.split(take)
        row_e, lower_e, upper_e = self.split(ratio)
        bound_in = self.bound_rows(lower_in, upper_in).bool()
        # A variable with two bounds is one row of combined weight 1/e_lower + 1/e_upper.
        weight = self.bound_rows(torch.where(lower_in, 1 / lower_e, 0.0), torch.where(upper_in, 1 / upper_e, 0.0))
        bound_e = torch.where(bound_in, 1 / torch.where(bound_in, weight, 1.0), 0.0)
        if self.fixed.shape[-1]:
            bound_in, bound_e = bound_in | self.fixed, torch.where(self.fixed, 0.0, bound_e)
        return Rows(row_in, row_e, bound_in, bound_e)

    def relative_residuals(self, state: State) -> tuple[Tensor, Tensor]:
        """Return the worst relative residual of each instance, and the worst of primal and dual, in original and in
        scaled units alike."""
        x, z = state.x, torch.where(self.on, state.z, 0.0)
        Qx, pull, push = self.Q.matvec(x), rmatvec(self.A, state.nu), self.apply_Ct(z, state.y)
        Ax, Cx = matvec(self.A, x), torch.where(self.on, self.apply_C(x), 0.0)
        linear, sides = (self.q * x).sum(-1), (self.d * z).sum(-1) + (self.target * state.y).sum(-1)
        terms = torch.stack([(Qx * x).sum(-1), linear, (self.b * state.nu).sum(-1), sides])
        crossed = torch.where(Cx > self.d, self.d, 0.0)  # (a far side that x meets must not hide what else it violates)
        stray = torch.where(self.fixed, x - self.target, 0.0) if self.fixed.shape[-1] else torch.zeros_like(x)
        worst = infeasible = torch.zeros_like(linear)
        one = x.new_ones(())
        for slope_unit, eq_unit, row_unit, x_unit, value_unit in (
            (one, one, one, one, one),
            (self.slope_unit, self.eq_unit, self.row_unit, self.x_unit, self.value_unit),
        ):
            dual = max_abs((Qx + self.q + pull + push) * slope_unit)
            dual_size = _largest(Qx * slope_unit, self.q * slope_unit, pull * slope_unit, push * slope_unit)
            primal = _largest((Ax - self.b) * eq_unit, (Cx - self.d).clamp_min(0) * row_unit, stray * x_unit)
            primal_size = _largest(Ax * eq_unit, self.b * eq_unit, Cx * row_unit, crossed * row_unit)
            gap, gap_size = terms.sum(0).abs() * value_unit, terms.abs().amax(0) * value_unit
            for error, size in ((dual, dual_size), (primal, primal_size)):
                infeasible = torch.maximum(infeasible, error / (1 + size))
            worst = torch.maximum(worst, gap / (1 + gap_size))
        return torch.maximum(worst, infeasible), infeasible


def _largest(*vectors: Tensor) -> Tensor:
    result = max_abs(vectors[0])
    for vector in vectors[1:]:
        if vector.shape[-1]:
            result = torch.maximum(result, max_abs(vector))
    return result
