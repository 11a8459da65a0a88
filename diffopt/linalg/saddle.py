"""The saddle-point system of every Newton step and every derivative, and its three reductions.

For rows that take part ("in"), with e >= 0 their complementarity ratio (s/lam in an interior-point
step, 0 for an active row of a final active set), the system K u = r is

    Q x + A' eq + G' row + bound = r_x          stationarity
    A x                          = r_eq         equalities
    G x - e_row * row            = r_row        general inequalities that take part; row = 0 for others
    x - e_bound * bound          = r_bound      bounds, one combined force per variable, likewise

Each reduction factors K + R, R = diag(rho, -delta): a regularised system of smaller size. R is a
preconditioner only: `Factor.solve` refines on the residual of the unreduced K.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffopt import waiting
from diffopt.linalg.cholesky import add_diagonal, cholesky, cholesky_solve, lower_solve, pivots, upper_solve_vector
from diffopt.linalg.matrices import DiagonalPlusLowRank, SymmetricMatrix
from diffopt.shapes import matvec, max_abs, rmatvec

SHARED_GRAM = 1_000_000
"""Most numbers (8 MB) to keep of the products of pairs of shared rows."""


FLOOR = 1e-7
"""The pivot, in equilibrated units, below which a row counts as dependent on the others."""

FINE_FLOOR, FINE_NOISE, FINER = 1e-11, 1e-12, 1e-4
"""For a second look: the floor is the larger of a pivot and of a share of the largest entry, by which rounding errors
go; the shift is smaller by the last."""


class Blocks(NamedTuple):
    """A vector of the saddle-point system: x ``(*batch, n)``, eq ``(*batch, p)``, row
    ``(*batch, m)``, bound ``(*batch, n)`` or ``(*batch, 0)`` when the problem has no bounds."""

    x: Tensor
    eq: Tensor
    row: Tensor
    bound: Tensor

    def plus(self, other: Blocks) -> Blocks:
        return Blocks(*(a + b for a, b in zip(self, other, strict=True)))

    def minus(self, other: Blocks) -> Blocks:
        return Blocks(*(a - b for a, b in zip(self, other, strict=True)))

    def where(self, mask: Tensor, other: Blocks) -> Blocks:
        """Return self where ``mask`` ``(*batch,)`` holds, else other."""
        mask = mask.unsqueeze(-1)
        return Blocks(*(torch.where(mask, a, b) for a, b in zip(self, other, strict=True)))

    def max_abs(self) -> Tensor:
        """Return the largest magnitude of each instance, ``(*batch,)``."""
        return torch.stack(torch.broadcast_tensors(*(max_abs(v) for v in self))).amax(0)


class Rows(NamedTuple):
    """Which inequality rows take part, and their ratios e: see the module. Masks are boolean."""

    row_in: Tensor
    row_e: Tensor
    bound_in: Tensor
    bound_e: Tensor


class Shift(NamedTuple):
    """The regularisation R: ``rho`` a number for x; delta for eq, row and bound, tensors that broadcast."""

    rho: float
    eq: Tensor
    row: Tensor
    bound: Tensor


class Saddle:
    """The data of the system and the work that does not depend on which rows take part.

    Args:
        Q, A, G: data; a tensor without batch dimensions is shared, and factored once.
        reduction: ``"dual"`` eliminates x by a factor of Q (positive definite) and the equalities
            once, and factors a matrix of one row per inequality and bound each time;
            ``"diagonal"`` (Q diagonal, or diagonal plus low rank, positive) eliminates x and the
            bounds and factors one row per equality, inequality and rank; ``"primal"`` factors an
            n x n matrix and takes any positive semidefinite Q.
        shift: R.
        floor: the pivot below which a row counts as dependent.

    Attributes:
        failed: ``(*batch,)`` True where the once-only work broke down (Q not positive definite).
    """

    def __init__(
        self, Q: SymmetricMatrix, A: Tensor, G: Tensor, reduction: str, shift: Shift, floor: float = FLOOR
    ) -> None:
        self.Q, self.A, self.G, self.reduction, self.shift, self.floor = Q, A, G, reduction, shift, floor
        self.failed = torch.zeros((), dtype=torch.bool, device=A.device)
        self._products: Tensor | None = None
        self._fine: Saddle | None = None
        if reduction == "dual":
            self._prepare_dual()

    def _prepare_dual(self) -> None:
        self.L, self.failed = cholesky(self.Q.dense())
        eye = torch.eye(self.Q.n, dtype=self.A.dtype, device=self.A.device)
        self.V_eq = lower_solve(self.L, self.A.mT)
        self.V_row = lower_solve(self.L, self.G.mT)
        self.V_bound = torch.linalg.solve_triangular(self.L, eye, upper=False)
        self.S_eq, failed = cholesky(add_diagonal(self.V_eq.mT @ self.V_eq, self.shift.eq))
        self.failed = self.failed | failed
        self._cache: dict[bool, tuple[Tensor, Tensor, Tensor]] = {}

    def dual_blocks(self, with_bounds: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return V = L^-1 C' for C = [G; I], its product with the equalities, and the reduced C Q^-1 C'."""
        if with_bounds not in self._cache:
            V = self.V_row
            if with_bounds:
                V = torch.cat(_same_batch(V, self.V_bound), -1)
            cross = self.V_eq.mT @ V
            P = V.mT @ V
            if cross.shape[-2]:
                half = lower_solve(self.S_eq, cross)
                P = P - half.mT @ half
            self._cache[with_bounds] = V, cross, P
        return self._cache[with_bounds]

    def row_products(self, B: Tensor) -> Tensor:
        """Return the products of all pairs of rows of a shared matrix, ``(n, rows * rows)``; computed once."""
        if self._products is None:
            self._products = (B.mT.unsqueeze(-1) * B.mT.unsqueeze(-2)).flatten(1)
        return self._products

    def factor(self, rows: Rows, held: bool = False) -> Factor:
        """Factor the system for the rows that take part. ``held``: hold them, instead of weighing them by 1/e, in the
        reductions that know the difference."""
        if self.reduction == "primal":
            return _Augmented(self, rows) if held else _Primal(self, rows)
        return {"dual": _Dual, "diagonal": _Diagonal}[self.reduction](self, rows)

    def factor_active(self, rows: Rows) -> Factor:
        """Factor the system of a final active set (e = 0).

        Rows that the shift R cannot tell from dependent ones are looked at again with a finer one: an instance whose
        rows prove independent goes by that. (Where they are not, R must stay well above rounding errors, see
        `solve_minimum_norm`.)
        """
        factor = self.factor(rows, held=True)
        unsure = factor.dependent() > 0
        if not waiting.some(unsure):
            return factor
        fine = self._finer().factor(rows, held=True)
        return _Mixed(self, rows, unsure & ~fine.failed & (fine.dependent() == 0), fine, factor)

    def _finer(self) -> Saddle:
        if self._fine is None:
            shift = self.shift
            shift = Shift(shift.rho, *(FINER * v for v in (shift.eq, shift.row, shift.bound)))
            self._fine = Saddle(self.Q, self.A, self.G, self.reduction, shift, FINE_FLOOR)
        return self._fine


class Mixed(Saddle):
    """The system of one batch by two reductions: that of ``one`` in the instances ``where`` ``(*batch,)``, else that of
    ``other``."""

    def __init__(self, where: Tensor, one: Saddle, other: Saddle) -> None:
        self.Q, self.A, self.G = one.Q, one.A, one.G
        self.where, self.one, self.other = where, one, other

    def factor(self, rows: Rows, held: bool = False) -> Factor:
        return _Mixed(self, rows, self.where, self.one.factor(rows, held), self.other.factor(rows, held))

    def factor_active(self, rows: Rows) -> Factor:
        return _Mixed(self, rows, self.where, self.one.factor_active(rows), self.other.factor_active(rows))


class Factor:
    """A factored system. Subclasses write the reduced solve `raw` and the count of `dependent` rows."""

    failed: Tensor

    def __init__(self, system: Saddle, rows: Rows) -> None:
        self.system, self.rows = system, rows
        shift = system.shift
        self.rho: Tensor | float = shift.rho
        zero = torch.zeros((), dtype=rows.row_e.dtype, device=rows.row_e.device)
        self.row_weight = torch.where(rows.row_in, 1 / (rows.row_e + shift.row), zero)
        self.bound_weight = zero.expand(rows.bound_in.shape)
        if self.bound_weight.shape[-1]:
            self.bound_weight = torch.where(rows.bound_in, 1 / (rows.bound_e + shift.bound), zero)
        self._factor()

    def _factor(self) -> None:
        raise NotImplementedError  # pragma: no cover - abstract

    def raw(self, r: Blocks) -> Blocks:
        """Solve (K + R) u = r, to the rounding error of the reduction."""
        raise NotImplementedError  # pragma: no cover - abstract

    def dependent(self) -> Tensor:
        """Return how many rows (equalities too) depend on the others, estimated from the pivots."""
        raise NotImplementedError  # pragma: no cover - abstract

    def small_pivots(self, S: Tensor, units: Tensor | None = None) -> Tensor:
        """Return how many pivots of a Schur complement's factor S are so small that their rows depend on others.

        Args:
            units: what turns pivots into those of the rows themselves; infinite for rows that take no part. The
                complement may have more rows than it has entries: those do not count.
        """
        own = pivots(S)
        if units is not None:
            own = own[..., : units.shape[-1]] * units
        floor = own.new_tensor(self.system.floor)
        if self.system.floor < FLOOR and own.shape[-1]:
            entry = S.square().sum(-1)[..., : own.shape[-1]]
            entry = entry if units is None else torch.where(torch.isfinite(units), entry * units, 0.0)
            floor = (FINE_NOISE * entry.amax(-1, keepdim=True)).clamp_min(floor)
        return (own < floor).sum(-1)

    def apply(self, u: Blocks) -> Blocks:
        """Return K u."""
        s, rows = self.system, self.rows
        x = s.Q.matvec(u.x) + rmatvec(s.A, u.eq) + rmatvec(s.G, u.row)
        if u.bound.shape[-1]:
            x = x + u.bound
            bound = torch.where(rows.bound_in, u.x - rows.bound_e * u.bound, 0.0)
        else:
            bound = u.bound
        row = torch.where(rows.row_in, matvec(s.G, u.x) - rows.row_e * u.row, 0.0)
        return Blocks(x, matvec(s.A, u.x), row, bound)

    def mask(self, r: Blocks) -> Blocks:
        """Return r with zeros in the rows that take no part."""
        row = torch.where(self.rows.row_in, r.row, 0.0)
        bound = torch.where(self.rows.bound_in, r.bound, 0.0) if r.bound.shape[-1] else r.bound
        return Blocks(r.x, r.eq, row, bound)

    def shifted(self, u: Blocks) -> Blocks:
        """Return R u."""
        shift = self.system.shift
        bound = -shift.bound * u.bound if u.bound.shape[-1] else u.bound
        return self.mask(Blocks(self.rho * u.x, -shift.eq * u.eq, -shift.row * u.row, bound))

    def solve(self, r: Blocks, refinements: int = 1) -> Blocks:
        """Solve K u = r with a fixed number of refinements; for Newton steps."""
        r = self.mask(r)
        u = self.raw(r)
        for _ in range(refinements):
            u = u.plus(self.raw(r.minus(self.apply(u))))
        return u

    def solve_accurately(self, r: Blocks, most: int = 8) -> tuple[Blocks, Tensor]:
        """Solve K u = r, refined until the residual no longer falls; for polish and derivatives.

        Returns:
            u, and its residual relative to |r|, ``(*batch,)``: large where K is singular and r is
            not in its range.
        """
        r = self.mask(r)
        size = r.max_abs()
        floor = 4 * torch.finfo(r.x.dtype).eps
        best = self.raw(r)
        residual = r.minus(self.apply(best))
        error = residual.max_abs()
        # (An instance that has settled stays as it is: how long its neighbours take is nothing to it.)
        settled = torch.zeros_like(error, dtype=torch.bool)
        for _ in range(most):
            u = best.plus(self.raw(residual))
            again = r.minus(self.apply(u))
            worse = again.max_abs()
            better = (worse < error) & ~settled
            best, residual = u.where(better, best), again.where(better, residual)
            gain = torch.where(better, worse / error, 1.0)
            error = torch.where(better, worse, error)
            # Where the residual is already rounding error, or hardly falls any more, stop.
            settled = settled | (error <= floor * (size + best.max_abs())) | (gain > 0.5)
            if waiting.every(settled):
                break
        return best, torch.where(size > 0, error / torch.where(size > 0, size, 1.0), 0.0)

    def without_null_part(self, u: Blocks) -> Blocks:
        """Return u without its part in the null space of K.

        (K + R)^-1 R keeps that part, up to the relative error of the smallest pivots, and shrinks the rest
        by delta; applied twice it leaves the rest alone. Removing once leaves an error times the part,
        so remove again.
        """
        for _ in range(2):
            part = self.raw(self.shifted(self.raw(self.shifted(u))))
            u = u.minus(part)
        return u

    def consistent_part(self, r: Blocks) -> Blocks:
        """Return r without its part outside the range of K, which R (K + R)^-1 keeps; as above."""
        for _ in range(3):
            part = self.shifted(self.raw(self.shifted(self.raw(r))))
            r = r.minus(part)
        return r


class _Mixed(Factor):
    """Of each instance one of two factors: ``one`` in those ``where`` ``(*batch,)``."""

    def __init__(self, system: Saddle, rows: Rows, where: Tensor, one: Factor, other: Factor) -> None:
        self.system, self.rows, self.where, self.one, self.other = system, rows, where, one, other
        self.failed = torch.where(self.where, self.one.failed, self.other.failed)

    def raw(self, r: Blocks) -> Blocks:
        return self.one.raw(r).where(self.where, self.other.raw(r))

    def shifted(self, u: Blocks) -> Blocks:
        return self.one.shifted(u).where(self.where, self.other.shifted(u))

    def dependent(self) -> Tensor:
        return torch.where(self.where, self.one.dependent(), self.other.dependent())


def solve_minimum_norm(factor: Factor, r: Blocks) -> tuple[Blocks, Tensor]:
    """Return the minimum-norm least-squares solution of K u = r, and its relative residual.

    Where the rows are independent this is the solution. Where they are not, the part of r that no
    u can meet is dropped, and so is the part of u that meets nothing. The norm weighs the entries
    by `Shift`: callers choose it so that lengths are those of the original units. To the residual counts what is
    dropped of r's first block, in x: x is not unique then.
    """
    dependent = factor.dependent() > 0
    if not waiting.some(dependent):
        return factor.solve_accurately(r)
    r = factor.mask(r)
    met = factor.consistent_part(r).where(dependent, r)
    u, residual = factor.solve_accurately(met)
    size = r.max_abs()
    lost = torch.where(size > 0, max_abs(r.x - met.x) / torch.where(size > 0, size, 1.0), 0.0)
    return factor.without_null_part(u).where(dependent, u), torch.maximum(residual, lost)


class _Dual(Factor):
    """Reduce to one row per inequality and bound: S = W^1/2 C Q^-1 C' W^1/2 + I, equalities out."""

    def _factor(self) -> None:
        system = self.system
        self.with_bounds = bool(self.rows.bound_in.shape[-1])
        self.V, self.cross, P = system.dual_blocks(self.with_bounds)
        weight = self.row_weight
        if self.with_bounds:
            weight = torch.cat(_same_batch_vectors(weight, self.bound_weight), -1)
        self.root = weight.sqrt()
        S = self.root.unsqueeze(-1) * P * self.root.unsqueeze(-2)
        self.S, failed = cholesky(add_diagonal(S, torch.ones_like(self.root)))
        self.failed = failed | system.failed

    def raw(self, r: Blocks) -> Blocks:
        system, m = self.system, r.row.shape[-1]
        t = lower_solve(system.L, r.x.unsqueeze(-1)).squeeze(-1)
        right = torch.cat(_same_batch_vectors(r.row, r.bound), -1) if self.with_bounds else r.row
        g_eq = rmatvec(system.V_eq, t) - r.eq
        g = rmatvec(self.V, t) - right - rmatvec(self.cross, cholesky_solve(system.S_eq, g_eq))
        y = self.root * cholesky_solve(self.S, self.root * g)
        eq = cholesky_solve(system.S_eq, g_eq - matvec(self.cross, y))
        x = upper_solve_vector(system.L, t - matvec(system.V_eq, eq) - matvec(self.V, y))
        return Blocks(x, eq, y[..., :m], y[..., m:])

    def dependent(self) -> Tensor:
        # With weights 1/delta an independent row's pivot is P/delta, a dependent one's is about 1.
        inside = self.root > 0
        delta = torch.where(inside, 1 / self.root.square(), torch.inf)
        return self.small_pivots(self.S, delta) + self.small_pivots(self.system.S_eq)


class _Diagonal(Factor):
    """Reduce to B = [A; W^1/2 G; U']: S = B (D + W_b)^-1 B' + E, one row per equality, inequality, rank."""

    def _factor(self) -> None:
        system = self.system
        Q = system.Q
        diagonal = Q.tensors()[0]
        self.H = diagonal + self.bound_weight if self.bound_weight.shape[-1] else diagonal
        self.root = self.row_weight.sqrt()
        blocks = [system.A]
        shifts = [system.shift.eq]
        if system.G.shape[-2]:
            blocks.append(self.root.unsqueeze(-1) * system.G)
            shifts.append(torch.ones_like(self.root))
        if isinstance(Q, DiagonalPlusLowRank):
            blocks.append(Q.factor.mT)
            shifts.append(Q.factor.new_ones(Q.factor.shape[-1]))
        self.sizes = [block.shape[-2] for block in blocks]
        self.B = torch.cat(_same_batch(*blocks), -2) if len(blocks) > 1 else blocks[0]
        self.E = torch.cat(_same_batch_vectors(*shifts), -1) if len(shifts) > 1 else shifts[0]
        self.S, failed = cholesky(add_diagonal(self._gram(), self.E))
        self.failed = failed | ~(self.H > 0).all(-1)

    def _gram(self) -> Tensor:
        """Return B H^-1 B'."""
        rows, n = self.B.shape[-2:]
        if self.B.dim() == 2 and self.H.dim() > 1 and rows * rows * n <= SHARED_GRAM:
            # Shared rows: all instances are one product with the products of pairs of rows.
            return (1 / self.H @ self.system.row_products(self.B)).unflatten(-1, (rows, rows))
        half = self.B * self.H.rsqrt().unsqueeze(-2)
        return half @ half.mT

    def raw(self, r: Blocks) -> Blocks:
        system = self.system
        rx = r.x
        if r.bound.shape[-1]:
            rx = rx + self.bound_weight * r.bound
        parts = [r.eq]
        if system.G.shape[-2]:
            parts.append(self.root * r.row)
        if isinstance(system.Q, DiagonalPlusLowRank):
            parts.append(rx.new_zeros(*rx.shape[:-1], self.sizes[-1]))
        right = torch.cat(_same_batch_vectors(*parts), -1) if len(parts) > 1 else parts[0]
        y = cholesky_solve(self.S, matvec(self.B, rx / self.H) - right)
        pull = rmatvec(self.B, y)
        x = (rx - pull) / self.H
        pieces = y.split(self.sizes, -1)
        row = self.root * pieces[1] if system.G.shape[-2] else r.row
        if not r.bound.shape[-1]:
            return Blocks(x, pieces[0], row, r.bound)
        # A stiff bound's force comes from stationarity; weight * (x - r) would cancel.
        diagonal = system.Q.tensors()[0]
        stiff = self.bound_weight > diagonal
        bound = torch.where(stiff, r.x - diagonal * x - pull, self.bound_weight * (x - r.bound))
        return Blocks(x, pieces[0], row, torch.where(self.rows.bound_in, bound, 0.0))

    def dependent(self) -> Tensor:
        # In units of the rows themselves: an inequality's pivot carries its weight 1/delta.
        units = torch.ones_like(self.E[..., : self.sizes[0]])
        if self.system.G.shape[-2]:
            scale = torch.where(self.root > 0, 1 / self.root.square(), torch.inf)
            units = torch.cat(_same_batch_vectors(units, scale), -1)
        return self.small_pivots(self.S, units)


class _Primal(Factor):
    """Reduce to n x n for a Newton step: M = Q + rho + W_b + G' W G + A'A, then the equalities, p x p.

    A'A does not change the solution (A x is given), and lets Q be singular where A holds x.
    """

    def _factor(self) -> None:
        system = self.system
        M = system.Q.dense() + system.A.mT @ system.A
        if system.G.shape[-2]:
            M = M + system.G.mT @ (self.row_weight.unsqueeze(-1) * system.G)
        # (M is a new tensor: the product with A, even an empty one, is added to Q.)
        # Weights grow without bound near the solution; rho keeps pace with their rounding error.
        diagonal = M.diagonal(dim1=-2, dim2=-1)
        rho = (_ROUNDING * diagonal.amax(-1, keepdim=True)).clamp_min(system.shift.rho)
        extra = rho + self.bound_weight if self.bound_weight.shape[-1] else rho
        self.M, self.failed = cholesky(add_diagonal(M, extra))
        self.V = lower_solve(self.M, _with_batch(system.A.mT, self.M))
        self.S, failed = cholesky(add_diagonal(self.V.mT @ self.V, system.shift.eq))
        self.failed = self.failed | failed

    def raw(self, r: Blocks) -> Blocks:
        system = self.system
        rx = r.x + rmatvec(system.A, r.eq) + rmatvec(system.G, self.row_weight * r.row)
        if r.bound.shape[-1]:
            rx = rx + self.bound_weight * r.bound
        t = lower_solve(self.M, _with_batch(rx.unsqueeze(-1), self.M)).squeeze(-1)
        eq = cholesky_solve(self.S, rmatvec(self.V, t) - r.eq)
        x = upper_solve_vector(self.M, t - matvec(self.V, eq))
        row = self.row_weight * (matvec(system.G, x) - r.row)
        bound = self.bound_weight * (x - r.bound) if r.bound.shape[-1] else r.bound
        return Blocks(x, eq, row, bound)

    def dependent(self) -> Tensor:
        return self.small_pivots(self.S)


class _Augmented(Factor):
    """Like `_Primal` for a final active set: every row that takes part is held, none is only weighted.

    With S = 1/(1 + e), M = Q + rho + W_b + A'A + G'SG and one row of the Schur complement for each equality
    and inequality. Weighing active rows by 1/delta instead would bury Q and rho under rounding error.
    """

    def _factor(self) -> None:
        system, rows = self.system, self.rows
        self.soft = torch.where(rows.row_in, 1 / (1 + rows.row_e), 0.0)
        M = system.Q.dense() + system.A.mT @ system.A
        if system.G.shape[-2]:
            M = M + system.G.mT @ (self.soft.unsqueeze(-1) * system.G)
        weight = self.bound_weight if self.bound_weight.shape[-1] else torch.zeros_like(M[..., 0])
        little, failed = cholesky(add_diagonal(M.clone(), weight + LITTLE))
        # A rho above the curvature in some direction would hide it from the refinement.
        singular = failed | (pivots(little).amin(-1) < 1e2 * LITTLE)
        self.rho = torch.where(singular, system.shift.rho, LITTLE).unsqueeze(-1)
        if waiting.some(singular):
            self.M, self.failed = cholesky(add_diagonal(M, weight + self.rho))
        else:
            self.M, self.failed = little, failed
        held = torch.where(rows.row_in, 1.0, torch.zeros_like(self.soft))
        C = torch.cat(_same_batch(system.A, held.unsqueeze(-1) * system.G), -2)
        self.V = lower_solve(self.M, _with_batch(C.mT, self.M))
        slack = torch.where(rows.row_in, rows.row_e * (1 + rows.row_e) + system.shift.row, 1.0)
        E = torch.cat(_same_batch_vectors(system.shift.eq, slack), -1)
        self.S, failed = cholesky(add_diagonal(self.V.mT @ self.V, E))
        self.failed = self.failed | failed

    def raw(self, r: Blocks) -> Blocks:
        system, rows, p = self.system, self.rows, r.eq.shape[-1]
        rx = r.x + rmatvec(system.A, r.eq) + rmatvec(system.G, self.soft * r.row)
        if r.bound.shape[-1]:
            rx = rx + self.bound_weight * r.bound
        t = lower_solve(self.M, _with_batch(rx.unsqueeze(-1), self.M)).squeeze(-1)
        right = torch.cat(_same_batch_vectors(r.eq, torch.where(rows.row_in, r.row, 0.0)), -1)
        y = cholesky_solve(self.S, rmatvec(self.V, t) - right)
        x = upper_solve_vector(self.M, t - matvec(self.V, y))
        eq, row = y[..., :p], torch.where(rows.row_in, (1 + rows.row_e) * y[..., p:], 0.0)
        if not r.bound.shape[-1]:
            return Blocks(x, eq, row, r.bound)
        # A stiff bound's force comes from stationarity; weight * (x - r) would cancel.
        rest = r.x - system.Q.matvec(x) - rmatvec(system.A, eq) - rmatvec(system.G, row)
        bound = torch.where(self.bound_weight > 1, rest, self.bound_weight * (x - r.bound))
        return Blocks(x, eq, row, torch.where(rows.bound_in, bound, 0.0))

    def dependent(self) -> Tensor:
        row = torch.where(self.rows.row_in, 1.0, torch.full_like(self.row_weight, torch.inf))
        return self.small_pivots(self.S, torch.cat(_same_batch_vectors(torch.ones_like(self.system.shift.eq), row), -1))


LITTLE = 1e-13
"""rho of a final active set whose n x n matrix has pivots that are clearly more."""

_ROUNDING = 4e-15
"""Of the largest diagonal entry of M: what its Cholesky factorisation may lose."""


def _with_batch(matrix: Tensor, like: Tensor) -> Tensor:
    """Expand a matrix by the batch dimensions of ``like``."""
    return matrix.expand(*torch.broadcast_shapes(matrix.shape[:-2], like.shape[:-2]), *matrix.shape[-2:])


def _same_batch(*matrices: Tensor) -> list[Tensor]:
    batch = torch.broadcast_shapes(*(m.shape[:-2] for m in matrices))
    return [m.expand(*batch, *m.shape[-2:]) for m in matrices]


def _same_batch_vectors(*vectors: Tensor) -> list[Tensor]:
    batch = torch.broadcast_shapes(*(v.shape[:-1] for v in vectors))
    return [v.expand(*batch, v.shape[-1]) for v in vectors]
