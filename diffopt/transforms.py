"""What the transforms of ``torch.func`` and operators of torch do to tensors, and the way through them.

A transform wraps tensors, in layers where transforms are nested, and an autograd function is where torch hands out what
is inside. The outermost wrapper belongs to the innermost transform. (Some names are private to torch: they are used in
this file alone.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from diffopt import modes
from diffopt.errors import NotDifferentiableError
from diffopt.problems.forms import Form
from diffopt.warm_start import Start

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


def wrapped(tensor: Tensor) -> bool:
    """Return whether a transform wraps a tensor: compiled code cannot look inside."""
    return _functorch.is_functorch_wrapped_tensor(tensor) or _functorch.is_legacy_batchedtensor(tensor)


def any_wrapped(first: Tensor | None, second: Tensor | None) -> bool:
    """Return whether a transform wraps one of the two."""
    return (first is not None and wrapped(first)) or (second is not None and wrapped(second))


def mapped_first(tensor: Tensor, lead: int, core: int) -> Tensor:
    """Return what is inside a tensor that the innermost vmap maps, the mapped dimension before as many batch dimensions
    as ``lead`` says and the ``core`` ones of an instance; other tensors as they are."""
    if not mapped_here(tensor):
        return tensor
    return aligned(_functorch.get_unwrapped(tensor).movedim(_functorch.maybe_get_bdim(tensor), 0), 1, lead, core)


def aligned(tensor: Tensor, first: int, batch: int, core: int) -> Tensor:
    """Return a tensor with as many dimensions between its ``first`` and its ``core`` ones as ``batch`` says."""
    missing = batch + core - (tensor.dim() - first)
    return tensor.reshape(*tensor.shape[:first], *[1] * missing, *tensor.shape[first:])


def bare(tensor: Tensor) -> Tensor:
    """Return what is inside the wrappers of derivatives.

    Raises:
        NotDifferentiableError: a vmap maps the tensor.
    """
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            raise NotDifferentiableError(_MAPPED_ALONE)
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


_MAPPED_ALONE = (
    "A `start` that torch.func.vmap maps, around a derivative, needs data that the same vmap maps. Pass the batch as "
    "leading dimensions instead, or leave `start` out."
)


class Layers(NamedTuple):
    """What surrounds a derivative of ``torch.func``, if it is the innermost transform, all others are vmaps, and
    nothing further outside wants a derivative of what is inside the tensors.

    ``mapped``: the levels of the vmaps that map some of the tensors, outermost first; ``level``: that of the
    derivative; ``forward``: its mode.
    """

    mapped: tuple[int, ...]
    level: int
    forward: bool

    def plain(self, form: Form) -> Form:
        """Return the form over what is inside its tensors; mapped dimensions become the first batch dimensions.
        (`outside` of all transforms.)"""
        inside = {name: _Inside.of(tensor) for name, tensor in form.tensors().items()}
        if not self.mapped:
            return form.with_tensors({name: found.tensor for name, found in inside.items()})
        batch, cores = len(form.batch_shape), form.core_dims()
        named = {
            name: self._plain(found, batch, core) for (name, found), core in zip(inside.items(), cores, strict=True)
        }
        return form.rebatched(named)

    def start(self, start: Start, form: Form) -> Start:
        """Return a start of the form as `plain` returns the form.

        Raises:
            NotDifferentiableError: a vmap maps it that does not map the data.
        """
        inside = [_Inside.of(tensor) for tensor in start]
        if any(level not in self.mapped for found in inside for level, _ in found.dims):
            raise NotDifferentiableError(_MAPPED_ALONE)
        return Start(*(self._plain(found, len(form.batch_shape), 1) for found in inside))

    def _plain(self, found: _Inside, batch: int, core: int) -> Tensor:
        if not found.dims:
            return found.tensor
        return aligned(found.with_first(self.mapped), len(self.mapped), batch, core)

    def covered(self, tensor: Tensor, second: bool = False) -> Tensor:
        """Return a plain tensor, mapped dimensions first (or ``second``), as the vmaps show it."""
        for level in self.mapped:
            tensor = _functorch._add_batch_dim(tensor, int(second), level)
        return tensor

    def output(self, tensor: Tensor) -> Tensor:
        """Return the same as the derivative shows it."""
        return at_level(self.covered(tensor), self.level)


class _Inside(NamedTuple):
    """What is inside a tensor, and which dimension of it each level maps, innermost first, counted as that level sees
    them."""

    tensor: Tensor
    dims: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, tensor: Tensor) -> _Inside:
        dims = []
        while _functorch.is_functorch_wrapped_tensor(tensor):
            if _functorch.is_batchedtensor(tensor):
                dims.append((_functorch.maybe_get_level(tensor), _functorch.maybe_get_bdim(tensor)))
            tensor = _functorch.get_unwrapped(tensor)
        return cls(tensor, tuple(dims))

    def with_first(self, levels: Sequence[int]) -> Tensor:
        """Return the tensor with one dimension for each of the levels first, of size 1 where it has none."""
        if len(levels) == 1 and self.dims == ((levels[0], 0),):
            return self.tensor  # (as most are)
        own, place = list(range(self.tensor.dim())), {}
        for level, dim in reversed(self.dims):
            place[level] = own.pop(dim)
        tensor = self.tensor.permute([place[level] for level in levels if level in place] + own)
        for i, level in enumerate(levels):
            if level not in place:
                tensor = tensor.unsqueeze(i)
        return tensor


class Vectors(NamedTuple):
    """Gradients or tangents on their way past the transforms that `Layers` names.

    ``many``: levels of vmaps that map them and not the data, ``sizes`` of these; ``vectors``: plain,
    ``(many, *batch, ...)``, their batch with the mapped dimensions first; ``None`` where there is none.
    """

    many: tuple[int, ...]
    sizes: tuple[int, ...]
    vectors: tuple[Tensor | None, ...]

    def covered(self, layers: Layers, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """Return a plain tensor ``(many, mapped dimensions, *shape)`` as the vmaps show it."""
        levels = (*self.many, *layers.mapped)
        order = sorted(range(len(levels)), key=levels.__getitem__)
        whole = (*self.sizes, *tensor.shape[1 : 1 + len(layers.mapped)], *shape)
        if tensor.shape != whole or len(order) > 1:
            with outside():
                tensor = tensor.reshape(whole).permute(*order, *range(len(levels), len(whole)))
        for i in order:
            tensor = _functorch._add_batch_dim(tensor, 0, levels[i])
        return tensor


def plain(tensor: Tensor) -> Tensor:
    """Return what is inside a tensor, mapped dimensions first, outermost vmap first."""
    if not active():
        return tensor.detach()
    found = _Inside.of(tensor)
    with outside():
        return found.with_first(sorted(level for level, _ in found.dims)).detach()


_NEEDED = (
    "get_interpreter_stack", "push_dynamic_layer_stack", "pop_dynamic_layer_stack", "_add_batch_dim", "_wrap_for_grad",
    "get_unwrapped", "maybe_get_bdim", "is_functionaltensor", "set_single_level_autograd_function_allowed",
    "get_single_level_autograd_function_allowed", "unwrap_if_dead",
)  # fmt: skip
OneLevel: Any = getattr(torch.autograd.function, "_SingleLevelFunction", torch.autograd.Function)
"""An autograd function that sees wrapped tensors as they are, and takes no part in transforms by itself."""

direct = OneLevel is not torch.autograd.Function and all(hasattr(_functorch, name) for name in _NEEDED)
"""Whether torch has what `layers_of` needs; if not, it finds nothing, and derivatives go by ways that need less."""


class outside:  # noqa: N801 (a context, like torch.no_grad)
    """Work where no transform is, and no gradient is recorded: on plain tensors."""

    def __enter__(self) -> None:
        self.layers: list[Any] = []
        self.recorded = torch.is_grad_enabled()
        while _functorch.peek_interpreter_stack() is not None:
            self.layers.append(_functorch.pop_dynamic_layer_stack())
        torch.set_grad_enabled(False)

    def __exit__(self, *_: object) -> None:
        while self.layers:
            _functorch.push_dynamic_layer_stack(self.layers.pop())
        torch.set_grad_enabled(self.recorded)


def at_level(tensor: Tensor, level: int) -> Tensor:
    """Return a tensor as the derivative at this level shows it."""
    return _functorch._wrap_for_grad(tensor, level)


def alive(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return tensors without the wrapper of a derivative that is over."""
    return tuple(_functorch.unwrap_if_dead(tensor) for tensor in tensors)


def apply_at_one_level(function: Any, *arguments: Any) -> tuple[Tensor, ...]:
    """Apply a `OneLevel` function."""
    before = _functorch.get_single_level_autograd_function_allowed()
    _functorch.set_single_level_autograd_function_allowed(True)
    try:
        return function.apply(*arguments)
    finally:
        _functorch.set_single_level_autograd_function_allowed(before)


def _kinds() -> list[tuple[Any, int]]:
    return [(layer.key(), layer.level()) for layer in _functorch.get_interpreter_stack() or ()]


@torch.compiler.assume_constant_result
def vmaps_alone() -> bool:
    """Return whether all transforms that are at work are vmaps; while a graph is traced, too."""
    return all(key == _functorch.TransformType.Vmap for key, _ in _kinds())


def _wanted_outside(tensor: Tensor) -> bool:
    return tensor.requires_grad or _functorch.is_legacy_batchedtensor(tensor) or _functorch.is_functionaltensor(tensor)


def layers_of(tensors: Iterable[Tensor]) -> Layers | None:
    """Return the `Layers` around tensors if that is all there is."""
    if not direct:
        return None
    kind = _functorch.TransformType
    *outer, (innermost, level) = _kinds()
    if innermost not in (kind.Grad, kind.Jvp) or any(key != kind.Vmap for key, _ in outer):
        return None
    forward = innermost == kind.Jvp
    if forward_mode() != forward:
        return None
    mapped: set[int] = set()
    for tensor in tensors:
        inside = _Inside.of(tensor)
        tangent = forward_ad.unpack_dual(tensor).tangent if forward and tensor.is_floating_point() else None
        if _wanted_outside(inside.tensor) or (tangent is not None and _wanted_outside(_Inside.of(tangent).tensor)):
            return None
        mapped.update(at for at, _ in inside.dims)
    return Layers(tuple(sorted(mapped)), level, forward)


def inside_still(layers: Layers) -> bool:
    """Return whether the derivative of these layers is the innermost transform: its function runs still."""
    kinds = _kinds()
    return bool(kinds) and kinds[-1][1] == layers.level and kinds[-1][0] != _functorch.TransformType.Vmap


def vectors_of(
    layers: Layers, vectors: Sequence[Tensor | None], batch: torch.Size, cores: Sequence[int]
) -> Vectors | None:
    """Return plain `Vectors`, or ``None`` if somebody wants a derivative of them, or of what becomes of them.

    Args:
        batch: that of the plain form; theirs may broadcast to it.
        cores: how many trailing dimensions of each belong to one instance.
    """
    kinds = _kinds()
    if inside_still(layers):
        kinds.pop()
    if forward_mode() != layers.forward or any(key != _functorch.TransformType.Vmap for key, _ in kinds):
        return None
    inside = [None if v is None else _Inside.of(v) for v in vectors]
    if any(v is not None and _wanted_outside(v.tensor) for v in inside):
        return None
    found: dict[int, int] = {}
    for v in inside:
        if v is not None:
            for level, _ in v.dims:
                found.setdefault(level, 1)
    many = tuple(level for level in sorted(found) if level not in layers.mapped)
    levels = (*many, *layers.mapped)
    with outside():
        first = [None if v is None else v.with_first(levels) for v in inside]
        sizes = tuple(max((v.shape[i] for v in first if v is not None), default=1) for i in range(len(many)))
        count, number = len(many), math.prod(sizes)

        def together(v: Tensor, core: int) -> Tensor:
            own, shape = v.dim() - len(levels) - core, v.shape[count:]
            missing = [1] * (len(batch) - len(layers.mapped) - own)
            whole = torch.Size((number, *shape[: len(layers.mapped)], *missing, *shape[len(layers.mapped) :]))
            return v if v.shape == whole else v.expand(*sizes, *shape).reshape(whole)

        plain = tuple(None if v is None else together(v, core) for v, core in zip(first, cores, strict=True))
    return Vectors(many, sizes, plain)


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
