"""The compiled CPU executor: the bits of an answer depend on the instance alone, not on its neighbours, place, layout,
threads or instruction set.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import diffopt
import measures
from compiled import COUNTS, OUTPUTS, SIZES, cotangents, drawn, everything, own, pick, pulled, same_bits, spoil
from diffopt import Settings
from diffopt.solvers import cpu_executor, library
from tolerances import EXACT_ALGEBRA, GRADIENT, GRADIENT_REFERENCE, SOLUTION, X_REFERENCE

f64 = torch.float64


# ---- bits ------------------------------------------------------------------------------------------------------------

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
