"""What float32 reaches, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import diffopt
import float32
from benchmarks import pages
from test_maros import REGULAR
from tolerances import GRADIENT, SOLUTION

ROUNDED = {"x": SOLUTION[float32.f32], "gradient": GRADIENT[float32.f32]}


@pytest.mark.parametrize("executor", ["cpu", "torch"])
def test_random_problems(executor: Any) -> None:
    """The solve itself adds little more than the rounding of its result to what the rounded data give."""
    found = float32.measure(next(float32.sets([])), executor)
    assert found.solved == found.instances and found.kinks == 0
    assert found.x <= 1e-6 and found.gradient <= ROUNDED["gradient"]
    assert found.x_unrounded <= ROUNDED["x"] and found.gradient_unrounded <= ROUNDED["gradient"]


@pytest.mark.filterwarnings("ignore::diffopt.InaccurateSolutionWarning")
@pytest.mark.parametrize("executor", ["cpu", "torch"])
def test_covariances_of_few_samples(executor: Any) -> None:
    """Rounded to float32 they have eigenvalues of -1e-7 of the largest, more the more variables there are: errors."""
    generator = torch.Generator().manual_seed(0)
    settings = diffopt.Settings(executor=executor)
    for n, samples in ((8, 3), (20, 5), (50, 10)):
        root, q = (torch.randn(20, n, k, generator=generator) for k in (samples, 1))
        Q, q = root @ root.mT / samples, 0.1 * q.squeeze(-1)
        sides: dict[str, Any] = {"A": torch.ones(1, n), "b": 1.0, "lower": 0.0}
        assert bool((torch.linalg.eigvalsh(Q.double())[:, 0] < -1e-9).any())
        rounded = diffopt.solve_qp(Q, q, **sides, settings=settings)
        assert bool((rounded.status == diffopt.Status.SOLVED).all())
        # The same entries in float64, and the matrix that they stand for: with no eigenvalue below zero.
        sides["A"] = sides["A"].double()
        given = diffopt.solve_qp(Q.double(), q.double(), **sides, settings=settings)
        values, basis = torch.linalg.eigh(Q.double())
        convex = diffopt.solve_qp((basis * values.clamp_min(0).unsqueeze(-2)) @ basis.mT, q.double(), **sides)
        for found in (rounded, given):
            assert float((found.value - convex.value).abs().max()) <= 1e-6


def test_the_page_shows_every_set() -> None:
    rows = pages.rows(pages.section(pages.ACCURACY, "float32"))
    names = [problems.name for problems in float32.sets(REGULAR)]
    assert [row[:2] for row in rows] == [[name, e] for name in names for e in ("cpu", "torch")], "run `make accuracy`"
