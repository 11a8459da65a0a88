"""One solution of many, by name: against closed forms, its gradients against finite differences."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import diffopt
from diffopt import Settings, Status
from diffopt.check import known
from problems_catalogue import Softmax

f64 = torch.float64
EXECUTORS = ["cpu", "torch"]
NAMES = ["minimum_norm", "analytic_centre"]


def tensor(*values: Any, grad: bool = False) -> Tensor:
    return torch.tensor(values, dtype=f64, requires_grad=grad)


def chosen(name: str | None, executor: str = "auto") -> Settings:
    return Settings(selection=name, executor=executor)  # type: ignore[arg-type]


def edge(b: Tensor, lower: Tensor, upper: Tensor, name: str | None, executor: str, **options: Any) -> diffopt.Solution:
    """Minimise x1 + x2 + 2 x3 subject to x1 + x2 + x3 = b within bounds: x3 = lower3, and x1 + x2 = b - lower3."""
    A, q = b.new_ones(1, 3), b.new_tensor([1.0, 1.0, 2.0])
    settings = chosen(name, executor)
    return diffopt.solve_qp(None, q, A=A, b=b, lower=lower, upper=upper, settings=settings, **options)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_the_shortest_solution_of_a_linear_program(executor: str) -> None:
    b, lower, upper = tensor(1.0, grad=True), tensor(0.0, 0.0, 0.1, grad=True), tensor(3.0, 3.0, 3.0, grad=True)
    solution = edge(b, lower, upper, "minimum_norm", executor)
    assert solution.ok and not solution.unique and solution.selection == "minimum_norm"
    assert torch.allclose(solution.x, tensor(0.45, 0.45, 0.1), atol=1e-12)
    assert solution.residuals.worst() < 1e-12
    slopes = torch.autograd.grad((solution.x * tensor(1.0, 3.0, 10.0)).sum(), (b, lower, upper))
    for slope, wanted in zip(slopes, (tensor(2.0), tensor(0.0, 0.0, 8.0), tensor(0.0, 0.0, 0.0)), strict=True):
        assert torch.allclose(slope, wanted, atol=1e-9)
    # A bound that the shortest solution meets: x1 <= 0.3.
    solution = edge(b, lower, tensor(0.3, 3.0, 3.0), "minimum_norm", executor)
    assert torch.allclose(solution.x, tensor(0.3, 0.6, 0.1), atol=1e-12)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_the_analytic_centre_of_a_linear_program(executor: str) -> None:
    """With t = b - lower3 the slacks are x1, t - x1, upper1 - x1 and upper2 - t + x1: a cubic equation."""
    b, lower, upper = tensor(1.0, grad=True), tensor(0.0, 0.0, 0.1, grad=True), tensor(0.7, 3.0, 2.0, grad=True)
    solution = edge(b, lower, upper, "analytic_centre", executor)
    assert solution.ok and solution.selection == "analytic_centre" and solution.residuals.worst() < 1e-12
    x1, x2, x3 = solution.x.detach().tolist()
    assert abs(x1 + x2 - 0.9) < 1e-12 and x3 == pytest.approx(0.1)
    assert abs(1 / x1 - 1 / x2 - 1 / (0.7 - x1) + 1 / (3 - x2)) < 1e-8
    assert torch.autograd.gradcheck(
        lambda *v: edge(*v, "analytic_centre", executor).x, (b, lower, upper), eps=1e-5, atol=1e-6
    )
    # Where the slacks are symmetric: the middle.
    middle = edge(b, lower, tensor(2.0, 2.0, 2.0), "analytic_centre", executor)
    assert torch.allclose(middle.x, tensor(0.45, 0.45, 0.1), atol=1e-9)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_singular_hessian(executor: str) -> None:
    """Minimise (v'x - c)^2 / 2: the shortest is c v / |v|^2; with x1 >= l above that, the rest is shared."""

    def shortest(v: Tensor, c: Tensor, lower: Tensor) -> Tensor:
        Q = torch.outer(v, v)
        return diffopt.solve_qp(Q, -c * v, lower=lower, settings=chosen("minimum_norm", executor)).x

    v, c = tensor(1.0, 2.0, -1.0, grad=True), torch.tensor(1.5, dtype=f64, requires_grad=True)
    loose = torch.full((3,), -9.0, dtype=f64)
    x = shortest(v, c, loose)
    assert torch.allclose(x, c * v / v.square().sum(), atol=1e-10)
    assert torch.autograd.gradcheck(lambda v, c: shortest(v, c, loose), (v, c), eps=1e-5, atol=1e-6)
    tight = tensor(1.0, -9.0, -9.0, grad=True)
    rest = tensor(0.0, 2.0, -1.0)
    assert torch.allclose(shortest(v, c, tight), tensor(1.0, 0.0, 0.0) + (1.5 - 1.0) * rest / 5, atol=1e-10)
    assert torch.autograd.gradcheck(shortest, (v, c, tight), eps=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_rows_with_a_multiplier_are_held(executor: str, name: str) -> None:
    """Maximise g'x subject to g'x <= h1, r'x <= h2 within a box: a segment, of which r cuts off the shortest point."""

    def x(g: Tensor, r: Tensor, h: Tensor) -> Tensor:
        box = torch.full((2,), 3.0, dtype=f64)
        G = torch.stack([g, r])
        return diffopt.solve_qp(None, -g, G=G, h=h, lower=-box, upper=box, settings=chosen(name, executor)).x

    data = tensor(1.0, 2.0, grad=True), tensor(-1.0, 1.0, grad=True), tensor(2.0, 0.1, grad=True)
    found = x(*data)
    assert torch.allclose(found @ data[0], data[2][0])
    if name == "minimum_norm":
        assert torch.allclose(found @ data[1], data[2][1])
        assert torch.allclose(found, torch.linalg.solve(torch.stack(data[:2]), data[2]))
    else:
        a, b = found.tolist()  # along (2, -1)
        assert abs(2 / (3 + a) - 2 / (3 - a) + 1 / (3 - b) - 1 / (3 + b) + 3 / (0.1 + a - b)) < 1e-8
    assert torch.autograd.gradcheck(x, data, eps=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_value_and_multipliers_are_those_of_the_problem(executor: str, name: str) -> None:
    b, lower, upper = tensor(1.0, grad=True), tensor(0.0, 0.0, 0.1, grad=True), tensor(0.7, 3.0, 2.0, grad=True)
    some, one = (edge(b, lower, upper, which, executor) for which in (None, name))
    assert some.selection == "some" and torch.allclose(one.value, some.value)
    for field in ("nu", "lam", "lam_lower", "lam_upper"):
        assert torch.equal(getattr(one, field), getattr(some, field)), field
    slopes = torch.autograd.grad(one.value, (b, lower, upper))
    for slope, wanted in zip(slopes, (tensor(1.0), tensor(0.0, 0.0, 1.0), tensor(0.0, 0.0, 0.0)), strict=True):
        assert torch.allclose(slope, wanted, atol=1e-9)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_no_solution_is_shorter(executor: str) -> None:
    """Random programs, each with a copy of its variables: (x, y) enters as x + y, and bounds bind for some."""
    problem = known.quadratic_program(3, n=4, p=1, m=3, batch=(6,))
    data = {k: v for k, v in problem.arguments().items() if v is not None}
    for k in ("A", "G"):
        data[k] = torch.cat([data[k], data[k]], -1)
    data["q"] = torch.cat([data["q"], data["q"]], -1)
    data["Q"] = torch.cat([torch.cat([data["Q"], data["Q"]], -1)] * 2, -2)
    upper = torch.full((8,), 5.0, dtype=f64)
    upper[:2] = 0.1
    some = diffopt.solve_qp(**data, upper=upper, settings=chosen(None, executor))
    solution = diffopt.solve_qp(**data, upper=upper, settings=chosen("minimum_norm", executor))
    assert solution.ok.all() and not solution.unique.any()
    assert torch.allclose(solution.value, some.value, rtol=1e-9) and torch.allclose(
        solution.x[:, :4] + solution.x[:, 4:], problem.x, atol=1e-8
    )
    first = torch.minimum(0.5 * problem.x, upper[:4])
    assert torch.allclose(solution.x, torch.cat([first, problem.x - first], -1), atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_others_in_the_batch(executor: str, name: str) -> None:
    """Instances with one solution keep it to the last bit; failed ones stay failed, and pass on nothing."""
    q = tensor([1.0, 1.0], [1.0, 2.0], [1.0, 1.0], [torch.nan, 1.0])
    b, A = tensor([1.0], [1.0], [-1.0], [1.0], grad=True), torch.ones(1, 2, dtype=f64, requires_grad=True)
    data: dict[str, Any] = {"Q": None, "q": q, "A": A, "b": b, "lower": 0.0, "on_failure": "return"}
    plain = diffopt.solve_qp(**data, settings=chosen(None, executor))
    solution = diffopt.solve_qp(**data, settings=chosen(name, executor))
    codes = [Status.SOLVED, Status.SOLVED, Status.PRIMAL_INFEASIBLE, Status.NONFINITE_INPUT]
    assert solution.status.tolist() == codes
    assert solution.unique.tolist() == [False, True, False, False]
    assert torch.equal(solution.x[1], plain.x[1]) and torch.allclose(solution.x[0], tensor(0.5, 0.5))
    slope, all_of_it = torch.autograd.grad(solution.x[solution.ok].sum(), (b, A), retain_graph=True)
    assert torch.allclose(slope.flatten(), tensor(1.0, 1.0, 0.0, 0.0)) and all_of_it.isfinite().all()
    (slope,) = torch.autograd.grad(solution.x.sum(), b)
    assert slope.isnan().flatten().tolist() == [False, False, True, True]


def test_solutions_without_end_have_no_centre() -> None:
    data: dict[str, Any] = {"Q": None, "q": tensor(1.0, 0.0, grad=True), "lower": 0.0}
    shortest = diffopt.solve_qp(**data, settings=chosen("minimum_norm"))
    assert torch.allclose(shortest.x, tensor(0.0, 0.0), atol=1e-9)
    solution = diffopt.solve_qp(**data, settings=chosen("analytic_centre"), on_failure="return")
    assert solution.status == Status.NUMERICAL_ERROR
    assert torch.autograd.grad(solution.x.sum(), data["q"])[0].isnan().all()
    with pytest.raises(diffopt.SolveFailed, match="no analytic centre; Settings"):
        diffopt.solve_qp(**data, settings=chosen("analytic_centre"))


@pytest.mark.parametrize("name", NAMES)
def test_float32(name: str) -> None:
    b, lower, upper = (torch.tensor(v, requires_grad=True) for v in ([1.0], [0.0, 0.0, 0.1], [2.0, 2.0, 2.0]))
    solution = edge(b, lower, upper, name, "auto")
    assert solution.x.dtype == torch.float32 and solution.ok
    assert torch.allclose(solution.x, torch.tensor([0.45, 0.45, 0.1]), atol=1e-6)
    (slope,) = torch.autograd.grad(solution.x[..., 0].sum(), b)
    assert slope.dtype == torch.float32 and abs(float(slope) - 0.5) < 1e-5


@pytest.mark.parametrize("backend", ["cvxpy", "scipy"])
def test_another_backend(backend: str) -> None:
    b = tensor(1.0, grad=True)
    solution = edge(b, tensor(0.0, 0.0, 0.1), tensor(3.0, 3.0, 3.0), "minimum_norm", "auto", backend=backend)
    assert torch.allclose(solution.x, tensor(0.45, 0.45, 0.1), atol=1e-6)
    assert torch.allclose(torch.autograd.grad(solution.x[0], b)[0], tensor(0.5), atol=1e-6)


def test_where_it_goes_and_where_not() -> None:
    lower, upper, b = tensor(0.0, 0.0, 0.1), tensor(3.0, 3.0, 3.0), tensor([1.0], [2.0])

    def x(b: Tensor) -> Tensor:
        return edge(b, lower, upper, "minimum_norm", "auto").x

    named = torch.func.vmap(lambda b: edge(b, lower, upper, "minimum_norm", "auto"))(b)
    assert named.selection == "minimum_norm"
    assert torch.allclose(torch.func.vmap(x)(b), torch.stack([x(one) for one in b]))
    with pytest.raises(diffopt.NotDifferentiableError, match="because it looks at values"):
        torch.func.jacrev(x)(b[0])
    with pytest.raises(Exception, match="does not go inside torch.compile"):
        torch.compile(x, backend="eager", fullgraph=True)(b[0])
    with pytest.raises(diffopt.SettingsError, match="`selection` and `on_infeasible` do not go together"):
        edge(b, lower, upper, "minimum_norm", "auto", on_infeasible="closest")
    for settings in ({"relaxation": 0.1}, {"kink_rule": "nan"}, {"sync": False}):
        with pytest.raises(diffopt.SettingsError, match="out of range"):
            Settings(selection="minimum_norm", **settings)  # type: ignore[arg-type]
    with pytest.raises(diffopt.SettingsError, match="None, 'minimum_norm', 'analytic_centre'"):
        chosen("shortest")
    assert Settings.read(chosen("minimum_norm").text) == chosen("minimum_norm")
    with pytest.raises(diffopt.BackendUnsupported, match="`selection` takes quadratic and linear programs .*not Nonl"):
        diffopt.solve(Softmax(2), {"c": torch.zeros(2, dtype=f64)}, settings=chosen("minimum_norm"))
    solution = edge(b[0], lower, upper, "minimum_norm", "auto")
    leaves, spec = torch.utils._pytree.tree_flatten(solution)
    for again in (torch.utils._pytree.tree_unflatten(leaves, spec), pickle.loads(pickle.dumps(solution))):
        assert again.selection == "minimum_norm" and torch.equal(again.x, solution.x)
