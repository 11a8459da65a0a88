"""Reverse passes of a solver's own."""

import torch

import diffopt
from diffopt import pulled
from diffopt.backends.pdipm import PdipmBackend
from diffopt.check import known
from random_data import random_qp

f64 = torch.float64


def test_no_work_for_backward_without_gradients():
    data = random_qp(grad=False)
    assert not diffopt.solve_qp(*data).x.requires_grad
    with torch.no_grad():
        assert not diffopt.solve_qp(*random_qp()).x.requires_grad


def test_vmap_is_one_native_solve_and_its_backward_the_solvers_own(monkeypatch):
    problem = known.quadratic_program(6, 5, 1, 4, bounds="both", batch=(3,), shared=True)
    names, data = tuple(problem.arguments()), problem.arguments()
    shared = {name for name in names if data[name].dim() == (2 if name in "QAG" else 1)}
    assert "Q" in shared and "q" not in shared
    solved, calls = [], []
    solve, pull = PdipmBackend.solve, pulled._pulled
    monkeypatch.setattr(PdipmBackend, "solve", lambda self, form, *a: solved.append(form) or solve(self, form, *a))
    monkeypatch.setattr(pulled, "_pulled", lambda *a: calls.append(1) or pull(*a))
    leaves = [data[name].clone().requires_grad_() for name in names]
    in_dims = tuple(None if name in shared else 0 for name in names)
    mapped = torch.func.vmap(lambda *values: diffopt.solve_qp(**dict(zip(names, values, strict=True))), in_dims)
    solution = mapped(*leaves)
    assert len(solved) == 1 and solved[0].batch_shape == (3,) and solved[0].Q.batch_shape == ()
    native = diffopt.solve_qp(**data)
    for name in ("x", "lam", "value", "status", "iterations", "weakly_active"):
        assert torch.equal(getattr(solution, name), getattr(native, name)), name
    assert torch.equal(solution.residuals.primal, native.residuals.primal) and solution.executor == native.executor
    solution.x.sum().backward()
    assert len(calls) == 1 and leaves[0].grad is not None and leaves[0].grad.any()
