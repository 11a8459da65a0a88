"""Measures that several tests share, written from the documentation and not from the library's code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffopt import Solution

OUTPUTS = ("x", "s", "lam", "nu", "lam_lower", "lam_upper", "value")


def relative(got: Tensor | None, expected: Tensor | None) -> float:
    """Return max |got - expected| / (1 + max |expected|); 0 for empty tensors, NaN counts as infinite."""
    assert got is not None and expected is not None  # as a gradient that never came would be
    assert got.shape == expected.shape, (got.shape, expected.shape)
    if expected.numel() == 0:
        return 0.0
    got, expected = got.detach().double(), expected.detach().double()
    error = (got - expected).abs().max() / (1 + expected.abs().max())
    return float(error.nan_to_num(nan=torch.inf))


def tracked(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return copies of the tensors, as leaves that require gradients; ``None`` stays."""
    return {name: None if v is None else v.detach().clone().requires_grad_() for name, v in arguments.items()}


def gradients(leaves: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the gradients that have arrived, by name."""
    return {name: v.grad for name, v in leaves.items() if v is not None and v.grad is not None}


def residuals(data: dict[str, Any], solution: Solution) -> dict[str, Tensor]:
    """Return primal, dual and gap as the docstring of `diffopt.Residuals` defines them, in float64.

    Bounds are written as the rows of G that they count as.
    """
    x, nu, lam, lower_dual, upper_dual = (
        getattr(solution, name).detach().double() for name in ("x", "nu", "lam", "lam_lower", "lam_upper")
    )
    batch, n = x.shape[:-1], x.shape[-1]
    d: dict[str, Any] = {name: None if v is None else v.detach().double() for name, v in data.items()}
    eye = torch.eye(n, dtype=torch.float64)

    def full(tensor: Tensor | None, *core: int) -> Tensor:
        return torch.zeros(*batch, *core, dtype=torch.float64) if tensor is None else tensor.expand(*batch, *core)

    def rows(name: str) -> int:
        return 0 if d[name] is None else d[name].shape[-1]

    Q = full(d["Q"], n, n)
    Q, q = 0.5 * (Q + Q.mT), full(d["q"], n)
    A, b = full(d["A"], rows("b"), n), full(d["b"], rows("b"))
    G, h, y = full(d["G"], rows("h"), n), full(d["h"], rows("h")), lam
    for sign, bound, dual in ((-1, d["lower"], lower_dual), (1, d["upper"], upper_dual)):
        if bound is not None:
            G, h = torch.cat([G, full(sign * eye, n, n)], -2), torch.cat([h, sign * full(bound, n)], -1)
            y = torch.cat([y, dual], -1)
    there = h.isfinite()  # an infinite side is no constraint
    G, h, y = torch.where(there.unsqueeze(-1), G, 0.0), torch.where(there, h, 0.0), torch.where(there, y, 0.0)

    def times(matrix: Tensor, vector: Tensor) -> Tensor:
        return (matrix @ vector.unsqueeze(-1)).squeeze(-1)

    def largest(*vectors: Tensor) -> Tensor:
        return torch.stack([v.abs().amax(-1) if v.shape[-1] else v.new_zeros(batch) for v in vectors]).amax(0)

    Ax, Gx, Qx = times(A, x), times(G, x), times(Q, x)
    pull, push = times(A.mT, nu), times(G.mT, y)
    terms = torch.stack([(x * Qx).sum(-1), (q * x).sum(-1), (b * nu).sum(-1), (h * y).sum(-1)])
    return {
        "primal": largest(Ax - b, (Gx - h).clamp_min(0)) / (1 + largest(Ax, b, Gx, h)),
        "dual": largest(Qx + q + pull + push) / (1 + largest(Qx, q, pull, push)),
        "gap": terms.sum(0).abs() / (1 + terms.abs().amax(0)),
    }
