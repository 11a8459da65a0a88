"""x and all gradients against the extended-precision active-set reference: the project's stated accuracy.

Over 500 instances of mixed sizes and structures, built with a complementarity margin of 1e-2, LICQ
(smallest singular value of the active rows >= 0.3) and cond(Q) up to 1e6, evenly in its logarithm.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import diffopt
import measures
import reference
from diffopt.check import known
from diffopt.check.known import KnownProblem
from tolerances import GRADIENT_REFERENCE, X_REFERENCE

MARGIN, CONDITION, BATCH = 1e-2, 1e6, 12

# (n, p, m, bounds, more)
STRUCTURES = [
    (1, 0, 1, None, {}),
    (2, 1, 3, "lower", {}),
    (5, 0, 5, None, {}),
    (5, 0, 0, "both", {}),
    (6, 3, 0, None, {}),
    (8, 2, 8, "mixed", {}),
    (10, 0, 25, None, {}),
    (10, 3, 10, "both", {}),
    (12, 4, 6, "lower", {"singular": True}),
    (10, 2, 12, None, {"singular": True}),
    (10, 2, 10, "upper", {"shared": True}),
    (20, 5, 20, "mixed", {}),
    (30, 10, 30, None, {}),
    (30, 0, 0, "lower", {}),
]
SEEDS = (0, 1, 2)


def test_there_are_at_least_500_instances() -> None:
    assert len(STRUCTURES) * len(SEEDS) * BATCH >= 500


@dataclass
class Errors:
    """Worst relative errors of a batch: of x, and of the gradient of each piece."""

    x: float = 0.0
    gradients: dict[str, float] = field(default_factory=dict)


def measured(problem: KnownProblem, backend: str = "pdipm") -> Errors:
    """Solve, pull random cotangents of x, nu and all multipliers back, and compare with the reference."""
    generator = torch.Generator().manual_seed(0)
    arguments = measures.tracked(problem.arguments())
    solution = diffopt.solve_qp(**arguments, backend=backend)
    outputs = ("x", "nu", "lam", "lam_lower", "lam_upper")
    cotangents = {o: torch.randn(getattr(solution, o).shape, generator=generator, dtype=torch.float64) for o in outputs}
    torch.stack([(cotangents[o] * getattr(solution, o)).sum() for o in outputs]).sum().backward()

    errors = Errors()
    shared: dict[str, reference.Array] = {}
    instances = problem.instances()
    for i, one in enumerate(instances):
        active = reference.active_set(one.lam, one.lam_lower, one.lam_upper)
        answer = reference.solve(reference.instance(one.arguments()), active)
        index = torch.unravel_index(torch.tensor(i), problem.batch_shape)
        errors.x = max(errors.x, reference.error(solution.x[index].detach(), answer.point["x"]))
        expected = reference.gradients(answer, {o: cotangents[o][index] for o in outputs})
        for name, tensor in arguments.items():
            if tensor is None:
                continue
            assert tensor.grad is not None, name
            if tensor.dim() == (2 if name in "QAG" else 1):  # shared by the batch: the sum
                shared[name] = shared.get(name, 0) + expected[name]
            else:
                error = reference.error(tensor.grad[index], expected[name])
                errors.gradients[name] = max(errors.gradients.get(name, 0.0), error)
    for name, total in shared.items():
        tensor = arguments[name]
        assert isinstance(tensor, Tensor)
        errors.gradients[name] = reference.error(tensor.grad, total)
    return errors


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("n", "p", "m", "bounds", "more"), STRUCTURES)
def test_gradients_of_all_data(n: int, p: int, m: int, bounds: known.Bounds, more: dict[str, Any], seed: int) -> None:
    problem = known.quadratic_program(
        seed, n, p, m, bounds=bounds, batch=(BATCH,), margin=MARGIN, condition=CONDITION, **more
    )
    errors = measured(problem)
    assert errors.x <= X_REFERENCE, problem.recipe
    assert max(errors.gradients.values()) <= GRADIENT_REFERENCE, (errors.gradients, problem.recipe)


@pytest.mark.parametrize("bounds", known.BOUNDS)
def test_gradients_of_linear_programs(bounds: known.Bounds) -> None:
    problem = known.linear_program(0, 6, 2, 8, bounds=bounds, batch=(6,), margin=MARGIN)
    errors = measured(problem)
    assert errors.x <= X_REFERENCE, problem.recipe
    assert max(errors.gradients.values()) <= GRADIENT_REFERENCE, (errors.gradients, problem.recipe)


def test_gradients_of_badly_scaled_programs() -> None:
    problem = known.badly_scaled_program(0, 6, 2, 8, bounds="mixed", batch=(12,), decades=2.0)
    errors = measured(problem)
    assert errors.x <= X_REFERENCE, problem.recipe
    assert max(errors.gradients.values()) <= GRADIENT_REFERENCE, (errors.gradients, problem.recipe)
