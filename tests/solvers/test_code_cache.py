"""Compiled kernels are kept on disk: found again, never the wrong ones, and never a reason to fail."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from diffopt.solvers import code_cache, cuda_executor

KEY = [b"source", b"sm_90"]


class Compiler:
    """Counts how often it is asked, and makes something else each time."""

    def __init__(self) -> None:
        self.made: list[bytes] = []

    def __call__(self, *arguments: object) -> bytes:
        self.made.append(b"code %d" % len(self.made) * 1000)
        return self.made[-1]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIFFOPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_was_compiled_once_is_found_again(place: Path) -> None:
    make = Compiler()
    first = code_cache.get(KEY, make)
    assert code_cache.get(iter(KEY), make) == first and len(make.made) == 1
    (file,) = place.iterdir()
    assert file.suffix == ".cubin" and file.stat().st_size == len(first) + 32
    if os.name == "posix":
        assert place.stat().st_mode & 0o077 == 0  # nobody else's code is run


@pytest.mark.parametrize("key", [[b"source", b"sm_80"], [b"sources", b"m_90"], [b"source", b"sm_90", b""]])
def test_another_key_is_another_code(place: Path, key: list[bytes]) -> None:
    make = Compiler()
    assert code_cache.get(KEY, make) != code_cache.get(key, make)
    assert len(list(place.iterdir())) == 2


@pytest.mark.parametrize("harm", ["cut", "changed", "empty", "only the digest"])
def test_a_damaged_file_is_made_anew(place: Path, harm: str) -> None:
    make = Compiler()
    code_cache.get(KEY, make)
    (file,) = place.iterdir()
    content = file.read_bytes()
    harmed = {"cut": content[:-1], "changed": content[:-1] + b"x", "empty": b"", "only the digest": content[:32]}
    file.write_bytes(harmed[harm])
    assert code_cache.get(KEY, make) == make.made[1]
    assert code_cache.get(KEY, make) == make.made[1] and len(make.made) == 2  # and is whole again


@pytest.fixture(params=["a file in its place", "a file in its way", "a folder of its name", "no room"])
def useless(request: pytest.FixtureRequest, place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "a file in its place":
        place.write_text("")
    elif request.param == "a file in its way":
        place.write_text("")
        monkeypatch.setenv("DIFFOPT_CACHE", str(place / "below"))
    elif request.param == "a folder of its name":
        code_cache.get(KEY, Compiler())
        (file,) = place.iterdir()
        file.unlink()
        (file / "full").mkdir(parents=True)
    else:
        monkeypatch.setattr(os, "replace", _no_room)
    yield
    assert not list(place.glob("*.part"))


def _no_room(*paths: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.usefixtures("useless")
def test_a_useless_folder_does_no_harm() -> None:
    make = Compiler()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [code_cache.get(KEY, make), code_cache.get(KEY, make)] == make.made


def test_a_fault_of_the_compiler_is_its_own(place: Path) -> None:
    def fail() -> bytes:
        raise OSError("no compiler")

    with pytest.raises(OSError, match="no compiler"):
        code_cache.get(KEY, fail)
    assert not place.exists()


def test_interrupted_writing_leaves_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*paths: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        code_cache.get(KEY, Compiler())
    assert list(place.iterdir()) == []


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DIFFOPT_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for platform, variable, usual in (
        ("linux", "XDG_CACHE_HOME", tmp_path / ".cache/diffopt"),
        ("darwin", None, tmp_path / "Library/Caches/diffopt"),
        ("win32", "LOCALAPPDATA", tmp_path / "AppData/Local/diffopt"),
    ):
        monkeypatch.setattr(sys, "platform", platform)
        for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
            monkeypatch.delenv(name, raising=False)
        assert code_cache.folder() == usual
        if variable is not None:
            monkeypatch.setenv(variable, str(tmp_path / "other"))
            assert code_cache.folder() == tmp_path / "other/diffopt"


def test_where_there_is_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("DIFFOPT_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", missing)
    assert code_cache.folder() is None


def test_none_is_kept_if_so_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFOPT_CACHE", "")
    make = Compiler()
    assert [code_cache.get(KEY, make), code_cache.get(KEY, make)] == make.made


def test_threads_and_processes_at_the_same_time(place: Path) -> None:
    """All get whole code of one of them, whoever was first."""
    text = (
        "import os, sys; from diffopt.solvers import code_cache\n"
        "make = lambda: bytes([int(sys.argv[1])]) * 1_000_000\n"
        "for i in range(30):\n"
        "    code = code_cache.get([b'k', bytes([i])], make)\n"
        "    assert len(code) == 1_000_000 and len(set(code)) == 1"
    )
    others = [subprocess.Popen([sys.executable, "-c", text, str(k)], stderr=subprocess.PIPE) for k in (1, 2)]

    def work(k: int) -> bool:
        codes = [code_cache.get([b"k", bytes([i])], lambda: bytes([k]) * 1_000_000) for i in range(30)]
        return all(len(code) == 1_000_000 and len(set(code)) == 1 for code in codes)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(3, 7)))
    for other in others:
        _, trouble = other.communicate(timeout=120)
        assert other.returncode == 0, trouble.decode()
    assert len(list(place.iterdir())) == 30


@pytest.fixture
def kernels(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The CUDA executor with a compiler that is none, and sources of its own."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "kernels.cu").write_text("kernel")
    (sources / "team.cuh").write_text("header")
    made = SimpleNamespace(compile=Compiler(), version="NVRTC 13.0", sources=sources)
    monkeypatch.setattr(cuda_executor, "_compile", made.compile)
    monkeypatch.setattr(cuda_executor, "_compiler_version", lambda: made.version)
    monkeypatch.setattr(cuda_executor, "SOURCES", sources)
    return made


def compiled(name: str = cuda_executor.KERNELS[0], dtype: torch.dtype = torch.float64, device: str = "sm_90") -> bytes:
    return cuda_executor.compiled.__wrapped__(name, dtype, device)  # as a new process does


def test_a_kernel_is_compiled_once_for_all_processes(kernels: SimpleNamespace) -> None:
    first = compiled()
    assert compiled() == first and len(kernels.compile.made) == 1


def test_a_kernel_is_compiled_anew_for_whatever_changes(kernels: SimpleNamespace) -> None:
    found = [compiled(), compiled(cuda_executor.KERNELS[1]), compiled(dtype=torch.float32), compiled(device="sm_80")]
    kernels.version = "NVRTC 13.1"
    found.append(compiled())
    (kernels.sources / "team.cuh").write_text("header, changed")
    found.append(compiled())
    (kernels.sources / "team.cuh").rename(kernels.sources / "other.cuh")
    found.append(compiled())
    assert len(set(found)) == len(kernels.compile.made) == 7
