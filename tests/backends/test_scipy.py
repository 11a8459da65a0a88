"""The SciPy adapter: linear, quadratic and nonlinear programs, and how it ends where there is no solution."""

import pytest
import torch
from scipy.optimize import OptimizeResult

import diffopt
from closed_forms import everything, failing, form
from diffopt import BackendUnsupported, DifferentiableProblem, Param, QPForm, Settings, SettingsError, Status
from diffopt.backends import ScipyBackend, instances, scipy_
from diffopt.problems import NonlinearForm

f64 = torch.float64
METHODS = ("auto", "SLSQP", "trust-constr")


class Entropy(DifferentiableProblem):
    """minimise c'x + sum x log x subject to sum x = 1: x = softmax(-c), nu = logsumexp(-c) - 1."""

    n = 5
    params = (Param("c", ("n",)),)

    def __init__(self, lower=None, start=None):
        super().__init__()
        self.lower, self.point = lower, start

    def objective(self, x, params):
        return (params["c"] * x + x * x.log()).sum(-1)

    def equalities(self, x, params):
        return x.sum(-1, keepdim=True) - 1

    def inequalities(self, x, params):
        return x[..., :0]

    def bounds(self, params):
        return self.lower, None

    def start(self, params):
        return None if self.point is None else torch.full_like(params["c"], self.point)


class Disc(DifferentiableProblem):
    """minimise c'x subject to |x|^2 <= r and x <= cap, n = 3. Alone, the disc gives x = -c sqrt(r) / |c|."""

    n = 3
    params = (Param("c", ("n",)), Param("r", ()), Param("cap", ("n",)))

    def objective(self, x, params):
        return (params["c"] * x).sum(-1)

    def equalities(self, x, params):
        return x[..., :0]

    def inequalities(self, x, params):
        return (x.square().sum(-1) - params["r"]).unsqueeze(-1)

    def bounds(self, params):
        return None, params["cap"]


class Linear(Disc):
    """The same without the disc: unbounded below."""

    def inequalities(self, x, params):
        return x[..., :0]


class Root(Linear):
    """minimise -sum sqrt(x - r): defined for x > r only, and falls without end, ever more slowly."""

    def objective(self, x, params):
        return -(x - params["r"].unsqueeze(-1)).sqrt().sum(-1)


def posed(problem, **params):
    return problem.standard_form(problem.collect(params))


def disc(problem=None, c=(3.0, 0.0, -4.0), r=4.0, cap=(torch.inf,) * 3):
    values = {"c": torch.tensor(c, dtype=f64), "r": torch.tensor(r, dtype=f64), "cap": torch.tensor(cap, dtype=f64)}
    return posed(problem or Disc(), **values)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "problem", [Entropy(), Entropy(lower=0.0), Entropy(start=0.3)], ids=["implicit domain", "bounds", "start"]
)
def test_softmax(problem, method):
    c = torch.randn(3, 5, dtype=f64)
    found = ScipyBackend(method).solve(posed(problem, c=c), Settings())
    assert found.executor == ("SLSQP" if method == "auto" else method)
    assert found.status.tolist() == [Status.SOLVED] * 3
    assert found.residuals.amax(0).max() <= 1e-12
    assert torch.allclose(found.point.x, torch.softmax(-c, -1), rtol=0, atol=1e-12)
    assert torch.allclose(found.point.nu, torch.logsumexp(-c, -1, keepdim=True) - 1, rtol=0, atol=1e-12)
    assert not found.point.lam_lower.any()


@pytest.mark.parametrize("method", METHODS)
def test_a_nonlinear_inequality_and_its_multiplier(method):
    found = ScipyBackend(method).solve(disc(), Settings())
    assert found.status == Status.SOLVED
    assert torch.allclose(found.point.x, torch.tensor([-1.2, 0.0, 1.6], dtype=f64), rtol=0, atol=1e-12)
    assert torch.allclose(found.point.lam, torch.tensor([1.25], dtype=f64), rtol=0, atol=1e-12)  # |c| / (2 sqrt r)
    assert found.point.s.abs() <= 1e-12


def test_a_nonlinear_problem_at_a_bound():
    # x2 = 0 by its bound; the disc then takes all of x0; stationarity in x2: -4 + lam_upper = 0.
    found = ScipyBackend().solve(disc(cap=(torch.inf, torch.inf, 0.0)), Settings())
    assert found.status == Status.SOLVED
    assert torch.allclose(found.point.x, torch.tensor([-2.0, 0.0, 0.0], dtype=f64), rtol=0, atol=1e-10)
    assert torch.allclose(found.point.lam_upper, torch.tensor([0.0, 0.0, 4.0], dtype=f64), rtol=0, atol=1e-10)
    assert torch.allclose(found.point.lam, torch.tensor([0.75], dtype=f64), rtol=0, atol=1e-10)


def test_nonlinear_batches_broadcast_and_keep_their_dtype():
    c, r = torch.randn(2, 1, 3), torch.tensor([1.0, 4.0, 9.0])
    found = ScipyBackend().solve(posed(Disc(), c=c, r=r, cap=torch.full((3,), torch.inf)), Settings())
    assert found.status.tolist() == [[Status.SOLVED] * 3] * 2
    assert found.point.x.dtype == torch.float32
    expected = -c * (r.sqrt() / 1).reshape(3, 1) / c.norm(dim=-1, keepdim=True)
    assert torch.allclose(found.point.x, expected, rtol=0, atol=1e-6)
    empty = ScipyBackend().solve(posed(Entropy(), c=torch.zeros(0, 5, dtype=f64)), Settings())
    assert empty.point.x.shape == (0, 5) and empty.executor == "SLSQP"


def test_nonlinear_failures():
    nan, inf = torch.nan, torch.inf
    for problem, status in (
        (disc(c=(nan, 0.0, 0.0)), Status.NONFINITE_INPUT),
        (disc(c=(inf, 0.0, 0.0)), Status.NONFINITE_INPUT),
        (disc(cap=(nan, 0.0, 0.0)), Status.NONFINITE_INPUT),
        (disc(cap=(-inf, 0.0, 0.0)), Status.NONFINITE_INPUT),
        (disc(r=-1.0), Status.PRIMAL_INFEASIBLE),
        (disc(cap=(-1.0, -2.0, 0.0)), Status.PRIMAL_INFEASIBLE),
        (disc(Linear()), Status.DUAL_INFEASIBLE),
        (disc(Linear(), c=(3.0, 0.0, 0.0), cap=(1.0, 1.0, 1.0)), Status.DUAL_INFEASIBLE),
        (disc(Root(), r=50.0, cap=(99.0,) * 3), Status.NUMERICAL_ERROR),  # no start is found in the domain
        (posed(Entropy(lower=0.5), c=torch.zeros(5, dtype=f64)), Status.PRIMAL_INFEASIBLE),
    ):
        found = ScipyBackend().solve(problem, Settings(max_iterations=10))
        assert found.status == status, (type(problem.problem).__name__, problem.params)


def test_crossed_bounds_of_a_nonlinear_problem():
    class Crossed(Disc):
        def bounds(self, params):
            return torch.ones_like(params["c"]), params["cap"]

    found = ScipyBackend().solve(disc(Crossed(), cap=(2.0, 0.5, 2.0)), Settings())
    assert found.status == Status.PRIMAL_INFEASIBLE
    assert found.certificate is not None
    assert found.certificate.lam_lower.tolist() == found.certificate.lam_upper.tolist() == [0, 2, 0]


def test_a_failed_neighbour_changes_no_bit():
    c = torch.randn(3, 5, dtype=f64)
    alone = ScipyBackend().solve(posed(Entropy(lower=0.0), c=c), Settings())
    c[1, 2] = torch.nan
    beside = ScipyBackend().solve(posed(Entropy(lower=0.0), c=c), Settings())
    assert beside.status.tolist() == [Status.SOLVED, Status.NONFINITE_INPUT, Status.SOLVED]
    for before, after in zip(alone.point, beside.point, strict=True):
        assert torch.equal(before[[0, 2]], after[[0, 2]])


@pytest.mark.parametrize("method", METHODS)
def test_a_program_through_its_callables_is_the_quadratic_one(method):
    class Wrapped(DifferentiableProblem):
        n = 5
        params = (Param("q", ("n",)), Param("b", (1,)))

        def objective(self, x, params):
            return (0.5 * x.square() + params["q"] * x).sum(-1)

        def equalities(self, x, params):
            return (x[..., 2] + x[..., 3]).unsqueeze(-1) - params["b"]

        def inequalities(self, x, params):
            return torch.stack([x[..., 2] - x[..., 3] + 1, x[..., 0] + x[..., 1] - 5], -1)

        def bounds(self, params):
            return data["lower"], data["upper"]

    data, answer = everything()
    found = ScipyBackend(method).solve(posed(Wrapped(), q=data["q"], b=data["b"]), Settings())
    assert found.status == Status.SOLVED
    for name, expected in answer.items():
        expected = expected[:2] if name == "lam" else expected
        assert torch.allclose(getattr(found.point, name), expected, rtol=0, atol=1e-9), name


def test_curvature_of_constraints_reaches_trust_constr():
    # Hess(lam'g) = 2 lam I, in whatever units the instance was brought to.
    problem = scipy_._Smooth(disc(c=(300.0, 1.0, 1.0), r=100.0))
    lam = torch.tensor([3.0], dtype=f64).numpy()
    expected = 2 * 3.0 * problem.rows * torch.diag(torch.from_numpy(problem.d) ** 2).numpy()
    assert abs(problem.curvature(problem.start, lam) - expected).max() <= 1e-12 * abs(expected).max()
    assert not scipy_._Smooth(form(everything()[0] | {"h": torch.zeros(3, dtype=f64)})).curvature(None, None).any()


def test_auto_goes_on_with_trust_constr_where_slsqp_misses(monkeypatch):
    minimize = scipy_._minimize
    tried = []

    def lame(problem, method, limit):
        tried.append(method)
        x, code, iterations = minimize(problem, method, limit)
        return (x + 1e-3, 8, iterations) if method == "SLSQP" else (x, code, iterations)

    monkeypatch.setattr(scipy_, "_minimize", lame)
    data, answer = everything()
    found = ScipyBackend().solve(form(data), Settings())
    assert tried == ["SLSQP", "trust-constr"] and found.executor == "trust-constr"
    assert found.status == Status.SOLVED
    assert torch.allclose(found.point.x, answer["x"], atol=1e-9)


def test_an_exception_of_scipy_is_a_status(monkeypatch):
    def fails(problem, method, limit):
        raise ValueError("array must not contain infs or NaNs")

    monkeypatch.setattr(scipy_, "_minimize", fails)
    found = ScipyBackend().solve(form(everything()[0]), Settings())
    assert found.status == Status.NUMERICAL_ERROR


def test_max_iterations():
    few = ScipyBackend("trust-constr").solve(disc(), Settings(max_iterations=1, polish=False))
    assert few.status == Status.MAX_ITERATIONS and few.iterations == scipy_.SMOOTH_ITERATIONS
    assert few.point.x.isfinite().all()


@pytest.mark.parametrize(
    ("code", "status"),
    [*scipy_.LINEAR_STATUSES.items(), (99, Status.NUMERICAL_ERROR)],
)
def test_table_of_statuses_of_linprog(monkeypatch, code, status):
    linprog = scipy_._linprog

    def relabelled(cost, rows, limit=None):
        result = linprog(cost, rows, limit)
        return result if limit is None else OptimizeResult(result, status=code)

    monkeypatch.setattr(scipy_, "_linprog", relabelled)
    # A problem with a solution: what is claimed otherwise cannot be shown, and then the code decides.
    (point,) = (scipy_._solve_linear(data, 60) for data in instances(form(everything(linear=True)[0])))
    assert point.status == status
    assert (point.x is not None) == (status == Status.SOLVED)


@pytest.mark.parametrize("name", ["rows, linear", "linear, unbounded", "infeasible and unbounded"])
def test_a_numerical_failure_of_linprog_is_diagnosed(monkeypatch, name):
    linprog = scipy_._linprog

    def clueless(cost, rows, limit=None):
        result = linprog(cost, rows, limit)
        return result if limit is None else OptimizeResult(result, status=4)

    monkeypatch.setattr(scipy_, "_linprog", clueless)
    problem, status = failing(name)
    assert ScipyBackend().solve(problem, Settings()).status == status


def test_no_claim_where_linprog_fails(monkeypatch):
    monkeypatch.setattr(scipy_, "_linprog", lambda *_: OptimizeResult(status=4, nit=0))
    for linear, status in ((True, Status.NUMERICAL_ERROR), (False, Status.SOLVED)):
        found = ScipyBackend().solve(form(everything(linear)[0]), Settings())
        assert found.status == status  # the quadratic program does without a first feasible point


def test_a_tiny_curvature_is_no_ray():
    Q = torch.diag(torch.tensor([1.0, 1e-6], dtype=f64))
    found = ScipyBackend().solve(QPForm(Q, torch.tensor([-1.0, -1e-3], dtype=f64)), Settings())
    assert found.status == Status.SOLVED
    assert torch.allclose(found.point.x, torch.tensor([1.0, 1e3], dtype=f64), rtol=1e-9)


def test_unknown_method():
    with pytest.raises(SettingsError, match="Unknown method 'BFGS'. Expected one of 'auto', 'SLSQP', 'trust-constr'"):
        ScipyBackend("BFGS")


def test_other_backends_refuse_nonlinear_problems():
    problem = disc()
    assert isinstance(problem, NonlinearForm)
    with pytest.raises(BackendUnsupported, match="takes QPForm, not NonlinearForm. Use 'scipy'"):
        diffopt.backends.registry.choose("cvxpy", problem)
    assert diffopt.backends.explain(problem).chosen == "scipy"


def test_layers_on_nonlinear_problems():
    c = torch.randn(2, 5, dtype=f64, requires_grad=True)
    x = diffopt.Layer(Entropy(lower=0.0))(c=c)
    (gradient,) = torch.autograd.grad(x[:, 0].sum(), c)
    (expected,) = torch.autograd.grad(torch.softmax(-c, -1)[:, 0].sum(), c)
    assert torch.allclose(gradient, expected, rtol=0, atol=1e-12)


def test_warnings_of_scipy_stay_inside():
    # trust-constr overflows on its way down; here a warning is an error.
    found = ScipyBackend("trust-constr").solve(disc(Linear()), Settings(max_iterations=10))
    assert found.status == Status.DUAL_INFEASIBLE
