"""First and second derivatives of 200 random instances with a margin, and forward against reverse mode, to the stated
targets. Every output takes part, and all data move."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import diffopt
from diffopt.check import known

COUNT = 200
OUTPUTS = ("x", "s", "lam", "nu", "lam_lower", "lam_upper", "value")
FIRST, SECOND, ADJOINT = 1e-6, 1e-4, 1e-10
"""Worst relative errors: of first and second derivatives against central differences, and between the modes. The
project's stated targets."""
STEP = torch.finfo(torch.float64).eps ** (1 / 3)

PROBLEM = known.quadratic_program(11, 5, 1, 3, bounds="both", batch=(COUNT,), condition=10.0, margin=0.1)
NAMES = tuple(PROBLEM.arguments())
DATA = tuple(PROBLEM.arguments().values())


def directions(seed: int, like: tuple[Any, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(v.shape, generator=generator, dtype=v.dtype) for v in like)


MOVE = directions(1, DATA)


def outputs(executor: Any, data: tuple[Any, ...]) -> tuple[Tensor, ...]:
    solution = diffopt.solve_qp(**dict(zip(NAMES, data, strict=True)), settings=diffopt.Settings(executor=executor))
    return tuple(getattr(solution, name).reshape(COUNT, -1) for name in OUTPUTS)


def moved(t: float) -> tuple[Tensor, ...]:
    return tuple(value + t * move for value, move in zip(DATA, MOVE, strict=True))


def worst(found: Tensor, expected: Tensor) -> float:
    """Return the worst over instances of max |found - expected| / (1 + max |expected|)."""
    found, expected = found.reshape(COUNT, -1), expected.reshape(COUNT, -1)
    return float(((found - expected).abs().amax(-1) / (1 + expected.abs().amax(-1))).max())


def loss(executor: Any, data: tuple[Any, ...]) -> Tensor:
    """Return a number that all outputs of all instances move, beyond the first order."""
    return torch.stack([(value + value.square()).sum() for value in outputs(executor, data)]).sum()


@pytest.mark.parametrize("executor", ["auto", "torch"])
def test_first_derivatives(executor: str) -> None:
    high, low = outputs(executor, moved(STEP)), outputs(executor, moved(-STEP))
    tangents = torch.func.jvp(lambda *data: outputs(executor, data), DATA, MOVE)[1]
    for name, above, below, tangent in zip(OUTPUTS, high, low, tangents, strict=True):
        assert float((tangent.abs().amax(-1) > 0).double().mean()) > 0.3, name  # it moves in many instances
        assert worst(tangent, (above - below) / (2 * STEP)) <= FIRST, name


@pytest.mark.parametrize("executor", ["auto", "torch"])
def test_second_derivatives(executor: str) -> None:
    def gradient(data: tuple[Any, ...]) -> tuple[Tensor, ...]:
        leaves = [value.clone().requires_grad_() for value in data]
        return torch.autograd.grad(loss(executor, tuple(leaves)), leaves)

    leaves = [value.clone().requires_grad_() for value in DATA]
    first = torch.autograd.grad(loss(executor, tuple(leaves)), leaves, create_graph=True)
    reverse = torch.autograd.grad(first, leaves, MOVE)
    places = tuple(range(len(DATA)))
    forward = torch.func.jvp(torch.func.grad(lambda *data: loss(executor, data), places), DATA, MOVE)[1]
    high, low = gradient(moved(STEP)), gradient(moved(-STEP))
    for name, one, other, above, below in zip(NAMES, reverse, forward, high, low, strict=True):
        numeric = (above - below) / (2 * STEP)
        # (Q's gradient is symmetric, and so is its derivative.)
        assert numeric.any() and worst(one, numeric) <= SECOND and worst(other, numeric) <= SECOND, name


@pytest.mark.parametrize("executor", ["auto", "torch"])
def test_forward_equals_reverse(executor: str) -> None:
    leaves = tuple(value.clone().requires_grad_() for value in DATA)
    values = outputs(executor, leaves)
    v = directions(2, values)
    reverse = torch.autograd.grad(values, leaves, v)
    tangents = torch.func.jvp(lambda *data: outputs(executor, data), DATA, MOVE)[1]

    def pairing(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        terms = torch.cat([(a * b).reshape(COUNT, -1) for a, b in zip(left, right, strict=True)], -1)
        return terms.sum(-1), terms.abs().sum(-1)

    (left, size), (right, other) = pairing(v, tangents), pairing(reverse, MOVE)
    assert bool((size > 0.1).all())
    assert float(((left - right).abs() / torch.maximum(size, other)).max()) <= ADJOINT
