"""Where the linear system behind a gradient has no solution, an instance says so; and NaN where that is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import diffopt
from diffopt import Settings

f64 = torch.float64
EXECUTORS = ["cpu", "torch"]
KINDS = ["singular", "linear", "dependent"]


def tensor(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=f64)


def programs(kind: str) -> dict[str, Any]:
    """Return two programs in (x1, x2): x of the first is unique, of the second only x1 + x2, which is 1."""
    cost = tensor([1.0, 2.0], [1.0, 1.0])
    if kind == "singular":  # (x1 + x2 - 1)^2 / 2, and a little of |x|^2 in the first
        return {"Q": torch.ones(2, 2, dtype=f64) + torch.diag_embed(cost - 1), "q": -torch.ones(2, 2, dtype=f64)}
    G = -torch.ones(2 if kind == "dependent" else 1, 2, dtype=f64)
    return {"Q": None, "q": cost, "G": G, "h": -torch.ones(len(G), dtype=f64), "lower": 0.0, "upper": 3.0}


def gradient(data: dict[str, Any], executor: str, weights: Tensor, **settings: Any) -> tuple[Any, Tensor]:
    q = data["q"].clone().requires_grad_()
    solution = diffopt.solve_qp(**data | {"q": q}, settings=Settings(executor=executor, **settings))
    return solution, torch.autograd.grad((solution.x * weights).sum(), q)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_an_x_that_is_not_unique_says_so(executor: str, kind: str) -> None:
    data = programs(kind)
    weights = tensor([1.0, 2.0], [1.0, 2.0])
    with pytest.warns(diffopt.InaccurateGradientWarning, match="of 1 of 2 instances"):
        solution, found = gradient(data, executor, weights)
    assert solution.unique.tolist() == [True, False]
    assert solution.adjoint[0] < 1e-12 and solution.adjoint[1] > 1e-3
    assert found.isfinite().all()
    # A function of what is unique, x1 + x2, has a derivative, and nothing is amiss.
    _, found = gradient(data, executor, torch.ones(2, 2, dtype=f64))
    assert torch.allclose(found[1], tensor(-0.5, -0.5) if kind == "singular" else tensor(0.0, 0.0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_an_x_that_is_not_unique_gets_nan_on_request(executor: str, kind: str) -> None:
    data = programs(kind)
    solution, found = gradient(data, executor, torch.ones(2, 2, dtype=f64), kink_rule="nan")
    assert solution.ok.all() and solution.x.isfinite().all()
    assert found[0].isfinite().all() == (kind != "dependent") and found[1].isnan().all()
    # Nothing is asked of it: nothing, not NaN.
    _, found = gradient(data, executor, torch.zeros(2, 2, dtype=f64), kink_rule="nan")
    assert (found == 0).all()


@pytest.mark.parametrize("executor", EXECUTORS)
def test_kinks_get_nan_on_request(executor: str) -> None:
    """min |x|^2 / 2 - q x subject to x <= h twice: regular, weakly active, active and dependent."""
    one, h = torch.ones(1, 1, dtype=f64), tensor([1.0, 3.0], [0.5, 1.0], [0.5, 0.5], [0.2, 1.0])
    q = tensor([-0.5], [-0.5], [-1.5], [-0.5])
    gradients = {}
    for rule in ("inactive", "nan"):
        sides = h.clone().requires_grad_()
        settings = Settings(executor=executor, kink_rule=rule)  # type: ignore[arg-type]
        solution = diffopt.solve_qp(one, q, G=one.expand(2, 1), h=sides, settings=settings)
        assert solution.weakly_active.tolist() == [0, 1, 0, 0] and solution.dependent.tolist() == [0, 0, 1, 0]
        assert solution.unique.all()
        gradients[rule] = torch.autograd.grad(solution.x.sum(), sides)[0]
        again = diffopt.solve_qp(one, q, G=one.expand(2, 1), h=sides, settings=settings)
        (value,) = torch.autograd.grad(again.value.sum(), sides)
        assert value.isnan().any(-1).tolist() == ([False, True, True, False] if rule == "nan" else [False] * 4)
    assert torch.allclose(gradients["inactive"], tensor([0.0, 0.0], [0.0, 0.0], [0.5, 0.5], [1.0, 0.0]))
    assert gradients["nan"].isnan().any(-1).tolist() == [False, True, True, False]
    assert torch.allclose(gradients["nan"][[0, 3]], gradients["inactive"][[0, 3]])


def test_forward_mode_gets_nan_too() -> None:
    def x(h: Tensor) -> Tensor:
        one = torch.ones(1, 1, dtype=f64)
        return diffopt.solve_qp(one, -one[0], G=one.expand(2, 1), h=h, settings=Settings(kink_rule="nan")).x

    assert torch.func.jacfwd(x)(tensor(0.5, 0.5)).isnan().all()
    assert torch.allclose(torch.func.jacfwd(x)(tensor(0.5, 0.7)), tensor([1.0, 0.0]))


def test_the_report_of_what_is_no_longer_at_hand() -> None:
    solution = diffopt.solve_qp(**programs("singular"))
    leaves, spec = torch.utils._pytree.tree_flatten(solution)
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert again.adjoint.isnan().all() and not again.unique.any()
    failed = diffopt.solve_qp(None, tensor(-1.0), on_failure="return")
    assert failed.adjoint.isnan() and not failed.unique
