"""What float32 reaches, against float64."""

from __future__ import annotations

from typing import Any

import pytest

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


def test_the_page_shows_every_set() -> None:
    rows = pages.rows(pages.section(pages.ACCURACY, "float32"))
    names = [problems.name for problems in float32.sets(REGULAR)]
    assert [row[:2] for row in rows] == [[name, e] for name in names for e in ("cpu", "torch")], "run `make accuracy`"
