"""Where the time goes, measured: ``make bench-profile``, or ``python -m benchmarks.profile --help``.

The CPU executor is compiled once more, with counters (``diffopt/solvers/cpu/profile.hpp``), into ``build/profile/``.
One process solves with it and another with the ordinary library, in turn, on one core. What is not spent in compiled
code is Python or torch's autograd. The timers' own cost is measured and taken off.

What is timed is a training step: a solve that keeps a record for its reverse pass, and the reverse pass for all data.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shlex
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

from benchmarks import pages, timing
from benchmarks.report import in_units
from benchmarks.timing import Effort
from benchmarks.workload import Case

if TYPE_CHECKING:
    from benchmarks.peers.diffopt_ import Diffopt

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "diffopt/solvers/cpu"
SIZES = ((10, 10, 0), (50, 50, 0), (100, 100, 0), (100, 100, 20), (200, 200, 0))
CASES = {case.name: case for batch in (1, 128) for case in (Case(batch, *sizes) for sizes in SIZES)}
EFFORT = Effort(few=5, usual=25, seconds=1.0, sample=0.01)
PYTHON, AUTOGRAD = "Python", "torch's autograd"
REST = "not attributed"
SMALL = 0.005
"""Shares of a column's time below which a phase has no row of its own on the page, if they are so in all columns."""


class Phase(NamedTuple):
    """What was counted in a phase: seconds without the timer's; how often it was left; flops and bytes, 0 if none."""

    name: str
    seconds: float
    times: float
    flops: float
    bytes: float


class Side(NamedTuple):
    """A solve or a reverse pass, per call: all seconds; those in torch's autograd, in timers, in compiled phases."""

    seconds: float
    autograd: float
    timers: float
    phases: list[Phase]

    def compiled(self) -> float:
        return sum(phase.seconds for phase in self.phases)

    def net(self) -> float:
        return self.seconds - self.timers

    def parts(self) -> list[Phase]:
        """Return all parts of the time but the timers': phases that were entered, then what is not compiled."""
        python = self.net() - self.compiled() - self.autograd
        return [
            *(phase for phase in self.phases if phase.times),
            Phase(PYTHON, python, 0, 0, 0),
            Phase(AUTOGRAD, self.autograd, 0, 0, 0),
        ]


class Sample(NamedTuple):
    """Seconds of a solve and of its reverse pass; without phases where the library does not count."""

    forward: Side
    backward: Side

    def seconds(self) -> float:
        return self.forward.seconds + self.backward.seconds


# ---- in the process that is measured ----------------------------------------------------------------------------


def sample(peer: Diffopt, inner: int) -> Sample:
    """Return where the time of a solve and its reverse pass goes, on average over ``inner`` of both."""
    import torch

    wanted = list(peer.leaves.values())

    def step() -> tuple[float, float]:
        start = perf_counter()
        x = peer.solve(peer.leaves)
        between = perf_counter()
        torch.autograd.grad(x, wanted, peer.incoming)
        return between - start, perf_counter() - between

    for _ in range(inner // 2 + 1):
        step()
    counters = _counters()
    _count(counters)  # (from zero)
    forward = backward = 0.0
    with _clocks() as spent:
        for _ in range(inner):
            solve, pull = step()
            forward += solve
            backward += pull
    phases = _count(counters)
    # In the reverse pass it is the other way round: our Python runs inside autograd.
    autograd = spent["apply"], backward - spent["backward"]
    at = next((i for i, (phase, _) in enumerate(phases) if phase.name.endswith("in the pullback")), len(phases))
    sides = [
        Side(
            seconds / inner,
            inside / inner,
            sum(timer for _, timer in counted) / inner,
            [Phase(p.name, *(v / inner for v in p[1:])) for p, _ in counted],
        )
        for seconds, inside, counted in zip((forward, backward), autograd, (phases[:at], phases[at:]), strict=True)
    ]
    return Sample(*sides)


@contextmanager
def _clocks() -> Iterator[dict[str, float]]:
    """Add up the seconds in autograd's way in, and in our reverse pass, which it calls."""
    from diffopt import implicit

    spent = {"apply": 0.0, "backward": 0.0}

    def timed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            start = perf_counter()
            found = function(*arguments)
            spent[name] += perf_counter() - start
            return found

        return run

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(implicit, "_apply", timed(implicit._apply, "apply")))
        backward = staticmethod(timed(implicit._Pulled.backward, "backward"))
        stack.enter_context(mock.patch.object(implicit._Pulled, "backward", backward))
        yield spent


def _counters() -> Callable[[int, Any], bytes | None] | None:
    """Return the function that reads the library's counters, or ``None`` if it has none."""
    from diffopt.solvers import library

    functions = library.load()
    if functions is None or not hasattr(functions, "diffopt_profile"):
        return None
    read = functions.diffopt_profile
    read.restype, read.argtypes = ctypes.c_char_p, [ctypes.c_int64, ctypes.c_void_p]
    return read


def _count(read: Callable[[int, Any], bytes | None] | None) -> list[tuple[Phase, float]]:
    """Return what was counted since the last time, and the seconds of the timer in it; what is outside left out."""
    found: list[tuple[Phase, float]] = []
    into = (ctypes.c_double * 5)()
    while read is not None and (name := read(len(found), into)) is not None:
        seconds, times, flops, size, timer = into
        found.append((Phase(name.decode(), seconds - times * timer, times, flops, size), times * timer))
    return found[1:]


# ---- the library with counters ----------------------------------------------------------------------------------


def compiled(variant: str, *options: str, folder: Path = ROOT / "build/profile") -> Path:
    """Compile a variant of the library with counters, unless it is newer than its sources."""
    target = folder / f"libdiffopt_cpu_{variant}.so"
    if target.is_file() and all(target.stat().st_mtime > source.stat().st_mtime for source in SOURCES.iterdir()):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    lines = [line.split() for line in (SOURCES / "variants.txt").read_text().splitlines() if not line.startswith("#")]
    flags = {name: rest for name, *rest in lines}
    print(f"Compiling {os.path.relpath(target)} (a minute or so) ...", flush=True)
    subprocess.run(
        [
            *shlex.split(os.environ.get("CXX", "c++")), *flags["all"], *flags[variant], *options, "-DDIFFOPT_PROFILE",
            "-fPIC", "-shared", "-pthread", str(SOURCES / "executor.cpp"), "-o", str(target),
        ],
        check=True,
    )  # fmt: skip
    return target


# ---- the report -------------------------------------------------------------------------------------------------


@dataclass
class Profile:
    """A case: the fastest samples of the ordinary library, and of the one with counters, of each side."""

    case: Case
    plain: Sample
    counted: Sample
    repeats: int


def main(arguments: list[str] | None = None) -> None:
    from benchmarks.run import RESULTS, machine
    from benchmarks.worker import Worker
    from diffopt.solvers import library

    options = _options(arguments)
    path = RESULTS / f"{options.output}.json"
    if options.read:
        results = joined([json.loads(file.read_text()) for file in options.read])
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(tell(results, path))
        return
    variant = library.variant()
    if variant is None:
        raise SystemExit("There is no compiled CPU executor to look into: `make cpu` first, with a C++ compiler.")
    library_path = compiled(variant)
    plain, counting = Worker("diffopt", 1), Worker("diffopt", 1, environment={"DIFFOPT_CPU_LIBRARY": str(library_path)})
    load, peaks, profiles = os.getloadavg()[0], [], []
    try:
        for name in options.cases:
            profiles.append(measure(CASES[name], plain, counting, options.effort))
            peaks.append(plain.peak())
        bandwidth = plain.bandwidth()
    finally:
        plain.close()
        counting.close()
    results = {
        "when": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine(),
        "variant": variant,
        "load_average": {"before": load, "after": os.getloadavg()[0]},
        "peak_gflops": max(peaks),
        "bandwidth": bandwidth,
        "profiles": [_record(profile) for profile in profiles],
    }
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(tell(results, path))


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return results that were measured in parts on one machine: the latest part's, with the cases of all."""
    return parts[-1] | {
        "peak_gflops": max(part["peak_gflops"] for part in parts),
        "bandwidth": {way: max(part["bandwidth"][way] for part in parts) for way in parts[-1]["bandwidth"]},
        "profiles": [record for part in parts for record in part["profiles"]],
    }


def tell(results: dict[str, Any], path: Path) -> str:
    """Write the report of results that lie at a path beside them, and on the page; return the tables."""
    profiles, peak = [_profile(record) for record in results["profiles"]], results["peak_gflops"]
    text = tables(profiles, peak)
    path.with_suffix(".md").write_text(f"# Where the time goes\n\n{_said(results)}\n\n{text}")
    picture = plot(profiles, peak, path.with_suffix(".png"))
    if path.stem == "profile":
        pages.write(pages.SPEED, "profile", f"{_said(results)}\n\n{for_page(profiles, peak)}")
        pages.show([picture])
    return f"{_said(results)}\n\n{text}"


def measure(case: Case, plain: Any, counting: Any, effort: Effort) -> Profile:
    """Sample two workers in turn, one with the ordinary library and one with counters."""
    samples: list[list[Sample]] = [[], []]
    for worker in (plain, counting):
        worker.load(case)
        worker.sample(1)
    seconds = plain.sample(1).seconds()
    inner = timing.calls_per_sample(seconds, effort)
    repeats = max(effort.few, min(effort.usual, int(effort.seconds / (seconds * inner))))
    for _ in range(repeats):
        for found, worker in zip(samples, (plain, counting), strict=True):
            found.append(worker.sample(inner))
    ordinary, counted = (
        Sample(*(min(side, key=Side.net) for side in zip(*found, strict=True))) for found in samples
    )  # fmt: skip
    return Profile(case, ordinary, counted, repeats)


def _record(profile: Profile) -> dict[str, Any]:
    def side(found: Side) -> dict[str, Any]:
        return found._asdict() | {"phases": [phase._asdict() for phase in found.phases if phase.times]}

    def both(found: Sample) -> dict[str, Any]:
        return {"forward": side(found.forward), "backward": side(found.backward)}

    return {
        "case": profile.case.name,
        "repeats": profile.repeats,
        "plain": both(profile.plain),
        "counted": both(profile.counted),
    }


def _profile(record: dict[str, Any]) -> Profile:
    def side(found: dict[str, Any]) -> Side:
        phases: Any = [Phase(**phase) for phase in found["phases"]]
        return Side(**found | {"phases": phases})

    plain, counted = (Sample(*map(side, record[name].values())) for name in ("plain", "counted"))
    return Profile(CASES[record["case"]], plain, counted, record["repeats"])


def tables(profiles: list[Profile], peak: float) -> str:
    """Return a table of the forward and one of the backward pass for each case."""
    lines = [
        "Shares are of the time of a call less that of the timers. Flops are those that are executed, in all lanes of",
        "registers, by the usual counts.",
        "",
    ]
    heads = ["phase", "share", "time", "flops", "GFLOP/s", "of the peak", "GB/s"]
    for profile in profiles:
        for name in ("forward", "backward"):
            side: Side = getattr(profile.counted, name)
            plain: Side = getattr(profile.plain, name)
            net = side.net()
            lines += [
                f"## {profile.case}: {name}",
                "",
                f"{in_units(net)}, and {in_units(side.timers)} of timers; {in_units(plain.seconds)} with the ordinary "
                "library.",
                "",
                pages.table(heads, [_row(phase, net, peak) for phase in side.parts()]),
            ]
    return "\n".join(lines)


def _row(phase: Phase, net: float, peak: float) -> list[str]:
    rate = phase.flops / phase.seconds / 1e9 if phase.flops else 0.0
    counted = [f"{phase.flops:.3g}", f"{rate:.3g}", f"{rate / peak:.1%}"] if phase.flops else ["", "", ""]
    return [
        phase.name, f"{phase.seconds / net:.1%}", in_units(phase.seconds), *counted,
        f"{phase.bytes / phase.seconds / 1e9:.3g}" if phase.bytes else "",
    ]  # fmt: skip


GROUPS = {
    "factorising": ("iterations: factorising",),
    "triangular solves": ("iterations: triangular",),
    "vectors, products": ("iterations",),
    "set-up": ("set-up",),
    "reading, scaling": ("data",),
    "polish, check": ("polish", "residual check"),
    "answer, record": ("answer",),
    PYTHON: (PYTHON,),
    AUTOGRAD: (AUTOGRAD,),
}
"""What the time is spent on: name, and how the phases in it begin; each belongs to the first that fits."""


def losses(side: Side, peak: float) -> dict[str, float]:
    """Return what shares of the time arithmetic at the peak would take, and what the rest is spent on."""
    net = side.net()
    found = {"at the peak": 0.0} | dict.fromkeys(GROUPS, 0.0) | {REST: 0.0}
    for phase in side.parts():
        group = next((name for name, starts in GROUPS.items() if phase.name.startswith(starts)), REST)
        ideal = phase.flops / peak / 1e9
        found["at the peak"] += ideal / net
        found[group] += (phase.seconds - ideal) / net
    return found


def for_page(profiles: list[Profile], peak: float) -> str:
    """Return the tables of the page."""
    spent = [losses(profile.counted.forward, peak) for profile in profiles]
    first = pages.table(
        ["batch, n, m, p", "forward", *spent[0]],
        [
            [_sizes(profile.case), in_units(profile.counted.forward.net())]
            + [f"{share:.1%}" for share in found.values()]
            for profile, found in zip(profiles, spent, strict=True)
        ],
    )
    return "\n".join([
        "The forward pass of a training step, one thread: the share of its time that its floating-point operations",
        "would take at the peak, and what the rest is spent on.",
        "",
        first,
        "Its phases: share of the time, and in brackets the share of the peak reached within.",
        "",
        _phases(profiles, "forward", lambda part: part.flops and f" ({part.flops / part.seconds / 1e9 / peak:.0%})"),
        "The reverse pass: share of the time, and in brackets the GB/s at which a phase writes gradients, or reads the",
        "record.",
        "",
        _phases(profiles, "backward", lambda part: part.bytes and f" ({part.bytes / part.seconds / 1e9:.2g})"),
    ])  # fmt: skip


def _phases(profiles: list[Profile], name: str, beside: Callable[[Phase], str | float]) -> str:
    """Return a table of all phases of a side, small ones together, against the cases."""
    columns: list[dict[str, str]] = []
    sides: list[Side] = [getattr(profile.counted, name) for profile in profiles]
    shares = [{phase.name: phase.seconds / side.net() for phase in side.parts()} for side in sides]
    order = list(dict.fromkeys(phase.name for side in sides for phase in side.phases))
    names = [part for part in (*order, PYTHON, AUTOGRAD) if any(found.get(part, 0.0) >= SMALL for found in shares)]
    for side, share in zip(sides, shares, strict=True):
        said = {phase.name: f"{share[phase.name]:.1%}{beside(phase) or ''}" for phase in side.parts()}
        rest = sum(value for part, value in share.items() if part not in names)
        columns.append({part: said.get(part, "") for part in names} | {"all others": f"{rest:.1%}"})
    for column, side, profile in zip(columns, sides, profiles, strict=True):
        plain: Side = getattr(profile.plain, name)
        column |= {"time": in_units(side.net()), "with the ordinary library": in_units(plain.seconds)}
    return pages.table(
        ["phase", *(_sizes(profile.case) for profile in profiles)],
        [[part, *(column[part] for column in columns)] for part in columns[0]],
    )


def plot(profiles: list[Profile], peak: float, path: Path) -> Path:
    """Draw what the time of the forward and the backward pass is spent on, a bar for each case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(2, 1, figsize=(12, 8), layout="constrained")
    labels = [f"B={p.case.batch}\nn=m={p.case.n}" + (f"\np={p.case.p}" if p.case.p else "") for p in profiles]
    forward = [losses(profile.counted.forward, peak) for profile in profiles]
    sides = [profile.counted.backward for profile in profiles]
    backward = [{phase.name: phase.seconds / s.net() for phase in s.parts()} for s in sides]
    colors = [f"C{index}" for index in (9, 1, 2, 3, 4, 5, 6, 8, 0)]  # (without its grey)
    fixed = {"at the peak": "black", PYTHON: "0.55", AUTOGRAD: "0.75", REST: "0.9"}
    for panel, shares, title in zip(panels, (forward, backward), ("forward", "backward"), strict=True):
        bottom = [0.0] * len(profiles)
        for index, name in enumerate(dict.fromkeys(name for found in shares for name in found)):
            heights = [100 * found.get(name, 0.0) for found in shares]
            panel.bar(labels, heights, bottom=bottom, label=name, color=fixed.get(name, colors[index % 9]), width=0.7)
            bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
        panel.set_ylabel("% of the time")
        panel.set_title(title)
        panel.tick_params(axis="x", labelsize=8)
        panel.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, reverse=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _sizes(case: Case) -> str:
    return f"{case.batch}, {case.n}, {case.m}, {case.p}"


def _said(results: dict[str, Any]) -> str:
    load, made = results["load_average"], results["machine"]
    ways = " and ".join(f"{way} at {rate:.3g} GB/s" for way, rate in results["bandwidth"].items())
    return (
        f"{results['when']}, {made['cpu']}, one core, variant `{results['variant']}`, load average "
        f"{load['before']:.1f} to {load['after']:.1f}. The peak is {results['peak_gflops']:.3g} GFLOP/s; memory beyond "
        f"the caches is {ways}."
    )


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter repeats")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=" ".join(CASES))
    parser.add_argument("--read", nargs="+", type=Path, metavar="FILE", help="tell of these results, all together")
    parser.add_argument("--output", help="name of the files in results/; default: profile, or profile-quick")
    options = parser.parse_args(arguments)
    options.effort = Effort(few=3, usual=9, seconds=0.3, sample=0.005) if options.quick else EFFORT
    options.output = options.output or ("profile-quick" if options.quick else "profile")
    return options


if __name__ == "__main__":
    main()
