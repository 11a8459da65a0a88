"""Families of hard problems whose outcome is known: what is solved, what has no solution, what is refused.

A family draws a batch for a seed and sizes, built backwards from its answer (`diffopt.check.known`), so that the truth
about it is known without a solver. `test_hard_families.py` runs each on each executor and keeps the table of
`docs/accuracy.md`; `hard.py` runs random instances of all of them by the hundred thousand.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt import Diagonal, Status
from diffopt.check import known
from diffopt.check.known import BOUNDS, Bounds, KnownProblem

f64 = torch.float64


class Sizes(NamedTuple):
    """What to draw: a seed, numbers of variables, equalities and rows, which bounds, and how many instances.

    A family that needs more (an equality to repeat, say) takes the least that will do.
    """

    seed: int
    n: int
    p: int
    m: int
    bounds: Bounds
    count: int

    def generator(self) -> torch.Generator:
        """Return a source of numbers for what the family adds to a known problem."""
        return torch.Generator().manual_seed(self.seed + 1)


def random_sizes(seed: int, count: int) -> Sizes:
    """Return sizes drawn from a seed: mostly up to 8 variables, now and then up to 30."""
    draw = random.Random(seed)
    n = draw.randint(1, 8) if draw.random() < 0.95 else draw.randint(9, 30)
    p, m = draw.randint(0, min(n, 3)), draw.choice((0, n // 2, n, n + 3, 2 * n + 1))
    return Sizes(seed, n, p, m, draw.choice(BOUNDS), count)


class Drawn(NamedTuple):
    """A batch and the truth about it.

    Attributes:
        data: arguments of `diffopt.solve_qp`, each with the batch dimension in front.
        status: how every instance must end.
        x: ``(count, n)``, a minimiser, where there is one.
        unique: x is the only one.
        held: ``(count, k, n)``, the rows at which x stays while q changes a little, bounds and equalities too (zeros
            are no row); ``None`` where the derivative of x is not compared.
        dependent: ``(count,)``, how many rows too many are held, where that is compared.
    """

    data: dict[str, Any]
    status: Status = Status.SOLVED
    x: Tensor | None = None
    unique: bool = True
    held: Tensor | None = None
    dependent: Tensor | None = None


class Family(NamedTuple):
    """A family of hard problems.

    Attributes:
        name: as in the table.
        error: the largest that the table may show (and from 1e-6 on `hard.py` too), of x where it is unique (else of
            the optimal value), relative, or of a certificate (`claims.py`; the library claims at 1e-8).
        slope: the largest error of a gradient, relative.
        faults: by their names in `mutations.py`, those that take out what handles this family. `make mutations` sees to
            it that the tests of the family fail then.
    """

    name: str
    draw: Callable[[Sizes], Drawn]
    error: float = 1e-9
    slope: float = 1e-9
    faults: tuple[str, ...] = ()


def solved(problem: KnownProblem, unique: bool = True, **changes: Any) -> Drawn:
    """Return a known problem, with some of its data changed in ways that leave x what it is."""
    data = problem.arguments() | changes
    return Drawn(data, Status.SOLVED, problem.x, unique, held(problem, data) if unique else None)


def held(problem: KnownProblem, data: dict[str, Any]) -> Tensor:
    """Return the equalities, the rows and bounds with multipliers, and the bounds of fixed variables."""
    at_bound = problem.lam_lower + problem.lam_upper > 0
    if data["lower"] is not None and data["upper"] is not None:
        at_bound = at_bound | (data["lower"] == data["upper"])
    rows = [] if problem.A is None else [problem.A]
    if problem.G is not None:
        rows.append(problem.G * (problem.lam > 0).unsqueeze(-1))
    return torch.cat([*rows, torch.diag_embed(at_bound.double())], -2)


def ordinary(s: Sizes, p: int = 0, m: int = 0, **options: Any) -> KnownProblem:
    """Return strictly convex problems with at least p equalities and m rows."""
    options = {"bounds": s.bounds, "batch": (s.count,)} | options
    return known.quadratic_program(s.seed, s.n, min(max(s.p, p), s.n), max(s.m, m), **options)


def rebuilt(problem: KnownProblem, **matrices: Any) -> KnownProblem:
    """Return the problem with other matrices or multipliers, and q, b, h set so that its point is optimal again."""
    new = replace(problem, **matrices)
    slope = new.lam_upper - new.lam_lower
    if new.Q is not None:
        slope = slope + times(new.Q, new.x)
    if new.A is not None:
        slope, new = slope + times(new.A.mT, new.nu), replace(new, b=times(new.A, new.x))
    if new.G is not None:
        slope, new = slope + times(new.G.mT, new.lam), replace(new, h=times(new.G, new.x) + new.s)
    return replace(new, q=-slope)


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def normal(s: Sizes, *shape: int) -> Tensor:
    return torch.randn(s.count, *shape, generator=s.generator(), dtype=f64)


def powers(s: Sizes, decades: float, *shape: int) -> Tensor:
    """Return powers of two (which round nothing) between 10**-decades and 10**decades."""
    exponents = (2 * torch.rand(s.count, *shape, generator=s.generator(), dtype=f64) - 1) * decades
    return torch.exp2((math.log2(10.0) * exponents).round())


# ---- equalities ------------------------------------------------------------------------------------------------------


def equalities_repeated(s: Sizes) -> Drawn:
    sizes = (min(max(s.p, 1), s.n), s.m)
    return solved(known.redundant_program(s.seed, s.n, *sizes, extra_p=2, bounds=s.bounds, batch=(s.count,)))


def equalities_rank_deficient(s: Sizes) -> Drawn:
    problem = ordinary(s, p=1)
    assert problem.A is not None and problem.b is not None
    mix = normal(s, 2, problem.A.shape[-2])
    A, b = torch.cat([problem.A, mix @ problem.A], -2), torch.cat([problem.b, times(mix, problem.b)], -1)
    return solved(problem, A=A, b=b)


def equalities_inconsistent(s: Sizes) -> Drawn:
    return infeasible(s, kind="equalities")


def zero_rows(s: Sizes) -> Drawn:
    """0'x = 0 and 0'x <= 0, 1."""
    problem = ordinary(s, p=1, m=1)
    assert problem.A is not None and problem.b is not None and problem.G is not None and problem.h is not None
    A = torch.cat([problem.A, torch.zeros_like(problem.A[:, :1])], -2)
    G = torch.cat([problem.G, torch.zeros(s.count, 2, s.n, dtype=f64)], -2)
    h = torch.cat([problem.h, torch.tensor([0.0, 1.0], dtype=f64).expand(s.count, 2)], -1)
    return solved(problem, A=A, b=torch.cat([problem.b, torch.zeros(s.count, 1, dtype=f64)], -1), G=G, h=h)


def zero_row_contradicts(s: Sizes) -> Drawn:
    """0'x <= -1, or 0'x = 1."""
    drawn = zero_rows(s)
    if s.seed % 2:
        h = drawn.data["h"].clone()
        h[:, -1] = -1.0
        return Drawn(drawn.data | {"h": h}, Status.PRIMAL_INFEASIBLE)
    b = drawn.data["b"].clone()
    b[:, -1] = 1.0
    return Drawn(drawn.data | {"b": b}, Status.PRIMAL_INFEASIBLE)


# ---- inequalities ----------------------------------------------------------------------------------------------------


def rows_repeated(s: Sizes) -> Drawn:
    sizes = (min(s.p, s.n), max(s.m, 1))
    problem = known.redundant_program(s.seed, s.n, *sizes, extra_m=3, bounds=s.bounds, batch=(s.count,))
    return solved(problem)._replace(dependent=problem.dependent)


def rows_nearly_parallel(s: Sizes) -> Drawn:
    """Each row once more, 1e-6 away, active or not as the first.

    Two so near count as dependent; then x moves as if they were one, which is not its derivative.
    """
    problem = ordinary(s, m=1)
    assert problem.G is not None
    G = torch.cat([problem.G, problem.G + 1e-6 * normal(s, *problem.G.shape[1:])], -2)
    drawn = solved(rebuilt(problem, G=G, lam=problem.lam.repeat(1, 2), s=problem.s.repeat(1, 2)))
    return drawn._replace(held=None, dependent=(problem.lam > 0).sum(-1))


def a_row_nearly_parallel(s: Sizes) -> Drawn:
    """An active row once more, 2e-4 away, active too: its own row, and x moves as both allow."""
    problem = ordinary(s, m=1)
    assert problem.G is not None
    first = problem.G[..., :1, :]
    lam = torch.cat([1 + problem.lam[..., :1], problem.lam[..., 1:], 1 + 0 * problem.lam[..., :1]], -1)
    s_ = torch.cat([0 * problem.s[..., :1], problem.s[..., 1:], 0 * problem.s[..., :1]], -1)
    G = torch.cat([problem.G, first + 2e-4 * normal(s, 1, s.n)], -2)
    drawn = solved(rebuilt(problem, G=G, lam=lam, s=s_))
    assert drawn.held is not None
    many = (drawn.held != 0).any(-1).sum(-1) - s.n  # (more rows than variables are too many, however they lie)
    return drawn._replace(dependent=many.clamp_min(0))


def pairs_without_interior(s: Sizes) -> Drawn:
    """Each equality as two rows, a'x <= b and -a'x <= -b."""
    return slab(s, 0.0)._replace(dependent=torch.full((s.count,), min(max(s.p, 1), s.n)))


def pairs_nearly_without_interior(s: Sizes) -> Drawn:
    """b - 1e-6 <= a'x <= b, on the side that its multiplier says."""
    return slab(s, 1e-6)


def slab(s: Sizes, width: float) -> Drawn:
    problem = ordinary(s, p=1)
    A, b = problem.A, problem.b
    assert A is not None and b is not None
    rows, sides = [A, -A], [b + width * (problem.nu < 0), -b + width * (problem.nu >= 0)]
    if problem.G is not None and problem.h is not None:
        rows, sides = [problem.G, *rows], [problem.h, *sides]
    return solved(problem, A=None, b=None, G=torch.cat(rows, -2), h=torch.cat(sides, -1))


def no_interior_by_bounds(s: Sizes) -> Drawn:
    """x >= 0 and sum x = 0: x = 0, where every bound is active."""
    problem = known.quadratic_program(s.seed, s.n, batch=(s.count,))
    A, b = torch.ones(s.count, 1, s.n, dtype=f64), torch.zeros(s.count, 1, dtype=f64)
    zero = torch.zeros(s.count, s.n, dtype=f64)
    return Drawn(
        {"Q": problem.Q, "q": problem.q, "A": A, "b": b, "lower": zero},
        Status.SOLVED,
        zero,
        held=torch.diag_embed(1 - zero),
    )


def many_rows(s: Sizes) -> Drawn:
    return solved(ordinary(s, m=6 * s.n + 5))


def weakly_active(s: Sizes) -> Drawn:
    p, m = min(s.p, s.n - 1), max(s.m, 1)
    return solved(known.degenerate_program(s.seed, s.n, p, m, weak=1, bounds=s.bounds, batch=(s.count,)))


def nearly_weakly_active(s: Sizes) -> Drawn:
    """Slacks and multipliers of any size down to 1e-9. (Up to 1e-7 a multiplier counts as none.)"""
    problem = ordinary(s, m=1)
    shrink = 10.0 ** (-9 * torch.rand(problem.lam.shape, generator=s.generator(), dtype=f64))
    problem = rebuilt(problem, lam=problem.lam * shrink, s=problem.s * shrink)
    clear = replace(problem, lam=torch.where(problem.lam > 1e-7, problem.lam, 0.0))
    return solved(problem)._replace(held=held(clear, problem.arguments()))


def far_sides(s: Sizes) -> Drawn:
    """Sides of 1e20, 1e25, 1e30 and infinity that nobody meets."""
    problem = ordinary(s, m=1)
    assert problem.G is not None and problem.h is not None
    far = torch.tensor([1e20, 1e25, 1e30, torch.inf], dtype=f64)
    G = torch.cat([problem.G, normal(s, 4, s.n)], -2)
    h = torch.cat([problem.h, far.expand(s.count, 4)], -1)
    absent = torch.full((s.count, s.n), torch.inf, dtype=f64)
    lower = -absent if problem.lower is None else problem.lower
    upper = absent if problem.upper is None else problem.upper
    return solved(problem, G=G, h=h, lower=lower.clamp_min(-1e25), upper=upper.clamp_max(1e30))


def no_constraints(s: Sizes) -> Drawn:
    return solved(known.quadratic_program(s.seed, s.n, batch=(s.count,)))


def one_variable(s: Sizes) -> Drawn:
    return solved(ordinary(s._replace(n=1, p=0)))


# ---- bounds ----------------------------------------------------------------------------------------------------------


def fixed_variables(s: Sizes) -> Drawn:
    """About half of the variables have lower = upper."""
    problem = ordinary(s, bounds="both")
    assert problem.lower is not None and problem.upper is not None
    fixed = torch.rand(problem.x.shape, generator=s.generator()) < 0.5
    fixed[:, 0] = True
    sides = (torch.where(fixed, problem.x, side) for side in (problem.lower, problem.upper))
    lower, upper = sides
    return solved(problem, lower=lower, upper=upper)


def all_variables_fixed(s: Sizes) -> Drawn:
    problem = ordinary(s)
    return solved(problem, lower=problem.x.clone(), upper=problem.x.clone())


# ---- the Hessian -----------------------------------------------------------------------------------------------------


def hessian_singular(s: Sizes) -> Drawn:
    return solved(ordinary(s, m=1, singular=True))


def hessian_zero(s: Sizes) -> Drawn:
    drawn = vertex(s)
    return drawn._replace(data=drawn.data | {"Q": torch.zeros(s.count, s.n, s.n, dtype=f64)})


def hessian_nonsymmetric(s: Sizes) -> Drawn:
    problem, twist = ordinary(s), normal(s, s.n, s.n)
    assert problem.Q is not None
    return solved(problem, Q=problem.Q + twist - twist.mT)


def hessian_within_rounding_of_convex(s: Sizes) -> Drawn:
    """A singular Hessian less 1e-13 of its size: negative eigenvalues that are rounding errors."""
    problem = ordinary(s, m=1, singular=True)
    assert problem.Q is not None
    size = problem.Q.abs().amax((-1, -2), keepdim=True)
    return solved(rebuilt(problem, Q=problem.Q - 1e-13 * size * torch.eye(s.n, dtype=f64)))


def hessian_indefinite(s: Sizes) -> Drawn:
    """One eigenvalue between -1 and -1e-4, the others up to 1, within a box."""
    problem = known.quadratic_program(s.seed, s.n, batch=(s.count,), bounds="both")
    assert problem.Q is not None
    values, vectors = torch.linalg.eigh(problem.Q)
    values[:, 0] = -(10.0 ** (-4 * torch.rand(s.count, generator=s.generator(), dtype=f64)))
    Q = vectors * values.unsqueeze(-2) @ vectors.mT
    return Drawn(problem.arguments() | {"Q": 0.5 * (Q + Q.mT)}, Status.NUMERICAL_ERROR)


def hessian_ill_conditioned(s: Sizes) -> Drawn:
    """Eigenvalues from 1 to 1e-10."""
    return solved(ordinary(s, condition=1e10))


def hessian_diagonal(s: Sizes) -> Drawn:
    """A diagonal, given as such, with entries between 1e-4 and 1e4."""
    problem, entries = ordinary(s), powers(s, 4.0, s.n)
    return solved(rebuilt(problem, Q=torch.diag_embed(entries)), Q=Diagonal(entries))


# ---- linear programs -------------------------------------------------------------------------------------------------


def vertex(s: Sizes) -> Drawn:
    m = max(s.m, 0 if s.bounds else s.n - s.p)
    return solved(known.linear_program(s.seed, s.n, s.p, m, bounds=s.bounds, batch=(s.count,)))


def soft_equalities(s: Sizes) -> Drawn:
    """Equalities at a price of 1e3 to 1e6, which no x in a box meets: what is missed, up and down, are variables."""
    n, p, g = s.n, max(s.p, 1), s.generator()
    price = 10 ** (3 + 3 * torch.rand(s.count, 1, generator=g, dtype=f64)).expand(-1, p)
    side = torch.randn(s.count, p, generator=g, dtype=f64).sign()
    A, root = normal(s, p, n), normal(s, n, n)
    force = times(A.mT, price * side)  # on x, minus A' nu
    x = force.sign()
    Q = torch.eye(n, dtype=f64) + root @ root.mT / n
    q = 0.5 * force.abs().clamp_max(1.0) * (2 * torch.rand(s.count, n, generator=g, dtype=f64) - 1) - times(Q, x)
    missed = (0.5 + torch.rand(s.count, p, generator=g, dtype=f64)) * side
    up, down = missed.clamp_min(0), (-missed).clamp_min(0)
    one, none = torch.eye(p, dtype=f64).expand(s.count, p, p), torch.zeros(s.count, 2 * p, dtype=f64)
    box = torch.ones(s.count, n, dtype=f64)
    data = {
        "Q": torch.nn.functional.pad(Q, (0, 2 * p, 0, 2 * p)),
        "q": torch.cat([q, price, price], -1),
        "A": torch.cat([A, one, -one], -1),
        "b": times(A, x) + missed,
        "lower": torch.cat([-box, none], -1),
        "upper": torch.cat([box, none + torch.inf], -1),
    }
    return Drawn(data, Status.SOLVED, torch.cat([x, up, down], -1))


def vertex_degenerate(s: Sizes) -> Drawn:
    """Three rows more than variables meet in the vertex."""
    m = max(s.m, s.n)
    problem = known.linear_program(s.seed, s.n, min(s.p, s.n), m, bounds=s.bounds, batch=(s.count,))
    assert problem.G is not None and problem.h is not None
    more = normal(s, 3, s.n)
    return solved(problem, G=torch.cat([problem.G, more], -2), h=torch.cat([problem.h, times(more, problem.x)], -1))


def vertex_of_free_columns(s: Sizes) -> Drawn:
    """No bounds, and no curvature in every second variable."""
    problem = known.linear_program(s.seed, s.n, min(s.p, s.n), max(s.m, s.n), batch=(s.count,))
    entries = torch.arange(s.n, dtype=f64).remainder(2).expand(s.count, s.n)
    return solved(rebuilt(problem, Q=torch.diag_embed(entries)))


def optimal_face(s: Sizes) -> Drawn:
    """A linear program whose minimisers are a face."""
    return solved(rebuilt(ordinary(s), Q=None), unique=False)


def variable_unused(s: Sizes) -> Drawn:
    """One more variable, in no row and without cost."""
    return solved_with_more(s, 0.0)


def assignment(s: Sizes) -> Drawn:
    """Three jobs for three workers at whole costs: a redundant equality, degenerate vertices, often several best."""
    cost = torch.randint(0, 4, (s.count, 9), generator=s.generator()).double()
    A = torch.zeros(6, 9, dtype=f64)
    for job, worker in itertools.product(range(3), range(3)):
        A[job, 3 * job + worker] = A[3 + worker, 3 * job + worker] = 1.0
    ways = torch.stack([torch.eye(3, dtype=f64)[list(order)].flatten() for order in itertools.permutations(range(3))])
    x = ways[(cost @ ways.mT).argmin(-1)]
    data = {"Q": None, "q": cost, "A": A.expand(s.count, 6, 9), "b": torch.ones(s.count, 6, dtype=f64)}
    return Drawn(data | {"lower": torch.zeros(s.count, 9, dtype=f64)}, Status.SOLVED, x, unique=False)


def solved_with_more(s: Sizes, cost: float) -> Drawn:
    """Return an ordinary problem with one more variable, in no row."""
    problem = ordinary(s)
    data = problem.arguments()
    assert problem.Q is not None
    data["Q"] = torch.nn.functional.pad(problem.Q, (0, 1, 0, 1))
    for name, value, dims in (
        ("q", cost, 1),
        ("A", 0.0, 1),
        ("G", 0.0, 1),
        ("lower", -torch.inf, 1),
        ("upper", torch.inf, 1),
    ):
        if data[name] is not None:
            data[name] = torch.nn.functional.pad(data[name], (0, dims), value=value)
    x = torch.nn.functional.pad(problem.x, (0, 1))
    return Drawn(data, Status.SOLVED, x, unique=False) if cost == 0 else Drawn(data, Status.DUAL_INFEASIBLE)


# ---- scales ----------------------------------------------------------------------------------------------------------


def rows_badly_scaled(s: Sizes) -> Drawn:
    problem = ordinary(s, p=1, m=1)
    assert problem.A is not None and problem.b is not None and problem.G is not None and problem.h is not None
    eq, row = powers(s, 8.0, problem.b.shape[-1]), powers(s, 8.0, problem.h.shape[-1])
    A, G = eq.unsqueeze(-1) * problem.A, row.unsqueeze(-1) * problem.G
    return solved(problem, A=A, b=eq * problem.b, G=G, h=row * problem.h)


def columns_badly_scaled(s: Sizes) -> Drawn:
    """Each variable in units of its own."""
    problem, d = ordinary(s), powers(s, 8.0, s.n)
    assert problem.Q is not None
    changes: dict[str, Any] = {"Q": d.unsqueeze(-1) * problem.Q * d.unsqueeze(-2), "q": d * problem.q}
    for name in ("A", "G"):
        matrix = getattr(problem, name)
        changes[name] = None if matrix is None else matrix * d.unsqueeze(-2)
    for name in ("lower", "upper"):
        side = getattr(problem, name)
        changes[name] = None if side is None else side / d
    return solved(problem, **changes)._replace(x=problem.x / d, held=None)


def objective_badly_scaled(s: Sizes) -> Drawn:
    """With a singular Hessian for every other seed."""
    problem, cost = ordinary(s, m=1, singular=s.seed % 2 == 1), powers(s, 8.0, 1)
    assert problem.Q is not None
    return solved(problem, Q=cost.unsqueeze(-1) * problem.Q, q=cost * problem.q)


def everything_badly_scaled(s: Sizes) -> Drawn:
    """Rows, variables and the objective by up to 1e3 either way."""
    sizes, options = (s.p, s.m), {"bounds": s.bounds, "batch": (s.count,)}
    return solved(known.badly_scaled_program(s.seed, s.n, *sizes, decades=3.0, **options))  # type: ignore[arg-type]


def magnified(s: Sizes, drawn: Drawn) -> Drawn:
    """Costs and sides, and so solutions, 1e6 to 1e12 times as large."""
    factor = 10 ** (6 + 6 * torch.rand(s.count, 1, generator=s.generator(), dtype=f64))
    vectors = ("q", "b", "h", "lower", "upper")
    data = {name: v * factor if name in vectors and v is not None else v for name, v in drawn.data.items()}
    return drawn._replace(data=data, x=None if drawn.x is None else drawn.x * factor)


def large_solution(s: Sizes) -> Drawn:
    return magnified(s, solved(ordinary(s)))


def large_vertex(s: Sizes) -> Drawn:
    return magnified(s, vertex(s))


def large_infeasible(s: Sizes) -> Drawn:
    return magnified(s, infeasible_by_rows(s))


def large_unbounded(s: Sizes) -> Drawn:
    return magnified(s, unbounded_quadratic(s))


def subnormal_entries(s: Sizes) -> Drawn:
    """A third of the entries of the matrices are 5e-324, and all of one more row, which nobody meets."""
    problem = ordinary(s, p=1, m=1)
    assert problem.Q is not None and problem.A is not None and problem.G is not None

    def sprinkled(matrix: Tensor) -> Tensor:
        small = torch.rand(matrix.shape, generator=s.generator()) < 1 / 3
        return torch.where(small, 5e-324 * matrix.sign(), matrix)

    problem = rebuilt(problem, A=sprinkled(problem.A), G=sprinkled(problem.G))
    assert problem.G is not None and problem.h is not None
    G = torch.cat([problem.G, torch.full((s.count, 1, s.n), 5e-324, dtype=f64)], -2)
    return solved(problem, G=G, h=torch.cat([problem.h, torch.ones(s.count, 1, dtype=f64)], -1))


# ---- without a solution ----------------------------------------------------------------------------------------------


def infeasible(s: Sizes, **options: Any) -> Drawn:
    options = {"bounds": s.bounds, "batch": (s.count,)} | options
    p, m = max(s.p, 2 if options["kind"] == "equalities" else 0), max(s.m, 1)
    problem = known.infeasible_program(s.seed, s.n, p, m, **options)
    return Drawn(problem.arguments(), Status.PRIMAL_INFEASIBLE)


def infeasible_by_rows(s: Sizes) -> Drawn:
    return infeasible(s, kind="rows")


def infeasible_by_bounds(s: Sizes) -> Drawn:
    """A row against the bounds: sum x >= 1 + the sum of all upper bounds."""
    problem = ordinary(s, bounds="both")
    assert problem.upper is not None
    G, h = -torch.ones(s.count, 1, s.n, dtype=f64), -1 - problem.upper.sum(-1, keepdim=True)
    if problem.G is not None and problem.h is not None:
        G, h = torch.cat([problem.G, G], -2), torch.cat([problem.h, h], -1)
    return Drawn(problem.arguments() | {"G": G, "h": h}, Status.PRIMAL_INFEASIBLE)


def infeasible_by_crossing_bounds(s: Sizes) -> Drawn:
    return infeasible(s, kind="bounds")


def barely_infeasible(s: Sizes) -> Drawn:
    return infeasible(s, kind="rows", violation=1e-6)


def infeasible_and_unbounded(s: Sizes) -> Drawn:
    """An unbounded linear program with x_1 = 0 and x_1 = 1."""
    problem = known.unbounded_program(s.seed, s.n, 0, s.m, linear=True, batch=(s.count,))
    A = torch.zeros(s.count, 2, s.n, dtype=f64)
    A[:, :, 0] = 1.0
    b = torch.tensor([0.0, 1.0], dtype=f64).expand(s.count, 2)
    return Drawn(problem.arguments() | {"A": A, "b": b}, Status.PRIMAL_INFEASIBLE)


def unbounded(s: Sizes, linear: bool) -> Drawn:
    sizes, options = (min(s.p, s.n - 1), s.m), {"bounds": s.bounds, "batch": (s.count,)}
    problem = known.unbounded_program(s.seed, s.n, *sizes, linear=linear, **options)  # type: ignore[arg-type]
    return Drawn(problem.arguments(), Status.DUAL_INFEASIBLE)


def unbounded_linear(s: Sizes) -> Drawn:
    return unbounded(s, linear=True)


def unbounded_quadratic(s: Sizes) -> Drawn:
    return unbounded(s, linear=False)


def unbounded_with_dependent_equalities(s: Sizes) -> Drawn:
    """Equalities that depend on others, whose sides contradict each other by rounding errors."""
    problem = known.unbounded_program(s.seed, s.n + 1, max(1, min(s.p, s.n)), s.m, linear=True, batch=(s.count,))
    assert problem.A is not None and problem.b is not None
    mix = normal(s, 2, problem.A.shape[-2])
    A, b = torch.cat([problem.A, mix @ problem.A], -2), torch.cat([problem.b, times(mix, problem.b)], -1)
    return Drawn(problem.arguments() | {"A": A, "b": b}, Status.DUAL_INFEASIBLE)


def unbounded_in_an_unused_variable(s: Sizes) -> Drawn:
    """The variable that is in no row has a cost."""
    return solved_with_more(s, 1.0)


def not_a_number(s: Sizes) -> Drawn:
    return spoiled(s, {name: torch.nan for name in ("Q", "q", "A", "b", "G", "h", "lower", "upper")})


def infinite(s: Sizes) -> Drawn:
    """Infinity where it is no absent side."""
    side = torch.inf
    values = {"Q": side, "q": side, "A": -side, "b": side, "G": side, "h": -side, "lower": side, "upper": -side}
    return spoiled(s, values)


def spoiled(s: Sizes, values: dict[str, float]) -> Drawn:
    problem = ordinary(s)
    data = {name: None if v is None else v.clone() for name, v in problem.arguments().items()}
    draw = random.Random(s.seed)
    for index in range(s.count):
        name = draw.choice([name for name in values if data[name] is not None])
        flat = data[name][index].reshape(-1)  # type: ignore[index]
        flat[draw.randrange(len(flat))] = values[name]
    return Drawn(data, Status.NONFINITE_INPUT)


FAMILIES = [
    Family(
        "equalities that repeat others", equalities_repeated, faults=("compiled: dependent equalities are not shifted",)
    ),
    Family(
        "equalities that depend on others, up to rounding",
        equalities_rank_deficient,
        faults=("compiled: dependent equalities are not shifted",),
    ),
    Family(
        "equalities that contradict each other",
        equalities_inconsistent,
        faults=("compiled: infeasibility is never proven",),
    ),
    Family("rows of zeros", zero_rows, faults=("compiled: dependent equalities are not shifted",)),
    Family(
        "rows of zeros that contradict their sides",
        zero_row_contradicts,
        faults=("compiled: infeasibility is never proven",),
    ),
    Family(
        "rows that repeat others",
        rows_repeated,
        faults=(
            "compiled: held rows are not shifted",
            "held rows are not shifted",
            "compiled: no row counts as dependent",
            "no row counts as dependent",
        ),
    ),
    Family(
        "rows 1e-6 from parallel",
        rows_nearly_parallel,
        1e-7,
        faults=(
            "compiled: held rows are not shifted",
            "held rows are not shifted",
            "compiled: no row counts as dependent",
            "no row counts as dependent",
        ),
    ),
    Family(
        "a row 2e-4 from parallel",
        a_row_nearly_parallel,
        slope=1e-7,  # multipliers of 1e8 in the system of the derivative cancel
        faults=("compiled: no second look at rows that seem dependent", "no second look at rows that seem dependent"),
    ),
    Family(
        "pairs of rows without interior",
        pairs_without_interior,
        faults=(
            "compiled: held rows are not shifted",
            "held rows are not shifted",
            "compiled: no row counts as dependent",
            "no row counts as dependent",
        ),
    ),
    Family(
        "pairs of rows 1e-6 apart",
        pairs_nearly_without_interior,
        1e-11,
        faults=("compiled: no step below the tolerance", "no step below the tolerance"),
    ),
    Family("no interior because of bounds", no_interior_by_bounds, faults=("compiled: held bounds are not shifted",)),
    Family(
        "six times as many rows as variables",
        many_rows,
        faults=("compiled: one unknown for each of many rows", "one unknown for each of many rows"),
    ),
    Family("weakly active constraints", weakly_active, faults=("compiled: no polish",)),
    Family(
        "slacks and multipliers down to 1e-9",
        nearly_weakly_active,
        1e-4,
        faults=("compiled: no polish", "compiled: the polish changes no side", "the polish changes no side"),
    ),
    Family(
        "sides of 1e20 and more",
        far_sides,
        faults=(
            "compiled: far sides count in full",
            "compiled: infinite sides are sides",
            "compiled: a far side hides what others miss",
            "compiled: no start that forgets the rows",
        ),
    ),
    Family(
        "no constraints",
        no_constraints,
        faults=("compiled: the first point is never the last", "there are always inequalities"),
    ),
    Family("one variable", one_variable, faults=("compiled: a single row is no block",)),
    Family("fixed variables", fixed_variables, faults=("compiled: held bounds are not shifted",)),
    Family("all variables fixed", all_variables_fixed, faults=("compiled: held bounds are not shifted",)),
    Family(
        "Q singular",
        hessian_singular,
        faults=("compiled: no eigenvalue is a rounding error", "no eigenvalue is a rounding error"),
    ),
    Family(
        "Q zero",
        hessian_zero,
        faults=("compiled: no eigenvalue is a rounding error", "no eigenvalue is a rounding error"),
    ),
    Family("Q nonsymmetric", hessian_nonsymmetric, faults=("compiled: Q is taken as given, not its symmetric part",)),
    Family(
        "Q less 1e-13 of its size",
        hessian_within_rounding_of_convex,
        faults=("compiled: no eigenvalue is a rounding error", "no eigenvalue is a rounding error"),
    ),
    Family(
        "Q indefinite", hessian_indefinite, faults=("compiled: indefinite Hessians pass", "indefinite Hessians pass")
    ),
    Family(
        "Q with eigenvalues down to 1e-10",
        hessian_ill_conditioned,
        1e-5,
        faults=("compiled: shifts hide small curvature",),
    ),  # 100 eps cond(Q) would be 2e-4
    Family(
        "Q diagonal, 1e-4 to 1e4",
        hessian_diagonal,
        faults=("compiled: a diagonal is eliminated like any matrix", "a diagonal is eliminated like any matrix"),
    ),
    Family("linear, one solution", vertex, faults=("no eigenvalue is a rounding error",)),
    Family(
        "equalities that are soft, at a high price",
        soft_equalities,
        faults=("compiled: no start from far inside", "no start from far inside"),
    ),
    Family(
        "linear, a degenerate vertex",
        vertex_degenerate,
        faults=(
            "no eigenvalue is a rounding error",
            "compiled: held rows are not shifted",
            "held rows are not shifted",
        ),
    ),
    Family(
        "half linear, no bounds",
        vertex_of_free_columns,
        faults=("compiled: no eigenvalue is a rounding error", "no eigenvalue is a rounding error"),
    ),
    Family("linear, many solutions", optimal_face, faults=("compiled: centring waits for the gap",)),
    Family("linear, assignments", assignment, faults=("compiled: dependent equalities are not shifted",)),
    Family(
        "a variable that nothing holds",
        variable_unused,
        faults=("compiled: no eigenvalue is a rounding error", "no eigenvalue is a rounding error"),
    ),
    Family("rows in units of 1e-8 to 1e8", rows_badly_scaled, faults=("compiled: no equilibration",)),
    Family(
        "variables in units of 1e-8 to 1e8",
        columns_badly_scaled,
        faults=("compiled: no equilibration", "compiled: equilibration by the columns of Q"),
    ),
    Family(
        "the objective in units of 1e-8 to 1e8",
        objective_badly_scaled,
        faults=("compiled: the objective is not scaled",),
    ),
    Family("everything in units of 1e-3 to 1e3", everything_badly_scaled, faults=("compiled: no equilibration",)),
    Family(
        "subnormal entries", subnormal_entries, faults=("compiled: a scale may be infinite", "a scale may be infinite")
    ),
    Family("a solution of 1e6 to 1e12", large_solution, faults=("one row contradicts itself",)),
    Family(
        "linear, a solution of 1e6 to 1e12",
        large_vertex,
        faults=("compiled: large solutions in small units", "large solutions in small units"),
    ),
    Family(
        "infeasible, sides of 1e6 to 1e12",
        large_infeasible,
        1e-8,
        faults=("compiled: infeasibility is never proven",),
    ),
    Family(
        "unbounded, sides and costs of 1e6 to 1e12",
        large_unbounded,
        1e-8,
        faults=("compiled: unboundedness is never proven",),
    ),
    Family("infeasible by rows", infeasible_by_rows, faults=("compiled: infeasibility is never proven",)),
    Family(
        "infeasible by rows against bounds", infeasible_by_bounds, faults=("compiled: infeasibility is never proven",)
    ),
    Family("infeasible by crossing bounds", infeasible_by_crossing_bounds, faults=("compiled: crossing bounds pass",)),
    Family(
        "infeasible by 1e-6",
        barely_infeasible,
        1e-8,
        faults=("compiled: no problem of least infeasibility", "compiled: small contradictions are not seen closer"),
    ),
    Family(
        "infeasible, and unbounded without the rows",
        infeasible_and_unbounded,
        faults=("compiled: infeasibility is never proven", "compiled: unboundedness is looked for first"),
    ),
    Family(
        "unbounded, linear",
        unbounded_linear,
        faults=(
            "compiled: unboundedness is never proven",
            "compiled: no problem of steepest recession",
            "no problem of steepest recession",
        ),
    ),
    Family("unbounded, quadratic", unbounded_quadratic, faults=("compiled: unboundedness is never proven",)),
    Family(
        "unbounded, equalities that depend on others",
        unbounded_with_dependent_equalities,
        faults=(
            "compiled: unboundedness is never proven",
            "compiled: dependent equalities are not shifted",
            "no problem of steepest recession",
        ),
    ),
    Family(
        "unbounded in a variable that nothing holds",
        unbounded_in_an_unused_variable,
        1e-8,
        faults=("compiled: unboundedness is never proven",),
    ),
    Family("NaN in the data", not_a_number, faults=("compiled: NaN passes",)),
    Family("infinity in the data", infinite, faults=("compiled: NaN passes", "compiled: sides of -inf pass")),
]
