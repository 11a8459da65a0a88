"""Small problems solved by hand, with every dual, for the tests of the adapters: foreign signs show here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffopt import QPForm, Status

f64 = torch.float64
inf = float("inf")


def tensor(*values: object) -> Tensor:
    return torch.tensor(values, dtype=f64)


def everything(linear: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One constraint of each kind, each with a multiplier of its own.

    x0 is held by its upper bound, x1 by its lower bound, x4 is fixed; x2 + x3 = 1 and x2 - x3 <= -1 meet in
    (0, 1). One row is inactive, one infinite. The objective is |x - c|^2 / 2, or its gradient at the
    answer as a linear one, which gives the same point and the same duals.
    """
    c = tensor(2.0, -1.0, 2.0, 0.5, 1.0)
    x = tensor(1.0, 0.0, 0.0, 1.0, 3.0)
    gradient = tensor(-1.0, 1.0, -2.0, 0.5, 2.0)
    data = {
        "Q": None if linear else torch.eye(5, dtype=f64),
        "q": gradient if linear else -c,
        "A": tensor([0.0, 0, 1, 1, 0]),
        "b": tensor(1.0),
        "G": tensor([0.0, 0, 1, -1, 0], [1.0, 1, 0, 0, 0], [1.0, 1, 1, 1, 1]),
        "h": tensor(-1.0, 5.0, inf),
        "lower": tensor(-inf, 0.0, -inf, -7.0, 3.0),
        "upper": tensor(1.0, inf, inf, 8.0, 3.0),
    }
    answer = {
        "x": x,
        "nu": tensor(0.75),
        "lam": tensor(1.25, 0.0, 0.0),
        "lam_lower": tensor(0.0, 1, 0, 0, 2),
        "lam_upper": tensor(1.0, 0, 0, 0, 0),
    }
    return data, answer


def form(data: dict[str, Any]) -> QPForm:
    return QPForm(**data)


FAILURES: dict[str, tuple[dict[str, Any], Status]] = {
    "nan in Q": ({"Q": tensor([1.0, 0], [0, torch.nan])}, Status.NONFINITE_INPUT),
    "infinite q": ({"q": tensor(1.0, inf)}, Status.NONFINITE_INPUT),
    "nan in h": ({"h": tensor(torch.nan)}, Status.NONFINITE_INPUT),
    "h is -inf": ({"h": tensor(-inf)}, Status.NONFINITE_INPUT),
    "lower is +inf": ({"lower": tensor(0.0, inf)}, Status.NONFINITE_INPUT),
    "upper is -inf": ({"upper": tensor(0.0, -inf)}, Status.NONFINITE_INPUT),
    "crossed bounds": ({"lower": tensor(0.0, 2), "upper": tensor(1.0, 1)}, Status.PRIMAL_INFEASIBLE),
    "rows against bounds": ({"G": tensor([1.0, 1]), "h": tensor(-1.0), "lower": 0.0}, Status.PRIMAL_INFEASIBLE),
    "equalities": ({"A": tensor([1.0, 1], [2.0, 2]), "b": tensor(1.0, 3)}, Status.PRIMAL_INFEASIBLE),
    "rows, linear": ({"Q": None, "A": tensor([1.0, 1]), "b": tensor(-1.0), "lower": 0.0}, Status.PRIMAL_INFEASIBLE),
    "singular, unbounded": ({"Q": tensor([1.0, 0], [0, 0]), "upper": tensor(9.0, inf)}, Status.DUAL_INFEASIBLE),
    "linear, unbounded": ({"Q": None}, Status.DUAL_INFEASIBLE),
    "infeasible and unbounded": (
        {"Q": None, "A": tensor([1.0, 0], [1.0, 0]), "b": tensor(0.0, 1)},
        Status.PRIMAL_INFEASIBLE,
    ),
    "indefinite": ({"Q": tensor([1.0, 0], [0, -1]), "lower": -1.0, "upper": 1.0}, Status.NUMERICAL_ERROR),
}
"""Changes of `failing`'s problem that leave it without a solution, and the status to report. What is both
infeasible and unbounded is infeasible."""


def failing(name: str) -> tuple[QPForm, Status]:
    """Return min |x|^2 / 2 - x0 - x1 with one of `FAILURES` in it."""
    changes, status = FAILURES[name]
    data: dict[str, Any] = {"Q": torch.eye(2, dtype=f64), "q": tensor(-1.0, -1)} | changes
    if "h" in changes and "G" not in changes:
        data["G"] = tensor([1.0, 1])
    return QPForm(**data), status
