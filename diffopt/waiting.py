"""Whether the host may wait for the device, to read a value from it.

Where a look at values shows that nobody needs some work, it is left out. The look costs the host the time until the
device has come so far, and a CUDA graph cannot record it. Under ``Settings(sync=False)`` nobody looks, and all of the
work is done: so only how much is done may depend on `some` and `every`, never what comes out.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

_here = threading.local()


def allowed() -> bool:
    """Return whether the host may wait."""
    return getattr(_here, "allowed", True)


@contextmanager
def allow(wait: bool) -> Iterator[None]:
    """Decide it for what this thread does inside."""
    before = allowed()
    _here.allowed = wait
    try:
        yield
    finally:
        _here.allowed = before


def some(mask: Tensor) -> bool:
    """Return whether a boolean tensor holds anywhere; True, without a look, where the host must not wait."""
    return not allowed() or bool(mask.any())


def every(mask: Tensor) -> bool:
    """Return whether it holds everywhere; False, without a look, where the host must not wait."""
    return allowed() and bool(mask.all())
