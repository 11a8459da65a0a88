"""Run random instances of all hard families, and check every claim: ``make hard``.

Prints, by family, how many instances ended as they must, were given up, or claimed what is not so; then the seeds of
the last two, to be run again with ``--family`` and ``--seed``. With ``--write`` it puts its tables into
`docs/accuracy.md`.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent / folder) for folder in (".", "..")]

import claims
import diffopt
import test_hard_families
from benchmarks import pages
from hard_families import FAMILIES, Family, random_sizes

BATCH = 25
MISSED = 1e-6
"""Relative error from which a solution, or a proof, is wrong whatever its residuals are."""

SHOWN = 5
"""Instances of a family that are listed by their seeds, at most."""


class Counts:
    """What became of the instances of one family; ``cases``: (seed, index, status) of those that did not end right."""

    def __init__(self) -> None:
        self.all = self.right = self.wrong = 0
        self.error, self.seconds = 0.0, 0.0
        self.cases: list[tuple[int, int, str]] = []

    def take(self, family: Family, seed: int, executor: Any) -> None:
        drawn = family.draw(random_sizes(seed, BATCH))
        settings = diffopt.Settings(executor=executor)
        began = time.perf_counter()
        solution = diffopt.solve_qp(**drawn.data, settings=settings, on_failure="return")
        self.seconds += time.perf_counter() - began
        verdict = claims.judge(drawn, solution)
        self.all += BATCH
        self.error = max(self.error, float(verdict.error[verdict.right].max(initial=0)))
        wrong = verdict.wrong | verdict.right & (verdict.error > max(family.error, MISSED))
        right = verdict.right & ~wrong
        self.right += int(right.sum())
        self.wrong += int(wrong.sum())
        for index in (~right).nonzero()[0].tolist():
            word = " CLAIMED WRONGLY" if wrong[index] else ""
            self.cases.append((seed, index, diffopt.Status(int(solution.status[index])).name + word))


def run(families: list[Family], count: int, executor: str, start: int) -> tuple[str, list[Counts]]:
    """Return a table in words and the counts of the families; each gets its share of ``count`` instances."""
    began = time.perf_counter()
    batches = -(-count // (BATCH * len(families)))
    found = []
    for family in families:
        counts = Counts()
        # Families do not share seeds: the same numbers would give the same base problems.
        first = start + 1_000_003 * FAMILIES.index(family)
        for seed in range(first, first + batches):
            counts.take(family, seed, executor)
        found.append(counts)
    wall = time.perf_counter() - began
    total = sum(c.all for c in found)
    right, wrong = sum(c.right for c in found), sum(c.wrong for c in found)
    solving = sum(c.seconds for c in found)
    lines = [
        f"Executor `{executor}`: {total} instances of {len(families)} families, **{wrong} wrong claims**, "
        f"{total - right - wrong} given up; {solving:.0f} s of solving on one core, {wall:.0f} s with drawing and "
        "checking.",
        "",
        pages.table(
            ["family", "instances", "ended as they must", "given up", "wrong claims", "worst error"],
            (
                [family.name, str(c.all), str(c.right), str(c.all - c.right - c.wrong), str(c.wrong), f"{c.error:.0e}"]
                for family, c in zip(families, found, strict=True)
            ),
        ),
    ]
    return "\n".join(lines), found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000, help="instances on the executor cpu (default 100000)")
    parser.add_argument("--torch", type=int, default=5_000, help="instances on the executor torch (default 5000)")
    parser.add_argument("--family", help="only families whose name contains this")
    parser.add_argument(
        "--seed", type=int, help="first seed of the family, as listed; with --count 1: that batch alone"
    )
    parser.add_argument("--write", action="store_true", help="write the tables of docs/accuracy.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore", diffopt.InaccurateSolutionWarning)
    families = [family for family in FAMILIES if (options.family or "") in family.name]
    texts, wrong = [], 0
    for executor, count in (("cpu", options.count), ("torch", options.torch)):
        if not count:
            continue
        start = 0 if options.seed is None else options.seed - 1_000_003 * FAMILIES.index(families[0])
        text, found = run(families, count, executor, start)
        print(text)
        for family, counts in zip(families, found, strict=True):
            for seed, index, status in counts.cases[:SHOWN]:
                print(f'{executor}: --family "{family.name}" --seed {seed}, instance {index}: {status}')
        print(flush=True)
        wrong += sum(c.wrong for c in found)
        texts.append(text)
    if options.write:
        pages.write(pages.ACCURACY, "hard families", test_hard_families.rendered())
        pages.write(pages.ACCURACY, "random hard instances", "\n".join(texts))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
