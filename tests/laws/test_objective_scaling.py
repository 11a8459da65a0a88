"""Scaling the objective by c > 0 leaves x and multiplies duals and value by c; derivatives follow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import diffopt
import measures
from diffopt.check import known, strategies
from diffopt.check.known import KnownProblem
from tolerances import AGREEMENT, EXACT_ALGEBRA

DUALS = ("lam", "nu", "lam_lower", "lam_upper", "value")
SCALES = [1e-6, 1e-3, 1e3, 1e6]


def scaled(problem: KnownProblem, c: float) -> dict[str, Any]:
    arguments = problem.arguments()
    Q = None if problem.Q is None else c * problem.Q
    return arguments | {"Q": Q, "q": c * problem.q}


@given(
    st.one_of(
        strategies.quadratic_programs(batch=(2,), singular=st.booleans()),
        strategies.linear_programs(batch=(2,)),
    ),
    st.sampled_from(SCALES),
)
def test_x_stays_and_duals_scale(problem: KnownProblem, c: float) -> None:
    plain, other = diffopt.solve_qp(**problem.arguments()), diffopt.solve_qp(**scaled(problem, c))
    assert torch.equal(plain.status, other.status)
    assert measures.relative(other.x, plain.x) <= EXACT_ALGEBRA, problem
    assert measures.relative(other.s, plain.s) <= EXACT_ALGEBRA, problem
    for name in DUALS:
        assert measures.relative(getattr(other, name) / c, getattr(plain, name)) <= EXACT_ALGEBRA, (name, problem)


@pytest.mark.parametrize("c", SCALES)
def test_derivatives_scale(c: float) -> None:
    # x(c Q, c q) = x(Q, q): derivatives with respect to c Q and c q are 1/c of the plain ones, others the same.
    problem = known.quadratic_program(0, 6, 2, 5, bounds="mixed", batch=(3,))
    found = []
    for arguments in (problem.arguments(), scaled(problem, c)):
        leaves = measures.tracked(arguments)
        x = diffopt.solve_qp(**leaves).x
        (x * torch.linspace(-1, 2, x.shape[-1], dtype=x.dtype)).sum().backward()
        found.append(measures.gradients(leaves))
    for name, plain in found[0].items():
        factor = c if name in ("Q", "q") else 1.0
        assert measures.relative(factor * found[1][name], plain) <= EXACT_ALGEBRA, name


@pytest.mark.parametrize("c", [1e-2, 1e2])
def test_every_backend(backend: str, c: float) -> None:
    problem = known.quadratic_program(1, 5, 1, 4, bounds="both", batch=(2,))
    settings = diffopt.Settings(tolerance=max(1e-9, diffopt.backends.get(backend).can.accuracy))
    plain = diffopt.solve_qp(**problem.arguments(), backend=backend, settings=settings)
    other = diffopt.solve_qp(**scaled(problem, c), backend=backend, settings=settings)
    assert measures.relative(other.x, plain.x) <= AGREEMENT
    for name in DUALS:
        assert measures.relative(getattr(other, name) / c, getattr(plain, name)) <= AGREEMENT, name
