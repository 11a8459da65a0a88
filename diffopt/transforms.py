"""What the transforms of ``torch.func`` and operators of torch do to tensors, and the way through them.

A transform wraps tensors, in layers where transforms are nested, and an autograd function is where torch hands out what
is inside. The outermost wrapper belongs to the innermost transform. (Some names are private to torch: they are used in
this file alone.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from diffopt import modes
from diffopt.problems.forms import Form

_functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]

active = modes.transforming


def forward_mode() -> bool:
    """Return whether forward mode is at work, that of ``torch.func`` or a dual level of ``torch.autograd``."""
    return forward_ad._current_level >= 0


def mapped_here(tensor: Tensor) -> bool:
    """Return whether the innermost transform is a vmap, over this tensor too."""
    return (
        _functorch.is_batchedtensor(tensor) and _functorch.maybe_get_level(tensor) == _functorch.maybe_current_level()
    )


def under_reverse_mode_alone(tensors: Iterable[Tensor]) -> list[Tensor] | None:
    """Return what is inside the tensors if one reverse mode of ``torch.func`` (``vjp``, ``grad``, ``jacrev``) is all
    that is at work, and nothing outside wants a derivative of them; else ``None``."""
    stack = _functorch.get_interpreter_stack()
    if len(stack) != 1 or stack[0].key() != _functorch.TransformType.Grad or forward_mode():
        return None
    inside = [_functorch.get_unwrapped(v) if _functorch.is_functorch_wrapped_tensor(v) else v for v in tensors]
    return None if any(v.requires_grad or wrapped(v) for v in inside) else inside


def wrapped(tensor: Tensor) -> bool:
    """Return whether a transform wraps a tensor: compiled code cannot look inside."""
    return _functorch.is_functorch_wrapped_tensor(tensor) or _functorch.is_legacy_batchedtensor(tensor)


class Call(NamedTuple):
    """What `Unwrapped` does: ``run`` with the form over unwrapped tensors. What comes out has its batch dimensions
    first, except that the first ``second`` tensors have them second.

    ``all_layers``: whether to unwrap to the last, not only what the innermost vmap has put on. ``mapped``: how many
    dimensions have been added to the batch.
    """

    form: Form
    run: Callable[[Form], tuple[Tensor, ...]]
    second: int
    all_layers: bool = False
    mapped: int = 0

    def __call__(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        named = dict(zip(self.form.tensors(), tensors, strict=True))
        return self.run(self.form.rebatched(named) if self.mapped else self.form.with_tensors(named))


class Unwrapped(torch.autograd.Function):
    """Does a `Call` on the tensors of a form without the wrappers of transforms: ``Unwrapped.apply(call, *tensors)``.

    A dimension that a vmap maps becomes the first batch dimension. Not differentiable; with ``all_layers`` the tensors
    are to be detached.
    """

    @staticmethod
    def forward(call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        return call(tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], call: Call, *tensors: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        batch = len(call.form.batch_shape) + call.mapped
        moved = []
        for tensor, dim, core in zip(tensors, in_dims[1:], call.form.core_dims(), strict=True):
            if dim is not None:
                # First, and as many batch dimensions after it as the others may have.
                tensor = tensor.movedim(dim, 0)
                lead, rest = tensor.shape[1 : tensor.dim() - core], tensor.shape[tensor.dim() - core :]
                tensor = tensor.reshape(info.batch_size, *[1] * (batch - len(lead)), *lead, *rest)
            moved.append(tensor)
        deeper = call._replace(mapped=call.mapped + 1)
        results = Unwrapped.apply(deeper, *moved) if call.all_layers else deeper(tuple(moved))
        return results, tuple(1 if i < call.second else 0 for i in range(len(results)))


def many_at_once(
    function: Callable[..., tuple[Tensor | None, ...]], vectors: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """Return ``function(*vectors)``, a linear map of tensors, also where many vectors come at once as in
    ``torch.autograd.grad(..., is_grads_batched=True)``. (``gradcheck`` and ``torch.autograd.functional`` do it.) That
    wraps them in a way of its own, which is turned into that of ``torch.func.vmap``.
    """
    legacy = _functorch.is_legacy_batchedtensor
    many = [vector is not None and legacy(vector) for vector in vectors]
    if not any(many):
        return function(*vectors)
    # The level is 1: such calls do not nest. (With it the size, the second number, is not looked at.)
    remove: Any = torch._remove_batch_dim  # pyright: ignore[reportPrivateImportUsage]
    add: Any = torch._add_batch_dim  # pyright: ignore[reportPrivateImportUsage]
    plain = [remove(v, 1, 1, 0) if batched else v for v, batched in zip(vectors, many, strict=True)]
    there: list[bool] = []

    def present(*vectors: Tensor | None) -> tuple[Tensor, ...]:
        results = function(*vectors)
        there[:] = [result is not None for result in results]
        return tuple(result for result in results if result is not None)

    found = iter(torch.func.vmap(present, tuple(0 if batched else None for batched in many))(*plain))
    return tuple(add(next(found), 0, 1) if here else None for here in there)


def primals(saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return what a ``jvp`` rule has saved without the tangents of its own forward mode; those of others stay."""
    return tuple(forward_ad.unpack_dual(v).primal if v.is_floating_point() else v for v in saved)


def seen_by_other_forward_modes() -> Any:
    """Return a context for the work of a ``jvp`` rule: torch switches forward mode off there, also for a forward mode
    outside, which has to see it."""
    return forward_ad._set_fwd_grad_enabled(True)


_private: Any = torch._C
_KEYS = _private._dispatch_tls_local_include_set(), _private._dispatch_tls_local_exclude_set()


@contextmanager
def plain_inside_an_operator() -> Iterator[None]:
    """Let torch work inside the body of a custom operator as it does outside, without a gradient being recorded: there,
    it leaves out autograd and ``torch.func`` otherwise."""
    with _private._ForceDispatchKeyGuard(*_KEYS), torch.no_grad():
        yield
