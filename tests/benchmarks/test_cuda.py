"""The benchmark of the CUDA executor, as far as it goes without a device: its logic, on the CPU with our own clock."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import diffopt
from benchmarks import accuracy, cuda, workload
from benchmarks.accuracy import Answer
from benchmarks.cuda import BACKWARD, BOTH, FORWARD, OURS, QPTH, REPLAYED, TORCH, Contender, Row, Timer
from benchmarks.workload import Case

CPU = torch.device("cpu")
CASE = Case(3, 6, 5, 2)
ROOT = Path(__file__).resolve().parents[2]


class Clock(Timer):
    """Calls everything once, and says that it took as long as we like."""

    def __init__(self, *seconds: float) -> None:
        self.seconds, self.calls = list(seconds), 0

    def time(self, call: Callable[[], object], inner: int, before: Callable[[], object] | None = None) -> list[float]:
        self.calls += 1
        if before is not None:
            before()
        call()
        wall = self.seconds[self.calls % len(self.seconds)]
        return [wall / 2, wall]


class Broken(Contender):
    name, note = "broken", ""

    def solve(self) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate much")

    def answer(self) -> Answer:
        raise NotImplementedError


class Careless(cuda.Ours):
    """Wrong in the solution, and in one gradient."""

    def answer(self) -> Answer:
        found = super().answer()
        return Answer(found.x + 1e-3, found.nu, found.lam)

    def gradients(self) -> tuple[Tensor, ...]:
        first, *others = super().gradients()
        return (2 * first, *others)


def rows_of(measured: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    return {row["mode"]: row for row in measured["rows"] if row["contender"] == name}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_measured_on_the_cpu(dtype: torch.dtype) -> None:
    careless = Careless("careless", "", diffopt.Settings())
    clock = Clock(1.0)
    among = [*cuda.contenders(CPU)[:2], careless, Broken()]
    measured = cuda.measure(CASE, dtype, CPU, among, clock, repeats=2)
    assert measured["case"]["name"] == "B3-n6-m5-p2" and measured["dtype"] == str(dtype)[6:]
    for name in (OURS, TORCH):
        rows = rows_of(measured, name)
        assert list(rows) == [FORWARD, BACKWARD, BOTH]
        for row in rows.values():
            assert row["device_seconds"] == 0.5 and row["wall_seconds"] == 1.0 and row["repeats"] == 2
            assert row["device_ratio"] == row["wall_ratio"] == 1.0 and row["wall_spread"] == 0.0
            limit = 1e-9 if dtype == torch.float64 else 1e-5
            assert row["residual"] <= limit and max(row["gradient_errors"].values()) <= limit
            assert set(row["gradient_errors"]) == set("QqAbGh") and row["iterations"] > 0
    assert {row["executor"] for row in measured["rows"] if "executor" in row} >= {"cpu:dual", "torch:dual"}
    wrong = rows_of(measured, "careless")[FORWARD]
    assert wrong["residual"] > 1e-6 and wrong["gradient_errors"]["Q"] > 1e-2 > wrong["gradient_errors"]["q"]
    for row in rows_of(measured, "broken").values():
        assert row["failed"].startswith("NotImplementedError") and "wall_seconds" not in row
    text = "\n".join(cuda.table(measured))
    assert text.count("\n") == 1 + 4 * 3 and "| broken | forward | none: NotImplementedError" in text


def test_a_repeat_takes_a_while() -> None:
    batch = workload.make(CASE)
    exact = accuracy.reference_of(batch, cuda.active_rows(batch))
    tensors = {name: torch.from_numpy(v).requires_grad_() for name, v in batch.pieces().items()}
    incoming = torch.from_numpy(batch.incoming)
    for seconds, calls in ((cuda.SAMPLE / 10, 10), (10.0, 1)):
        for row in cuda.prepare(cuda.contenders(CPU)[0], batch, exact, tensors, incoming, Clock(seconds)):
            assert row.inner == calls and row.wall == row.device == []


def test_out_of_memory_is_a_result() -> None:
    row = Row(Broken(), FORWARD)
    cuda.attempt(row, Broken().solve)
    assert row.results == {"failed": "OutOfMemoryError: CUDA out of memory."} and "failed" in row.record()


def test_medians_spreads_and_ratios() -> None:
    row = Row(cuda.contenders(CPU)[0], FORWARD, {"residual": 0.0}, 4, [1.0, 2.0, 9.0], [2.0, 4.0, 6.0])
    record = row.record()
    assert record["device_seconds"] == 2.0 and record["wall_seconds"] == 4.0 and record["wall_spread"] == 0.5
    other = record | {"contender": TORCH, "device_seconds": 30.0, "wall_seconds": 20.0}
    records = [record, other, record | {"mode": BOTH, "contender": TORCH}]
    cuda.compare(records)
    assert other["device_ratio"] == 15.0 and other["wall_ratio"] == 5.0 and "wall_ratio" not in records[2]


def test_float32_is_measured_against_what_it_holds() -> None:
    batch = workload.make(CASE)
    single = cuda.rounded(batch, torch.float32)
    assert np.array_equal(single.Q, batch.Q.astype(np.float32).astype(np.float64)) and single.Q.dtype == np.float64
    assert single.case == CASE and cuda.rounded(batch, torch.float64) is batch
    assert not np.array_equal(single.q, batch.q)


def measured_as(**seconds: float) -> list[dict[str, Any]]:
    """Return what `measure` would, with times by contender and mode, as in ``graph_forward``."""
    names = {"ours": OURS, "graph": REPLAYED, "torch": TORCH, "qpth": QPTH}
    rows = [
        {"contender": names[key.split("_")[0]], "mode": key.split("_")[1], "device_seconds": value}
        for key, value in seconds.items()
    ]
    return [{"case": {"name": "B128-n100-m100"}, "dtype": "float64", "rows": rows}]


def test_what_is_asked() -> None:
    times = dict(graph_forward=0.9e-3, graph_backward=0.05e-3, ours_forward=1e-3, torch_forward=12e-3)
    lines = cuda.demands(measured_as(**times, qpth_forward=40e-3))
    assert [line.rpartition(": ")[2] for line in lines] == [
        "0.9 ms, holds",
        "0.0556, holds",
        "12, holds",
        "40, does not hold",
    ]
    lines = cuda.demands(measured_as(**times | {"graph_forward": 2e-3, "graph_backward": 1e-3}))
    assert [line.rpartition(": ")[2] for line in lines[:2]] == ["2 ms, does not hold", "0.5, does not hold"]
    assert lines[3].endswith("not measured")
    assert cuda.demands([]) == [] == cuda.demands([measured_as()[0] | {"dtype": "float32"}])


def test_results_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "RESULTS", tmp_path)
    options = argparse.Namespace(dtypes=["float64"], repeats=1, output="some")
    cuda.write(options, CPU, Timer(), [CASE])
    written = json.loads((tmp_path / "some.json").read_text())
    assert written["machine"]["device"] == "cpu" and written["demands"] == []
    text = (tmp_path / "some.md").read_text()
    assert "### batch 3, n = 6, m = 5, p = 2, float64" in text and "- not measured" in text
    assert all(f"| {row['contender']} | {row['mode']} |" in text for row in written["cases"][0]["rows"])
    assert all(row["wall_seconds"] > 0 for row in written["cases"][0]["rows"] if "failed" not in row)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.cuda"], cwd=ROOT, env={"PYTHONPATH": "."}, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("benchmarks.cuda: no CUDA device: torch finds none")
    script = ROOT / "tests/solvers/cuda/sanitize.sh"
    done = subprocess.run(["sh", script], cwd=ROOT, env={"PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("make sanitize-cuda: no CUDA device: torch finds none")
