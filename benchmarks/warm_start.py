"""What an earlier solution as a start saves: steps and time, with and without one. ``python -m benchmarks.warm_start``

A row is a sequence of batches whose q moves by a random walk, of so much of its own size at a time. The two ways take
turns, several times at every batch; of a batch the least time counts, and of the sequence the median. "active set": the
share of the programs that needed no step. The last row is a training loop, whose start is the solution of the epoch
before.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

import diffopt
from benchmarks.workload import Case, make

ROW = "{:36} {:>7} {:>10} {:>11} {:>6} {:>11} {:>14} {:>11}"
Way = Callable[[Any], diffopt.Solution]


def walk(data: dict[str, Tensor], by: float, length: int) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    size = data["q"].abs().mean()
    for _ in range(length):
        data = data | {
            "q": data["q"] + by * size * torch.randn(data["q"].shape, generator=generator, dtype=torch.float64)
        }
        yield data


def timed(call: Callable[[], diffopt.Solution]) -> tuple[float, diffopt.Solution]:
    begin = perf_counter()
    solution = call()
    return perf_counter() - begin, solution


class Row:
    """Times and steps of the two ways."""

    def __init__(self, title: str, change: str, repeats: int) -> None:
        self.title, self.change, self.repeats = title, change, repeats
        self.cold: list[tuple[float, Tensor]] = []
        self.warm: list[tuple[float, Tensor]] = []

    def step(self, cold: Callable[[], diffopt.Solution], warm: Callable[[], diffopt.Solution]) -> diffopt.Solution:
        """Make both calls in turn, and return the solution of the second."""
        found = [[timed(cold), timed(warm)] for _ in range(self.repeats)]
        for times, tries in zip((self.cold, self.warm), zip(*found, strict=True), strict=True):
            times.append((min(seconds for seconds, _ in tries), tries[0][1].iterations))
        (_, without), (_, solution) = found[-1]
        assert bool((without.x - solution.x).abs().max() <= 1e-6 * (1 + without.x.abs().max()))
        return solution

    def show(self) -> None:
        (cold, cold_steps), (warm, warm_steps) = (
            (1e3 * float(np.median([t for t, _ in times])), torch.stack([steps for _, steps in times]).double())
            for times in (self.cold, self.warm)
        )
        served = float((warm_steps == 0).double().mean())
        cells = (
            f"{cold:.3g} ms",
            f"{warm:.3g} ms",
            f"{warm / cold:.2f}",
            f"{cold_steps.mean():.2f}",
            f"{warm_steps.mean():.2f}",
        )
        print(ROW.format(self.title, self.change, *cells[:2], cells[2], f"{100 * served:.0f} %", *cells[3:]))


def sequence(title: str, data: dict[str, Any], by: float, length: int, repeats: int, **settings: Any) -> None:
    chosen = diffopt.Settings(**settings)
    row = Row(title, f"{by:g}", repeats)

    def solve(pieces: dict[str, Any], start: Any = None) -> diffopt.Solution:
        return diffopt.solve_qp(**pieces, settings=chosen, start=start)

    start = solve(data)
    for pieces in walk(data, by, length):
        start = row.step(lambda d=pieces: solve(d), lambda d=pieces, s=start: solve(d, s))  # type: ignore[misc]
    row.show()


def training(epochs: int, repeats: int) -> None:
    """A portfolio whose returns are predicted: each instance has the start that its last epoch left."""
    count, assets, features = 256, 30, 5
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    factor, inputs, true = normal(assets, assets), normal(count, features), normal(features, assets)
    Q = factor @ factor.mT / assets + 0.1 * torch.eye(assets, dtype=torch.float64)
    A = torch.ones(1, assets, dtype=torch.float64)
    layer = diffopt.Layer(diffopt.QPStructure(assets, Q=diffopt.fixed(Q), A=diffopt.fixed(A), b=1.0, lower=0.0))
    goal = layer(q=-inputs @ true)
    model = torch.nn.Linear(features, assets, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(0.1 * normal(assets, features))
        model.bias.zero_()
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    row, start = Row("training: B256, 30 assets, forward", "Adam", repeats), None
    for _ in range(epochs):
        optimiser.zero_grad()
        q = -model(inputs)
        start = row.step(lambda q=q: layer.solve(q=q), lambda q=q, s=start: layer.solve(q=q, start=s))  # type: ignore[misc]
        (start.x - goal).square().sum(-1).mean().backward()
        optimiser.step()
    row.show()


def workload(batch: int, n: int, m: int, p: int = 0) -> dict[str, Tensor]:
    return {name: torch.from_numpy(piece) for name, piece in make(Case(batch, n, m, p)).pieces().items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--length", type=int, default=20, help="batches in a sequence")
    parser.add_argument("--repeats", type=int, default=10, help="of each batch")
    parser.add_argument("--epochs", type=int, default=60, help="epochs of the training loop")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.threads} thread{'s' * (options.threads > 1)}, float64; sequences of {options.length} batches")
    print(ROW.format("", "change", "without", "with start", "ratio", "active set", "steps without", "steps with"))
    measure = options.length, options.repeats
    for by in (0.01, 0.1, 1.0):
        sequence("B128, n = m = 10", workload(128, 10, 10), by, *measure)
    for by in (0.01, 0.1, 1.0):
        sequence("B128, n = m = 100", workload(128, 100, 100), by, *measure)
    alike = workload(128, 100, 100) | {name: workload(1, 100, 100)[name][0] for name in "QG"}
    alike["h"] = alike["h"][:1] + 0 * alike["h"]
    sequence("B128, n = m = 100, one Q and G", alike, 0.1, *measure)
    sequence("B16, n = 50, m = 150 (general)", workload(16, 50, 150), 0.1, *measure)
    sequence("B128, n = m = 100 (torch)", workload(128, 100, 100), 0.1, 3, 1, executor="torch")
    training(options.epochs, options.repeats)
