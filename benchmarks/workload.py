"""The workload: random dense quadratic programs as in the profiling of Amos and Kolter (2017), "OptNet".

Per instance U (n x n) is uniform on (0, 1), Q = UU' + 1e-3 I, G (m x n) standard normal, x0 standard
normal, s0 uniform on (0, 1), q standard normal and h = G x0 + s0; with p equalities also A (p x n)
standard normal and b = A x0. So every instance is feasible and strictly convex, and about half of the
inequalities are active at the solution. Data are float64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
PIECES = ("Q", "q", "A", "b", "G", "h")
SEED = 0


@dataclass(frozen=True)
class Case:
    """Sizes of a batch: ``batch`` programs of n variables, m inequalities and p equalities."""

    batch: int
    n: int
    m: int
    p: int = 0

    @property
    def name(self) -> str:
        """A short name, ``B128-n100-m100`` or ``B128-n100-m100-p20``."""
        return f"B{self.batch}-n{self.n}-m{self.m}" + (f"-p{self.p}" if self.p else "")

    def __str__(self) -> str:
        return f"batch {self.batch}, n = {self.n}, m = {self.m}, p = {self.p}"


CASES = (
    Case(1, 10, 10),
    Case(128, 10, 10),
    Case(1024, 10, 10),
    Case(128, 50, 50),
    Case(1, 100, 100),
    Case(128, 100, 100),
    Case(128, 100, 100, 20),
    Case(128, 200, 200),
)


@dataclass(frozen=True)
class Batch:
    """The data of a case, batch dimension first, and ``incoming``, the gradient that comes back to x."""

    case: Case
    Q: Array
    q: Array
    A: Array
    b: Array
    G: Array
    h: Array
    incoming: Array

    def pieces(self) -> dict[str, Array]:
        """Return the pieces that the case has, by name: A and b only with equalities."""
        return {name: getattr(self, name) for name in PIECES if name not in "Ab" or self.case.p}

    def first(self, count: int) -> Batch:
        """Return the first programs: the same as those of a smaller batch."""
        parts = [getattr(self, name)[:count] for name in (*PIECES, "incoming")]
        return Batch(replace(self.case, batch=min(count, self.case.batch)), *parts)

    def nbytes(self) -> int:
        """Return the size of the data."""
        return sum(piece.nbytes for piece in self.pieces().values())


def make(case: Case, seed: int = SEED) -> Batch:
    """Return the data of a case: the same for the same seed, with any version of NumPy."""
    random = np.random.RandomState(seed)
    B, n, m, p = case.batch, case.n, case.m, case.p
    Q, G, A = np.empty((B, n, n)), np.empty((B, m, n)), np.empty((B, p, n))
    q, h, b = np.empty((B, n)), np.empty((B, m)), np.empty((B, p))
    for i in range(B):
        U = random.uniform(size=(n, n))
        Q[i] = U @ U.T + 1e-3 * np.eye(n)
        G[i] = random.standard_normal((m, n))
        x0 = random.standard_normal(n)
        h[i] = G[i] @ x0 + random.uniform(size=m)
        q[i] = random.standard_normal(n)
        A[i] = random.standard_normal((p, n))
        b[i] = A[i] @ x0
    # Exactly symmetric: some solvers read one triangle only.
    Q = 0.5 * (Q + Q.swapaxes(-1, -2))
    return Batch(case, Q, q, A, b, G, h, np.random.RandomState(seed + 1).standard_normal((B, n)))
