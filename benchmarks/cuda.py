"""Measure diffopt on a CUDA device: ``make bench-cuda``, or ``PYTHONPATH=. python -m benchmarks.cuda --help``.

Needs a device, torch and cuda-core; qpth takes part where it is installed. For each repeat everything is called in
turn, so that whatever else the device does, it does to all. Every row is checked: residuals of all solutions,
recomputed from the data, and gradients of the first programs against an exact reference.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

import diffopt
from benchmarks import accuracy, workload
from benchmarks.accuracy import Answer, Reference
from benchmarks.peers.diffopt_ import active_rows
from benchmarks.report import in_units
from benchmarks.run import machine
from benchmarks.timing import SPREAD, Samples
from benchmarks.workload import Batch, Case
from diffopt.solvers import cuda_executor

RESULTS = Path(__file__).parent / "results"
CASES = (
    Case(1, 10, 10),
    Case(1024, 10, 10),
    Case(128, 50, 50),
    Case(1, 100, 100),
    Case(128, 100, 100),
    Case(128, 100, 100, 20),
    Case(4096, 100, 100),
    Case(128, 200, 200),
)
DTYPES = {"float64": torch.float64, "float32": torch.float32}
MODES = FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
OURS, REPLAYED, TORCH, QPTH = "diffopt", "diffopt (graph)", "diffopt (torch)", "qpth"
CHECKED = 16
"""Programs of a batch whose gradients are compared with the exact ones."""

SAMPLE = 0.02
"""Seconds that a repeat takes at least: quick calls are made several times in it."""


class Timer:
    """Measures what is done on the host."""

    def time(self, call: Callable[[], object], inner: int, before: Callable[[], object] | None = None) -> list[float]:
        """Return the seconds of a call on the device, and on the wall, on average over ``inner`` calls.

        Args:
            before: done before each call, and not measured.
        """
        seconds = 0.0
        for _ in range(inner):
            if before is not None:
                before()
            start = perf_counter()
            call()
            seconds += perf_counter() - start
        return [seconds / inner] * 2


class CudaTimer(Timer):
    """Measures the device by its own events, from the first call's begin to the last one's end."""

    def time(self, call: Callable[[], object], inner: int, before: Callable[[], object] | None = None) -> list[float]:
        """See `Timer`."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if before is not None:
            totals = np.zeros(2)
            for _ in range(inner):
                before()
                totals += self.time(call, 1)
            return list(totals / inner)
        torch.cuda.synchronize()
        start = perf_counter()
        begin.record()
        for _ in range(inner):
            call()
        end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 / inner, (perf_counter() - start) / inner]


class Contender(ABC):
    """Who solves the batch on the device. Only `call` is timed.

    Attributes:
        name, note: the name of the row, and how it is set.
    """

    name: str
    note: str

    def load(self, leaves: dict[str, Tensor], incoming: Tensor) -> None:
        """Take the data, which require gradients, and the gradient that comes back to x."""
        self.leaves, self.incoming = leaves, incoming

    @abstractmethod
    def solve(self) -> Tensor:
        """Return x, attached to the data."""

    @abstractmethod
    def answer(self) -> Answer:
        """Return what `solve` finds, and whether it says so of every program, as `Answer.executor`."""

    def pull_back(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of all data."""
        return torch.autograd.grad(x, list(self.leaves.values()), self.incoming)

    def gradients(self) -> tuple[Tensor, ...]:
        """Return what is checked."""
        return self.pull_back(self.solve())

    def call(self, mode: str) -> tuple[Callable[[], object], Callable[[], object] | None]:
        """Return what is measured, and what is done before each time."""
        if mode == FORWARD:
            return torch.no_grad()(self.solve), None
        if mode == BOTH:
            return self.gradients, None
        solved: list[Tensor] = []
        return lambda: self.pull_back(solved.pop()), lambda: solved.append(self.solve())


class Ours(Contender):
    """diffopt with some settings."""

    def __init__(self, name: str, note: str, settings: diffopt.Settings) -> None:
        self.name, self.note, self.settings = name, note, settings

    def solution(self) -> diffopt.Solution:
        options: dict[str, Any] = dict(self.leaves)
        return diffopt.solve_qp(**options, settings=self.settings, on_failure="return")

    def solve(self) -> Tensor:
        return self.solution().x

    def answer(self) -> Answer:
        found = self.solution()
        failed = int((~found.ok).sum())
        iterations = found.iterations.cpu().numpy()
        name = found.executor + (f", {failed} not solved" if failed else "")
        return Answer(array(found.x), array(found.nu), array(found.lam), iterations, name)


class Replayed(Ours):
    """diffopt recorded in a CUDA graph: nothing but the kernels' own time, and the host's share is one call."""

    def load(self, leaves: dict[str, Tensor], incoming: Tensor) -> None:
        """Take the data, and record a graph of each mode."""
        super().load(leaves, incoming)
        self.graphs, self.found = {}, ()
        # (All on one stream: a backward pass runs on that of its forward pass.)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            x = self.solve()
            torch.autograd.grad(x, list(leaves.values()), incoming, retain_graph=True)
        torch.cuda.current_stream().wait_stream(stream)
        for mode in MODES:
            self.graphs[mode] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[mode], stream=stream):
                if mode == FORWARD:
                    with torch.no_grad():
                        self.solve()
                elif mode == BACKWARD:
                    torch.autograd.grad(x, list(leaves.values()), incoming, retain_graph=True)
                else:
                    self.found = self.pull_back(self.solve())

    def gradients(self) -> tuple[Tensor, ...]:
        """Return those of the graph."""
        self.graphs[BOTH].replay()
        return self.found

    def call(self, mode: str) -> tuple[Callable[[], object], None]:
        """See `Contender`."""
        return self.graphs[mode].replay, None


class Qpth(Contender):
    """qpth, a batched interior-point method in torch operations."""

    name = QPTH
    note = "QPFunction with its defaults (eps 1e-12, at most 20 iterations), without the check of Q"

    def load(self, leaves: dict[str, Tensor], incoming: Tensor) -> None:
        """See `Contender`."""
        from qpth.qp import QPFunction  # pyright: ignore[reportMissingImports]

        super().load(leaves, incoming)
        self.function = QPFunction(verbose=-1, check_Q_spd=False)
        self.absent = incoming.new_empty(0)

    def solve(self) -> Tensor:
        A, b = self.leaves.get("A", self.absent), self.leaves.get("b", self.absent)
        return self.function(*(self.leaves[name] for name in ("Q", "q", "G", "h")), A, b)

    def answer(self) -> Answer:
        x = self.solve()
        node: Any = x.grad_fn
        nu = array(node.nus) if "A" in self.leaves else np.zeros((len(x), 0))
        return Answer(array(x), nu, array(node.lams))


def contenders(device: torch.device) -> list[Contender]:
    """Return who takes part: on a CUDA device the executors that are there, on the CPU (in tests) those."""
    executor: Any = device.type
    ours = diffopt.Settings(executor=executor)
    found: list[Contender] = [Ours(OURS, f"solve_qp with executor={executor!r}, as a user calls it", ours)]
    if device.type == "cuda":
        found.append(Replayed(REPLAYED, "the same with sync=False, recorded in a CUDA graph", ours.replace(sync=False)))
    found.append(Ours(TORCH, "solve_qp with executor='torch'", diffopt.Settings(executor="torch")))
    if importlib.util.find_spec("qpth") is not None:
        found.append(Qpth())
    return found


@dataclass
class Row:
    """One contender in one mode."""

    contender: Contender
    mode: str
    results: dict[str, Any] = field(default_factory=dict)
    inner: int = 1
    device: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def sample(self, timer: Timer) -> float:
        """Measure once more; returns the seconds on the wall of a call."""
        call, before = self.contender.call(self.mode)
        device, wall = timer.time(call, self.inner, before)
        self.device.append(device)
        self.wall.append(wall)
        return wall

    def record(self) -> dict[str, Any]:
        """Return what is written into the results, seconds of the whole batch."""
        found = {"contender": self.contender.name, "mode": self.mode, **self.results}
        if "failed" in found:
            return found
        for name, seconds in (("device", self.device), ("wall", self.wall)):
            samples = Samples(self.inner, seconds)
            found |= {f"{name}_seconds": samples.median(), f"{name}_spread": samples.spread()}
        return found | {"repeats": len(self.wall), "calls_per_repeat": self.inner}


def measure(
    case: Case, dtype: torch.dtype, device: torch.device, among: list[Contender], timer: Timer, repeats: int
) -> dict[str, Any]:
    """Check and time everyone on a case."""
    batch = rounded(workload.make(case), dtype)
    some = batch.first(CHECKED)
    exact = accuracy.reference_of(some, active_rows(some))
    tensors = {name: torch.from_numpy(v).to(device, dtype).requires_grad_() for name, v in batch.pieces().items()}
    incoming = torch.from_numpy(batch.incoming).to(device, dtype)
    rows = [row for one in among for row in prepare(one, batch, exact, tensors, incoming, timer)]
    for _ in range(repeats):
        for row in rows:
            if "failed" not in row.results:
                attempt(row, lambda row=row: row.sample(timer))
    records = [row.record() for row in rows]
    compare(records)
    found = {"case": asdict(case) | {"name": case.name}, "dtype": str(dtype).removeprefix("torch.")}
    found |= {"active": exact.active, "margin": exact.margin, "rows": records}
    print("\n".join([title(found), *table(found)]), flush=True)
    return found


def rounded(batch: Batch, dtype: torch.dtype) -> Batch:
    """Return the batch as this dtype holds it, in float64: what is solved, and what the reference is of."""
    if dtype == torch.float64:
        return batch
    single = {k: v.astype(np.float32).astype(np.float64) for k, v in vars(batch).items() if k != "case"}
    return replace(batch, **single)


def prepare(
    one: Contender, batch: Batch, exact: Reference, tensors: dict[str, Tensor], incoming: Tensor, timer: Timer
) -> list[Row]:
    """Check a contender, which warms it up, and choose how often to call it in a repeat."""
    rows = [Row(one, mode) for mode in MODES]

    def check() -> None:
        one.load(tensors, incoming)
        answer, gradients = one.answer(), one.gradients()
        residual = accuracy.residuals(batch, answer)
        named = {name: array(v)[:CHECKED] for name, v in zip(tensors, gradients, strict=True)}
        wrong = accuracy.gradient_errors(named, exact.gradients)
        found = {
            "executor": answer.executor,
            "iterations": None if answer.iterations is None else float(np.mean(answer.iterations)),
            "residual": float(residual.max()),
            "residual_median": float(np.median(residual)),
            "gradient_errors": {name: float(error.max()) for name, error in wrong.items()},
        }
        for row in rows:
            row.results |= found

    for row in rows:
        attempt(row, check if row is rows[0] else lambda row=row: row.results.update(rows[0].results))
        if "failed" not in row.results:
            attempt(row, lambda row=row: row.sample(timer))
            row.inner = max(1, int(SAMPLE / max(row.wall[0], 1e-9))) if row.wall else 1
            row.device, row.wall = [], []
    return rows


def attempt(row: Row, what: Callable[[], object]) -> None:
    """Do something for a row. Whatever goes wrong (memory, a package that does not know the device) is its result."""
    try:
        what()
    except Exception as error:
        row.results["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def compare(records: list[dict[str, Any]]) -> None:
    """Add to each record its times over ours in the same mode."""
    ours = {row["mode"]: row for row in records if row["contender"] == OURS and "failed" not in row}
    for row in records:
        if "failed" not in row and row["mode"] in ours:
            for kind in ("device", "wall"):
                row[f"{kind}_ratio"] = row[f"{kind}_seconds"] / ours[row["mode"]][f"{kind}_seconds"]


DEMANDS = (
    ("forward, on the device, at most 1 ms", lambda at: at(REPLAYED, FORWARD) * 1e3, lambda v: v <= 1, "{:.3g} ms"),
    ("backward over forward, on the device, at most 0.1", lambda at: at(REPLAYED, BACKWARD) / at(REPLAYED, FORWARD),
     lambda v: v <= 0.1, "{:.3g}"),
    ("forward of the torch executor over ours, at least 10", lambda at: at(TORCH, FORWARD) / at(OURS, FORWARD),
     lambda v: v >= 10, "{:.3g}"),
    ("forward of qpth over ours, at least 50", lambda at: at(QPTH, FORWARD) / at(OURS, FORWARD),
     lambda v: v >= 50, "{:.3g}"),
)  # fmt: skip


def demands(measured: list[dict[str, Any]]) -> list[str]:
    """Return a line for each thing that is asked of batch 128, n = m = 100, float64: the figure, and if it holds."""
    wanted = [v for v in measured if v["case"]["name"] == "B128-n100-m100" and v["dtype"] == "float64"]
    lines = []
    for what, value, holds, shown in DEMANDS if wanted else ():
        times = {(row["contender"], row["mode"]): row.get("device_seconds") for row in wanted[0]["rows"]}
        try:
            found = value(lambda *key: times[key])  # noqa: B023
        except (KeyError, TypeError):
            lines.append(f"- {what}: not measured")
            continue
        lines.append(f"- {what}: {shown.format(found)}, {'holds' if holds(found) else 'does not hold'}")
    return lines


def title(measured: dict[str, Any]) -> str:
    case = Case(*(measured["case"][k] for k in ("batch", "n", "m", "p")))
    return f"### {case}, {measured['dtype']}\n"


def table(measured: dict[str, Any]) -> list[str]:
    """Return the rows of a case as Markdown."""
    lines = ["| who | mode | device | ratio | wall | ratio | spread | residual | gradient error | executor |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    for row in measured["rows"]:
        if "failed" in row:
            lines.append(f"| {row['contender']} | {row['mode']} | none: {row['failed']} | | | | | | | |")
            continue
        spread = max(row["device_spread"], row["wall_spread"])
        ratios = {kind: f"{row[f'{kind}_ratio']:.3g}" if f"{kind}_ratio" in row else "" for kind in ("device", "wall")}
        columns = (
            row["contender"], row["mode"], in_units(row["device_seconds"]), ratios["device"],
            in_units(row["wall_seconds"]), ratios["wall"], f"{spread:.0%}" + (" !" if spread > SPREAD else ""),
            f"{row['residual']:.0e}", f"{max(row['gradient_errors'].values()):.0e}", row["executor"],
        )  # fmt: skip
        lines.append(f"| {' | '.join(columns)} |")
    return lines


LEGEND = f"""\
Times are medians over interleaved repeats, of the whole batch: on the *device* between two of its events around several
calls in a row (what the device waits for the host counts), and on the *wall*. *ratio* is the time over that of `{OURS}`
in the same mode: above 1, diffopt is faster. *spread* is the interquartile range over the median, the larger of both;
above {SPREAD:.0%} it is marked with !. *residual* is the worst relative residual over the batch, recomputed in float64
from the data as the dtype holds them; *gradient error* is max abs(g - exact) / (1 + max abs(exact)), the worst over the
first {CHECKED} programs and over all pieces."""


def page(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    where = results["machine"]
    made = (
        f"{results['when']}, {where['device']}, {where['cpu']}, torch {where['torch']}, CUDA {where['cuda']}, "
        f"Python {where['python']}. Made by `make bench-cuda`."
    )
    asked = "## What is asked of batch 128, n = m = 100, float64"
    lines = ["# diffopt on a CUDA device", "", made, "", LEGEND, "", asked, ""]
    lines += results["demands"] or ["- not measured"]
    for measured in results["cases"]:
        lines += ["", title(measured), *table(measured)]
    lines += ["", "## Who", "", *(f"- {name}: {note}" for name, note in results["notes"].items())]
    return "\n".join(lines) + "\n"


def missing() -> str | None:
    """Return what is missing to measure anything, or ``None``."""
    if not torch.cuda.is_available():
        return "no CUDA device: torch finds none, and there is nothing to measure. Run it where there is one."
    reason = cuda_executor.get().launcher.missing()
    return None if reason is None else f"the CUDA executor {reason}"


def main(arguments: list[str] | None = None) -> None:
    cases = {case.name: case for case in CASES}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=cases, metavar="CASE", default=list(cases), help=" ".join(cases))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", default="cuda", help="name of the files in results/")
    options = parser.parse_args(arguments)
    reason = missing()
    if reason is not None:
        sys.exit(f"benchmarks.cuda: {reason}")
    write(options, torch.device("cuda"), CudaTimer(), [cases[name] for name in options.cases])


def write(options: argparse.Namespace, device: torch.device, timer: Timer, cases: list[Case]) -> None:
    """Measure all cases, and write the results."""
    among = contenders(device)
    measured = [
        measure(case, DTYPES[dtype], device, among, timer, options.repeats)
        for case in cases
        for dtype in options.dtypes
    ]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    results = {
        "when": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine() | {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda},
        "notes": {one.name: one.note for one in among},
        "demands": demands(measured),
        "cases": measured,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{options.output}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(page(results))
    print(*results["demands"], sep="\n")
    print("Wrote", os.path.relpath(path), os.path.relpath(path.with_suffix(".md")))


def array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Return a tensor as a float64 array."""
    return tensor.detach().double().cpu().numpy()


if __name__ == "__main__":
    main()
