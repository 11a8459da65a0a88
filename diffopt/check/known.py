"""Problems with known answers, built backwards from a chosen point of the KKT conditions.

Draw x, nu, lam and s first, with a chosen complementarity margin; then set q, b, h and the bounds so
that the conditions hold. Every function takes a seed and sizes and returns a `KnownProblem`; the same
arguments give the same problem. ``diffopt.check.strategies`` draws the seed and the sizes by Hypothesis.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from diffopt.errors import ParameterError
from diffopt.solution import Certificate, Status

Bounds = Literal["lower", "upper", "both", "mixed"] | None
BOUNDS: tuple[Bounds, ...] = (None, "lower", "upper", "both", "mixed")
Infeasibility = Literal["rows", "equalities", "bounds"]

SMALLEST_SINGULAR_VALUE = 0.3
"""Lower bound on the singular values of the active rows of a well-posed problem (see `_candidates`)."""

_DATA = ("Q", "q", "A", "b", "G", "h", "lower", "upper")
_POINT = ("x", "nu", "lam", "lam_lower", "lam_upper", "s")
_FLAGS = ("status", "weakly_active", "dependent")
_DIMS = {"Q": 2, "A": 2, "G": 2, "status": 0, "weakly_active": 0, "dependent": 0}


@dataclass(frozen=True, eq=False, repr=False)
class KnownProblem:
    """A batch of quadratic programs and their answer.

    Attributes:
        Q: ``(*batch, n, n)``, or ``None`` for a linear program; q ``(*batch, n)``;
            A ``(*batch, p, n)`` and b ``(*batch, p)``, G ``(*batch, m, n)`` and h ``(*batch, m)``,
            lower and upper ``(*batch, n)``: ``None`` where absent. Q, A and G have no batch
            dimensions where the problem was drawn with ``shared=True``.
        x, nu, lam, lam_lower, lam_upper, s: a point that satisfies the KKT conditions, with the signs
            and shapes of `diffopt.Solution`; NaN where the problem has no solution. x and s are
            the only ones; the duals too where ``dependent`` is 0.
        status: ``(*batch,)`` int8: SOLVED, PRIMAL_INFEASIBLE or DUAL_INFEASIBLE.
        weakly_active: ``(*batch,)`` int64, number of constraints with s = lam = 0 (bounds included).
        dependent: ``(*batch,)`` int64, the number of active rows less their rank.
        certificate: a proof that there is no solution, as in `diffopt.Solution`, or ``None``.
        recipe: the call that made it.

    The point satisfies the conditions up to rounding, so x is the exact answer of the rounded data up
    to about eps times the condition number.
    """

    Q: Tensor | None
    q: Tensor
    A: Tensor | None
    b: Tensor | None
    G: Tensor | None
    h: Tensor | None
    lower: Tensor | None
    upper: Tensor | None
    x: Tensor
    nu: Tensor
    lam: Tensor
    lam_lower: Tensor
    lam_upper: Tensor
    s: Tensor
    status: Tensor
    weakly_active: Tensor
    dependent: Tensor
    certificate: Certificate | None
    recipe: str

    @property
    def batch_shape(self) -> torch.Size:
        """The batch shape."""
        return self.status.shape

    def arguments(self) -> dict[str, Any]:
        """Return the data by name, a tensor or ``None`` each: ``diffopt.solve_qp(**problem.arguments())``."""
        return {name: getattr(self, name) for name in _DATA}

    def instances(self) -> list[KnownProblem]:
        """Return the instances of the batch, each as a problem without batch dimensions."""
        count = self.batch_shape.numel()

        def split(value: Tensor | None, dims: int) -> list[Any]:
            if value is None:
                return [None] * count
            core = value.shape[value.dim() - dims :]
            return list(value.expand((*self.batch_shape, *core)).reshape(count, *core))

        named = {name: split(getattr(self, name), _DIMS.get(name, 1)) for name in (*_DATA, *_POINT, *_FLAGS)}
        proofs = [split(value, 1) for value in self.certificate or ()]
        return [
            KnownProblem(
                **{name: values[i] for name, values in named.items()},
                certificate=Certificate(*(proof[i] for proof in proofs)) if proofs else None,
                recipe=f"{self.recipe}.instances()[{i}]",
            )
            for i in range(count)
        ]

    def __repr__(self) -> str:
        return f"KnownProblem from {self.recipe}"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Print the recipe for Hypothesis and IPython, which would list all numbers otherwise."""
        printer.text(repr(self))


def quadratic_program(
    seed: int,
    n: int,
    p: int = 0,
    m: int = 0,
    *,
    bounds: Bounds = None,
    batch: tuple[int, ...] = (),
    margin: float = 0.1,
    condition: float = 100.0,
    dtype: torch.dtype = torch.float64,
    shared: bool = False,
    singular: bool = False,
) -> KnownProblem:
    """Draw well-posed convex programs: one solution, differentiable, with unique duals.

    Args:
        seed: of all numbers.
        n, p, m: numbers of variables, equalities (p <= n) and inequality rows.
        bounds: which bounds exist: none, all lower, all upper, both, or ``"mixed"`` (each side of
            each variable finite or not at random).
        batch: batch shape.
        margin: smallest s or lam: s + lam >= margin for every row and bound, the data being about 1.
        condition: largest condition number of Q; drawn between 1 and this, evenly in its logarithm.
        dtype: of the data. Drawn in float64 and rounded.
        shared: Q, A and G without batch dimensions; active sets differ within the batch all the same.
        singular: Q of the lowest rank that leaves x unique, n less the number of active constraints
            (with ``shared``, the active set is then the same in the whole batch); else Q is definite.

    Returns:
        A problem in which the rows of A, the active rows of G and the active bounds are at
        most n and have singular values >= `SMALLEST_SINGULAR_VALUE` (LICQ).
    """
    sizes = _Sizes(n, p, m, bounds, margin, condition, dtype, singular=singular)
    return _drawn("quadratic_program", seed, sizes, batch, shared, extra={})


def linear_program(
    seed: int,
    n: int,
    p: int = 0,
    m: int = 0,
    *,
    bounds: Bounds = None,
    batch: tuple[int, ...] = (),
    margin: float = 0.1,
    dtype: torch.dtype = torch.float64,
    shared: bool = False,
) -> KnownProblem:
    """Draw linear programs (Q is ``None``) whose one solution is a nondegenerate vertex.

    Arguments as in `quadratic_program`; without bounds, p + m >= n is needed. Exactly n rows and bounds
    are active, with multipliers >= margin and singular values >= `SMALLEST_SINGULAR_VALUE`: x and the
    duals are unique, and x does not move with q.
    """
    _require(bool(bounds) or p + m >= n, f"{p + m} rows and no bounds", f"at least n = {n} rows, or bounds")
    sizes = _Sizes(n, p, m, bounds, margin, 1.0, dtype, linear=True, vertex=True)
    return _drawn("linear_program", seed, sizes, batch, shared, extra={})


def degenerate_program(
    seed: int,
    n: int,
    p: int = 0,
    m: int = 0,
    *,
    weak: int = 1,
    bounds: Bounds = None,
    batch: tuple[int, ...] = (),
    margin: float = 0.1,
    condition: float = 100.0,
    dtype: torch.dtype = torch.float64,
    shared: bool = False,
) -> KnownProblem:
    """Draw programs at a kink: ``weak`` rows or bounds have s = 0 and lam = 0.

    Other arguments as in `quadratic_program`; ``weak`` is at most n - p and at most the number of rows
    of G and bounded variables. x and the duals are unique and ``weakly_active`` is ``weak``; x has
    one-sided derivatives only.
    """
    sizes = _Sizes(n, p, m, bounds, margin, condition, dtype, weak=weak)
    return _drawn("degenerate_program", seed, sizes, batch, shared, extra={"weak": weak})


def redundant_program(
    seed: int,
    n: int,
    p: int = 0,
    m: int = 0,
    *,
    extra_p: int = 0,
    extra_m: int = 0,
    bounds: Bounds = None,
    batch: tuple[int, ...] = (),
    margin: float = 0.1,
    condition: float = 100.0,
    dtype: torch.dtype = torch.float64,
) -> KnownProblem:
    """Draw programs in which ``extra_p`` equalities and ``extra_m`` inequalities repeat others.

    Other arguments as in `quadratic_program`, which makes the first p and m rows. The repeated ones
    follow, each another row times a power of two (so exactly parallel), for equalities its negative
    too; active rows are repeated where an instance has some. x is unique, the duals are not (the stated
    ones divide each multiplier equally); ``dependent`` counts the surplus active rows.
    """
    _require(extra_p == 0 or p > 0, f"extra_p = {extra_p} with p = 0", "an equality to repeat")
    _require(extra_m == 0 or m > 0, f"extra_m = {extra_m} with m = 0", "an inequality to repeat")
    sizes = _Sizes(n, p, m, bounds, margin, condition, dtype)
    return _drawn(
        "redundant_program", seed, sizes, batch, False, {"extra_p": extra_p, "extra_m": extra_m},
        lambda draw, instance: _repeated(draw, instance, extra_p, extra_m),
    )  # fmt: skip


def badly_scaled_program(
    seed: int,
    n: int,
    p: int = 0,
    m: int = 0,
    *,
    decades: float = 4.0,
    bounds: Bounds = None,
    batch: tuple[int, ...] = (),
    margin: float = 0.1,
    condition: float = 100.0,
    dtype: torch.dtype = torch.float64,
) -> KnownProblem:
    """Draw programs whose rows, variables and objective are in wildly different units.

    Other arguments as in `quadratic_program`. Each row of A and G, each variable and the objective is
    multiplied by its own power of two between 10**-decades and 10**decades: the stated answer is as exact
    as before, and the margin and the condition number hold in the units of before.
    """
    sizes = _Sizes(n, p, m, bounds, margin, condition, dtype)
    return _drawn(
        "badly_scaled_program", seed, sizes, batch, False, {"decades": decades},
        lambda draw, instance: _rescaled(draw, instance, decades),
    )  # fmt: skip


def infeasible_program(
    seed: int,
    n: int,
    p: int = 0,
    m: int = 0,
    *,
    kind: Infeasibility = "rows",
    bounds: Bounds = None,
    batch: tuple[int, ...] = (),
    violation: float = 0.5,
    dtype: torch.dtype = torch.float64,
) -> KnownProblem:
    """Draw strictly convex programs that no x satisfies, with the proof.

    Args:
        kind: what contradicts itself: ``"rows"`` (a row of G against the other rows, the equalities and
            the bounds; m >= 1), ``"equalities"`` (p >= 2), ``"bounds"`` (lower > upper for one
            variable, whatever ``bounds`` says).
        violation: how far from feasible: multipliers of size about 1 add up to a contradiction of
            this size. Multipliers of the certificate, normalised to -1, are about 1 / violation.
        seed, n, p, m, bounds, batch, dtype: as in `quadratic_program`; p may exceed n.

    Returns:
        A problem of status PRIMAL_INFEASIBLE with its Farkas certificate; x and the duals are NaN.
    """
    _require(kind in ("rows", "equalities", "bounds"), f"kind = {kind!r}", "'rows', 'equalities' or 'bounds'")
    _require(kind != "rows" or m >= 1, f"kind 'rows' with m = {m}", "m >= 1")
    _require(kind != "equalities" or p >= 2, f"kind 'equalities' with p = {p}", "p >= 2")
    _require(violation > 0, f"violation = {violation}", "a positive number")
    draw = _Draw(seed)
    sizes = _Sizes(n, p, m, bounds, 0.1, 100.0, dtype)
    rows = [_infeasible(draw, sizes, kind, violation) for _ in range(max(1, math.prod(batch)))]
    recipe = _recipe("infeasible_program", seed, sizes, batch, {"kind": kind, "violation": violation})
    return _stack(rows, batch, recipe, dtype)


def unbounded_program(
    seed: int,
    n: int,
    p: int = 0,
    m: int = 0,
    *,
    linear: bool = False,
    bounds: Bounds = None,
    batch: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float64,
) -> KnownProblem:
    """Draw feasible programs whose objective falls without end along a known direction d.

    Args:
        linear: no Q; otherwise Q is singular along d and only there.
        bounds: as in `quadratic_program`, but infinite on every side that d would cross.
        seed, n, p, m, batch, dtype: as in `quadratic_program`, with p <= n - 1.

    Returns:
        A problem of status DUAL_INFEASIBLE; ``certificate.x`` is d, with q'd = -1, Qd = 0, Ad = 0 and
        Gd <= 0; x and the duals are NaN.
    """
    _require(0 <= p <= n - 1, f"p = {p} equalities and n = {n} variables", "0 <= p <= n - 1")
    draw = _Draw(seed)
    sizes = _Sizes(n, p, m, bounds, 0.1, 100.0, dtype, linear=linear)
    rows = [_unbounded(draw, sizes) for _ in range(max(1, math.prod(batch)))]
    return _stack(rows, batch, _recipe("unbounded_program", seed, sizes, batch, {"linear": linear}), dtype)


class _Draw:
    """Random numbers from one seed, in float64."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def integer(self, low: int, high: int) -> int:
        """Return a whole number between low and high, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def subset(self, total: int, count: int) -> Tensor:
        """Return ``count`` different numbers below ``total``, in random order."""
        return torch.randperm(total, generator=self.generator)[:count]

    def coin(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator) < 0.5

    def orthonormal(self, n: int, columns: int) -> Tensor:
        """Return n x columns with orthonormal columns (columns <= n)."""
        return torch.linalg.qr(self.normal(n, columns)).Q

    def definite(self, n: int, condition: float) -> Tensor:
        """Return a symmetric n x n matrix with eigenvalues in [1 / condition, 1]."""
        return _symmetric(self.orthonormal(n, n), self.eigenvalues(n, condition))

    def eigenvalues(self, count: int, condition: float) -> Tensor:
        # The condition number is drawn evenly in its logarithm; where count >= 2 it is attained.
        span = math.log(condition) * float(self.uniform(0, 1))
        exponents = self.uniform(0, 1, count)
        exponents[:2] = torch.tensor([0.0, 1.0], dtype=torch.float64)[:count]
        return torch.exp(-span * exponents)


@dataclass(frozen=True)
class _Sizes:
    """What to draw; the fields are arguments of `quadratic_program` and its siblings."""

    n: int
    p: int
    m: int
    bounds: Bounds
    margin: float
    condition: float
    dtype: torch.dtype
    singular: bool = False
    linear: bool = False
    weak: int = 0
    vertex: bool = False  # exactly n active constraints

    @property
    def need(self) -> int:
        """How many inequalities and bounds must be able to be active together."""
        return self.n - self.p if self.vertex else self.weak


@dataclass(frozen=True)
class _Candidates:
    """Constraints of which any subset may be active: see `_candidates`."""

    A: Tensor
    G: Tensor
    rows: Tensor  # indices of rows of G
    coordinates: Tensor  # indices of bounded variables

    def __len__(self) -> int:
        return len(self.rows) + len(self.coordinates)


def _drawn(
    name: str,
    seed: int,
    sizes: _Sizes,
    batch: tuple[int, ...],
    shared: bool,
    extra: dict[str, Any],
    change: Callable[[_Draw, KnownProblem], KnownProblem] | None = None,
) -> KnownProblem:
    n, p, m, weak = sizes.n, sizes.p, sizes.m, sizes.weak
    _require(0 <= p <= n and m >= 0, f"n = {n}, p = {p}, m = {m}", "0 <= p <= n and m >= 0")
    _require(sizes.bounds in BOUNDS, f"bounds = {sizes.bounds!r}", f"one of {BOUNDS}")
    limits = f"margin = {sizes.margin}, condition = {sizes.condition}"
    _require(sizes.margin >= 0 and sizes.condition >= 1, limits, "margin >= 0 and condition >= 1")
    possible = min(n - p, m + (n if sizes.bounds else 0))
    _require(0 <= weak <= possible, f"weak = {weak}", f"at most {possible} for these sizes")
    draw, count = _Draw(seed), max(1, math.prod(batch))
    if shared:
        common = _candidates(draw, sizes)
        everything = sizes.vertex or sizes.singular
        Q = _instance(draw, sizes, common, everything).Q
        rows = [_instance(draw, sizes, common, everything, Q) for _ in range(count)]
    else:
        rows = [_instance(draw, sizes, _candidates(draw, sizes), sizes.vertex) for _ in range(count)]
    if change is not None:
        rows = [change(draw, row) for row in rows]
    extra = extra | {"shared": True} if shared else extra
    return _stack(rows, batch, _recipe(name, seed, sizes, batch, extra), sizes.dtype, shared)


def _candidates(draw: _Draw, sizes: _Sizes) -> _Candidates:
    """Draw A and G, and the rows and bounds of which any subset may be active.

    Let N be the variables whose bounds may not be active and B the others. The candidate rows are
    [R_B, R_N], the candidate bounds [I, 0]. R_N has singular values in [1/2, 2] and |R_B| <= 1, so for
    weights (y, z) of length 1 with t = |y|, the squared length of the combination is at least
    (t/2)^2 + max(0, sqrt(1 - t^2) - t)^2 >= 0.34^2. A subset of the rows has no smaller singular value.
    """
    n, p, m = sizes.n, sizes.p, sizes.m
    room = n - p
    count = draw.integer(max(0, sizes.need - m), room) if sizes.bounds else 0
    coordinates, rows = draw.subset(n, count), draw.subset(m, min(m, room - count))
    k = p + len(rows)
    free = torch.ones(n, dtype=torch.bool)
    free[coordinates] = False
    candidates = torch.zeros(k, n, dtype=torch.float64)
    candidates[:, free] = draw.orthonormal(k, k) * draw.uniform(0.5, 2.0, k) @ draw.orthonormal(n - count, k).mT
    rest = draw.normal(k, count)
    candidates[:, ~free] = rest / torch.linalg.matrix_norm(rest, ord=2).clamp_min(1.0) if rest.numel() else rest
    G = draw.normal(m, n) / math.sqrt(n)
    G[rows] = candidates[p:]
    return _Candidates(candidates[:p], G, rows, coordinates)


def _instance(
    draw: _Draw, sizes: _Sizes, candidates: _Candidates, everything: bool, Q: Tensor | None = None
) -> KnownProblem:
    """Draw the point and its active set (all candidates if ``everything``), then Q, q, b, h and bounds."""
    n, m, margin, bounds = sizes.n, sizes.m, sizes.margin, sizes.bounds

    def rounded(tensor: Tensor) -> Tensor:
        return tensor.to(sizes.dtype).double()

    A, G = rounded(candidates.A), rounded(candidates.G)
    x, nu = rounded(draw.normal(n)), rounded(draw.normal(sizes.p))
    lam, s = torch.zeros(m, dtype=torch.float64), margin + draw.uniform(0, 2, m)
    lam_lower, lam_upper = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    below, above = margin + draw.uniform(0, 2, n), margin + draw.uniform(0, 2, n)
    if bounds in ("upper", "mixed"):
        below[draw.coin(n) if bounds == "mixed" else slice(None)] = torch.inf
    if bounds in ("lower", "mixed"):
        above[draw.coin(n) if bounds == "mixed" else slice(None)] = torch.inf

    total = len(candidates)
    chosen = draw.subset(total, total if everything else draw.integer(sizes.weak, total)).tolist()
    multipliers = rounded(margin + draw.uniform(0, 2, len(chosen)))
    multipliers[: sizes.weak] = 0.0
    active = [A]
    for index, multiplier in zip(chosen, multipliers, strict=True):
        if index < len(candidates.rows):
            row = candidates.rows[index]
            lam[row], s[row] = multiplier, 0.0
            active.append(G[row, None])
            continue
        coordinate = candidates.coordinates[index - len(candidates.rows)]
        active.append(torch.eye(n, dtype=torch.float64)[coordinate, None])
        if bounds == "lower" or (bounds != "upper" and bool(draw.coin())):
            lam_lower[coordinate], below[coordinate] = multiplier, 0.0
        else:
            lam_upper[coordinate], above[coordinate] = multiplier, 0.0
    if sizes.linear:
        Q = torch.zeros(n, n, dtype=torch.float64)
    elif Q is None:
        Q = rounded(_singular(draw, torch.cat(active), sizes) if sizes.singular else draw.definite(n, sizes.condition))

    # Stationarity: Qx + q + A'nu + G'lam - lam_lower + lam_upper = 0.
    q = -(Q @ x + A.mT @ nu + G.mT @ lam - lam_lower + lam_upper)
    return KnownProblem(
        Q=None if sizes.linear else Q, q=q, A=A, b=A @ x, G=G, h=G @ x + s,
        lower=x - below if bounds else None, upper=x + above if bounds else None,
        x=x, nu=nu, lam=lam, lam_lower=lam_lower, lam_upper=lam_upper, s=s,
        status=torch.tensor(int(Status.SOLVED)), weakly_active=torch.tensor(sizes.weak),
        dependent=torch.tensor(0), certificate=None, recipe="",
    )  # fmt: skip


def _singular(draw: _Draw, active: Tensor, sizes: _Sizes) -> Tensor:
    """Return Q of rank n - k that is definite on the null space of the k active rows."""
    k = active.shape[0]
    basis = torch.linalg.qr(active.mT, mode="complete").Q
    span, null = basis[:, :k], basis[:, k:]
    # The factor null + span C has null'(null + span C) = I: Q restricted to the null space is diagonal.
    factor = null + 0.5 * span @ draw.normal(k, sizes.n - k)
    return _symmetric(factor, draw.eigenvalues(sizes.n - k, sizes.condition))


def _repeated(draw: _Draw, base: KnownProblem, extra_p: int, extra_m: int) -> KnownProblem:
    assert base.A is not None and base.b is not None and base.G is not None and base.h is not None
    p, m = base.A.shape[0], base.G.shape[0]
    of = torch.tensor([draw.integer(0, p - 1) for _ in range(extra_p)], dtype=torch.int64)
    factor = 2.0 ** torch.tensor([draw.integer(-1, 1) for _ in range(extra_p)], dtype=torch.float64)
    factor = torch.where(draw.coin(extra_p), factor, -factor)
    A, b, nu = _append(base.A, base.b, base.nu, of, factor)

    active = base.lam.nonzero().flatten()
    pool = active if len(active) else torch.arange(m)
    of = torch.tensor([int(pool[draw.integer(0, len(pool) - 1)]) for _ in range(extra_m)], dtype=torch.int64)
    factor = 2.0 ** torch.tensor([draw.integer(-1, 1) for _ in range(extra_m)], dtype=torch.float64)
    G, h, lam = _append(base.G, base.h, base.lam, of, factor)
    surplus = extra_p + (extra_m if len(active) else 0)
    return replace(
        base, A=A, b=b, nu=nu, G=G, h=h, lam=lam, s=torch.cat([base.s, factor * base.s[of]]),
        dependent=torch.tensor(surplus),
    )  # fmt: skip


def _append(matrix: Tensor, side: Tensor, dual: Tensor, of: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Append ``factor`` times the rows ``of``, and divide each multiplier equally among the copies."""
    copies = torch.ones_like(dual).index_add(0, of, torch.ones_like(factor))
    share = dual / copies
    return (
        torch.cat([matrix, factor[:, None] * matrix[of]]),
        torch.cat([side, factor * side[of]]),
        torch.cat([share, share[of] / factor]),
    )


def _rescaled(draw: _Draw, base: KnownProblem, decades: float) -> KnownProblem:
    """Substitute x = d * y, multiply the rows by a and g and the objective by c, all powers of two."""
    assert base.Q is not None
    assert base.A is not None and base.b is not None and base.G is not None and base.h is not None

    def powers(*shape: int) -> Tensor:
        return 2.0 ** (math.log2(10.0) * draw.uniform(-decades, decades, *shape)).round()

    d, a, g, c = powers(base.q.shape[0]), powers(base.b.shape[0]), powers(base.h.shape[0]), powers()
    return replace(
        base,
        Q=c * d[:, None] * base.Q * d, q=c * d * base.q,
        A=a[:, None] * base.A * d, b=a * base.b, G=g[:, None] * base.G * d, h=g * base.h,
        lower=None if base.lower is None else base.lower / d, upper=None if base.upper is None else base.upper / d,
        x=base.x / d, s=g * base.s, nu=c * base.nu / a, lam=c * base.lam / g,
        lam_lower=c * d * base.lam_lower, lam_upper=c * d * base.lam_upper,
    )  # fmt: skip


def _infeasible(draw: _Draw, sizes: _Sizes, kind: Infeasibility, violation: float) -> KnownProblem:
    n, p, m = sizes.n, sizes.p, sizes.m
    A, b = draw.normal(p, n) / math.sqrt(n), draw.normal(p)
    G, h = draw.normal(m, n) / math.sqrt(n), draw.normal(m)
    lower, upper = _loose_bounds(draw, draw.normal(n), sizes)
    nu, lam = torch.zeros(p, dtype=torch.float64), torch.zeros(m, dtype=torch.float64)
    lam_lower, lam_upper = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    if kind == "bounds":
        i, middle = draw.integer(0, n - 1), draw.uniform(-1, 1)
        lower[i], upper[i] = middle + violation, middle
        lam_lower[i] = lam_upper[i] = 1.0
    elif kind == "equalities":
        # The last equality is minus a combination of the others, but its right side is not.
        nu = torch.cat([draw.normal(p - 1), torch.ones(1, dtype=torch.float64)])
        A[-1] = -(A[:-1].mT @ nu[:-1])
        b[-1] = -violation - b[:-1] @ nu[:-1]
    else:
        # So is one row of G, of a combination of everything else.
        r = draw.integer(0, m - 1)
        nu, lam = draw.normal(p) * draw.coin(p), draw.uniform(0.1, 1, m) * draw.coin(m)
        lam[r] = 0.0
        lam_lower = draw.uniform(0.1, 1, n) * (draw.coin(n) & lower.isfinite())
        lam_upper = draw.uniform(0.1, 1, n) * (draw.coin(n) & upper.isfinite())
        G[r] = -(A.mT @ nu + G.mT @ lam - lam_lower + lam_upper)
        h[r] = -violation - (b @ nu + h @ lam - _finite(lower) @ lam_lower + _finite(upper) @ lam_upper)
        lam[r] = 1.0
    absent = torch.full((n,), torch.nan, dtype=torch.float64)
    proof = Certificate(absent, *(v / violation for v in (nu, lam, lam_lower, lam_upper)))
    bounded = bool(sizes.bounds) or kind == "bounds"
    return _without_answer(
        draw.definite(n, sizes.condition), draw.normal(n), A, b, G, h,
        lower if bounded else None, upper if bounded else None, Status.PRIMAL_INFEASIBLE, proof,
    )  # fmt: skip


def _unbounded(draw: _Draw, sizes: _Sizes) -> KnownProblem:
    n, p, m = sizes.n, sizes.p, sizes.m
    direction = draw.normal(n)
    unit = direction / direction.norm()
    project = torch.eye(n, dtype=torch.float64) - torch.outer(unit, unit)
    x = draw.normal(n)
    lower, upper = _loose_bounds(draw, x, sizes)
    lower = torch.where(direction < 0, -torch.inf, lower)
    upper = torch.where(direction > 0, torch.inf, upper)
    A = draw.normal(p, n) / math.sqrt(n) @ project
    # About half of the rows of G fall along d, the others do not change.
    descent = draw.uniform(0.1, 1, m) * draw.coin(m)
    G = draw.normal(m, n) / math.sqrt(n) @ project - torch.outer(descent, unit)
    h = G @ x + draw.uniform(0.1, 1, m)
    q = project @ draw.normal(n) - unit / direction.norm()  # q'd = -1
    Q = None
    if not sizes.linear:
        Q = project @ draw.definite(n, sizes.condition) @ project
        Q = 0.5 * (Q + Q.mT)
    absent = (torch.full((k,), torch.nan, dtype=torch.float64) for k in (p, m, n, n))
    return _without_answer(
        Q, q, A, A @ x, G, h, lower if sizes.bounds else None, upper if sizes.bounds else None,
        Status.DUAL_INFEASIBLE, Certificate(direction, *absent),
    )  # fmt: skip


def _loose_bounds(draw: _Draw, x: Tensor, sizes: _Sizes) -> tuple[Tensor, Tensor]:
    """Return bounds at some distance around x, on the sides that ``sizes.bounds`` names."""
    n, limits = sizes.n, []
    for side, sign in (("lower", -1.0), ("upper", 1.0)):
        finite = draw.coin(n) if sizes.bounds == "mixed" else torch.full((n,), sizes.bounds in (side, "both"))
        limits.append(x + sign * torch.where(finite, draw.uniform(0.1, 2, n), torch.inf))
    return limits[0], limits[1]


def _without_answer(
    Q: Tensor | None, q: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor,
    lower: Tensor | None, upper: Tensor | None, status: Status, certificate: Certificate,
) -> KnownProblem:  # fmt: skip
    point = {name: torch.full_like(like, torch.nan) for name, like in zip(_POINT, (q, b, h, q, q, h), strict=True)}
    return KnownProblem(
        Q=Q, q=q, A=A, b=b, G=G, h=h, lower=lower, upper=upper, **point, status=torch.tensor(int(status)),
        weakly_active=torch.tensor(0), dependent=torch.tensor(0), certificate=certificate, recipe="",
    )  # fmt: skip


def _stack(
    rows: list[KnownProblem], batch: tuple[int, ...], recipe: str, dtype: torch.dtype, shared: bool = False
) -> KnownProblem:
    """Join instances into a batch (an empty one keeps the sizes of its one row)."""

    def joined(values: list[Tensor | None]) -> Any:
        tensors = [value for value in values if value is not None]
        if not tensors:
            return None
        return torch.stack(tensors)[: math.prod(batch)].reshape((*batch, *tensors[0].shape))

    fields: dict[str, Any] = {}
    for name in (*_DATA, *_POINT):
        one = shared and name in ("Q", "A", "G")
        value = getattr(rows[0], name) if one else joined([getattr(row, name) for row in rows])
        fields[name] = None if value is None else value.to(dtype)
    for name in _FLAGS:
        fields[name] = joined([getattr(row, name) for row in rows])
    for matrix, side in (("A", "b"), ("G", "h")):
        if fields[side].shape[-1] == 0:
            fields[matrix] = fields[side] = None
    proofs = [row.certificate for row in rows if row.certificate is not None]
    certificate = Certificate(*(joined(list(v)).to(dtype) for v in zip(*proofs, strict=True))) if proofs else None
    fields["status"] = fields["status"].to(torch.int8)
    return KnownProblem(**fields, certificate=certificate, recipe=recipe)


def _symmetric(factor: Tensor, eigenvalues: Tensor) -> Tensor:
    product = factor * eigenvalues @ factor.mT
    return 0.5 * (product + product.mT)


def _finite(vector: Tensor) -> Tensor:
    return torch.where(vector.isfinite(), vector, 0.0)


def _require(condition: bool, got: str, expected: str) -> None:
    if not condition:
        raise ParameterError(f"Cannot draw such a problem: got {got}. Expected {expected}.")


def _recipe(name: str, seed: int, sizes: _Sizes, batch: tuple[int, ...], extra: dict[str, Any]) -> str:
    """Return the call that makes the problem, without arguments that have their defaults."""
    defaults = {"bounds": None, "margin": 0.1, "condition": 100.0, "dtype": torch.float64, "singular": False}
    if name == "linear_program":
        defaults["condition"] = 1.0
    options = {key: getattr(sizes, key) for key in defaults if getattr(sizes, key) != defaults[key]}
    options |= ({"batch": batch} if batch else {}) | extra
    listed = "".join(f", {key}={value!r}" for key, value in options.items())
    return f"diffopt.check.known.{name}({seed}, n={sizes.n}, p={sizes.p}, m={sizes.m}{listed})"
