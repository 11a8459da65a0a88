"""Numbers made of times: median and spread, when a row needs more repeats, and floating-point operations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

SPREAD = 0.2
"""A row whose spread is above this is repeated more, and marked if that does not help."""


@dataclass(frozen=True)
class Effort:
    """How long to measure a row: at least ``few`` repeats (fewer once ``slow`` seconds are spent), ``usual``
    ones where ``seconds`` allow, and up to ``most`` in up to ``patience`` times the seconds where the
    spread is above `SPREAD`. A repeat takes at least ``sample`` seconds: quick calls are made several
    times in it. A peer that would take more than ``slow`` seconds for a batch (if it is made for batches, three
    times that) gets the first of its programs only.
    """

    few: int = 3
    usual: int = 9
    most: int = 27
    seconds: float = 0.6
    patience: float = 2.0
    sample: float = 0.005
    slow: float = 1.5


QUICK = Effort(few=2, usual=3, most=5, seconds=0.3, patience=1.5, sample=0.002, slow=1.0)


@dataclass
class Samples:
    """Repeated times of one thing, in seconds per call."""

    inner: int = 1
    seconds: list[float] = field(default_factory=list)

    def median(self) -> float:
        return float(np.median(self.seconds))

    def spread(self) -> float:
        """Return the interquartile range over the median."""
        low, high = np.percentile(self.seconds, [25, 75])
        return float((high - low) / self.median())

    def want_more(self, effort: Effort) -> bool:
        """Return whether to repeat once more."""
        repeats, spent = len(self.seconds), sum(self.seconds) * self.inner
        if not repeats:
            return True
        if repeats < effort.few and spent < effort.slow:
            return True
        if repeats < effort.usual and spent < effort.seconds:
            return True
        return repeats < effort.most and spent < effort.patience * effort.seconds and self.spread() > SPREAD


def calls_per_sample(seconds: float, effort: Effort) -> int:
    """Return how many calls of this duration make up a sample."""
    return max(1, math.ceil(effort.sample / max(seconds, 1e-9)))


def duration(call: Callable[[], object], inner: int) -> float:
    """Return the seconds that a call takes, on average over ``inner`` calls.

    Quick calls run some times before, untimed: the process has slept, and the caches are full of what others did.
    """
    for _ in range(inner // 2):
        call()
    start = perf_counter()
    for _ in range(inner):
        call()
    return (perf_counter() - start) / inner


def flops(n: int, m: int, p: int, iterations: int) -> float:
    """Return the operations of one solve in the dual reduction, as leading terms.

    Once: a factor of Q, Q^-1 applied to all rows and q (c = m + p + 1 columns), their inner products, and
    the elimination of the equalities. Per iteration, and once more for the polish: a factor of m x m. Per
    iteration also solves and products with m x m matrices.
    """
    c = m + p + 1
    once = n**3 / 3 + n**2 * c + n * c**2 + p * m**2
    return once + (iterations + 1) * m**3 / 3 + 6 * m**2 * iterations


def part_of(batch: int, seconds_each: float, effort: Effort, least: int = 8) -> int:
    """Return how many programs of a batch to measure, where one takes so many seconds."""
    if batch * seconds_each <= effort.slow:
        return batch
    return min(batch, max(least, math.ceil(effort.seconds / seconds_each)))
