"""Finds and loads the compiled CPU executor, a library with a plain C interface, once per process.

The same source is compiled once for each instruction set, into ``libdiffopt_cpu_<variant>``; the widest that
this machine runs is taken. Where no library is found, diffopt works all the same, in torch operations.

Two environment variables, read when the library is first asked for:

- ``DIFFOPT_CPU_LIBRARY``: the path of one library file, taken instead of all others. The empty string means none,
  which tries out what happens without it.
- ``DIFFOPT_CPU_LEVEL``: ``baseline``, ``avx2`` or ``avx512``: no variant wider than this is taken. It does not concern
  a library that ``DIFFOPT_CPU_LIBRARY`` names.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import warnings
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from diffopt.errors import CompiledExecutorWarning, SettingsError

# What the library's diffopt_abi() must answer. It counts up with every change of the C interface, there and here.
ABI = 6

# A variant's place is the level of the machines that run it, as diffopt_cpu_level() counts.
VARIANTS = ("baseline", "avx2", "avx512")

_SUFFIX = ".dll" if sys.platform == "win32" else ".so"  # that of CMake's modules: .so on macOS too
_SOURCE_TREE = Path(__file__).resolve().parents[2]


class Library(NamedTuple):
    """A loaded library, its variant (one of `VARIANTS`, or the stem of a file called otherwise) and its file."""

    functions: ctypes.CDLL
    variant: str
    path: Path


class _Refused(Exception):
    """Why a file cannot be used."""


_lock = threading.Lock()
_looked = False
_library: Library | None = None


def _new_lock() -> None:
    """Replace the lock in the child of a fork: another thread of the parent may have held it."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)


def load() -> ctypes.CDLL | None:
    """Return the library's functions, without declared argument types, or ``None`` if there is no library.

    The first call searches: the file that ``DIFFOPT_CPU_LIBRARY`` names; else the files that were installed with the
    package; else, in a source tree, ``build/cpu/``, where ``make cpu`` and editable installs put them. Every later
    call in the process and in its forked children answers the same. Any number of threads may call it. A
    library whose `ABI` is another one counts as missing.

    Raises:
        SettingsError: ``DIFFOPT_CPU_LIBRARY`` names a file that cannot be used, or ``DIFFOPT_CPU_LEVEL`` no level.
            (Every call raises until they are mended.)

    Warns:
        CompiledExecutorWarning: no library was found, or a better one than the one taken could not be used. Once
            per process.
    """
    found = loaded()
    return found.functions if found else None


def variant() -> str | None:
    """Return which variant `load` gives, such as ``"avx512"``, or ``None`` if there is no library."""
    found = loaded()
    return found.variant if found else None


def loaded() -> Library | None:
    """Return what `load` gives, with its variant and file."""
    global _looked, _library
    if not _looked:
        with _lock:
            if not _looked:
                _library, trouble = find()
                _looked = True
                if trouble:  # Outside `find`, and last: where warnings are errors, the next call finds the answer.
                    warnings.warn(trouble, CompiledExecutorWarning, stacklevel=3)
    return _library


def find() -> tuple[Library | None, str | None]:
    """Search as `load` says, whatever was found before; return the library, and what to warn of."""
    named = os.environ.get("DIFFOPT_CPU_LIBRARY")
    if named == "":
        why = "DIFFOPT_CPU_LIBRARY is set to the empty string, which means: none"
        return None, _missing(why, "Remedy: unset it.")
    if named is not None:
        return _named(Path(named)), None
    limit = _limit()
    reasons: list[str] = []
    for folder in folders():
        library = _widest(folder, limit, reasons)
        if library:
            return library, _second_best(library, reasons) if reasons else None
    why = "; ".join(reasons) or f"no {_file('baseline')} in {' or '.join(str(folder) for folder in folders())}"
    return None, _missing(why)


def folders() -> list[Path]:
    """Return where libraries may lie, best first.

    An installer may keep what it built apart from the sources, so the package's files are not simply those
    beside this one.
    """
    places = []
    installed = resources.files("diffopt.solvers").joinpath(_file("baseline"))
    if isinstance(installed, Path):  # Not so in a zip file, from which nothing can be loaded.
        places.append(installed.parent)
    if (_SOURCE_TREE / "diffopt/solvers/cpu/executor.cpp").is_file():  # Sources are not installed.
        places.append(_SOURCE_TREE / "build" / "cpu")
    return places


def _file(name: str) -> str:
    return f"libdiffopt_cpu_{name}{_SUFFIX}"


def _limit() -> int:
    """Return the highest level that ``DIFFOPT_CPU_LEVEL`` allows."""
    level = os.environ.get("DIFFOPT_CPU_LEVEL") or VARIANTS[-1]
    if level not in VARIANTS:
        raise SettingsError(
            "The environment variable DIFFOPT_CPU_LEVEL limits the instruction set of the compiled CPU executor: "
            f"expected one of {', '.join(VARIANTS)}, got {level!r}. Correct it, or unset it to take the widest that "
            "this machine has."
        )
    return VARIANTS.index(level)


def _named(path: Path) -> Library:
    """Load the file that ``DIFFOPT_CPU_LIBRARY`` names."""
    name = path.stem.removeprefix("libdiffopt_cpu_")
    try:
        if not path.is_file():
            raise _Refused("there is no such file")
        functions = _open(path)
        level = functions.diffopt_cpu_level()
        if name in VARIANTS[level + 1 :]:
            raise _Refused(f"it is compiled for {name}, but this machine runs at most {VARIANTS[level]}")
    except _Refused as refused:
        raise SettingsError(
            "The environment variable DIFFOPT_CPU_LIBRARY names the compiled CPU executor: expected the path of a "
            f"library that diffopt can load, got {str(path)!r}: {refused}. Name another file, such as those that `make "
            "cpu` builds into build/cpu/ of a source tree; unset it to use diffopt's own; or make it the empty string "
            "to use none."
        ) from refused
    return Library(functions, name, path)


def _widest(folder: Path, limit: int, reasons: list[str]) -> Library | None:
    """Load the widest variant in a folder, and add to ``reasons`` why wider ones that are there were left."""
    path = folder / _file("baseline")
    if not path.is_file():
        return None
    try:
        # The baseline runs everywhere, so it is the one to ask for the machine's level.
        best = Library(_open(path), "baseline", path)
    except _Refused as refused:
        reasons.append(f"{path}: {refused}")
        return None
    level = min(best.functions.diffopt_cpu_level(), limit)
    for name in reversed(VARIANTS[1 : level + 1]):
        path = folder / _file(name)
        if path.is_file():  # Not every compiler builds every variant.
            try:
                return Library(_open(path), name, path)
            except _Refused as refused:
                reasons.append(f"{path}: {refused}")
    return best


def _open(path: Path) -> ctypes.CDLL:
    """Load a file and check that it is a library of ours, of the right ABI."""
    try:
        functions = ctypes.CDLL(str(path.resolve()))
        abi, _ = functions.diffopt_abi(), functions.diffopt_cpu_level
    except OSError as error:
        raise _Refused(f"it cannot be loaded: {error}") from error
    except AttributeError as error:
        raise _Refused(f"it is not a library of diffopt's: {error}") from error
    if abi != ABI:
        raise _Refused(f"its interface has version {abi}, but this version of diffopt needs {ABI}")
    return functions


_REMEDY = (
    "Remedy: install diffopt again where there is a C++ compiler (such as g++ or clang++); in a source tree, run `make "
    "cpu`; or set DIFFOPT_CPU_LIBRARY to the path of the library."
)


def _missing(why: str, remedy: str = _REMEDY) -> str:
    return (
        f"diffopt's compiled CPU executor is missing ({why}). Torch operations do its work: the results are as good, "
        f"but solving on the CPU takes several times longer. {remedy}"
    )


def _second_best(library: Library, reasons: list[str]) -> str:
    return (
        f"Some of diffopt's compiled CPU executors cannot be used ({'; '.join(reasons)}). {library.path} is taken "
        f"instead, which may be slower. {_REMEDY}"
    )
