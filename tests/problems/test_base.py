"""A problem class of one's own, far from quadratic: entropy over the simplex, whose answer is softmax."""

import pytest
import torch

import diffopt
from diffopt import Param, ParameterError, ShapeError

f64 = torch.float64


class Entropy(diffopt.DifferentiableProblem):
    """min c'x + sum x log x subject to 1'x = 1, x >= 0: x = softmax(-c)."""

    n = 4
    params = (Param("c", ("n",)),)

    def objective(self, x, params):
        return (params["c"] * x).sum(-1) + (x * x.log()).sum(-1)

    def equalities(self, x, params):
        return x.sum(-1, keepdim=True) - 1

    def inequalities(self, x, params):
        return x[..., :0]

    def bounds(self, params):
        return 0.0, None


class Ball(diffopt.DifferentiableProblem):
    """The point of the ball |x|^2 <= r closest to ``point``: a nonlinear inequality."""

    n = 3
    params = (Param("point", ("n",)), Param("r", ()))

    def objective(self, x, params):
        return 0.5 * (x - params["point"]).square().sum(-1)

    def equalities(self, x, params):
        return x[..., :0]

    def inequalities(self, x, params):
        return (x.square().sum(-1) - params["r"]).unsqueeze(-1)


def test_softmax_with_derivatives_of_two_orders():
    c = torch.randn(2, 4, dtype=f64, requires_grad=True)
    solution = diffopt.solve(Entropy(), {"c": c})
    assert (solution.x - torch.softmax(-c, -1)).abs().max() < 1e-9
    assert (solution.value + torch.logsumexp(-c, -1)).abs().max() < 1e-9

    def answer(c):
        return diffopt.solve(Entropy(), {"c": c}).x

    assert torch.autograd.gradcheck(answer, (c,), fast_mode=True)
    assert torch.autograd.gradcheck(answer, (c,), check_forward_ad=True, check_backward_ad=False, fast_mode=True)
    v = torch.randn(2, 4, dtype=f64)
    (first,) = torch.autograd.grad((v * answer(c)).sum(), c, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), c)
    (wanted,) = torch.autograd.grad((v * torch.softmax(-c, -1)).sum(), c, create_graph=True)
    (wanted,) = torch.autograd.grad(wanted.square().sum(), c)
    assert torch.allclose(second, wanted, atol=1e-9)


def test_nonlinear_inequality_with_its_dual():
    point = torch.tensor([[3.0, 0, 4.0], [0.1, 0.2, 0]], dtype=f64, requires_grad=True)
    r = torch.tensor(4.0, dtype=f64, requires_grad=True)
    solution = diffopt.solve(Ball(), {"point": point, "r": r})
    assert torch.allclose(solution.x[0], point[0] * 2 / 5, atol=1e-8)
    assert torch.allclose(solution.x[1], point[1], atol=1e-8)
    assert torch.allclose(solution.lam[:, 0], torch.tensor([0.75, 0.0], dtype=f64), atol=1e-8)
    (slope,) = torch.autograd.grad(solution.value.sum(), r, retain_graph=True)
    assert torch.allclose(slope, -solution.lam.sum(), atol=1e-8)
    (curve,) = torch.autograd.grad(solution.lam[0, 0], r)
    assert torch.allclose(curve, torch.tensor(-5 / (4 * 4.0**1.5), dtype=f64), atol=1e-8)  # lam = 5/(2 sqrt r) - 1/2


def test_derived_gradient_check():
    diffopt.check.gradients(
        Entropy(), {"c": torch.randn(2, 4, dtype=f64)}, outputs=("x", "nu", "value")
    ).raise_if_failed()


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({}, ParameterError, "Entropy needs `c`, which was not given. Expected `c`, got no parameters"),
        ({"c": torch.zeros(4), "d": 0}, ParameterError, "Entropy takes no `d`. Expected `c`"),
        (
            {"c": torch.zeros(3)},
            ShapeError,
            r"`c` has the wrong shape for Entropy. Expected \(\*batch, 4\), got \(3,\)",
        ),
        ({"c": 1.0}, ParameterError, "`c` must be a torch tensor, got float"),
    ],
)
def test_bad_params(params, error, message):
    with pytest.raises(error, match=message):
        diffopt.solve(Entropy(), params)


def methods(base=Ball, **replaced):
    """The class with other methods or attributes."""
    return type("Changed", (base,), replaced)


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize(
    ("replaced", "error", "message"),
    [
        (
            {"objective": lambda self, x, p: (x - p["point"]).square().sum()},
            ShapeError,
            r"objective returned shape \(\)",
        ),
        (
            {"objective": lambda self, x, p: (x - p["point"]).square()},
            ShapeError,
            r"Expected \(2, .*: one number for each",
        ),
        ({"objective": lambda self, x, p: None}, ShapeError, "Changed.objective returned NoneType"),
        ({"inequalities": lambda self, x, p: x.square().sum(-1) - p["r"]}, ShapeError, "Keep the last dimension"),
        (
            {"inequalities": lambda self, x, p: x.sum() * x.new_ones(1)},
            ShapeError,
            r"inequalities returned shape \(1,\)",
        ),
        (
            {"equalities": lambda self, x, p: None},
            ShapeError,
            r"equalities returned NoneType.*x\[..., :0\] is none at all",
        ),
        (
            {"bounds": lambda self, p: None},
            ParameterError,
            r"bounds returned NoneType. Expected a pair \(lower, upper\)",
        ),
        (
            {"start": lambda self, p: torch.zeros(2, dtype=f64)},
            ShapeError,
            r"start returned shape \(2,\) .*Expected .*\(3,\)",
        ),
        ({"start": lambda self, p: 0.0}, ShapeError, "start returned float"),
        ({"n": None}, ParameterError, r"Changed says no number of variables: n = None. Set `n`"),
    ],
)
def test_what_the_methods_return_is_checked(replaced, error, message, batch):
    params = {"point": torch.ones(*batch, 3, dtype=f64), "r": torch.ones((), dtype=f64)}
    diffopt.solve(methods()(), params)
    with pytest.raises(error, match=message):
        diffopt.solve(methods(**replaced)(), params)


@pytest.mark.parametrize("params", [Param("point", ("n",)), ("point",), "point", None])
def test_params_must_be_a_tuple_of_param(params):
    with pytest.raises(ParameterError, match=r"Changed.params is .*Expected a tuple of diffopt.Param"):
        methods(params=params)()


def test_a_forgotten_constructor_is_named():
    class Forgetful(diffopt.QuadraticProgram):
        def __init__(self):
            self.size = 3

        def form(self, q):
            return diffopt.QPForm(Q=torch.eye(self.size, dtype=f64), q=q)

    for use in (diffopt.Layer, lambda problem: diffopt.solve(problem, {"q": torch.ones(3, dtype=f64)})):
        with pytest.raises(ParameterError, match=r"Call super\(\).__init__\(\).* in Forgetful.__init__"):
            use(Forgetful())
    assert not hasattr(Forgetful(), "other")


def test_what_does_not_vary_over_the_batch_may_lack_it():
    r = torch.tensor([0.5, 1.0], dtype=f64)
    fixed = methods(
        objective=lambda self, x, p: 0.5 * (x - 1).square().sum(-1),
        equalities=lambda self, x, p: p["r"].new_zeros(0),
        start=lambda self, p: torch.zeros(3, dtype=f64),
    )
    x = diffopt.solve(fixed(), {"point": torch.zeros(3, dtype=f64), "r": r}).x
    assert torch.allclose(x, (r / 3).sqrt().unsqueeze(-1).expand(2, 3))


def test_an_objective_that_does_not_exist_at_zero():
    class Determinant(Ball):
        def objective(self, x, params):
            factor = torch.linalg.cholesky(torch.diag_embed(x))  # raises outside its domain
            return (x - params["point"]).square().sum(-1) - 0.1 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)

        def bounds(self, params):
            return 1e-3, None

    params = {"point": torch.full((2, 3), 0.5, dtype=f64), "r": torch.tensor(9.0, dtype=f64)}
    assert diffopt.solve(Determinant(), params).ok.all()
