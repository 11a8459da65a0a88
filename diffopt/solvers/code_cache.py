"""Keeps compiled kernels on disk, so that not every process compiles anew.

One file for each kernel, in ``diffopt`` below the user's cache directory (``$XDG_CACHE_HOME`` or ``~/.cache`` on Linux,
``~/Library/Caches`` on macOS, ``%LOCALAPPDATA%`` on Windows). The environment variable ``DIFFOPT_CACHE`` names another
folder; the empty string means none. The name of a file is a hash of all that its content depends on, so that nothing in
it is ever out of date; any file may be deleted at any time.

A cache is no reason to fail or to warn: where the folder cannot be read or written, kernels are compiled as without it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

_DIGEST = hashlib.sha256().digest_size


def folder() -> Path | None:
    """Return where compiled kernels are kept, or ``None`` where they are not to be or there is no such place."""
    named = os.environ.get("DIFFOPT_CACHE")
    if named is not None:
        return Path(named) if named else None
    try:
        home = Path.home()
    except RuntimeError:  # (no home directory can be found)
        return None
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or home / ".cache"
    return Path(base) / "diffopt"


def get(key: Iterable[bytes], make: Callable[[], bytes]) -> bytes:
    """Return the code that was kept for a key; else make it, and keep it.

    Any number of processes may do so at the same time: files are complete when they get their names. What a file holds
    is checked, and made anew where it is damaged.

    Args:
        key: all that the code depends on.
    """
    place = folder()
    if place is None:
        return make()
    name = hashlib.sha256()
    for part in key:
        name.update(len(part).to_bytes(8, "little") + part)  # (with its length: parts do not run into each other)
    path = place / f"{name.hexdigest()}.cubin"
    with contextlib.suppress(OSError):
        kept = path.read_bytes()
        code = kept[_DIGEST:]
        if code and hashlib.sha256(code).digest() == kept[:_DIGEST]:
            return code
    code = make()
    with contextlib.suppress(OSError):
        _write(path, hashlib.sha256(code).digest() + code)
    return code


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
