"""What the adapters of foreign solvers have in common: signs, absent constraints, statuses, dtypes, batches."""

import dataclasses

import pytest
import torch

import diffopt
from closed_forms import FAILURES, everything, failing, form
from diffopt import QPForm, Settings, Status
from diffopt.backends import CvxpyBackend, ScipyBackend, cvxpy_, instances
from hard_families import FAMILIES, Sizes
from tolerances import EXACT_ALGEBRA

f64 = torch.float64
DUALS = ("nu", "lam", "lam_lower", "lam_upper")
BACKENDS = {
    "cvxpy": CvxpyBackend,
    "scipy": ScipyBackend,
    "trust-constr": lambda: ScipyBackend("trust-constr"),
    "OSQP": lambda: CvxpyBackend("OSQP"),
    "SCS": lambda: CvxpyBackend("SCS"),
}
MAIN = ["cvxpy", "scipy"]


@pytest.fixture(params=MAIN)
def backend(request):
    return BACKENDS[request.param]()


def close(got, expected, tolerance=EXACT_ALGEBRA):
    return torch.allclose(got.double(), expected.expand_as(got), rtol=0, atol=tolerance)


@pytest.mark.parametrize("linear", [False, True], ids=["quadratic", "linear"])
@pytest.mark.parametrize("polish", [True, False], ids=["polished", "raw"])
@pytest.mark.parametrize("name", BACKENDS)
def test_point_and_duals_of_a_problem_solved_by_hand(name, polish, linear):
    data, answer = everything(linear)
    # Without the polish this is the accuracy of trust-constr, the worst of them; it may miss our statuses.
    found = BACKENDS[name]().solve(form(data), Settings(polish=polish))
    if polish:
        assert found.status == Status.SOLVED and found.residuals.amax(0) <= 1e-12
    for piece, expected in answer.items():
        assert close(getattr(found.point, piece), expected, EXACT_ALGEBRA if polish else 1e-3), piece
    assert close(found.point.s[:2], torch.tensor([0.0, 4.0], dtype=f64), EXACT_ALGEBRA if polish else 1e-3)
    assert found.point.s[2] == torch.inf and found.point.lam[2] == 0
    assert all(bool((getattr(found.point, dual) >= 0).all()) for dual in DUALS[1:])


@pytest.mark.parametrize("linear", [False, True], ids=["quadratic", "linear"])
def test_duals_are_the_derivatives_of_the_value(backend, linear):
    data, _ = everything(linear)
    duals = backend.solve(form(data), Settings()).point

    def value(name, index, step):
        moved = dict(data) | {name: data[name].clone()}
        moved[name][index] += step
        if name == "lower" and index == 4:  # a fixed variable moves as a whole
            moved["upper"] = data["upper"].clone()
            moved["upper"][4] += step
        problem = form(moved)
        return problem.objective(backend.solve(problem, Settings()).point.x)

    h = 1e-4  # the value is quadratic in a step that keeps the active set: central differences are exact
    for name, index, expected in (
        ("b", 0, -duals.nu[0]),
        ("h", 0, -duals.lam[0]),
        ("h", 1, -duals.lam[1]),
        ("lower", 1, duals.lam_lower[1]),
        ("upper", 0, -duals.lam_upper[0]),
        ("lower", 4, duals.lam_lower[4] - duals.lam_upper[4]),
    ):
        slope = (value(name, index, h) - value(name, index, -h)) / (2 * h)
        assert abs(slope - expected) <= 1e-9, (name, index)


def test_a_fixed_variable_pulled_up_has_its_multiplier_at_the_upper_bound(backend):
    problem = QPForm(torch.eye(1, dtype=f64), torch.tensor([-2.0], dtype=f64), lower=1.0, upper=1.0)
    found = backend.solve(problem, Settings())
    assert found.status == Status.SOLVED
    assert (found.point.x, found.point.lam_lower, found.point.lam_upper) == (1, 0, 1)


@pytest.mark.parametrize(
    ("data", "x"),
    [
        ({}, [1.0, 2.0]),
        ({"A": [[1.0, 1.0]], "b": [1.0]}, [0.0, 1.0]),
        ({"A": [[1.0, 1.0], [2.0, 2.0]], "b": [1.0, 2.0]}, [0.0, 1.0]),
        ({"A": [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], "b": [3.0, 4.0, 7.0]}, [3.0, 4.0]),
        ({"upper": [torch.inf, 1.0]}, [1.0, 1.0]),
        ({"lower": [3.0, -torch.inf]}, [3.0, 2.0]),
        ({"lower": [-torch.inf, -torch.inf], "upper": [torch.inf, torch.inf]}, [1.0, 2.0]),
        ({"G": [[1.0, 1.0], [1.0, 1.0]], "h": [1.0, 1.0]}, [0.0, 1.0]),
        ({"G": [[1.0, 1.0], [0.0, 0.0]], "h": [torch.inf, 0.0]}, [1.0, 2.0]),
    ],
    ids=[
        "unconstrained", "equality", "repeated equality", "more equalities than variables", "upper only",
        "lower only", "absent bounds", "repeated row", "infinite and zero rows",
    ],
)  # fmt: skip
def test_projections_of_1_2(backend, data, x):
    tensors = {name: torch.tensor(value, dtype=f64) for name, value in data.items()}
    problem = QPForm(torch.eye(2, dtype=f64), torch.tensor([-1.0, -2.0], dtype=f64), **tensors)
    found = backend.solve(problem, Settings())
    assert found.status == Status.SOLVED
    assert close(found.point.x, torch.tensor(x, dtype=f64))
    assert found.point.lam.shape == (problem.m,) and found.point.nu.shape == (problem.p,)


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("neighbours", [False, True], ids=["alone", "in a batch"])
def test_status_of_each_failure(backend, name, neighbours):
    problem, expected = failing(name)
    if neighbours:  # a fine instance on either side, at q = 0 and within every bound of the failing ones
        fine = QPForm(torch.eye(2, dtype=f64), torch.zeros(2, dtype=f64))
        wide = {
            "A": problem.A,
            "b": problem.b * 0,
            "G": problem.G,
            "h": problem.h.abs().nan_to_num(nan=1.0, posinf=1.0),
        }
        wide |= {
            "Q": fine.Q.dense(),
            "q": fine.q,
            "lower": -torch.ones(2, dtype=f64),
            "upper": torch.ones(2, dtype=f64),
        }
        (bad,) = instances(problem)
        problem = QPForm(**{k: torch.stack([wide[k], bad[k], wide[k]]) for k in bad})
    found = backend.solve(problem, Settings())
    middle = 1 if neighbours else ()
    assert Status(int(found.status[middle])) == expected
    if neighbours:
        assert found.status[[0, 2]].tolist() == [Status.SOLVED] * 2
        assert close(found.point.x[[0, 2]], torch.zeros(2, dtype=f64))
    if expected != Status.NUMERICAL_ERROR:
        assert found.point.x[middle].isnan().all()


@pytest.mark.parametrize("name", [name for name, (_, status) in FAILURES.items() if status == Status.PRIMAL_INFEASIBLE])
def test_certificate_of_infeasibility(backend, name):
    problem, _ = failing(name)
    found = backend.solve(problem, Settings())
    assert found.certificate is not None
    x, nu, lam, lam_lower, lam_upper = found.certificate
    (data,) = instances(problem)
    assert x.isnan().all() and all(bool((v >= 0).all()) for v in (lam, lam_lower, lam_upper))
    pull = data["A"].mT @ nu + data["G"].mT @ lam - lam_lower + lam_upper
    sides = data["lower"].nan_to_num(neginf=0), data["upper"].nan_to_num(posinf=0)
    value = data["b"] @ nu + data["h"] @ lam - sides[0] @ lam_lower + sides[1] @ lam_upper
    assert close(pull, torch.zeros_like(pull), 1e-5) and abs(value + 1) <= 1e-12


def test_batch_dimensions_broadcast(backend):
    Q = torch.eye(3, dtype=f64) * torch.tensor([1.0, 2.0], dtype=f64).reshape(2, 1, 1, 1)
    q = torch.arange(9, dtype=f64).reshape(3, 3) - 4
    found = backend.solve(QPForm(Q, q, lower=0.0), Settings())
    assert found.status.shape == found.iterations.shape == (2, 3)
    expected = (-q).clamp_min(0) / torch.tensor([1.0, 2.0], dtype=f64).reshape(2, 1, 1)
    assert found.point.x.shape == (2, 3, 3) and close(found.point.x, expected)
    assert close(found.point.lam_lower, q.clamp_min(0))


def test_an_empty_batch(backend):
    problem = QPForm(torch.eye(2, dtype=f64), torch.zeros(0, 2, dtype=f64), torch.ones(1, 2, dtype=f64), 1.0, lower=0.0)
    found = backend.solve(problem, Settings())
    assert found.point.x.shape == (0, 2) and found.point.nu.shape == (0, 1) and found.status.shape == (0,)
    assert found.executor


def test_float32_is_solved_in_float64_and_rounded_once(backend):
    data, _ = everything()
    single = {name: value.float() / 3 if name in ("q", "b") else value.float() for name, value in data.items()}
    found = backend.solve(form(single), Settings())
    double = backend.solve(form({name: value.double() for name, value in single.items()}), Settings())
    assert found.status == Status.SOLVED
    for got, expected in zip(found.point, double.point, strict=True):
        assert got.dtype == torch.float32 and torch.equal(got, expected.float())
    assert found.residuals.dtype == torch.float32


def test_structured_hessians(backend):
    d, U = torch.tensor([1.0, 2.0, 3.0], dtype=f64), torch.tensor([[1.0], [0.0], [1.0]], dtype=f64)
    q = torch.tensor([-1.0, -1.0, 1.0], dtype=f64)
    for Q in (diffopt.Diagonal(d), diffopt.DiagonalPlusLowRank(d, U)):
        found = backend.solve(QPForm(Q, q), Settings())
        assert close(found.point.x, torch.linalg.solve(Q.dense(), -q))


def test_a_hessian_that_is_semidefinite_up_to_rounding(backend):
    factor = torch.randn(6, 2, dtype=f64)
    Q = factor @ factor.mT
    Q = Q - 1e-12 * torch.eye(6, dtype=f64)
    assert torch.linalg.eigvalsh(Q)[0] < 0
    x = torch.linspace(-1, 1, 6, dtype=f64)
    found = backend.solve(QPForm(Q, -Q @ x, lower=-2.0, upper=2.0), Settings())
    assert found.status == Status.SOLVED
    assert close(Q @ found.point.x, Q @ x)


@pytest.mark.parametrize("name", MAIN)
def test_capabilities_do_not_promise_too_much(name):
    backend = BACKENDS[name]()
    assert not backend.can.batched and backend.can.devices == {"cpu"}
    loose = Settings(tolerance=backend.can.accuracy)
    for seed in range(3):
        problem = diffopt.check.known.quadratic_program(seed, 6, 2, 6, bounds="mixed", batch=(3,))
        found = backend.solve(QPForm(**problem.arguments()), loose)
        assert bool((found.status == Status.SOLVED).all())
        assert close(found.point.x, problem.x, 1e-8)


def test_badly_scaled_problems(backend):
    problem = diffopt.check.known.badly_scaled_program(2, 5, 1, 4, bounds="mixed", batch=(4,), decades=3)
    found = backend.solve(QPForm(**problem.arguments()), Settings())
    assert bool((found.status == Status.SOLVED).all()), found.residuals
    relative = (found.point.x - problem.x).abs() / problem.x.abs()
    assert relative.max() <= 1e-9


LARGE = ("a solution of 1e6 to 1e12", "linear, a solution of 1e6 to 1e12", "infeasible, sides of 1e6 to 1e12")


@pytest.mark.parametrize("name", [*LARGE, "sides of 1e20 and more"])
def test_large_solutions_and_far_sides(backend, name):
    family = next(family for family in FAMILIES if family.name == name)
    drawn = family.draw(Sizes(0, 5, 2, 6, "mixed", 3))
    found = backend.solve(QPForm(**drawn.data), Settings())
    assert (found.status == drawn.status).all(), found.status
    if drawn.x is not None:
        error = (found.point.x - drawn.x).abs().amax(-1) / drawn.x.abs().amax(-1)
        assert error.max() <= 1e-9


def test_a_large_linear_program_that_zero_satisfies(backend):
    G, h = torch.tensor([[1.0, 2.0], [3.0, 1.0]], dtype=f64), torch.tensor([4e12, 6e12], dtype=f64)
    found = backend.solve(QPForm(None, torch.tensor([-1.0, -1.0], dtype=f64), G=G, h=h, lower=0.0), Settings())
    assert found.status == Status.SOLVED
    assert close(found.point.x / 1e12, torch.tensor([1.6, 1.2], dtype=f64))


def test_cvxpy_does_not_pass_on_that_a_strictly_convex_objective_falls_for_ever(monkeypatch):
    monkeypatch.setattr(cvxpy_, "_run", lambda problem, solver, options: "unbounded")
    found = CvxpyBackend().solve(QPForm(torch.eye(2, dtype=f64), torch.ones(2, dtype=f64)), Settings())
    assert found.status == Status.NUMERICAL_ERROR


def test_a_solve_leaves_no_graph_and_the_data_unchanged(backend):
    data, _ = everything()
    leaves = {name: value.clone().requires_grad_() for name, value in data.items()}
    found = backend.solve(form(leaves).detach(), Settings())
    assert not any(v.requires_grad for v in found.point)
    assert all(torch.equal(leaves[name], value) for name, value in data.items())


def test_executors_of_a_mixed_batch_are_all_named():
    Q = torch.stack([torch.zeros(2, 2, dtype=f64), torch.eye(2, dtype=f64)])
    found = ScipyBackend().solve(QPForm(Q, torch.ones(2, dtype=f64), lower=0.0), Settings())
    assert found.executor == "HiGHS+SLSQP"
    assert dataclasses.replace(ScipyBackend.can).priority < CvxpyBackend.can.priority


@pytest.mark.parametrize("linear", [True, False])
def test_the_ray_of_an_unbounded_program(backend, linear):
    problem = diffopt.check.known.unbounded_program(3, 5, 1, 4, linear=linear, bounds="mixed", batch=(3,))
    found = backend.solve(QPForm(**problem.arguments()), Settings())
    assert found.certificate is not None and torch.equal(found.status, problem.status)
    for d, instance in zip(found.certificate.x, problem.instances(), strict=True):
        assert abs(instance.q @ d + 1) <= 1e-12
        assert instance.Q is None or (instance.Q @ d).abs().max() <= 1e-9
        assert (instance.A @ d).abs().max() <= 1e-9 and (instance.G @ d).max() <= 1e-9
        assert bool((d[instance.lower.isfinite()] >= -1e-9).all())
        assert bool((d[instance.upper.isfinite()] <= 1e-9).all())
    assert found.certificate.lam.isnan().all()
