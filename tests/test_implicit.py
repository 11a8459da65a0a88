"""Gradients at ordinary points, of all orders."""

import pytest
import torch

import diffopt
from diffopt import Diagonal
from random_data import everything, random_qp, tensor

f64 = torch.float64


def test_reverse_and_forward_mode_of_every_output_in_all_data():
    assert torch.autograd.gradcheck(everything, random_qp(1, 3, 3, 1), atol=1e-6)
    assert torch.autograd.gradcheck(everything, random_qp(), atol=1e-6, check_forward_ad=True, fast_mode=True)


@pytest.mark.parametrize("structure", ["dense", "diagonal", "low_rank"])
def test_second_derivatives(structure):
    data = random_qp(2, 4, 4, 1)
    d, U = tensor(1.0, 2.0, 3.0, 1.5, grad=True), torch.randn(2, 4, 2, dtype=f64, requires_grad=True)
    hessian = {"dense": [data[0]], "diagonal": [d], "low_rank": [d, U]}[structure]
    weights = torch.randn(4 + 4 + 4 + 1 + 4 + 4 + 1, dtype=f64) / 4  # every output takes part
    make = {"dense": lambda Q: Q, "diagonal": Diagonal, "low_rank": diffopt.DiagonalPlusLowRank}[structure]

    def outputs(*tensors):
        k = len(hessian)
        return (everything(make(*tensors[:k]), *tensors[k:]) @ weights).tanh()

    inputs = (*hessian, *data[1:])
    assert torch.autograd.gradcheck(outputs, inputs, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(outputs, inputs, fast_mode=True, atol=1e-5)


def test_third_derivative_of_a_quadratic_program_is_exact():
    a = tensor(0.7, grad=True)
    x = diffopt.solve_qp(a.reshape(1, 1), tensor(-1.0)).x.sum()  # x = 1 / a
    for order, wanted in enumerate((-1 / 0.7**2, 2 / 0.7**3, -6 / 0.7**4)):
        (x,) = torch.autograd.grad(x, a, create_graph=True)
        assert abs(float(x.detach()) - wanted) < 1e-9 * abs(wanted), order


def test_functional_transforms():
    data = random_qp(2, 4, 4, 1, grad=False)
    q, v = data[1], torch.randn(2, 4, dtype=f64)

    def loss(q):
        return diffopt.solve_qp(data[0], q, *data[2:]).x.square().sum()

    slope = torch.func.grad(loss)(q)
    value, tangent = torch.func.jvp(loss, (q,), (v,))
    assert torch.allclose(tangent, (slope * v).sum()) and torch.allclose(value, loss(q))
    _, pullback = torch.func.vjp(loss, q)
    assert torch.allclose(pullback(torch.ones((), dtype=f64))[0], slope)

    def x(q):
        return diffopt.solve_qp(data[0], q, *data[2:]).x

    assert torch.allclose(torch.func.jacfwd(x)(q), torch.func.jacrev(x)(q), atol=1e-12)
    wanted = torch.autograd.functional.hessian(loss, q)
    assert wanted.abs().max() > 1e-3 and torch.allclose(torch.func.hessian(loss)(q), wanted, atol=1e-11)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_jacobians_by_the_older_vectorised_forward_mode(batch):
    # `torch.autograd.functional` maps by means of its own, which take less than those of torch.func.
    data = [t[0] for t in random_qp(1, 4, 4, 1, grad=False)]
    q, A = torch.randn(*batch, 4, dtype=f64), data[2]

    def outputs(q, A):
        return everything(data[0], q, A, *data[3:])

    wanted = torch.func.jacrev(outputs, (0, 1))(q, A)
    found = torch.autograd.functional.jacobian(outputs, (q, A), vectorize=True, strategy="forward-mode")
    for got, expected in zip(found, wanted, strict=True):
        assert expected.abs().max() > 1e-3 and torch.allclose(got, expected, atol=1e-11)


@pytest.mark.parametrize("outer", [torch.func.jacrev, torch.func.jacfwd])
@pytest.mark.parametrize("inner", [torch.func.jacrev, torch.func.jacfwd])
def test_second_derivatives_by_every_pair_of_modes(outer, inner):
    # Forward mode in forward mode too, of which torch does not see a function's inner part by itself.
    data = [t[0] for t in random_qp(1, 3, 3, 1, grad=False)]

    def loss(Q, A):
        return everything(Q, data[1], A, *data[3:]).square().sum()

    wanted = torch.autograd.functional.hessian(loss, (data[0], data[2]))
    found = outer(inner(loss, (0, 1)), (0, 1))(data[0], data[2])
    for row, expected in zip(found, wanted, strict=True):
        for got, block in zip(row, expected, strict=True):
            assert block.abs().max() > 1e-3 and torch.allclose(got, block, rtol=1e-9, atol=1e-9)


def test_shared_data_gets_the_sum_and_Q_a_symmetric_gradient():
    data = random_qp(4)
    shared = [t[0].detach().clone().requires_grad_() for t in data]
    q = data[1]
    shared[1] = q
    weights = torch.randn(4, 5, dtype=f64)
    (weights * diffopt.solve_qp(*shared).x).sum().backward()
    wide = [t if t is q else t.detach().expand(4, *t.shape).clone().requires_grad_() for t in shared]
    together = torch.autograd.grad((weights * diffopt.solve_qp(*wide).x).sum(), wide)
    for t, each in zip(shared, together, strict=True):
        assert torch.allclose(t.grad, each if t is q else each.sum(0), atol=1e-10)
    assert torch.allclose(shared[0].grad, shared[0].grad.mT, atol=1e-14) and shared[0].grad.abs().max() > 1e-3


def test_data_computed_from_other_data_counts_once():
    q = tensor(-1.0, -2.0, grad=True)
    for create_graph in (False, True):
        x = diffopt.solve_qp(torch.eye(2, dtype=f64), q, G=torch.eye(2, dtype=f64), h=q / 4).x  # both rows hold
        (slope,) = torch.autograd.grad(x.sum(), q, create_graph=create_graph)
        assert torch.allclose(slope, tensor(0.25, 0.25))


def test_attaching_does_not_move_the_values():
    data = random_qp()
    a, b = everything(*data), everything(*[t.detach() for t in data])
    assert torch.equal(a, b)


def test_fixed_variables_share_their_gradient_between_the_two_sides():
    low, high = tensor(0.5, -1.0, grad=True), tensor(0.5, 1.0, grad=True)
    solution = diffopt.solve_qp(torch.eye(2, dtype=f64), tensor(0.0, 0.3), lower=low, upper=high)
    slopes = torch.autograd.grad(solution.x.sum(), (low, high), retain_graph=True)
    assert all(torch.allclose(s, tensor(0.5, 0.0)) for s in slopes)
    assert torch.allclose(solution.lam_lower, tensor(0.5, 0.0)) and solution.lam_upper.abs().max() == 0
    slopes = torch.autograd.grad(solution.lam_lower.sum(), (low, high))
    assert all(torch.allclose(s, tensor(0.5, 0.0)) for s in slopes)
