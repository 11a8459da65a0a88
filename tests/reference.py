"""An independent reference: the KKT system of a known active set, in NumPy, one instance at a time.

It shares no code with diffopt. The system is solved in float64 and refined on residuals in extended
precision (``numpy.longdouble``, 64 bits of mantissa on x86), until the refinement no longer helps, so
solutions and gradients are right to about float64 rounding as long as the condition number is below
about 1e13. The conditions of an active set, w = (x, y) with y = (nu, lam of active rows,
multipliers of active lower, of active upper bounds), are

    Q x + q + C'y = 0,   C x = d,   C = [A; G_a; -I_l; I_u],   d = [b; h_a; -lower_l; upper_u].

A linear functional f = v'w then has df = -u'(dK w - dr) where K u = v, since K dw = -(dQ x + dq + dC'y,
dC x - dd); K is symmetric.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
PIECES = ("Q", "q", "A", "b", "G", "h", "lower", "upper")
OUTPUTS = ("x", "s", "nu", "lam", "lam_lower", "lam_upper")


@dataclass(frozen=True)
class Instance:
    """One quadratic program in float64; every piece is present (zero rows, infinite bounds)."""

    Q: Array
    q: Array
    A: Array
    b: Array
    G: Array
    h: Array
    lower: Array
    upper: Array


@dataclass(frozen=True)
class ActiveSet:
    """Which rows of G and which bounds hold with equality, as boolean masks."""

    rows: Array
    lower: Array
    upper: Array


@dataclass(frozen=True)
class Answer:
    """The solution of an instance for its active set; ``solve_transposed`` belongs to its KKT matrix."""

    instance: Instance
    active: ActiveSet
    point: dict[str, Array]  # in longdouble, by the names of OUTPUTS
    C: Array
    y: Array


def instance(data: dict[str, Any]) -> Instance:
    """Return an instance from tensors by name; ``None`` or a missing name is an absent piece."""
    given = {k: np.asarray(v.detach().cpu().double().numpy()) for k, v in data.items() if v is not None}
    n = given["q"].shape[-1]
    absent = {
        "Q": np.zeros((n, n)), "A": np.zeros((0, n)), "b": np.zeros(0), "G": np.zeros((0, n)), "h": np.zeros(0),
        "lower": np.full(n, -np.inf), "upper": np.full(n, np.inf),
    }  # fmt: skip
    pieces = absent | given
    pieces["Q"] = 0.5 * (pieces["Q"] + pieces["Q"].T)
    return Instance(**{name: pieces[name] for name in PIECES})


def active_set(lam: Any, lam_lower: Any, lam_upper: Any) -> ActiveSet:
    """Return the active set of known multipliers (strict complementarity assumed)."""
    return ActiveSet(*(np.asarray(v) > 0 for v in (lam, lam_lower, lam_upper)))


def solve(problem: Instance, active: ActiveSet) -> Answer:
    """Return the point that satisfies the conditions of an active set."""
    n, p, m = problem.q.size, problem.b.size, problem.h.size
    C = _rows(problem, active)
    d = [problem.b, problem.h[active.rows], -problem.lower[active.lower], problem.upper[active.upper]]
    w = _solve(_kkt(problem.Q, C), np.concatenate([-problem.q, *d]))
    x, y = w[:n], w[n:]
    point = {name: np.zeros(n, np.longdouble) for name in ("lam_lower", "lam_upper")}
    point |= {"x": x, "lam": np.zeros(m, np.longdouble), "nu": y[:p]}
    _, point["lam"][active.rows], point["lam_lower"][active.lower], point["lam_upper"][active.upper] = _pieces(
        y, p, active
    )
    slack = problem.h - problem.G.astype(np.longdouble) @ x
    point["s"] = np.where(active.rows, 0, slack)
    return Answer(problem, active, point, C, y)


def kkt_matrix(problem: Instance, active: ActiveSet) -> Array:
    """Return the matrix K of these conditions."""
    return _kkt(problem.Q, _rows(problem, active))


def gradients(answer: Answer, cotangents: dict[str, Any]) -> dict[str, Array]:
    """Return the gradients of sum_o <cotangents[o], o> with respect to all eight pieces.

    Outputs are those of `OUTPUTS` and ``value``; the gradient of Q is symmetric, that of an infinite
    entry of h, lower or upper is zero.
    """
    problem, active = answer.instance, answer.active
    n, p, m = problem.q.size, problem.b.size, problem.h.size
    given = {name: np.asarray(v, dtype=np.longdouble) for name, v in cotangents.items()}
    assert not set(given) - {*OUTPUTS, "value"}, given.keys()
    zero = {"x": n, "s": m, "nu": p, "lam": m, "lam_lower": n, "lam_upper": n}
    v = {name: given.get(name, np.zeros(size, np.longdouble)) for name, size in zero.items()}
    x = answer.point["x"]
    grad: dict[str, Array] = {name: np.zeros(getattr(problem, name).shape, np.longdouble) for name in PIECES}

    # s = h - Gx on inactive rows, 0 on active ones, whatever their data.
    slack = np.where(active.rows, 0, v["s"])
    grad["h"] += np.where(np.isfinite(problem.h), slack, 0)
    grad["G"] -= np.outer(slack, x)
    vx = v["x"] - problem.G.T.astype(np.longdouble) @ slack
    if "value" in given:
        slope = problem.Q.astype(np.longdouble) @ x
        vx = vx + given["value"] * (slope + problem.q)
        grad["q"] += given["value"] * x
        grad["Q"] += given["value"] * np.outer(x, x) / 2
    vy = np.concatenate([v["nu"], v["lam"][active.rows], v["lam_lower"][active.lower], v["lam_upper"][active.upper]])

    u = _solve(_kkt(problem.Q, answer.C), np.concatenate([vx, vy]))
    ux, uy = u[:n], u[n:]
    grad["Q"] -= (np.outer(ux, x) + np.outer(x, ux)) / 2
    grad["q"] -= ux
    dC = -(np.outer(answer.y, ux) + np.outer(uy, x))
    rows_A, rows_G = dC[:p], dC[p : p + int(active.rows.sum())]
    grad["A"] += rows_A
    grad["G"][active.rows] += rows_G
    side = _pieces(uy, p, active)
    grad["b"] += side[0]
    grad["h"][active.rows] += side[1]
    grad["lower"][active.lower] -= side[2]
    grad["upper"][active.upper] += side[3]
    return grad


def value(problem: Instance, x: Any) -> Any:
    """Return the objective at x, in extended precision."""
    point = np.asarray(x, np.longdouble)
    return point @ (problem.Q.astype(np.longdouble) @ point) / 2 + problem.q.astype(np.longdouble) @ point


def error(got: Any, expected: Array) -> float:
    """Return max |got - expected| / (1 + max |expected|), 0 for an empty piece."""
    if expected.size == 0:
        return 0.0
    got = np.asarray(got, np.longdouble)
    assert got.shape == expected.shape, (got.shape, expected.shape)
    return float(np.abs(got - expected).max() / (1 + np.abs(expected).max()))


def _pieces(y: Array, p: int, active: ActiveSet) -> list[Array]:
    """Split y into (nu, lam of active rows, active lower multipliers, active upper multipliers)."""
    counts = [p, int(active.rows.sum()), int(active.lower.sum())]
    return np.split(y, np.cumsum(counts))


def _rows(problem: Instance, active: ActiveSet) -> Array:
    eye = np.eye(problem.q.size)
    return np.concatenate([problem.A, problem.G[active.rows], -eye[active.lower], eye[active.upper]])


def _kkt(Q: Array, C: Array) -> Array:
    k = C.shape[0]
    return np.block([[Q, C.T], [C, np.zeros((k, k))]])


def _solve(K: Array, rhs: Array, most: int = 8) -> Array:
    """Return K^-1 rhs: LU in float64, residuals and sum in extended precision."""
    wide = K.astype(np.longdouble)
    rhs = rhs.astype(np.longdouble)
    # Row and column scaling by powers of two: exact, and it keeps the LU good for badly scaled data.
    scale = np.exp2(-np.round(np.log2(np.maximum(np.abs(K).max(axis=1), 1e-300))) / 2)
    small = K * scale[:, None] * scale[None, :]
    w = np.zeros(len(rhs), np.longdouble)
    size = np.inf
    for _ in range(most):
        residual = rhs - wide @ w
        step = scale * np.linalg.solve(small, (residual * scale).astype(np.float64))
        if not np.abs(step).max(initial=0) < size:
            break
        size = np.abs(step).max(initial=0)
        w = w + step
    return w
