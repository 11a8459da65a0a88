"""Identities that have derivatives of their own: none, or NaN, or those of another tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffopt import transforms


class Stationary(torch.autograd.Function):
    """The identity on a point at which the function to follow is stationary: its slope there is zero.

    So a first derivative stops here, and no system is solved for it; higher ones go on.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor) -> Tensor:
        return v.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor | None:
        return grad if torch.is_grad_enabled() else None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent


class Gate(torch.autograd.Function):
    """The identity, but a failed instance turns an incoming derivative that is not zero into NaN."""

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, failed: Tensor) -> Tensor:
        return v.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (failed,) = ctx.saved_tensors
        return _gated(grad, failed), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        (failed,) = ctx.saved_tensors
        with transforms.seen_by_other_forward_modes():
            return _gated(tangent, failed)


@torch.library.custom_op("diffopt::gate", mutates_args=())
def _compiled_gate(v: Tensor, failed: Tensor) -> Tensor:
    """Return v; in reverse mode the same as `Gate`. (``torch.compile`` takes no function that has a forward mode.)"""
    return v.clone()


_compiled_gate.register_fake(lambda v, failed: torch.empty_like(v))
_compiled_gate.register_autograd(
    lambda ctx, grad: (_gated(grad, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[1]),
)


@_compiled_gate.register_vmap
def _(info: Any, in_dims: tuple[int | None, int | None], v: Tensor, failed: Tensor) -> tuple[Tensor, int]:
    first = [
        t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
        for t, dim in zip((v, failed), in_dims, strict=True)
    ]
    return _compiled_gate(*first), 0


def only_derivative(v: Tensor) -> Tensor:
    """Return zeros that carry the derivative of v; where v is infinite it has none. (NaN stays NaN: it
    belongs to a failed instance, whose derivative must not vanish unseen.)"""
    return torch.where(torch.isinf(v), 0.0, v - v.detach())


def moved_like(value: Tensor, other: Tensor) -> Tensor:
    """Return ``value`` with the derivative of ``other``, both ``(*batch, k)``."""
    return value + only_derivative(other)


def gate(v: Tensor, failed: Tensor) -> Tensor:
    """Return v ``(*batch, k)``, whose derivative in instances marked ``failed`` is NaN unless it is not asked for."""
    return _compiled_gate(v, failed) if torch.compiler.is_compiling() else Gate.apply(v, failed)


def _gated(v: Tensor, failed: Tensor) -> Tensor:
    return torch.where((failed & (v != 0).any(-1)).unsqueeze(-1), torch.nan, v)


def aliases(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under names of their own for autograd: one that was computed from another is not to collect
    its part twice."""
    return {name: tensor.view_as(tensor) for name, tensor in tensors.items()}
