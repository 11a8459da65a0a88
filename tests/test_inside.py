"""Soft constraints, closest problems and relaxed gradients inside vmap and torch.compile: the same as for the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import diffopt
from diffopt import Elastic, Settings
from diffopt.check import known
from tolerances import EXACT_ALGEBRA

f64 = torch.float64
Values = dict[str, Tensor]
Function = Callable[..., tuple[Tensor, ...]]


def batch(problems: list[Any]) -> Values:
    data = [problem.arguments() for problem in problems]
    return {name: torch.stack([d[name] for d in data]) for name in data[0] if data[0][name] is not None}


# The last instance can be solved as it is.
CONTRADICTORY = batch(
    [known.infeasible_program(seed, 5, 1, 4, kind="rows") for seed in (1, 2)]
    + [known.quadratic_program(3, 5, 1, len(known.infeasible_program(1, 5, 1, 4, kind="rows").arguments()["h"]))]
)
LINEAR = batch([known.linear_program(seed, 6, 1, 5, bounds="both") for seed in (6, 7)])
KINDS: dict[str, tuple[Values, dict[str, Any]]] = {
    "elastic": (CONTRADICTORY, {"on_infeasible": "elastic"}),
    "squared": (CONTRADICTORY, {"on_infeasible": Elastic("squared", eq=20.0, row=5.0)}),
    "closest": (CONTRADICTORY, {"on_infeasible": "closest"}),
    "central path": (LINEAR, {"settings": Settings(relaxation=0.1)}),
    "ridge": (LINEAR, {"settings": Settings(relaxation=0.1, relaxation_mode="ridge")}),
}


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def function(kind: str) -> Function:
    data, options = KINDS[kind]

    def outputs(*values: Tensor) -> tuple[Tensor, ...]:
        named: dict[str, Any] = {"Q": None} | dict(zip(data, values, strict=True)) | options
        s = diffopt.solve_qp(**named)
        shifts = () if s.shifts is None else tuple(s.shifts)
        return s.x, s.s, s.lam, s.nu, s.lam_lower, s.lam_upper, s.value, *shifts

    return outputs


def loss(outputs: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([value.sin().sum() for value in outputs]).sum()


def gradients(f: Function, values: list[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    leaves = [value.clone().requires_grad_() for value in values]
    outputs = f(*leaves)
    return outputs, torch.autograd.grad(loss(outputs), leaves)


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for got, wanted in zip(found, expected, strict=True):
        assert (got - wanted).abs().max() <= EXACT_ALGEBRA * (1 + wanted.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_vmap(kind: str) -> None:
    f, values = function(kind), list(KINDS[kind][0].values())
    expected, slopes = gradients(f, values)
    assert sum(bool(slope.any()) for slope in slopes) >= len(slopes) - 1
    found, through = gradients(torch.func.vmap(f), values)
    assert_same(found, expected)
    assert_same(through, slopes)
    each = torch.func.vmap(torch.func.grad(lambda *values: loss(f(*values)), tuple(range(len(values)))))(*values)
    assert_same(each, slopes)
    places = list(KINDS[kind][0]).index("q")
    forward = torch.func.vmap(torch.func.jacfwd(lambda *values: f(*values)[0], places))(*values)
    backward = torch.func.vmap(torch.func.jacrev(lambda *values: f(*values)[0], places))(*values)
    assert forward.any() and (forward - backward).abs().max() <= 1e-8 * (1 + forward.abs().max())


@pytest.mark.parametrize("kind", ["squared", "closest", "central path", "ridge"])
def test_compile(kind: str) -> None:
    f, values = function(kind), list(KINDS[kind][0].values())
    expected, slopes = gradients(f, values)
    found, compiled = gradients(torch.compile(f, backend="aot_eager", fullgraph=True), values)
    assert_same(found, expected)
    assert_same(compiled, slopes)


def test_weights_may_be_mapped() -> None:
    data = {name: value[0] for name, value in CONTRADICTORY.items()}
    problem = diffopt.QPStructure(n=5, **{name: diffopt.given() for name in data})
    layer = diffopt.Layer(problem, on_infeasible=Elastic("squared", row=diffopt.given()))
    weights = torch.tensor([1.0, 10.0, 100.0], dtype=f64)
    found = torch.func.vmap(lambda w: layer(**data, elastic_row=w))(weights)
    expected = torch.stack([layer(**data, elastic_row=w) for w in weights])
    assert torch.allclose(found, expected, atol=1e-12) and (found[0] - found[1]).abs().max() > 1e-3


def test_vmap_inside_torch_compile() -> None:
    data = known.quadratic_program(3, 5, 2, 4, bounds="both", batch=(3,)).arguments()

    def mapped(q: Tensor, A: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        def one(q: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            s = diffopt.solve_qp(data["Q"][0], q, A, b, data["G"][0], data["h"][0], data["lower"][0], data["upper"][0])
            return s.x, s.value

        return torch.func.vmap(torch.func.vmap(one, (0, None)), (None, 0))(q, b)

    values = [data["q"], data["A"][0], data["b"][:1] + 0.01 * torch.arange(2, dtype=f64).reshape(2, 1)]
    expected, slopes = gradients(mapped, values)
    found, compiled = gradients(torch.compile(mapped, backend="aot_eager", fullgraph=True), values)
    assert_same(found, expected)
    assert_same(compiled, slopes)


def test_failures_have_their_place_in_all_that_is_mapped() -> None:
    def x(q: Tensor, options: Any = None) -> Tensor:
        return diffopt.solve_qp(None, q, G=torch.eye(2, dtype=f64), h=0.0, **(options or {})).x

    falls = torch.ones(2, 3, 2, dtype=f64).neg()
    falls[1, 2] = 1  # bounded above alone: unbounded where the cost is positive
    for options in ({"on_infeasible": "closest"}, {"on_infeasible": Elastic(row=None)}):
        with pytest.raises(diffopt.SolveFailed, match=r"1 of 6 instances.*\n  batch index \[1, 2\]: DUAL_INFEASIBLE"):
            torch.func.vmap(torch.func.vmap(lambda q, o=options: x(q, o)))(falls)
        with pytest.raises(diffopt.SolveFailed, match=r"1 of 6 instances.*\n  batch index \[1, 2\]: DUAL_INFEASIBLE"):
            torch.func.vmap(torch.func.vmap(torch.func.grad(lambda q, o=options: x(q, o).sum())))(falls)
        graph = torch.compile(lambda q, o=options: x(q, o), backend="aot_eager", fullgraph=True)
        with pytest.raises(diffopt.SolveFailed, match=r"batch index \[1, 2\]: DUAL_INFEASIBLE"):
            graph(falls)


def test_a_compiled_value_with_relaxed_gradients_has_no_second_derivative() -> None:
    data = {name: value[0] for name, value in LINEAR.items()}

    def value(q: Tensor) -> Tensor:
        options: Any = {"Q": None} | data | {"q": q}
        return diffopt.solve_qp(**options, settings=Settings(relaxation=0.1)).value

    q = data["q"].clone().requires_grad_()
    graph = torch.compile(value, backend="eager", fullgraph=True)
    (slope,) = torch.autograd.grad(graph(q), q)
    assert torch.allclose(slope, torch.autograd.grad(value(q), q)[0])
    with pytest.raises(diffopt.NotDifferentiableError, match="has no second derivative: that goes through the exact p"):
        torch.autograd.grad(graph(q), q, create_graph=True)
