"""Gradients where active rows nearly depend on each other: right as far as rounding errors allow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import diffopt
import measures
import reference
from diffopt import Settings

f64 = torch.float64
EXECUTORS = ["cpu", "torch"]
"""(That of CUDA refines no derivative: errors are up to 100 times as large there, before rows count as dependent.)"""
CURVATURES = {"one": (1.0, 0.0), "1e-3 to 4": (1e-3, 1.0)}
"""Q = a I + b UU', with the entries of U (n x n) of the size 1/sqrt(n)."""

ROUNDING = 1e-14
"""Error of gradients, relative, times the square of the sine of the angle between the rows."""


def program(n: int, active: int, sine: float, curvature: tuple[float, float], seed: int) -> dict[str, Tensor]:
    """Return a program with so many active rows, the last of which is so far from the space of three others."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=f64)

    a, b = curvature
    U = normal(n, n) / n**0.5
    Q = a * torch.eye(n, dtype=f64) + b * U @ U.T
    G = torch.nn.functional.normalize(normal(active, n), dim=-1)
    near = torch.nn.functional.normalize(normal(3) @ G[:3], dim=0)
    away = normal(n)
    away = torch.nn.functional.normalize(away - near * (near @ away), dim=0)
    G[-1] = near + sine * away
    x, lam = normal(n), 0.1 + torch.rand(active, generator=generator, dtype=f64)
    others = normal(2, n)
    h = torch.cat([G @ x, others @ x + 0.1 + torch.rand(2, generator=generator, dtype=f64)])
    return {"Q": Q, "q": -Q @ x - G.T @ lam, "G": torch.cat([G, others]), "h": h}


@pytest.mark.parametrize("sine", [1e-2, 1e-3, 4e-4, 1e-4, 3e-5])
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("size", [(8, 6), (30, 20)])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_gradients_of_rows_that_nearly_depend(
    executor: Any, size: tuple[int, int], curvature: str, sine: float
) -> None:
    for seed in range(3):
        data = program(*size, sine, CURVATURES[curvature], seed)
        # (Four of each: small problems go in lanes then.)
        leaves = measures.tracked({key: v.expand(4, *v.shape) for key, v in data.items()})
        solution = diffopt.solve_qp(**leaves, settings=Settings(executor=executor))
        assert not solution.dependent.any()
        weights = {o: torch.randn(getattr(solution, o).shape[1:], dtype=f64) for o in ("x", "lam")}
        loss = torch.stack([(weights[o] * getattr(solution, o)).sum() for o in weights]).sum()
        loss.backward()
        none = torch.zeros(size[0])
        active = reference.active_set(solution.lam[0].detach(), none, none)
        assert active.rows.sum() == size[1]
        expected = reference.gradients(reference.solve(reference.instance(data), active), weights)
        for key, leaf in leaves.items():
            assert leaf.grad is not None
            for found in leaf.grad:
                error = abs(found.numpy() - expected[key]).max() / abs(expected[key]).max()
                assert error <= ROUNDING / sine**2, (key, seed, error, solution)
