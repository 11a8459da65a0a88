"""Soft constraints at a linear price: instances that need none are solved as they are, and nobody can tell."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import diffopt
import measures
from diffopt import Elastic, Settings, elastic
from diffopt.check import known
from tolerances import GRADIENT_REFERENCE, X_REFERENCE

f64 = torch.float64
EXECUTORS = ["cpu", "torch", pytest.param("cuda", marks=pytest.mark.cuda)]
WEIGHT = 50.0


def some_contradict(p: int = 1, bounds: known.Bounds = "both") -> dict[str, Any]:
    """Return 6 programs, batched ``(2, 3)``: two meet their rows, one only at a price above `WEIGHT`, three cannot."""
    problem = known.quadratic_program(5, 5, p, 4, bounds=bounds, batch=(2, 3), condition=10.0)
    data = {name: v for name, v in problem.arguments().items() if v is not None}
    G, h = data["G"].clone(), data["h"].clone()
    G[..., 1, :] = torch.where(
        torch.tensor([[[False], [True], [True]], [[False], [True], [False]]]), -G[..., 0, :], G[..., 1, :]
    )
    h[..., 1] = torch.where(torch.tensor([[False, True, True], [False, True, False]]), -h[..., 0] - 0.3, h[..., 1])
    q = data["q"].clone()
    q[1, 2] *= 100.0
    return data | {"G": G, "h": h, "q": q}


def solved(data: dict[str, Any], executor: Any, **weights: Any) -> tuple[diffopt.Solution, dict[str, Tensor]]:
    """Solve, and differentiate a function of all outputs by all data and weights."""
    device = "cuda" if executor == "cuda" else "cpu"
    leaves = measures.tracked({name: v.to(device) for name, v in (data | weights).items()})
    given = {name: v for name, v in leaves.items() if name in data}
    policy = Elastic(**{name: leaves[name] for name in weights})
    solution = diffopt.solve_qp(**given, settings=Settings(executor=executor), on_infeasible=policy)
    assert solution.shifts is not None
    outputs = [solution.x, solution.s, solution.lam, solution.nu, solution.lam_lower, solution.value, *solution.shifts]
    loss = sum(((1 + k) * v).cos().sum() for k, v in enumerate(outputs))
    return solution, dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))  # type: ignore


@pytest.mark.parametrize("soft_bounds", [False, True])
@pytest.mark.parametrize("p", [0, 1])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_solved_as_they_are_or_softened_it_is_the_same(
    executor: Any, p: int, soft_bounds: bool, monkeypatch: Any
) -> None:
    data = some_contradict(p)
    weights = {"eq": torch.full((p,), WEIGHT, dtype=f64), "row": torch.full((3, 4), WEIGHT, dtype=f64)}
    weights |= {"bound": torch.full((5,), 2 * WEIGHT, dtype=f64)} if soft_bounds else {}
    ours, our_gradients = solved(data, executor, **weights)
    monkeypatch.setattr(elastic, "_where_needed", elastic._softened)
    theirs, their_gradients = solved(data, executor, **weights)
    assert ours.shifts is not None and theirs.shifts is not None and bool(ours.ok.all())
    moved = torch.cat([v.abs() for v in ours.shifts], -1).amax(-1) > 1e-6
    assert moved.tolist() == [[False, True, True], [False, True, True]]
    for name in measures.OUTPUTS:
        assert measures.relative(getattr(ours, name), getattr(theirs, name)) <= X_REFERENCE, name
    for mine, other in zip(ours.shifts, theirs.shifts, strict=True):
        assert measures.relative(mine, other) <= X_REFERENCE
    for name, gradient in our_gradients.items():
        assert measures.relative(gradient, their_gradients[name]) <= GRADIENT_REFERENCE, name
    assert measures.relative(ours.adjoint < 1e-6, theirs.adjoint < 1e-6) == 0
    assert torch.equal(ours.residuals.worst() <= 1e-9, theirs.residuals.worst() <= 1e-9)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_where_all_can_be_met_it_is_the_problem_itself(executor: Any) -> None:
    problem = known.quadratic_program(5, 5, 1, 4, batch=(3,), condition=10.0)
    data = {name: v for name, v in problem.arguments().items() if v is not None}
    device = "cuda" if executor == "cuda" else "cpu"
    data = {name: v.to(device) for name, v in data.items()}
    row = torch.full((4,), 1e3, dtype=f64, device=device, requires_grad=True)
    settings = Settings(executor=executor)
    soft = diffopt.solve_qp(**data, settings=settings, on_infeasible=Elastic(row=row))
    plain = diffopt.solve_qp(**data, settings=settings)
    assert soft.executor == plain.executor and torch.equal(soft.x, plain.x) and torch.equal(soft.value, plain.value)
    # Its derivative by the weights is zero, and not none.
    (by_x,) = torch.autograd.grad(soft.x.sum(), row, retain_graph=True)
    (by_value,) = torch.autograd.grad(soft.value.sum(), row)
    assert not by_x.any() and not by_value.any()


@pytest.mark.parametrize("executor", EXECUTORS)
def test_neighbours_that_need_it_change_no_bit(executor: Any) -> None:
    data = some_contradict()
    weights = {"row": torch.full((4,), WEIGHT, dtype=f64)}
    before, gradients = solved(data, executor, **weights)
    data["h"] = data["h"].clone()
    data["h"][0, 0, :2] = torch.stack([-torch.ones((), dtype=f64), data["h"][0, 0, 1]])
    data["h"][1, 1] += 2.0
    after, other_gradients = solved(data, executor, **weights)
    same = torch.tensor([[False, True, True], [True, False, True]])
    assert not torch.equal(before.x[~same], after.x[~same])
    for name in (*measures.OUTPUTS, "status", "iterations", "weakly_active", "dependent"):
        assert torch.equal(getattr(before, name)[same], getattr(after, name)[same]), name
    for name in data:
        assert torch.equal(gradients[name][same], other_gradients[name][same]), name


def test_where_none_can_be_met_steps_are_counted_as_where_some_can(monkeypatch: Any) -> None:
    data = some_contradict()
    some = diffopt.solve_qp(**data, on_infeasible=Elastic(row=WEIGHT))
    one = {name: v[0, 1] for name, v in data.items()}
    for alone in ({name: v[None] for name, v in one.items()}, one):
        found = diffopt.solve_qp(**alone, on_infeasible=Elastic(row=WEIGHT))
        assert found.x.shape == alone["q"].shape and torch.equal(found.x.flatten(), some.x[0, 1])
        assert int(found.iterations) == int(some.iterations[0, 1])
    plain = diffopt.solve_qp(**one, on_failure="return")
    monkeypatch.setattr(elastic, "_where_needed", elastic._softened)
    softened = diffopt.solve_qp(**one, on_infeasible=Elastic(row=WEIGHT))
    assert int(found.iterations) == int(plain.iterations) + int(softened.iterations) > int(softened.iterations)


@pytest.mark.parametrize("executor", ["cpu", "torch"])
def test_forward_and_second_derivatives_of_a_batch_that_is_part_softened(executor: Any) -> None:
    data = some_contradict()
    settings, leaf = Settings(executor=executor), data["q"].clone().requires_grad_()

    def x(q: Tensor) -> Tensor:
        return diffopt.solve_qp(**data | {"q": q}, settings=settings, on_infeasible=Elastic(row=WEIGHT)).x

    (first,) = torch.autograd.grad(x(leaf).sin().sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad((first * torch.arange(5.0)).sum(), leaf)
    direction = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(0), dtype=f64)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(x(forward_ad.make_dual(data["q"], direction))).tangent
    step = 1e-5
    ends = [data["q"] + sign * step * direction for sign in (1.0, -1.0)]
    high, low = (x(end) for end in ends)
    assert measures.relative(tangent, (high - low) / (2 * step)) <= 1e-6
    slopes = [torch.autograd.grad(x(end.requires_grad_()).sin().sum(), end)[0] for end in ends]
    bend = ((slopes[0] - slopes[1]) / (2 * step) * torch.arange(5.0)).sum()
    assert abs(float((second * direction).sum() - bend)) <= 1e-6 * (1 + abs(float(bend)))


def test_a_batch_of_weights_for_one_problem() -> None:
    """The problem itself is one, and the weights decide how many are to be solved."""
    data = {"Q": torch.ones(1, 1, dtype=f64), "q": torch.tensor([-3.0], dtype=f64), "G": torch.ones(1, 1, dtype=f64)}
    weights = torch.tensor([[1.5], [2.5]], dtype=f64)  # the multiplier is 2
    solution = diffopt.solve_qp(**data, h=torch.ones(1, dtype=f64), on_infeasible=Elastic(row=weights))
    assert solution.x.flatten().tolist() == pytest.approx([1.5, 1.0])
