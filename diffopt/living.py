"""Objects that can be named by a number as long as they live."""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import torch

_living: WeakValueDictionary[int, Any] = WeakValueDictionary()


class Living:
    """Base of what an operator inside a compiled graph must find again: the graph holds ``id(object)``."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__new__(cls)
        if not torch.compiler.is_compiling():  # (what is made while a graph is traced does not outlive the trace)
            _living[id(made)] = made
        return made


def find(number: int) -> Any:
    """Return the object of this ``id``, or ``None`` if it lives no more."""
    return _living.get(number)
