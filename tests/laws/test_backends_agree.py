"""Backends agree where the solution is unique: every registered one against the primary backend."""

from __future__ import annotations

import pytest
import torch

import diffopt
import measures
from diffopt.check import known
from diffopt.check.known import KnownProblem
from tolerances import AGREEMENT

# Small and fixed: reference backends solve one instance at a time.
PROBLEMS: dict[str, KnownProblem] = {
    "equalities": known.quadratic_program(0, 4, 2, 0, batch=(3,)),
    "inequalities": known.quadratic_program(1, 5, 0, 6, batch=(3,)),
    "bounds": known.quadratic_program(2, 5, 0, 0, bounds="both", batch=(3,)),
    "everything": known.quadratic_program(3, 6, 2, 5, bounds="mixed", batch=(3,)),
    "singular": known.quadratic_program(4, 6, 1, 5, bounds="lower", singular=True, batch=(3,)),
    "linear": known.linear_program(5, 5, 1, 7, bounds="upper", batch=(3,)),
    "one_variable": known.quadratic_program(6, 1, 0, 2, bounds="both", batch=(3,)),
}


def solved(problem: KnownProblem, backend: str) -> tuple[diffopt.Solution, dict[str, torch.Tensor]]:
    leaves = measures.tracked(problem.arguments())
    settings = diffopt.Settings(tolerance=max(1e-9, diffopt.backends.get(backend).can.accuracy))
    solution = diffopt.solve_qp(**leaves, backend=backend, settings=settings)
    (solution.x * torch.linspace(-1, 2, solution.x.shape[-1], dtype=torch.float64)).sum().backward()
    return solution, measures.gradients(leaves)


@pytest.mark.parametrize("name", PROBLEMS)
def test_solutions_and_gradients_agree(backend: str, name: str) -> None:
    problem = PROBLEMS[name]
    ours, our_gradients = solved(problem, "pdipm")
    theirs, their_gradients = solved(problem, backend)
    assert theirs.backend == backend
    for output in measures.OUTPUTS:
        assert measures.relative(getattr(theirs, output), getattr(ours, output)) <= AGREEMENT, output
    for piece, gradient in our_gradients.items():
        assert measures.relative(their_gradients[piece], gradient) <= AGREEMENT, piece


def test_failures_agree(backend: str) -> None:
    for problem in (
        known.infeasible_program(0, 4, 2, 3, kind="rows", bounds="both", batch=(3,)),
        known.infeasible_program(1, 4, 2, 3, kind="equalities", batch=(3,)),
        known.infeasible_program(2, 4, 0, 0, kind="bounds", batch=(3,)),
        known.unbounded_program(3, 4, 1, 3, batch=(3,)),
        known.unbounded_program(4, 4, 1, 3, bounds="lower", linear=True, batch=(3,)),
    ):
        solution = diffopt.solve_qp(**problem.arguments(), backend=backend, on_failure="return")
        assert torch.equal(solution.status, problem.status), (solution, problem)
        assert bool(solution.x.isnan().all())
