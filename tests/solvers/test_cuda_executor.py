"""The CUDA executor: its kernels against torch operations. Without a GPU they run behind ``solvers/cuda/shim.hpp``."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import diffopt
from diffopt import Settings, Status, kkt
from diffopt.backends import pdipm as pdipm_backend
from diffopt.linalg.matrices import Dense, Diagonal
from diffopt.problems.forms import QPForm
from diffopt.solvers import cuda_executor, pdipm
from diffopt.solvers.cuda_executor import CudaExecutor, CudaLauncher, Sizes
from diffopt.solvers.executor import Answer, Data
from measures import relative
from solvers.cuda.shim import ShimLauncher, library
from tolerances import GRADIENT, GRADIENT_REFERENCE, RESIDUAL, SOLUTION, X_REFERENCE

NAMES = ("Q", "q", "A", "b", "G", "h", "lower", "upper")
OUTPUTS = ("x", "s", "nu", "lam", "lam_lower", "lam_upper")
f64 = torch.float64
Problem = dict[str, Any]  # tensors


def optnet(batch: int, n: int, m: int, p: int = 0, bounds: str = "", seed: int = 0, shared: str = "") -> Problem:
    """OptNet's problems, about half of the rows active, with bounds named in ``bounds``; Q is not given symmetric.

    Args:
        shared: names of pieces that all instances share.
    """
    g = torch.Generator().manual_seed(seed)

    def lead(name: str) -> tuple[int, ...]:
        return () if name in shared.split() else (batch,)

    U = torch.rand(*lead("Q"), n, n, dtype=f64, generator=g)
    A = torch.randn(*lead("A"), p, n, dtype=f64, generator=g)
    G = torch.randn(*lead("G"), m, n, dtype=f64, generator=g)
    q, x = (torch.randn(batch, n, dtype=f64, generator=g) for _ in range(2))
    data = {"Q": U @ U.mT + 1e-3 * torch.eye(n, dtype=f64) + 0.1 * (U - U.mT), "q": q}
    data |= {"A": A, "b": (A @ x[..., None])[..., 0], "G": G}
    data["h"] = (G @ x[..., None])[..., 0] + torch.rand(batch, m, dtype=f64, generator=g)
    for name, sign in (("lower", -1), ("upper", 1)):
        if name in bounds:
            data[name] = x + sign * torch.rand(batch, n, dtype=f64, generator=g)
    return data


def data_of(problem: Problem, batch: torch.Size | None = None) -> Data:
    pieces = [problem.get(name) for name in NAMES]
    Q = Dense(problem["Q"])
    return Data(Q, *pieces[1:], problem["q"].shape[:-1] if batch is None else batch)  # type: ignore[arg-type]


def solve(executor: CudaExecutor, problem: Problem, batch: tuple[int, ...] | None = None, **settings: Any) -> Answer:
    data, chosen = data_of(problem, batch and torch.Size(batch)), Settings(**settings)
    assert executor.refuses(data, chosen) is None
    dtype = problem["q"].dtype
    tolerance = min(chosen.tolerance_for(dtype), 1e-8 if dtype == torch.float32 else 1.0)
    return executor.solve(data, chosen, tolerance, chosen.weak_tolerance_for(dtype), keep=True)


def weights(answer: Answer) -> tuple[Tensor, ...]:
    return drawn_like(answer.packed.vectors())


def drawn_like(vectors: Sequence[Tensor], seed: int = 5) -> tuple[Tensor, ...]:
    """Draw the coefficients of a linear function of all outputs; none for an infinite slack."""
    g = torch.Generator().manual_seed(seed)
    drawn = (torch.randn(v.shape, dtype=f64, generator=g) for v in vectors)
    return tuple(
        torch.where(v.isinf().cpu(), 0.0, w).to(v.dtype).to(v.device) for v, w in zip(vectors, drawn, strict=True)
    )


def reference(problem: Problem, weights: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Differentiate the linear function of the outputs by torch operations alone."""
    leaves: Problem = {name: v.detach().clone().requires_grad_() for name, v in problem.items()}
    solution = diffopt.solve_qp(**leaves, settings=Settings(executor="torch"))
    total = sum(
        torch.where(v.isinf(), 0.0, w * v).sum()
        for name, w in zip(OUTPUTS, weights, strict=True)
        for v in [getattr(solution, name)]
    )
    gradients = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)  # type: ignore[arg-type]
    return dict(zip(leaves, gradients, strict=True))


def pull_back(executor: CudaExecutor, problem: Problem, answer: Answer, weights: tuple[Tensor | None, ...]) -> Problem:
    needed = tuple(name in problem for name in NAMES)
    found = executor.pullback(data_of(problem), answer.saved, answer.packed, weights, needed)
    return {name: v for name, v in zip(NAMES, found, strict=True) if v is not None}


def compare(executor: CudaExecutor, problem: Problem) -> Answer:
    """Solve and differentiate by the kernels and by torch operations; both must agree."""
    double = problem["q"].dtype == f64
    answer = solve(executor, problem)
    expected = pdipm.solve(data_of({name: v.double() for name, v in problem.items()}), Settings(), 1e-9)
    assert answer.unsolved == 0 and (answer.packed.status == Status.SOLVED).all()
    for name in OUTPUTS:
        got, want = getattr(answer.packed, name), getattr(expected, name)
        assert torch.equal(got.isinf(), want.isinf())
        error = relative(got.nan_to_num(posinf=0.0), want.nan_to_num(posinf=0.0).to(got.dtype))
        assert error <= (X_REFERENCE if double else SOLUTION[torch.float32]), (name, error)
    coefficients = weights(answer)
    gradients, wanted = pull_back(executor, problem, answer, coefficients), reference(problem, coefficients)
    assert list(gradients) == list(problem)
    for name, gradient in gradients.items():
        error = relative(gradient, wanted[name])
        assert error <= (GRADIENT_REFERENCE if double else GRADIENT[torch.float32]), (name, error)
    return answer


@pytest.fixture
def serial() -> CudaExecutor:
    """One thread does everything: fast."""
    return CudaExecutor(ShimLauncher())


@pytest.fixture(params=["warp", "block", "large"])
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each variant, whatever the size."""
    monkeypatch.setattr(cuda_executor, "WARP_UP_TO", 1000 if request.param == "warp" else 0)
    monkeypatch.setattr(cuda_executor, "MATRICES_SHARED", request.param != "large")
    return request.param


@pytest.mark.parametrize("bounds", ["", "lower", "upper", "lower upper"])
@pytest.mark.parametrize(("n", "m", "p"), [(1, 1, 0), (3, 0, 2), (10, 10, 0), (10, 5, 3), (20, 18, 5), (41, 36, 7)])
def test_agrees_with_torch(serial: CudaExecutor, n: int, m: int, p: int, bounds: str) -> None:
    problem = optnet(4, n, m if not bounds else m // 2, p, bounds)
    answer = compare(serial, problem)
    point = kkt.Point(
        answer.packed.x,
        answer.packed.s,
        answer.packed.nu,
        answer.packed.lam,
        answer.packed.lam_lower,
        answer.packed.lam_upper,
    )
    again = kkt.residuals(QPForm(**problem), point)
    for mine, theirs in zip(answer.packed.residuals, again, strict=True):
        assert (mine - theirs).abs().max() <= 1e-12  # both are at rounding level, each in its own order of summation
    assert answer.packed.residuals.max() <= RESIDUAL[f64] * 1e-3


def test_many_problems_none_left(serial: CudaExecutor) -> None:
    # Textbook Mehrotra cycles on about one in 3,000 of these.
    problem = optnet(1024, 6, 6, seed=1)
    answer = solve(serial, problem)
    expected = pdipm.solve(data_of(problem), Settings(), 1e-9)
    assert answer.unsolved == 0 and answer.packed.counts[0].max() <= 25
    assert (
        relative(answer.packed.x, expected.x) <= X_REFERENCE
        and relative(answer.packed.lam, expected.lam) <= X_REFERENCE
    )


def test_without_constraints(serial: CudaExecutor, variant: str) -> None:
    answer = compare(serial, optnet(3, 5, 0, 0))
    assert answer.packed.counts[0].tolist() == [0, 0, 0] and answer.name == f"cuda:{variant}"


@pytest.mark.parametrize("shared", ["Q", "G A", "Q A G"])
def test_shared_data_sums_its_gradient(serial: CudaExecutor, shared: str) -> None:
    problem = optnet(5, 8, 6, 2, "lower", shared=shared)
    for name in shared.split():
        assert problem[name].dim() == 2
    problem["lower"] = problem["lower"].amin(0)
    compare(serial, problem)


def test_partly_shared_data(serial: CudaExecutor) -> None:
    problem = {name: v.unflatten(0, (2, 3)) for name, v in optnet(6, 5, 4, 1).items()}
    problem["G"], problem["Q"] = problem["G"][:, :1], problem["Q"][0, 0]
    # With G changed, h has to leave room again.
    problem["h"] = problem["h"].abs() + 3
    compare(serial, problem)


def test_float32_is_solved_in_float64(serial: CudaExecutor) -> None:
    problem = optnet(4, 12, 6, 2, "lower")
    problem["Q"] = problem["Q"] + torch.eye(12)
    single = {name: v.float() for name, v in problem.items()}
    answer = compare(serial, single)
    assert answer.packed.x.dtype == torch.float32 and answer.packed.residuals.dtype == f64
    # The residuals are those of what is written.
    point = kkt.Point(*(v.double() for v in answer.packed.vectors()))
    again = kkt.residuals(QPForm(**{name: v.double() for name, v in single.items()}), point)
    assert torch.allclose(answer.packed.residuals, torch.stack(again), rtol=1e-6, atol=1e-14)
    assert 1e-9 < answer.packed.residuals.max() <= 1e-6


def test_what_rounding_spoils_is_not_called_solved(serial: CudaExecutor) -> None:
    problem = {name: v.float() for name, v in optnet(5, 6, 4, 2).items()}
    problem["q"][2:], problem["A"][2:] = 1e4 * problem["q"][2:], 1e4 * problem["A"][2:]  # b stays as it is
    answer = solve(serial, problem)
    assert answer.packed.status.tolist() == [1, 1, 0, 0, 0] and answer.unsolved == 3
    again = solve(serial, {name: v.double() for name, v in problem.items()})
    assert again.unsolved == 0


@pytest.mark.parametrize(("warp", "warps"), [(4, 1), (4, 3), (32, 1)])
def test_many_threads_agree_with_one(variant: str, warp: int, warps: int) -> None:
    problem = optnet(3, 19, 8, 3, "lower", shared="G")  # two panels, and more tiles than one
    executor, lone = CudaExecutor(ShimLauncher(warp, warps)), CudaExecutor(ShimLauncher())
    answer, expected = solve(executor, problem), solve(lone, problem)
    assert torch.equal(answer.packed.counts, expected.packed.counts) and answer.unsolved == 0
    assert all(relative(a, b) <= 1e-12 for a, b in zip(answer.packed.vectors(), expected.packed.vectors(), strict=True))
    coefficients = weights(answer)
    ours, theirs = (pull_back(e, problem, a, coefficients) for e, a in ((executor, answer), (lone, expected)))
    assert all(relative(ours[name], theirs[name]) <= 1e-11 for name in problem)


@pytest.mark.parametrize(("n", "m", "p"), [(130, 130, 10), pytest.param(200, 200, 0, marks=pytest.mark.slow)])
def test_what_does_not_fit_shared_memory(serial: CudaExecutor, n: int, m: int, p: int) -> None:
    answer = compare(serial, optnet(2, n, m, p))
    assert answer.name == "cuda:large"


@pytest.mark.parametrize("keep", [False, True])
def test_memory_is_for_as_many_as_run_at_a_time(variant: str, keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = optnet(7, 6, 5, 1, "lower")
    problem["q"][3] = torch.nan
    asked: list[int] = []
    empty = torch.empty

    def counted(size: Any, **options: Any) -> Tensor:
        asked.append(size if isinstance(size, int) else 0)
        return empty(size, **options)

    monkeypatch.setattr(torch, "empty", counted)
    answers = []
    for blocks, records in ((2, 7 if keep else 2), (1000, 7)):
        if variant == "warp" and not keep:
            records = min(8, 4 * blocks)  # four problems a block
        asked.clear()
        executor = CudaExecutor(ShimLauncher(blocks=blocks))
        answers.append(executor.solve(data_of(problem), Settings(), 1e-9, 1e-7, keep))
        assert records * Sizes(6, 1, 5, True, False).kept() in asked
    others = [0, 1, 2, 4, 5, 6]
    assert all(answer.unsolved == 1 for answer in answers) and same_bits(*answers, others, others)


def same_bits(a: Answer, b: Answer, where: list[int], there: list[int]) -> bool:
    one, other = a.packed, b.packed
    vectors = zip((*one.vectors(), one.status), (*other.vectors(), other.status), strict=True)
    reports = (one.residuals, other.residuals), (one.counts, other.counts)
    return all(torch.equal(u[where], v[there]) for u, v in vectors) and all(
        torch.equal(u[:, where], v[:, there]) for u, v in reports
    )


@pytest.mark.parametrize("launcher", [ShimLauncher(), ShimLauncher(4, 2)], ids=["serial", "threads"])
def test_an_instance_does_not_know_its_neighbours(variant: str, launcher: ShimLauncher) -> None:
    executor = CudaExecutor(launcher)
    problem = optnet(5, 9, 7, 2, "upper")
    answer = solve(executor, problem)
    order = [3, 0, 4]
    moved = solve(executor, {name: v[order] for name, v in problem.items()})
    assert same_bits(answer, moved, order, [0, 1, 2])
    coefficients = weights(answer)
    before = pull_back(executor, problem, answer, coefficients)
    keep = [0, 1, 3, 4]
    for name in problem:
        spoiled = problem | {name: problem[name].clone()}
        spoiled[name].view(5, -1)[2, -1] = torch.nan
        again = solve(executor, spoiled)
        assert again.packed.status.tolist() == [1, 1, 0, 1, 1] and again.unsolved == 1
        assert same_bits(answer, again, keep, keep)
        after = pull_back(executor, spoiled, again, coefficients)
        for piece in problem:
            assert torch.equal(before[piece][keep], after[piece][keep]) and (after[piece][2] == 0).all()


def broken(kind: str) -> Problem:
    """Return three problems of which the middle one is not for this executor."""
    problem = optnet(3, 6, 4, 2, "lower upper")
    one = {name: v[1] for name, v in problem.items()}
    if kind == "fixed variable":
        one["upper"][2] = one["lower"][2]
    elif kind == "crossed bounds":
        one["upper"][2] = one["lower"][2] - 1
    elif kind == "indefinite":
        one["Q"][0, 0] = -100.0
    elif kind == "ill-conditioned":
        one["Q"][:] = torch.diag(torch.tensor([1, 1, 1, 1, 1, 1e-10], dtype=f64))
    elif kind == "dependent equalities":
        one["A"][1], one["b"][1] = one["A"][0], one["b"][0]
    elif kind == "infeasible":
        one["G"][0] = -one["G"][1]
        one["h"][0] = -one["h"][1] - 1
    elif kind == "dependent active rows":
        one["G"][1] = one["G"][0] = one["q"]
        one["h"][:2] = (one["G"][0] * 0.5 * (one["lower"] + one["upper"])).sum() + 1e-3
        one["q"][:] = -50 * one["q"]
    elif kind == "infinite":
        one["h"][0] = -torch.inf
    return problem


KINDS = (
    "fixed variable", "crossed bounds", "indefinite", "ill-conditioned", "dependent equalities", "infeasible",
    "dependent active rows", "infinite",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_leaves_to_others(serial: CudaExecutor, kind: str) -> None:
    problem = broken(kind)
    answer = solve(serial, problem)
    assert answer.packed.status.tolist() == [Status.SOLVED, Status.UNSOLVED, Status.SOLVED] and answer.unsolved == 1
    assert answer.packed.x[1].isnan().all() and answer.packed.residuals[:, 1].isnan().all()
    # Whoever solved it in the end: nothing of it comes from here.
    answer.packed.status[1] = Status.SOLVED
    gradients = pull_back(serial, problem, answer, tuple(torch.ones_like(v) for v in answer.packed.vectors()))
    assert all((v[1] == 0).all() and v[0].isfinite().all() for v in gradients.values())


def whole(problem: Problem, executor: str, weight: Tensor | None = None) -> tuple[diffopt.Solution, Problem]:
    """Solve and differentiate as a user does, by an executor and those whom it leaves something to."""
    leaves: Problem = {name: v.clone().requires_grad_() for name, v in problem.items()}
    solution = diffopt.solve_qp(**leaves, settings=Settings(executor=executor), on_failure="return")  # type: ignore[arg-type]
    ok = solution.ok if weight is None else solution.ok & weight
    total = sum(
        (v[ok] * w[ok]).nan_to_num(posinf=0.0).sum()
        for name, w in zip(OUTPUTS, drawn_like([getattr(solution, name).detach() for name in OUTPUTS]), strict=True)
        for v in [getattr(solution, name)]
    )
    return solution, dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))  # type: ignore[arg-type]


def left_to_others(shared: str = "") -> Problem:
    """Return eight problems of two rows of a batch, of which some are not for this executor."""
    problem = optnet(8, 6, 4, 2, "lower upper", shared=shared)
    problem["upper"][1, 2] = problem["lower"][1, 2]
    problem["lower"][3, 0] = problem["upper"][3, 0] + 1
    problem["q"][4, 1] = torch.nan
    problem["h"][6] -= 100
    if "Q" not in shared:
        problem["Q"][7, :, 0] = problem["Q"][7, 0, :] = 0
    return {name: v if v.shape[0] != 8 else v.unflatten(0, (2, 4)) for name, v in problem.items()}


@pytest.mark.parametrize(("shared", "at_once"), [("", 3), ("Q", 256), ("A G", 2)])
def test_what_is_left_goes_to_torch(
    serial: CudaExecutor, shared: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_executor, "_executor", serial)
    monkeypatch.setattr(pdipm_backend, "MOST_AT_ONCE", at_once)
    problem = left_to_others(shared)
    if "A" in shared:
        problem["Q"] = problem["Q"][:, :1]  # shared by some
    mine, gradients = whole(problem, "cuda")
    theirs, expected = whole(problem, "torch")
    assert mine.executor.startswith("cuda:warp+torch:") and torch.equal(mine.status, theirs.status)
    assert mine.status.flatten()[[3, 4, 6]].tolist() == [4, 7, 4] and mine.ok.sum() >= 4
    assert torch.equal(mine.weakly_active, theirs.weakly_active) and torch.equal(mine.dependent, theirs.dependent)
    proof = mine.certificate
    assert proof is not None and theirs.certificate is not None
    assert torch.equal(proof.lam.isnan(), theirs.certificate.lam.isnan())
    # (Proofs are not unique, but each must be one.)
    sides = {"b": proof.nu, "h": proof.lam, "lower": -proof.lam_lower, "upper": proof.lam_upper}
    value = sum((problem[name] * v).sum(-1) for name, v in sides.items())
    pull = (proof.nu.unsqueeze(-2) @ problem["A"] + proof.lam.unsqueeze(-2) @ problem["G"]).squeeze(-2)
    proven = mine.status == Status.PRIMAL_INFEASIBLE
    assert torch.allclose(value[proven], torch.tensor(-1.0, dtype=f64))
    assert (pull - proof.lam_lower + proof.lam_upper)[proven].abs().max() <= 1e-7
    for name in OUTPUTS:
        assert torch.allclose(getattr(mine, name), getattr(theirs, name), atol=1e-8, equal_nan=True), name
    assert all(relative(gradients[name], expected[name]) <= GRADIENT_REFERENCE for name in problem)
    own = solve(serial, problem, batch=(2, 4))
    solved = own.packed.status == Status.SOLVED
    assert 0 < solved.sum() < 8 and torch.equal(own.packed.x[solved], mine.x[solved])
    assert torch.equal(own.packed.residuals[:, solved], mine.report.residuals[:, solved])
    assert torch.equal(own.packed.counts[:, solved], mine.report.counts[:, solved])
    # A failed instance that is asked for its gradient has none.
    leaves = {name: v.clone().requires_grad_() for name, v in problem.items()}
    solution = diffopt.solve_qp(**leaves, settings=Settings(executor="cuda"), on_failure="return")
    spoiled = torch.autograd.grad(solution.x.sum(), list(leaves.values()))
    of_q = dict(zip(leaves, spoiled, strict=True))["q"].flatten(0, 1)
    assert torch.equal(of_q.isnan().any(-1), ~mine.ok.flatten())


def test_whether_a_neighbour_is_left_changes_no_bit(serial: CudaExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_executor, "_executor", serial)
    monkeypatch.setattr(pdipm_backend, "MOST_AT_ONCE", 4)
    problem = left_to_others()
    asked = torch.ones(2, 4, dtype=torch.bool)
    asked[0, 2] = False
    before, gradients = whole(problem, "cuda", asked)
    for name in ("q", "h", "Q", "Q is singular"):
        spoiled = problem | {name[0]: problem[name[0]].clone()}
        if name == "Q is singular":  # it goes by another elimination
            spoiled["Q"][0, 2, 0], spoiled["Q"][0, 2, :, 0] = 0, 0
        else:
            spoiled[name][0, 2] = torch.nan
        after, others = whole(spoiled, "cuda", asked)
        assert "primal" in after.executor and before.ok[0, 2]
        assert after.status[0, 2] == (Status.SOLVED if name == "Q is singular" else Status.NONFINITE_INPUT)
        for output in (*OUTPUTS, "iterations"):
            same = getattr(before, output)[asked], getattr(after, output)[asked]
            assert torch.equal(*(v.nan_to_num(nan=-7.0) for v in same)), output
        assert all(torch.equal(gradients[k][asked], others[k][asked]) for k in problem)


def test_few_iterations_leave_it_unsolved(serial: CudaExecutor) -> None:
    answer = solve(serial, optnet(4, 20, 20), max_iterations=2)
    assert answer.unsolved > 0 and answer.packed.counts[0].max() <= 2


def test_absent_sides(serial: CudaExecutor) -> None:
    problem = optnet(4, 8, 6, 1, "lower upper")
    problem["h"][:, 2] = torch.inf
    problem["lower"][1:, 3], problem["upper"][2:, 3:5] = -torch.inf, torch.inf
    answer = compare(serial, problem)
    assert answer.packed.s[:, 2].isinf().all() and (answer.packed.lam[:, 2] == 0).all()


def test_sides_far_away(serial: CudaExecutor) -> None:
    problem = optnet(4, 6, 3, 2)
    problem["lower"], problem["upper"] = torch.full((6,), -1e12, dtype=f64), torch.full((4, 6), 1e9, dtype=f64)
    compare(serial, problem)


@pytest.mark.parametrize("k", [1e-8, 1e-3, 1e6])
def test_units_do_not_matter(serial: CudaExecutor, k: float) -> None:
    problem = optnet(4, 6, 5, 2, "lower", seed=3)
    plain = solve(serial, problem)
    scaled = solve(serial, problem | {"Q": k * problem["Q"], "q": k * problem["q"]})
    assert scaled.unsolved == 0
    assert (
        relative(scaled.packed.x, plain.packed.x) <= 1e-9 and relative(scaled.packed.lam / k, plain.packed.lam) <= 1e-9
    )
    rows = solve(serial, problem | {name: k * problem[name] for name in ("A", "b", "G", "h")})
    assert rows.unsolved == 0
    assert relative(rows.packed.x, plain.packed.x) <= 1e-9 and relative(rows.packed.nu * k, plain.packed.nu) <= 1e-9


def test_weakly_active_rows_are_counted_and_left_out(serial: CudaExecutor) -> None:
    n = 4
    eye = torch.eye(n, dtype=f64)
    problem = {"Q": eye.repeat(2, 1, 1), "q": torch.tensor([[0.0, 1, 2, -3]] * 2, dtype=f64)}
    problem |= {"A": eye.new_zeros(2, 0, n), "b": eye.new_zeros(2, 0), "G": eye[:2].repeat(2, 1, 1)}
    problem["h"] = torch.tensor([[0.0, -1.0], [0.0, -1.5]], dtype=f64)  # x = -q: both rows weak; then one active
    answer = solve(serial, problem)
    assert (
        answer.unsolved == 0
        and answer.packed.counts[1].tolist() == [2, 1]
        and answer.packed.counts[2].tolist() == [0, 0]
    )
    coefficients = weights(answer)
    found, wanted = pull_back(serial, problem, answer, coefficients), reference(problem, coefficients)
    assert all(relative(found[name], wanted[name]) <= GRADIENT_REFERENCE for name in problem)


def test_gradients_that_are_not_there_are_zero(serial: CudaExecutor) -> None:
    problem = optnet(3, 7, 5, 2, "lower")
    answer = solve(serial, problem)
    coefficients = weights(answer)
    zeros = tuple(torch.zeros_like(v) for v in coefficients)
    for k in range(6):
        some = (*zeros[:k], coefficients[k], *zeros[k + 1 :])
        absent = tuple(v if j == k else None for j, v in enumerate(coefficients))
        found, wanted = pull_back(serial, problem, answer, absent), pull_back(serial, problem, answer, some)
        assert all(torch.equal(found[name], wanted[name]) for name in problem)


def test_only_what_is_needed_comes_back(serial: CudaExecutor) -> None:
    problem = optnet(3, 7, 5, 2)
    answer = solve(serial, problem)
    needed = (False, True, False, False, True, False, False, False)
    found = serial.pullback(data_of(problem), answer.saved, answer.packed, weights(answer), needed)
    assert [v is not None for v in found] == list(needed)
    assert serial.solve(data_of(problem), Settings(), 1e-9, 1e-7, keep=False).saved is None


def test_an_empty_batch(serial: CudaExecutor) -> None:
    problem = {name: v[:0] for name, v in optnet(1, 4, 3, 1).items()} | {"Q": torch.eye(4, dtype=f64)}
    answer = solve(serial, problem)
    assert answer.packed.x.shape == (0, 4) and answer.unsolved == 0
    found = pull_back(serial, problem, answer, weights(answer))
    assert (found["Q"] == 0).all() and found["q"].shape == (0, 4)


def test_refusals(serial: CudaExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = optnet(2, 6, 4, 1)
    data, settings = data_of(problem), Settings()

    def reason(executor: CudaExecutor, data: Data, settings: Settings) -> str:
        found = executor.refuses(data, settings)
        assert found is not None
        return found

    assert reason(CudaExecutor(), data, settings) == "runs on CUDA devices, the data is on cpu"
    diagonal = data._replace(Q=Diagonal(torch.ones(6, dtype=f64)))
    assert reason(serial, diagonal, settings) == "takes a dense Q, not Diagonal"
    wide = data_of(optnet(2, 6, 12))
    assert reason(serial, wide, settings) == "takes up to 1.9 constraints for each variable, not 12 for 6"
    bounded = data_of(optnet(2, 6, 6, bounds="upper"))
    assert reason(serial, bounded, settings) == "takes up to 1.9 constraints for each variable, not 12 for 6"
    assert reason(serial, data, Settings(reduction="primal")) == "works in the dual form, not 'primal'"
    assert reason(serial, data, Settings(polish=False)) == "always polishes"
    large = data_of({name: v[:1] for name, v in optnet(1, 900, 900).items()})
    assert "bytes of shared memory for a problem of this size, the device has 232448" in reason(serial, large, settings)
    small = CudaExecutor(ShimLauncher(limit=1000))
    assert "the device has 1000" in reason(small, data, settings)
    monkeypatch.setattr(serial.launcher, "missing", CudaLauncher().missing)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'diffopt-torch[cuda1" in reason(serial, data, settings)

    def absent(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib.util, "find_spec", absent)
    assert "pip install 'diffopt-torch[cuda1" in reason(serial, data, settings)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert CudaLauncher().missing() is None
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert CudaLauncher().missing() == "needs CUDA, and this torch is for ROCm"


def test_memory_is_what_the_kernels_lay_out() -> None:
    found = (ctypes.c_longlong * 4)()
    for n, p, m in ((1, 0, 0), (7, 2, 3), (10, 0, 10), (64, 40, 0), (100, 20, 100)):
        for lower, upper in ((False, False), (True, False), (False, True), (True, True)):
            sizes = Sizes(n, p, m, lower, upper)
            for large in (False, True):
                library("double", 1).shim_sizes(n, p, m, lower, upper, 96, large, found)
                expected = [sizes.forward(96, large), sizes.backward(96, large), sizes.kept(), sizes.workspace()]
                assert list(found) == expected


def test_sizes_that_fit() -> None:
    limit = 227 * 1024
    for n, p, m in ((100, 0, 100), (100, 20, 100), (120, 0, 120)):
        assert 8 * Sizes(n, p, m, False, False).forward(256) <= limit
    assert 8 * Sizes(64, 40, 0, True, False).forward(256) <= limit
    for n, p, m in ((200, 0, 200), (200, 40, 200), (400, 0, 400), (700, 0, 700)):
        sizes = Sizes(n, p, m, False, False)
        assert 8 * sizes.forward(256) > limit >= 8 * max(sizes.forward(256, True), sizes.backward(256, True))


@pytest.mark.cuda
class TestOnDevice:  # pragma: cuda
    """The same on a GPU."""

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize(
        ("n", "m", "p"), [(10, 10, 0), (20, 10, 5), (64, 30, 8), (100, 100, 0), (150, 130, 0), (200, 200, 20)]
    )
    def test_agrees_with_torch(self, n: int, m: int, p: int, dtype: torch.dtype) -> None:
        problem = optnet(7, n, m, p, "lower" if m <= 0.9 * n else "")
        if dtype == torch.float32:
            problem["Q"] = problem["Q"] + torch.eye(n, dtype=f64)
        answer = compare(CudaExecutor(), {name: v.to("cuda", dtype) for name, v in problem.items()})
        assert answer.packed.x.device.type == "cuda" and answer.packed.x.dtype == dtype

    @pytest.mark.parametrize("n", [12, 40, 160])
    def test_an_instance_does_not_know_its_neighbours(self, n: int) -> None:
        problem = {name: v.cuda() for name, v in optnet(9, n, n // 2, 2, "upper").items()}
        executor = CudaExecutor()
        answer = solve(executor, problem)
        order = [3, 0, 8]
        assert same_bits(answer, solve(executor, {k: v[order] for k, v in problem.items()}), order, [0, 1, 2])
        problem["q"][2] = torch.nan
        keep = [0, 1, *range(3, 9)]
        again = solve(executor, problem)
        assert again.unsolved == 1 and same_bits(answer, again, keep, keep)

    def test_shared_data(self) -> None:
        compare(CudaExecutor(), {k: v.cuda() for k, v in optnet(5, 8, 6, 2, "lower", shared="Q A G").items()})

    @pytest.mark.parametrize("kind", KINDS)
    def test_what_it_leaves_to_others(self, kind: str) -> None:
        answer = solve(CudaExecutor(), {name: v.cuda() for name, v in broken(kind).items()})
        assert answer.packed.status.tolist() == [Status.SOLVED, Status.UNSOLVED, Status.SOLVED]

    @pytest.mark.parametrize(("batch", "n"), [(5000, 8), (700, 40), (300, 150)])
    def test_more_problems_than_run_at_a_time(self, batch: int, n: int) -> None:
        problem = {k: v.cuda() for k, v in optnet(7, n, n // 2, 1).items()}
        problem = {k: v.repeat(batch // 7 + 1, *[1] * (v.dim() - 1))[:batch] for k, v in problem.items()}
        executor = CudaExecutor()
        answers = [executor.solve(data_of(problem), Settings(), 1e-9, 1e-7, keep) for keep in (False, True)]
        everywhere, again = list(range(batch)), [i % 7 for i in range(batch)]
        assert answers[0].unsolved == 0 and same_bits(*answers, everywhere, everywhere)
        assert same_bits(answers[0], answers[0], everywhere, again)

    def test_another_device(self) -> None:
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two devices")
        problem = {name: v.to("cuda:1") for name, v in optnet(5, 12, 6, 2, "lower").items()}
        with torch.cuda.device(0):
            answer = compare(CudaExecutor(), problem)
            assert torch.cuda.current_device() == 0 and answer.packed.x.device.index == 1

    def test_a_stream_of_its_own(self) -> None:
        problem = {name: v.cuda() for name, v in optnet(64, 10, 10).items()}
        expected = solve(CudaExecutor(), problem)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            assert same_bits(solve(CudaExecutor(), problem), expected, list(range(64)), list(range(64)))
