"""Directional derivatives match central differences of the solve, in float64, through every backend.

The comparison is that of `diffopt.check.gradients` (tests/check shows that it finds planted faults).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import diffopt
import measures
from diffopt.check import known, strategies
from diffopt.check.known import KnownProblem
from problems_catalogue import CappedSoftmax, Projection, structure
from tolerances import DIFFERENCES

OUTPUTS = ("x", "s", "lam", "nu", "lam_lower", "lam_upper", "value")


def assert_confirmed(
    problem: diffopt.DifferentiableProblem | diffopt.Layer, params: dict[str, Any], **options: Any
) -> None:
    report = diffopt.check.gradients(problem, params, **({"outputs": OUTPUTS, "tolerance": DIFFERENCES} | options))
    assert report.ok, report
    assert all(not row.skipped for row in report.rows), report


@settings(max_examples=12)
@given(strategies.quadratic_programs(batch=(2,), condition=10.0, singular=st.booleans()))
def test_quadratic_programs(problem: KnownProblem) -> None:
    assert_confirmed(*structure(problem), directions=1)


@settings(max_examples=6)
@given(strategies.linear_programs(batch=(2,)))
def test_linear_programs(problem: KnownProblem) -> None:
    assert_confirmed(*structure(problem), directions=1)


@settings(max_examples=6)
@given(strategies.quadratic_programs(batch=(3,), condition=10.0, shared=True))
def test_shared_matrices(problem: KnownProblem) -> None:
    assert_confirmed(*structure(problem), directions=1)


@pytest.mark.parametrize("form", ["diagonal", "scaled_identity", "diagonal_plus_low_rank"])
def test_forms_of_the_hessian(form: str) -> None:
    generator = torch.Generator().manual_seed(0)
    n = 4
    d = 0.5 + torch.rand(2, n, generator=generator, dtype=torch.float64)
    U = torch.randn(2, n, 2, generator=generator, dtype=torch.float64)
    Q = {"diagonal": d, "scaled_identity": d[:, 0], "diagonal_plus_low_rank": (d, U)}[form]
    _, params = structure(known.quadratic_program(0, n, 1, 3, bounds="both", batch=(2,)))
    problem = diffopt.QPStructure(
        n, Q=diffopt.given(form), **{name: diffopt.given() for name in params if name not in ("Q", "q")}
    )
    assert_confirmed(problem, params | {"Q": Q})


def test_learned_parameters_of_a_layer() -> None:
    _, params = structure(known.quadratic_program(1, 4, 1, 3, bounds="lower"))
    learned = {name: diffopt.learned(params[name]) for name in ("A", "b", "G", "h", "lower")}
    layer = diffopt.Layer(diffopt.QPStructure(4, Q=diffopt.fixed(1.5, form="scaled_identity"), **learned))
    report = diffopt.check.gradients(layer, {"q": params["q"]}, outputs=OUTPUTS, tolerance=DIFFERENCES)
    assert report.ok, report
    assert {row.parameter for row in report.rows} == {"q", "A", "b", "G", "h", "lower"}


def test_a_structure_of_ones_own() -> None:
    params = {
        "point": torch.tensor([[1.0, 0.5], [3.0, -1.0]], dtype=torch.float64),
        "a": torch.tensor([1.0, 1.5], dtype=torch.float64),
        "level": torch.tensor(1.0, dtype=torch.float64),
    }
    assert_confirmed(Projection(), params)


def test_a_nonlinear_problem() -> None:
    params = {
        "c": torch.tensor([[-1.0, 0.5, 0.0], [2.0, -0.25, 0.3]], dtype=torch.float64),
        "cap": torch.tensor(0.4, dtype=torch.float64),
    }
    assert_confirmed(CappedSoftmax(3), params, outputs=("x", "lam", "nu", "value"))


@pytest.mark.parametrize("bounds", known.BOUNDS)
def test_every_backend(backend: str, bounds: known.Bounds) -> None:
    options = diffopt.Settings(tolerance=max(1e-9, diffopt.backends.get(backend).can.accuracy))
    problem = known.quadratic_program(2, 4, 1, 3, bounds=bounds, batch=(2,), condition=10.0)
    assert_confirmed(*structure(problem), backend=backend, settings=options, directions=1)


def test_second_derivatives_by_differences_of_the_first() -> None:
    """The Hessian of a functional of x in all data, times a direction, against differences of the gradient."""
    problem = known.quadratic_program(32, 6, 1, 4, bounds="both", batch=(3,), condition=10.0)
    assert problem.lam[1].any() and problem.lam_lower[1].any() and problem.lam_upper[1].any()
    names = [name for name, value in problem.arguments().items() if value is not None]
    start = [problem.arguments()[name] for name in names]
    generator = torch.Generator().manual_seed(0)
    moves = [torch.randn(value.shape, generator=generator, dtype=torch.float64) for value in start]
    weights = torch.randn(problem.x.shape, generator=generator, dtype=torch.float64)

    def gradient(values: list[Tensor], create_graph: bool) -> tuple[Tensor, ...]:
        data: dict[str, Any] = dict(zip(names, values, strict=True))
        x = diffopt.solve_qp(**data).x
        return torch.autograd.grad((weights * x.square()).sum(), values, create_graph=create_graph)

    leaves = [value.clone().requires_grad_() for value in start]
    total = torch.stack([(g * m).sum() for g, m in zip(gradient(leaves, True), moves, strict=True)]).sum()
    analytic = torch.autograd.grad(total, leaves)
    t = torch.finfo(torch.float64).eps ** (1 / 3)
    high, low = (
        gradient([(v + sign * t * m).requires_grad_() for v, m in zip(start, moves, strict=True)], False)
        for sign in (1, -1)
    )
    for name, exact, above, below in zip(names, analytic, high, low, strict=True):
        numeric = (above - below) / (2 * t)
        assert float(numeric.abs().max()) > 1e-2, name  # it does not vanish
        assert measures.relative(exact, numeric) <= DIFFERENCES, name
