"""Tables and plots of results: ``python -m benchmarks.report benchmarks/results/optnet.json`` makes them anew."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import pages
from benchmarks.timing import SPREAD
from benchmarks.workload import Case

LEGEND = f"""\
Times are medians over interleaved repeats, of the whole batch. *spread* is the interquartile range over the
median; a row above {SPREAD:.0%} after extra repeats is marked with !. *ratio* is the time over diffopt's in the same
mode: above 1, diffopt is faster. *residual* is the worst relative residual of the optimality conditions over the
batch, recomputed from the data. *gradient error* is max |g - exact| / (1 + max |exact|), the worst over the
instances and over the pieces (Q, q, A, b, G, h); the piece is named where it alone is bad, with the error of the
others; *median* is over the instances, of the worst piece. A peer that would take long solves the first programs
of the batch only, as many as its row says, and its time is scaled to the batch. Peers without gradients run in a
Python loop over NumPy data that lie ready in the form that they want. Every peer is bound to as many cores as it has
threads, and its OpenMP threads wait passively. Quick calls are warm: some are made untimed before each repeat."""


def tables(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    machine = results["machine"]
    lines = [
        "# diffopt beside others on random dense programs",
        "",
        f"{results['when']}, {machine['cpu']}, {machine['cores']} cores, {machine['system']}, "
        f"Python {machine['python']}. Made by `make bench`.",
        "",
        LEGEND,
    ]
    for run in results["runs"]:
        load, threads = run["load_average"], run["threads"]
        lines += [
            "",
            f"## {threads} thread{'s' if threads > 1 else ''}",
            "",
            f"Load average {load['before']:.2f} before and {load['after']:.2f} after; a 1500 x 1500 matrix product "
            f"reaches {run['peak_gflops']:.0f} GFLOP/s (the peak below).",
        ]
        for case in run["cases"]:
            lines += ["", f"### {Case(*(case['case'][k] for k in ('batch', 'n', 'm', 'p')))}", ""]
            lines += [*_table(case), "", *_remarks(case)]
    lines += ["", "## Peers", "", "| peer | how it was set |", "| --- | --- |"]
    lines += [f"| {peer} | {note} |" for peer, note in results["notes"].items()]
    lines += ["", "Versions: " + ", ".join(f"{k} {v}" for k, v in results["versions"].items()) + "."]
    return "\n".join(lines) + "\n"


def _table(case: dict[str, Any]) -> Iterable[str]:
    yield "| peer | mode | time | repeats | spread | ratio | residual | gradient error | median |"
    yield "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    for row in case["rows"]:
        if "failed" in row:
            yield f"| {row['peer']} | {row['mode']} | none: {row['failed']} | | | | | | |"
            continue
        spread = f"{row['spread']:.0%}" + (" !" if row["spread"] > SPREAD else "") if row["repeats"] > 1 else ""
        ratio = f"{row['ratio']:.3g}" if "ratio" in row else ""
        part = "" if row["programs"] == case["case"]["batch"] else f"({row['programs']} programs) "
        columns = (
            row["peer"], row["mode"], part + in_units(row["seconds"]), row["repeats"], spread, ratio,
            f"{row['residual']:.0e}", _gradient_error(row),
            f"{row['gradient_error_median']:.0e}" if "gradient_errors" in row else "",
        )  # fmt: skip
        yield f"| {' | '.join(map(str, columns))} |"


def _gradient_error(row: dict[str, Any]) -> str:
    if "gradient_errors" not in row:
        return ""
    (piece, worst), *others = sorted(row["gradient_errors"].items(), key=lambda item: -item[1])
    if others and worst > 100 * max(others[0][1], 1e-12):
        return f"{worst:.0e} in {piece}, else {others[0][1]:.0e}"
    return f"{worst:.0e}"


def _remarks(case: dict[str, Any]) -> Iterable[str]:
    """What there is to say about our own rows."""
    yield (
        f"{case['active']:.0%} of the inequalities are active; the smallest multiplier or slack of the batch "
        f"is {case['margin']:.0e}."
    )
    for peer in dict.fromkeys(row["peer"] for row in case["rows"] if row["peer"].startswith("diffopt")):
        ours = {row["mode"]: row for row in case["rows"] if row["peer"] == peer and "seconds" in row}
        if not ours:
            continue
        forward = ours["forward"]
        parts = [
            f"backward of {what} takes 1/{forward['seconds'] / ours[mode]['seconds']:.3g} of forward"
            for mode, what in (("backward", "all"), ("backward, q only", "q alone"))
            if mode in ours
        ]
        if "gflops" in forward:
            share = forward["share_of_peak"]
            parts.append(
                f"{forward['iterations']:.1f} iterations, {forward['gflops']:.3g} GFLOP/s, {share:.1%} of the peak"
            )
        yield f"{peer} ({forward.get('executor', '')}): {'; '.join(parts)}."


RIGHT = 1e-3
"""Gradient error up to which a peer counts as differentiable in the short table: above, its gradient is wrong."""


def for_page(results: dict[str, Any]) -> str:
    """Return a short table: diffopt beside the fastest others of each case."""
    machine = results["machine"]
    lines = []
    for run in results["runs"]:
        for case in run["cases"]:
            modes = {
                mode: [row for row in case["rows"] if row["mode"] == mode and "seconds" in row]
                for mode in ("forward", "forward+backward", "backward", "backward, q only")
            }
            ours = {mode: next((r for r in rows if r["peer"] == "diffopt"), None) for mode, rows in modes.items()}
            forward, both = ours["forward"], ours["forward+backward"]
            if forward is None or both is None:
                continue
            others = [r for r in modes["forward"] if not r["peer"].startswith("diffopt")]
            right = [
                r for r in modes["forward+backward"]
                if not r["peer"].startswith("diffopt") and max(r["gradient_errors"].values()) <= RIGHT
            ]  # fmt: skip
            shares = [
                f"1/{forward['seconds'] / back['seconds']:.3g}" if back else ""
                for back in (ours["backward"], ours["backward, q only"])
            ]
            sizes = ", ".join(str(case["case"][k]) for k in ("batch", "n", "m", "p"))
            lines.append([
                sizes, str(run["threads"]), in_units(forward["seconds"]), _beside(others, forward),
                in_units(both["seconds"]), _beside(right, both), *shares, f"{forward.get('share_of_peak', 0):.1%}",
            ])  # fmt: skip
    heads = [
        "batch, n, m, p", "threads", "forward", "fastest other", "forward and backward",
        "fastest other with right gradients", "backward / forward", "with q alone", "of the peak",
    ]  # fmt: skip
    loads = ", ".join(f"{r['load_average']['before']:.1f} to {r['load_average']['after']:.1f}" for r in results["runs"])
    said = f"{results['when']}, {machine['cpu']}, {machine['cores']} cores, load average {loads}."
    return f"{said}\n\n{pages.table(heads, lines)}"


def _beside(rows: list[dict[str, Any]], ours: dict[str, Any]) -> str:
    if not rows:
        return "none"
    best = min(rows, key=lambda row: row["seconds"])
    return f"{best['peer']} {in_units(best['seconds'])} ({best['seconds'] / ours['seconds']:.3g} times ours)"


def summary(case: Case, workers: Iterable[str], rows: list[dict[str, Any]], seconds: float) -> str:
    """Return a line per peer for the terminal."""
    lines = [f"{case} ({seconds:.0f} s)"]
    for peer in workers:
        parts = []
        for row in (row for row in rows if row["peer"] == peer):
            if "failed" in row:
                parts.append(f"{row['mode']}: none, {row['failed']}")
                continue
            error = f", gradient error {_gradient_error(row)}" if "gradient_errors" in row else ""
            residual = f", residual {row['residual']:.0e}" if row["mode"] == "forward" else ""
            parts.append(f"{row['mode']} {in_units(row['seconds'])} (±{row['spread']:.0%}){residual}{error}")
        lines.append(f"  {peer:16} " + "; ".join(parts))
    return "\n".join(lines)


def plots(results: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """Draw the time per program against the cases, a picture for each number of threads."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    paths = []
    for run in results["runs"]:
        cases = run["cases"]
        labels = [_label(case["case"]) for case in cases]
        figure, panels = plt.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
        for panel, mode in zip(panels, ("forward", "forward+backward"), strict=True):
            for index, peer in enumerate(results["notes"]):
                points = [
                    (place, row["seconds"] / case["case"]["batch"])
                    for place, case in enumerate(cases)
                    for row in case["rows"]
                    if row["peer"] == peer and row["mode"] == mode and "seconds" in row
                ]
                if not points:
                    continue
                own = peer.startswith("diffopt")
                panel.plot(
                    *zip(*points, strict=True),
                    label=peer,
                    color="black" if own else f"C{index % 10}",
                    linestyle="--" if own and peer != "diffopt" else "-",
                    linewidth=2.5 if own else 1.2,
                    marker="o" if own else "osv^D<>Pp*hX"[index % 12],
                    markersize=5,
                    zorder=3 if own else 2,
                )
            panel.set_yscale("log")
            panel.set_xticks(range(len(labels)), labels, fontsize=8)
            panel.set_title(mode)
            panel.grid(True, which="major", alpha=0.3)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
        panels[0].set_ylabel("seconds per program")
        threads = run["threads"]
        figure.suptitle(f"{threads} thread{'s' if threads > 1 else ''}, float64, {results['machine']['cpu']}")
        paths.append(folder / f"{name}-{threads}-thread{'s' if threads > 1 else ''}.png")
        figure.savefig(paths[-1], dpi=110)
        plt.close(figure)
    return paths


def _label(case: dict[str, Any]) -> str:
    equalities = f"\np={case['p']}" if case["p"] else ""
    return f"B={case['batch']}\nn={case['n']}\nm={case['m']}{equalities}"


def in_units(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


if __name__ == "__main__":
    source = Path(sys.argv[1])
    read = json.loads(source.read_text())
    source.with_suffix(".md").write_text(tables(read))
    pictures = plots(read, source.parent, source.stem)
    if source.stem == "optnet":
        pages.write(pages.SPEED, "peers", for_page(read))
        pages.show(pictures)
