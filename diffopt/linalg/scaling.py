"""Equilibration: bring the rows and columns of a problem to comparable size, by powers of two."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffopt.linalg.matrices import SymmetricMatrix
from diffopt.linalg.saddle import Shift

PASSES = 6


class Scaling(NamedTuple):
    """The change of units x = d x^, rows of A times ``eq``, rows of G times ``rows``, objective times ``cost``.

    All factors are powers of two, so scaling and unscaling round nothing. Duals follow:
    nu = eq nu^ / cost, lam = rows lam^ / cost, and for bounds lam = lam^ / (cost d).

    ``d`` ``(*batch, n)``, ``eq`` ``(*batch, p)``, ``rows`` ``(*batch, m)``, ``cost`` ``(*batch, 1)``.
    """

    d: Tensor
    eq: Tensor
    rows: Tensor
    cost: Tensor

    def hessian(self, Q: SymmetricMatrix) -> SymmetricMatrix:
        """Return Q in scaled units; where Q is zero it stays shared although ``cost`` is per instance."""
        return Q.scaled(self.d * hessian_cost(Q, self.d)[0].sqrt())


def power_of_two(value: Tensor, step: int = 1) -> Tensor:
    """Round positive entries to the nearest power of 2**step; others, and non-finite ones, become 1."""
    good = torch.isfinite(value) & (value > 0)
    exponent = (torch.where(good, value, 1.0).log2() / step).round() * step
    return torch.where(good, torch.exp2(exponent), 1.0)


def hessian_cost(Q: SymmetricMatrix, d: Tensor) -> tuple[Tensor, Tensor]:
    """Return the objective scale that brings diag(d) Q diag(d) near 1, and where Q is not zero."""
    largest = Q.scaled(d).column_norms().amax(-1, keepdim=True)
    return power_of_two(1 / largest, step=2), largest > 0


def equilibrate(Q: SymmetricMatrix, A: Tensor, G: Tensor, q: Tensor) -> Scaling:
    """Scale the matrix [[Q, A', G'], [A, 0, 0], [G, 0, 0]] so that its rows have largest entry near 1.

    Data shared by the batch gives shared factors, so that what is factored once stays so. The
    objective is scaled by Q; where Q is zero (linear programs) by q, for each instance.

    References:
        Ruiz (2001), "A scaling algorithm to equilibrate both rows and columns norms in matrices",
        with the largest magnitude as norm.
    """
    # No entry of a positive semidefinite Q is larger than the geometric mean of its two diagonal ones, in any units:
    # balancing the diagonal balances all of it.
    hessian, a, g = Q.diagonal().clamp(min=0), A.abs(), G.abs()
    d = torch.ones_like(hessian)
    eq = torch.ones(A.shape[:-1], dtype=A.dtype, device=A.device)
    rows = torch.ones(G.shape[:-1], dtype=G.dtype, device=G.device)
    for _ in range(PASSES):
        column = d * hessian * d
        if A.shape[-2]:
            scaled = eq.unsqueeze(-1) * a * d.unsqueeze(-2)
            eq = eq * _inverse_root(scaled.amax(-1))
            column = torch.maximum(column, scaled.amax(-2))
        if G.shape[-2]:
            scaled = rows.unsqueeze(-1) * g * d.unsqueeze(-2)
            rows = rows * _inverse_root(scaled.amax(-1))
            column = torch.maximum(column, scaled.amax(-2))
        d = d * _inverse_root(column)
    d, eq, rows = power_of_two(d), power_of_two(eq), power_of_two(rows)
    cost, curved = hessian_cost(Q, d)
    linear = (d * q).abs().amax(-1, keepdim=True)
    return Scaling(d, eq, rows, torch.where(curved, cost, power_of_two(1 / linear, step=2)))


def _inverse_root(norm: Tensor) -> Tensor:
    # A zero row or column has no size to correct.
    usable = (norm > 0) & torch.isfinite(norm)
    return torch.where(usable, norm, 1.0).rsqrt()


def regularisation(scaling: Scaling, reduction: str) -> Shift:
    """Return the shift R of the saddle-point system of a problem in equilibrated units, float64.

    The deltas are weighed so that the length they favour is that of the duals in original units
    (rows times their scale), within a factor of 10 of the average: more would hide rows from the factor.
    """
    delta, rho = 1e-10, (1e-9 if reduction == "primal" else 0.0)
    logs = [scaling.eq.log2(), scaling.rows.log2(), -scaling.d.log2()]
    count = sum(v.shape[-1] for v in logs)
    centre = sum(v.sum(-1, keepdim=True) for v in logs) / count

    def weight(scale: Tensor) -> Tensor:
        return delta * torch.exp2((2 * (scale - centre)).clamp(-3, 3))

    return Shift(rho, *(weight(v) for v in logs))
