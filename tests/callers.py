"""Many threads that call at once."""

from __future__ import annotations

import threading
from collections.abc import Callable


def at_once(work: Callable[[int], None], count: int = 8) -> list[BaseException]:
    """Call ``work(0)``, ``work(1)``, ... in threads that start together, and return what they raised."""
    raised: list[BaseException] = []
    together = threading.Barrier(count)

    def guarded(first: int) -> None:
        try:
            together.wait()
            work(first)
        except BaseException as error:
            raised.append(error)

    callers = [threading.Thread(target=guarded, args=(k,)) for k in range(count)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    return raised
