"""A batch equals the loop over it, and an instance does not notice what its neighbours hold, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import diffopt
import measures
from diffopt.check import known
from diffopt.check.known import KnownProblem
from tolerances import BATCH_LOOP

Arguments = dict[str, Any]

STRUCTURES: dict[str, Callable[..., KnownProblem]] = {
    "equalities": lambda **o: known.quadratic_program(0, 5, 2, 0, **o),
    "inequalities": lambda **o: known.quadratic_program(1, 5, 0, 6, **o),
    "bounds": lambda **o: known.quadratic_program(2, 5, 0, 0, bounds="both", **o),
    "everything": lambda **o: known.quadratic_program(3, 6, 2, 4, bounds="mixed", **o),
    "many_rows": lambda **o: known.quadratic_program(4, 3, 0, 12, **o),
    "singular": lambda **o: known.quadratic_program(5, 6, 1, 4, bounds="lower", singular=True, **o),
    "linear": lambda condition, **o: known.linear_program(6, 4, 1, 6, bounds="lower", **o),
}  # fmt: skip


def solved(
    arguments: Arguments, keep: Tensor | None = None, settings: diffopt.Settings | None = None
) -> tuple[diffopt.Solution, dict[str, Tensor]]:
    """Solve, and pull fixed cotangents of x and the multipliers of kept instances back."""
    leaves = measures.tracked(arguments)
    solution = diffopt.solve_qp(**leaves, settings=settings, on_failure="return")
    total = solution.x.new_zeros(())
    for name in ("x", "nu", "lam", "lam_lower", "lam_upper"):
        value = getattr(solution, name)
        weights = torch.linspace(-1, 2, value.shape[-1], dtype=value.dtype)
        picked = value if keep is None else value[keep]
        total = total + (weights * picked).sum()
    total.backward()
    return solution, measures.gradients(leaves)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_batch_equals_loop(structure: str, shared: bool) -> None:
    problem = STRUCTURES[structure](batch=(2, 3), condition=10.0, shared=shared)
    together, gradients = solved(problem.arguments())
    assert together.x.shape[:-1] == (2, 3)
    sums: dict[str, Tensor] = {}
    for i, one in enumerate(problem.instances()):
        index = (i // 3, i % 3)
        alone, gradient = solved(one.arguments())
        for name in measures.OUTPUTS:
            error = measures.relative(getattr(together, name)[index], getattr(alone, name))
            assert error <= BATCH_LOOP, (name, index)
        assert int(together.status[index]) == int(alone.status)
        for name, value in gradient.items():
            if gradients[name].dim() == value.dim():  # shared: the sum over the batch
                sums[name] = sums.get(name, torch.zeros_like(value)) + value
            else:
                assert measures.relative(gradients[name][index], value) <= BATCH_LOOP, (name, index)
    for name, value in sums.items():
        assert measures.relative(gradients[name], value) <= BATCH_LOOP, name


@pytest.mark.parametrize("piece", ["Q", "q", "A", "b", "G", "h", "lower", "upper"])
def test_any_piece_may_be_shared(piece: str) -> None:
    # The answer is not known then, but a batch with a shared piece is the batch with that piece repeated.
    problem = known.quadratic_program(7, 4, 1, 3, bounds="both", batch=(3,), condition=10.0)
    arguments = problem.arguments()
    one = arguments[piece]
    assert one is not None
    wide = {"lower": -3.0, "upper": 3.0}.get(piece)
    one = one[0] if wide is None else torch.full_like(one[0], wide)
    repeated: dict[str, Any] = arguments | {piece: one.expand(3, *one.shape).clone().requires_grad_()}
    single: dict[str, Any] = arguments | {piece: one.clone().requires_grad_()}
    together = diffopt.solve_qp(**single, on_failure="return")
    apart = diffopt.solve_qp(**repeated, on_failure="return")
    assert torch.equal(together.status, apart.status)
    ok = together.ok
    assert bool(ok.any())
    assert measures.relative(together.x[ok], apart.x[ok]) <= BATCH_LOOP
    together.x[ok].sum().backward()
    apart.x[ok].sum().backward()
    assert measures.relative(single[piece].grad, repeated[piece].grad.sum(0)) <= BATCH_LOOP


def broken(arguments: Arguments, how: str, i: int) -> Arguments:
    """Spoil instance i, in tensors that have a batch dimension."""
    changed = {k: None if v is None else v.clone() for k, v in arguments.items()}
    q, h, b, lower = changed["q"], changed["h"], changed["b"], changed["lower"]
    assert q is not None
    if how == "nan":
        q[i, 0] = torch.nan
    elif how == "infinite":
        q[i] = torch.inf
    elif how == "huge":
        q[i] = 1e12 * q[i]
    elif how == "nan_everywhere":
        for name, value in changed.items():
            if value is not None and value.dim() == (3 if name in "QAG" else 2):
                value[i] = torch.nan
    elif how == "infeasible":
        target = next((v for v in (lower, h, b) if v is not None), None)
        if target is lower and lower is not None:
            lower[i] = torch.nan_to_num(lower[i], neginf=0.0) + 1e3
        elif target is not None:
            target[i] = target[i] - 1e3
    else:
        raise AssertionError(how)
    return changed


# How well the spoiled instance itself is solved does not matter here.
@pytest.mark.filterwarnings("ignore::diffopt.errors.InaccurateSolutionWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_neighbours_change_no_bit(structure: str, shared: bool, dtype: torch.dtype) -> None:
    problem = STRUCTURES[structure](batch=(4,), condition=10.0, shared=shared, dtype=dtype)
    arguments = problem.arguments()
    spoiled = 2
    keep = torch.arange(4) != spoiled
    before, gradients_before = solved(arguments, keep)
    assert bool(before.ok.all()), before
    for how in ("nan", "infinite", "huge", "nan_everywhere", "infeasible"):
        after, gradients_after = solved(broken(arguments, how, spoiled), keep)
        for name in (*measures.OUTPUTS, "status", "iterations", "weakly_active", "dependent"):
            left, right = getattr(before, name)[keep], getattr(after, name)[keep]
            assert torch.equal(left, right), (how, name)
        for left, right in zip(before.residuals, after.residuals, strict=True):
            assert torch.equal(left[keep], right[keep]), how
        for name, gradient in gradients_before.items():
            left, right = gradient, gradients_after[name]
            if left.dim() == (3 if name in "QAG" else 2):
                left, right = left[keep], right[keep]
                # The spoiled instance was masked: exactly zero, not NaN.
                assert not gradients_after[name][spoiled].any(), (how, name)
            assert torch.equal(left, right), (how, name)


NEIGHBOURS: dict[str, Arguments] = {
    "ordinary": known.quadratic_program(8, 6, 2, 4, bounds="both").arguments(),
    "another elimination": known.quadratic_program(8, 6, 2, 4, bounds="both", singular=True).arguments(),
    "more attempts": known.infeasible_program(9, 6, 2, 4, bounds="both", kind="rows", violation=1e-6).arguments(),
    "kinks": known.degenerate_program(9, 6, 2, 4, weak=2, bounds="both").arguments(),
}


@pytest.mark.parametrize("kink_rule", ["inactive", "active", "central", "minimum_norm", "nan"])
@pytest.mark.parametrize("executor", ["cpu", "torch"])
@pytest.mark.parametrize("kinks", [0, 2])
def test_what_a_neighbour_needs_changes_no_bit(kinks: int, executor: Any, kink_rule: Any) -> None:
    """Two instances, beside one with kinks or without."""
    problem = known.quadratic_program(3, 6, 2, 4, bounds="both", batch=(4,), condition=10.0)
    arguments = problem.arguments()
    weak = known.degenerate_program(19, 6, 2, 4, weak=kinks, bounds="both").arguments()
    settings = diffopt.Settings(executor=executor, kink_rule=kink_rule)
    keep = torch.tensor([1, 3] if kinks and kink_rule == "nan" else [0, 1, 3])
    seen: list[tuple[diffopt.Solution, dict[str, Tensor]]] = []
    for neighbour in NEIGHBOURS.values():
        data = {name: value.clone() for name, value in arguments.items() if value is not None}
        for name, value in data.items():
            value[0], value[2] = weak[name], neighbour[name]
        seen.append(solved(data, keep, settings))
    first, gradients = seen[0]
    assert bool(first.ok.all()) and first.weakly_active.tolist() == [kinks, 0, 0, 0]
    for how, (after, gradients_after) in zip(list(NEIGHBOURS)[1:], seen[1:], strict=True):
        for name in (*measures.OUTPUTS, "weakly_active", "dependent", "adjoint"):
            assert torch.equal(getattr(first, name)[keep], getattr(after, name)[keep]), (how, name)
        for name, gradient in gradients.items():
            assert bool(gradient[keep].isfinite().all())
            assert torch.equal(gradient[keep], gradients_after[name][keep]), (how, name)


def test_an_instance_does_not_depend_on_its_place() -> None:
    problem = STRUCTURES["everything"](batch=(5,), condition=10.0)
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled: dict[str, Any] = {k: None if v is None else v[order] for k, v in problem.arguments().items()}
    here, there = diffopt.solve_qp(**problem.arguments()), diffopt.solve_qp(**shuffled)
    for name in measures.OUTPUTS:
        assert measures.relative(there.x, here.x[order]) <= BATCH_LOOP, name
