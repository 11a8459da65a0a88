"""One layer under load: many threads at once, ten thousand calls, a million problems."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import diffopt
from callers import at_once
from diffopt import Elastic, Settings
from tolerances import GRADIENT_REFERENCE, RESIDUAL

FLOAT64 = torch.float64
ROOT = Path(diffopt.__file__).parents[1]


def layer(**options: Any) -> diffopt.Layer:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(4, 4, generator=generator, dtype=FLOAT64)
    structure = diffopt.QPStructure(
        4,
        Q=diffopt.learned(root @ root.mT + torch.eye(4, dtype=FLOAT64)),
        q=diffopt.given(),
        G=diffopt.learned(torch.randn(2, 4, generator=generator, dtype=FLOAT64)),
        h=diffopt.given(),
        lower=-1.0,
    )
    return diffopt.Layer(structure, **options)


def inputs(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(3, 4, generator=generator, dtype=FLOAT64)
    return {"q": q, "h": 0.3 + torch.rand(3, 2, generator=generator, dtype=FLOAT64)}


WAYS: dict[str, dict[str, Any]] = {
    "compiled": {},
    "torch": {"settings": Settings(executor="torch")},
    "relaxed": {"settings": Settings(relaxation=0.1)},
    "elastic": {"on_infeasible": Elastic("squared")},
    "closest": {"on_infeasible": "closest"},
}


@pytest.mark.parametrize("way", WAYS)
def test_eight_threads_call_one_layer(way: str) -> None:
    shared = layer(**WAYS[way])
    parameters = list(shared.parameters())

    def answer(seed: int) -> list[Tensor]:
        data = inputs(seed)
        if way == "closest":
            data["h"][0] = -9.0  # with x >= -1, this and what follows cannot all be
        data = {name: value.requires_grad_() for name, value in data.items()}
        solution = shared.solve(**data)
        total = solution.x.square().sum() + solution.value.sum()
        return [solution.x.detach(), *torch.autograd.grad(total, [*parameters, *data.values()])]

    expected = [answer(seed) for seed in range(8)]
    wrong: list[Any] = []

    def work(first: int) -> None:
        for turn in range(4):
            seed = (first + turn) % 8
            if not all(map(torch.equal, answer(seed), expected[seed])):
                wrong.append((first, seed))

    assert at_once(work) == [] and wrong == []


MEMORY = """
import sys
sys.path.insert(0, "tests")
import test_under_load as load

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def call(layer, seed):
    data = {name: value.requires_grad_() for name, value in load.inputs(seed % 100).items()}
    layer.zero_grad()
    solution = layer.solve(**data)
    (solution.x.square().sum() + solution.value.sum()).backward()

way, calls = sys.argv[1], int(sys.argv[2])
layer = load.layer(**load.WAYS[way])
for seed in range(calls // 5):  # what is kept once, for each shape, thread and pool
    call(layer, seed)
before = resident()
for seed in range(calls):
    call(layer, seed)
print(resident() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("way", "calls"), [("compiled", 10_000), ("torch", 1_000), ("relaxed", 500), ("closest", 500)])
def test_memory_stays_flat(way: str, calls: int) -> None:
    """What one call leaves behind, times the calls, would be more than this: a graph alone is 10 KB."""
    if not os.path.exists("/proc/self/statm"):  # only Linux says how much is resident
        return
    command = [sys.executable, "-c", MEMORY, way, str(calls)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 2_000_000 + 100 * calls, done.stdout


MILLION = """
import sys, time
sys.path.insert(0, "tests")
import torch, diffopt, measures
from test_under_load import resident

count, n, m, sample = 1_000_000, 4, 5, 200
generator = torch.Generator().manual_seed(0)
def normal(*shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)
data = {"Q": normal(count, n, n).mul_(0.3), "q": normal(count, n).mul_(2), "G": normal(count, m, n)}
data["Q"].diagonal(dim1=-2, dim2=-1).add_(3.0)
data["h"] = normal(count, m).abs_().add_(0.1)
size = sum(v.numel() for v in data.values()) * 8
with open("/proc/self/clear_refs", "w") as control:
    control.write("5")  # forget the peak so far
before, began = resident("VmRSS"), time.perf_counter()
leaves = {name: v.detach().requires_grad_() for name, v in data.items()}
solution = diffopt.solve_qp(**leaves)
solution.x.square().sum().backward()
seconds, peak = time.perf_counter() - began, (resident("VmHWM") - before) / size
assert bool((solution.status == diffopt.Status.SOLVED).all())
worst, absent = 0.0, {"A": None, "b": None, "lower": None, "upper": None}
for first in range(0, count, 100_000):  # of all of them, recomputed
    part = slice(first, first + 100_000)
    chunk = diffopt.solve_qp(**{name: v[part] for name, v in data.items()})
    assert torch.equal(chunk.x, solution.x[part])
    found = measures.residuals({name: v[part] for name, v in data.items()} | absent, chunk)
    worst = max(worst, *(float(v.max()) for v in found.values()))
chosen = torch.randperm(count, generator=generator)[:sample]
alone = measures.tracked({name: v[chosen] for name, v in data.items()})
diffopt.solve_qp(**alone, settings=diffopt.Settings(executor="torch")).x.square().sum().backward()
error = max(measures.relative(leaves[name].grad[chosen], alone[name].grad) for name in alone)
print(f"{seconds:.1f} {peak:.2f} {worst:.1e} {error:.1e}")
"""


def resident(name: str) -> int:
    """Return what the kernel says of this process, ``VmRSS`` (now) or ``VmHWM`` (at most), in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))


@pytest.mark.slow
def test_a_million_small_problems() -> None:
    """Forward and backward: seconds, peak memory over that of the data, all residuals, the gradients of a sample."""
    if not os.path.exists("/proc/self/status"):  # only Linux says how much is resident
        return
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", MILLION], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    seconds, peak, residual, error = map(float, done.stdout.split())
    assert seconds <= 60 and peak <= 6, done.stdout
    assert residual <= RESIDUAL[FLOAT64] and error <= GRADIENT_REFERENCE, done.stdout
