"""The KKT system of the active sets of a batch, on plain tensors: factored once, solved for any right-hand side."""

from __future__ import annotations

import torch
from torch import Tensor

from diffopt import kkt, waiting
from diffopt.errors import ADJOINT, warn_of_gradients
from diffopt.linalg.central import central_ratio
from diffopt.linalg.saddle import Blocks, Factor, Saddle, solve_minimum_norm
from diffopt.linalg.scaling import Scaling


class ActiveSystem:
    """The KKT system of the active sets of a batch, in original units: factored when first needed.

    ``kink_rule`` decides what weakly active rows do; see `diffopt.Settings`.
    """

    def __init__(
        self, dtype: torch.dtype, prepared: kkt.System | None, active: kkt.Activity, kink_rule: str, failed: Tensor,
        saddle: Saddle | None, scaling: Scaling,
    ) -> None:  # fmt: skip
        self.failed, self.scaling, self.dtype = failed, scaling, dtype
        self.sync = waiting.allowed()
        self.prepared = prepared
        self._saddle = saddle if prepared is None else prepared.factor.system
        self.weak = active.weak_count() > 0
        weak_any = kink_rule not in ("inactive", "nan") and bool(self.weak.any())
        self.dense_rule = kink_rule == "minimum_norm" and weak_any
        self.weak_row = active.weak_row
        none_row, none_bound = torch.zeros_like(active.row), torch.zeros_like(active.lower)
        strict = active
        if weak_any:
            active = active._replace(
                row=active.row | active.weak_row,
                lower=active.lower | active.weak_lower,
                upper=active.upper | (active.weak_upper & ~(active.lower | active.weak_lower)),
            )
        self.active = active
        # Rows that are equations of the system, and columns that are unknowns: they differ only
        # under "minimum_norm", which leaves weakly active rows undecided.
        self.equation_row = strict.row if self.dense_rule else active.row
        self.equation_bound = held(strict if self.dense_rule else active)
        zero = torch.zeros((), dtype=torch.float64, device=failed.device)
        self.ratio_row, self.ratio_bound = zero.expand(none_row.shape), zero.expand(none_bound.shape)
        self._scaled_ratios = (self.ratio_row, self.ratio_bound)
        if weak_any and kink_rule == "central":
            self._use_central(strict)
        self._factor: Factor | None = None
        self.residual: Tensor | None = None  # what `adjoint` returns, once known

    def _use_central(self, strict: kkt.Activity) -> None:
        d, _, rows, cost = self.scaling
        up, down = strict.weak_upper & ~held(strict), strict.weak_lower & ~held(strict)
        sign = up.long() - (down & ~up).long()
        e_row, e_bound = central_ratio(self.saddle(), kkt.rows_of(strict), self.weak_row, sign)
        self._scaled_ratios = (e_row, e_bound)
        self.ratio_row = e_row * cost / rows.square()
        self.ratio_bound = e_bound * cost * d.square() if e_bound.shape[-1] else e_bound

    def saddle(self) -> Saddle:
        """Return the equilibrated saddle-point system of the data."""
        assert self._saddle is not None
        return self._saddle

    def factor(self) -> Factor:
        """Return the factored system; that of the backend where it has the same rows."""
        if self._factor is None:
            prepared = self.prepared
            if prepared is not None and self._same_rows(prepared.active):
                self._factor = prepared.factor
            else:
                rows = kkt.rows_of(self.active, *self._scaled_ratios)
                self._factor = self.saddle().factor_active(rows)
        return self._factor

    def _same_rows(self, other: kkt.Activity) -> bool:
        if not waiting.allowed():
            return False
        if bool((self._scaled_ratios[0] != 0).any()) or bool((self._scaled_ratios[1] != 0).any()):
            return False
        same = torch.equal(self.active.row, other.row)
        return same and torch.equal(held(self.active), held(other))

    def dependent(self) -> Tensor:
        """Return the number of dependent active rows of each instance."""
        return self.factor().dependent().expand(self.failed.shape)

    def adjoint(self) -> Tensor:
        """Return the relative residual, ``(*batch,)``, of K u = r, refined, for a fixed r in x: see `Solution.adjoint`.

        (The probe has a part along any direction; where K is singular along one, the residual keeps that part.)
        """
        if self.residual is not None:
            return self.residual
        saddle, shape = self.saddle(), self.failed.shape
        probe = torch.cos(1 + torch.arange(saddle.Q.n, dtype=torch.float64, device=self.failed.device).square())
        sizes = (saddle.A.shape[-2], saddle.G.shape[-2], self.active.lower.shape[-1])
        r = Blocks(probe.expand(*shape, -1), *(probe.new_zeros(*shape, size) for size in sizes))
        factor = self.factor()
        error = torch.where(factor.failed, torch.inf, factor.solve_accurately(r)[1])
        self.residual = torch.where(self.failed, torch.nan, error.expand(shape))
        return self.residual

    def solve(self, r: Blocks, transpose: bool) -> Blocks:
        """Return K^-1 r (or K'^-1 r): zero where r is zero, NaN where a failed instance has r != 0."""
        with waiting.allow(self.sync):
            return self._solve(r, transpose)

    def _solve(self, r: Blocks, transpose: bool) -> Blocks:
        asked = torch.stack([(v != 0).any(-1) for v in r if v.shape[-1]]).any(0)
        if not waiting.some(asked):
            return Blocks(*(torch.zeros_like(v) for v in r))
        bad = self.failed.unsqueeze(-1)
        # NaN that comes in goes out, and must not meet a factor that neighbours share.
        poisoned = ~torch.stack([torch.isfinite(v).all(-1) for v in r if v.shape[-1]]).all(0) & asked
        skip = bad | poisoned.unsqueeze(-1)
        clean = Blocks(*(torch.where(skip, 0.0, v.double()) for v in r))
        scaled = kkt.to_scaled(clean, self.scaling)
        found, residual = solve_minimum_norm(self.factor(), scaled)
        # (Which way an instance goes depends on its own kinks alone.)
        dense = self.weak if self.dense_rule else torch.zeros_like(self.failed)
        if waiting.allowed() and (poor := int(((residual > ADJOINT) & ~(self.failed | dense)).sum())):
            warn_of_gradients(poor, residual.numel())
        u = kkt.to_original(found, self.scaling)
        if self.dense_rule:
            u = self._solve_dense(clean, transpose).where(dense, u)
        spoiled = ((self.failed & asked) | poisoned).unsqueeze(-1)
        return Blocks(*(torch.where(spoiled, torch.nan, v).to(self.dtype) for v in u))

    def _solve_dense(self, r: Blocks, transpose: bool) -> Blocks:
        """Return the minimum-norm solution in original units, by a pseudo-inverse of all of K."""
        matrix = self._dense()
        sizes = [v.shape[-1] for v in r]
        shape = torch.broadcast_shapes(self.failed.shape, *(v.shape[:-1] for v in r))
        right = torch.cat([v.expand(*shape, v.shape[-1]) for v in r], -1).unsqueeze(-1)
        inverse = torch.linalg.pinv(matrix.mT if transpose else matrix, rtol=1e-11)
        return Blocks(*(inverse @ right).squeeze(-1).split(sizes, -1))

    def _dense(self) -> Tensor:
        """Return K as ``(*batch, N, N)`` in original units, one column per unknown."""
        saddle = self.saddle()
        d, eq, rows, cost = self.scaling
        n, p = saddle.Q.n, saddle.A.shape[-2]
        m, k = self.active.row.shape[-1], self.active.lower.shape[-1]
        shape = self.failed.shape
        column = torch.cat([v.expand(*shape, v.shape[-1]) for v in (1 / d, cost / eq, cost / rows)], -1)
        row = torch.cat([v.expand(*shape, v.shape[-1]) for v in (1 / (cost * d), 1 / eq, 1 / rows)], -1)
        K = torch.zeros(*shape, n + p + m + k, n + p + m + k, dtype=torch.float64, device=d.device)
        K[..., :n, :n] = saddle.Q.dense()
        K[..., :n, n : n + p], K[..., n : n + p, :n] = saddle.A.mT, saddle.A
        K[..., :n, n + p : n + p + m], K[..., n + p : n + p + m, :n] = saddle.G.mT, saddle.G
        K[..., : n + p + m, : n + p + m] *= row.unsqueeze(-1) * column.unsqueeze(-2)
        eye = torch.eye(n, dtype=K.dtype, device=K.device)[:, :k]
        K[..., :n, n + p + m :], K[..., n + p + m :, :n] = eye, eye.mT
        equation = torch.cat([torch.ones_like(column[..., : n + p]), self.equation_row, self.equation_bound], -1)
        unknown = torch.cat([torch.ones_like(column[..., : n + p]), self.active.row, held(self.active)], -1)
        return K * equation.unsqueeze(-1) * unknown.unsqueeze(-2)


def held(active: kkt.Activity) -> Tensor:
    return active.lower | active.upper | active.fixed
