"""Hypothesis strategies that draw problems with known answers, for tests of solvers and layers.

Hypothesis draws a seed and the sizes, so a failing example shrinks in its sizes and is printed as the
call of ``diffopt.check.known`` that makes it. Every size can be given as a number, as a strategy, or
not at all. What the answer is, and which shapes it has: see `KnownProblem`::

    @given(strategies.quadratic_programs(bounds="lower", batch=(3,)))
    def test_mine(problem):
        x = my_layer(**problem.arguments())
        torch.testing.assert_close(x, problem.x)
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from diffopt.check import known
from diffopt.check.known import KnownProblem
from diffopt.errors import MissingPackage

try:
    from hypothesis import strategies as st
    from hypothesis.strategies import SearchStrategy
except ImportError as error:
    raise MissingPackage(
        "diffopt.check.strategies needs Hypothesis, which is not installed. "
        "Install it with `pip install 'diffopt-torch[test]'`."
    ) from error

__all__ = [
    "KnownProblem",
    "badly_scaled_programs",
    "degenerate_programs",
    "infeasible_programs",
    "linear_programs",
    "quadratic_programs",
    "redundant_programs",
    "unbounded_programs",
]

T = TypeVar("T")
Size = int | SearchStrategy[int] | None
AnyBounds = known.Bounds | SearchStrategy[Any]
Batch = tuple[int, ...] | SearchStrategy[tuple[int, ...]]

BOUNDS: SearchStrategy[Any] = st.sampled_from(known.BOUNDS)
"""Any of: no bounds, ``"lower"``, ``"upper"``, ``"both"``, ``"mixed"``."""

_seeds = st.integers(0, 2**31 - 1)


@st.composite
def quadratic_programs(
    draw: st.DrawFn,
    n: Size = None,
    p: Size = None,
    m: Size = None,
    bounds: AnyBounds = BOUNDS,
    batch: Batch = (),
    margin: float = 0.1,
    condition: float = 100.0,
    dtype: torch.dtype = torch.float64,
    shared: bool = False,
    singular: bool | SearchStrategy[bool] = False,
) -> KnownProblem:
    """Strictly feasible, well-posed convex programs: unique x and duals, differentiable.

    Args:
        n, p, m: variables (1 to 8 by default), equalities (0 to n), inequality rows (0 to 10).
        bounds, batch, margin, condition, dtype, shared, singular: as in
            `diffopt.check.known.quadratic_program`.

    Returns:
        Problems whose x, s and duals are exactly known: SOLVED, no weakly active, no dependent row.
    """
    sizes = _sizes(draw, n, p, m)
    options = {"bounds": _value(draw, bounds), "batch": _value(draw, batch), "singular": _value(draw, singular)}
    return known.quadratic_program(
        draw(_seeds), *sizes, **options, margin=margin, condition=condition, dtype=dtype, shared=shared
    )


@st.composite
def linear_programs(
    draw: st.DrawFn,
    n: Size = None,
    p: Size = None,
    m: Size = None,
    bounds: AnyBounds = BOUNDS,
    batch: Batch = (),
    margin: float = 0.1,
    dtype: torch.dtype = torch.float64,
    shared: bool = False,
) -> KnownProblem:
    """Linear programs (Q is ``None``) with one solution, a nondegenerate vertex.

    Arguments as in `quadratic_programs`; a drawn m is raised to n - p where there are no bounds.

    Returns:
        Problems whose x and duals are known and unique; dx/dq = 0.
    """
    n_, p_, m_ = _sizes(draw, n, p, m)
    sides = _value(draw, bounds)
    if sides is None and not isinstance(m, int):
        m_ = max(m_, n_ - p_)
    options = {"bounds": sides, "batch": _value(draw, batch), "margin": margin, "dtype": dtype, "shared": shared}
    return known.linear_program(draw(_seeds), n_, p_, m_, **options)


@st.composite
def degenerate_programs(
    draw: st.DrawFn,
    n: Size = None,
    p: Size = None,
    m: Size = None,
    weak: Size = None,
    bounds: AnyBounds = BOUNDS,
    batch: Batch = (),
    margin: float = 0.1,
    condition: float = 100.0,
    dtype: torch.dtype = torch.float64,
) -> KnownProblem:
    """Programs at a kink: some rows or bounds hold with equality and have no multiplier.

    Args:
        weak: how many, 1 to 3 by default and as many as the sizes allow (p < n and m >= 1 by default).
        Others as in `quadratic_programs`.

    Returns:
        Problems whose x and duals are known and unique, and ``weakly_active`` too.
    """
    n_ = _value(draw, n, st.integers(1, 8))
    p_ = _value(draw, p, st.integers(0, n_ - 1))
    m_ = _value(draw, m, st.integers(1, 10))
    sides = _value(draw, bounds)
    possible = min(n_ - p_, m_ + (n_ if sides else 0))
    count = _value(draw, weak, st.integers(1, min(3, possible)))
    options = {"bounds": sides, "batch": _value(draw, batch), "margin": margin, "condition": condition, "dtype": dtype}
    return known.degenerate_program(draw(_seeds), n_, p_, m_, weak=count, **options)


@st.composite
def redundant_programs(
    draw: st.DrawFn,
    n: Size = None,
    p: Size = None,
    m: Size = None,
    extra_p: Size = None,
    extra_m: Size = None,
    bounds: AnyBounds = BOUNDS,
    batch: Batch = (),
    margin: float = 0.1,
    condition: float = 100.0,
    dtype: torch.dtype = torch.float64,
) -> KnownProblem:
    """Programs in which some equalities and inequalities are multiples of others.

    Args:
        p, m: rows before any is repeated; at least one of them positive by default.
        extra_p, extra_m: repeated rows, 0 to 3 by default (0 where there is none to repeat).
        Others as in `quadratic_programs`.

    Returns:
        Problems whose x and s are known and unique, the duals not (those stated are one choice), and
        ``dependent`` is the number of active rows too many.
    """
    n_, p_, m_ = _sizes(draw, n, p, _default(m, st.integers(1, 10)))
    copies_p = _value(draw, extra_p, st.integers(0, 3 if p_ else 0))
    copies_m = _value(draw, extra_m, st.integers(0, 3 if m_ else 0))
    options = {"bounds": _value(draw, bounds), "batch": _value(draw, batch), "margin": margin, "dtype": dtype}
    return known.redundant_program(
        draw(_seeds), n_, p_, m_, extra_p=copies_p, extra_m=copies_m, condition=condition, **options
    )


@st.composite
def badly_scaled_programs(
    draw: st.DrawFn,
    n: Size = None,
    p: Size = None,
    m: Size = None,
    decades: float = 4.0,
    bounds: AnyBounds = BOUNDS,
    batch: Batch = (),
    margin: float = 0.1,
    condition: float = 100.0,
    dtype: torch.dtype = torch.float64,
) -> KnownProblem:
    """Programs whose rows, variables and objective are multiplied by 10**-decades to 10**decades.

    Other arguments as in `quadratic_programs`; margin and condition are those before the scaling.

    Returns:
        Problems whose x, s and duals are known and unique, in their wildly different units.
    """
    sizes = _sizes(draw, n, p, m)
    options = {"bounds": _value(draw, bounds), "batch": _value(draw, batch), "margin": margin, "dtype": dtype}
    return known.badly_scaled_program(draw(_seeds), *sizes, decades=decades, condition=condition, **options)


@st.composite
def infeasible_programs(
    draw: st.DrawFn,
    n: Size = None,
    p: Size = None,
    m: Size = None,
    kind: known.Infeasibility | SearchStrategy[Any] | None = None,
    bounds: AnyBounds = BOUNDS,
    batch: Batch = (),
    violation: float = 0.5,
    dtype: torch.dtype = torch.float64,
) -> KnownProblem:
    """Programs that no x satisfies.

    Args:
        kind: ``"rows"``, ``"equalities"`` or ``"bounds"``, whichever contradict themselves
            (`diffopt.check.known.infeasible_program`); by default any that the sizes allow.
        Others as in `quadratic_programs`.

    Returns:
        Problems of status PRIMAL_INFEASIBLE with the proof as ``certificate``.
    """
    n_, p_, m_ = _sizes(draw, n, p, m)
    kinds = ["bounds", *(["rows"] if m_ else []), *(["equalities"] if p_ >= 2 else [])]
    options = {"bounds": _value(draw, bounds), "batch": _value(draw, batch), "violation": violation, "dtype": dtype}
    return known.infeasible_program(
        draw(_seeds), n_, p_, m_, kind=_value(draw, kind, st.sampled_from(kinds)), **options
    )


@st.composite
def unbounded_programs(
    draw: st.DrawFn,
    n: Size = None,
    p: Size = None,
    m: Size = None,
    linear: bool | SearchStrategy[bool] | None = None,
    bounds: AnyBounds = BOUNDS,
    batch: Batch = (),
    dtype: torch.dtype = torch.float64,
) -> KnownProblem:
    """Feasible programs whose objective has no lower bound.

    Args:
        linear: without Q; by default either.
        Others as in `quadratic_programs`; p is below n.

    Returns:
        Problems of status DUAL_INFEASIBLE with the direction of descent as ``certificate.x``.
    """
    n_ = _value(draw, n, st.integers(1, 8))
    p_ = _value(draw, p, st.integers(0, n_ - 1))
    m_ = _value(draw, m, st.integers(0, 10))
    options = {"bounds": _value(draw, bounds), "batch": _value(draw, batch), "dtype": dtype}
    return known.unbounded_program(draw(_seeds), n_, p_, m_, linear=_value(draw, linear, st.booleans()), **options)


def _sizes(draw: st.DrawFn, n: Size, p: Size, m: Size) -> tuple[int, int, int]:
    n_ = _value(draw, n, st.integers(1, 8))
    return n_, _value(draw, p, st.integers(0, n_)), _value(draw, m, st.integers(0, 10))


def _default(value: Any, default: SearchStrategy[Any]) -> Any:
    return default if value is None else value


def _value(draw: st.DrawFn, value: Any, default: SearchStrategy[Any] | None = None) -> Any:
    """Draw from a strategy; a plain value stands for itself, ``None`` for the default if there is one."""
    chosen = default if value is None and default is not None else value
    return draw(chosen) if isinstance(chosen, SearchStrategy) else chosen
