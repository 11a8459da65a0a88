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
