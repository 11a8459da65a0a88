"""Forward and reverse mode agree: <v, J u> = <J'v, u>, for every output and every piece of data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import diffopt
from diffopt.check import known
from diffopt.check.known import KnownProblem
from diffopt.solvers.settings import KINK_RULES
from problems_catalogue import Softmax
from tolerances import EXACT_ALGEBRA

OUTPUTS = ("x", "s", "lam", "nu", "lam_lower", "lam_upper", "value")

PROBLEMS: dict[str, KnownProblem] = {
    "equalities": known.quadratic_program(0, 4, 2, 0, batch=(2,)),
    "inequalities": known.quadratic_program(1, 5, 0, 6, batch=(2,)),
    "bounds": known.quadratic_program(2, 5, 0, 0, bounds="both", batch=(2,)),
    "everything": known.quadratic_program(3, 6, 2, 5, bounds="mixed", batch=(2,)),
    "singular": known.quadratic_program(4, 6, 1, 5, bounds="lower", singular=True, batch=(2,)),
    "linear": known.linear_program(5, 5, 1, 7, bounds="upper", batch=(2,)),
    "shared": known.quadratic_program(6, 5, 1, 4, bounds="both", batch=(3,), shared=True),
    "degenerate": known.degenerate_program(7, 5, 1, 4, bounds="both", batch=(2,), weak=2),
    "redundant": known.redundant_program(8, 5, 1, 4, extra_p=1, extra_m=2, batch=(2,)),
}


def function(
    problem: KnownProblem, backend: str = "pdipm", **settings: Any
) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """Return the map from the pieces of data to the outputs, and its arguments."""
    arguments = problem.arguments()
    names = [name for name, value in arguments.items() if value is not None]
    options = {"backend": backend, "settings": diffopt.Settings(**settings)}

    def outputs(*values: Tensor) -> tuple[Tensor, ...]:
        solution = diffopt.solve_qp(**arguments | dict(zip(names, values, strict=True)), **options)
        return tuple(getattr(solution, name) for name in OUTPUTS)

    return outputs, tuple(arguments[name] for name in names)  # type: ignore[misc]


def random_like(tensors: tuple[Tensor, ...], seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in tensors)


def pairing(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> tuple[float, float]:
    """Return the inner product and the size of its terms."""
    products = torch.cat([(a * b).flatten() for a, b in zip(left, right, strict=True)])
    return float(products.sum()), float(products.abs().sum())


def assert_adjoint(outputs: Callable[..., tuple[Tensor, ...]], values: tuple[Tensor, ...]) -> None:
    u = random_like(values, 1)
    y, Ju = torch.func.jvp(outputs, values, u)[:2]
    v = random_like(y, 2)
    tracked = tuple(t.clone().requires_grad_() for t in values)
    result = outputs(*tracked)
    total = torch.stack([(a * b).sum() for a, b in zip(result, v, strict=True)]).sum()
    Jv = torch.autograd.grad(total, tracked, materialize_grads=True, allow_unused=True)
    left, size = pairing(v, Ju)
    right, other = pairing(Jv, u)
    assert abs(left - right) <= EXACT_ALGEBRA * (1 + size + other), (left, right)
    assert size > 0


@pytest.mark.parametrize("name", PROBLEMS)
def test_forward_and_reverse_agree(name: str) -> None:
    assert_adjoint(*function(PROBLEMS[name]))


@pytest.mark.parametrize("rule", KINK_RULES)
def test_at_a_kink_every_rule_is_one_linear_map(rule: str) -> None:
    assert_adjoint(*function(PROBLEMS["degenerate"], kink_rule=rule))


@pytest.mark.parametrize("name", ["everything", "linear"])
def test_every_backend(backend: str, name: str) -> None:
    assert_adjoint(*function(PROBLEMS[name], backend, tolerance=1e-8))


@pytest.mark.parametrize("name", ["everything", "shared"])
def test_dual_numbers_give_the_same_as_jvp(name: str) -> None:
    outputs, values = function(PROBLEMS[name])
    u = random_like(values, 1)
    expected = torch.func.jvp(outputs, values, u)[1]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(value, tangent) for value, tangent in zip(values, u, strict=True)]
        got = [forward_ad.unpack_dual(y).tangent for y in outputs(*duals)]
    for name_, a, b in zip(OUTPUTS, got, expected, strict=True):
        error = float((b if a is None else a - b).abs().max())
        assert error <= EXACT_ALGEBRA * (1 + float(b.abs().max())), name_


@pytest.mark.parametrize("name", ["everything", "shared", "linear"])
def test_reverse_with_a_graph_is_plain_reverse(name: str) -> None:
    # create_graph takes the differentiable route of the backward pass.
    outputs, values = function(PROBLEMS[name])
    tracked = tuple(t.clone().requires_grad_() for t in values)
    result = outputs(*tracked)
    v = random_like(result, 2)
    total = torch.stack([(a * b).sum() for a, b in zip(result, v, strict=True)]).sum()
    plain, graph = (
        torch.autograd.grad(
            total, tracked, retain_graph=True, create_graph=create, materialize_grads=True, allow_unused=True
        )
        for create in (False, True)
    )
    for a, b in zip(plain, graph, strict=True):
        assert float((a - b.detach()).abs().max()) <= EXACT_ALGEBRA * (1 + float(a.abs().max()))


@pytest.mark.parametrize("name", ["everything", "shared", "singular"])
def test_forward_over_reverse_is_reverse_over_reverse(name: str) -> None:
    """The Hessian of a functional, times a direction, by both routes."""
    outputs, values = function(PROBLEMS[name])
    weights = random_like(outputs(*values), 2)
    u = random_like(values, 1)

    def total(*data: Tensor) -> Tensor:
        return torch.stack([(w * y.square()).sum() for w, y in zip(weights, outputs(*data), strict=True)]).sum()

    places = tuple(range(len(values)))
    forward = torch.func.jvp(torch.func.grad(total, places), values, u)[1]
    tracked = tuple(t.clone().requires_grad_() for t in values)
    gradient = torch.autograd.grad(total(*tracked), tracked, create_graph=True)
    slope = torch.stack([(g * v).sum() for g, v in zip(gradient, u, strict=True)]).sum()
    reverse = torch.autograd.grad(slope, tracked)
    assert any(bool(h.any()) for h in reverse)
    for a, b in zip(forward, reverse, strict=True):
        assert float((a - b).abs().max()) <= EXACT_ALGEBRA * (1 + float(b.abs().max()))


def test_a_nonlinear_problem() -> None:
    c = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def outputs(c: Tensor) -> tuple[Tensor, ...]:
        solution = diffopt.solve(Softmax(4), {"c": c})
        return solution.x, solution.nu, solution.value

    assert_adjoint(outputs, (c,))
