"""What transforms cost: ``vmap`` beside the native batch, Jacobians beside a solve. ``python -m benchmarks.transforms``

Calls are interleaved; a row shows the least and the median time, the spread (the middle half of the times over their
median), and the ratios of its least and of its median to those of the first row.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import diffopt
from benchmarks.timing import duration
from benchmarks.workload import Case, make
from diffopt import Settings
from diffopt.backends.registry import choose
from diffopt.problems.forms import QPForm
from diffopt.transforms import OneLevel, apply_at_one_level, at_level


def data(case: Case) -> dict[str, Tensor]:
    return {name: torch.from_numpy(piece) for name, piece in make(case).pieces().items()}


def show(title: str, calls: dict[str, Callable[[], object]], repeats: int) -> None:
    """Time the calls in turn, and print their rows."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            seconds[name].append(duration(call, 1))
    print(title)
    first = next(iter(seconds.values()))
    for name, times in seconds.items():
        low, median, high = np.quantile(times, (0.25, 0.5, 0.75))
        spread = f"{(high - low) / median:5.0%}"
        ratios = f"{min(times) / min(first):6.2f}  {median / np.median(first):6.2f}"
        print(f"  {name:36} {1e3 * min(times):9.3f} ms  {1e3 * median:9.3f} ms  {spread}  {ratios}")


def x(**pieces: Any) -> Tensor:
    return diffopt.solve_qp(**pieces).x


def mapped(batch: int, size: int, repeats: int) -> None:
    pieces = data(Case(batch, size, size))
    names = list(pieces)
    leaves = {name: piece.clone().requires_grad_() for name, piece in pieces.items()}
    vmapped = torch.func.vmap(lambda *values: x(**dict(zip(names, values, strict=True))))
    calls: dict[str, Callable[[], object]] = {
        "native": lambda: x(**pieces),
        "vmap": lambda: vmapped(*pieces.values()),
        "native, backward": lambda: torch.autograd.grad(x(**leaves).sum(), list(leaves.values())),
        "vmap, backward": lambda: torch.autograd.grad(vmapped(*leaves.values()).sum(), list(leaves.values())),
    }
    show(f"batch {batch}, n = m = {size}", calls, repeats)


class Known(OneLevel):
    """A function whose value and derivatives are there already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, found: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.found = found
        return at_level(value, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        level = torch._C._functorch.maybe_get_level(gradient)  # type: ignore[attr-defined]
        return None, None, *(torch._C._functorch._add_batch_dim(v, 0, level) for v in ctx.found)  # type: ignore[attr-defined]


def of_torch_alone(values: tuple[Tensor, ...], places: tuple[int, ...]) -> Callable[[], object]:
    """Return a call of ``jacrev`` with these inputs and an output like the first, in which all the work is torch's."""
    found = [torch.zeros(len(values[0]), len(v), dtype=v.dtype) for v in values]
    known = torch.func.jacrev(lambda *v: apply_at_one_level(Known, values[0], found, *v), places)
    return lambda: known(*values)


def vectors_alone(one: dict[str, Any]) -> Callable[[], object]:
    """Return a call of the derivative of x alone, at as many vectors as a Jacobian by ``jacrev`` has."""
    form = QPForm(**one)
    found = choose("auto", form).solve(form, Settings(), keep=True)
    identity = torch.eye(form.n, dtype=form.dtype)
    pullback = found.pullback
    assert pullback is not None and pullback.many is not None
    many = pullback.many
    return lambda: many((identity, None, None, None, None, None), False)


def jacobians(size: int, p: int, repeats: int) -> None:
    one = {name: piece[0] for name, piece in data(Case(1, size, size, p)).items()}
    names = [name for name in ("q", "b", "h") if name in one]
    values = tuple(one[name] for name in names)

    def moved(*values: Tensor) -> Tensor:
        return x(**one | dict(zip(names, values, strict=True)))

    places = tuple(range(len(names)))
    several = tuple(v.expand(8, -1).contiguous() for v in values)
    calls: dict[str, Callable[[], object]] = {
        "solve": lambda: x(**one),
        f"jacrev in {', '.join(names)}": lambda: torch.func.jacrev(moved, places)(*values),
        "of that, torch.func.jacrev itself": of_torch_alone(values, places),
        "of that, the derivative of x": vectors_alone(one),
        f"jacfwd in {', '.join(names)}": lambda: torch.func.jacfwd(moved, places)(*values),
        "jacrev of 2 q + h, for comparison": lambda: torch.func.jacrev(lambda q, h: 2 * q + h, (0, 1))(
            one["q"], one["h"]
        ),
    }
    show(f"one instance, n = m = {size}, p = {p}", calls, repeats)
    batch: dict[str, Callable[[], object]] = {
        "solve": lambda: moved(*several),
        "vmap of jacrev": lambda: torch.func.vmap(torch.func.jacrev(moved, places))(*several),
        "vmap of jacfwd": lambda: torch.func.vmap(torch.func.jacfwd(moved, places))(*several),
        "vmap of grad": lambda: torch.func.vmap(torch.func.grad(lambda *v: moved(*v).sum(), places))(*several),
    }
    show(f"8 instances, n = m = {size}, p = {p}", batch, repeats)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=31)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    mapped(128, 100, options.repeats)
    jacobians(100, 0, options.repeats)
    jacobians(100, 20, options.repeats)
