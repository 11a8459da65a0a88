"""The CPU executor: the interior-point method in compiled code, for dense problems in dual form.

The library has a plain C interface (``cpu/executor.cpp``). Everything crosses it as arrays of 8-byte numbers, in the
order of the structures in ``cpu/batch.hpp``, which is cheaper to write than ctypes structures.
"""

from __future__ import annotations

import ctypes
import struct
from typing import NamedTuple

import torch
from torch import Tensor

from diffopt.errors import BackendError
from diffopt.linalg.matrices import Dense
from diffopt.solvers import library
from diffopt.solvers.executor import Answer, Data, Executor
from diffopt.solvers.settings import Settings

LANES_UP_TO = 32
"""Variables, and constraints, up to which a problem takes one lane of a register rather than all of them."""

AT_ONCE = 2e9
"""Operations after which the library returns to Python, so that Ctrl-C is heard within about a second."""

_FIELDS = ("Q", "factor", "q", "A", "b", "G", "h", "lower", "upper")
_REDUCTIONS = {"auto": 0, "dual": 1, "diagonal": 2, "primal": 3}
_BATCH = struct.Struct("25q")
_OPTIONS = struct.Struct("2d6q")
_ANSWER = struct.Struct("14q")
_GRADIENTS = struct.Struct("14q")


class _Plan(NamedTuple):
    """What a call passes to the library about its data; ``kept`` holds contiguous copies while it runs."""

    batch: bytes
    kept: tuple[Tensor, ...]
    layout: _Layout


class Saved(NamedTuple):
    """What a solve keeps for its pullback."""

    records: Tensor
    once: Tensor
    plan: _Plan
    answer: bytes


class CpuExecutor(Executor):
    """See the module."""

    def __init__(self, handle: ctypes.CDLL) -> None:
        self.handle = handle
        for name in ("diffopt_solve", "diffopt_pullback", "diffopt_saved_size"):
            getattr(handle, name).restype = ctypes.c_int64
        handle.diffopt_solve.argtypes = [ctypes.c_char_p] * 3 + [ctypes.c_int64] * 2
        handle.diffopt_pullback.argtypes = [ctypes.c_char_p] * 4 + [ctypes.c_int64] * 2
        handle.diffopt_saved_size.argtypes = [ctypes.c_char_p, ctypes.c_int64]

    def refuses(self, data: Data, settings: Settings) -> str | None:
        """See `Executor`."""
        if data.q.device.type != "cpu":
            return f"runs on the CPU, the data is on {data.q.device.type}"
        if not isinstance(data.Q, Dense):
            return f"takes a dense Q, not {type(data.Q).__name__}"
        n, m = data.q.shape[-1], data.G.shape[-2]
        rows = m + (0 if data.lower is None and data.upper is None else n)
        if rows > 1.9 * n:
            return f"takes up to 1.9 constraints for each variable, not {rows} for {n}"
        if settings.reduction not in ("auto", "dual"):
            return f"works in the dual form, not {settings.reduction!r}"
        if not settings.polish:
            return "always polishes"
        return None

    def solve(self, data: Data, settings: Settings, tolerance: float, weak_tolerance: float, keep: bool) -> Answer:
        """See `Executor`."""
        plan = _plan(data)
        batch, q = data.batch, data.q
        count, (n, p, m) = plan.layout.count, plan.layout.sizes
        x, s, lam = q.new_empty(*batch, n), q.new_empty(*batch, m), q.new_empty(*batch, m)
        nu, lower, upper = q.new_empty(*batch, p), q.new_empty(*batch, n), q.new_empty(*batch, n)
        status = torch.empty(batch, dtype=torch.int8)
        counts = torch.empty(3, *batch, dtype=torch.int64)
        residuals = torch.empty(3, *batch, dtype=torch.float64)
        size = once = 0
        if keep:
            size = self.handle.diffopt_saved_size(plan.batch, 0)
            once = self.handle.diffopt_saved_size(plan.batch, 1)
        records = torch.empty(count * size, dtype=torch.float64)
        shared = torch.empty(once, dtype=torch.float64)
        at, step = counts.data_ptr(), 8 * count
        answer = _ANSWER.pack(
            *(v.data_ptr() for v in (x, s, lam, nu, lower, upper, status)), at, at + step, at + 2 * step,
            residuals.data_ptr(), records.data_ptr() if keep else 0, shared.data_ptr() if once else 0, size,
        )  # fmt: skip
        options = _OPTIONS.pack(
            tolerance, weak_tolerance, settings.max_iterations, _REDUCTIONS[settings.reduction], settings.polish,
            keep, torch.get_num_threads(), LANES_UP_TO,
        )  # fmt: skip
        unsolved = 0
        for begin, end in plan.layout.slices:
            unsolved += self._checked(self.handle.diffopt_solve(plan.batch, options, answer, begin, end))
        saved = Saved(records, shared, plan, answer) if keep else None
        return Answer(
            x, s, lam, nu, lower, upper, status, counts[0], counts[1], counts[2], residuals, unsolved, saved, "cpu:dual"
        )

    def pullback(
        self, data: Data, answer: Answer, gradients: tuple[Tensor | None, ...], needed: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        """See `Executor`."""
        saved: Saved = answer.saved
        plan, batch = saved.plan, data.batch
        incoming = [None if g is None else g.contiguous() for g in gradients]
        like = answer.x
        n, p, m = like.shape[-1], answer.nu.shape[-1], answer.lam.shape[-1]
        Q_needed, _, A_needed, _, G_needed, _, lower_needed, upper_needed = needed
        Q_shared, _, _, A_shared, _, G_shared, *_ = plan.layout.shared
        dq, db, dh = like.new_empty(*batch, n), like.new_empty(*batch, p), like.new_empty(*batch, m)
        dlower = like.new_empty(*batch, n) if lower_needed else None
        dupper = like.new_empty(*batch, n) if upper_needed else None
        dQ = like.new_empty(*batch, n, n) if Q_needed and not Q_shared else None
        dA = like.new_empty(*batch, p, n) if A_needed and not A_shared else None
        dG = like.new_empty(*batch, m, n) if G_needed and not G_shared else None
        packed = _GRADIENTS.pack(*map(_pointer, (*incoming, dQ, dq, dA, db, dG, dh, dlower, dupper)))
        options = _OPTIONS.pack(0, 0, 0, 0, 0, 0, torch.get_num_threads(), 0)
        for begin, end in plan.layout.slices:
            self._checked(self.handle.diffopt_pullback(plan.batch, options, saved.answer, packed, begin, end))
        if (Q_needed and Q_shared) or (A_needed and A_shared) or (G_needed and G_shared):
            # A shared matrix collects the outer products of all instances: one matrix product.
            solved = (answer.status == 1).unsqueeze(-1)
            x, nu, lam = (torch.where(solved, v, 0.0).flatten(0, -2) for v in (answer.x, answer.nu, answer.lam))
            flat_q, flat_b, flat_h = (v.flatten(0, -2) for v in (dq, db, dh))
            if Q_needed and Q_shared:
                half = flat_q.mT @ x
                dQ = 0.5 * (half + half.mT)
            if A_needed and A_shared:
                dA = nu.mT @ flat_q - flat_b.mT @ x
            if G_needed and G_shared:
                dG = lam.mT @ flat_q - flat_h.mT @ x
        found = (dQ, dq, dA, db, dG, dh, dlower, dupper)
        return tuple(
            g.sum_to_size(t.shape) if wanted and g is not None and t is not None and g.shape != t.shape
            else (g if wanted else None)
            for g, t, wanted in zip(found, data.tensors(), needed, strict=True)
        )  # fmt: skip

    @staticmethod
    def _checked(code: int) -> int:
        if code < 0:
            raise BackendError("The CPU executor ran out of memory. Solve fewer instances at a time.")
        return code


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class _Layout(NamedTuple):
    """What of a plan depends on shapes alone. For each field of the C structure: its tensor's place in
    ``Data.tensors()`` or -1, whether it has to be expanded to the whole batch, and its stride."""

    count: int
    sizes: tuple[int, int, int]
    fields: tuple[tuple[int, bool, int], ...]
    shared: tuple[bool, ...]
    slices: tuple[tuple[int, int], ...]


_DIMS = (2, 0, 1, 2, 1, 2, 1, 1, 1)
MOST_LAYOUTS = 1000
_layouts: dict[tuple[object, ...], _Layout] = {}


def _layout(data: Data) -> _Layout:
    tensors = data.tensors()
    key = (data.batch, *[None if t is None else t.shape for t in tensors])
    known = _layouts.get(key)
    if known is not None:
        return known
    count = data.batch.numel()
    places = (0, -1, *range(1, 8))  # a dense Q has no low-rank factor
    fields, shared = [], []
    for place, dims in zip(places, _DIMS, strict=True):
        tensor = None if place < 0 else tensors[place]
        if tensor is None:
            fields.append((-1, False, 0))
            shared.append(True)
            continue
        core = tensor.shape[tensor.dim() - dims :]
        lead = tensor.shape[: tensor.dim() - dims]
        own = lead.numel() != 1 or count == 1
        fields.append((place, own and lead.numel() != count, core.numel() if own else 0))
        shared.append(not own)
    n, p, m = data.q.shape[-1], data.A.shape[-2], data.G.shape[-2]
    if len(_layouts) >= MOST_LAYOUTS:
        _layouts.clear()
    known = _layouts[key] = _Layout(count, (n, p, m), tuple(fields), tuple(shared), tuple(_slices(count, n, p, m)))
    return known


def _plan(data: Data) -> _Plan:
    layout = _layout(data)
    tensors = data.tensors()
    kept: list[Tensor] = []
    pointers, strides = [], []
    for place, expand, stride in layout.fields:
        if place < 0:
            pointers.append(0)  # an absent side; an empty matrix need not have any memory either
            strides.append(0)
            continue
        tensor = tensors[place]
        assert tensor is not None
        if expand:
            tensor = tensor.expand(
                *data.batch, *tensor.shape[tensor.dim() - _DIMS[place if place == 0 else place + 1] :]
            )
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
        kept.append(tensor)
        pointers.append(tensor.data_ptr())
        strides.append(stride)
    packed = _BATCH.pack(layout.count, *layout.sizes, 0, 0, data.q.dtype == torch.float32, *pointers, *strides)
    return _Plan(packed, tuple(kept), layout)


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
