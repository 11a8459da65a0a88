"""Any data whatever: shapes, strides, broadcasts, zeros, subnormal numbers, infinite sides, contradictions.

Whatever comes, nothing foreign is raised; what is SOLVED is solved, and has a gradient; how the data lies in memory
does not matter.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import diffopt
import measures
from diffopt import Settings, Status
from tolerances import RESIDUAL, SOLUTION

LAYOUTS = ("contiguous", "transposed", "every second", "reversed columns", "inside", "expanded")
BATCHES = ((), (1,), (3,), (2, 2), (0,))
VALUES = ("normal", "integers", "sparse", "subnormal", "tiny and large")


@dataclass
class Fuzzed:
    """``data``: arguments of `solve_qp`, as they lie; ``plain``: the same values, contiguous and in the full batch.

    ``strict``: Q is safely positive definite, so x is unique.
    """

    data: dict[str, Any]
    plain: dict[str, Any]
    batch: tuple[int, ...]
    strict: bool

    def __repr__(self) -> str:
        pieces = [f"{k}: {tuple(v.shape)} {v.stride()}" for k, v in self.data.items() if v is not None]
        values = {k: v.tolist() for k, v in self.data.items() if v is not None}
        return f"Fuzzed({', '.join(pieces)}; {values})"


def drawn_values(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "integers":
        return (1.2 * values).round()
    if kind == "sparse":
        return torch.where(torch.rand(shape, generator=generator) < 0.6, 0.0, values)
    if kind == "subnormal":
        return torch.where(torch.rand(shape, generator=generator) < 0.3, 5e-324 * values.sign(), values)
    if kind == "tiny and large":
        return values * 10.0 ** torch.randint(-6, 5, shape, generator=generator)
    return values


def laid_out(value: Tensor, layout: str) -> Tensor:
    """Return a tensor of the same values that lies otherwise in memory."""
    if layout == "transposed" and value.dim() > 1:
        return value.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "every second":
        return torch.stack([value, torch.full_like(value, torch.nan)], -1)[..., 0]
    if layout == "reversed columns" and value.dim() > 1:
        return value.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "inside" and value.numel():
        return torch.cat([torch.full_like(value[..., :1], torch.nan), value], -1)[..., 1:]
    return value


@st.composite
def programs(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> Fuzzed:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    n, p, m = draw(st.integers(1, 5)), draw(st.integers(0, 3)), draw(st.integers(0, 6))
    batch = draw(st.sampled_from(BATCHES))
    kind = draw(st.sampled_from(VALUES))
    hessian = draw(st.sampled_from(("strict", "strict", "singular", "zero", "none")))
    cores = {"q": (n,)}
    if hessian != "none":
        cores = {"Q": (n, n), **cores}
    if p:
        cores |= {"A": (p, n), "b": (p,)}
    if m:
        cores |= {"G": (m, n), "h": (m,)}
    cores |= {name: (n,) for name in ("lower", "upper") if draw(st.booleans())}
    feasible = draw(st.booleans())
    x0 = drawn_values(kind, (n,), generator)
    data, plain = {"Q": None}, {"Q": None}
    for name, core in cores.items():
        # Each piece has all, some, or none of the batch dimensions.
        lead = draw(st.sampled_from((batch, batch, tuple(1 for _ in batch), batch[1:], ())))
        value = drawn_values(kind, (*lead, *core), generator)
        if name == "Q":
            value = value @ value.mT if hessian != "zero" else 0 * value
            if hessian == "singular":
                value = value * torch.cat([torch.zeros(1), torch.ones(n - 1)]).double()
                value = 0.5 * (value + value.mT) if n == 1 else value[..., 1:, :].mT @ value[..., 1:, :]
            value = value + torch.eye(n, dtype=torch.float64) if hessian == "strict" else value
        if feasible and name in ("b", "h"):
            rows = data["A" if name == "b" else "G"].double() @ x0
            value = rows if name == "b" else rows + value.abs()
        elif feasible and name in ("lower", "upper"):
            value = x0 - value.abs() if name == "lower" else x0 + value.abs()
        if name in ("h", "lower", "upper"):
            absent = torch.rand(value.shape, generator=generator) < draw(st.sampled_from((0.0, 0.0, 0.4)))
            value = torch.where(absent, -torch.inf if name == "lower" else torch.inf, value)
        value = value.to(dtype)
        layout = draw(st.sampled_from(LAYOUTS))
        data[name] = laid_out(value, layout) if layout != "expanded" else value.expand(*batch, *core)
        plain[name] = value
    whole = torch.broadcast_shapes(*(v.shape[: v.dim() - len(cores[k])] for k, v in data.items() if v is not None))
    strict = hessian == "strict" and kind != "tiny and large"
    return Fuzzed(
        data, {k: v if v is None else v.expand(*whole, *cores[k]).clone() for k, v in plain.items()}, whole, strict
    )


def check(fuzzed: Fuzzed, **options: Any) -> None:
    leaves = {k: None if v is None else v.detach().requires_grad_() for k, v in fuzzed.data.items()}
    dtype = fuzzed.plain["q"].dtype
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", diffopt.InaccurateSolutionWarning)
        solution = diffopt.solve_qp(**leaves, on_failure="return", **options)
        plain = diffopt.solve_qp(**fuzzed.plain, on_failure="return", **options)
    assert solution.status.shape == fuzzed.batch and solution.x.shape[:-1] == fuzzed.batch
    solved = solution.status == Status.SOLVED
    judged = {"A": None, "b": None, "G": None, "h": None, "lower": None, "upper": None} | fuzzed.plain
    if judged["Q"] is None:
        judged["Q"] = torch.zeros(*fuzzed.batch, *[judged["q"].shape[-1]] * 2, dtype=dtype)
    for name, residual in measures.residuals(judged, solution).items():
        assert bool((residual[solved] <= RESIDUAL[dtype]).all()), (name, residual, solution)
    # Gradients of all outputs of what is solved.
    outputs = [getattr(solution, name)[solved] for name in measures.OUTPUTS]
    used = [torch.where(v.isfinite(), v, 0.0).sum() for v in outputs if v.requires_grad and v.numel()]
    if used:
        wanted = {k: v for k, v in leaves.items() if v is not None}
        with warnings.catch_warnings():
            # (Linear programs have many solutions.)
            warnings.simplefilter("ignore", diffopt.InaccurateGradientWarning)
            gradients = torch.autograd.grad(
                torch.stack(used).sum(), list(wanted.values()), materialize_grads=True, allow_unused=True
            )
        for name, gradient in zip(wanted, gradients, strict=True):
            assert bool(gradient.isfinite().all()), (name, gradient, solution)
            assert gradient.shape == wanted[name].shape
    # The same answer, however the data lies.
    assert torch.equal(solution.status, plain.status), (solution.status, plain.status)
    if fuzzed.strict:
        for a, b in zip(solution.x[solved].unbind(0), plain.x[solved].unbind(0), strict=True):
            assert measures.relative(a, b) <= SOLUTION[dtype]
    value, other = solution.value[solved], plain.value[solved]
    assert bool(((value - other).abs() <= 1e2 * RESIDUAL[dtype] * (1 + other.abs())).all()), (value, other)


@pytest.mark.parametrize("executor", ["auto", "torch"])
@settings(max_examples=25)
@given(programs())
def test_any_data(executor: Any, fuzzed: Fuzzed) -> None:
    check(fuzzed, settings=Settings(executor=executor))


@settings(max_examples=15)
@given(programs(torch.float32))
def test_any_data_in_float32(fuzzed: Fuzzed) -> None:
    check(fuzzed)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("executor", ["auto", "torch"])
def test_much_data(executor: Any, dtype: torch.dtype) -> None:
    @settings(max_examples=400)
    @given(programs(dtype))
    def run(fuzzed: Fuzzed) -> None:
        check(fuzzed, settings=Settings(executor=executor))

    run()


def test_most_of_it_is_solved_and_some_is_not() -> None:
    """What is drawn can show something: many instances are SOLVED, and some fail in each way."""
    counts: dict[Status, int] = {}

    @settings(max_examples=60)
    @given(programs())
    def run(fuzzed: Fuzzed) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", diffopt.InaccurateSolutionWarning)
            solution = diffopt.solve_qp(**fuzzed.data, on_failure="return", settings=Settings(executor="torch"))
        for code in solution.status.flatten().tolist():
            counts[Status(code)] = counts.get(Status(code), 0) + 1

    run()
    assert counts[Status.SOLVED] >= 30, counts
    assert counts[Status.PRIMAL_INFEASIBLE] >= 3 and counts[Status.DUAL_INFEASIBLE] >= 3, counts


def feasible_in_any_units(seed: int) -> dict[str, Tensor]:
    """Return 200 strictly convex programs around feasible points; rows, variables, costs and slacks in units of their
    own, up to 1e6 either way."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=g))

    count, n, m = 200, pick(1, 5), pick(0, 4)
    p = pick(0, min(n, 2) + 1) if n > 1 else 0
    spread = 6 * float(torch.rand((), generator=g, dtype=torch.float64))

    def units(*shape: int) -> Tensor:
        return 10 ** (spread * (2 * torch.rand(*shape, dtype=torch.float64, generator=g) - 1))

    d, root = units(count, n), normal(count, n, n)
    Q = (root @ root.mT / n) * d[:, :, None] * d[:, None, :] * units(count, 1, 1)
    x = normal(count, n) / d * units(count, 1)
    data = {"Q": Q, "q": normal(count, n) * d * units(count, n)}
    if p:
        data["A"] = normal(count, p, n) * d[:, None, :] * units(count, p, 1)
        data["b"] = (data["A"] @ x[..., None])[..., 0]
    if m:
        data["G"] = normal(count, m, n) * d[:, None, :] * units(count, m, 1)
        data["h"] = (data["G"] @ x[..., None])[..., 0] + normal(count, m).abs() * units(count, m)
    if float(torch.rand((), generator=g, dtype=torch.float64)) < 0.7:
        data["lower"] = x - normal(count, n).abs() * units(count, n) / d
    return data


@pytest.mark.parametrize("seed", [1, 26, 44, 152, 187, 194, 261, 264])
@pytest.mark.parametrize("executor", ["cpu", "torch", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_what_has_a_solution_is_never_proven_to_have_none(executor: Any, seed: int) -> None:
    """Of some, 1e-10 of a row counted as nothing, and its side as a contradiction; or a short step as one for ever."""
    data = feasible_in_any_units(seed)
    device = "cuda" if executor == "cuda" else "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", diffopt.InaccurateSolutionWarning)
        moved = {name: v.to(device) for name, v in data.items()}
        solution = diffopt.solve_qp(**moved, settings=Settings(executor=executor), on_failure="return")
    assert not (solution.status == Status.PRIMAL_INFEASIBLE).any(), solution
    assert not (solution.status == Status.DUAL_INFEASIBLE).any(), solution
    assert solution.ok.float().mean() > 0.95, solution
