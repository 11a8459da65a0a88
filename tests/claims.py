"""Whether what a solution claims is true: residuals and certificates anew, in NumPy and extended precision.

Written from the definitions in `docs/conventions.md`; shares no code with the library.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from diffopt import Solution, Status
from diffopt.linalg.matrices import SymmetricMatrix
from hard_families import Drawn

LIMITS = {Status.SOLVED: 1e-9, Status.ALMOST_SOLVED: 1e-6}
"""The relative residual that each status promises in float64."""

ROUNDING = 1e-14
"""What the library's own float64 residuals may differ by from these."""

PROOF = 1e-6
"""Largest error of a certificate, normalised to depth 1, relative to the sizes of what cancels in it. The library
claims at 1e-8 in equilibrated units, which differ from these."""

INDEPENDENT = 1e-12
"""Singular value, of rows of length 1, from which one more of them is independent of the others."""

CLAIMS = (Status.SOLVED, Status.ALMOST_SOLVED, Status.PRIMAL_INFEASIBLE, Status.DUAL_INFEASIBLE, Status.NONFINITE_INPUT)


class Verdict(NamedTuple):
    """Per instance: ``right``: it ended as it must; ``wrong``: it claims what is not so (a solution whose residuals say
    otherwise or where there is none, a proof that proves nothing, ...). What is neither was given up: no claim.

    ``error``: of x where it is unique, else of the value, relative; or of the certificate; 0 where there is neither.
    """

    right: np.ndarray
    wrong: np.ndarray
    error: np.ndarray


Arrays = dict[str, np.ndarray]


def judge(drawn: Drawn, solution: Solution) -> Verdict:
    """Compare a solution with the truth, and check its evidence."""
    data, status = arrays(drawn.data), solution.status.numpy()
    wrong = np.isin(status, CLAIMS) & (status != drawn.status)
    if drawn.status == Status.SOLVED:
        wrong &= status != Status.ALMOST_SOLVED
    error = np.zeros(len(status), np.longdouble)
    point = {name: extended(getattr(solution, name)) for name in ("x", "nu", "lam", "lam_lower", "lam_upper")}
    worst = residual(data, point)
    for claimed, limit in LIMITS.items():
        wrong |= (status == claimed) & ~(worst <= limit + ROUNDING)
    if drawn.x is not None:
        found, known = point["x"], extended(drawn.x)
        if not drawn.unique:
            found, known = (objective(data, x)[:, None] for x in (found, known))
        error = np.abs(found - known).max(-1) / (1 + np.abs(known).max(-1))
    if solution.certificate is not None:
        proof = {name: extended(value) for name, value in solution.certificate._asdict().items()}
        for claimed, check in ((Status.PRIMAL_INFEASIBLE, farkas), (Status.DUAL_INFEASIBLE, ray)):
            found = check(data, proof)
            wrong |= (status == claimed) & ~(found <= PROOF)
            error = np.where(status == claimed, found, error)
    else:
        wrong |= (status == Status.PRIMAL_INFEASIBLE) | (status == Status.DUAL_INFEASIBLE)
    return Verdict((status == drawn.status) & ~wrong, wrong, error.astype(float))


def gradient(drawn: Drawn, by_x: np.ndarray) -> np.ndarray:
    """Return the gradient by q of what has this gradient by x: -N (N'QN)^-1 N' by_x, where N is a basis of what the
    held rows leave free."""
    assert drawn.held is not None
    found = np.zeros_like(by_x)
    for i, (Q, rows) in enumerate(zip(arrays(drawn.data)["Q"].astype(float), drawn.held.numpy(), strict=True)):
        lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
        _, sizes, basis = np.linalg.svd(rows / np.where(lengths > 0, lengths, 1))
        free = basis[(sizes > INDEPENDENT).sum() :].T
        found[i] = -free @ np.linalg.solve(free.T @ Q @ free, free.T @ by_x[i])
    return found


def extended(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy().astype(np.longdouble)


def arrays(data: dict[str, Any]) -> Arrays:
    """Return the data in extended precision, everything present: G holds the finite bounds' rows too."""
    q = extended(data["q"])
    count, n = q.shape
    Q = data["Q"]
    if isinstance(Q, SymmetricMatrix):
        Q = Q.dense()
    Q = np.zeros((count, n, n), np.longdouble) if Q is None else extended(Q)
    found = {"Q": (Q + Q.swapaxes(-1, -2)) / 2, "q": q}
    for matrix, side in (("A", "b"), ("G", "h")):
        absent = data.get(matrix) is None
        found[matrix] = np.zeros((count, 0, n), np.longdouble) if absent else extended(data[matrix])
        found[side] = np.zeros((count, 0), np.longdouble) if absent else extended(data[side])
    for name, absent in (("lower", -np.inf), ("upper", np.inf)):
        given = data.get(name)
        found[name] = np.full((count, n), absent, np.longdouble) if given is None else extended(given)
    return found


def times(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    return (matrix * vector[:, None, :]).sum(-1)


def pulled(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    return (matrix * vector[:, :, None]).sum(-2)


def largest(*vectors: np.ndarray) -> np.ndarray:
    return np.stack([np.abs(v).max(-1, initial=0) for v in vectors]).max(0)


def objective(data: Arrays, x: np.ndarray) -> np.ndarray:
    return (x * (times(data["Q"], x) / 2 + data["q"])).sum(-1)


def there(values: np.ndarray, side: np.ndarray) -> np.ndarray:
    """Return values where the side exists, else zero."""
    return np.where(np.isfinite(side), values, 0)


def residual(data: Arrays, point: Arrays) -> np.ndarray:
    """Return the largest of the three relative residuals of `docs/conventions.md`."""
    x, b, h, lower, upper = point["x"], data["b"], data["h"], data["lower"], data["upper"]
    lam, low, high = there(point["lam"], h), there(point["lam_lower"], lower), there(point["lam_upper"], upper)
    with np.errstate(invalid="ignore", over="ignore"):
        Qx, Ax, Gx = times(data["Q"], x), times(data["A"], x), there(times(data["G"], x), h)
        pull, push = pulled(data["A"], point["nu"]), pulled(data["G"], lam) - low + high
        sides = [there(v, v) for v in (h, lower, upper)]
        off = [Ax - b, np.maximum(Gx - sides[0], 0)]
        off += [np.maximum(there(v - x, v), 0) for v in (lower,)] + [np.maximum(there(x - v, v), 0) for v in (upper,)]
        crossed = [np.where(miss > 0, side, 0) for miss, side in zip(off[1:], sides, strict=True)]
        sizes = [Ax, b, Gx, *crossed, there(x, lower), there(x, upper)]
        primal = largest(*off) / (1 + largest(*sizes))
        dual = largest(Qx + data["q"] + pull + push) / (1 + largest(Qx, data["q"], pull, push))
        held = (sides[0] * lam).sum(-1) - (sides[1] * low).sum(-1) + (sides[2] * high).sum(-1)
        terms = np.stack([(x * Qx).sum(-1), (data["q"] * x).sum(-1), (b * point["nu"]).sum(-1), held])
        gap = np.abs(terms.sum(0)) / (1 + np.abs(terms).max(0))
    return np.stack([primal, dual, gap, misplaced(data, point)]).max(0)


def misplaced(data: Arrays, duals: Arrays) -> np.ndarray:
    """Return the largest multiplier that is negative, or of a side that does not exist."""
    pairs = [(duals["lam"], data["h"]), (duals["lam_lower"], data["lower"]), (duals["lam_upper"], data["upper"])]
    return largest(*(np.where(np.isfinite(side), np.minimum(dual, 0), dual) for dual, side in pairs))


def farkas(data: Arrays, proof: Arrays) -> np.ndarray:
    """Return by how much a Farkas certificate misses: signs, A'nu + G'lam - lam_lower + lam_upper = 0 and depth -1."""
    h, lower, upper = data["h"], data["lower"], data["upper"]
    nu, lam, low, high = proof["nu"], proof["lam"], proof["lam_lower"], proof["lam_upper"]
    with np.errstate(invalid="ignore", over="ignore"):
        sums = pulled(data["A"], nu) + pulled(data["G"], lam) - low + high
        depth = (data["b"] * nu).sum(-1) + (there(h, h) * lam).sum(-1)
        depth += (there(upper, upper) * high).sum(-1) - (there(lower, lower) * low).sum(-1)
        # What should be 0 is not: no x is excluded that makes it 1. So it must be small beside 1 over the sizes of x at
        # which the rows that matter to the proof hold.
        far = np.ones(len(nu), np.longdouble)
        bounds = np.ones_like(lower[:, :, None])
        rows = ((data["A"], data["b"], nu), (data["G"], h, lam), (bounds, lower, low), (bounds, upper, high))
        for matrix, side, multiplier in rows:
            length = np.abs(matrix).max(-1)
            matters = (np.abs(there(side, side) * multiplier) >= 1e-6) & (length > 0)
            where = np.where(matters, np.abs(there(side, side)) / np.where(matters, length, 1), 0)
            far = np.maximum(far, where.max(-1, initial=0))
        left = np.abs(sums).max(-1) * far
    return np.stack([left, np.abs(depth + 1), misplaced(data, proof)]).max(0)


def ray(data: Arrays, proof: Arrays) -> np.ndarray:
    """Return by how much a direction misses: Qx = 0, Ax = 0, Gx <= 0 (and bounds), q'x = -1."""
    x = proof["x"]
    with np.errstate(invalid="ignore", over="ignore"):
        size = np.abs(x).max(-1)
        off = [
            np.abs(times(data["Q"], x)),
            np.abs(times(data["A"], x)),
            np.maximum(there(times(data["G"], x), data["h"]), 0),
        ]
        rows = [np.abs(data[name]).max(-1, initial=0) for name in ("Q", "A", "G")]
        errors = [(v / np.maximum(r, 1e-300)).max(-1, initial=0) / size for v, r in zip(off, rows, strict=True)]
        errors += [np.maximum(there(v, s), 0).max(-1) / size for v, s in ((-x, data["lower"]), (x, data["upper"]))]
        errors += [np.abs((data["q"] * x).sum(-1) + 1)]
    return np.stack(errors).max(0)
