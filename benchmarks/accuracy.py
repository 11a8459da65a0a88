"""How right an answer is: residuals of the optimality conditions, and errors against an exact reference.

The reference is the one of the tests: the linear system of the active set, refined in extended precision.
Where the active set comes from does not matter, since `reference_of` proves it: Q is positive definite, and
the point has positive multipliers and positive slacks, so it is the one solution.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from benchmarks.workload import Array, Batch
from tests import reference


@dataclass(frozen=True)
class Answer:
    """What a solver found: x ``(B, n)``, nu ``(B, p)``, lam ``(B, m)``; iterations where it is known."""

    x: Array
    nu: Array
    lam: Array
    iterations: Array | None = None
    executor: str = ""


@dataclass(frozen=True)
class Reference:
    """The exact solutions of a batch, and the exact gradients of <incoming, x>.

    ``margin`` is the smallest multiplier of an active row and slack of an inactive one over the batch;
    ``active`` is the share of the inequalities that are active.
    """

    x: Array
    gradients: dict[str, Array]
    margin: float
    active: float

    def first(self, count: int) -> Reference:
        """Return the answers of the first programs; ``margin`` and ``active`` stay those of all."""
        parts = {name: gradient[:count] for name, gradient in self.gradients.items()}
        return Reference(self.x[:count], parts, self.margin, self.active)


def residuals(batch: Batch, answer: Answer) -> Array:
    """Return the worst relative residual per instance, ``(B,)``, as `diffopt.Residuals` defines them.

    A negative multiplier is a violation too (of dual feasibility): it counts with the dual residual.
    """
    x, nu, lam = answer.x, answer.nu, answer.lam
    Qx, Ax, Gx = (_times(matrix, x) for matrix in (batch.Q, batch.A, batch.G))
    pull, push = _times(batch.A.swapaxes(-1, -2), nu), _times(batch.G.swapaxes(-1, -2), lam)
    primal = _largest(Ax - batch.b, np.maximum(Gx - batch.h, 0)) / (1 + _largest(Ax, batch.b, Gx, batch.h))
    dual = _largest(Qx + batch.q + pull + push, np.minimum(lam, 0)) / (1 + _largest(Qx, batch.q, pull, push))
    terms = np.stack([(u * v).sum(-1) for u, v in ((x, Qx), (batch.q, x), (batch.b, nu), (batch.h, lam))])
    gap = np.abs(terms.sum(0)) / (1 + np.abs(terms).max(0))
    return np.nan_to_num(np.maximum(np.maximum(primal, dual), gap), nan=np.inf)


def reference_of(batch: Batch, lam: Array) -> Reference:
    """Return the exact solution and gradients, given multipliers that are positive on the active rows only.

    Raises:
        ValueError: these are not the active rows of the solution.
    """
    n, names = batch.case.n, batch.pieces()
    none = np.zeros(n, bool)
    x = np.empty_like(batch.q)
    gradients = {name: np.empty_like(piece) for name, piece in names.items()}
    margin = np.inf
    for i in range(batch.case.batch):
        problem = reference.Instance(
            batch.Q[i], batch.q[i], batch.A[i], batch.b[i], batch.G[i], batch.h[i],
            lower=np.full(n, -np.inf), upper=np.full(n, np.inf),
        )  # fmt: skip
        rows = lam[i] > 0
        found = reference.solve(problem, reference.ActiveSet(rows, none, none))
        here = float(min(found.point["lam"][rows].min(initial=np.inf), found.point["s"][~rows].min(initial=np.inf)))
        if not here > 0:
            raise ValueError(f"instance {i} has another active set: its smallest multiplier or slack is {here:.1e}")
        margin = min(margin, here)
        x[i] = found.point["x"]
        exact = reference.gradients(found, {"x": batch.incoming[i]})
        for name, gradient in gradients.items():
            gradient[i] = exact[name]
    return Reference(x, gradients, margin, float((lam > 0).mean()))


def errors(got: Array, expected: Array) -> Array:
    """Return max |got - expected| / (1 + max |expected|) per instance, ``(B,)``; NaN counts as infinite."""
    if got.shape != expected.shape:
        raise ValueError(f"expected the shape {expected.shape}, got {got.shape}")
    flat = got.reshape(len(got), -1) - expected.reshape(len(got), -1)
    return np.nan_to_num(np.abs(flat).max(-1) / (1 + np.abs(expected).reshape(len(got), -1).max(-1)), nan=np.inf)


def gradient_errors(got: Mapping[str, Array], exact: Mapping[str, Array]) -> dict[str, Array]:
    """Return the errors of each gradient per instance; of Q's the symmetric part is compared."""
    found = dict(got)
    if "Q" in found:
        found["Q"] = 0.5 * (found["Q"] + found["Q"].swapaxes(-1, -2))
    return {name: errors(gradient, exact[name]) for name, gradient in found.items()}


def _times(matrix: Array, vector: Array) -> Array:
    return np.matmul(matrix, vector[..., None])[..., 0]


def _largest(*vectors: Array) -> Array:
    return np.maximum.reduce([np.abs(v).max(-1, initial=0.0) for v in vectors])
