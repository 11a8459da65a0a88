"""`diffopt.check.gradients` finds planted faults, and tells kinks and failures from faults."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import diffopt
from diffopt.check import known
from diffopt.errors import GradientCheckFailed
from problems_catalogue import Projection, Softmax, structure


class Faulty(torch.autograd.Function):
    """The identity with a wrong derivative, in chosen instances."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factors: Tensor) -> Tensor:
        ctx.save_for_backward(factors)
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (factors,) = ctx.saved_tensors
        return grads[0] * factors.reshape(-1, *[1] * (grads[0].dim() - 1)), None


class FaultyStructure(diffopt.QPStructure):
    """A structure in which the derivative of one piece is wrong by a factor."""

    def plant(self, piece: str, factors: list[float]) -> FaultyStructure:
        self.piece, self.factors = piece, factors
        return self

    def form(self, Q: Any, q: Any, A: Any, b: Any, G: Any, h: Any, lower: Any, upper: Any) -> diffopt.QPForm:
        data = {"Q": Q, "q": q, "A": A, "b": b, "G": G, "h": h, "lower": lower, "upper": upper}
        if hasattr(self, "piece"):
            data[self.piece] = Faulty.apply(data[self.piece], torch.tensor(self.factors, dtype=torch.float64))
        return super().form(**data)


def posed(**options: Any) -> tuple[FaultyStructure, dict[str, Tensor]]:
    # The middle instance has an active row, an active lower and an active upper bound, and room to move.
    problem = known.quadratic_program(32, 6, 1, 4, bounds="both", batch=(3,), condition=10.0, **options)
    params = {name: value for name, value in problem.arguments().items() if value is not None}
    return FaultyStructure(6, **{name: diffopt.given() for name in params}), params


@pytest.mark.parametrize("piece", ["Q", "q", "A", "b", "G", "h", "lower", "upper"])
def test_a_wrong_derivative_is_found_in_its_instance(piece: str) -> None:
    problem, params = posed()
    diffopt.check.gradients(problem, params, outputs=("x", "value")).raise_if_failed()
    report = diffopt.check.gradients(problem.plant(piece, [1.0, 1.01, 1.0]), params, outputs=("x", "value"))
    wrong = [row for row in report.rows if row.worst_error > report.tolerance]
    assert not report.ok
    assert {row.parameter for row in wrong} == {piece}
    assert all(row.worst_instance == (1,) for row in wrong)
    with pytest.raises(GradientCheckFailed, match=f"x by {piece}") as caught:
        report.raise_if_failed()
    assert isinstance(caught.value, AssertionError)
    assert str(report) in str(caught.value)


def test_mean_for_sum_is_found_in_a_shared_parameter() -> None:
    problem, params = posed(shared=True)
    report = diffopt.check.gradients(problem.plant("G", [1 / 3]), params)
    wrong = {row.parameter for row in report.rows if row.worst_error > report.tolerance}
    assert wrong == {"G"}
    assert all(row.worst_instance is None for row in report.rows if row.parameter == "G")


def test_a_detached_parameter_is_found() -> None:
    class Detached(Projection):
        def form(self, point: Tensor, a: Tensor, level: Tensor) -> diffopt.QPForm:
            return super().form(point, a.detach(), level)

    params = {
        "point": torch.tensor([1.0, 0.5], dtype=torch.float64),
        "a": torch.tensor([1.0, 1.5], dtype=torch.float64),
        "level": torch.tensor(1.0, dtype=torch.float64),
    }
    assert diffopt.check.gradients(Projection(), params).ok
    report = diffopt.check.gradients(Detached(), params)
    assert [row.parameter for row in report.rows if row.worst_error > report.tolerance] == ["a"]


def test_a_gradient_of_nan_is_a_fault() -> None:
    problem, params = posed()
    report = diffopt.check.gradients(problem.plant("q", [1.0, float("nan"), 1.0]), params)
    row = next(row for row in report.rows if row.parameter == "q")
    assert not report.ok and row.worst_error == float("inf") and row.worst_instance == (1,)


def test_an_unsymmetric_gradient_of_a_symmetric_matrix_is_no_fault() -> None:
    # Only the symmetric part of Q is meant, so only symmetric moves are tried.
    problem, params = posed()
    skew = torch.triu(torch.ones(6, 6, dtype=torch.float64), 1)
    report = diffopt.check.gradients(problem, params | {"Q": params["Q"] + 0.1 * (skew - skew.mT)})
    assert report.ok, report


def test_kinks_are_reported_and_not_failed() -> None:
    smooth = known.quadratic_program(0, 4, 1, 4, batch=(2,), condition=10.0)
    kink = known.degenerate_program(1, 4, 1, 4, weak=1, condition=10.0)
    twice = known.redundant_program(5, 4, 1, 3, extra_m=1, condition=10.0)
    assert int(twice.dependent) == 1
    pieces = [*smooth.instances(), kink, twice]
    params = {k: torch.stack([getattr(one, k) for one in pieces]) for k in ("Q", "q", "A", "b", "G", "h")}
    declared = diffopt.QPStructure(4, **{name: diffopt.given() for name in params})
    report = diffopt.check.gradients(declared, params)
    assert report.ok, report
    for row in report.rows:
        assert row.compared == 2
        assert row.skipped == {"weakly active row": 1, "dependent active rows": 1}


def test_a_kink_within_the_step_is_reported() -> None:
    # min (x - c)^2/2 s.t. x >= 0: a kink at c = 0, and c = 1e-4 is nearer to it than a step of 1e-2.
    declared = diffopt.QPStructure(1, Q=1.0 * torch.ones(1, 1, dtype=torch.float64), lower=0.0)
    params = {"q": -torch.tensor([[1e-4], [1.0]], dtype=torch.float64)}
    report = diffopt.check.gradients(declared, params, step=1e-2)
    (row,) = report.rows
    assert report.ok and report.step == 1e-2
    assert row.compared == 1 and row.skipped == {"active set changes within the step": 1}
    assert diffopt.check.gradients(declared, params).rows[0].compared == 2


def test_failed_instances_are_reported() -> None:
    problem, params = posed()
    params = {name: value.clone() for name, value in params.items()}
    params["lower"][1] = params["upper"][1] + 1
    report = diffopt.check.gradients(problem, params)
    assert report.ok, report
    assert all(row.compared == 2 and row.skipped == {"not solved": 1} for row in report.rows)


def test_failed_instances_do_not_spoil_a_shared_parameter() -> None:
    problem, params = posed(shared=True)
    params = {name: value.clone() for name, value in params.items()}
    params["lower"][1] = params["upper"][1] + 1
    assert diffopt.check.gradients(problem, params).ok
    report = diffopt.check.gradients(problem.plant("A", [2.0]), params)
    assert {row.parameter for row in report.rows if row.worst_error > report.tolerance} == {"A"}


def test_nothing_compared_is_not_success() -> None:
    problem = known.degenerate_program(1, 4, 1, 4, weak=1)
    report = diffopt.check.gradients(*structure(problem))
    assert not report.ok
    with pytest.raises(GradientCheckFailed, match="Nothing could be compared for: x by Q"):
        report.raise_if_failed()


def test_an_l1_term_that_moves_nothing_has_dependent_rows() -> None:
    # min (x - c)^2/2 + |x - 1|, by t >= |x - 1| over (x, t), and t >= 0: at x = 1 three rows meet in two variables.
    G = torch.tensor([[1.0, -1.0], [-1.0, -1.0], [0.0, -1.0]], dtype=torch.float64)
    declared = diffopt.QPStructure(
        2,
        Q=diffopt.fixed(torch.tensor([[1.0, 0.0], [0.0, 0.0]]).double()),
        G=G,
        h=torch.tensor([1.0, -1.0, 0.0]).double(),
    )
    q = torch.tensor([[-1.5, 1.0], [-4.0, 1.0]], dtype=torch.float64)
    report = diffopt.check.gradients(declared, {"q": q[:1]})
    with pytest.raises(GradientCheckFailed, match="active rows depend on each other.*every entry moves"):
        report.raise_if_failed()
    (row,) = diffopt.check.gradients(declared, {"q": q}).rows
    assert row.compared == 1 and row.skipped == {"dependent active rows": 1}


def test_a_fixed_variable_moves_only_together() -> None:
    # Moving one of two equal bounds makes the problem infeasible on one side: reported.
    q = torch.tensor([1.0, -1.0], dtype=torch.float64)
    bound = torch.tensor([0.5, torch.inf], dtype=torch.float64)
    params = {"q": q, "lower": torch.tensor([0.5, -torch.inf], dtype=torch.float64), "upper": bound}
    declared = diffopt.QPStructure(
        2, Q=diffopt.fixed(1.0, form="scaled_identity"), lower=diffopt.given(), upper=diffopt.given()
    )
    report = diffopt.check.gradients(declared, params)
    verdicts = {row.parameter: (row.compared, row.skipped) for row in report.rows}
    assert verdicts["q"] == (1, {})
    assert verdicts["lower"] == verdicts["upper"] == (0, {"not solved": 1})


def test_a_singular_hessian_stays_positive_semidefinite() -> None:
    problem = known.quadratic_program(2, 5, 1, 5, batch=(2,), singular=True, condition=10.0)
    report = diffopt.check.gradients(*structure(problem), outputs=("x", "lam"))
    assert report.ok and all(row.compared == 2 for row in report.rows), report
    flat = diffopt.QPStructure(2, Q=diffopt.given("diagonal"), lower=-1.0, upper=1.0)
    params = {"Q": torch.tensor([1.0, 0.0], dtype=torch.float64), "q": torch.tensor([0.5, 1.0], dtype=torch.float64)}
    report = diffopt.check.gradients(flat, params)
    assert report.ok and report.rows[0].compared == 1, report


@pytest.mark.parametrize("size", [1.0, 1e6])
def test_a_variable_held_at_zero_has_no_derivative(size: float) -> None:
    relu = diffopt.QPStructure(1, Q=diffopt.fixed(1.0, form="scaled_identity"), lower=0.0)
    report = diffopt.check.gradients(relu, {"q": torch.tensor([[2.0 * size]], dtype=torch.float64)})
    assert report.ok and report.rows[0].compared == 1, report


def test_the_report_reads_as_a_table() -> None:
    problem, params = posed()
    report = diffopt.check.gradients(problem.plant("h", [1.0, 1.5, 1.0]), params)
    lines = str(report).splitlines()
    assert "pdipm" in lines[0] and "step 6." in lines[0] and lines[0].endswith("FAILED")
    assert lines[1].split() == ["parameter", "output", "derivative", "worst", "error", "compared", "skipped"]
    (line,) = (line for line in lines if line.startswith("h "))
    assert line.endswith("wrong at (1,)")
    assert len(lines) == 2 + len(params)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_wrong_derivative_is_found_however_small(scale: float) -> None:
    # x = -q / scale, so its derivative by q is 1 / scale.
    declared = {"Q": torch.eye(3, dtype=torch.float64) * scale, "q": diffopt.given()}
    params = {"q": torch.tensor([[1.0, -2.0, 0.5], [0.5, 1.0, 3.0]], dtype=torch.float64)}
    report = diffopt.check.gradients(FaultyStructure(3, **declared), params, outputs=("x", "value"))
    assert report.ok and all(row.noise < 1e-3 * row.derivative for row in report.rows), report
    report = diffopt.check.gradients(FaultyStructure(3, **declared).plant("q", [1.0, 1.001]), params)
    (row,) = report.rows
    assert not report.ok and row.worst_instance == (1,) and 1e-4 < row.worst_error < 1e-2, report


def test_a_derivative_below_the_noise_is_shown_as_such() -> None:
    # x moves by 1e-13 of its size.
    class Slight(diffopt.QuadraticProgram):
        def form(self, c: Tensor) -> diffopt.QPForm:
            return diffopt.QPForm(Q=3 * torch.eye(2, dtype=c.dtype), q=-1 + 1e-13 * c)

    (row,) = (report := diffopt.check.gradients(Slight(), {"c": torch.ones(2, dtype=torch.float64)})).rows
    assert row.derivative < row.noise < 1e-7
    assert str(report).splitlines()[2].split()[:5] == ["c", "x", "<", f"{row.noise:.1e}", f"{row.worst_error:.1e}"]
    # Where x is exactly zero, rounding errors of the gradient remain.
    inactive = diffopt.QPStructure(1, Q=torch.eye(1).double(), q=torch.zeros(1).double(), upper=diffopt.given())
    (row,) = (report := diffopt.check.gradients(inactive, {"upper": torch.ones(1, dtype=torch.float64)})).rows
    assert report.ok and row.derivative == 0.0 and row.noise < 1e-14


def test_every_output_and_every_direction_is_seeded() -> None:
    problem, params = posed()
    first, second = (diffopt.check.gradients(problem, params, seed=3) for _ in range(2))
    assert first == second
    assert first != diffopt.check.gradients(problem, params, seed=4)


def test_an_empty_batch_has_nothing_to_compare() -> None:
    problem = known.quadratic_program(0, 3, 1, 2, batch=(0,))
    report = diffopt.check.gradients(*structure(problem))
    assert report.ok and all(row.compared == 0 for row in report.rows)


def test_parameters_of_a_nonlinear_problem_are_compared_by_instance() -> None:
    c = torch.tensor([[0.0, 0.5, -1.0], [1.0, -0.25, 0.3]], dtype=torch.float64)
    report = diffopt.check.gradients(Softmax(3), {"c": c}, outputs=("x", "value", "nu"))
    assert report.ok and all(row.compared == 2 and row.worst_instance is not None for row in report.rows), report


@pytest.mark.parametrize("low_rank", [False, True])
def test_a_structured_matrix_can_be_given(low_rank: bool) -> None:
    d = torch.tensor([[1.0, 2.0, 0.5], [0.25, 1.0, 3.0]], dtype=torch.float64)
    U = torch.tensor([[1.0], [-1.0], [2.0]], dtype=torch.float64)
    declared = diffopt.QPStructure(3, q=torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), lower=-0.5)
    report = diffopt.check.gradients(
        declared, {"Q": diffopt.DiagonalPlusLowRank(d, U) if low_rank else diffopt.Diagonal(d)}
    )
    report.raise_if_failed()
    names = ["Q_diagonal", "Q_factor"] if low_rank else ["Q"]
    assert [row.parameter for row in report.rows] == names
    assert report.rows[0].worst_instance is not None


def test_whole_numbers_are_left_alone() -> None:
    class Picked(diffopt.QuadraticProgram):
        def form(self, point: Tensor, which: Tensor, level: float) -> diffopt.QPForm:
            chosen = point[..., which]
            return diffopt.QPForm(Q=torch.eye(2, dtype=point.dtype), q=-chosen, upper=level)

    params = {"point": torch.arange(3.0, dtype=torch.float64), "which": torch.tensor([2, 0]), "level": 1.5}
    report = diffopt.check.gradients(Picked(), params)
    assert report.ok and [row.parameter for row in report.rows] == ["point"]


def test_settings_and_backend_of_a_layer_are_used() -> None:
    problem, params = posed()
    layer = diffopt.Layer(problem, backend="scipy", settings=diffopt.Settings(tolerance=1e-6))
    assert diffopt.check.gradients(layer, params, directions=1).backend == "scipy"
    assert diffopt.check.gradients(layer, params, directions=1, backend="pdipm").backend == "pdipm"


@pytest.mark.parametrize("penalty", ["l1", "squared"])
def test_soft_constraints_of_a_layer_are_checked_with_their_weights(penalty: Any) -> None:
    problem, params = posed()
    params = params | {"h": params["h"] - 3}
    elastic = diffopt.Elastic(
        penalty, eq=diffopt.learned(torch.tensor(0.3, dtype=torch.float64)), row=diffopt.given(), bound=2.0
    )
    call = params | {"elastic_row": 0.5 + torch.rand(3, 4, generator=torch.Generator().manual_seed(0)).double()}
    layer = diffopt.Layer(problem, on_infeasible=elastic)
    assert bool((layer.solve(**call).shifts.row > 0.1).any())  # type: ignore[union-attr]
    report = diffopt.check.gradients(layer, call, outputs=("x", "value"))
    assert report.ok and all(row.compared == 3 for row in report.rows), report
    assert {row.parameter for row in report.rows} == {*call, "elastic_eq"}
    problem.plant("h", [1.0, 1.01, 1.0])
    report = diffopt.check.gradients(layer, call, outputs=("x", "value"))
    assert {row.parameter for row in report.rows if row.worst_error > report.tolerance} == {"h"}
    with pytest.raises(diffopt.ParameterError, match="need `elastic_row`, which was not given"):
        diffopt.check.gradients(layer, params)


def test_the_kink_of_an_l1_penalty_within_the_step_is_reported() -> None:
    # min (x - c)^2/2 + max(x, 0): x = 0 up to c = 1, then c - 1, and the row is active on both sides.
    eye, zero = torch.eye(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    layer = diffopt.Layer(diffopt.QPStructure(1, Q=eye, G=eye, h=zero), on_infeasible=diffopt.Elastic(row=1.0))
    q = -torch.tensor([[1.001], [0.999], [2.0]], dtype=torch.float64)
    (row,) = diffopt.check.gradients(layer, {"q": q}, step=1e-2).rows
    assert row.compared == 1 and row.skipped == {"active set changes within the step": 2}
    assert diffopt.check.gradients(layer, {"q": q}).rows[0].compared == 3


def test_the_closest_problem_is_checked_where_it_is_differentiable() -> None:
    problem, params = posed()
    crossed = params["lower"].clone()
    crossed[1] = params["upper"][1] + 0.1
    layer, call = diffopt.Layer(problem, on_infeasible="closest"), params | {"lower": crossed}
    report = diffopt.check.gradients(layer, call, outputs=("x", "value"))
    for row in report.rows:
        expected = {"dependent active rows": 1} if row.parameter in ("A", "G") else {}
        assert row.skipped == expected and row.compared == 3 - len(expected), report
    assert report.ok, report
    report = diffopt.check.gradients(layer, call, outputs=("lam",))
    assert all(row.skipped == {"dependent active rows": 1} for row in report.rows), report
    report = diffopt.check.gradients(
        diffopt.Layer(problem.plant("lower", [1.0, 1.01, 1.0]), on_infeasible="closest"), call
    )
    assert [row.parameter for row in report.rows if row.worst_error > report.tolerance] == ["lower"]


def test_bad_arguments() -> None:
    problem, params = posed()
    with pytest.raises(diffopt.DtypeError, match=r"`Q` has dtype torch.float32. Expected torch.float64"):
        diffopt.check.gradients(problem, {name: value.float() for name, value in params.items()})
    with pytest.raises(diffopt.ParameterError, match=r"Unknown output 'z'. Expected some of x, s"):
        diffopt.check.gradients(problem, params, outputs=("x", "z"))
    for outputs in ((), "x"):
        with pytest.raises(diffopt.ParameterError, match=r"`outputs` = .*Expected some of x, s"):
            diffopt.check.gradients(problem, params, outputs=outputs)
    with pytest.raises(diffopt.ParameterError, match="`problem` is Sequential. Expected a diffopt.DifferentiableProbl"):
        diffopt.check.gradients(torch.nn.Sequential(diffopt.Layer(problem)), params)  # type: ignore[arg-type]
    with pytest.raises(diffopt.ParameterError, match=r"`params` is Tensor. Expected the given parameters by name"):
        diffopt.check.gradients(problem, params["q"])  # type: ignore[arg-type]
    for options in ({"directions": 0}, {"step": 0.0}, {"step": -1e-6}, {"tolerance": 0.0}, {"tolerance": float("nan")}):
        (name,) = options
        with pytest.raises(diffopt.SettingsError, match=f"`{name}` = .* is out of range. Expected"):
            diffopt.check.gradients(problem, params, **options)  # type: ignore[arg-type]
    with pytest.raises(diffopt.ParameterError, match="nothing to differentiate"):
        diffopt.check.gradients(diffopt.QPStructure(1, Q=torch.ones(1, 1), q=torch.ones(1)), {})
    with pytest.raises(diffopt.ParameterError, match="needs `q`"):
        diffopt.check.gradients(problem, {name: value for name, value in params.items() if name != "q"})
