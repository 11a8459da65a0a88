"""The contract of a backend, for every registered backend x executor x problem x dtype x device.

The registry is read: registering a backend is having it tested. A case that a backend refuses must be
refused with an error of ours that says why.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import diffopt
import measures
from diffopt.check import known
from problems_catalogue import CASES, Case, Posed
from tolerances import DIFFERENCES, GRADIENT, RESIDUAL, answer

CASE_IDS = [case.name for case in CASES]


class Way(NamedTuple):
    """A backend and who carries out its method."""

    backend: str
    executor: str = "auto"

    @property
    def accuracy(self) -> float:
        """The relative residual that the backend declares."""
        return diffopt.backends.get(self.backend).can.accuracy


# The primary backend with compiled code wherever that takes the problem, and without any.
WAYS = [*map(Way, diffopt.backends.names()), Way("pdipm", "torch")]


@pytest.fixture(scope="session", params=WAYS, ids=lambda way: "-".join(way).removesuffix("-auto"))
def way(request: pytest.FixtureRequest) -> Way:
    """Each registered backend, the primary one with each executor."""
    return request.param


def settings(way: Way, dtype: torch.dtype) -> diffopt.Settings:
    """The tolerance that is promised, or the accuracy that the backend declares where that is less."""
    return diffopt.Settings(tolerance=max(RESIDUAL[dtype], way.accuracy), executor=way.executor)


def refusal(posed: Posed, way: Way) -> str | None:
    form = posed.problem.standard_form(posed.problem.collect(posed.params))
    return diffopt.backends.get(way.backend).supports(form)


def solved(posed: Posed, way: Way, dtype: torch.dtype, params: dict[str, Any] | None = None) -> diffopt.Solution:
    values = posed.params if params is None else params
    return diffopt.solve(posed.problem, values, backend=way.backend, settings=settings(way, dtype))


def tracked(params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a copy that requires gradients, and its tensors by name (parts of a pair: name_0, name_1)."""
    leaves: dict[str, Tensor] = {}

    def leaf(name: str, value: Tensor) -> Tensor:
        leaves[name] = value.clone().requires_grad_()
        return leaves[name]

    copy: dict[str, Any] = {}
    for name, value in params.items():
        pair = isinstance(value, tuple)
        copy[name] = tuple(leaf(f"{name}_{i}", v) for i, v in enumerate(value)) if pair else leaf(name, value)
    return copy, leaves


def weighted(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return fixed weights for every entry of x, and the weighted sum."""
    weights = torch.linspace(-1, 2, x.numel(), dtype=x.dtype, device=x.device).reshape(x.shape)
    return weights, (weights * x).sum()


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_solves(way: Way, case: Case, dtype: torch.dtype, device: torch.device) -> None:
    posed = case.build(dtype).to(device)
    if refusal(posed, way):
        with pytest.raises(diffopt.BackendUnsupported, match=f"Backend '{way.backend}' cannot take this problem"):
            solved(posed, way, dtype)
        return
    solution = solved(posed, way, dtype)
    assert bool((solution.status == diffopt.Status.SOLVED).all()), solution
    assert bool(solution.ok.all()) and solution.backend == way.backend and solution.executor
    assert way.executor == "auto" or solution.executor.startswith(f"{way.executor}:")
    limit = settings(way, dtype).tolerance_for(dtype)
    for residual in solution.residuals:
        assert residual.shape == solution.status.shape
        assert bool((residual <= limit).all()), solution
    batch = solution.status.shape
    assert solution.x.shape == (*batch, posed.answer["x"].shape[-1])
    assert solution.x.dtype == dtype and solution.x.device.type == device.type
    assert solution.lam_lower.shape == solution.lam_upper.shape == solution.x.shape
    assert solution.value.shape == batch and solution.iterations.shape == batch
    for name in ("s", "lam", "lam_lower", "lam_upper"):
        assert bool((getattr(solution, name) >= 0).all()), name
    tolerance = answer(way.accuracy, dtype)
    for name, expected in posed.answer.items():
        got = getattr(solution, name)
        assert measures.relative(got, expected.expand_as(got)) <= tolerance, (name, got, expected)


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_gradients(way: Way, case: Case, device: torch.device) -> None:
    posed = case.build(torch.float64).to(device)
    if refusal(posed, way):
        return  # what is to be said of it is said above
    if posed.smooth:
        report = diffopt.check.gradients(
            posed.problem, posed.params, backend=way.backend, settings=settings(way, torch.float64),
            outputs=("x", *(["value"] if way.backend == "pdipm" else [])), directions=1, tolerance=DIFFERENCES,
        )  # fmt: skip
        assert report.ok, report
        assert all(not row.skipped for row in report.rows), report
    if posed.gradients is not None:
        params, leaves = tracked(posed.params)
        weights, total = weighted(solved(posed, way, torch.float64, params).x)
        total.backward()
        for name, expected in posed.gradients(weights.detach().cpu()).items():
            expected = expected.to(device)
            assert leaves[name].grad is not None, name
            expected = expected.sum_to_size(leaves[name].shape) if expected.dim() > leaves[name].dim() else expected
            assert measures.relative(leaves[name].grad, expected) <= GRADIENT[torch.float64], name


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_gradients_in_float32(way: Way, case: Case) -> None:
    found: list[dict[str, Tensor]] = []
    for dtype in (torch.float64, torch.float32):
        posed = case.build(torch.float32)
        if refusal(posed, way):
            return
        wide = {
            name: tuple(v.to(dtype) for v in value) if isinstance(value, tuple) else value.to(dtype)
            for name, value in posed.params.items()
        }
        params, leaves = tracked(wide)
        _, total = weighted(solved(posed, way, dtype, params).x)
        total.backward()
        found.append({name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[1].items():
        assert gradient.dtype == torch.float32
        assert measures.relative(gradient, found[0][name]) <= GRADIENT[torch.float32], name


def test_both_copies_of_a_repeated_row_move_x_together(way: Way) -> None:
    # x = c - a (a'c - h)/a'a: dx/dh = a/a'a when both sides move; how it is divided is a convention.
    posed = next(case for case in CASES if case.name == "repeated_row").build(torch.float64)
    params, leaves = tracked(posed.params)
    solution = solved(posed, way, torch.float64, params)
    # Duals are not unique: with both multipliers positive one row is dependent, else the other is weakly active.
    assert bool((solution.dependent + solution.weakly_active == 1).all()), (solution.dependent, solution.weakly_active)
    weights, total = weighted(solution.x)
    total.backward()
    a = posed.params["G"][0]
    assert leaves["h"].grad is not None
    assert float(leaves["h"].grad.sum()) == pytest.approx(float((weights @ a).sum() / 9), abs=GRADIENT[torch.float64])


def test_statuses_are_per_instance_and_nothing_raises(way: Way) -> None:
    """One good instance among every kind of bad one; the good one does not notice."""
    fine = known.quadratic_program(0, 3, 1, 2, bounds="both")
    data = {
        name: value.expand(7, *value.shape).clone() for name, value in fine.arguments().items() if value is not None
    }
    expected = [diffopt.Status.SOLVED] * 7
    data["q"][1, 0] = torch.nan
    data["G"][2, 0, 0] = torch.inf
    data["h"][3, 1] = -torch.inf  # nothing is <= -inf
    data["lower"][4, 1] = data["upper"][4, 1] + 1
    data["b"][5] = 1e3  # beyond what the bounds allow
    for i, status in (
        (1, "NONFINITE_INPUT"),
        (2, "NONFINITE_INPUT"),
        (4, "PRIMAL_INFEASIBLE"),
        (5, "PRIMAL_INFEASIBLE"),
    ):
        expected[i] = diffopt.Status[status]
    solution = diffopt.solve_qp(**data, backend=way.backend, on_failure="return", settings=settings(way, torch.float64))
    found = [diffopt.Status(int(code)) for code in solution.status]
    assert found[3] in (diffopt.Status.PRIMAL_INFEASIBLE, diffopt.Status.NONFINITE_INPUT)
    expected[3] = found[3]
    assert found == expected
    for i in (0, 6):
        assert measures.relative(solution.x[i], fine.x) <= answer(way.accuracy, torch.float64)
    failed = ~solution.ok
    assert bool(solution.x[failed].isnan().all()) and bool(solution.value[failed].isnan().all())
    with pytest.raises(diffopt.SolveFailed, match=r"batch index \[1\]: NONFINITE_INPUT") as caught:
        diffopt.solve_qp(**data, backend=way.backend, settings=settings(way, torch.float64))
    assert torch.equal(caught.value.solution.status, solution.status)


def test_unbounded_problems(way: Way) -> None:
    problem = known.unbounded_program(0, 3, 1, 2, bounds="lower", batch=(2,))
    solution = diffopt.solve_qp(
        **problem.arguments(), backend=way.backend, on_failure="return", settings=settings(way, torch.float64)
    )
    assert torch.equal(solution.status, problem.status), solution


@pytest.mark.parametrize("output", measures.OUTPUTS)
def test_a_masked_failure_gives_zero_and_an_unmasked_one_nan(way: Way, output: str) -> None:
    fine = known.quadratic_program(1, 3, 1, 2, bounds="both")
    data: dict[str, Any] = {name: value.expand(3, *value.shape).clone() for name, value in fine.arguments().items()}
    data["lower"][1, 0] = data["upper"][1, 0] + 1
    leaves = measures.tracked(data)
    solution = diffopt.solve_qp(
        **leaves, backend=way.backend, on_failure="return", settings=settings(way, torch.float64)
    )
    assert solution.ok.tolist() == [True, False, True]
    tensors, value = list(leaves.values()), getattr(solution, output)
    for name, gradient in zip(
        leaves, torch.autograd.grad(value[solution.ok].sum(), tensors, retain_graph=True), strict=True
    ):
        assert bool(gradient.isfinite().all()) and not gradient[1].any(), name
    for name, gradient in zip(leaves, torch.autograd.grad(value.sum(), tensors), strict=True):
        assert bool(gradient[[0, 2]].isfinite().all()), name
        # Whatever the failed instance gives for this output, nothing of it looks like a derivative.
        assert bool((gradient[1].isnan() | (gradient[1] == 0)).all()), (name, gradient[1])
        if output in ("x", "value"):
            assert bool(gradient[1].isnan().any()), name


class Liar(diffopt.backends.Backend):
    """Claims to have solved everything at x = 0. Not registered."""

    name = "liar"

    def _solve(self, form: Any, settings: diffopt.Settings) -> diffopt.backends.RawPoint:
        batch, like = form.batch_shape, form.q
        sizes = (form.n, form.p, form.m, form.n, form.n)
        x, nu, lam, lower, upper = (like.new_zeros(*batch, size) for size in sizes)
        status = torch.full(batch, int(diffopt.Status.SOLVED), dtype=torch.int8)
        return diffopt.backends.RawPoint(x, nu, lam, lower, upper, status, torch.zeros(batch, dtype=torch.int64))


def test_a_claim_of_success_is_not_believed() -> None:
    q = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1e-7, 0.0]], dtype=torch.float64)  # x = 0 is right, wrong, almost right
    with pytest.warns(diffopt.InaccurateSolutionWarning, match="1 of 3 instances are only almost solved"):
        solution = diffopt.solve_qp(torch.eye(2, dtype=torch.float64), q, backend=Liar(), on_failure="return")
    names = [diffopt.Status(int(code)).name for code in solution.status]
    assert names == ["SOLVED", "NUMERICAL_ERROR", "ALMOST_SOLVED"]
