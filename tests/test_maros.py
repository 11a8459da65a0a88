"""Convex quadratic programs from practice, against their reference solutions: no claim is false."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import diffopt
import maros
import measures
import reference
from diffopt import Status
from tolerances import RESIDUAL

REFUSED = {"VALUES"}
"""Its Q has a negative eigenvalue (-1.3e-5 where the largest is 1): no convex program."""

EXECUTORS = ["cpu", pytest.param("torch", marks=pytest.mark.slow)]

UNDETERMINED = {"DUALC8"}
"""Its Q is singular, to double precision, along its active rows: x is not unique."""

GRADIENT = 1e-6
"""Gradients against the active-set reference: these problems are badly scaled."""

OBJECTIVE = 10 * RESIDUAL[torch.float64]
"""The objective against the reference, relative: it errs by the gap and by the primal residual times a multiplier."""


def test_the_references_are_what_they_are_said_to_be() -> None:
    problems = [maros.load(name) for name in maros.names()]
    assert len(problems) == 28 and all(problem.kkt <= 1e-11 for problem in problems)
    for problem in problems:
        Q, q = problem.data["Q"], problem.data["q"]
        assert Q is not None and q is not None
        objective = float(0.5 * problem.x @ Q @ problem.x + q @ problem.x)
        assert objective == pytest.approx(problem.objective, rel=1e-12), problem.name


@pytest.mark.parametrize("name", maros.names())
@pytest.mark.parametrize("executor", EXECUTORS)
def test_solved_or_refused(executor: Any, name: str) -> None:
    problem, settings = maros.load(name), diffopt.Settings(executor=executor)
    data: dict[str, Any] = problem.data
    if name in REFUSED:
        with pytest.raises(diffopt.SolveFailed, match="NUMERICAL_ERROR: "):
            diffopt.solve_qp(**data, settings=settings)
        return
    solution = diffopt.solve_qp(**data, settings=settings)
    assert solution.executor.startswith(executor)
    assert Status(int(solution.status)) == Status.SOLVED
    worst = max(float(value) for value in measures.residuals(problem.data, solution).values())
    assert worst <= RESIDUAL[torch.float64]
    assert abs(float(solution.value) - problem.objective) <= OBJECTIVE * (1 + abs(problem.objective))


REGULAR = [name for name in maros.names() if maros.load(name).regular and name not in REFUSED | UNDETERMINED]


@pytest.mark.parametrize("name", REGULAR)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_gradients_where_there_is_one(executor: Any, name: str) -> None:
    """Where active rows are independent and have multipliers, against the extended-precision reference."""
    problem = maros.load(name)
    leaves: dict[str, Any] = measures.tracked({key: v for key, v in problem.data.items() if v is not None})
    solution = diffopt.solve_qp(**leaves, settings=diffopt.Settings(executor=executor))
    outputs = ("x", "nu", "lam", "lam_lower", "lam_upper")
    generator = torch.Generator().manual_seed(0)
    weights = {o: torch.randn(getattr(solution, o).shape, generator=generator, dtype=torch.float64) for o in outputs}
    torch.stack([(weights[o] * getattr(solution, o)).sum() for o in outputs]).sum().backward()
    active = reference.active_set(*(getattr(solution, o).detach() for o in ("lam", "lam_lower", "lam_upper")))
    answer = reference.solve(reference.instance(problem.data), active)
    assert reference.error(solution.x.detach(), answer.point["x"]) <= GRADIENT
    expected = reference.gradients(answer, weights)
    errors = {key: reference.error(leaves[key].grad, expected[key]) for key in leaves}
    assert max(errors.values()) <= GRADIENT, errors
