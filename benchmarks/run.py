"""Measure all peers side by side: ``make bench``, or ``python -m benchmarks.run --help``.

Every peer has a process of its own, with as many threads as asked (and bound to as many cores). For each
repeat the peers are asked in turn, so that whatever else the machine does, it does to all of them. Every
row is checked: residuals of its solutions, and its gradients against an exact reference.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import numpy as np

from benchmarks import accuracy, pages, report, timing, workload
from benchmarks.accuracy import Answer, Reference
from benchmarks.peers import PEERS
from benchmarks.peers.diffopt_ import active_rows
from benchmarks.timing import QUICK, Effort, Samples
from benchmarks.worker import ALONE, MODES, PeerFailed, Worker
from benchmarks.workload import CASES, Array, Batch, Case

RESULTS = Path(__file__).parent / "results"
OURS = "diffopt"
FORWARD, BOTH, Q_ONLY = MODES
ENOUGH = 32
"""Programs that show how fast a peer made for batches is, where they are large."""

PAUSE = 0.01
"""Seconds between two peers: until the threads of the one before have gone to sleep."""

QUICK_CASES = ("B1-n10-m10", "B128-n10-m10", "B128-n50-m50", "B1-n100-m100")


@dataclass
class Row:
    """One peer in one mode on one case."""

    peer: str
    mode: str
    samples: Samples = field(default_factory=Samples, repr=False)
    results: dict[str, Any] = field(default_factory=dict)

    def want_more(self, effort: Effort) -> bool:
        """Return whether to repeat once more: ours longer, since all ratios are to it."""
        if self.peer == OURS:
            effort = replace(effort, few=effort.usual, seconds=3 * effort.seconds)
        return self.samples.want_more(effort)

    def record(self, batch: int) -> dict[str, Any]:
        """Return what is written into the results: ``seconds`` are of the whole batch."""
        if "failed" not in self.results:
            scale = batch / self.results["programs"]
            if "flops" in self.results:
                self.results["flops"] *= scale
            self.results |= {
                "seconds": self.samples.median() * scale,
                "spread": self.samples.spread(),
                "repeats": len(self.samples.seconds),
                "calls_per_repeat": self.samples.inner,
            }
        return {"peer": self.peer, "mode": self.mode, **self.results}


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    effort = QUICK if options.quick else Effort()
    references = {case: _reference(case) for case in options.cases}
    results = {
        "when": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine(),
        "versions": versions(options.peers),
        "notes": {name: PEERS[name].note for name in options.peers},
        "effort": asdict(effort),
        "runs": [run(threads, options.cases, options.peers, references, effort) for threads in options.threads],
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{options.output}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(report.tables(results))
    plots = report.plots(results, RESULTS, options.output)
    if options.output == "optnet":
        pages.write(pages.SPEED, "peers", report.for_page(results))
        pages.show(plots)
    print("Wrote", *(os.path.relpath(p) for p in (path, path.with_suffix(".md"), *plots)))


def run(
    threads: int, cases: list[Case], peers: list[str], references: dict[Case, Reference], effort: Effort
) -> dict[str, Any]:
    """Measure all cases with a number of threads."""
    workers = {name: Worker(name, threads) for name in peers}
    meter = Worker(OURS, threads)
    for worker in workers.values():
        worker.start()
    try:
        peaks, load, start = [meter.peak()], os.getloadavg()[0], perf_counter()
        measured = []
        for case in cases:
            measured.append(measure(case, workers, references[case], effort))
            peaks.append(meter.peak())
        peak, seconds = max(peaks), perf_counter() - start
    finally:
        for worker in (*workers.values(), meter):
            worker.close()
    for case in measured:
        for row in case["rows"]:
            if "flops" in row:
                row["gflops"] = row["flops"] / row["seconds"] / 1e9
                row["share_of_peak"] = row["gflops"] / peak
    return {
        "threads": threads,
        "peak_gflops": peak,
        "load_average": {"before": load, "after": os.getloadavg()[0]},
        "seconds": seconds,
        "cases": measured,
    }


def measure(case: Case, workers: dict[str, Worker], exact: Reference, effort: Effort) -> dict[str, Any]:
    """Check and time every peer on a case."""
    batch = workload.make(case)
    start = perf_counter()
    rows: list[Row] = []
    for name, worker in workers.items():
        rows += prepare(name, worker, batch, exact, effort)
    going = [row for row in rows if "failed" not in row.results and row.want_more(effort)]
    while going:
        for row in going:
            sleep(PAUSE)
            try:
                row.samples.seconds.append(workers[row.peer].time(row.mode, row.samples.inner))
            except PeerFailed as error:
                row.results["failed"] = str(error)
        going = [row for row in going if "failed" not in row.results and row.want_more(effort)]
    records = [row.record(case.batch) for row in rows]
    _compare(records)
    print(report.summary(case, workers, records, perf_counter() - start), flush=True)
    return {
        "case": asdict(case) | {"name": case.name},
        "active": exact.active,
        "margin": exact.margin,
        "rows": records,
    }


def prepare(name: str, worker: Worker, batch: Batch, exact: Reference, effort: Effort) -> list[Row]:
    """Load a peer, check what it returns, warm it up, and choose how often to call it."""
    modes = [FORWARD, BOTH] if PEERS[name].differentiable else [FORWARD]
    if name == OURS:
        modes += [Q_ONLY, *ALONE]
    try:
        part = part_for(name, worker, batch.case, effort)
        worker.load(part)
        found = worker.answer()
        batch, exact = batch.first(part.batch), exact.first(part.batch)
        solved = {"programs": part.batch} | check_answer(found, batch, exact)
    except PeerFailed as error:
        return [Row(name, FORWARD, results={"failed": str(error)})]
    rows = [Row(name, mode, results=dict(solved)) for mode in modes]
    for row in rows:
        try:
            if row.mode == FORWARD:
                row.results |= work(found, batch.case) if name.startswith(OURS) else {}
            else:
                row.results |= check_gradients(worker.gradients(ALONE.get(row.mode, row.mode)), exact)
            seconds = worker.time(row.mode, 1)
            if seconds < effort.seconds:  # (the first call is slower than those that are counted)
                seconds = min(worker.time(row.mode, 1) for _ in range(3))
            row.samples.inner = timing.calls_per_sample(seconds, effort)
            if seconds > effort.seconds:  # too slow to be called without need; the check has warmed it up
                row.samples.seconds.append(seconds)
        except PeerFailed as error:
            row.results["failed"] = str(error)
    return rows


def part_for(name: str, worker: Worker, case: Case, effort: Effort) -> Case:
    """Return the case, or where the peer is slow the first programs of it. Ours is always measured in full."""
    batched = PEERS[name].batched
    few = replace(case, batch=ENOUGH if batched else 2)
    if name == OURS or case.batch <= few.batch or case.batch * case.n**2 < 1e6:
        return case
    worker.load(few)
    worker.time(FORWARD, 1)
    each = worker.time(FORWARD, 1) / few.batch
    if batched:  # a small batch would be unfair to it
        return few if case.batch * each > 3 * effort.slow else case
    return replace(case, batch=timing.part_of(case.batch, each, effort))


def check_answer(found: Answer, batch: Batch, exact: Reference) -> dict[str, Any]:
    """Return the accuracy of solutions: the worst over the batch, and the median."""
    residual, x = accuracy.residuals(batch, found), accuracy.errors(found.x, exact.x)
    return {
        "residual": float(residual.max()),
        "residual_median": float(np.median(residual)),
        "x_error": float(x.max()),
        "x_error_median": float(np.median(x)),
    }


def check_gradients(found: dict[str, Array], exact: Reference) -> dict[str, Any]:
    """Return the accuracy of gradients: the worst over the batch per piece and over all, and the median."""
    wrong = accuracy.gradient_errors(found, exact.gradients)
    worst = {piece: float(error.max()) for piece, error in wrong.items()}
    return {
        "gradient_errors": worst,
        "gradient_error": max(worst.values()),
        "gradient_error_median": max(float(np.median(error)) for error in wrong.values()),
    }


def work(found: Answer, case: Case) -> dict[str, Any]:
    """Return what one of our own solves did."""
    assert found.iterations is not None
    return {
        "executor": found.executor,
        "iterations": float(np.mean(found.iterations)),
        "flops": sum(timing.flops(case.n, case.m, case.p, int(k)) for k in found.iterations),
    }


def machine() -> dict[str, Any]:
    """Return what the times depend on."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name)
    return {"cpu": name, "cores": os.cpu_count(), "system": platform.system(), "python": platform.python_version()}


def versions(peers: list[str]) -> dict[str, str]:
    """Return the versions of the peers' packages and of what they stand on."""
    import diffopt

    found = {"diffopt-torch": diffopt.__version__}
    for package in ("torch", "numpy", "jax", "cvxpy", "diffcp", *(PEERS[name].package for name in peers)):
        try:
            found.setdefault(package, metadata.version(package))
        except metadata.PackageNotFoundError:
            found.setdefault(package, "not installed")
    return found


def _compare(records: list[dict[str, Any]]) -> None:
    """Add to each record its time over ours in the same mode."""
    ours = {row["mode"]: row["seconds"] for row in records if row["peer"] == OURS and "seconds" in row}
    for row in records:
        if "seconds" in row and row["mode"] in ours:
            row["ratio"] = row["seconds"] / ours[row["mode"]]


def _reference(case: Case) -> Reference:
    batch = workload.make(case)
    return accuracy.reference_of(batch, active_rows(batch))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    cores = os.cpu_count() or 1
    cases = {case.name: case for case in CASES}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"fewer repeats, and the cases {' '.join(QUICK_CASES)}")
    parser.add_argument("--cases", nargs="+", choices=cases, metavar="CASE", help=" ".join(cases))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER", help=str(list(PEERS)))
    parser.add_argument("--threads", nargs="+", type=int, help="default: 1, and all cores")
    parser.add_argument("--output", help="name of the files in results/; default: optnet, or optnet-quick")
    options = parser.parse_args(arguments)
    options.cases = [cases[name] for name in options.cases or (QUICK_CASES if options.quick else cases)]
    options.threads = options.threads or sorted({1, cores})
    options.output = options.output or ("optnet-quick" if options.quick else "optnet")
    return options


if __name__ == "__main__":
    main()
