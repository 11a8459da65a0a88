"""Convex quadratic programs from practice, against their reference solutions: no claim is false.

`docs/accuracy.md` has a table of how each is solved, which ``make maros`` writes (this file, run as a program).
"""

from __future__ import annotations

import sys
import time
from fractions import Fraction
from typing import Any

import pytest
import torch

import diffopt
import maros
import measures
import reference
from benchmarks import pages
from diffopt import Status
from tolerances import RESIDUAL

REFUSED = {"VALUES"}
"""Its Q has a negative eigenvalue (-1.3e-5 where the largest is 1): no convex program."""

EXECUTORS = ["cpu", pytest.param("torch", marks=pytest.mark.slow)]

UNDETERMINED = {"DUALC8"}
"""Its Q is singular along its active rows, exactly: x is not unique and has no derivative."""

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
    """Where active rows are independent with multipliers, and x unique; against the extended-precision reference."""
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


@pytest.mark.parametrize("name", sorted(UNDETERMINED))
@pytest.mark.parametrize("executor", EXECUTORS)
def test_where_there_is_none_it_is_said(executor: Any, name: str) -> None:
    """K is singular in exact arithmetic, so x has no derivative."""
    problem = maros.load(name)
    data: dict[str, Any] = problem.data
    q = data["q"].clone().requires_grad_()
    solution = diffopt.solve_qp(**data | {"q": q}, settings=diffopt.Settings(executor=executor))
    active = reference.active_set(*(getattr(solution, o).detach() for o in ("lam", "lam_lower", "lam_upper")))
    instance = reference.instance(data)
    K = reference.kkt_matrix(instance, active)
    assert exact_rank(K) < len(K)
    assert not bool(solution.unique)
    with pytest.warns(diffopt.InaccurateGradientWarning):
        solution.x.square().sum().backward()
    # The optimal value is unique, and has one: dvalue/dq = x at any solution.
    assert q.grad is not None and q.grad.isfinite().all()
    (slope,) = torch.autograd.grad(diffopt.solve_qp(**data | {"q": q}).value, q)
    value = float(reference.value(instance, slope))
    assert abs(value - problem.objective) <= OBJECTIVE * (1 + abs(problem.objective))


def exact_rank(matrix: Any) -> int:
    """Return the rank of a float64 matrix, in exact arithmetic."""
    rows = [[Fraction(float(v)) for v in row] for row in matrix]
    found = 0
    for column in range(len(rows[0])):
        pivot = next((r for r in range(found, len(rows)) if rows[r][column]), None)
        if pivot is None:
            continue
        rows[found], rows[pivot] = rows[pivot], rows[found]
        for r in range(found + 1, len(rows)):
            share = rows[r][column] / rows[found][column]
            rows[r] = [a - share * b for a, b in zip(rows[r], rows[found], strict=True)]
        found += 1
    return found


# ---- the table -------------------------------------------------------------------------------------------------------

HEADS = ["problem", "n", "p", "m", "bounds", "status"]
HEADS += [f"{executor}: {figure}" for executor in ("cpu", "torch") for figure in ("residual", "iterations", "seconds")]
LONGEST = 30.0
"""Seconds of one core that a problem may take."""


def rendered() -> str:
    """Return the table: how each executor ends each problem, its worst residual (recomputed), its time on one core."""
    torch.set_num_threads(1)
    lines = []
    for name in ["HS21", *maros.names()]:  # (The first for what is done once in a process.)
        problem = maros.load(name)
        data: dict[str, Any] = problem.data
        statuses, figures = [], []
        for executor in ("cpu", "torch"):
            settings: Any = diffopt.Settings(executor=executor)
            began = time.process_time()
            solution = diffopt.solve_qp(**data, settings=settings, on_failure="return")
            seconds = time.process_time() - began
            worst = max(float(value) for value in measures.residuals(problem.data, solution).values())
            statuses.append(Status(int(solution.status)).name)
            figures += [f"{worst:.0e}", str(int(solution.iterations)), f"{seconds:.3f}"]
        lines.append([name, *sizes(problem), " / ".join(dict.fromkeys(statuses)), *figures])
    return pages.table(HEADS, lines[1:])


def sizes(problem: maros.MarosProblem) -> list[str]:
    """Return the numbers of variables, equalities, rows and finite bounds."""
    present = {name: side for name, side in problem.data.items() if side is not None}
    counts = [len(present[name]) if name in present else 0 for name in ("q", "b", "h")]
    bounds = sum(int(present[name].isfinite().sum()) for name in ("lower", "upper") if name in present)
    return [str(count) for count in (*counts, bounds)]


def test_the_page_shows_every_problem_solved_or_refused() -> None:
    rows = pages.rows(pages.section(pages.ACCURACY, "Maros-Meszaros"))
    assert [row[0] for row in rows] == maros.names(), "run `make maros`"
    for row in rows:
        assert row[1:5] == sizes(maros.load(row[0]))
        assert row[5] == ("NUMERICAL_ERROR" if row[0] in REFUSED else "SOLVED")
        assert all(float(row[k]) < LONGEST for k in (8, 11))
        assert row[0] in REFUSED or all(float(row[k]) <= RESIDUAL[torch.float64] for k in (6, 9))


if __name__ == "__main__":
    pages.write(pages.ACCURACY, "Maros-Meszaros", rendered())
    sys.exit(0)
