"""The CPU executor: the interior-point method in compiled code.

Dense problems with few constraints go by the dual form, as many at a time as a register holds where they are small;
what that does not solve, and all else, one at a time by the general method.

The library has a plain C interface (``cpu/executor.cpp``). Everything crosses it as arrays of 8-byte numbers, in the
order of the structures in ``cpu/batch.hpp``, which is cheaper to write than ctypes structures.
"""

from __future__ import annotations

import ctypes
import struct
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt.errors import BackendError, warn_of_gradients
from diffopt.linalg.matrices import Dense, Diagonal, DiagonalPlusLowRank
from diffopt.packed import Arrangement, Packed, model
from diffopt.solution import ALMOST, Certificate, Status, succeeded
from diffopt.solvers import library
from diffopt.solvers.executor import Answer, Data, Executor, Point
from diffopt.solvers.settings import Settings
from diffopt.warm_start import Start

LANES_UP_TO = 32
"""Variables, and constraints, up to which a problem takes one lane of a register rather than all of them."""

AT_ONCE = 1e9
"""Operations after which the library returns to Python, so that Ctrl-C is heard within about a second."""

MOST_LAYOUTS = 1000
"""Combinations of shapes that are remembered."""

_REDUCTIONS = {"auto": 0, "dual": 1, "diagonal": 2, "primal": 3}
_NO_START = (0,) * 5
_HEAD = struct.Struct("7q")
_CALL = struct.Struct("23q14q4d6q")
_GRADIENTS = struct.Struct("15q")
_MANY = struct.Struct("4q")
_COUNT = (1 << 40) - 1
_WAYS = {1: "dual", 2: "diagonal", 4: "primal"}
_NAMES = ["cpu:" + "+".join(name for bit, name in _WAYS.items() if ways & bit) for ways in range(8)]
_HESSIANS = {Dense: 0, Diagonal: 1, DiagonalPlusLowRank: 2}


_spare: list[Tensor] = []
"""At most one block of records (up to 256 MiB) that the next solve can have."""


def _take(size: int) -> Tensor:
    """Return memory for so many numbers: that of the last pullback if it fits, for new memory is slow memory."""
    try:
        spare = _spare.pop()
    except IndexError:
        return torch.empty(size, dtype=torch.float64)
    return spare if size <= spare.numel() <= 2 * size + 1024 else torch.empty(size, dtype=torch.float64)


def _give_back(records: Tensor, spare: list[Tensor] = _spare) -> None:
    if len(spare) == 0 and 8 * records.numel() <= 2**28:
        spare.append(records)


LARGE = 2**20
"""Bytes from which the C library may give memory back to the system, which clears what is taken anew page by page."""

MOST_LENT = 16


class _Lent(threading.local):
    """Memory of a thread's large gradients (`MOST_LENT`, up to 128 MiB), which serves again when only this list refers
    to it."""

    def __init__(self) -> None:
        self.storages: list[torch.UntypedStorage] = []


_lent = _Lent()

_references: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)


def _new_gradient(like: Tensor, size: int) -> Tensor:
    """Return a new tensor of so many bytes; a large one may get the memory of one that is gone."""
    if size < LARGE or _references is None:
        return torch.empty_like(like)
    storages = _lent.storages
    for storage in storages:
        # (It is free if nobody has it but the list, this variable and the call.)
        if size <= storage.nbytes() <= 2 * size and _references(storage._cdata) == 1 and sys.getrefcount(storage) == 3:
            break
    else:
        storage = torch.UntypedStorage(size)
        storages.append(storage)
        while len(storages) > MOST_LENT or sum(kept.nbytes() for kept in storages) > 2**27:
            storages.pop(0)
    return like.new_empty(0).set_(storage, 0, like.shape)  # type: ignore[call-overload]


class Saved:
    """What a solve keeps for its pullback: its records, what it passed to the library and how, and its report."""

    __slots__ = ("__weakref__", "call", "kept", "layout", "records", "report")

    def __init__(self, records: Tensor, kept: list[Tensor], layout: _Layout, call: bytes, report: Tensor) -> None:
        self.records, self.kept, self.layout, self.call, self.report = records, kept, layout, call, report

    def __del__(self, give_back: Callable[[Tensor], None] = _give_back) -> None:
        give_back(self.records)  # (bound early: at the end of the process modules are emptied)


class CpuExecutor(Executor):
    """See the module."""

    many_at_once = True

    def __init__(self, handle: ctypes.CDLL) -> None:
        self.handle = handle
        self._layouts: dict[tuple[object, ...], _Layout] = {}
        handle.diffopt_saved_size.restype = ctypes.c_int64
        handle.diffopt_saved_size.argtypes = [ctypes.c_char_p, ctypes.c_int64]
        self._solve = handle.diffopt_solve
        self._solve.restype = ctypes.c_int64
        self._solve.argtypes = [ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64]
        self._certificate = handle.diffopt_certificate
        self._certificate.restype = ctypes.c_int64
        self._certificate.argtypes = [ctypes.c_char_p, ctypes.c_int64, ctypes.c_void_p]
        self._pullback = handle.diffopt_pullback
        self._pullback.restype = ctypes.c_int64
        self._pullback.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64]
        self._many = handle.diffopt_many
        self._many.restype = ctypes.c_int64
        self._many.argtypes = [ctypes.c_char_p] * 3 + [ctypes.c_int64] * 3

    def refuses(self, data: Data, settings: Settings) -> str | None:
        """See `Executor`."""
        if data.q.device.type != "cpu":
            return f"runs on the CPU, the data is on {data.q.device.type}"
        if type(data.Q) not in _HESSIANS:
            return f"does not know {type(data.Q).__name__}"
        return None

    def solve(
        self,
        data: Data,
        settings: Settings,
        tolerance: float,
        weak_tolerance: float,
        keep: bool,
        start: Start | None = None,
    ) -> Answer:
        """See `Executor`."""
        near = None if start is None else start.expand(data.batch)
        layout = self._layout(data)
        kept, pointers = layout.pointers(data)
        count = layout.count
        packed = (Packed.empty if keep else Packed.sparing)(layout.arrangement, data.q)
        x, s, nu, lam, lower, upper, residuals, counts, status = packed.places()
        saved, size, once, at_saved, at_once = None, 0, 0, 0, 0
        if keep:
            size, once = layout.saved(self.handle, settings)
            saved = _take(count * size + once)
            at_saved = saved.data_ptr()
            at_once = at_saved + 8 * count * size if once else 0
        claim = settings.tolerance_for(data.q.dtype)
        call = layout.head + _CALL.pack(
            *pointers, *layout.strides, *(_NO_START if near is None else [v.data_ptr() for v in near]),
            x, s, lam, nu, lower, upper, status, counts, counts + 8 * count, counts + 16 * count, residuals,
            at_saved, at_once, size,
            tolerance, weak_tolerance, claim, claim if claim > ALMOST else ALMOST, settings.max_iterations,
            _REDUCTIONS[settings.reduction], settings.polish, keep, torch.get_num_threads(), LANES_UP_TO,
        )  # fmt: skip
        unsolved, ways = 0, 0
        for begin, end in layout.slices:
            found = self._checked(self._solve(call, begin, end))
            unsolved += found & _COUNT
            ways |= found >> 40
        certificate = self._certificates(call, packed) if unsolved > 0 and settings.sync else None
        record = None if saved is None else Saved(saved, kept, layout, call, packed.report)
        return Answer(packed, unsolved, certificate, record, _NAMES[ways])

    def _certificates(self, call: bytes, packed: Packed) -> Certificate | None:
        status, x, lam, nu = packed.status, packed.x, packed.lam, packed.nu
        flat = status.flatten()
        proven = ((flat == Status.PRIMAL_INFEASIBLE) | (flat == Status.DUAL_INFEASIBLE)).nonzero().flatten().tolist()
        if not proven:
            return None
        sizes = (x.shape[-1], nu.shape[-1], lam.shape[-1], x.shape[-1], x.shape[-1])
        rays = torch.full((flat.numel(), sum(sizes)), torch.nan, dtype=torch.float64)
        for index in proven:
            self._checked(self._certificate(call, index, rays[index].data_ptr()))
        pieces = rays.to(x.dtype).split(sizes, -1)
        return Certificate(*(v.reshape(*status.shape, v.shape[-1]) for v in pieces))

    def pullback(
        self, data: Data, saved: Saved, point: Point, gradients: tuple[Tensor | None, ...], needed: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        """See `Executor`."""
        layout = saved.layout
        x, s, nu, lam, lower, upper = [g if g is None or g.is_contiguous() else g.contiguous() for g in gradients]
        way = layout.reverse(needed, data)
        found = [None if like is None else _new_gradient(like, size) for like, size in way.written]
        packed = _GRADIENTS.pack(*[0 if v is None else v.data_ptr() for v in (x, s, lam, nu, lower, upper, *found)])
        poor = 0
        for begin, end in layout.slices:
            poor += self._checked(self._pullback(saved.call, packed, torch.get_num_threads(), begin, end))
        if poor:
            warn_of_gradients(poor, layout.count)
        if way.collected:
            _collect(layout, saved.report, point, way.collected, found)
        return tuple([
            None if place is None else found[place] if shape is None else _in_shape(shape, found[place], data.q)
            for place, shape in way.returned
        ])  # fmt: skip

    def derivative(
        self, data: Data, saved: Saved, vectors: tuple[Tensor | None, ...], forward: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """See `Executor`."""
        layout = saved.layout
        like, count = next((v, len(v)) for v in vectors if v is not None)
        shape, (n, p, m) = (count, *data.batch), layout.sizes
        bounded = data.lower is not None or data.upper is not None
        first, *rest = (like.new_empty((*shape, size)) for size in (n, p, m, *((n, n) if bounded else ())))
        lower, upper = rest[2:] if bounded else (None, None)
        x, s, nu, lam, *bounds = [None if v is None else v.contiguous() for v in vectors]
        places = (x, s, lam, nu, *bounds, None, first, None, rest[0], None, rest[1], lower, upper, None)
        packed = _GRADIENTS.pack(*[0 if v is None else v.data_ptr() for v in places])
        many = _MANY.pack(count, layout.count, 1, forward)
        poor = 0
        for begin, end in layout.slices:
            poor += self._checked(self._many(saved.call, packed, many, torch.get_num_threads(), begin, end))
        if poor:
            warn_of_gradients(poor, layout.count)
        return first, rest[0], rest[1], lower, upper

    def _layout(self, data: Data) -> _Layout:
        notes: dict[Any, _Layout] = {} if data.notes is None else data.notes
        noted = notes.get(self)  # (another library keeps other records)
        if noted is not None:
            return noted
        Q, q, A, b, G, h, lower, upper, batch, _ = data
        key = (
            batch, q.dtype, type(Q), *[t.shape for t in Q.tensors()], q.shape, A.shape, b.shape, G.shape, h.shape,
            None if lower is None else lower.shape, None if upper is None else upper.shape,
        )  # fmt: skip
        known = self._layouts.get(key)
        if known is None:
            if len(self._layouts) >= MOST_LAYOUTS:
                self._layouts.clear()
            known = self._layouts[key] = _Layout(data)
        notes[self] = known
        return known

    @staticmethod
    def _checked(code: int) -> int:
        if code < 0:
            raise BackendError("The CPU executor ran out of memory. Solve fewer instances at a time.")
        return code


def _in_shape(shape: torch.Size, gradient: Tensor | None, like: Tensor) -> Tensor:
    """Return a gradient summed over what its tensor was broadcast along; ``None`` is that of no entries."""
    if gradient is None:
        return like.new_zeros(shape)
    if gradient.shape == shape:
        return gradient
    if gradient.numel() == shape.numel():
        return gradient.reshape(shape)
    return gradient.sum_to_size(shape)


class _Reverse(NamedTuple):
    """What of a pullback depends on shapes, and on which gradients are wanted, alone.

    ``written``: what the library writes for Q, q, A, b, G, h, lower, upper and the low-rank factor, as a model, and its
    bytes; ``None`` is not written. ``collected``: the shared matrices ("Q", "A", "G") whose gradient is a product of
    what is written. ``returned``: for each of `Data.tensors` which of those is its gradient, if it is wanted, and its
    shape, if that is another.
    """

    written: tuple[tuple[Tensor | None, int], ...]
    collected: tuple[str, ...]
    returned: tuple[tuple[int | None, torch.Size | None], ...]


def _collect(layout: _Layout, report: Tensor, point: Point, which: tuple[str, ...], found: list[Tensor | None]) -> None:
    """Write the gradients of shared matrices into ``found``: the sums of the outer products of all instances."""
    # (The gradients of an instance that failed are zero, or NaN if they were asked for: NaN in the product, then.)
    status = layout.arrangement.status(report)
    usable = succeeded(status).unsqueeze(-1)

    def flat(v: Tensor) -> Tensor:
        return torch.where(usable, v, 0.0).flatten(0, -2)

    _, dq, _, db, _, dh, *_ = found
    assert dq is not None
    x, slope = flat(point.x), dq.flatten(0, -2)
    if "Q" in which:
        half = slope.mT @ x
        found[0] = 0.5 * (half + half.mT)
    if "A" in which and db is not None:
        found[2] = flat(point.nu).mT @ slope - db.flatten(0, -2).mT @ x
    if "G" in which and dh is not None:
        found[4] = flat(point.lam).mT @ slope - dh.flatten(0, -2).mT @ x


class _Layout:
    """What of a call depends on shapes alone.

    Attributes:
        count, sizes: instances; (n, p, m).
        head: the first numbers of a call.
        arrangement: of the answer.
        width: bytes of a number.
        slices: the ranges of instances, one for each call into the library.
        shared: for each field of the C structure, whether all instances share it.
        present: for each field 1 if there is one, else 0.
        strides: numbers from one instance to the next, 0 for shared fields.
    """

    def __init__(self, data: Data) -> None:
        self.count = count = data.batch.numel()
        self.sizes = n, p, m = data.q.shape[-1], data.A.shape[-2], data.G.shape[-2]
        self.hessian = _HESSIANS[type(data.Q)]
        self.rank = data.Q.tensors()[1].shape[-1] if self.hessian == 2 else 0
        self.head = _HEAD.pack(count, n, p, m, self.rank, self.hessian, data.q.dtype == torch.float32)
        self.slices = tuple(_slices(count, n, p, m))
        self.arrangement = Arrangement(data.batch, n, p, m)
        self.shared: list[bool] = []
        self.strides: list[int] = []
        self._expand: list[torch.Size | None] = []
        self.present = [int(tensor is not None) for tensor in _fields(data)]
        self.width = data.q.element_size()
        self._saved: dict[object, tuple[int, int]] = {}
        self._reverse: dict[tuple[bool, ...], _Reverse] = {}
        for tensor, dims in zip(_fields(data), (1 if self.hessian else 2, 2, 1, 2, 1, 2, 1, 1, 1), strict=True):
            if tensor is None:
                self.shared.append(True)
                self.strides.append(0)
                self._expand.append(None)
                continue
            core = tensor.shape[tensor.dim() - dims :]
            lead = tensor.shape[: tensor.dim() - dims]
            own = lead.numel() != 1 or count == 1
            self.shared.append(not own)
            self.strides.append(core.numel() if own else 0)
            self._expand.append(torch.Size((*data.batch, *core)) if own and lead.numel() != count else None)

    def reverse(self, needed: tuple[bool, ...], data: Data) -> _Reverse:
        """Return how the pullback goes for these gradients of data of this layout."""
        known = self._reverse.get(needed)
        if known is None:
            Q, *factor, _, A, _, G, _, lower, upper = needed
            Q_shared, _, _, A_shared, _, G_shared, *_ = self.shared
            dense = self.hessian == 0
            n, p, m = self.sizes
            # (Those of vectors without bounds are always written.)
            wanted: list[tuple[int, ...] | None] = [
                ((n, n) if dense else (n,)) if Q and not (Q_shared and dense) else None,
                (n,),
                (p, n) if A and not A_shared else None,
                (p,) if p else None,
                (m, n) if G and not G_shared else None,
                (m,) if m else None,
                (n,) if lower else None,
                (n,) if upper else None,
                (n, self.rank) if any(factor) else None,
            ]
            models = [
                None if core is None else model((*self.arrangement.batch, *core), data.q.dtype, data.q.device)
                for core in wanted
            ]
            collected = {"Q": Q and Q_shared and dense, "A": A and A_shared and p > 0, "G": G and G_shared and m > 0}
            returned: list[tuple[int | None, torch.Size | None]] = []
            places = (0, *(8 for _ in factor), *range(1, 8))
            for place, tensor, need in zip(places, data.tensors(), needed, strict=True):
                like = models[place]
                same = like is not None and tensor is not None and like.shape == tensor.shape
                returned.append((
                    place if need and tensor is not None else None, None if same or tensor is None else tensor.shape
                ))  # fmt: skip
            known = self._reverse[needed] = _Reverse(
                tuple((like, 0 if like is None else self.width * like.numel()) for like in models),
                tuple(name for name, here in collected.items() if here),
                tuple(returned),
            )
        return known

    def pointers(self, data: Data) -> tuple[list[Tensor], list[int]]:
        """Return the copies to keep alive, of what is not contiguous, and where each field's data lies."""
        kept: list[Tensor] = []
        pointers: list[int] = []
        for tensor, expand in zip(_fields(data), self._expand, strict=True):
            if tensor is None:
                pointers.append(0)  # an absent side; an empty matrix need not have any memory either
                continue
            if expand is None and tensor.is_contiguous():
                pointers.append(tensor.data_ptr())
                continue
            if expand is not None:
                tensor = tensor.detach().expand(expand)
            if not tensor.is_contiguous():
                tensor = tensor.detach().contiguous()
                kept.append(tensor)
            pointers.append(tensor.data_ptr())
        return kept, pointers

    def saved(self, handle: ctypes.CDLL, settings: Settings) -> tuple[int, int]:
        """Return how many numbers a solve keeps of each instance, and once for all."""
        key = settings.polish, settings.reduction
        known = self._saved.get(key)
        if known is None:
            call = self.head + _CALL.pack(
                *self.present, *self.strides, *_NO_START, *[0] * 14,
                0.0, 0.0, 0.0, 0.0, 0, _REDUCTIONS[settings.reduction], settings.polish, 0, 0, LANES_UP_TO,
            )  # fmt: skip
            known = self._saved[key] = handle.diffopt_saved_size(call, 0), handle.diffopt_saved_size(call, 1)
        return known


def _fields(data: Data) -> tuple[Tensor | None, ...]:
    """Return the tensors in the order of the C structure: the low-rank factor of Q is second."""
    Q, *factor = data.Q.tensors()
    return Q, (factor[0] if factor else None), *data[1:8]


def _slices(count: int, n: int, p: int, m: int) -> list[tuple[int, int]]:
    c = m + p + n
    each = n**3 + n * n * c + 4 * c**3 + 1e4
    size = max(64, int(AT_ONCE / each) // 64 * 64)
    return [(begin, min(begin + size, count)) for begin in range(0, count, size)]


_executor: CpuExecutor | None = None


def get() -> CpuExecutor | None:
    """Return the executor, or ``None`` where there is no compiled library (said once, in a warning)."""
    global _executor
    if _executor is None:
        handle = library.load()
        if handle is not None:
            _executor = CpuExecutor(handle)
    return _executor
