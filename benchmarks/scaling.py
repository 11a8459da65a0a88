"""How the time of diffopt grows, and how much memory it takes: ``make bench-scaling``.

Time against batch, n, m, p and threads, forward and forward+backward; most resident memory of a large batch
of small programs and of a batch of large ones, relative to the size of their data (Linux only).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import pages, timing
from benchmarks.run import BOTH, FORWARD, OURS, RESULTS, machine, versions
from benchmarks.timing import QUICK, Effort, Samples
from benchmarks.worker import PeerFailed, Worker
from benchmarks.workload import Case

SERIES: dict[str, list[Case]] = {
    "batch": [Case(batch, 10, 10) for batch in (1, 4, 16, 64, 256, 1024, 4096, 16384)],
    "n": [Case(32, n, 50) for n in (10, 20, 50, 100, 200)],
    "m": [Case(32, 50, m) for m in (10, 20, 50, 100, 200)],
    "p": [Case(32, 100, 50, p) for p in (0, 10, 20, 40, 80)],
}
"""What grows, and the cases in which it does."""

MEMORY = [Case(100_000, 10, 10), Case(128, 200, 200)]


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    effort = QUICK if options.quick else Effort()
    results: dict[str, Any] = {
        "when": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine(),
        "versions": versions([OURS]),
        "times": [point for name in SERIES for point in times(name, options.threads, options.largest, effort)],
        "memory": [],
    }
    if sys.platform == "linux":
        cases = [replace(case, batch=min(case.batch, options.largest)) for case in MEMORY]
        results["memory"] = [memory(case, mode) for case in cases for mode in (FORWARD, BOTH)]
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{options.output}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(results))
    picture = plot(results, path.with_suffix(".png"))
    if options.output == "scaling":
        pages.write(pages.SPEED, "memory", pages.table(MEMORY_HEADS, memory_rows(results)))
        pages.show([picture])
    print("Wrote", *(os.path.relpath(p) for p in (path, path.with_suffix(".md"), picture)))


def times(series: str, threads: list[int], largest: int, effort: Effort) -> list[dict[str, Any]]:
    """Time one series, the numbers of threads in turn on each case."""
    workers = {count: Worker(OURS, count) for count in threads}
    points = []
    try:
        for case in (case for case in SERIES[series] if case.batch <= largest):
            rows = {(count, mode): Samples() for count in threads for mode in (FORWARD, BOTH)}
            for count, worker in workers.items():
                worker.load(case)
                for mode in (FORWARD, BOTH):
                    worker.time(mode, 1)
                    rows[count, mode].inner = timing.calls_per_sample(worker.time(mode, 1), effort)
            going = list(rows)
            while going:
                for key in going:
                    rows[key].seconds.append(workers[key[0]].time(key[1], rows[key].inner))
                going = [key for key in going if rows[key].want_more(effort)]
            for (count, mode), samples in rows.items():
                found = {"seconds": samples.median(), "spread": samples.spread(), "repeats": len(samples.seconds)}
                points.append({"series": series, "case": asdict(case), "threads": count, "mode": mode, **found})
                print(f"{series:6} {case}, {count} threads, {mode}: {samples.median() * 1e3:.3g} ms", flush=True)
    finally:
        for worker in workers.values():
            worker.close()
    return points


def memory(case: Case, mode: str) -> dict[str, Any]:
    """Return how much memory solving a case takes beside its data. A process of its own, and one thread."""
    worker = Worker(OURS, 1, limit=300.0)
    found: dict[str, Any] = {"case": asdict(case), "mode": mode}
    try:
        data, extra = worker.memory(case, mode)
        found |= {"data_bytes": data, "extra_bytes": extra, "ratio": extra / data}
        print(f"memory {case}, {mode}: {extra / 2**20:.0f} MiB beside {data / 2**20:.0f} MiB of data", flush=True)
    except PeerFailed as error:
        found["failed"] = str(error)
        print(f"memory {case}, {mode}: {error}", flush=True)
    finally:
        worker.close()
    return found


def slope(points: list[tuple[float, float]]) -> float:
    """Return the exponent of growth between the two largest points."""
    (x0, y0), (x1, y1) = points[-2:]
    return float(np.log(y1 / y0) / np.log(x1 / x0))


def table(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    made = results["machine"]
    lines = [
        "# How diffopt grows",
        "",
        f"{results['when']}, {made['cpu']}, {made['cores']} cores. Made by `make bench-scaling`.",
        "",
        "| series | batch | n | m | p | threads | mode | time | spread |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: |",
    ]
    for point in results["times"]:
        sizes = " | ".join(str(point["case"][name]) for name in ("batch", "n", "m", "p"))
        lines.append(
            f"| {point['series']} | {sizes} | {point['threads']} | {point['mode']} | "
            f"{point['seconds'] * 1e3:.3g} ms | {point['spread']:.0%} |"
        )
    lines += ["", "Most resident memory beside the data (gradients of the data are as large as the data):", ""]
    return "\n".join(lines) + "\n" + pages.table(MEMORY_HEADS, memory_rows(results))


MEMORY_HEADS = ["batch", "n", "m", "mode", "data", "beside it", "ratio"]


def memory_rows(results: dict[str, Any]) -> Iterator[list[str]]:
    """Return the rows of the table of memory."""
    for point in results["memory"]:
        head = [*(str(point["case"][name]) for name in ("batch", "n", "m")), point["mode"]]
        if "failed" in point:
            yield [*head, point["failed"], "", ""]
            continue
        data, extra = point["data_bytes"] / 2**20, point["extra_bytes"] / 2**20
        yield [*head, f"{data:.0f} MiB", f"{extra:.0f} MiB", f"{point['ratio']:.2f}"]


def plot(results: dict[str, Any], path: Path) -> Path:
    """Draw the series, a panel each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(SERIES), figsize=(4 * len(SERIES), 4), layout="constrained")
    for panel, name in zip(panels, SERIES, strict=True):
        points = [point for point in results["times"] if point["series"] == name]
        for index, threads in enumerate(sorted({point["threads"] for point in points})):
            for mode, line in ((FORWARD, "-"), (BOTH, "--")):
                drawn = [
                    (point["case"][name], point["seconds"])
                    for point in points
                    if point["threads"] == threads and point["mode"] == mode
                ]
                label = f"{mode}, {threads} thread{'s' if threads > 1 else ''}"
                if len(drawn) > 1 and drawn[-2][0]:
                    label += f" (^{slope(drawn):.1f})"
                panel.plot(*zip(*drawn, strict=True), line, marker="o", markersize=4, color=f"C{index}", label=label)
        panel.set_yscale("log")
        panel.set_xscale("linear" if name == "p" else "log")
        panel.set_xlabel(name)
        fixed = {k: v for k, v in asdict(SERIES[name][0]).items() if k != name}
        panel.set_title(", ".join(f"{k} = {v}" for k, v in fixed.items()), fontsize=9)
        panel.grid(True, alpha=0.3)
        panel.legend(fontsize=7)
    panels[0].set_ylabel("seconds for the batch")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats, and batches of at most 1024")
    parser.add_argument("--threads", nargs="+", type=int, help="default: 1, and all cores")
    parser.add_argument("--largest", type=int, help="the largest batch")
    parser.add_argument("--output", help="name of the files in results/; default: scaling, or scaling-quick")
    options = parser.parse_args(arguments)
    options.threads = options.threads or sorted({1, os.cpu_count() or 1})
    options.largest = options.largest or (1024 if options.quick else 100_000)
    options.output = options.output or ("scaling-quick" if options.quick else "scaling")
    return options


if __name__ == "__main__":
    main()
