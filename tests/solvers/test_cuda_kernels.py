"""The CUDA kernels' text: it compiles for a GPU within its registers, and its barriers order what they have to."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from diffopt.solvers.cuda_executor import KERNELS, SOURCES
from solvers.cuda.shim import HERE, build

REGISTERS = 128
"""A thread's share of a multiprocessor's 65,536 registers where two blocks of 256 threads run on it."""

SPILLS = {"block": 0, "warp": 16, "large": 32}
"""Bytes that a function may spill. None of the loops does: those that do run once a problem, or in the large variant
(whose addresses take two registers each) a few times an iteration."""

ALWAYS = {("diffopt_solve_block", "double"), ("diffopt_pullback_large", "double")}
CASES = [
    pytest.param(kernel, real, marks=[] if (kernel, real) in ALWAYS else pytest.mark.slow)
    for kernel in KERNELS
    for real in ("double", "float")
]


@pytest.mark.parametrize(("kernel", "real"), CASES)
def test_compiles_without_spills(tmp_path: Path, kernel: str, real: str) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc, the CUDA compiler")
    command = [nvcc, "-std=c++17", "-arch=sm_90", "--ptxas-options=-v", "-cubin", f"-DDIFFOPT_REAL={real}"]
    command += [f"-DDIFFOPT_ONLY={1 << KERNELS.index(kernel)}", str(SOURCES / "kernels.cu"), "-o", str(tmp_path / "o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = done.stderr
    assert "warning" not in report and f"entry function '{kernel}'" in report
    (registers,) = re.findall(r"Used (\d+) registers", report)
    assert int(registers) <= REGISTERS
    spills = [int(v) for v in re.findall(r"(\d+) bytes spill", report)]
    assert spills and max(spills) <= SPILLS[kernel.rpartition("_")[2]], report


RACE = 66
"""What a program exits with after the sanitizer has reported a race."""


def run(kernels: Path, real: str = "double") -> subprocess.CompletedProcess[str]:
    # The sanitizer does not know fences, and std::barrier's own atomics do without.
    flags = ("-O1", "-g", "-fsanitize=thread", "-Wno-tsan", f"-DDIFFOPT_REAL={real}", "-DDIFFOPT_WARP=4")
    program = build(HERE / "race.cpp", f"race_{real}", *flags, kernels=kernels)
    return subprocess.run([str(program)], capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("real", ["double", "float"])
def test_no_race(real: str) -> None:
    done = run(SOURCES, real)
    assert done.returncode == 0, done.stderr[:5000]
    assert done.stdout == "solved\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("dense.cuh", "team.sync();  // the trailing update reads other threads' rows"),
        ("kkt.cuh", "    team.sync();\n    times(team, F.V"),
        ("setup.cuh", "team.sync();  // W takes the place of L"),
        ("kernels.cu", "            team.sync(); /* the next problem"),
        ("setup.cuh", " + place * far(z)"),
    ],
    ids=["cholesky", "kkt", "overlay", "next", "workspace"],
)
def test_what_is_missing_is_reported(tmp_path: Path, name: str, needed: str) -> None:
    """A barrier, or a workspace for each team."""
    kernels = shutil.copytree(SOURCES, tmp_path / "kernels")
    text = (kernels / name).read_text()
    assert text.count(needed) == 1
    less = needed.replace("team.sync();", "").replace("+ place", "+ 0 * place")
    (kernels / name).write_text(text.replace(needed, less))
    done = run(kernels)
    assert done.returncode == RACE and "data race" in done.stderr
