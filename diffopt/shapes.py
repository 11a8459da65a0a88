"""Batch shapes: what broadcasts with what, and the checks that say so in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffopt.errors import DeviceError, DtypeError, ShapeError

SUPPORTED_DTYPES = (torch.float32, torch.float64)


def broadcast_batch(shapes: Mapping[str, tuple[int, ...]]) -> torch.Size:
    """Return the common batch shape of named batch shapes.

    Raises:
        ShapeError: two of them do not broadcast; both are named.
    """
    result: tuple[int, ...] = ()
    seen: list[str] = []
    for name, shape in shapes.items():
        try:
            result = tuple(torch.broadcast_shapes(result, shape))
        except RuntimeError as error:
            raise ShapeError(
                f"The batch dimensions of `{name}`, {tuple(shape)}, do not broadcast with {result}, "
                f"those of {', '.join(f'`{s}`' for s in seen)}. Batch dimensions lead and follow the "
                f"broadcasting rules of torch; a tensor without them is shared by the whole batch."
            ) from error
        seen.append(name)
    return torch.Size(result)


def check_same_kind(tensors: Mapping[str, Tensor]) -> tuple[torch.dtype, torch.device]:
    """Return the one dtype and device of named tensors, or say which tensor differs.

    Raises:
        DtypeError: a dtype other than float32 or float64, or two dtypes.
        DeviceError: two devices.
    """
    first: str | None = None
    dtype, device = torch.float64, torch.device("cpu")
    for name, tensor in tensors.items():
        if tensor.dtype not in SUPPORTED_DTYPES:
            raise DtypeError(
                f"`{name}` has dtype {tensor.dtype}. Expected torch.float32 or torch.float64. "
                f"Convert it, for example with `{name}.double()`."
            )
        if first is None:
            first, dtype, device = name, tensor.dtype, tensor.device
        elif tensor.dtype != dtype:
            raise DtypeError(
                f"`{name}` has dtype {tensor.dtype} but `{first}` has {dtype}. Expected one dtype for "
                f"all data. Convert one of them, for example `{name}.to({first}.dtype)`."
            )
        elif tensor.device != device:
            raise DeviceError(
                f"`{name}` is on {tensor.device} but `{first}` is on {device}. Expected one device "
                f"for all data. Move it, for example `{name}.to({first}.device)`."
            )
    return dtype, device


def described(value: object) -> str:
    """Return what a message says was got: a tensor's shape and dtype, else the type."""
    return f"shape {tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    """Return ``matrix @ vector`` over leading batch dimensions; either side may be shared.

    A shared matrix meets a batch of vectors in one matrix product: its gradient is then one
    product too, already summed over the batch.
    """
    if matrix.dim() == 2:
        # (A single vector from the other side: torch would remove a dimension of the product in place, which it cannot
        # do to a tangent under torch.autograd.functional.jacobian(strategy="forward-mode", vectorize=True).)
        return matrix @ vector if vector.dim() == 1 else vector @ matrix.mT
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def rmatvec(matrix: Tensor, vector: Tensor) -> Tensor:
    """Return ``matrix.mT @ vector`` over leading batch dimensions; either side may be shared."""
    if matrix.dim() == 2:
        return matrix.mT @ vector if vector.dim() == 1 else vector @ matrix
    return (matrix.mT @ vector.unsqueeze(-1)).squeeze(-1)


def max_abs(vector: Tensor) -> Tensor:
    """Return the largest magnitude over the last dimension, 0 where that dimension is empty."""
    if vector.shape[-1] == 0:
        return vector.new_zeros(vector.shape[:-1])
    return vector.abs().amax(-1)


def instances(tensor: Tensor, dims: int, batch: torch.Size, places: slice | Tensor) -> Tensor:
    """Return a tensor, whose last ``dims`` dimensions are those of an instance, at places of the flattened batch."""
    core = tensor.shape[tensor.dim() - dims :]
    # (Counted: of no entries torch cannot tell how many instances they are.)
    return tensor.expand(*batch, *core).reshape(batch.numel(), *core)[places]


def where_instance(mask: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    """Return ``chosen`` where ``mask`` ``(*batch,)`` holds, else ``other``: both ``(*batch,)`` or ``(*batch, k)``."""
    return torch.where(mask.unsqueeze(-1) if other.dim() > mask.dim() else mask, chosen, other)


def stacked(matrices: Sequence[Tensor]) -> Tensor:
    """Return matrices ``(*batch, rows, n)`` on top of each other, over their common batch."""
    batch = torch.broadcast_shapes(*(v.shape[:-2] for v in matrices))
    return torch.cat([v.expand(*batch, *v.shape[-2:]) for v in matrices], -2)


def zeros_of(tensor: Tensor) -> Tensor:
    """Return zeros with the graph of a tensor: what happens to be zero has a gradient, too, and not none."""
    return tensor.masked_fill(tensor.new_ones((), dtype=torch.bool), 0.0)
