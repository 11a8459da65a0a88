"""Where a solve may begin: an earlier solution, which saves steps and changes no answer."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from diffopt.errors import DeviceError, DtypeError, ParameterError, ShapeError
from diffopt.shapes import instances


class Start(NamedTuple):
    """A point and its multipliers, with the signs of `diffopt.Solution`; detached.

    x, lam_lower, lam_upper ``(*batch, n)``; nu ``(*batch, p)``; lam ``(*batch, m)``. The batch dimensions are those of
    the problem, or broadcast to them. An instance with NaN or infinity in any of them begins without a start.
    """

    x: Tensor
    nu: Tensor
    lam: Tensor
    lam_lower: Tensor
    lam_upper: Tensor

    def expand(self, batch: torch.Size) -> Start:
        """Return the same with all batch dimensions, contiguous."""
        return Start(*(v.expand(*batch, v.shape[-1]).contiguous() for v in self))

    def part(self, begin: int, end: int, batch: torch.Size) -> Start:
        """Return the start of some instances of the flattened batch."""
        return Start(*(instances(v, 1, batch, slice(begin, end)) for v in self))

    def finite(self) -> Tensor:
        """Return where a start is usable, ``(*batch,)``."""
        return torch.stack([torch.isfinite(v).all(-1) for v in self]).all(0)


def read(start: Any) -> Start:
    """Take what a start needs from a solution; instances that were not solved get NaN.

    Args:
        start: a `diffopt.Solution`, or anything with x, nu, lam, lam_lower and lam_upper (and ``ok``, if it knows).

    Raises:
        ParameterError: something of it is missing, or no tensor.
    """
    values: dict[str, Any] = {name: getattr(start, name, None) for name in Start._fields}
    missing = [name for name, value in values.items() if not isinstance(value, Tensor)]
    if missing:
        raise ParameterError(
            f"`start` is {type(start).__name__} without {', '.join(f'tensor `{name}`' for name in missing)}. Expected "
            f"a diffopt.Solution, such as an earlier layer.solve(...) has returned, or an object with "
            f"{', '.join(Start._fields)}."
        )
    x, *others = (value.detach() for value in values.values())
    ok = getattr(start, "ok", None)
    if isinstance(ok, Tensor):
        x = torch.where(ok.unsqueeze(-1), x, torch.nan)
    return Start(x, *others)


class Problem(Protocol):
    """What of a form a start has to fit."""

    n: int
    p: int
    m: int
    batch_shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def fitted(start: Start, form: Problem) -> Start:
    """Return a start after a check that it fits a form.

    Raises:
        ShapeError, DtypeError, DeviceError.
    """
    batch, dtype, device = form.batch_shape, form.dtype, form.device
    for name, value, size in zip(Start._fields, start, (form.n, form.p, form.m, form.n, form.n), strict=True):
        lead = value.shape[:-1]
        fits = value.dim() and value.shape[-1] == size and len(lead) <= len(batch)
        if not fits or any(a not in (1, b) for a, b in zip(reversed(lead), reversed(batch), strict=False)):
            raise ShapeError(
                f"`start.{name}` has shape {tuple(value.shape)}. Expected (*batch, {size}) with the batch dimensions "
                f"of the problem, {tuple(batch)}, or some that broadcast to them. Pass the solution of a problem of "
                f"the same sizes, or leave `start` out."
            )
        if value.dtype != dtype:
            raise DtypeError(
                f"`start.{name}` is {value.dtype}, the data is {dtype}. Pass a solution of the same dtype, or leave "
                f"`start` out."
            )
        if value.device != device:
            raise DeviceError(
                f"`start.{name}` is on {value.device}, the data on {device}. Pass a solution on the same device, or "
                f"leave `start` out."
            )
    return start
