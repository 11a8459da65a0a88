"""Problems for the compiled executor, in lanes of registers and in whole ones, and all that it makes of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import diffopt
import measures
from diffopt import Settings
from diffopt.check import known
from diffopt.solvers import cpu_executor

ROOT = Path(__file__).resolve().parents[1]
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
