"""The optimal value's derivatives."""

import torch

import diffopt
from diffopt import Settings, active_system
from diffopt.check import known
from random_data import random_qp

f64 = torch.float64


def test_first_derivative_of_the_value_solves_no_system(monkeypatch):
    data = random_qp()
    solution = diffopt.solve_qp(*data, settings=Settings(executor="torch"))
    called = []
    solve = active_system.solve_minimum_norm
    monkeypatch.setattr(active_system, "solve_minimum_norm", lambda *a: called.append(1) or solve(*a))
    slopes = torch.autograd.grad(solution.value.sum(), data, retain_graph=True)
    assert not called and torch.allclose(slopes[3], -solution.nu, atol=1e-10)
    torch.autograd.grad(solution.x.sum(), data)
    assert len(called) == 1  # and one for everything else


def test_the_value_has_second_derivatives_where_sides_are_infinite():
    problem = known.quadratic_program(20, 7, 1, 3, bounds="both")
    data = problem.arguments()
    data["h"] = torch.where(problem.lam > 0, data["h"], torch.inf)
    data["lower"] = torch.where(problem.lam_lower > 0, data["lower"], -torch.inf)

    def value(q, **others):
        return diffopt.solve_qp(**data | {"q": q} | others).value

    q = data["q"].clone().requires_grad_()
    (slope,) = torch.autograd.grad(value(q), q, create_graph=True)
    assert torch.allclose(slope, diffopt.solve_qp(**data).x, atol=1e-9)
    (curvature,) = torch.autograd.grad(slope.sum(), q)
    finite = {"h": data["h"].clamp_max(1e3), "lower": data["lower"].clamp_min(-1e3)}
    assert torch.allclose(curvature, torch.func.hessian(lambda q: value(q, **finite))(data["q"]).sum(0), atol=1e-9)
