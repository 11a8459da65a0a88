"""Where the time goes: the counters of the compiled executor, and that the ordinary library has none."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import profile, workload
from benchmarks.peers.diffopt_ import Diffopt
from benchmarks.profile import AUTOGRAD, PYTHON, REST, Phase, Profile, Sample, Side
from benchmarks.timing import Effort
from benchmarks.worker import Worker
from benchmarks.workload import Case

SMALL, LARGE = Case(5, 6, 8, 2), Case(4, 40, 36, 4)
"""Some of the small ones lie in lanes of registers, the last is solved alone, and large ones one at a time."""


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Sample]:
    path = profile.compiled("baseline", "-O0", folder=tmp_path_factory.mktemp("profile"))
    made = path.stat().st_mtime_ns
    assert profile.compiled("baseline", folder=path.parent) == path
    assert path.stat().st_mtime_ns == made  # as new as its sources
    worker = Worker("diffopt", 1, limit=600, environment={"DIFFOPT_CPU_LIBRARY": str(path)})
    found = {}
    try:
        for case in (SMALL, LARGE):
            worker.load(case)
            found[case] = worker.sample(20)
    finally:
        worker.close()
    return found


def ordinary(case: Case) -> Sample:
    peer = Diffopt(1)
    peer.load(workload.make(case))
    return profile.sample(peer, 2)


@pytest.mark.parametrize("case", [SMALL, LARGE], ids=["small", "large"])
def test_every_call_is_counted_with_its_flops_and_bytes(counted: dict[Case, Sample], case: Case) -> None:
    B, n, m, p = case.batch, case.n, case.m, case.p
    forward, backward = ({phase.name: phase for phase in side.phases} for side in counted[case])
    assert forward["set-up: factor of Q"].flops == pytest.approx(B * n**3 / 3)
    assert forward["set-up: G Q^-1 G'"].flops == pytest.approx(B * n * (m + p) ** 2)
    assert forward["data: reading the matrices"].bytes == pytest.approx(8 * B * n * (n + m + p))
    for name, size in (("Q", n * n), ("A", n * p), ("G", n * m)):
        assert backward[f"writing d{name}"].bytes == pytest.approx(8 * B * size)
    steps = forward["iterations: factorising it"]
    assert steps.flops == pytest.approx(steps.times * m**3 / 3 * (B / forward["set-up: factor of Q"].times), rel=0.3)
    # One solve with the factor for the predictor and one for the corrector.
    assert forward["iterations: triangular solves"].times == pytest.approx(2 * steps.times)
    entered = {phase.name for phase in (*forward.values(), *backward.values()) if phase.times}
    assert entered == {*forward, *backward} - {"general method"}
    assert all(phase.seconds > 0 for phase in (*forward.values(), *backward.values()) if phase.times)


def test_the_parts_are_all_of_the_time_and_little_is_not_attributed(counted: dict[Case, Sample]) -> None:
    for side, rest in zip(counted[LARGE], ("elsewhere in the call", "elsewhere in the pullback"), strict=True):
        parts = {phase.name: phase.seconds for phase in side.parts()}
        assert sum(parts.values()) == pytest.approx(side.net())
        assert min(parts.values()) > 0 and parts[PYTHON] > 0 and parts[AUTOGRAD] > 0
        assert parts[rest] < 0.2 * side.compiled()
        assert side.timers < 0.1 * side.compiled()
    # (Without optimisation a large solve is little else than compiled code.)
    assert counted[LARGE].forward.compiled() > 0.7 * counted[LARGE].forward.net()


def test_the_ordinary_library_has_no_counters() -> None:
    for side in ordinary(SMALL):
        assert side.phases == [] and side.timers == 0 and 0 < side.autograd < side.seconds


def test_nothing_is_left_of_the_markers_in_the_ordinary_library(tmp_path: Path) -> None:
    without = tmp_path / "cpu"
    shutil.copytree(profile.SOURCES, without)
    removed = 0
    for source in without.glob("*pp"):
        if source.name != "profile.hpp":
            text, count = re.subn(r"^ *PROFILE(_THEN)?\(.*\);$", "", source.read_text(), flags=re.MULTILINE)
            source.write_text(text.replace('#include "profile.hpp"\n', ""))
            removed += count
    assert removed > 30
    assert preprocessed(without) == preprocessed(profile.SOURCES)
    assert "Profiled" in "".join(preprocessed(profile.SOURCES, "-DDIFFOPT_PROFILE"))


def preprocessed(folder: Path, *options: str) -> list[str]:
    """Return the lines of the executor that the compiler sees, without empty statements."""
    compiler = [*shlex.split(os.environ.get("CXX", "c++")), "-std=c++17", "-E", "-P", *options]
    text = subprocess.run([*compiler, str(folder / "executor.cpp")], check=True, capture_output=True, text=True).stdout
    return [line for line in text.splitlines() if line.strip() not in ("", ";")]


def made(case: Case, seconds: float) -> Profile:
    solve = [
        Phase("elsewhere in the call", 0.01 * seconds, 1, 0, 0),
        Phase("set-up: factor of Q", 0.2 * seconds, 1, 0.1 * seconds * 1e10, 0),
        Phase("iterations: factorising it", 0.3 * seconds, 7, 0.2 * seconds * 1e10, 0),
        Phase("general method", 0.0, 0, 0, 0),
        Phase("answer: clearing it", 0.001 * seconds, 1, 0, 0),
    ]
    pull = [Phase("writing dQ", 0.5 * seconds, 1, 0, 0.5 * seconds * 2e9)]
    counted = Sample(Side(1.1 * seconds, 0.1 * seconds, 0.1 * seconds, solve), Side(seconds, 0.2 * seconds, 0.0, pull))
    plain = Sample(*(side._replace(phases=[], timers=0.0) for side in counted))
    return Profile(case, plain, counted, 3)


def test_what_the_rest_is_spent_on() -> None:
    spent = profile.losses(made(SMALL, 1.0).counted.forward, 10.0)
    assert sum(spent.values()) == pytest.approx(1.0)
    expected = {"at the peak": 0.3, "set-up": 0.1, "factorising": 0.1, AUTOGRAD: 0.1, REST: 0.01}
    assert {name: spent[name] for name in expected} == pytest.approx(expected)


def test_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [replace(case, batch=1) for case in (SMALL, LARGE)]
    monkeypatch.setattr(profile, "CASES", {case.name: case for case in cases})
    parts: list[dict[str, Any]] = [
        {
            "when": "now", "machine": {"cpu": "a"}, "variant": "avx2", "load_average": {"before": 0.0, "after": 1.0},
            "peak_gflops": peak, "bandwidth": {"read": 15.0 - peak, "written": 4.0},
            "profiles": [profile._record(made(case, 0.25))],
        }
        for case, peak in zip(cases, (10.0, 9.0), strict=True)
    ]  # fmt: skip
    results = profile.joined(parts)
    text = profile.tell(results, tmp_path / "other.json")
    assert "The peak is 10 GFLOP/s" in text and "read at 6 GB/s and written at 4 GB/s" in text
    assert "| iterations: factorising it | 30.0% | 75 ms | 5e+08 | 6.67 | 66.7% |  |" in text
    assert text.count("writing dQ | 50.0% | 125 ms |") == 2
    assert text in (tmp_path / "other.md").read_text() and (tmp_path / "other.png").stat().st_size > 1000
    page = profile.for_page([profile._profile(record) for record in results["profiles"]], 10.0)
    assert "| iterations: factorising it | 30.0% (67%) | 30.0% (67%) |" in page
    assert "| writing dQ | 50.0% (2) | 50.0% (2) |" in page
    assert "answer: clearing it" not in page and "| all others | 0.1% | 0.1% |" in page


def test_the_fastest_sample_of_each_side_counts() -> None:
    class Scripted:
        def __init__(self, *seconds: tuple[float, float]) -> None:
            self.left = list(seconds)

        def load(self, case: Case) -> None: ...

        def sample(self, inner: int) -> Sample:
            forward, backward = self.left.pop(0)
            return Sample(made(SMALL, forward).counted.forward, made(SMALL, backward).counted.backward)

    plain, counting = Scripted((9, 9), (9, 9), (3, 5), (2, 4), (4, 3)), Scripted((9, 9), (7, 8), (6, 9), (8, 9))
    found = profile.measure(SMALL, plain, counting, Effort(few=3))
    assert (found.plain.forward.net(), found.plain.backward.net()) == (2, 3)
    assert (found.counted.forward.net(), found.counted.backward.net()) == (6, 8) and found.repeats == 3
