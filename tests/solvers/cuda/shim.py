"""The CUDA kernels compiled by a host compiler behind ``shim.hpp``, so that their logic is tested without a GPU."""

from __future__ import annotations

import ctypes
import hashlib
import os
import struct
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from diffopt.solvers.cuda_executor import SOURCES, Launcher, Shape

HERE = Path(__file__).parent
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ("-std=c++20", "-pthread", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")


def build(source: Path, output: str, *flags: str, kernels: Path = SOURCES) -> Path:
    """Compile a file with the kernels' text; what was compiled before from the same text is found again."""
    text = b"".join(path.read_bytes() for path in sorted([*kernels.glob("*.cu*"), *HERE.glob("*.?pp")]))
    name = hashlib.sha256(text + repr((COMPILER, flags, source.name)).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"diffopt-cuda-shim-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    target = folder / f"{name}-{output}"
    if not target.exists():
        # Another process may be at it, too: whoever is last replaces the same file by itself.
        partial = target.with_suffix(f".{os.getpid()}")
        command = [COMPILER, *FLAGS, *flags, f"-I{kernels}", f"-I{HERE}", str(source), "-o", str(partial)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:5000]
        partial.replace(target)
    return target


@cache
def library(real: str, warp: int) -> ctypes.CDLL:
    """Return the kernels for a dtype, with that many lanes in a warp."""
    flags = ("-O1", "-fPIC", "-shared", f"-DDIFFOPT_REAL={real}", f"-DDIFFOPT_WARP={warp}")
    loaded = ctypes.CDLL(str(build(HERE / "entry.cpp", f"{real}{warp}.so", *flags)))
    longs = ctypes.POINTER(ctypes.c_longlong)
    loaded.shim_launch.argtypes = [ctypes.c_char_p, *[ctypes.c_longlong] * 3, ctypes.c_char_p, ctypes.c_longlong]
    loaded.shim_launch.restype = ctypes.c_int
    loaded.shim_sizes.argtypes = [*[ctypes.c_int] * 7, longs]
    return loaded


class ShimLauncher(Launcher):
    """Runs the kernels on CPU tensors, in blocks and warps of a few threads.

    Args:
        warp: lanes of a warp. 1: everything runs in one thread, which is fast.
        warps: warps of a block in the variants that have a block for each problem.
        limit: bytes of shared memory.
        blocks: how many run at a time.
    """

    device_type = "cpu"

    def __init__(self, warp: int = 1, warps: int = 1, limit: int = 227 * 1024, blocks: int = 2) -> None:
        self.warp, self.warps, self.limit, self.blocks = warp, warps, limit, blocks

    def missing(self) -> str | None:
        """See `Launcher`."""
        return None

    def shared_bytes(self, device: torch.device) -> int:
        """See `Launcher`."""
        return self.limit

    def at_a_time(self, device: torch.device, shape: Shape) -> int:
        """See `Launcher`."""
        return self.blocks

    def launch(
        self, kernel: str, like: Tensor, grid: int, threads: int, shared: int, arguments: list[int | float]
    ) -> None:
        """See `Launcher`; a block that has one problem gets the threads of ``warps``."""
        if not kernel.endswith("warp"):
            threads = self.warp * self.warps
        elif self.warp == 1:
            # A lone thread has no barrier to wait at: one problem a block, one block after the other.
            grid, shared, threads = grid * threads, shared // threads, 1
        words = b"".join(struct.pack("d" if isinstance(v, float) else "q", v) for v in arguments)
        loaded = library("float" if like.dtype == torch.float32 else "double", self.warp)
        count = loaded.shim_launch(kernel.encode(), grid, threads, shared, words, len(arguments))
        assert count == len(arguments), f"{kernel} takes {count} arguments, got {len(arguments)}"
