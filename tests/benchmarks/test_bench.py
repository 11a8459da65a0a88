"""What can be wrong in the benchmarks: workload, accuracy, statistics, counts, tables. No peer is needed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import diffopt
from benchmarks import accuracy, report, run, scaling, timing, warm_start, workload
from benchmarks.accuracy import Answer
from benchmarks.peers import PEERS
from benchmarks.peers.base import LoopPeer
from benchmarks.peers.diffopt_ import Diffopt, active_rows
from benchmarks.timing import Effort, Samples
from benchmarks.worker import PeerFailed, Worker
from benchmarks.workload import Batch, Case

CASE = Case(3, 6, 8, 2)
SMALL = Effort(few=2, usual=2, most=2, seconds=0.0, sample=0.0)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return workload.make(CASE)


@pytest.fixture(scope="module")
def exact(batch: Batch) -> accuracy.Reference:
    return accuracy.reference_of(batch, active_rows(batch))


@pytest.fixture(scope="module")
def found(batch: Batch) -> diffopt.Solution:
    data: dict[str, Any] = {name: torch.from_numpy(piece) for name, piece in batch.pieces().items()}
    return diffopt.solve_qp(**data)


def test_the_workload_is_the_same_each_time_and_a_small_batch_begins_a_large_one(batch: Batch) -> None:
    again, more = workload.make(CASE), workload.make(replace(CASE, batch=5))
    for name in (*workload.PIECES, "incoming"):
        assert np.array_equal(getattr(again, name), getattr(batch, name))
        assert np.array_equal(getattr(more.first(3), name), getattr(batch, name))
    assert more.first(3).case == CASE
    assert not np.array_equal(workload.make(CASE, seed=1).Q, batch.Q)


def test_the_workload_has_the_stated_shapes_and_is_strictly_convex_and_feasible(batch: Batch) -> None:
    B, n, m, p = CASE.batch, CASE.n, CASE.m, CASE.p
    shapes = {"Q": (B, n, n), "q": (B, n), "A": (B, p, n), "b": (B, p), "G": (B, m, n), "h": (B, m)}
    assert {name: piece.shape for name, piece in batch.pieces().items()} == shapes
    assert np.array_equal(batch.Q, batch.Q.swapaxes(-1, -2))
    assert (np.linalg.eigvalsh(batch.Q) > 9e-4).all()
    assert batch.nbytes() == 8 * sum(int(np.prod(shape)) for shape in shapes.values())
    assert set(workload.make(replace(CASE, p=0)).pieces()) == {"Q", "q", "G", "h"}


def test_about_half_of_the_constraints_are_active() -> None:
    batch = workload.make(Case(16, 20, 20))
    assert 0.35 < (active_rows(batch) > 0).mean() < 0.65


def test_residuals_are_the_documented_ones(batch: Batch, found: diffopt.Solution) -> None:
    exact = Answer(found.x.numpy(), found.nu.numpy(), found.lam.numpy())
    assert (accuracy.residuals(batch, exact) <= 1e-12).all()
    random = np.random.default_rng(0)
    x, nu, lam = (v + 1e-3 * random.random(v.shape) for v in (exact.x, exact.nu, exact.lam))
    got = accuracy.residuals(batch, Answer(x, nu, lam))
    for i in range(CASE.batch):
        Qx, Ax, Gx = batch.Q[i] @ x[i], batch.A[i] @ x[i], batch.G[i] @ x[i]
        pull, push = batch.A[i].T @ nu[i], batch.G[i].T @ lam[i]
        primal = max(abs(Ax - batch.b[i]).max(), (Gx - batch.h[i]).max(), 0)
        primal /= 1 + max(abs(v).max() for v in (Ax, batch.b[i], Gx, batch.h[i]))
        dual = abs(Qx + batch.q[i] + pull + push).max()
        dual /= 1 + max(abs(v).max() for v in (Qx, batch.q[i], pull, push))
        terms = [x[i] @ Qx, batch.q[i] @ x[i], batch.b[i] @ nu[i], batch.h[i] @ lam[i]]
        gap = abs(sum(terms)) / (1 + max(map(abs, terms)))
        assert got[i] == pytest.approx(max(primal, dual, gap), rel=1e-12)


def test_a_negative_multiplier_and_a_nan_are_seen(batch: Batch, found: diffopt.Solution) -> None:
    x, nu, lam = (v.numpy().copy() for v in (found.x, found.nu, found.lam))
    row = int(np.argmin(lam[0]))
    lam[0, row] = -1.0
    x[1, 0] = np.nan
    worst = accuracy.residuals(batch, Answer(x, nu, lam))
    assert worst[0] > 1e-2 and worst[1] == np.inf and worst[2] < 1e-12


def test_the_reference_is_a_solution_and_its_gradients_are_those_of_central_differences(
    batch: Batch, exact: accuracy.Reference
) -> None:
    assert exact.margin > 0 and 0 < exact.active < 1
    random, step = np.random.default_rng(0), 1e-6

    def value(data: dict[str, Any], i: int) -> float:
        one: dict[str, Any] = {name: torch.from_numpy(piece[i]) for name, piece in data.items()}
        return float(diffopt.solve_qp(**one).x.numpy() @ batch.incoming[i])

    for name, piece in batch.pieces().items():
        direction = random.standard_normal(piece.shape)
        if name == "Q":
            direction = direction + direction.swapaxes(-1, -2)
        for i in range(CASE.batch):
            ends = [value(batch.pieces() | {name: piece + sign * step * direction}, i) for sign in (1, -1)]
            slope = (ends[0] - ends[1]) / (2 * step)
            assert (exact.gradients[name][i] * direction[i]).sum() == pytest.approx(slope, rel=1e-4, abs=1e-6), name


def test_a_wrong_active_set_is_refused(batch: Batch) -> None:
    lam = active_rows(batch).copy()
    lam[1, np.argmax(lam[1])] = 0.0
    with pytest.raises(ValueError, match="instance 1 has another active set"):
        accuracy.reference_of(batch, lam)


def test_gradient_errors_compare_the_symmetric_part_of_q(exact: accuracy.Reference) -> None:
    skew = np.random.default_rng(0).standard_normal(exact.gradients["Q"].shape)
    got = exact.gradients | {"Q": exact.gradients["Q"] + skew - skew.swapaxes(-1, -2)}
    assert max(error.max() for error in accuracy.gradient_errors(got, exact.gradients).values()) < 1e-14
    wrong = accuracy.gradient_errors(
        got | {"h": exact.gradients["h"] * np.array([[1], [2], [np.nan]])}, exact.gradients
    )
    largest = np.abs(exact.gradients["h"][1]).max()
    assert wrong["h"][1] == pytest.approx(largest / (1 + largest)) and wrong["h"][2] == np.inf
    with pytest.raises(ValueError, match="shape"):
        accuracy.errors(got["h"][:, :1], exact.gradients["h"])


def test_median_and_spread() -> None:
    samples = Samples(seconds=[1.0, 2.0, 3.0, 4.0, 100.0])
    assert samples.median() == 3.0
    assert samples.spread() == pytest.approx(2 / 3)
    assert Samples(seconds=[2.0]).spread() == 0.0


def test_a_row_is_repeated_until_it_is_steady_or_the_time_is_up() -> None:
    effort = Effort(few=3, usual=5, most=10, seconds=10.0, patience=2.0, slow=30.0)
    steady, noisy = [1.0, 1.0, 1.0], [1.0, 2.0, 1.0]
    assert Samples(seconds=steady[:2]).want_more(effort)
    assert Samples(seconds=steady).want_more(effort)  # few, not yet the usual number
    assert not Samples(seconds=[1.0] * 5).want_more(effort)
    assert Samples(seconds=noisy * 2).want_more(effort)
    assert not Samples(seconds=noisy * 4).want_more(effort)  # the most
    assert not Samples(seconds=[5.0, 9.0, 5.0, 9.0]).want_more(effort)  # no patience
    assert not Samples(seconds=[31.0]).want_more(effort)  # so slow that even few are too many
    assert not Samples(inner=31, seconds=[1.0]).want_more(effort)
    assert timing.calls_per_sample(0.001, replace(effort, sample=0.0035)) == 4
    assert timing.calls_per_sample(1.0, effort) == 1


def test_slow_peers_get_a_part_of_the_batch() -> None:
    effort = Effort(seconds=1.0, slow=4.0)
    assert timing.part_of(128, 0.03, effort) == 128
    assert timing.part_of(128, 0.05, effort) == 20
    assert timing.part_of(128, 3.0, effort) == 8
    assert timing.part_of(4, 3.0, effort) == 4


def test_duration_is_that_of_one_call() -> None:
    calls: list[int] = []
    assert 0 <= timing.duration(lambda: calls.append(0), 5) < 1
    assert len(calls) == 5 + 2  # two to warm up
    assert timing.duration(lambda: time.sleep(0.01), 1) >= 0.01


def test_flops_of_a_case_by_hand() -> None:
    # c = 4: 8/3 + 16 + 32 + 4, then three factors of 8/3 and two iterations of 24
    assert timing.flops(2, 2, 1, 2) == pytest.approx(8 / 3 + 16 + 32 + 4 + 8 + 48)


class Exact(LoopPeer):
    """A peer for this test, without a process: diffopt, one instance at a time."""

    name, package, note = "exact", "none", ""

    def prepare(self, batch: Batch, index: int) -> Any:
        return {name: torch.from_numpy(piece[index]) for name, piece in batch.pieces().items()}

    def solve_one(self, data: Any) -> tuple[Any, Any]:
        found = diffopt.solve_qp(**data)
        return found.x.numpy(), torch.cat([found.nu, found.lam]).numpy()


class InProcess:
    """Has the methods of a `Worker`, in this process."""

    def __init__(self, peer: str) -> None:
        self.peer = PEERS[peer](1)

    def load(self, case: Case) -> None:
        self.peer.load(workload.make(case))

    def answer(self) -> Answer:
        return self.peer.answer()

    def gradients(self, mode: str) -> Any:
        return self.peer.gradients(getattr(self.peer, run.MODES[mode])())

    def time(self, mode: str, inner: int) -> float:
        if mode in run.ALONE:
            assert isinstance(self.peer, Diffopt)
            return self.peer.backward_seconds("q only" in mode, inner)
        return timing.duration(getattr(self.peer, run.MODES[mode]), inner)


class Broken(Exact):
    name = "broken"

    def load(self, batch: Batch) -> None:
        raise PeerFailed("it has no licence")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, exact: accuracy.Reference) -> Iterator[dict[str, Any]]:
    monkeypatch.setitem(PEERS, "exact", Exact)
    monkeypatch.setitem(PEERS, "broken", Broken)
    workers: Any = {name: InProcess(name) for name in ("diffopt", "exact", "broken")}
    yield run.measure(CASE, workers, exact, SMALL)


def test_every_row_has_its_time_and_its_accuracy(measured: dict[str, Any]) -> None:
    rows = {(row["peer"], row["mode"]): row for row in measured["rows"]}
    assert set(rows) == {
        *(("diffopt", mode) for mode in (*run.MODES, *run.ALONE)), ("exact", run.FORWARD), ("broken", run.FORWARD)
    }  # fmt: skip
    assert rows["broken", run.FORWARD]["failed"] == "it has no licence"
    for (peer, mode), row in rows.items():
        if peer == "broken":
            continue
        assert row["seconds"] > 0 and row["repeats"] == 2 and row["residual"] < 1e-9 and row["x_error"] < 1e-9
        assert ("gradient_error" in row) == (mode != run.FORWARD)
    assert rows["diffopt", run.BOTH]["gradient_error"] < 1e-9
    assert set(rows["diffopt", run.BOTH]["gradient_errors"]) == set(workload.PIECES)
    assert set(rows["diffopt", run.Q_ONLY]["gradient_errors"]) == {"q"}
    assert rows["diffopt", run.FORWARD]["ratio"] == 1.0 and rows["exact", run.FORWARD]["ratio"] > 0
    assert rows["diffopt", run.FORWARD]["flops"] > 0


def test_a_part_of_the_batch_is_scaled_to_all_of_it() -> None:
    row = run.Row("peer", run.FORWARD, Samples(seconds=[1.0]), {"programs": 8, "flops": 3.0})
    record = row.record(128)
    assert record["seconds"] == 16.0 and record["flops"] == 48.0


def test_ours_is_repeated_more_often() -> None:
    effort = Effort(few=2, usual=5, seconds=1.0)
    for peer, more in (("diffopt", True), ("qpth", False)):
        assert run.Row(peer, run.FORWARD, Samples(seconds=[0.5] * 3)).want_more(effort) == more


def test_tables_and_plots(measured: dict[str, Any], tmp_path: Path) -> None:
    ours = next(row for row in measured["rows"] if "flops" in row)
    ours |= {"gflops": 1.0, "share_of_peak": 0.5}
    measured["rows"][1]["gradient_errors"]["G"] = 0.5
    results = {
        "when": "now",
        "machine": {"cpu": "a processor", "cores": 2, "system": "Linux", "python": "3"},
        "versions": {"torch": "2"},
        "notes": {"diffopt": "as it is", "exact": ""},
        "runs": [{
            "threads": 1, "peak_gflops": 10.0, "load_average": {"before": 0.0, "after": 1.0}, "cases": [measured]
        }],
    }  # fmt: skip
    text = report.tables(results)
    assert "none: it has no licence" in text and "5e-01 in G, else" in text and "50.0% of the peak" in text
    assert "backward of q alone takes 1/" in text
    for path in report.plots(results, tmp_path, "optnet"):
        assert path.stat().st_size > 1000
    assert [path.name for path in report.plots(results, tmp_path, "optnet")] == ["optnet-1-thread.png"]


def test_the_report_of_scaling(tmp_path: Path) -> None:
    point = {"case": {"batch": 1, "n": 10, "m": 10, "p": 0}, "threads": 1, "spread": 0.1}
    times = [
        point | {"series": name, "mode": mode, "seconds": 0.01 * k, "case": point["case"] | {name: k}}
        for name in scaling.SERIES for mode in (run.FORWARD, run.BOTH) for k in (1, 2)
    ]  # fmt: skip
    memory = [
        {"case": point["case"], "mode": run.FORWARD, "data_bytes": 2**20, "extra_bytes": 2**21, "ratio": 2.0},
        {"case": point["case"], "mode": run.BOTH, "failed": "no memory"},
    ]
    results = {"when": "now", "machine": {"cpu": "a", "cores": 2}, "times": times, "memory": memory}
    text = scaling.table(results)
    assert "1 MiB | 2 MiB | 2.00" in text and "no memory" in text
    assert scaling.plot(results, tmp_path / "scaling.png").stat().st_size > 1000
    assert scaling.slope([(1, 1), (10, 3), (20, 12)]) == pytest.approx(2.0)


def test_the_rows_of_the_warm_start(capsys: pytest.CaptureFixture[str]) -> None:
    warm_start.sequence("small", warm_start.workload(3, 6, 8, 2), 0.01, 4, 2)
    warm_start.training(2, 1)
    small, training = capsys.readouterr().out.splitlines()
    assert small.startswith("small ") and "100 %" in small and small.endswith(" 0.00")
    assert training.startswith("training")


def test_a_worker_answers_as_the_peer_does_and_says_why_it_cannot() -> None:
    worker = Worker("diffopt", 1)
    try:
        worker.start()
        worker.load(CASE)
        assert worker.time(run.FORWARD, 1) > 0
        assert worker.answer().x.shape == (CASE.batch, CASE.n)
        with pytest.raises(PeerFailed, match="KeyError"):
            worker.time("no such mode", 1)
        with pytest.raises(PeerFailed, match="unknown question"):
            worker._ask("no such question")
        assert worker.time("backward", 1) > 0
        worker.limit = 0.0
        with pytest.raises(PeerFailed, match="no answer within"):
            worker.time(run.FORWARD, 50)
    finally:
        worker.close()
    worker.close()  # twice does no harm
