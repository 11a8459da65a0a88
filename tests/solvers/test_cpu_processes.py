"""The compiled CPU executor: callers, processes, signals, memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import diffopt
import measures
from callers import at_once
from compiled import cotangents, drawn, everything, pulled, run, same_bits
from diffopt.solvers import cpu_executor
from tolerances import X_REFERENCE

ROOT = Path(__file__).resolve().parents[2]
f64 = torch.float64


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


# A shell's background job starts with SIGINT ignored, and hands that down: the handler is set here.
INTERRUPTED = """
import os, signal, time, torch, diffopt
signal.signal(signal.SIGINT, signal.default_int_handler)
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
