"""How close float32 comes to float64: x and all gradients, on problems easy, ill-conditioned and from practice.

``make accuracy`` prints the table and puts it into `docs/accuracy.md`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import diffopt
import maros
import measures
from benchmarks import pages
from diffopt import Settings, Status
from diffopt.check import known
from diffopt.check.known import Bounds

f32, f64 = torch.float32, torch.float64

Data = dict[str, Any]


class Problems(NamedTuple):
    """``batches``: data in float64, each of problems with one solution that has a derivative."""

    name: str
    batches: list[Data]


class Accuracy(NamedTuple):
    """Worst errors of x and of gradients against float64 with the rounded data, and with the data themselves.

    ``kinks``: instances with more weakly active rows than in float64, whose `Settings.weak_tolerance` is smaller:
    another gradient, by the rule for kinks, and left out of the errors of gradients.
    """

    instances: int
    solved: int
    kinks: int
    x: float
    gradient: float
    x_unrounded: float
    gradient_unrounded: float


SIZES: list[tuple[tuple[int, int, int], Bounds]] = [((5, 1, 4), "mixed"), ((20, 4, 15), "both"), ((40, 5, 60), None)]


def sets(regular: list[str]) -> Iterator[Problems]:
    """Yield the sets of problems; ``regular``: names of Maros-Meszaros problems with a derivative."""
    for condition in (1e2, 1e4, 1e6):
        batches = [
            known.quadratic_program(seed, *sizes, bounds=bounds, batch=(16,), condition=condition).arguments()
            for seed, (sizes, bounds) in enumerate(SIZES)
        ]
        yield Problems(f"random, cond(Q) up to {condition:.0e}", batches)
    linear = [
        known.linear_program(seed, n, p, m, bounds="both", batch=(16,)).arguments()
        for seed, (n, p, m) in enumerate([(5, 1, 4), (20, 4, 15)])
    ]
    yield Problems("random, linear", linear)
    yield Problems("Maros-Meszaros, regular", [batched(maros.load(name).data) for name in regular])


def batched(data: Data) -> Data:
    return {name: None if value is None else value.unsqueeze(0) for name, value in data.items()}


def pulled(data: Data, executor: Any) -> tuple[diffopt.Solution, dict[str, Tensor]]:
    """Solve, and return the gradients of a weighted sum of x; the weights depend on the shape alone."""
    leaves = measures.tracked(data)
    solution = diffopt.solve_qp(**leaves, settings=Settings(executor=executor), on_failure="return")
    weights = torch.randn(solution.x.shape, generator=torch.Generator().manual_seed(0), dtype=f64)
    solution.x.backward(weights.to(solution.x.dtype))
    return solution, measures.gradients(leaves)


def measure(problems: Problems, executor: Any) -> Accuracy:
    """Return the accuracy of float32 on a set; errors are those of the instances that both precisions solve."""
    worst, instances, solved, kinks = [0.0] * 4, 0, 0, 0
    for data in problems.batches:
        rounded = {name: None if v is None else v.to(f32) for name, v in data.items()}
        single, gradients = pulled(rounded, executor)
        assert single.x.dtype == f32 and all(g.dtype == f32 for g in gradients.values())
        ok = single.status == Status.SOLVED
        instances, solved = instances + ok.numel(), solved + int(ok.sum())
        same = {name: None if v is None else v.to(f64) for name, v in rounded.items()}
        for place, reference in ((0, same), (2, data)):
            double, expected = pulled(reference, executor)
            both, alike = ok & (double.status == Status.SOLVED), single.weakly_active == double.weakly_active
            kinks += int((both & ~alike).sum()) if place == 0 else 0
            for i in both.nonzero().flatten().tolist():
                errors = [measures.relative(gradients[k][i], expected[k][i]) for k in expected if alike[i]]
                worst[place] = max(worst[place], measures.relative(single.x[i], double.x[i]))
                worst[place + 1] = max(worst[place + 1], *errors, 0.0)
    return Accuracy(instances, solved, kinks, *worst)


HEADS = [
    "problems",
    "executor",
    "SOLVED",
    "more kinks",
    "x",
    "gradients",
    "x, data not rounded",
    "gradients, data not rounded",
]


def rendered(regular: list[str]) -> str:
    """Return the table."""
    lines = []
    for problems in sets(regular):
        for executor in ("cpu", "torch"):
            found = measure(problems, executor)
            counts = [f"{found.solved} of {found.instances}", str(found.kinks)]
            lines.append([problems.name, executor, *counts, *(f"{error:.0e}" for error in found[3:])])
    return pages.table(HEADS, lines)
