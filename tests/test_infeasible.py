"""Problems that no x satisfies: elastic constraints, and the closest feasible problem."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import diffopt
import measures
from diffopt import Elastic, Settings, Status
from diffopt.check import known
from problems_catalogue import Softmax
from tolerances import DIFFERENCES, EXACT_ALGEBRA, GRADIENT, RESIDUAL, SOLUTION

FLOAT64 = torch.float64
Data = dict[str, Any]


def tensor(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=FLOAT64)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def contradictory(seed: int, batch: int = 2, bounds: str = "both") -> Data:
    """Programs in 5 variables whose rows, equalities and bounds contradict each other; each piece of data batched.

    x is not determined by the least shifts: 2 equalities and 4 rows, of which some are slack.
    """
    n = 5
    root = random(batch, n, n, seed=seed)
    data: Data = {
        "Q": root @ root.mT + torch.eye(n, dtype=FLOAT64),
        "q": random(batch, n, seed=seed + 1),
        "A": random(batch, 2, n, seed=seed + 2),
        "b": random(batch, 2, seed=seed + 3),
    }
    g = random(batch, n, seed=seed + 4)
    others = random(batch, 2, n, seed=seed + 5)
    # g'x <= -1 and g'x >= 1 cannot both be; the other rows are ordinary ones.
    data["G"] = torch.cat([torch.stack([g, -g], 1), others], 1)
    data["h"] = torch.cat([-torch.ones(batch, 2, dtype=FLOAT64), random(batch, 2, seed=seed + 6).abs()], 1)
    if bounds in ("lower", "both"):
        data["lower"] = -0.4 - 0.1 * random(batch, n, seed=seed + 7).abs()
    if bounds in ("upper", "both"):
        data["upper"] = 0.4 + 0.1 * random(batch, n, seed=seed + 8).abs()
    return data


def outputs(solution: diffopt.Solution, names: tuple[str, ...] = ("x",)) -> Tensor:
    """Return the named outputs and all shifts as one vector."""
    assert solution.shifts is not None
    return torch.cat([*(getattr(solution, name).flatten() for name in names), *(v.flatten() for v in solution.shifts)])


def assert_differences(f: Callable[[Data], Tensor], data: Data, directions: dict[str, Data]) -> None:
    """Check the gradient of a random functional of f against central differences along each direction."""
    leaves = measures.tracked(data)
    y = f(leaves)
    weights = random(y.numel(), seed=99)
    names = list(leaves)
    found = torch.autograd.grad((weights * y).sum(), [leaves[k] for k in names], allow_unused=True)
    gradient = dict(zip(names, found, strict=True))
    t = torch.finfo(FLOAT64).eps ** (1 / 3)
    for label, move in directions.items():
        high, low = (f(data | {k: data[k] + sign * t * v for k, v in move.items()}) for sign in (1, -1))
        numeric = float((weights * (high - low)).sum()) / (2 * t)
        parts = [(gradient[k] * v).sum() for k, v in move.items() if gradient[k] is not None]
        exact = float(torch.stack(parts).sum()) if parts else 0.0
        scale = 1 + abs(numeric)
        assert abs(exact - numeric) <= DIFFERENCES * scale, (label, exact, numeric)


def each_piece(data: Data, skip: tuple[str, ...] = ()) -> dict[str, Data]:
    """Return one random direction for each piece of data; Q's is symmetric."""
    moves = {}
    for i, (name, value) in enumerate(data.items()):
        if name not in skip:
            move = random(*value.shape, seed=200 + i)
            moves[name] = {name: 0.5 * (move + move.mT) if name == "Q" else move}
    return moves


# ---- elastic ---------------------------------------------------------------------------------------------------------


def test_a_contradiction_in_one_variable() -> None:
    # minimise (x - c)^2 / 2 with x <= 0 and x >= 1 at prices u and w.
    data = {"Q": tensor([1.0]), "q": tensor(-0.25), "G": tensor([1.0], [-1.0]), "h": tensor(0.0, -1.0)}
    l1 = diffopt.solve_qp(**data, on_infeasible=Elastic(row=tensor(2.0, 3.0)))
    # The dearer row holds: x = 1, which costs 9/32 + 2.
    assert l1.x.tolist() == pytest.approx([1.0]) and l1.shifts is not None
    assert l1.shifts.row.tolist() == pytest.approx([1.0, 0.0])
    assert float(l1.value) == pytest.approx(0.5 - 0.25 + 2.0)
    assert l1.lam.tolist() == pytest.approx([2.0, 2.75])  # (x - c) + lam_0 - lam_1 = 0
    squared = diffopt.solve_qp(**data, on_infeasible=Elastic("squared", row=tensor(2.0, 3.0)))
    # (x - 1/4) + 2 x - 3 (1 - x) = 0
    x = 3.25 / 6
    assert squared.x.tolist() == pytest.approx([x]) and squared.shifts is not None
    assert squared.shifts.row.tolist() == pytest.approx([x, 1 - x])
    assert float(squared.value) == pytest.approx(0.5 * x * x - 0.25 * x + x * x + 1.5 * (1 - x) ** 2)
    assert squared.lam.tolist() == pytest.approx([2 * x, 3 * (1 - x)])


@pytest.mark.parametrize("bounds", known.BOUNDS)
@pytest.mark.parametrize("soft_bounds", [False, True])
def test_a_large_l1_weight_is_exact(bounds: known.Bounds, soft_bounds: bool) -> None:
    problem = known.quadratic_program(3, 6, 2, 5, bounds=bounds, batch=(3,), condition=10.0)
    multipliers = torch.cat([problem.nu, problem.lam, problem.lam_lower, problem.lam_upper], -1)
    weight = 2 * float(multipliers.abs().max())
    elastic = Elastic(eq=weight, row=weight, bound=weight if soft_bounds else None)
    soft = diffopt.solve_qp(**problem.arguments(), on_infeasible=elastic)
    hard = diffopt.solve_qp(**problem.arguments())
    assert bool((soft.status == Status.SOLVED).all()) and soft.shifts is not None
    for name in ("x", "s", "lam", "nu", "lam_lower", "lam_upper", "value"):
        assert measures.relative(getattr(soft, name), getattr(hard, name)) <= SOLUTION[FLOAT64], name
    assert soft.residuals.primal.shape == (3,)
    assert all(float(v.abs().max()) <= SOLUTION[FLOAT64] for v in soft.shifts if v.numel())
    assert all(bool((v >= 0).all()) for v in soft.shifts[1:])


def test_a_weight_below_the_multiplier_violates_what_could_be_met() -> None:
    data = {"Q": tensor([1.0]), "q": tensor(-3.0), "G": tensor([1.0]), "h": tensor(1.0)}  # lam = 2
    below, above = (diffopt.solve_qp(**data, on_infeasible=Elastic(row=w)) for w in (1.5, 2.5))
    assert below.x.tolist() == pytest.approx([1.5]) and above.x.tolist() == pytest.approx([1.0])
    assert below.lam.tolist() == pytest.approx([1.5])


def test_squared_shifts_are_multipliers_over_weights() -> None:
    problem = known.quadratic_program(4, 6, 2, 5, bounds="both", batch=(3,), condition=10.0)
    weights = {"eq": 0.5 + random(3, 2, seed=0).abs(), "row": 0.5 + random(5, seed=1).abs(), "bound": 7.0}
    solution = diffopt.solve_qp(**problem.arguments(), on_infeasible=Elastic("squared", **weights))
    assert solution.shifts is not None
    eq, row, low, high = solution.shifts
    assert measures.relative(eq, solution.nu / weights["eq"]) <= EXACT_ALGEBRA
    assert measures.relative(row, solution.lam / weights["row"]) <= EXACT_ALGEBRA
    assert measures.relative(low, solution.lam_lower / 7.0) <= EXACT_ALGEBRA
    assert measures.relative(high, solution.lam_upper / 7.0) <= EXACT_ALGEBRA


@pytest.mark.parametrize("penalty", ["l1", "squared"])
def test_what_is_returned_is_optimal_for_the_shifted_sides(penalty: Any) -> None:
    data = contradictory(10)
    for elastic in (Elastic(penalty, eq=8.0, row=3.0), Elastic(penalty, eq=5.0, row=9.0, bound=4.0)):
        solution = diffopt.solve_qp(**data, on_infeasible=elastic)
        assert_optimal_for_the_shifts(data, solution)


def assert_optimal_for_the_shifts(data: Data, solution: diffopt.Solution, tolerance: float = RESIDUAL[FLOAT64]) -> None:
    assert bool((solution.status == Status.SOLVED).all()), solution
    eq, row, low, high = solution.shifts or ()
    moved = {"lower": None, "upper": None} | data
    moved["b"], moved["h"] = data["b"] + eq, data["h"] + row
    if "lower" in data:
        moved["lower"] = data["lower"] - low
    if "upper" in data:
        moved["upper"] = data["upper"] + high
    assert bool((row >= 0).all() and (low >= 0).all() and (high >= 0).all())
    for name in ("s", "lam", "lam_lower", "lam_upper"):
        assert bool((getattr(solution, name) >= 0).all()), name
    for name, residual in measures.residuals(moved, solution).items():
        assert float(residual.max()) <= tolerance, (name, residual)


@pytest.mark.parametrize("penalty", ["l1", "squared"])
def test_an_infinite_weight_is_a_hard_row(penalty: Any) -> None:
    data = contradictory(20)
    weights = torch.full((2, 4), 5.0, dtype=FLOAT64)
    weights[0, 0] = weights[1, 1] = torch.inf
    leaf = weights.clone().requires_grad_()
    solution = diffopt.solve_qp(**data, on_infeasible=Elastic(penalty, eq=50.0, row=leaf))
    assert solution.shifts is not None
    assert solution.shifts.row[0, 0] == 0 and solution.shifts.row[1, 1] == 0
    assert solution.shifts.row[0, 1].item() > 1 and solution.shifts.row[1, 0].item() > 1
    (gradient,) = torch.autograd.grad(outputs(solution).square().sum(), leaf)
    assert bool(gradient.isfinite().all()) and gradient[0, 0] == 0 and gradient[1, 1] == 0
    # All rows hard: no longer elastic at all.
    none = diffopt.solve_qp(**data, on_infeasible=Elastic(penalty, eq=None, row=None), on_failure="return")
    assert none.status.tolist() == [Status.PRIMAL_INFEASIBLE] * 2
    assert none.certificate is not None and none.certificate.lam.shape == (2, 4)
    with pytest.raises(
        diffopt.SolveFailed, match=r"What has no weight \(by default the bounds\).*diffopt.Elastic\(bound=...\)"
    ):
        diffopt.solve_qp(torch.eye(2), torch.zeros(2), lower=1.0, upper=0.0, on_infeasible="elastic")


ELASTICS: dict[str, Data] = {
    "l1": {"penalty": "l1", "eq": tensor(3.0, 2.5), "row": tensor(1.5, 2.0, 2.5, 3.0)},
    "squared": {"penalty": "squared", "eq": tensor(3.0, 2.5), "row": tensor([1.5, 2.0, 2.5, 3], [4.0, 3, 2, 1])},
    "l1 with bounds": {"penalty": "l1", "eq": None, "row": tensor(5.0, 2.0, 2.5, 3.0), "bound": tensor(*[1.5] * 5)},
    "squared with bounds": {"penalty": "squared", "eq": None, "row": tensor(2, 2, 2.5, 3), "bound": tensor(*[2.0] * 5)},
}  # fmt: skip


@pytest.mark.parametrize("bounds", ["none", "both"])
@pytest.mark.parametrize("name", ELASTICS)
def test_gradients_of_elastic_programs(name: str, bounds: str) -> None:
    data = contradictory(30, bounds=bounds)
    options = dict(ELASTICS[name])
    penalty = options.pop("penalty")
    weights = {key: value for key, value in options.items() if value is not None}

    def f(values: Data) -> Tensor:
        own = {key: values[key] for key in weights}
        rest = {key: value for key, value in values.items() if key not in weights}
        solution = diffopt.solve_qp(**rest, on_infeasible=Elastic(penalty, **options | own))
        assert not bool(solution.weakly_active.any())
        return outputs(solution, measures.OUTPUTS)

    values = data | weights
    assert_differences(f, values, each_piece(values))


def test_the_value_of_an_elastic_program_falls_by_violations() -> None:
    data = contradictory(40)
    weight = torch.full((4,), 3.0, dtype=FLOAT64, requires_grad=True)
    for penalty in ("l1", "squared"):
        solution = diffopt.solve_qp(**data, on_infeasible=Elastic(penalty, row=weight))
        assert solution.shifts is not None
        (gradient,) = torch.autograd.grad(solution.value.sum(), weight)
        violation = solution.shifts.row if penalty == "l1" else 0.5 * solution.shifts.row.square()
        assert measures.relative(gradient, violation.sum(0).detach()) <= EXACT_ALGEBRA


@pytest.mark.parametrize("form", ["diagonal", "diagonal_plus_low_rank", None])
def test_the_structure_of_the_hessian_is_kept(form: str | None) -> None:
    data = contradictory(50)
    d, U = 1 + random(5, seed=51).abs(), random(5, 2, seed=52)
    Q = {
        "diagonal": diffopt.Diagonal(d),
        "diagonal_plus_low_rank": diffopt.DiagonalPlusLowRank(d, U),
        None: None,
    }[form]
    dense = torch.zeros(5, 5, dtype=FLOAT64) if Q is None else Q.dense()
    for penalty in ("l1", "squared"):
        options: Data = {"on_infeasible": Elastic(penalty, eq=9.0, row=4.0)}
        got = diffopt.solve_qp(**data | {"Q": Q}, **options)
        expected = diffopt.solve_qp(**data | {"Q": dense}, **options)
        assert measures.relative(got.x, expected.x) <= SOLUTION[FLOAT64]
        assert measures.relative(outputs(got), outputs(expected)) <= SOLUTION[FLOAT64]


@pytest.mark.parametrize("policy", ["closest", Elastic(eq=None, row=None), Elastic("squared")], ids=str)
@pytest.mark.parametrize("contradiction", [True, False])
def test_shifts_that_are_zero_have_a_gradient_of_zero(policy: Any, contradiction: bool) -> None:
    data = contradictory(70, bounds="lower")
    if not contradiction:
        data["h"][:, :2], data["b"] = 1.0, 0 * data["b"]
    leaves = measures.tracked(data)
    solution = diffopt.solve_qp(**leaves, on_infeasible=policy, on_failure="return")
    assert solution.shifts is not None and not solution.shifts.high.any()
    for name, shift in zip(solution.shifts._fields, solution.shifts, strict=True):
        found = torch.autograd.grad(shift.sum(), list(leaves.values()), retain_graph=True, allow_unused=True)
        if not bool(shift.any()):
            assert all(g is None or not bool(g.any()) for g in found), name


def test_weights_in_a_layer() -> None:
    data = contradictory(60)
    pieces = {name: diffopt.fixed(value) for name, value in data.items() if name != "q"}
    structure = diffopt.QPStructure(5, q=diffopt.given(), **pieces)
    elastic = Elastic(eq=diffopt.learned(tensor(3.0, 3.0)), row=diffopt.given(), bound=9.0)
    layer = diffopt.Layer(structure, on_infeasible=elastic)
    assert [name for name, _ in layer.named_parameters()] == ["elastic_eq"]
    row = tensor([1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]).requires_grad_()
    solution = layer.solve(q=data["q"], elastic_row=row)
    plain = Elastic(eq=tensor(3.0, 3.0), row=row.detach(), bound=9.0)
    expected = diffopt.solve_qp(**data, on_infeasible=plain)
    assert measures.relative(solution.x, expected.x) <= EXACT_ALGEBRA
    outputs(solution).square().sum().backward()
    assert layer.elastic_eq.grad is not None and bool(layer.elastic_eq.grad.any())
    assert row.grad is not None and bool(row.grad.any())
    same = diffopt.solve(structure, {"q": data["q"], "elastic_row": row}, on_infeasible=elastic)
    assert torch.equal(same.x, solution.x)
    assert torch.equal(layer(q=data["q"], elastic_row=row), solution.x)
    with pytest.raises(diffopt.ParameterError, match="need `elastic_row`, which was not given"):
        layer(q=data["q"])
    with pytest.raises(diffopt.ParameterError, match="`elastic_eq` is declared learned and cannot be given"):
        layer(q=data["q"], elastic_row=row, elastic_eq=1.0)


def test_learning_weights_meets_a_target() -> None:
    # A weight is learned by which a cap of 1 on x gives way to x = 1.75, where c - x = w (1.75 - 1).
    layer = diffopt.Layer(
        diffopt.QPStructure(1, Q=tensor([1.0]), q=tensor(-4.0), G=tensor([1.0]), h=tensor(1.0)),
        on_infeasible=Elastic("squared", row=diffopt.learned(tensor(1.0))),
    )
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=50, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (layer() - 1.75).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    assert layer.elastic_row.item() == pytest.approx(3.0, rel=1e-4)


# ---- closest feasible ------------------------------------------------------------------------------------------------


def assert_least_shifts(data: Data, solution: diffopt.Solution, tolerance: float = 1e-9) -> None:
    """Check the optimality conditions of: minimise |t|^2 / 2 subject to Cx - t <= d (sufficient, for it is convex).

    t = y >= 0 where y are the multipliers; C'y = 0; a positive y holds its row with equality.
    """
    x = solution.x.detach().unsqueeze(-1)
    eq, row, low, high = (v.detach() for v in solution.shifts or ())
    pull = (data["A"].mT @ eq.unsqueeze(-1) + data["G"].mT @ row.unsqueeze(-1)).squeeze(-1) - low + high
    assert float(pull.abs().max()) <= tolerance
    assert measures.relative((data["A"] @ x).squeeze(-1), data["b"] + eq) <= tolerance
    slack = data["h"] + row - (data["G"] @ x).squeeze(-1)
    assert float(slack.min()) >= -tolerance and float((slack * row).abs().max()) <= tolerance
    for side, sign, shift in (("lower", -1, low), ("upper", 1, high)):
        if side in data:
            room = sign * (data[side] - solution.x.detach()) + shift
            assert float(room.min()) >= -tolerance and float((room * shift).abs().max()) <= tolerance


@pytest.mark.parametrize("bounds", ["none", "lower", "upper", "both"])
@pytest.mark.parametrize("seed", range(3))
def test_the_closest_feasible_problem(seed: int, bounds: str) -> None:
    data = contradictory(100 + 20 * seed, batch=4, bounds=bounds)
    solution = diffopt.solve_qp(**data, on_infeasible="closest")
    assert_optimal_for_the_shifts(data, solution)
    assert_least_shifts(data, solution)
    assert bool((outputs(solution, ()).reshape(-1) != 0).any())
    if bounds == "none":
        # Of both equalities and both rows that contradict each other, one is too many.
        assert bool((solution.shifts.row[:, :2] > 0).all() and (solution.dependent == 1).all())
    # x is the best of what the shifts allow: of any two such points, the better.
    assert measures.relative(solution.value, objective(data, solution.x)) <= EXACT_ALGEBRA


class Inaccurate(diffopt.backends.PdipmBackend):
    """Finds the shifts exactly, but not x. Not registered."""

    name = "inaccurate"

    def solve(self, form: Any, settings: Settings, keep: bool = False, start: Any = None) -> Any:
        return super().solve(form, settings.replace(executor="torch"), keep, start)

    def _solve(self, form: Any, settings: Settings, start: Any = None) -> Any:
        raw = super()._solve(form, settings, start)
        if isinstance(form.Q, diffopt.Dense):
            raw.x = raw.x + 3e-8
            raw.s = None
        return raw


def test_success_is_not_claimed_for_an_inaccurate_point() -> None:
    data = contradictory(150, bounds="none")
    with pytest.warns(diffopt.InaccurateSolutionWarning, match="2 of 2 instances are only almost solved"):
        solution = diffopt.solve_qp(**data, on_infeasible="closest", backend=Inaccurate())
    assert solution.status.tolist() == [Status.ALMOST_SOLVED] * 2
    moved = {"lower": None, "upper": None} | data
    assert solution.shifts is not None
    moved |= {"b": data["b"] + solution.shifts.eq, "h": data["h"] + solution.shifts.row}
    for name, residual in measures.residuals(moved, solution).items():
        assert bool((getattr(solution.residuals, name) >= 0.999 * residual).all()), name


def objective(data: Data, x: Tensor) -> Tensor:
    return ((0.5 * (data["Q"] @ x.unsqueeze(-1)).squeeze(-1) + data["q"]) * x).sum(-1)


def test_feasible_instances_are_left_as_they_are() -> None:
    data = contradictory(200, batch=4)
    data["h"][1::2, :2] = 1.0  # the contradiction is gone
    data["b"][1::2] = 0.1
    with_option = diffopt.solve_qp(**data, on_infeasible="closest")
    without = diffopt.solve_qp(**data, on_failure="return")
    assert without.ok.tolist() == [False, True, False, True] and bool(with_option.ok.all())
    for name in measures.OUTPUTS:
        assert torch.equal(getattr(with_option, name)[1::2], getattr(without, name)[1::2]), name
    assert with_option.shifts is not None
    for shift in with_option.shifts:
        assert not shift[1::2].any() and (shift[::2].any() or shift is with_option.shifts.high)
    assert torch.equal(with_option.iterations[1::2], without.iterations[1::2])
    feasible = {name: value[1::2] for name, value in data.items()}
    alone = diffopt.solve_qp(**feasible, on_infeasible="closest")
    assert torch.equal(alone.x, diffopt.solve_qp(**feasible).x)
    assert alone.shifts is not None and not any(bool(shift.any()) for shift in alone.shifts)


@pytest.mark.parametrize("bounds", ["none", "lower", "upper", "both"])
def test_gradients_of_the_closest_problem(bounds: str) -> None:
    """Along changes of A and G that keep contradictory rows contradictory, and any change of the other data.

    A general change of A and G removes the contradiction, however small it is: there is no derivative. One that acts on
    the columns of [A; G; bounds] alike, dC = C E, keeps the rank; for bounds, E leaves bounded variables alone.
    """
    data = contradictory(300, bounds=bounds)

    def f(values: Data) -> Tensor:
        solution = diffopt.solve_qp(**values, on_infeasible="closest")
        assert not bool(solution.weakly_active.any())
        return outputs(solution, ("x", "s", "value"))

    directions = each_piece(data, skip=("A", "G"))
    if bounds == "none":
        E = random(5, 5, seed=301)
        directions["columns"] = {"A": data["A"] @ E, "G": data["G"] @ E}
        F = random(2, 2, seed=302)
        directions["rows of A"] = {"A": F @ data["A"]}
    assert_differences(f, data, directions)


def test_gradients_where_the_shifts_determine_x() -> None:
    """More contradictory rows than variables, of full rank: then A and G may change in any direction."""
    n, m = 2, 6
    angle = torch.linspace(0, 2 * torch.pi, m + 1, dtype=FLOAT64)[:-1] + 0.1 * random(2, m, seed=400)
    data = {
        "Q": torch.eye(n, dtype=FLOAT64).repeat(2, 1, 1),
        "q": random(2, n, seed=401),
        "A": random(2, 1, n, seed=402),
        "b": random(2, 1, seed=403),
        "G": torch.stack([angle.cos(), angle.sin()], -1),
        "h": -1 - 0.2 * random(2, m, seed=404).abs(),  # the normals surround the origin: all are violated
    }

    def f(values: Data) -> Tensor:
        solution = diffopt.solve_qp(**values, on_infeasible="closest")
        assert bool((solution.shifts is not None) and (solution.shifts.row > 0.1).all())
        return outputs(solution, ("x", "value"))

    assert_differences(f, data, each_piece(data))


def test_least_squares_are_a_closest_problem() -> None:
    # More equalities than variables: x = (A'A)^-1 A'b, differentiated by torch itself.
    A, b = random(3, 7, 3, seed=500).requires_grad_(), random(3, 7, seed=501).requires_grad_()
    solution = diffopt.solve_qp(
        torch.eye(3, dtype=FLOAT64), torch.zeros(3, dtype=FLOAT64), A, b, on_infeasible="closest"
    )
    x = torch.linalg.solve(A.mT @ A, (A.mT @ b.unsqueeze(-1))).squeeze(-1)
    assert measures.relative(solution.x, x) <= EXACT_ALGEBRA
    assert solution.shifts is not None
    shift = (A @ x.unsqueeze(-1)).squeeze(-1) - b
    assert measures.relative(solution.shifts.eq, shift) <= EXACT_ALGEBRA
    weights, more = random(*x.shape, seed=502), random(*shift.shape, seed=503)
    got = torch.autograd.grad((weights * solution.x).sum() + (more * solution.shifts.eq).sum(), (A, b))
    expected = torch.autograd.grad((weights * x).sum() + (more * shift).sum(), (A, b))
    for a, e in zip(got, expected, strict=True):
        assert measures.relative(a, e) <= EXACT_ALGEBRA


def test_crossed_bounds_meet_in_the_middle() -> None:
    lower, upper = tensor(2.0, -1.0).requires_grad_(), tensor(1.0, 1.0).requires_grad_()
    eye = torch.eye(2, dtype=FLOAT64)
    solution = diffopt.solve_qp(eye, tensor(3.0, 0.5), lower=lower, upper=upper, on_infeasible="closest")
    assert solution.x.tolist() == pytest.approx([1.5, -0.5]) and solution.shifts is not None
    assert solution.shifts.low.tolist() == pytest.approx([0.5, 0.0])
    assert solution.shifts.high.tolist() == pytest.approx([0.5, 0.0])
    for_lower, for_upper = torch.autograd.grad(solution.x.sum(), (lower, upper))
    assert for_lower.tolist() == pytest.approx([0.5, 0.0]) and for_upper.tolist() == pytest.approx([0.5, 0.0])
    assert bool((solution.lam_lower >= 0).all() and (solution.lam_upper >= 0).all())


@pytest.mark.parametrize("policy", ["closest", "elastic", Elastic("squared", bound=20.0)], ids=str)
def test_forward_and_reverse_mode(policy: Any) -> None:
    data = contradictory(600, batch=1)
    names = ("q", "b", "h", "lower", "upper")

    def f(*values: Tensor) -> Tensor:
        return outputs(diffopt.solve_qp(**data | dict(zip(names, values, strict=True)), on_infeasible=policy))

    values = tuple(data[name] for name in names)
    places = tuple(range(len(names)))
    for forward, reverse in zip(
        torch.func.jacfwd(f, places)(*values), torch.func.jacrev(f, places)(*values), strict=True
    ):
        assert measures.relative(forward, reverse) <= EXACT_ALGEBRA


@pytest.mark.parametrize("policy", ["closest", Elastic("squared", bound=20.0), Elastic(bound=5.0)], ids=str)
def test_second_derivatives(policy: Any) -> None:
    data = contradictory(650, batch=1, bounds="none" if policy == "closest" else "both")
    names = ("Q", "q", "b", "h")

    def gradient(values: Data, create_graph: bool) -> tuple[Tensor, ...]:
        solution = diffopt.solve_qp(**data | values, on_infeasible=policy)
        return torch.autograd.grad(solution.x.square().sum(), [values[k] for k in names], create_graph=create_graph)

    moves = {k: v[k] for k, v in each_piece({k: data[k] for k in names}).items()}
    leaves = measures.tracked({k: data[k] for k in names})
    total = torch.stack([(g * moves[k]).sum() for g, k in zip(gradient(leaves, True), names, strict=True)]).sum()
    exact = torch.autograd.grad(total, [leaves[k] for k in names])
    t = torch.finfo(FLOAT64).eps ** (1 / 3)
    high, low = (
        gradient({k: (data[k] + sign * t * moves[k]).requires_grad_() for k in names}, False) for sign in (1, -1)
    )
    for name, a, above, below in zip(names, exact, high, low, strict=True):
        numeric = (above - below) / (2 * t)
        assert float(numeric.abs().max()) > 1e-2, name  # it does not vanish
        assert measures.relative(a, numeric) <= DIFFERENCES, name


def test_shared_data_and_more_batch_dimensions() -> None:
    data = contradictory(700, batch=1)
    shared = {name: value[0].clone().requires_grad_() for name, value in data.items()}
    q = random(2, 3, 5, seed=701)
    for policy in ("closest", Elastic(eq=4.0, row=3.0), Elastic("squared", bound=2.0)):
        whole = diffopt.solve_qp(**shared | {"q": q}, on_infeasible=policy)
        assert whole.x.shape == (2, 3, 5) and whole.shifts is not None and whole.shifts.row.shape == (2, 3, 4)
        tensors = [shared[name] for name in ("Q", "b", "h", "lower")]
        gradient = torch.autograd.grad(outputs(whole).square().sum(), tensors)
        total = [torch.zeros_like(v) for v in tensors]
        for i in range(2):
            for k in range(3):
                one = diffopt.solve_qp(**shared | {"q": q[i, k]}, on_infeasible=policy)
                assert measures.relative(whole.x[i, k], one.x) <= EXACT_ALGEBRA
                own = torch.autograd.grad(outputs(one).square().sum(), tensors)
                total = [a + b for a, b in zip(total, own, strict=True)]
        for a, b in zip(gradient, total, strict=True):
            assert measures.relative(a, b) <= EXACT_ALGEBRA


def test_shifts_have_the_batch_of_the_weights() -> None:
    data = {name: value[0] for name, value in contradictory(700, batch=1).items()}
    weights = torch.tensor([[1.0], [2.0], [3.0]], dtype=FLOAT64).expand(3, 4)
    shifts = diffopt.solve_qp(**data, on_infeasible=Elastic(row=weights)).shifts
    assert shifts is not None and [v.shape[0] for v in shifts] == [3] * 4


@pytest.mark.parametrize("policy", ["closest", "elastic"])
def test_every_backend(backend: str, policy: Any) -> None:
    data = contradictory(800)
    tolerance = max(1e-9, diffopt.backends.get(backend).can.accuracy)
    settings = Settings(tolerance=tolerance)
    solution = diffopt.solve_qp(**data, on_infeasible=policy, backend=backend, settings=settings)
    assert bool((solution.status == Status.SOLVED).all()) and solution.backend == backend
    reference = diffopt.solve_qp(**data, on_infeasible=policy)
    assert measures.relative(outputs(solution), outputs(reference)) <= 1e3 * tolerance


@pytest.mark.parametrize("policy", ["closest", Elastic(eq=10.0, row=10.0), Elastic("squared", bound=5.0)], ids=str)
def test_float32(policy: Any) -> None:
    data = {name: value.float() for name, value in contradictory(900).items()}
    wide = {name: value.double() for name, value in data.items()}
    leaves = measures.tracked(data)
    solution = diffopt.solve_qp(**leaves, on_infeasible=policy)
    assert bool((solution.status == Status.SOLVED).all())
    assert {v.dtype for v in (solution.x, solution.value, solution.lam, *(solution.shifts or ()))} == {torch.float32}
    exact = diffopt.solve_qp(**wide, on_infeasible=policy)
    assert measures.relative(outputs(solution), outputs(exact)) <= SOLUTION[torch.float32]
    assert float(solution.residuals.worst().max()) <= RESIDUAL[torch.float32]
    outputs(solution).sum().backward()
    assert all(leaf.grad is not None and leaf.grad.dtype == torch.float32 for leaf in leaves.values())


def float32_contradictions(name: str) -> Data:
    """Many contradictory programs in float32: some of the least shifts are below the tolerance of float32."""
    torch.manual_seed(0)
    if name == "rows":
        n, m = 40, 150
        return {
            "Q": torch.eye(n), "q": torch.randn(64, n), "G": torch.randn(64, m, n), "h": torch.randn(64, m) - 1,
            "lower": torch.full((n,), -1.0), "upper": torch.full((n,), 1.0),
        }  # fmt: skip
    n, p = 80, 60
    return {
        "Q": torch.eye(n), "q": torch.randn(64, n), "A": torch.randn(64, p, n), "b": 3 * torch.randn(64, p),
        "lower": torch.full((n,), -1.0), "upper": torch.full((n,), 1.0),
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore::diffopt.InaccurateSolutionWarning")
@pytest.mark.parametrize("name", ["rows", "equalities"])
def test_a_closest_problem_in_float32_is_that_of_float64(name: str) -> None:
    data = float32_contradictions(name)
    sides = [key for key in ("q", "b", "h") if key in data]
    narrow, wide = measures.tracked(data), measures.tracked({key: value.double() for key, value in data.items()})
    found = diffopt.solve_qp(**narrow, on_infeasible="closest")
    exact = diffopt.solve_qp(**wide, on_infeasible="closest")
    assert bool((exact.status == Status.SOLVED).all()) and bool(outputs(exact, ()).any())
    assert measures.relative(found.x, exact.x) <= SOLUTION[torch.float32]
    assert measures.relative(outputs(found), outputs(exact)) <= SOLUTION[torch.float32]
    found.x.square().sum().backward()
    exact.x.square().sum().backward()
    for key in sides:
        assert narrow[key].grad.dtype == torch.float32
        # (A small multiplier of a feasible instance counts as none earlier in float32: another kink rule, then.)
        same = found.weakly_active == 0
        assert bool(same[exact.dependent > 0].all()) and int(same.sum()) >= 60
        assert measures.relative(narrow[key].grad[same], wide[key].grad[same]) <= GRADIENT[torch.float32]
    # Rounding the multipliers, which cancel, can cost more than the tolerance; that is said, and x is right.
    over = found.residuals.worst() > RESIDUAL[torch.float32]
    assert torch.equal(found.status == Status.ALMOST_SOLVED, over) and bool(over.any()) == (name == "rows")


@pytest.mark.parametrize("name", ["rows", "equalities"])
def test_a_loose_tolerance_takes_no_shift_for_zero(name: str) -> None:
    data = {key: value.double() for key, value in float32_contradictions(name).items()}
    found = diffopt.solve_qp(**data, on_infeasible="closest", settings=Settings(tolerance=1e-5))
    exact = diffopt.solve_qp(**data, on_infeasible="closest")
    assert bool((found.status == Status.SOLVED).all())
    assert measures.relative(outputs(found), outputs(exact)) <= 1e-4


@pytest.mark.parametrize("policy", ["closest", "elastic"])
def test_other_failures_stay_what_they_are(policy: Any) -> None:
    data = contradictory(1000, batch=5)
    data["q"][1, 0] = torch.nan
    data["Q"][2] = -torch.eye(5, dtype=FLOAT64)
    data["h"][3, 0] = -torch.inf
    leaves = measures.tracked(data)
    solution = diffopt.solve_qp(**leaves, on_infeasible=policy, on_failure="return")
    names = [Status(int(code)).name for code in solution.status]
    assert names[0] == names[4] == "SOLVED"
    assert names[1] == "NONFINITE_INPUT" and names[2] == "NUMERICAL_ERROR" and names[3] == "NONFINITE_INPUT"
    alone = diffopt.solve_qp(**{k: v[::4] for k, v in data.items()}, on_infeasible=policy)
    assert measures.relative(solution.x[::4], alone.x) <= EXACT_ALGEBRA
    tensors = list(leaves.values())
    used = [*(v[solution.ok] for v in (solution.x, *(solution.shifts or ())))]
    masked = torch.autograd.grad(torch.stack([v.sum() for v in used]).sum(), tensors, retain_graph=True)
    assert all(bool(g.isfinite().all()) and not g[1:4].any() for g in masked)
    unmasked = torch.autograd.grad(solution.x.sum(), tensors)
    assert all(bool(g[[0, 4]].isfinite().all()) for g in unmasked) and bool(unmasked[1][1:4].isnan().any(-1).all())
    with pytest.raises(diffopt.SolveFailed, match=r"batch index \[1\]: NONFINITE_INPUT"):
        diffopt.solve_qp(**data, on_infeasible=policy)


def test_an_unbounded_closest_problem() -> None:
    # x_0 <= 0 and x_0 >= 1 contradict each other; x_1 falls without end, in both.
    data = {"Q": None, "q": tensor(0.0, 1.0), "G": tensor([1.0, 0.0], [-1.0, 0.0]), "h": tensor(0.0, -1.0)}
    solution = diffopt.solve_qp(**data, on_infeasible="closest", on_failure="return")
    assert solution.status == Status.DUAL_INFEASIBLE and solution.certificate is not None
    assert float(data["q"] @ solution.certificate.x) == pytest.approx(-1.0)
    assert bool(solution.x.isnan().all())


def test_a_linear_program() -> None:
    # minimise x_0 + x_1 with x_0 + x_1 <= -2 (the sum is at least 0), x >= 0: the shifts share what is missing.
    data = {"Q": None, "q": tensor(1.0, 2.0), "G": tensor([1.0, 1.0]), "h": tensor(-2.0), "lower": tensor(0.0, 0.0)}
    solution = diffopt.solve_qp(**data, on_infeasible="closest")
    third = 2 / 3
    assert solution.x.tolist() == pytest.approx([-third, -third]) and solution.shifts is not None
    assert solution.shifts.row.tolist() == pytest.approx([third])
    assert solution.shifts.low.tolist() == pytest.approx([third, third])
    assert_optimal_for_the_shifts({"A": torch.zeros(0, 2, dtype=FLOAT64), "b": tensor()} | data, solution)


# ---- errors ----------------------------------------------------------------------------------------------------------


def simple(**options: Any) -> diffopt.Solution:
    return diffopt.solve_qp(torch.eye(2), torch.zeros(2), G=torch.ones(1, 2), h=torch.ones(1), **options)


BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: simple(on_infeasible="soft"), diffopt.SettingsError, "'soft' is unknown. Expected None, 'elastic'"),
    (lambda: diffopt.Layer(Softmax(2), on_infeasible=3), diffopt.SettingsError, "`on_infeasible` = 3 is unknown"),
    (lambda: Elastic("l2"), diffopt.SettingsError, "`penalty` = 'l2' is unknown. Expected 'l1' or 'squared'"),
    (lambda: Elastic(row=0.0), diffopt.SettingsError, "`elastic_row` = 0.0 is out of range. Expected a positive"),
    (lambda: Elastic(row="big"), diffopt.ParameterError, "must be a torch tensor or a number, got str"),
    (lambda: Elastic(row=diffopt.given("diagonal")), diffopt.ParameterError, "`elastic_row` is declared 'diagonal'"),
    (
        lambda: simple(on_infeasible=Elastic(row=torch.ones(3))),
        diffopt.ShapeError,
        r"`elastic_row` has 3 entries but there are 1 constraints of its kind. Expected shape \(\*batch, 1\)",
    ),
    (
        lambda: simple(on_infeasible=Elastic(row=torch.ones(1, dtype=FLOAT64))),
        diffopt.DtypeError,
        "`elastic_row` has dtype torch.float64 but `q` has torch.float32",
    ),
    (
        lambda: simple(on_infeasible=Elastic(row=diffopt.given())),
        diffopt.ParameterError,
        "The elastic constraints need `elastic_row`, which was not given",
    ),
    (
        lambda: diffopt.solve(Softmax(2), {"c": torch.ones(2)}, on_infeasible="closest"),
        diffopt.BackendUnsupported,
        "`on_infeasible` takes quadratic and linear programs with inequalities, not NonlinearForm",
    ),
]  # fmt: skip


@pytest.mark.parametrize("penalty", ["l1", "squared"])
@pytest.mark.parametrize("value", [-0.5, 0.0])
def test_what_is_no_weight_is_named(penalty: Any, value: float) -> None:
    weights = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    weights[1, 0] = value
    G, h = torch.ones(2, 2), torch.ones(2)
    structure = diffopt.QPStructure(2, Q=torch.eye(2), q=diffopt.given(), G=G, h=h)
    layer = diffopt.Layer(structure, on_infeasible=Elastic(penalty, row=diffopt.given()))
    q = torch.zeros(2)
    message = rf"`elastic_row` is {value:g} at entry 0, batch index \[1\]. Expected positive weights.*softplus"
    with pytest.raises(diffopt.ParameterError, match=message):
        layer(q=q, elastic_row=weights)
    with pytest.raises(diffopt.ParameterError, match=message):
        torch.func.vmap(lambda w: layer(q=q, elastic_row=w))(weights)
    with pytest.raises(diffopt.ParameterError, match=message):
        torch.func.grad(lambda w: layer(q=q, elastic_row=w).sum())(weights)
    learned = diffopt.Layer(structure, on_infeasible=Elastic(penalty, row=diffopt.learned(weights[1])))
    with pytest.raises(diffopt.ParameterError, match=rf"`elastic_row` is {value:g} at entry 0\. Expected"):
        learned(q=q)


@pytest.mark.parametrize("penalty", ["l1", "squared"])
def test_a_weight_of_nan_fails_in_its_instance(penalty: Any) -> None:
    structure = diffopt.QPStructure(2, Q=torch.eye(2), q=torch.zeros(2), G=torch.ones(2, 2), h=torch.ones(2))
    elastic = Elastic(penalty, row=diffopt.given())
    layer = diffopt.Layer(structure, on_infeasible=elastic, on_failure="return")
    solution = layer.solve(elastic_row=torch.tensor([[1.0, 2.0], [torch.nan, 4.0]]))
    assert solution.status.tolist() == [Status.SOLVED, Status.NONFINITE_INPUT]


def test_what_is_no_weight_fails_inside_torch_compile() -> None:
    torch.compiler.reset()
    G, h = torch.ones(2, 2), torch.ones(2)
    structure = diffopt.QPStructure(2, Q=torch.eye(2), q=torch.zeros(2), G=G, h=h)
    elastic = Elastic("squared", row=diffopt.given())
    layer = diffopt.Layer(structure, on_infeasible=elastic, on_failure="return")
    graph = torch.compile(lambda w: layer.solve(elastic_row=w).status, backend="eager", fullgraph=True)
    weights = torch.tensor([[1.0, 2.0], [-3.0, 4.0], [0.0, 1.0], [torch.inf, 1.0]])
    names = [Status(int(code)).name for code in graph(weights)]
    torch.compiler.reset()
    assert names == ["SOLVED", "NONFINITE_INPUT", "NONFINITE_INPUT", "SOLVED"]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
