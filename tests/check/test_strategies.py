"""The strategies keep their promises: each answer is proven here, without a solver of ours."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.vendor.pretty import pretty
from scipy.optimize import linprog
from torch import Tensor

import diffopt
from diffopt.check import known, strategies
from diffopt.check.known import KnownProblem
from diffopt.errors import MissingPackage, ParameterError
from tolerances import KNOWN_POINT

BATCHES = st.sampled_from([(), (3,), (2, 2)])


def dense(problem: KnownProblem) -> dict[str, Tensor]:
    """The data of one instance with every piece present."""
    n, like = problem.q.shape[-1], problem.q
    absent = {
        "Q": like.new_zeros(n, n), "A": like.new_zeros(0, n), "b": like.new_zeros(0), "G": like.new_zeros(0, n),
        "h": like.new_zeros(0), "lower": like.new_full((n,), -torch.inf), "upper": like.new_full((n,), torch.inf),
    }  # fmt: skip
    return {name: absent[name] if v is None else v for name, v in problem.arguments().items()}


def gaps(problem: KnownProblem) -> list[tuple[Tensor, Tensor]]:
    """Pairs (slack, multiplier) of rows, lower and upper bounds of one instance."""
    d = dense(problem)
    return [
        (problem.s, problem.lam),
        (problem.x - d["lower"], problem.lam_lower),
        (d["upper"] - problem.x, problem.lam_upper),
    ]


def active_rows(problem: KnownProblem) -> Tensor:
    """A and the active rows of G and of the bounds of one instance (slack exactly 0)."""
    d, eye = dense(problem), torch.eye(problem.q.shape[-1], dtype=problem.q.dtype)
    masks = [slack == 0 for slack, _ in gaps(problem)]
    return torch.cat([d["A"], d["G"][masks[0]], -eye[masks[1]], eye[masks[2]]])


def assert_optimal(problem: KnownProblem, tolerance: float = KNOWN_POINT) -> None:
    """Assert the KKT conditions of one instance, relative to the largest term of each line."""
    d = dense(problem)

    def zero(*terms: Tensor) -> None:
        size = max((float(t.abs().max()) for t in terms if t.numel()), default=0.0)
        total = torch.as_tensor(sum(terms))
        assert total.numel() == 0 or float(total.abs().max()) <= tolerance * (1 + size), problem.recipe

    forces = [d["A"].mT @ problem.nu, d["G"].mT @ problem.lam, -problem.lam_lower, problem.lam_upper]
    zero(d["Q"] @ problem.x, d["q"], *forces)
    zero(d["A"] @ problem.x, -d["b"])
    zero(d["G"] @ problem.x, problem.s, -d["h"])
    for slack, multiplier in gaps(problem):
        assert bool((slack >= 0).all()) and bool((multiplier >= 0).all()), problem.recipe
        assert bool(((slack == 0) | (multiplier == 0)).all()), problem.recipe
    assert bool((problem.status == diffopt.Status.SOLVED).all())


def assert_margin(problem: KnownProblem, margin: float) -> None:
    for slack, multiplier in gaps(problem):
        # The slack of a bound is a difference of rounded numbers.
        assert bool((slack + multiplier >= margin * (1 - 1e-12) - 1e-12).all()), problem.recipe


@given(strategies.quadratic_programs(batch=BATCHES, singular=st.booleans(), margin=0.05, condition=1e4))
def test_quadratic_programs(problem: KnownProblem) -> None:
    for one in problem.instances():
        assert_optimal(one)
        assert_margin(one, 0.05)
        rows = active_rows(one)
        n, k = one.q.shape[0], rows.shape[0]
        assert k <= n
        assert k == 0 or float(torch.linalg.svdvals(rows).min()) >= known.SMALLEST_SINGULAR_VALUE
        assert one.Q is not None
        eigenvalues = torch.linalg.eigvalsh(one.Q)
        assert float(eigenvalues[0]) >= -1e-14
        if eigenvalues[0] > 1e-6:
            assert float(eigenvalues[-1] / eigenvalues[0]) <= 1e4 * (1 + 1e-9)
        null = torch.linalg.svd(rows, full_matrices=True).Vh[k:]
        if k < n:  # the curvature that makes x unique
            assert float(torch.linalg.eigvalsh(null @ one.Q @ null.mT).min()) >= 1e-4 * (1 - 1e-9)


@given(strategies.quadratic_programs(singular=True, bounds=None))
def test_singular_means_the_lowest_rank(problem: KnownProblem) -> None:
    assert problem.Q is not None
    rank = int((torch.linalg.eigvalsh(problem.Q) > 1e-10).sum())
    assert rank == problem.q.shape[0] - active_rows(problem).shape[0]


@given(strategies.quadratic_programs(batch=(4,), shared=True, singular=st.booleans()))
def test_shared_matrices_have_no_batch_dimensions(problem: KnownProblem) -> None:
    assert problem.Q is not None and problem.Q.dim() == 2
    assert problem.A is None or problem.A.dim() == 2
    assert problem.G is None or problem.G.dim() == 2
    for one in problem.instances():
        assert_optimal(one)
        assert_margin(one, 0.1)


@given(strategies.quadratic_programs(dtype=torch.float32, condition=10.0))
def test_float32(problem: KnownProblem) -> None:
    assert {t.dtype for t in problem.arguments().values() if t is not None} == {torch.float32}
    fields: dict[str, Any] = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in vars(problem).items()
    }
    assert_optimal(KnownProblem(**fields), tolerance=8 * torch.finfo(torch.float32).eps)


@given(strategies.linear_programs(batch=BATCHES))
def test_linear_programs(problem: KnownProblem) -> None:
    assert problem.Q is None
    for one in problem.instances():
        assert_optimal(one)
        assert_margin(one, 0.1)
        rows = active_rows(one)
        assert rows.shape[0] == one.q.shape[0]
        assert float(torch.linalg.svdvals(rows).min()) >= known.SMALLEST_SINGULAR_VALUE


@given(strategies.degenerate_programs(batch=BATCHES))
def test_degenerate_programs(problem: KnownProblem) -> None:
    for one in problem.instances():
        assert_optimal(one)
        weak = sum(int(((slack == 0) & (multiplier == 0)).sum()) for slack, multiplier in gaps(one))
        assert weak == int(one.weakly_active) >= 1
        assert float(torch.linalg.svdvals(active_rows(one)).min()) >= known.SMALLEST_SINGULAR_VALUE


@given(strategies.redundant_programs(batch=BATCHES))
def test_redundant_programs(problem: KnownProblem) -> None:
    for one in problem.instances():
        assert_optimal(one)
        assert_margin(one, 0.1 / 2 / 4)  # multipliers are shared by up to 4 copies, of twice the size at most
        rows = active_rows(one)
        rank = int((torch.linalg.svdvals(rows) > 1e-9).sum()) if rows.numel() else 0
        assert rows.shape[0] - rank == int(one.dependent)


@given(strategies.badly_scaled_programs(batch=BATCHES))
def test_badly_scaled_programs(problem: KnownProblem) -> None:
    for one in problem.instances():
        d = dense(one)
        for slack, multiplier in gaps(one):
            assert bool(((slack == 0) | (multiplier == 0)).all())
        # In units of the largest term of each line, which is what a scaling by powers of two keeps.
        terms = torch.stack(
            [d["Q"] @ one.x, d["q"], -one.lam_lower, one.lam_upper, d["A"].mT @ one.nu, d["G"].mT @ one.lam]
        )
        sizes = (
            (d["Q"].abs() @ one.x.abs()) + d["q"].abs() + (d["G"].mT.abs() @ one.lam) + (d["A"].mT.abs() @ one.nu.abs())
        )
        assert bool((terms.sum(0).abs() <= KNOWN_POINT * sizes).all())
        slack = d["G"] @ one.x + one.s - d["h"]
        assert bool((slack.abs() <= KNOWN_POINT * (d["G"].abs() @ one.x.abs() + one.s + d["h"].abs())).all())


def test_badly_scaled_programs_are() -> None:
    problem = known.badly_scaled_program(0, 6, 2, 6)
    assert problem.G is not None
    norms = problem.G.norm(dim=-1)
    assert float(norms.max() / norms.min()) > 1e3


@given(strategies.infeasible_programs(batch=BATCHES, violation=0.25))
def test_infeasible_programs(problem: KnownProblem) -> None:
    assert bool((problem.status == diffopt.Status.PRIMAL_INFEASIBLE).all())
    assert bool(problem.x.isnan().all())
    for one in problem.instances():
        d, proof = dense(one), one.certificate
        assert proof is not None
        for multiplier, bound in ((proof.lam_lower, d["lower"]), (proof.lam_upper, d["upper"])):
            assert bool((multiplier >= 0).all())
            assert bool(bound[multiplier > 0].isfinite().all())
        assert bool((proof.lam >= 0).all())
        terms = [d["A"].mT @ proof.nu, d["G"].mT @ proof.lam, -proof.lam_lower, proof.lam_upper]
        assert float(torch.as_tensor(sum(terms)).abs().max()) <= 1e-12
        finite = {side: torch.where(d[side].isfinite(), d[side], 0.0) for side in ("lower", "upper")}
        total = d["b"] @ proof.nu + d["h"] @ proof.lam
        total = total - finite["lower"] @ proof.lam_lower + finite["upper"] @ proof.lam_upper
        assert abs(float(total) + 1) <= 1e-11


@given(strategies.unbounded_programs(batch=BATCHES))
def test_unbounded_programs(problem: KnownProblem) -> None:
    assert bool((problem.status == diffopt.Status.DUAL_INFEASIBLE).all())
    for one in problem.instances():
        d, proof = dense(one), one.certificate
        assert proof is not None
        direction = proof.x
        assert float((d["Q"] @ direction).abs().max()) <= 1e-13
        assert not d["A"].numel() or float((d["A"] @ direction).abs().max()) <= 1e-13
        assert not d["G"].numel() or float((d["G"] @ direction).max()) <= 1e-13
        assert bool((direction[d["lower"].isfinite()] >= 0).all())
        assert bool((direction[d["upper"].isfinite()] <= 0).all())
        assert abs(float(d["q"] @ direction) + 1) <= 1e-12


def highs(one: KnownProblem, objective: bool) -> int:
    """The status of HiGHS for the linear program of one instance: 2 infeasible, 3 unbounded."""
    d = {name: value.numpy() for name, value in dense(one).items()}
    costs = d["q"] if objective else np.zeros_like(d["q"])
    return linprog(
        costs, A_ub=d["G"], b_ub=d["h"], A_eq=d["A"], b_eq=d["b"], bounds=np.stack([d["lower"], d["upper"]], 1),
        options={"presolve": False},
    ).status  # fmt: skip


def test_another_solver_agrees() -> None:
    kinds: list[known.Infeasibility] = ["rows", "equalities"]  # linprog itself refuses lower > upper
    for seed in range(8):
        bounds = known.BOUNDS[seed % 5]
        assert highs(known.infeasible_program(seed, 4, 2, 3, kind=kinds[seed % 2], bounds=bounds), False) == 2
        assert highs(known.unbounded_program(seed, 4, 2, 3, linear=True, bounds=bounds), True) == 3
        solved = known.linear_program(seed, 4, 1, 5, bounds=bounds)
        assert highs(solved, True) == 0


def test_a_recipe_makes_the_same_problem() -> None:
    for problem in (
        known.quadratic_program(3, 4, 1, 2, bounds="mixed", batch=(2,), dtype=torch.float32, singular=True),
        known.linear_program(3, 4, 1, 5, shared=True, batch=(2,)),
        known.degenerate_program(3, 4, 1, 2, weak=2),
        known.redundant_program(3, 4, 1, 2, extra_p=1, extra_m=2, condition=3.0),
        known.badly_scaled_program(3, 4, 1, 2, decades=2.0),
        known.infeasible_program(3, 4, 2, 2, kind="equalities"),
        known.unbounded_program(3, 4, 2, 2, linear=True, bounds="both"),
    ):
        twin = eval(problem.recipe, {"diffopt": diffopt, "torch": torch})
        assert repr(twin) == repr(problem) == pretty(problem) == f"KnownProblem from {problem.recipe}"
        for name, value in problem.arguments().items():
            same = getattr(twin, name)
            assert value is same is None or torch.equal(value, same), (problem, name)


def test_an_empty_batch_keeps_its_sizes() -> None:
    problem = known.redundant_program(0, 3, 1, 2, extra_p=1, extra_m=1, batch=(0, 2))
    assert problem.batch_shape == (0, 2) and problem.instances() == []
    assert problem.A is not None and problem.A.shape == (0, 2, 2, 3)
    assert problem.lam.shape == (0, 2, 3)


def test_sizes_that_cannot_be_are_refused() -> None:
    for call in (
        lambda: known.quadratic_program(0, 2, p=3),
        lambda: known.quadratic_program(0, 2, bounds="sideways"),  # type: ignore[arg-type]
        lambda: known.quadratic_program(0, 2, condition=0.5),
        lambda: known.linear_program(0, 3, 1, 1),
        lambda: known.degenerate_program(0, 2, 1, 3, weak=2),
        lambda: known.redundant_program(0, 2, extra_m=1),
        lambda: known.redundant_program(0, 2, extra_p=1),
        lambda: known.infeasible_program(0, 2, kind="rows"),
        lambda: known.infeasible_program(0, 2, p=1, kind="equalities"),
        lambda: known.infeasible_program(0, 2, kind="magic"),  # type: ignore[arg-type]
        lambda: known.infeasible_program(0, 2, m=1, violation=0.0),
        lambda: known.unbounded_program(0, 2, p=2),
    ):
        with pytest.raises(ParameterError, match=r"Cannot draw such a problem: got .* Expected "):
            call()


def test_hypothesis_is_imported_only_when_used() -> None:
    script = "import sys, diffopt, diffopt.check; assert 'hypothesis' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_without_hypothesis_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    monkeypatch.delitem(sys.modules, "diffopt.check.strategies")
    monkeypatch.delattr(diffopt.check, "strategies")
    with pytest.raises(MissingPackage, match=r"pip install 'diffopt-torch\[test\]'"):
        _ = diffopt.check.strategies
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        diffopt.check.nonsense  # type: ignore[attr-defined]  # noqa: B018
    monkeypatch.undo()
    importlib.import_module("diffopt.check.strategies")
