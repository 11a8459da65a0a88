"""A process for each peer, so that each has its own threads and a crash is a row of the table.

The parent asks one worker at a time, and a worker that is not asked sleeps. OpenMP's threads wait asleep too:
spinning, they would be up to thirty times slower wherever another program wants a core now and then.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from types import MappingProxyType
from typing import Any

from benchmarks import profile, timing, workload
from benchmarks.accuracy import Answer
from benchmarks.peers import PEERS
from benchmarks.workload import Array, Case

THREAD_VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "RAYON_NUM_THREADS"
)  # fmt: skip
MODES = {"forward": "forward", "forward+backward": "forward_backward", "forward+backward, q only": "forward_backward_q"}
"""What is timed: name in the results, method of the peer."""

ALONE = {"backward": "forward+backward", "backward, q only": "forward+backward, q only"}
"""Of diffopt the backward pass is also timed by itself, without the solve before it; the modes that they belong to."""


class PeerFailed(Exception):
    """A peer could not be imported, refused a case, crashed or ran too long; says why."""


class Worker:
    """The parent's end: a process in which one peer runs with a number of threads, and with more in its environment."""

    def __init__(
        self, peer: str, threads: int, limit: float = 120.0, environment: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.peer, self.threads, self.limit, self.environment = peer, threads, limit, environment
        self._process: Any = None
        self._connection: Any = None
        self._pending = False

    def start(self) -> None:
        """Start the process and have it import its packages, without waiting for that."""
        self._send("load", Case(1, 4, 4))
        self._pending = True

    def load(self, case: Case) -> None:
        """Prepare for a case."""
        self._ask("load", case)

    def time(self, mode: str, inner: int) -> float:
        """Return the seconds of a call, on average over ``inner`` calls."""
        return self._ask("time", mode, inner)

    def answer(self) -> Answer:
        """Return the peer's answer."""
        return self._ask("answer")

    def gradients(self, mode: str) -> dict[str, Array]:
        """Return the peer's gradients by name."""
        return self._ask("gradients", mode)

    def peak(self) -> float:
        """Return the GFLOP/s of a large matrix product in torch."""
        return self._ask("peak")

    def bandwidth(self) -> dict[str, float]:
        """Return the GB/s at which torch reads and writes much more than the caches hold."""
        return self._ask("bandwidth")

    def sample(self, inner: int) -> profile.Sample:
        """Return where the time of ``inner`` solves and reverse passes of ours went."""
        return self._ask("sample", inner)

    def memory(self, case: Case, mode: str) -> tuple[int, int]:
        """Return the bytes of a case's data, and by how many bytes solving it raised the most resident memory."""
        return self._ask("memory", case, mode)

    def close(self) -> None:
        if self._process is None:
            return
        self._connection.close()
        self._process.join(2)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        environment = dict.fromkeys(THREAD_VARIABLES, str(self.threads)) | {"OMP_WAIT_POLICY": "passive"}
        environment |= self.environment
        kept = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        self._process = context.Process(target=_serve, args=(other, self.peer, self.threads), daemon=True)
        self._process.start()
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        other.close()

    def _ask(self, *question: Any) -> Any:
        if self._pending:
            self._pending = False
            with contextlib.suppress(PeerFailed):  # the real case will fail the same way
                self._receive()
        self._send(*question)
        return self._receive()

    def _send(self, *question: Any) -> None:
        if self._process is None:
            self._start()
        with contextlib.suppress(ConnectionError):  # `_receive` reports it
            self._connection.send(question)

    def _receive(self) -> Any:
        try:
            if not self._connection.poll(self.limit):
                self._process.kill()
                self.close()
                raise PeerFailed(f"no answer within {self.limit:.0f} s")
            kind, value = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join(5)
            code = self._process.exitcode
            self.close()
            raise PeerFailed(f"the process ended, with exit code {code}") from None
        if kind == "error":
            raise PeerFailed(value)
        return value


def _serve(connection: Connection, name: str, threads: int) -> None:
    """Answer questions until the parent hangs up."""
    with contextlib.suppress(AttributeError, OSError):  # not every system has it
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[-threads:])
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, sys.stdout.fileno())
    os.dup2(quiet, sys.stderr.fileno())
    peer = PEERS[name](threads)
    while True:
        try:
            question, *arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send(("value", _answer(peer, question, arguments)))
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = " ".join(str(error).split())[:200]
            connection.send(("error", f"{type(error).__name__}: {text} ({os.path.basename(where.filename)})"))


def _answer(peer: Any, question: str, arguments: list[Any]) -> Any:
    match question, arguments:
        case "load", [case]:
            return peer.load(workload.make(case))
        case "time", [mode, inner] if mode in ALONE:
            return peer.backward_seconds("q only" in mode, inner)
        case "time", [mode, inner]:
            return timing.duration(getattr(peer, MODES[mode]), inner)
        case "answer", []:
            return peer.answer()
        case "gradients", [mode]:
            return peer.gradients(getattr(peer, MODES[mode])())
        case "peak", []:
            return _peak(peer.threads)
        case "bandwidth", []:
            return _bandwidth()
        case "sample", [inner]:
            return profile.sample(peer, inner)
        case "memory", [case, mode]:
            return _memory(peer, case, mode)
    raise ValueError(f"unknown question {question}")


def _peak(threads: int, n: int = 1500, repeats: int = 8) -> float:
    import torch

    torch.set_num_threads(threads)
    A, B = (torch.rand(n, n, dtype=torch.float64) for _ in range(2))
    C = torch.mm(A, B)
    best = min(timing.duration(lambda: torch.mm(A, B, out=C), 1) for _ in range(repeats))
    return 2 * n**3 / best / 1e9


def _bandwidth(numbers: int = 2**25, repeats: int = 4) -> dict[str, float]:
    import torch

    torch.set_num_threads(1)
    many = torch.zeros(numbers, dtype=torch.float64)
    ways: dict[str, Callable[[], object]] = {"read": many.sum, "written": lambda: many.fill_(1.0)}
    return {
        name: 8 * numbers / min(timing.duration(way, 1) for _ in range(repeats)) / 1e9 for name, way in ways.items()
    }


def _memory(peer: Any, case: Case, mode: str) -> tuple[int, int]:
    peer.load(workload.make(Case(2, case.n, case.m, case.p)))
    getattr(peer, MODES[mode])()  # imports, compiles and fills what is made once
    batch = workload.make(case)
    size = batch.nbytes()
    peer.load(batch)
    before = _status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high-water mark starts again from here
    getattr(peer, MODES[mode])()
    return size, _status("VmHWM") - before


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    raise LookupError(name)
