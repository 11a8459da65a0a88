"""A start saves steps and changes no answer: statuses always, and solutions where they are unique."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import diffopt
import measures
from diffopt import Status
from diffopt.check import known
from diffopt.check.known import KnownProblem
from diffopt.solvers.cpu_executor import LANES_UP_TO
from diffopt.warm_start import Start
from problems_catalogue import CASES, Case
from tolerances import AGREEMENT, EXACT_ALGEBRA, GRADIENT, SOLUTION

Arguments = dict[str, Any]
EXECUTORS = ("cpu", "torch")
POINT = ("x", "s", "lam", "nu", "lam_lower", "lam_upper")
LARGE = LANES_UP_TO + 3

FAMILIES: dict[str, Callable[..., KnownProblem]] = {
    "lanes": lambda seed, **o: known.quadratic_program(seed, 6, 1, 7, bounds="mixed", **o),
    "alone": lambda seed, **o: known.quadratic_program(seed, LARGE, 3, 20, bounds="mixed", **o),
    "many_rows": lambda seed, **o: known.quadratic_program(seed, 4, 0, 14, **o),
    "singular": lambda seed, **o: known.quadratic_program(seed, 6, 1, 6, bounds="lower", singular=True, **o),
    "linear": lambda seed, **o: known.linear_program(seed, 5, 1, 8, bounds="both", **o),
}


def data(problem: KnownProblem) -> Arguments:
    return {name: value for name, value in problem.arguments().items() if value is not None or name == "Q"}


def solved(arguments: Arguments, executor: Any, start: Any = None, **settings: Any) -> diffopt.Solution:
    chosen = diffopt.Settings(executor=executor, **settings)
    return diffopt.solve_qp(**arguments, settings=chosen, on_failure="return", start=start)


def moved(arguments: Arguments, by: float, seed: int = 0) -> Arguments:
    """Return the data with q and h a little elsewhere; h only grows, so that solutions stay."""
    generator = torch.Generator().manual_seed(seed)
    new = dict(arguments)
    new["q"] = new["q"] + by * torch.randn(new["q"].shape, generator=generator, dtype=new["q"].dtype)
    if "h" in new:
        new["h"] = new["h"] + by * torch.rand(new["h"].shape, generator=generator, dtype=new["h"].dtype)
    return new


def values(solution: diffopt.Solution) -> dict[str, Tensor]:
    return {name: getattr(solution, name).detach().clone() for name in Start._fields}


def same(warm: diffopt.Solution, cold: diffopt.Solution, limit: float = EXACT_ALGEBRA) -> None:
    assert torch.equal(warm.status, cold.status)
    assert torch.equal(warm.weakly_active, cold.weakly_active)
    for name in POINT:
        a, b = getattr(warm, name)[cold.ok], getattr(cold, name)[cold.ok]
        assert torch.equal(a.isinf(), b.isinf()), name
        assert measures.relative(a.nan_to_num(posinf=0.0), b.nan_to_num(posinf=0.0)) <= limit, name


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_solution_is_its_own_start(case: Case, executor: Any, dtype: torch.dtype) -> None:
    posed = case.build(dtype)
    settings = diffopt.Settings(executor=executor)
    cold = diffopt.solve(posed.problem, posed.params, settings=settings)
    warm = diffopt.solve(posed.problem, posed.params, settings=settings, start=cold)
    assert torch.equal(warm.status, cold.status)
    for name, answer in posed.answer.items():
        assert measures.relative(getattr(warm, name), answer) <= SOLUTION[dtype], name
    if warm.backend == "pdipm":
        assert not bool(warm.iterations.any())  # its active set is right
    else:
        assert torch.equal(warm.x, cold.x)  # such a backend has no use for it


@pytest.mark.parametrize("family", ["singular", "linear"])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_large_solution_is_its_own_start(family: str, executor: Any) -> None:
    """Programs of this size are solved in a unit of their own; a start is not."""
    arguments = data(FAMILIES[family](3, batch=(6,)))
    for name in ("q", "b", "h", "lower", "upper"):
        if arguments.get(name) is not None:
            arguments[name] = 1e9 * arguments[name]
    cold = solved(arguments, executor)
    warm = solved(arguments, executor, cold)
    assert cold.ok.all() and (cold.iterations > 0).all()
    assert (warm.iterations == 0).all()
    assert measures.relative(warm.x / 1e9, cold.x / 1e9) <= EXACT_ALGEBRA


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("by", [1e-3, 0.3, 3.0])
def test_data_that_have_moved(family: str, by: float, executor: Any) -> None:
    before = data(FAMILIES[family](3, batch=(9,)))
    start = solved(before, executor)
    after = before if family == "linear" else moved(before, by)
    if family == "linear":  # its objective may move within the cone of the active rows only
        after = before | {"q": before["q"] * (1 + by)}
    cold, warm = solved(after, executor), solved(after, executor, start)
    same(warm, cold)  # (data that have moved far may have no solution)
    if by <= 1e-3:
        assert not bool(warm.iterations.any()) and bool((cold.iterations > 1).all())
    assert int(warm.iterations.sum()) <= int(cold.iterations.sum())


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("form", ["dense", "diagonal"])
def test_steps_from_near_the_earlier_point(executor: Any, form: str) -> None:
    # Without polishing no active set is tried.
    before = data(known.quadratic_program(5, 20, 2, 20, bounds="mixed", batch=(8,)))
    before["lower"][:, 0] = before["upper"][:, 0] = 0.5  # a fixed variable, which has a force of its own
    if form == "diagonal":
        before["Q"] = diffopt.Diagonal(before["Q"].diagonal(dim1=-2, dim2=-1))
    start = solved(before, executor)
    after = moved(before, 1e-3)
    cold, warm = solved(after, executor, polish=False), solved(after, executor, start, polish=False)
    assert bool(cold.ok.all()) and torch.equal(warm.status, cold.status)
    assert measures.relative(warm.x, cold.x) <= AGREEMENT  # within the tolerance, for nothing is polished
    assert bool(warm.iterations.all()) and 3 * int(warm.iterations.sum()) <= 2 * int(cold.iterations.sum())


@pytest.mark.parametrize(("n", "p", "m", "bounded"), [(12, 2, 6, True), (40, 4, 64, False), (40, 0, 36, True)])
def test_steps_where_the_active_set_is_far_off(n: int, p: int, m: int, bounded: bool) -> None:
    # The compiled dual form, in lanes and not: some programs need steps, and fewer than without a start.
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(128, *shape, generator=generator, dtype=torch.float64)

    U, G, A, x, q = normal(n, n).abs(), normal(m, n), normal(p, n), normal(n, 1), normal(n)
    before = {
        "Q": U @ U.mT + 1e-3 * torch.eye(n, dtype=torch.float64), "q": q, "A": A, "b": (A @ x).squeeze(-1), "G": G,
        "h": (G @ x).squeeze(-1) + normal(m).abs(),
    }  # fmt: skip
    if bounded:
        before["lower"] = x.squeeze(-1) - normal(n).abs()
    start = solved(before, "cpu")
    after = moved(before, 1.0)
    cold, warm = solved(after, "cpu"), solved(after, "cpu", start)
    assert cold.executor == warm.executor == "cpu:dual"
    same(warm, cold, 1e-6)
    stepped = warm.iterations > 0
    assert bool(stepped.any())
    assert int(warm.iterations[stepped].sum()) < int(cold.iterations[stepped].sum())


def wild(start: diffopt.Solution, kind: str) -> Any:
    """Return a start that is of no use."""
    if kind == "of another problem":
        return SimpleNamespace(**{name: v.roll(1, 0) for name, v in values(start).items()})
    generator = torch.Generator().manual_seed(1)
    fields = {name: torch.randn(v.shape, generator=generator, dtype=v.dtype) for name, v in values(start).items()}
    if kind == "not finite":
        odd = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=torch.float64)
        for i, v in enumerate(fields.values()):
            if v.shape[-1]:
                v[i :: len(fields), 0] = odd[i % 3]
    else:
        scale = {"random": 1.0, "huge": 1e30, "overflowing": 1e300, "negative": -1.0, "all active": 1.0}[kind]
        for name, v in fields.items():
            fields[name] = scale * (v.abs() if kind in ("negative", "all active") else v)
    return SimpleNamespace(**fields)


WILD = ("of another problem", "random", "huge", "overflowing", "negative", "all active", "not finite")


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("family", ["lanes", "alone", "singular", "linear"])
def test_starts_of_no_use(family: str, executor: Any) -> None:
    problem = data(FAMILIES[family](7, batch=(5,)))
    cold = solved(problem, executor)
    for kind in WILD:
        same(solved(problem, executor, wild(cold, kind)), cold)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("reduction", ["auto", "primal"])
def test_no_start_hides_that_there_is_no_solution(executor: Any, reduction: str) -> None:
    feasible = data(known.quadratic_program(8, 5, 1, 7, batch=(3,)))
    start = solved(feasible, executor)
    for problem, status in (
        (known.infeasible_program(8, 5, 1, 7, batch=(3,)), Status.PRIMAL_INFEASIBLE),
        (known.unbounded_program(8, 5, 1, 7, batch=(3,)), Status.DUAL_INFEASIBLE),
    ):
        cold = solved(data(problem), executor, reduction=reduction)
        assert bool((cold.status == status).all())
        for near in (start, cold, wild(start, "random"), wild(start, "all active")):
            warm = solved(data(problem), executor, near, reduction=reduction)
            assert torch.equal(warm.status, cold.status) and bool(warm.x.isnan().all())
            assert warm.certificate is not None and cold.certificate is not None
            for mine, theirs in zip(warm.certificate, cold.certificate, strict=True):
                assert torch.equal(mine.nan_to_num(), theirs.nan_to_num())


@pytest.mark.parametrize("executor", EXECUTORS)
def test_limits_hold_as_without_a_start(executor: Any) -> None:
    problem = data(known.quadratic_program(9, 12, 0, 30, batch=(4,)))
    for most in (1, 2, 60):
        cold = solved(problem, executor, max_iterations=most)
        for kind in WILD:
            warm = solved(problem, executor, wild(cold, kind), max_iterations=most)
            served = warm.ok & ~cold.ok  # a start may find what the limit cuts off, and then it is a solution
            assert torch.equal(warm.status[~served], cold.status[~served])
            assert bool((warm.residuals.worst()[served] <= 1e-9).all())


@pytest.mark.parametrize("executor", EXECUTORS)
def test_failed_instances_of_a_start_are_left_out(executor: Any) -> None:
    before = data(known.quadratic_program(10, 6, 0, 8, batch=(4,)))
    broken = before | {"q": before["q"].clone()}
    broken["q"][1] = torch.nan
    start = solved(broken, executor)
    assert start.status.tolist() == [1, 7, 1, 1]
    cold, warm = solved(before, executor), solved(before, executor, start)
    same(warm, cold)
    assert (warm.iterations > 0).tolist() == [False, True, False, False]
    # Also if what is there is finite: the point where an instance was given up.
    given_up = SimpleNamespace(**values(cold), ok=torch.tensor([True, False, True, True]))
    again = solved(before, executor, given_up)
    assert torch.equal(again.iterations, warm.iterations)


@pytest.mark.parametrize("family", FAMILIES)
def test_neighbours_change_no_bit(family: str) -> None:
    before = data(FAMILIES[family](11, batch=(11,)))
    after = moved(before, 0.3) if family != "linear" else before
    start = solved(before, "cpu")
    for near in (start, wild(start, "not finite"), wild(start, "of another problem")):
        together = solved(after, "cpu", near)
        for i in (0, 5, 10):
            alone = {name: v[i : i + 1] if v is not None else None for name, v in after.items()}
            own = SimpleNamespace(**{name: getattr(near, name)[i : i + 1] for name in Start._fields})
            found = solved(alone, "cpu", own)
            for name in (*POINT, "status", "iterations"):
                assert torch.equal(getattr(found, name)[0], getattr(together, name)[i]), (family, name, i)
    spoiled = SimpleNamespace(**values(start))
    spoiled.lam[4] = torch.nan
    clean, other = solved(after, "cpu", start), solved(after, "cpu", spoiled)
    keep = torch.arange(11) != 4
    for name in POINT:
        assert torch.equal(getattr(clean, name)[keep], getattr(other, name)[keep]), name


@pytest.mark.parametrize("executor", EXECUTORS)
def test_one_start_for_a_batch_and_batches_that_broadcast(executor: Any) -> None:
    before = data(known.quadratic_program(12, 6, 1, 7, batch=(2, 3)))
    shared = {name: v[0, 0] if v is not None else None for name, v in before.items()}
    after = shared | {"q": before["q"][0, 0] + 1e-3 * torch.randn(2, 3, 6, dtype=torch.float64)}
    one = solved(shared, executor)
    assert one.x.shape == (6,)
    row = SimpleNamespace(**{name: v.expand(3, v.shape[-1]) for name, v in values(one).items()})
    cold = solved(after, executor)
    for start in (one, row):
        warm = solved(after, executor, start)
        same(warm, cold)
        assert not bool(warm.iterations.any())


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_without_a_start(family: str, executor: Any, dtype: torch.dtype) -> None:
    before = data(FAMILIES[family](13, batch=(4,), dtype=dtype))
    after = moved(before, 0.3) if family != "linear" else before
    start = solved(before, executor)
    found = []
    for near in (None, start):
        leaves = measures.tracked(after)
        solution = solved(leaves, executor, near)
        assert bool(solution.ok.all())
        total = [(torch.linspace(-1, 2, v.shape[-1]).to(dtype) * v).sum() for v in values_of(solution)]
        torch.stack(total).sum().backward()
        found.append(measures.gradients(leaves))
    assert found[0].keys() == found[1].keys()
    for name, cold in found[0].items():
        assert measures.relative(found[1][name], cold) <= (1e-9 if dtype == torch.float64 else GRADIENT[dtype]), name


def values_of(solution: diffopt.Solution) -> list[Tensor]:
    return [getattr(solution, name) for name in ("x", "lam", "nu", "lam_lower", "lam_upper")]


def test_no_gradient_flows_into_a_start() -> None:
    before = measures.tracked(data(known.quadratic_program(14, 5, 1, 6, batch=(2,))))
    start = diffopt.solve_qp(**before)
    after: Arguments = {name: v.detach() for name, v in before.items()}
    warm = diffopt.solve_qp(**after, start=start)
    assert not warm.x.requires_grad and start.x.requires_grad
    leaf = after["q"].clone().requires_grad_()
    after["q"] = leaf
    diffopt.solve_qp(**after, start=start).x.sum().backward()
    assert leaf.grad is not None and before["q"].grad is None


@pytest.mark.parametrize("executor", EXECUTORS)
def test_steps_in_vain_are_counted(executor: Any) -> None:
    problem = data(known.infeasible_program(15, 6, 1, 8, batch=(3,)))
    cold = solved(problem, executor)
    ones = SimpleNamespace(**{name: torch.ones_like(v) for name, v in values(cold).items()})
    assert bool((solved(problem, executor, ones).iterations > cold.iterations).any())


def test_steps_in_vain_are_counted_in_the_dual_form() -> None:
    problem = data(known.quadratic_program(3, 12, 0, 18, batch=(64,)))
    found = solved(problem, "cpu")
    generator = torch.Generator().manual_seed(0)
    far = SimpleNamespace(
        **{name: v + 3 * torch.randn(v.shape, generator=generator, dtype=v.dtype) for name, v in values(found).items()}
    )
    cold, warm = (solved(problem, "cpu", start, max_iterations=4) for start in (None, far))
    both = cold.ok & warm.ok
    assert bool((warm.iterations[both] > 4).any()) and bool((cold.iterations[both] <= 4).all())
