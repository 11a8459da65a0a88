"""The envelope identities, which settle every sign.

dv/dq = x, dv/dQ = x x'/2, dv/db = -nu, dv/dA = nu x', dv/dh = -lam, dv/dG = lam x', dv/dlower = lam_lower,
dv/dupper = -lam_upper: of `Solution.value`, whose derivative is taken from the Lagrangian, and of the
objective at the differentiable x, whose derivative goes through the sensitivity of x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import diffopt
import measures
from diffopt.check import known, strategies
from diffopt.check.known import KnownProblem
from tolerances import EXACT_ALGEBRA, SOLUTION

Value = Callable[[diffopt.Solution, dict[str, Any]], Tensor]


def own_value(solution: diffopt.Solution, arguments: dict[str, Any]) -> Tensor:
    return solution.value


def objective(solution: diffopt.Solution, arguments: dict[str, Any]) -> Tensor:
    x, Q, q = solution.x, arguments["Q"], arguments["q"]
    assert q is not None
    linear = (q * x).sum(-1)
    return linear if Q is None else linear + 0.5 * (x.unsqueeze(-2) @ Q @ x.unsqueeze(-1)).squeeze(-1).squeeze(-1)


def outer(a: Tensor, b: Tensor) -> Tensor:
    return a.unsqueeze(-1) * b.unsqueeze(-2)


def expected(solution: KnownProblem | diffopt.Solution) -> dict[str, Tensor]:
    x, nu, lam = solution.x.detach(), solution.nu.detach(), solution.lam.detach()
    return {
        "Q": outer(x, x) / 2, "q": x, "A": outer(nu, x), "b": -nu, "G": outer(lam, x), "h": -lam,
        "lower": solution.lam_lower.detach(), "upper": -solution.lam_upper.detach(),
    }  # fmt: skip


def assert_envelope(
    problem: KnownProblem, value: Value, backend: str = "pdipm", tolerance: float = EXACT_ALGEBRA
) -> None:
    leaves = measures.tracked(problem.arguments())
    settings = diffopt.Settings(tolerance=max(1e-9, diffopt.backends.get(backend).can.accuracy))
    solution = diffopt.solve_qp(**leaves, backend=backend, settings=settings)
    value(solution, leaves).sum().backward()
    for name, identity in expected(solution).items():
        tensor = leaves[name]
        if tensor is None:
            continue
        total = identity.sum_to_size(tensor.shape)  # a shared piece gets the sum
        gradient = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        assert measures.relative(gradient, total) <= tolerance, (name, problem)


WELL_POSED = st.one_of(
    strategies.quadratic_programs(batch=st.sampled_from([(), (2,)]), singular=st.booleans()),
    strategies.quadratic_programs(batch=(3,), shared=True),
    strategies.linear_programs(batch=(2,)),
    strategies.degenerate_programs(batch=(2,)),  # the value has no kink there
)


@given(WELL_POSED)
def test_value(problem: KnownProblem) -> None:
    assert_envelope(problem, own_value)


@given(WELL_POSED.filter(lambda problem: not problem.weakly_active.any()))
def test_objective_at_x(problem: KnownProblem) -> None:
    assert_envelope(problem, objective)


@given(strategies.quadratic_programs(batch=(2,)))
def test_signs_of_the_multipliers_themselves(problem: KnownProblem) -> None:
    # With the multipliers of the generated point: the two tests above would pass with wrong signs in both.
    solution = diffopt.solve_qp(**problem.arguments())
    for name, identity in expected(problem).items():
        assert measures.relative(expected(solution)[name], identity) <= SOLUTION[torch.float64], (name, problem)


@pytest.mark.parametrize("value", [own_value, objective])
def test_every_backend(backend: str, value: Value) -> None:
    problem = known.quadratic_program(0, 5, 2, 4, bounds="mixed", batch=(2,))
    assert_envelope(problem, value, backend)


def test_value_by_differences_of_the_value() -> None:
    # One number computed by hand: min x^2/2 s.t. x >= l has v = l^2/2 for l > 0.
    lower = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, 1, dtype=torch.float64)
    solution = diffopt.solve_qp(one, torch.zeros(1, dtype=torch.float64), lower=lower)
    solution.value.backward()
    assert float(solution.value.detach()) == pytest.approx(2.0, abs=1e-12)
    assert lower.grad is not None and float(lower.grad) == pytest.approx(2.0, abs=1e-12)
