"""The compiled CPU executor: autograd, and what it is asked for.

That it agrees with torch operations on ordinary problems is a law: tests/laws/test_executors_agree.py.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

import diffopt
import measures
from compiled import COUNTS, OUTPUTS, SIZES, cotangents, drawn, partly_failed, run, same_bits
from diffopt import BackendUnsupported, Settings
from diffopt.linalg.matrices import Dense
from diffopt.problems.forms import QPForm
from diffopt.solvers import cpu_executor
from problems_catalogue import CASES, Case
from tolerances import GRADIENT_REFERENCE, X_REFERENCE

f64 = torch.float64


# ---- autograd --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", [False, True], ids=["solved", "partly_failed"])
@pytest.mark.parametrize("size", SIZES)
def test_double_backward(size: str, failing: bool) -> None:
    data, weights = partly_failed(size) if failing else (drawn(size, 3), {})
    weights = weights or cotangents(data, 3)
    generator = torch.Generator().manual_seed(3)
    again = {name: torch.randn(v.shape, generator=generator, dtype=f64) for name, v in data.items()}
    found = []
    for executor in ("auto", "torch"):
        leaves: dict[str, Any] = {name: v.clone().requires_grad_() for name, v in data.items()}
        solution = diffopt.solve_qp(**leaves, settings=Settings(executor=executor), on_failure="return")
        ok = solution.ok
        values = {name: v for name in OUTPUTS if (v := getattr(solution, name)).requires_grad}
        total = sum(torch.where(v[ok].isfinite(), weights[name][ok] * v[ok], 0.0).sum() for name, v in values.items())
        first = torch.autograd.grad(total, list(leaves.values()), create_graph=True)  # type: ignore[arg-type]
        curvature = sum((again[name][ok] * v[ok]).square().sum() for name, v in zip(leaves, first, strict=True))
        second = torch.autograd.grad(curvature, list(leaves.values()), materialize_grads=True)  # type: ignore[arg-type]
        found.append((solution, first, second))
    (ours, first, second), (theirs, expected_first, expected_second) = found
    assert ours.executor.startswith("cpu:dual") and theirs.executor.startswith("torch:")
    for name, a, b in zip(data, first, expected_first, strict=True):
        assert measures.relative(a, b) <= GRADIENT_REFERENCE, name
    for name, a, b in zip(data, second, expected_second, strict=True):
        assert measures.relative(a, b) <= 10 * GRADIENT_REFERENCE, name  # products of three solutions


def test_reverse_twice_through_one_graph() -> None:
    data = drawn("small", 3)
    leaves: dict[str, Any] = {name: v.requires_grad_() for name, v in data.items()}
    solution = diffopt.solve_qp(**leaves)
    (first,) = torch.autograd.grad(solution.x.sum(), leaves["q"], retain_graph=True)
    (second,) = torch.autograd.grad(solution.x.sum(), leaves["q"])
    assert same_bits(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(solution.x.sum(), leaves["q"])


@pytest.mark.parametrize("changed", ["x", "lam", "Q", "h"])
def test_changes_in_place_before_backward_are_noticed(changed: str) -> None:
    leaves: dict[str, Any] = {name: v.requires_grad_() for name, v in drawn("small", 3).items()}
    solution = diffopt.solve_qp(**leaves)
    with torch.no_grad():
        (leaves[changed] if changed in leaves else getattr(solution, changed)).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        solution.s.sum().backward()


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collect weak references to what each solve keeps for its pullback, or ``None`` for nothing."""
    kept: list[Any] = []
    solve = cpu_executor.CpuExecutor.solve

    def spy(self: Any, *arguments: Any, **named: Any) -> Any:
        answer = solve(self, *arguments, **named)
        saved = answer.saved
        kept.append(None if saved is None else [weakref.ref(saved)])
        return answer

    monkeypatch.setattr(cpu_executor.CpuExecutor, "solve", spy)
    return kept


def test_nothing_is_kept_without_gradients(spied: list[Any]) -> None:
    data: dict[str, Any] = drawn("small", 3)
    plain = diffopt.solve_qp(**data)
    leaves: dict[str, Any] = {name: v.clone().requires_grad_() for name, v in data.items()}
    with torch.no_grad():
        off = diffopt.solve_qp(**leaves)
    for solution in (plain, off):
        assert solution.executor == "cpu:dual"
        for name in measures.OUTPUTS:
            value = getattr(solution, name)
            assert not value.requires_grad and value.grad_fn is None, name
    assert spied == [None, None]
    attached = diffopt.solve_qp(**leaves)
    assert attached.x.grad_fn is not None and all(reference() is not None for reference in spied[2])


@pytest.mark.parametrize("failing", [False, True], ids=["solved", "partly_failed"])
@pytest.mark.parametrize("use", ["nothing", "value", "backward", "create_graph"])
def test_no_reference_cycle(use: str, failing: bool, spied: list[Any]) -> None:
    data = partly_failed("small")[0] if failing else drawn("small", 6)
    leaves: dict[str, Any] = {name: v.requires_grad_() for name, v in data.items()}
    gc.collect()
    gc.disable()
    try:
        solution = diffopt.solve_qp(**leaves, on_failure="return")
        ok = solution.ok
        if use == "value":
            solution.value[ok].sum().backward()
        elif use == "backward":
            solution.x[ok].sum().backward()
        elif use == "create_graph":
            (slope,) = torch.autograd.grad(solution.x[ok].sum(), leaves["q"], create_graph=True)
            torch.autograd.grad(slope.sum(), leaves["q"], allow_unused=True)
            del slope
        watched = {name: weakref.ref(getattr(solution, name)) for name in (*OUTPUTS, *COUNTS)}
        watched |= {f"saved {i}": reference for i, reference in enumerate(spied[0])}
        assert len(spied[0]) > 0 and all(reference() is not None for reference in spied[0])
        del solution
        assert [name for name, reference in watched.items() if reference() is not None] == []
    finally:
        gc.enable()


# ---- who is asked ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_compiled_code_takes_what_it_can(case: Case) -> None:
    posed = case.build(f64)
    form = posed.problem.standard_form(posed.problem.collect(posed.params))
    if not isinstance(form, QPForm):
        return  # no quadratic program
    rows = form.m + (0 if form.lower is None and form.upper is None else form.n)
    executor = diffopt.solve(posed.problem, posed.params).executor
    if not form.batch_shape.numel():
        assert executor.startswith("torch:")
    elif isinstance(form.Q, Dense):
        # (Where the dual form solves nothing, because Q is singular say, it is not named.)
        assert executor in (("cpu:dual", "cpu:primal", "cpu:dual+primal") if rows <= 1.9 * form.n else ("cpu:primal",))
    else:
        assert executor in ("cpu:diagonal", "cpu:primal", "cpu:diagonal+primal")


class Unknown(diffopt.Diagonal):
    """A structure that the compiled code has never heard of."""


def test_refusals_say_why() -> None:
    data: dict[str, Any] = {"Q": Unknown(torch.ones(3, dtype=f64)), "q": torch.ones(2, 3, dtype=f64)}
    with pytest.raises(BackendUnsupported) as caught:
        diffopt.solve_qp(**data, settings=Settings(executor="cpu"))
    message = str(caught.value)
    assert "'cpu' cannot take this problem" in message and "does not know Unknown" in message, message
    assert "Settings(executor='auto')" in message
    taken = diffopt.solve_qp(**data)
    assert taken.executor == "torch:diagonal"
    assert measures.relative(taken.x, -torch.ones(2, 3, dtype=f64)) <= X_REFERENCE


def test_executors_by_name() -> None:
    data: dict[str, Any] = drawn("small", 2)
    names = {name: diffopt.solve_qp(**data, settings=Settings(executor=name)).executor for name in ("auto", "cpu")}
    assert names == {"auto": "cpu:dual", "cpu": "cpu:dual"}
    assert diffopt.solve_qp(**data, settings=Settings(executor="torch")).executor == "torch:dual"
    with pytest.raises(diffopt.SettingsError, match="Setting `executor` = 'gpu' is out of range"):
        Settings(executor="gpu")  # type: ignore[arg-type]


WITHOUT = """
import warnings, torch, diffopt
from diffopt import Settings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    q = torch.tensor([[2.0, -2.0], [0.5, 3.0]], dtype=torch.float64, requires_grad=True)
    for _ in range(3):
        solution = diffopt.solve_qp(torch.eye(2, dtype=torch.float64), q, lower=-1.0)
        solution.x.sum().backward()
    assert solution.executor == "torch:dual", solution.executor
    assert torch.allclose(solution.x, (-q).clamp_min(-1.0))
    assert torch.allclose(q.grad, torch.tensor([[0.0, -3.0], [-3.0, 0.0]], dtype=torch.float64)), q.grad
    try:
        diffopt.solve_qp(torch.eye(2), torch.ones(2), settings=Settings(executor="cpu"))
    except diffopt.BackendUnsupported as error:
        assert "it has no compiled library" in str(error), error
    else:
        raise AssertionError
(warning,) = caught
assert warning.category is diffopt.CompiledExecutorWarning, warning
"""


def test_without_a_library_torch_does_the_work() -> None:
    run(WITHOUT, DIFFOPT_CPU_LIBRARY="")
