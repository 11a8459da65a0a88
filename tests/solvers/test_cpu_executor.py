"""The compiled CPU executor: bits, layouts of the data, hard instances, failures, memory, threads and processes.

That it agrees with torch operations on ordinary problems is a law: tests/laws/test_executors_agree.py.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

import diffopt
import measures
from callers import at_once
from diffopt import BackendUnsupported, Settings, Status
from diffopt.check import known
from diffopt.linalg.matrices import Dense
from diffopt.problems.forms import QPForm
from diffopt.solvers import cpu_executor, library
from diffopt.solvers.settings import KINK_RULES, KinkRule
from problems_catalogue import CASES, Case
from tolerances import EXACT_ALGEBRA, GRADIENT, GRADIENT_REFERENCE, SOLUTION, X_REFERENCE

ROOT = Path(__file__).resolve().parents[2]
f64 = torch.float64
OUTPUTS = measures.OUTPUTS[:-1]  # the value follows from x
COUNTS = ("status", "iterations", "weakly_active", "dependent")
MATRICES = ("Q", "A", "G")
Data = dict[str, Tensor]

SIZES = {"small": 1, "large": 8}
"""Factors of all sizes: a problem in one lane of a register, and one in whole registers."""


def drawn(size: str, count: int, dtype: torch.dtype = f64, shared: bool = False, seed: int = 0) -> Data:
    """Return well-posed problems with equalities, rows, and bounds some of which are infinite.

    Those with matrices of their own are each in units of its own.
    """
    n, p, m = (SIZES[size] * v for v in (5, 1, 3))
    problem = known.quadratic_program(
        seed, n, p, m, bounds="mixed", batch=(count,), condition=10.0, shared=shared, dtype=dtype
    )
    rows = n + p > cpu_executor.LANES_UP_TO or n + m > cpu_executor.LANES_UP_TO
    assert rows == (size == "large")
    data = present(problem.arguments())
    for k, names in enumerate((("Q", "q"), ("A", "b"), ("G", "h"))):
        for name in names if not shared else ():
            units = 4.0 ** ((torch.arange(count) * (k + 2)) % 5 - 2)
            data[name] = data[name] * units.to(dtype).reshape(-1, *[1] * (data[name].dim() - 1))
    return data


def present(arguments: dict[str, Any]) -> Data:
    return {name: v for name, v in arguments.items() if v is not None}


def own(data: Data, name: str) -> bool:
    """Whether a tensor has a batch dimension."""
    return data[name].dim() > 1 + (name in MATRICES)


def pick(data: Data, index: Any) -> Data:
    """Return some instances of a batch (copies); shared tensors stay."""
    return {name: v[index].clone() if own(data, name) else v for name, v in data.items()}


def cotangents(data: Data, count: int, seed: int = 0) -> Data:
    """Return random weights for all outputs of a batch, in the data's dtype."""
    generator = torch.Generator().manual_seed(seed)
    n, p, m = data["q"].shape[-1], *(data[k].shape[-1] if k in data else 0 for k in ("b", "h"))
    sizes = {"x": n, "s": m, "lam": m, "nu": p, "lam_lower": n, "lam_upper": n}
    return {
        name: torch.randn(count, size, generator=generator, dtype=f64).to(data["q"].dtype)
        for name, size in sizes.items()
    }


def pulled(
    data: dict[str, Any], weights: Data, settings: Settings | None = None, outputs: tuple[str, ...] = OUTPUTS
) -> tuple[diffopt.Solution, Data]:
    """Solve, and pull weights of the outputs back to every input, whatever the statuses are."""
    leaves = {name: v.detach().requires_grad_() for name, v in data.items()}
    solution = diffopt.solve_qp(**leaves, settings=settings, on_failure="return")
    values = {name: getattr(solution, name) for name in outputs}
    values = {name: v for name, v in values.items() if v.requires_grad}
    cotangent = [weights[name].expand_as(v) for name, v in values.items()]
    found = torch.autograd.grad(list(values.values()), list(leaves.values()), cotangent, materialize_grads=True)
    return solution, dict(zip(leaves, found, strict=True))


def everything(solution: diffopt.Solution, gradients: Data) -> Data:
    """Return all that belongs to instances, by name."""
    found = {name: getattr(solution, name).detach() for name in (*OUTPUTS, *COUNTS)}
    found |= solution.residuals._asdict()
    return found | {f"d{name}": v for name, v in gradients.items()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    integers = {1: torch.int8, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.shape == b.shape and torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


def run(code: str, timeout: float = 120, **variables: str) -> str:
    """Run code in a fresh process and return its output."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout.strip()


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Set how many threads a solve may take, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# ---- bits ------------------------------------------------------------------------------------------------------------


def spoil(data: Data, weights: Data, i: int, how: str) -> None:
    """Break instance i in tensors that have a batch dimension."""
    if how == "nan":
        data["q"][i, 0] = torch.nan
    elif how == "nan_everywhere":
        for name in data:
            if own(data, name):
                data[name][i] = torch.nan
    elif how == "huge":
        data["q"][i] *= 1e12
    elif how == "infeasible":
        data["b"][i] = 1e4
        data["lower"][i], data["upper"][i] = -1.0, 1.0
    elif how == "crossed":
        data["lower"][i], data["upper"][i] = 1.0, -1.0
    elif how == "slow" and own(data, "Q"):
        n = data["q"].shape[-1]
        data["Q"][i] = torch.diag(10 ** -torch.linspace(0, 6, n, dtype=f64))
    elif how == "nonconvex" and own(data, "Q"):
        data["Q"][i] = -data["Q"][i]
    for v in weights.values():
        v[i] = torch.nan if how in ("crossed", "nan") else 1.0


SPOILS = ("nan", "infeasible", "slow", "huge", "crossed", "nonconvex", "nan_everywhere")


# How well a spoiled instance is solved does not matter here.
@pytest.mark.filterwarnings("ignore::diffopt.errors.InaccurateSolutionWarning")
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("dtype", [f64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("size", SIZES)
def test_bits_do_not_depend_on_the_batch(size: str, dtype: torch.dtype, shared: bool) -> None:
    """Whatever the size of the batch, the place in it, and what the neighbours hold."""
    count = 17
    data = drawn(size, count, dtype, shared)
    weights = cotangents(data, count)
    alone = []
    for i in range(count):
        solution, gradients = pulled(pick(data, [i]), pick(weights, [i]))
        assert solution.executor == "cpu:dual" and bool(solution.ok)
        alone.append(everything(solution, gradients))
    generator = torch.Generator().manual_seed(1)
    hows = iter(SPOILS * 9)
    for batch in (1, 2, 3, 5, 8, 9, 17):
        for spoiled in (0, (batch + 3) // 4):
            order = torch.randperm(count, generator=generator)[:batch]
            some, some_weights = pick(data, order), pick(weights, order)
            bad = torch.randperm(batch, generator=generator)[:spoiled].tolist()
            used = [next(hows) for _ in bad]
            for place, how in zip(bad, used, strict=True):
                spoil(some, some_weights, place, how)
            found = everything(*pulled(some, some_weights))
            for place in set(range(batch)) - set(bad):
                for name, expected in alone[order[place]].items():
                    if name[0] == "d" and name[1:] in data and not own(data, name[1:]):
                        continue  # a shared tensor's gradient is a sum
                    assert same_bits(found[name][place], expected[0]), (name, batch, place, used)


@pytest.mark.parametrize("size", SIZES)
def test_bits_of_a_single_problem(size: str) -> None:
    data = drawn(size, 3)
    weights = cotangents(data, 3)
    together = everything(*pulled(data, weights))
    for i in range(3):
        single = everything(*pulled(pick(data, i), pick(weights, i)))
        for name, expected in together.items():
            assert same_bits(single[name], expected[i]), name


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("size", SIZES)
def test_bits_do_not_depend_on_threads(size: str, shared: bool, threads: Callable[[int], None]) -> None:
    # Large enough to be shared out: see WORTH_WAKING in executor.cpp.
    data = drawn(size, 17, shared=shared)
    index = torch.arange(17).repeat(50 if size == "small" else 4)
    data, weights = pick(data, index), cotangents(data, len(index))
    threads(1)
    expected = everything(*pulled(data, weights))
    for count in (2, 3):
        threads(count)
        found = everything(*pulled(data, weights))
        for name, v in expected.items():
            if name[0] == "d" and name[1:] in data and not own(data, name[1:]):
                assert measures.relative(found[name], v) <= 1e-12, name  # a sum over the batch, by torch
            else:
                assert same_bits(found[name], v), (name, count)


def test_bits_beside_a_problem_that_takes_many_iterations() -> None:
    # Problems as in OptNet's timing experiment, on one in 3,000 of which the plain method cycles.
    generator = torch.Generator().manual_seed(1)
    U = torch.rand(4096, 6, 6, dtype=f64, generator=generator)
    x, G, q = (torch.randn(4096, *s, dtype=f64, generator=generator) for s in ((6, 1), (6, 6), (6,)))
    h = (G @ x).squeeze(-1) + torch.rand(4096, 6, dtype=f64, generator=generator)
    data = {"Q": U @ U.mT + 1e-3 * torch.eye(6, dtype=f64), "q": q, "G": G, "h": h}
    whole = diffopt.solve_qp(**data)  # type: ignore[arg-type]
    assert whole.executor == "cpu:dual" and bool(whole.ok.all())
    order = whole.iterations.argsort()
    index = torch.stack([order[:8], order[-8:]], -1).flatten()  # quick and slow, in turns
    found = diffopt.solve_qp(**pick(data, index))  # type: ignore[arg-type]
    assert int(found.iterations.max()) >= 2 * int(found.iterations.min())
    for name in (*OUTPUTS, *COUNTS):
        assert same_bits(getattr(found, name), getattr(whole, name)[index]), name


@pytest.mark.parametrize("size", SIZES)
def test_bits_beside_problems_that_are_harder(size: str) -> None:
    # Neighbours need more Newton steps at the end, and leave no trace of them.
    n, count = 6 * SIZES[size], 64 // SIZES[size]
    generator = torch.Generator().manual_seed(2)
    basis = torch.linalg.qr(torch.randn(count, n, n, dtype=f64, generator=generator)).Q
    decades = 7.5 * torch.rand(count, 1, 1, dtype=f64, generator=generator)
    Q = (basis * 10 ** (-decades * torch.rand(count, 1, n, dtype=f64, generator=generator))) @ basis.mT
    G, q = (torch.randn(count, *s, dtype=f64, generator=generator) for s in ((n, n), (n,)))
    data = {"Q": 0.5 * (Q + Q.mT), "q": q, "G": G, "h": torch.rand(count, n, dtype=f64, generator=generator)}
    weights = cotangents(data, count)
    together = everything(*pulled(data, weights))
    for i in range(count):
        for name, v in everything(*pulled(pick(data, [i]), pick(weights, [i]))).items():
            assert same_bits(together[name][i], v[0]), (name, i)


# ---- layouts of the data ---------------------------------------------------------------------------------------------


def transposed(v: Tensor) -> Tensor:
    return v.mT.contiguous().mT if v.dim() > 1 else strided(v)


def strided(v: Tensor) -> Tensor:
    """Every other number of something larger."""
    return torch.stack([v, torch.full_like(v, torch.nan)], -1)[..., 0]


def offset(v: Tensor) -> Tensor:
    """A view that begins in the middle of a storage, at an odd place."""
    room = torch.full((v.numel() + 3,), torch.nan, dtype=v.dtype)
    view = room[3:].view(v.shape)
    view.copy_(v)
    return view


def reversed_batch(v: Tensor) -> Tensor:
    return v.flip(0).contiguous().movedim(0, -1).contiguous().movedim(-1, 0).flip(0)


@pytest.mark.parametrize("layout", [transposed, strided, offset, reversed_batch])
@pytest.mark.parametrize("size", SIZES)
def test_strides_change_no_bit(size: str, layout: Callable[[Tensor], Tensor]) -> None:
    for dtype in (f64, torch.float32):
        data = drawn(size, 3, dtype)
        weights = cotangents(data, 3)
        viewed = {name: layout(v) for name, v in data.items()}
        assert all(torch.equal(v, data[name]) for name, v in viewed.items())
        expected = everything(*pulled(data, weights))
        for cotangent in (weights, {name: layout(v) for name, v in weights.items()}):
            found = everything(*pulled(viewed, cotangent))
            for name, v in expected.items():
                assert same_bits(found[name], v), name


@pytest.mark.parametrize("piece", ["Q", "q", "A", "b", "G", "h", "lower", "upper"])
@pytest.mark.parametrize("size", SIZES)
def test_expanded_tensors_are_as_good_as_copies(size: str, piece: str) -> None:
    data = drawn(size, 4)
    data |= {"lower": torch.full_like(data["q"], -5.0), "upper": torch.full_like(data["q"], 5.0)}
    data[piece] = data[piece][:1].expand_as(data[piece])
    weights = cotangents(data, 4)
    expected = everything(*pulled({name: v.contiguous() for name, v in data.items()}, weights))
    found = everything(*pulled(data, weights))
    for name, v in expected.items():
        assert same_bits(found[name], v), name


# Which batch dimensions each tensor has; they broadcast together to the first entry.
BROADCASTS: list[tuple[tuple[int, ...], dict[str, tuple[int, ...]]]] = [
    ((4, 3), {"Q": (4, 1), "q": (3,), "A": (), "b": (4, 3), "G": (1, 3), "h": (1, 1), "lower": (4, 1), "upper": ()}),
    ((4, 3), {"Q": (1, 1), "q": (4, 1), "A": (3,), "b": (), "G": (4, 3), "h": (3,), "lower": (), "upper": (4, 3)}),
    ((3, 2), {"Q": (), "q": (3, 1), "A": (), "b": (2,), "G": (1, 1), "h": (1,), "lower": (), "upper": (2,)}),
    ((5,), {"Q": (1,), "q": (5,), "A": (5,), "b": (), "G": (), "h": (5,), "lower": (1,), "upper": ()}),
    ((2, 1, 3), {"Q": (1, 1, 3), "q": (2, 1, 1), "A": (), "b": (1, 3), "G": (), "h": (), "lower": (), "upper": (3,)}),
    ((1, 1), {"Q": (), "q": (1,), "A": (1, 1), "b": (), "G": (), "h": (), "lower": (1,), "upper": ()}),
    ((2, 3), {"Q": (2, 3), "q": (), "A": (), "b": (), "G": (), "h": (), "lower": (), "upper": ()}),
]


@pytest.mark.parametrize("case", range(len(BROADCASTS)))
@pytest.mark.parametrize("size", SIZES)
def test_gradients_of_tensors_that_broadcast(size: str, case: int) -> None:
    """They are those of expanded copies, summed, and the solutions have the same bits."""
    batch, leads = BROADCASTS[case]
    n, p, m = (SIZES[size] * v for v in (5, 1, 3))
    generator = torch.Generator().manual_seed(case)

    def normal(name: str, *core: int) -> Tensor:
        return torch.randn(*leads[name], *core, generator=generator, dtype=f64)

    Q, G = normal("Q", n, n), normal("G", m, n)
    data = {
        "Q": Q @ Q.mT + torch.eye(n, dtype=f64), "q": 3 * n * normal("q", n), "A": normal("A", p, n),
        "b": normal("b", p), "G": G, "h": 1 + normal("h", m).abs(),
        "lower": -1 - normal("lower", n).abs(), "upper": 1 + normal("upper", n).abs(),
    }  # fmt: skip
    weights = cotangents(data, 1)
    weights = {name: torch.randn(*batch, *v.shape[1:], generator=generator, dtype=f64) for name, v in weights.items()}
    copies = {
        name: v.expand(*batch, *v.shape[len(leads[name]) :]).contiguous().view(-1, *v.shape[len(leads[name]) :])
        for name, v in data.items()
    }
    expected, gradients = pulled(copies, {name: v.flatten(0, len(batch) - 1) for name, v in weights.items()})
    found, summed = pulled(data, weights)
    assert found.executor == expected.executor == "cpu:dual" and bool(found.ok.all())
    assert found.x.shape == (*batch, n) and found.status.shape == found.residuals.gap.shape == batch
    for name in (*OUTPUTS, *COUNTS):
        value = getattr(found, name)
        assert same_bits(value, getattr(expected, name).view(value.shape)), name
    for name, gradient in gradients.items():
        wanted = gradient.view(*batch, *gradient.shape[1:]).sum_to_size(data[name].shape)
        assert measures.relative(summed[name], wanted) <= 1e-12, name  # another order of summation


@pytest.mark.parametrize("size", SIZES)
def test_only_some_gradients_are_asked_for(size: str) -> None:
    """Each input alone requires a gradient, each output alone passes one: parts of the whole answer."""
    for shared in (False, True):
        data = drawn(size, 3, shared=shared)
        weights = cotangents(data, 3)
        _, gradients = pulled(data, weights)
        for name in data:
            leaves: dict[str, Any] = {k: v.detach() for k, v in data.items()}
            leaves[name].requires_grad_()
            solution = diffopt.solve_qp(**leaves)
            values = [getattr(solution, k) for k in OUTPUTS]
            (alone,) = torch.autograd.grad(values, leaves[name], [weights[k] for k in OUTPUTS])
            assert same_bits(alone, gradients[name]), name
        parts = [pulled(data, weights, outputs=(k,))[1] for k in OUTPUTS]
        for name, gradient in gradients.items():
            total = torch.stack([part[name] for part in parts]).sum(0)
            assert measures.relative(total, gradient) <= EXACT_ALGEBRA, name


# ---- hard instances --------------------------------------------------------------------------------------------------


def program(n: int, count: int = 3, **pieces: Any) -> Data:
    """Return problems with Q = I and random q; pieces are added, numbers as float64 tensors."""
    generator = torch.Generator().manual_seed(n)
    q = torch.randn(count, n, generator=generator, dtype=f64)
    data = {"Q": torch.eye(n, dtype=f64), "q": q} | pieces
    return {name: v if isinstance(v, Tensor) else torch.full((n,), float(v), dtype=f64) for name, v in data.items()}


def row(*entries: float, n: int) -> Tensor:
    """Return one row whose first entries are given, and whose others are zero."""
    v = torch.zeros(1, n, dtype=f64)
    v[0, : len(entries)] = torch.tensor(entries, dtype=f64)
    return v


def side(*entries: float) -> Tensor:
    return torch.tensor(entries, dtype=f64)


def known_data(make: Callable[..., known.KnownProblem], *sizes: int, **options: Any) -> Callable[[int], Data]:
    return lambda k: present(make(3, *(k * v for v in sizes), batch=(3,), **options).arguments())


def ill_conditioned(k: int) -> Data:
    n = 5 * k
    basis = torch.linalg.qr(torch.randn(3, n, n, generator=torch.Generator().manual_seed(0), dtype=f64)).Q
    Q = (basis * 10 ** -torch.linspace(0, 10, n, dtype=f64)) @ basis.mT
    # Bounds hold x where the objective hardly does.
    return program(n, lower=-1, upper=1) | {"Q": 0.5 * (Q + Q.mT)}


HARD: dict[str, tuple[Callable[[int], Data], str | None]] = {
    # Each with the executor that all instances must have, if any.
    "one_variable": (lambda k: program(1, 4, lower=0.5), "cpu:dual"),
    "one_variable_both": (lambda k: program(1, 4, lower=-0.1, upper=0.1), "cpu:dual"),
    "one_variable_row": (lambda k: program(1, 4, G=row(2.0, n=1), h=side(0.5)), "cpu:dual"),
    "one_variable_free": (lambda k: program(1, 4), "cpu:dual"),
    "one_variable_fixed_by_a_row": (lambda k: program(1, 4, A=row(2.0, n=1), b=side(0.5)), "cpu:dual"),
    "unconstrained": (lambda k: program(5 * k), "cpu:dual"),
    "equalities_only": (known_data(known.quadratic_program, 5, 2), "cpu:dual"),
    "one_degree_of_freedom": (lambda k: known_data(known.quadratic_program, 5 * k, 5 * k - 1)(1), "cpu:dual"),
    "no_degree_of_freedom": (known_data(known.quadratic_program, 4, 4), "cpu:dual"),
    "rows_only": (known_data(known.quadratic_program, 5, 0, 4), "cpu:dual"),
    "most_rows": (known_data(known.quadratic_program, 10, 0, 19), "cpu:dual"),
    "bounds_only": (known_data(known.quadratic_program, 5, bounds="both"), "cpu:dual"),
    "lower_only": (known_data(known.quadratic_program, 5, 1, 3, bounds="lower"), "cpu:dual"),
    "upper_only": (known_data(known.quadratic_program, 5, 1, 3, bounds="upper"), "cpu:dual"),
    "all_bounds_infinite": (lambda k: program(5 * k, lower=-torch.inf, upper=torch.inf), "cpu:dual"),
    "lower_infinite": (lambda k: program(5 * k, lower=-torch.inf), "cpu:dual"),
    "all_rows_infinite": (lambda k: program(5 * k, G=row(1, 1, n=5 * k), h=side(torch.inf)), "cpu:dual"),
    "everything_infinite": (
        lambda k: program(5 * k, G=row(1, 1, n=5 * k), h=side(torch.inf), lower=-torch.inf, upper=torch.inf),
        "cpu:dual",
    ),
    "row_of_minus_infinity": (lambda k: program(5 * k, G=row(1, 1, n=5 * k), h=side(-torch.inf)), None),
    "lower_of_plus_infinity": (lambda k: program(5 * k, lower=torch.inf), None),
    "upper_of_minus_infinity": (lambda k: program(5 * k, upper=-torch.inf), None),
    "zero_row": (lambda k: program(5 * k, G=torch.zeros(2, 5 * k, dtype=f64), h=side(1, 2)), "cpu:dual"),
    "zero_row_at_zero": (lambda k: program(5 * k, G=torch.zeros(1, 5 * k, dtype=f64), h=side(0), lower=-0.1), None),
    "zero_row_below_zero": (lambda k: program(5 * k, G=torch.zeros(1, 5 * k, dtype=f64), h=side(-1)), None),
    "zero_equality": (lambda k: program(5 * k, A=torch.zeros(1, 5 * k, dtype=f64), b=side(0)), None),
    "impossible_equality": (lambda k: program(5 * k, A=torch.zeros(1, 5 * k, dtype=f64), b=side(1)), None),
    "weak_row": (lambda k: program(5 * k, G=row(1, n=5 * k), h=side(0), q=torch.zeros(3, 5 * k, dtype=f64)), None),
    "weak_bounds": (lambda k: program(5 * k, lower=0, q=torch.zeros(3, 5 * k, dtype=f64)), None),
    "fixed_variables": (lambda k: program(5 * k, lower=0.25, upper=0.25), None),
    "one_fixed_variable": (
        lambda k: program(5 * k, lower=row(1.25, n=5 * k)[0] - 1, upper=row(-0.75, n=5 * k)[0] + 1), None,
    ),
    "inconsistent_equalities": (
        lambda k: program(5 * k, A=row(1, 1, n=5 * k).repeat(2, 1), b=side(1, 2)), None,
    ),
    "singular": (known_data(known.quadratic_program, 6, 1, 4, bounds="both", singular=True), None),
    "indefinite": (lambda k: program(5 * k, lower=-1, upper=1) | {"Q": -torch.eye(5 * k, dtype=f64)}, None),
    "indefinite_in_one_direction": (
        lambda k: program(5 * k, lower=-1, upper=1) | {"Q": torch.diag(side(-1, *[1] * (5 * k - 1)))}, None,
    ),
    "zero_hessian": (lambda k: program(5 * k, lower=-1, upper=1) | {"Q": torch.zeros(5 * k, 5 * k, dtype=f64)}, None),
    "ill_conditioned": (ill_conditioned, None),
    "badly_scaled": (known_data(known.badly_scaled_program, 5, 1, 3, bounds="mixed"), "cpu:dual"),
    "contradicting_rows": (known_data(known.infeasible_program, 5, 1, 3, kind="rows", bounds="both"), None),
    "contradicting_equalities": (known_data(known.infeasible_program, 5, 2, 3, kind="equalities"), None),
    "contradicting_bounds": (known_data(known.infeasible_program, 5, 1, 3, kind="bounds"), None),
    "unbounded": (known_data(known.unbounded_program, 5, 1, 3, bounds="lower"), None),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::diffopt.errors.InaccurateSolutionWarning")
@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("size", SIZES)
def test_hard_instances_get_the_answer_of_torch(size: str, name: str) -> None:
    if size == "large" and name.startswith("one_variable"):
        return  # there is no large problem of one variable
    build, executor = HARD[name]
    for dtype in (f64, torch.float32) if executor else (f64,):
        data = {k: v.to(dtype) for k, v in build(SIZES[size]).items()}
        weights = cotangents(data, 1)
        ours, our_gradients = pulled(data, weights, Settings(executor="cpu"))
        theirs, their_gradients = pulled(data, weights, Settings(executor="torch"))
        assert ours.executor.startswith("cpu:") and executor in (None, ours.executor), ours.executor
        for count in ("status", "weakly_active", "dependent"):
            assert torch.equal(getattr(ours, count), getattr(theirs, count)), (count, ours, theirs)
        slack = 1e4 if name == "ill_conditioned" else 1.0  # cond(Q) = 1e10
        free = bool((ours.dependent > 0).any())  # multipliers of dependent rows are not unique
        for output in ("x", "s", "nu") if free else OUTPUTS:
            a, b = (getattr(s, output).nan_to_num(nan=7.0, posinf=9.0) for s in (ours, theirs))
            assert measures.relative(a, b) <= (X_REFERENCE * slack if dtype == f64 else SOLUTION[dtype]), output
        for piece, gradient in our_gradients.items():
            if free and piece in ("A", "G"):
                continue
            a, b = (v.nan_to_num(nan=7.0) for v in (gradient, their_gradients[piece]))
            limit = GRADIENT_REFERENCE * slack if dtype == f64 else GRADIENT[dtype]
            assert measures.relative(a, b) <= limit, (piece, a, b)


@pytest.mark.parametrize("extra", [{"extra_p": 1}, {"extra_m": 2}, {"extra_p": 1, "extra_m": 1, "bounds": "both"}])
@pytest.mark.parametrize("size", SIZES)
def test_repeated_rows_get_the_answer_of_torch(size: str, extra: dict[str, Any]) -> None:
    # x is unique; duals and their derivatives are shared out between the copies, which is ill-conditioned.
    data = known_data(known.redundant_program, 5, 1, 3, **extra)(SIZES[size])
    weights = cotangents(data, 1)
    ours, our_gradients = pulled(data, weights, outputs=("x",))
    theirs, their_gradients = pulled(data, weights, Settings(executor="torch"), outputs=("x",))
    for count in ("status", "weakly_active", "dependent"):
        assert torch.equal(getattr(ours, count), getattr(theirs, count)), (count, ours, theirs)
    assert bool((ours.dependent > 0).any())
    assert measures.relative(ours.x, theirs.x) <= X_REFERENCE
    for piece in ("Q", "q"):
        assert measures.relative(our_gradients[piece], their_gradients[piece]) <= GRADIENT_REFERENCE, piece


@pytest.mark.parametrize("apart", [1e-3, 1e-5])
@pytest.mark.parametrize("size", SIZES)
def test_nearly_repeated_rows_count_as_dependent_where_torch_says_so(size: str, apart: float) -> None:
    n = 5 * SIZES[size]
    a, change = torch.randn(2, n, generator=torch.Generator().manual_seed(0), dtype=f64)
    G = torch.stack([a, a + apart * change])
    data: dict[str, Any] = {"Q": torch.eye(n, dtype=f64), "q": -G.sum(0), "G": G, "h": torch.zeros(2, dtype=f64)}
    ours, theirs = (diffopt.solve_qp(**data, settings=Settings(executor=name)) for name in ("cpu", "torch"))
    assert int(ours.dependent) == int(theirs.dependent) == (apart < 1e-4)
    assert ours.executor == ("cpu:primal" if apart < 1e-4 else "cpu:dual")
    assert measures.relative(ours.x, theirs.x) <= X_REFERENCE


def test_more_active_rows_than_variables_depend_on_each_other() -> None:
    """The dual of a support vector machine: all bounds and the equality hold at once, and Q is nearly singular."""
    n, generator = 16, torch.Generator().manual_seed(9)
    y = torch.ones(n, dtype=f64)
    y[::2] = -1
    points = torch.randn(n, 2, generator=generator, dtype=f64) + 0.7 * y.unsqueeze(-1)
    distance = (points.unsqueeze(1) - points).square().sum(-1)
    q = torch.full((n,), -1.0, dtype=f64, requires_grad=True)
    data: dict[str, Any] = {"Q": torch.outer(y, y) * (-0.018 * distance).exp(), "A": y.unsqueeze(0), "b": 0.0}
    for count in (1, 8):  # alone, and in lanes
        solution = diffopt.solve_qp(q=q.expand(count, n), lower=0.0, upper=0.1353, **data)
        assert bool((solution.dependent == 1).all()) and bool((solution.x == 0.1353).all())
        assert float(torch.autograd.grad(solution.x.sum(), q)[0].abs().max()) <= 1e-15


@pytest.mark.parametrize("bounds", [None, "lower", "upper", "both", "mixed"])
@pytest.mark.parametrize("size", SIZES)
def test_kinks_follow_the_rule(size: str, bounds: known.Bounds) -> None:
    """Weakly active rows are counted by the compiled code; the rule "inactive" is its own, others are the engine's."""
    problem = known.degenerate_program(
        5, *(SIZES[size] * v for v in (5, 1, 3)), weak=2 * SIZES[size], bounds=bounds, batch=(3,)
    )
    data = present(problem.arguments())
    weights = cotangents(data, 3)
    found = {}
    for rule in get_args(KinkRule):
        if rule == "nan":  # see test_adjoint.py
            continue
        ours, found[rule] = pulled(data, weights, Settings(kink_rule=rule))
        theirs, expected = pulled(data, weights, Settings(kink_rule=rule, executor="torch"))
        assert ours.executor == "cpu:dual"
        assert torch.equal(ours.weakly_active, problem.weakly_active), ours.weakly_active
        assert torch.equal(theirs.weakly_active, problem.weakly_active)
        for piece, gradient in expected.items():
            assert measures.relative(found[rule][piece], gradient) <= GRADIENT_REFERENCE, (rule, piece)
    assert set(found) == set(KINK_RULES) - {"nan"}
    for rule in ("active", "central"):  # they do differ
        assert measures.relative(found[rule]["q"], found["inactive"]["q"]) > 1e-3, rule


# ---- failures --------------------------------------------------------------------------------------------------------

FAILED = {1: "crossed", 3: "nan", 4: "infeasible"}
"""Places and kinds of failures in a batch of six. (Instance 5 is singular: the general method solves it.)"""


def partly_failed(size: str, shared: bool = False) -> tuple[Data, Data]:
    data = drawn(size, 6, shared=shared)
    weights = cotangents(data, 6)
    for place, how in FAILED.items():
        spoil(data, {}, place, how)
    n = data["q"].shape[-1]
    if not shared:
        data["Q"][5] = torch.diag(torch.arange(n, dtype=f64))
        data["lower"][5], data["upper"][5] = -3.0, 3.0
        data["b"][5] = 0.0
        data["h"][5] = data["h"][5].abs()
    return data, weights


@pytest.mark.parametrize("size", SIZES)
def test_what_the_dual_form_leaves_is_answered_by_the_general_method(size: str) -> None:
    data, weights = partly_failed(size)
    solution, gradients = pulled(data, weights)
    assert solution.executor == "cpu:dual+primal"
    expected = [1, Status.PRIMAL_INFEASIBLE, 1, Status.NONFINITE_INPUT, Status.PRIMAL_INFEASIBLE, 1]
    assert solution.status.tolist() == expected, solution
    assert solution.certificate is not None
    theirs, their_gradients = pulled(data, weights, Settings(executor="torch"))
    assert theirs.certificate is not None and torch.equal(theirs.status, solution.status)
    for name, value in everything(theirs, their_gradients).items():
        if name not in ("iterations", *solution.residuals._asdict()):
            here = everything(solution, gradients)[name]
            assert measures.relative(here.nan_to_num(nan=7.0), value.nan_to_num(nan=7.0)) <= GRADIENT_REFERENCE, name
    for i in range(6):
        alone, own_gradients = pulled(pick(data, i), pick(weights, i))
        for name, value in everything(alone, own_gradients).items():
            assert same_bits(everything(solution, gradients)[name][i], value), (name, i)
        proofs = alone.certificate or [torch.full_like(v[i], torch.nan) for v in solution.certificate]
        for proof, value in zip(solution.certificate, proofs, strict=True):
            assert same_bits(proof[i], value), i
    for i in (1, 4):  # certificates are proofs
        rows = present({"A": data["A"][i], "G": data["G"][i]})
        _, nu, lam, lower, upper = (v[i] for v in solution.certificate)
        sides = (data["b"][i] * nu).sum() + (data["h"][i] * lam).sum()
        for bound, dual, sign in ((data["lower"][i], lower, -1), (data["upper"][i], upper, 1)):
            sides = sides + sign * torch.where(dual > 0, bound * dual, 0.0).sum()
        assert min(float(v.min()) for v in (lam, lower, upper)) >= 0 and abs(float(sides) + 1) <= 1e-9
        assert float((rows["A"].mT @ nu + rows["G"].mT @ lam - lower + upper).abs().max()) <= 1e-9
    assert solution.value[[1, 3, 4]].isnan().all() and solution.value[[0, 2, 5]].isfinite().all()


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("size", SIZES)
def test_the_gradient_of_a_failure_is_nan_where_it_is_asked_for(size: str, output: str) -> None:
    data, weights = partly_failed(size)
    whole = pulled(data, weights, outputs=(output,))[1]
    weights[output][list(FAILED)] = 0.0
    masked = pulled(data, weights, outputs=(output,))[1]
    good = [0, 2, 5]
    for name, gradient in whole.items():
        assert bool(gradient[good].isfinite().all()), name
        assert same_bits(masked[name][good], gradient[good]), name
        assert not masked[name][list(FAILED)].any(), name
    for i in FAILED:
        everywhere = torch.cat([gradient[i].flatten() for gradient in whole.values()])
        # Of s, a failure with infinite sides may have no derivative at all.
        assert bool(everywhere.isnan().any()), (i, output)
        assert bool((everywhere.isnan() | (everywhere == 0)).all()), (i, output)


@pytest.mark.parametrize("size", SIZES)
def test_failures_and_shared_tensors(size: str) -> None:
    """The sum over the batch is NaN if a failure takes part, and that of the others if it does not."""
    data, weights = partly_failed(size, shared=True)
    good = [0, 2, 5]
    _, whole = pulled(data, weights)
    alone = pulled(pick(data, good), pick(weights, good))[1]
    for v in weights.values():
        v[list(FAILED)] = 0.0
    _, masked = pulled(data, weights)
    for name in MATRICES:
        assert bool(whole[name].isnan().any()), name
        assert measures.relative(masked[name], alone[name]) <= 1e-12, name
    for name in set(data) - set(MATRICES):
        assert same_bits(whole[name][good], alone[name]) and same_bits(masked[name][good], alone[name]), name


def test_a_failure_reaches_only_its_own_part_of_what_is_partly_shared() -> None:
    data = drawn("small", 6)
    batch = {name: v.view(2, 3, *v.shape[1:]).clone() for name, v in data.items()}
    for name in ("Q", "G", "lower"):
        batch[name] = batch[name][:, :1]  # (2, 1, ...)
    batch |= {"lower": torch.full_like(batch["lower"], -9.0), "upper": torch.full_like(batch["upper"], 9.0)}
    batch["h"] = batch["h"] + 9
    batch["q"][0, 1, 0] = torch.nan
    weights = {name: v.view(2, 3, -1) for name, v in cotangents(data, 6).items()}
    solution, gradients = pulled(batch, weights)
    assert solution.ok.tolist() == [[True, False, True], [True, True, True]]
    for name in ("Q", "G", "lower"):
        assert gradients[name].shape[:2] == (2, 1)
        assert bool(gradients[name][1].isfinite().all()), name
    assert bool(gradients["Q"][0].isnan().any())
    second = pulled({k: v[1] for k, v in batch.items()}, {k: v[1] for k, v in weights.items()})[1]
    for name, gradient in second.items():
        assert measures.relative(gradients[name][1], gradient) <= 1e-12, name


def test_an_infinite_or_nan_cotangent_stays_in_its_instance() -> None:
    for size in SIZES:
        data = drawn(size, 3)
        weights = cotangents(data, 3)
        expected = pulled(data, weights)[1]
        weights["x"][1, 0], weights["lam"][1, 0] = torch.inf, torch.nan
        found = pulled(data, weights)[1]
        assert not found["q"][1].isfinite().all()
        for name, gradient in found.items():
            assert same_bits(gradient[[0, 2]], expected[name][[0, 2]]), name


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


# ---- every instruction set -------------------------------------------------------------------------------------------


def variants() -> dict[str, ctypes.CDLL]:
    """Return the compiled variants that this machine runs."""
    found = {}
    for name in library.VARIANTS:
        for path in [path for folder in library.folders() for path in folder.glob(f"libdiffopt_cpu_{name}.*")][:1]:
            handle = ctypes.CDLL(str(path))
            if handle.diffopt_abi() == library.ABI and handle.diffopt_cpu_level() >= library.VARIANTS.index(name):
                found[name] = handle
    return found


@pytest.mark.parametrize("variant", variants())
@pytest.mark.parametrize("size", SIZES)
def test_variants_read_nothing_that_they_did_not_write(
    size: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each variant that this machine runs gives the answer of torch, with records full of NaN before."""
    handle = variants()[variant]
    empty = torch.empty

    def full_of_nan(*arguments: Any, **named: Any) -> Tensor:
        made = empty(*arguments, **named)
        return made.fill_(torch.nan) if made.dtype.is_floating_point else made

    monkeypatch.setattr(cpu_executor, "_executor", cpu_executor.CpuExecutor(handle))
    for dtype, shared in ((f64, False), (f64, True), (torch.float32, False)):
        for count in (1, 3, 9):
            data = drawn(size, count, dtype, shared)
            weights = cotangents(data, count)
            expected, their_gradients = pulled(data, weights, Settings(executor="torch"))
            with monkeypatch.context() as patched:
                patched.setattr(torch, "empty", full_of_nan)
                patched.setattr(cpu_executor, "_spare", [])
                solution, gradients = pulled(data, weights, Settings(executor="cpu"))
            assert solution.executor == "cpu:dual"
            for name in OUTPUTS:
                a, b = (getattr(v, name).nan_to_num(nan=torch.nan, posinf=9.0) for v in (solution, expected))
                assert measures.relative(a, b) <= (X_REFERENCE if dtype == f64 else SOLUTION[dtype]), name
            for name, gradient in gradients.items():
                limit = GRADIENT_REFERENCE if dtype == f64 else GRADIENT[dtype]
                assert measures.relative(gradient, their_gradients[name]) <= limit, (name, count, gradient)


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


# ---- threads, processes, signals -------------------------------------------------------------------------------------


def test_many_callers_at_once(threads: Callable[[int], None]) -> None:
    threads(2)
    problems = [
        (data, cotangents(data, count))
        for data, count in ((drawn(size, count, seed=k), count) for k in range(2) for size, count in
                            (("small", 1), ("small", 100), ("large", 1), ("large", 8)))
    ]  # fmt: skip
    expected = [everything(*pulled(*problem)) for problem in problems]
    wrong: list[Any] = []

    def work(first: int) -> None:
        for turn in range(10):
            k = (first + turn) % len(problems)
            found = everything(*pulled(*problems[k]))
            wrong.extend((first, k, name) for name, v in expected[k].items() if not same_bits(found[name], v))

    assert at_once(work) == [] and wrong == []


FORK = """
import os, sys, torch, diffopt
# (Torch's own threads do not survive a fork: its products are made before there are any.)
torch.set_num_threads(1)
g = torch.Generator().manual_seed(0)
U, q = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((16, 40, 40), (16, 40)))
Q = (U @ U.mT + torch.eye(40, dtype=torch.float64)).requires_grad_()
def solved():
    solution = diffopt.solve_qp(Q, 9 * q, lower=-0.1, upper=0.1)
    assert solution.executor == "cpu:dual"
    return solution.x.detach(), *torch.autograd.grad(solution.x.square().sum(), Q)
tasks = lambda: len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0
expected, before = solved(), tasks()
torch.set_num_threads(2)
several = solved()
assert all(map(torch.equal, several, expected))
assert tasks() > before or not before  # threads were at work
for generation in range(2):  # a child, and a child of it
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0, status
        assert all(map(torch.equal, solved(), expected))
        os._exit(0)
    alone = tasks()
    assert all(map(torch.equal, solved(), expected))
    assert tasks() > alone or not before  # the child has threads of its own
os._exit(0)
"""


def test_a_forked_process_solves_too() -> None:
    if hasattr(os, "fork"):  # not on Windows
        run(FORK)


INTERRUPTED = """
import os, time, torch, diffopt
n, count = 60, 40_000
q = torch.randn(count, n, dtype=torch.float64, requires_grad=True)
Q = torch.randn(n, n, dtype=torch.float64)
Q, G = Q @ Q.T + torch.eye(n), torch.randn(n, n, dtype=torch.float64)
diffopt.solve_qp(Q.double(), q[:2], G=G, h=1.0)
print("ready", flush=True)
try:
    diffopt.solve_qp(Q.double(), 9 * q, G=G, h=1.0)
except KeyboardInterrupt:
    print("interrupted", flush=True)
assert diffopt.solve_qp(Q.double(), q[:2], G=G, h=1.0).ok.all()  # and all is well afterwards
"""


def test_a_long_batch_is_interrupted_soon() -> None:
    command = [sys.executable, "-c", INTERRUPTED]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            time.sleep(1.0)
            began = time.monotonic()
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "interrupted\n"
            assert time.monotonic() - began < 3.0  # the library returns about every second
            assert process.wait(60) == 0
        finally:
            process.kill()


MEMORY = """
import torch, diffopt
count, n = 100_000, 10
Q, G, q, h = (torch.empty(count, *s, dtype=torch.float64) for s in ((n, n), (n, n), (n,), (n,)))
Q.normal_().mul_(0.1).diagonal(dim1=-2, dim2=-1).add_(2.0)
G.normal_(), q.normal_().mul_(3.0), h.uniform_(0.1, 1.0)
size = sum(v.numel() for v in (Q, G, q, h)) * 8
def now(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))
def peak(action):
    with open("/proc/self/clear_refs", "w") as control:
        control.write("5")  # forget the peak so far
    before = now("VmRSS")
    action()
    return (now("VmHWM") - before) / size
def forward():
    assert diffopt.solve_qp(Q, q, G=G, h=h).ok.all()
def both():
    leaves = [v.detach().requires_grad_() for v in (Q, q, G, h)]
    solution = diffopt.solve_qp(leaves[0], leaves[1], G=leaves[2], h=leaves[3])
    solution.x.square().sum().backward()
    assert all(v.grad is not None for v in leaves)
print(peak(forward), peak(both))
Q, G, q, h = (v[:count // 10].clone() for v in (Q, G, q, h))
for _ in range(3):
    both()
level = now("VmRSS")
for _ in range(10):
    both()
print((now("VmRSS") - level) / size)
"""


@pytest.mark.slow
def test_memory_stays_near_that_of_the_data() -> None:
    if not Path("/proc/self/clear_refs").exists():
        return  # only Linux says how much there was
    forward, both, growth = map(float, run(MEMORY).split())
    # For 220 numbers of data there are 50 of the solution, some 600 in a record, and as many gradients as data.
    assert forward < 1.0, forward
    assert both < 6.0, both
    assert growth < 0.1, growth


def test_records_are_not_reused_while_a_graph_needs_them() -> None:
    data: dict[str, Any] = drawn("small", 3)
    leaves: dict[str, Any] = {name: v.clone().requires_grad_() for name, v in data.items()}
    first = diffopt.solve_qp(**leaves)
    expected = torch.autograd.grad(first.x.sum(), leaves["q"], retain_graph=True)[0]
    for _ in range(3):  # others come and go, with the memory that they give back
        other = diffopt.solve_qp(**{name: (2.0 * v).detach().requires_grad_() for name, v in data.items()})
        other.x.sum().backward()
        del other
    assert torch.equal(torch.autograd.grad(first.x.sum(), leaves["q"])[0], expected)


@pytest.mark.parametrize("held", ["nothing", "gradient", "view", "array", "storage"])
def test_memory_of_large_gradients_serves_again_when_nobody_has_it(held: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_executor, "LARGE", 1000)
    monkeypatch.setattr(cpu_executor._lent, "storages", [])
    Q = (torch.eye(20, dtype=f64) * torch.arange(1, 5, dtype=f64)[:, None, None]).requires_grad_()

    def gradient(scale: float) -> Tensor:
        q = torch.full((4, 20), scale, dtype=f64)
        return torch.autograd.grad(diffopt.solve_qp(Q, q).x.sum(), Q)[0]

    first = gradient(1.0)
    place, values = first.data_ptr(), first.clone()
    keep: Any = None
    if held == "storage":
        keep = first.untyped_storage()
    elif held != "nothing":
        keep = {"gradient": first, "view": first[0, 0], "array": first.numpy()}[held]
    del first
    second = gradient(2.0)
    assert (second.data_ptr() == place) == (held == "nothing")
    if held == "array":
        assert (torch.from_numpy(keep) == values).all()
    if held in ("gradient", "view"):
        assert torch.equal(keep, values if held == "gradient" else values[0, 0])
    assert measures.relative(second, 2 * values) <= X_REFERENCE
    third = gradient(1.0)
    assert torch.equal(third, values) and third.data_ptr() != second.data_ptr()


def test_gradients_that_are_written_around_the_caches_have_the_same_bits() -> None:
    # (Rows of 101 numbers begin in the middle of cache lines, and so do the matrices of every other instance.)
    n, m, batch = 101, 100, 51
    g = torch.Generator().manual_seed(1)
    U, q, G, incoming = (torch.randn(batch, *s, dtype=f64, generator=g) for s in ((n, n), (n,), (m, n), (n,)))
    data = {"Q": U @ U.mT + torch.eye(n, dtype=f64), "q": q, "G": G, "h": torch.ones(batch, m, dtype=f64)}
    assert 8 * batch * n * (n + m) > 4e6

    def gradients(part: slice) -> list[Tensor]:
        leaves: dict[str, Any] = {name: v[part].clone().requires_grad_() for name, v in data.items()}
        return list(torch.autograd.grad(diffopt.solve_qp(**leaves).x, list(leaves.values()), incoming[part]))

    whole = gradients(slice(None))
    for begin in (0, 17, 34):
        part = slice(begin, begin + 17)
        assert all(torch.equal(a[part], b) for a, b in zip(whole, gradients(part), strict=True))


def test_the_polish_mends_an_active_set_rather_than_wait_for_the_method_to_find_it() -> None:
    g = torch.Generator().manual_seed(0)
    n, batch = 50, 64
    U, G, inside = (torch.randn(batch, *shape, dtype=f64, generator=g) for shape in ((n, n), (n, n), (n,)))
    Q = U @ U.mT + 1e-3 * torch.eye(n, dtype=f64)
    q, slack = (torch.rand(batch, n, dtype=f64, generator=g) for _ in range(2))
    h = (G @ inside.unsqueeze(-1)).squeeze(-1) + slack
    solution = diffopt.solve_qp(Q, q, G=G, h=h, settings=diffopt.Settings(executor="cpu"))
    steps = float(solution.iterations.double().mean())
    assert steps <= 6.7, steps  # (without, 7.1)
