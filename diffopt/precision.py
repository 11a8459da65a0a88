"""Autocast: a problem is solved inside such a region as it is outside.

A solver cannot work in half precision. Inside a region of ``torch.autocast`` half-precision data is cast up, and the
region is left for the time of the solve, so that no product in it is rounded to half precision either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from diffopt.linalg.matrices import SymmetricMatrix

HALF = (torch.float16, torch.bfloat16)


def _lowered() -> bool:
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


# Whether this is a region of autocast. (torch's own question takes a fifth of the time, and is asked in every call.)
lowered: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", _lowered)


@contextmanager
def full_precision() -> Iterator[None]:
    """Leave the region of autocast, on the devices that we compute on."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def raised(values: Mapping[str, Any], beside: Iterable[Tensor] = ()) -> dict[str, Any]:
    """Return values by name, with half-precision tensors (also of pairs and of structured matrices) cast up.

    Args:
        values: as a call gives them; what is no tensor, and no half-precision one, stays.
        beside: what they will be used with. They become float64 if anything here or there is, else float32.
    """
    found = [tensor for value in values.values() for tensor in _tensors(value)]
    double = any(tensor.dtype == torch.float64 for tensor in (*found, *beside))
    wide = torch.float64 if double else torch.float32

    def up(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(wide) if value.dtype in HALF else value
        if isinstance(value, SymmetricMatrix):
            return value.with_tensors(*map(up, value.tensors()))
        return tuple(map(up, value)) if isinstance(value, tuple | list) else value

    return {name: up(value) for name, value in values.items()}


def _tensors(value: Any) -> tuple[Tensor, ...]:
    if isinstance(value, Tensor):
        return (value,)
    if isinstance(value, SymmetricMatrix):
        return value.tensors()
    return tuple(v for v in value if isinstance(v, Tensor)) if isinstance(value, tuple | list) else ()
