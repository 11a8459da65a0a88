"""KKT residuals are small: recomputed here from the original data, whoever claims to have solved it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import diffopt
import measures
from diffopt.check import known, strategies
from diffopt.check.known import KnownProblem
from tolerances import RESIDUAL

BATCHES = st.sampled_from([(), (3,), (2, 2)])


def assert_optimal(problem: KnownProblem, backend: str = "pdipm", tolerance: float | None = None) -> diffopt.Solution:
    settings = diffopt.Settings(tolerance=tolerance)
    solution = diffopt.solve_qp(**problem.arguments(), backend=backend, settings=settings)
    limit = RESIDUAL[problem.q.dtype] if tolerance is None else tolerance
    # A rounding error of the sums in this recomputation itself, in the dtype in which the point is held.
    noise = 50 * torch.finfo(problem.q.dtype).eps
    for name, values in measures.residuals(problem.arguments(), solution).items():
        worst = float(values.max()) if values.numel() else 0.0
        assert worst <= limit + noise, (name, worst, problem)
        reported = getattr(solution.residuals, name)
        assert measures.relative(reported, values) <= noise, (name, reported, values, problem)
    assert bool((solution.status == diffopt.Status.SOLVED).all()), (solution, problem)
    for name in ("s", "lam", "lam_lower", "lam_upper"):
        assert bool((getattr(solution, name) >= 0).all()), (name, problem)
    return solution


@given(strategies.quadratic_programs(batch=BATCHES, condition=1e4, margin=1e-2, singular=st.booleans()))
def test_quadratic_programs(problem: KnownProblem) -> None:
    assert_optimal(problem)


@given(strategies.quadratic_programs(batch=BATCHES, shared=True))
def test_shared_matrices(problem: KnownProblem) -> None:
    assert_optimal(problem)


@given(strategies.linear_programs(batch=BATCHES, margin=1e-2))
def test_linear_programs(problem: KnownProblem) -> None:
    assert_optimal(problem)


@given(strategies.degenerate_programs(batch=BATCHES))
def test_degenerate_programs(problem: KnownProblem) -> None:
    solution = assert_optimal(problem)
    assert torch.equal(solution.weakly_active, problem.weakly_active), problem


@given(strategies.redundant_programs(batch=BATCHES))
def test_redundant_programs(problem: KnownProblem) -> None:
    solution = assert_optimal(problem)
    assert torch.equal(solution.dependent, problem.dependent), problem


@given(strategies.badly_scaled_programs(batch=BATCHES, decades=2.0))
def test_badly_scaled_programs(problem: KnownProblem) -> None:
    assert_optimal(problem)


@given(strategies.quadratic_programs(batch=BATCHES, dtype=torch.float32))
def test_float32(problem: KnownProblem) -> None:
    assert_optimal(problem)


@pytest.mark.parametrize("bounds", known.BOUNDS)
def test_every_backend(backend: str, bounds: known.Bounds) -> None:
    reach = diffopt.backends.get(backend).can.accuracy
    for problem in (
        known.quadratic_program(0, 5, 1, 4, bounds=bounds, batch=(3,)),
        known.linear_program(1, 4, 1, 6, bounds=bounds, batch=(3,)),
        known.quadratic_program(2, 5, 1, 4, bounds=bounds, batch=(3,), singular=True),
    ):
        assert_optimal(problem, backend, max(reach, RESIDUAL[torch.float64]))


@given(strategies.infeasible_programs(batch=BATCHES))
def test_infeasible_programs_are_proven(problem: KnownProblem) -> None:
    solution = diffopt.solve_qp(**problem.arguments(), on_failure="return")
    assert torch.equal(solution.status, problem.status), (solution.status, problem)
    assert bool(solution.x.isnan().all())
    proof = solution.certificate
    assert proof is not None
    d = problem.arguments()
    zero = torch.zeros(*problem.batch_shape, 1, dtype=torch.float64)
    pull = sum(
        (d[name].mT @ dual.unsqueeze(-1)).squeeze(-1)  # type: ignore[union-attr]
        for name, dual in (("A", proof.nu), ("G", proof.lam))
        if d[name] is not None
    )
    bounds = [
        torch.full_like(proof.x, s * torch.inf) if d[k] is None else d[k] for k, s in (("lower", -1), ("upper", 1))
    ]
    lower, upper = (torch.where(v.isinf(), 0.0, v) for v in bounds if v is not None)  # a dual of no bound must be 0
    for dual, bound in zip((proof.lam_lower, proof.lam_upper), bounds, strict=True):
        assert bool((dual >= 0).all()) and bool((dual[bound.isinf()] == 0).all()), problem  # type: ignore[union-attr]
    assert bool((proof.lam >= 0).all()), problem
    worst = (pull - proof.lam_lower + proof.lam_upper).abs().amax(-1)
    total = zero[..., 0] + (upper * proof.lam_upper - lower * proof.lam_lower).sum(-1)
    for side, dual in (("b", proof.nu), ("h", proof.lam)):
        if d[side] is not None:
            total = total + (d[side] * dual).sum(-1)  # type: ignore[operator]
    assert float((total + 1).abs().max()) <= 1e-9, problem
    assert float(worst.max()) <= 1e-8, (worst, problem)


@given(strategies.unbounded_programs(batch=BATCHES))
def test_unbounded_programs_are_proven(problem: KnownProblem) -> None:
    solution = diffopt.solve_qp(**problem.arguments(), on_failure="return")
    assert torch.equal(solution.status, problem.status), (solution.status, problem)
    proof = solution.certificate
    assert proof is not None
    for one, ray in zip(problem.instances(), proof.x.reshape(-1, problem.q.shape[-1]), strict=True):
        assert abs(float(one.q @ ray) + 1) <= 1e-9, problem
        for matrix, sign in ((one.Q, 0), (one.A, 0), (one.G, 1)):
            if matrix is not None and matrix.numel():
                change = matrix @ ray
                assert float(change.max() if sign else change.abs().max()) <= 1e-7, problem
        if one.lower is not None and one.upper is not None:
            assert bool((ray[one.lower.isfinite()] >= -1e-7).all()), problem
            assert bool((ray[one.upper.isfinite()] <= 1e-7).all()), problem
