"""The primary backend: the batched primal-dual interior-point method of `diffopt.solvers`, by the best executor."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt import kkt
from diffopt.backends.base import Backend, Capabilities, RawPoint
from diffopt.backends.registry import register
from diffopt.errors import BackendUnsupported
from diffopt.packed import Packed
from diffopt.problems.forms import Form, QPForm
from diffopt.solution import Certificate, Status
from diffopt.solvers import cpu_executor, cuda_executor, pdipm
from diffopt.solvers.executor import Answer, Data, Executor
from diffopt.solvers.settings import Settings
from diffopt.warm_start import Start


@register("pdipm")
class PdipmBackend(Backend):
    """Solves batches of convex QPs and LPs, on any device.

    Works in float64 whatever the dtype of the data: float32 data gives float32 results, rounded once.
    `Settings.executor` chooses who does the work; ``Solution.executor`` names who did, and the reduction. Instances
    that a compiled executor leaves are solved in torch operations.
    """

    can = Capabilities(
        forms=(QPForm,),
        devices=frozenset({"cpu", "cuda"}),
        batched=True,
        accuracy=1e-9,
        asynchronous=True,
        priority=100,
        warm_start=True,
    )

    def solve(self, form: Form, settings: Settings, keep: bool = False, start: Start | None = None) -> kkt.Solved:
        """Solve a batch; see `Backend.solve`. A compiled executor recomputes the residuals itself."""
        assert isinstance(form, QPForm)
        notes = form.signature.notes
        data = Data(form.Q, form.q, form.A, form.b, form.G, form.h, form.lower, form.upper, form.batch_shape, notes)
        # Who solves, and how accurately, follows from shapes and settings: decided once for both.
        plan: _Plan | None = notes.get("pdipm")
        if plan is None or plan.settings is not settings:
            executor = _executor(data, settings)
            weak = settings.weak_tolerance_for(form.dtype)
            notes["pdipm"] = plan = _Plan(settings, executor, _tolerance(form, settings), weak)
        executor = plan.executor
        if executor is None:
            return super().solve(form, settings, start=start)
        answer = executor.solve(data, settings, plan.tolerance, plan.weak_tolerance, keep, start)
        others = self._solve_rest(form, settings, answer, start) if answer.unsolved and settings.sync else ()
        name = "+".join([answer.name, *sorted({rest.found.executor for rest in others})]) if others else answer.name
        certificate = _certificates(form, answer.certificate, others) if others else answer.certificate
        return kkt.Solved(
            None, None, None, certificate, self.name, name,
            pullback=_pullback(executor, data, answer.saved) if keep else None,
            others=others, solved=answer.unsolved == 0, packed=answer.packed, sync=settings.sync,
        )  # fmt: skip

    def _solve_rest(
        self, form: QPForm, settings: Settings, answer: Answer, start: Start | None
    ) -> tuple[kkt.Rest, ...]:
        """Solve what the executor left by torch operations, into its answer; return it on its own, too.

        Parts of the batch are solved, of which shapes alone decide. So an instance has the same neighbours there
        whichever of them are left, and nothing of theirs changes a bit of its result.
        """
        shape = form.batch_shape
        count = shape.numel()
        packed = answer.packed
        flat = [v.view(count, v.shape[-1]) for v in packed.vectors()]
        residuals, counts, (status,) = (v.view(-1, count) for v in (packed.residuals, packed.counts, packed.status))
        left, size = status == Status.UNSOLVED, _part(form)
        others = []
        for begin in range(0, count, size):
            end = min(begin + size, count)
            mine = left[begin:end]
            if not bool(mine.any()):
                continue
            near = None if start is None else start.part(begin, end, shape)
            found = super().solve(form.part(slice(begin, end)), settings, start=near)
            for target, value in zip(flat, found.point, strict=True):
                _put(target[begin:end], value, mine.unsqueeze(-1))
            _put(status[begin:end], found.status, mine)
            _put(residuals[:, begin:end], found.residuals.to(residuals.dtype), mine)
            assert found.iterations is not None
            _put(counts[0, begin:end], found.iterations, mine)
            others.append(kkt.Rest(begin, end, mine, found))
        return tuple(others)

    def _solve(self, form: Form, settings: Settings, start: Start | None = None) -> RawPoint:
        assert isinstance(form, QPForm)

        def double(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.double()

        data = Data(
            form.Q.with_tensors(*(t.double() for t in form.Q.tensors())),
            form.q.double(),
            form.A.double(),
            form.b.double(),
            form.G.double(),
            form.h.double(),
            double(form.lower),
            double(form.upper),
            form.batch_shape,
        )
        near = None if start is None else Start(*(v.double() for v in start.expand(form.batch_shape)))
        result = pdipm.solve(data, settings, _tolerance(form, settings), near)
        x, nu, lam, lam_lower, lam_upper, s = (v.to(form.dtype) for v in result[:6])
        certificate = None if result.ray is None else Certificate(*(v.to(form.dtype) for v in result.ray))
        return RawPoint(
            x, nu, lam, lam_lower, lam_upper, result.status, result.iterations, certificate,
            executor=f"torch:{result.reduction}", s=s, system=_system(result.system, form),
        )  # fmt: skip


class _Plan(NamedTuple):
    settings: Settings
    executor: Executor | None
    tolerance: float
    weak_tolerance: float


def _tolerance(form: Form, settings: Settings) -> float:
    # Rounding to float32 costs about 1e-7: the float64 solve stops where that is what remains.
    return min(settings.tolerance_for(form.dtype), 1e-8 if form.dtype == torch.float32 else 1.0)


_KINDS = {"cpu": cpu_executor, "cuda": cuda_executor}


def _executor(data: Data, settings: Settings) -> Executor | None:
    """Return the compiled executor for a batch, or ``None`` for torch operations."""
    wanted, device = settings.executor, data.q.device.type
    if wanted == "torch" or data.batch.numel() == 0 or (wanted == "auto" and device not in _KINDS):
        return None
    found = _KINDS[device if wanted == "auto" else wanted].get()
    reason = "has no compiled library" if found is None else found.refuses(data, settings)
    if reason is None:
        return found
    if device == "cuda" and wanted == "auto":
        cuda_executor.warn_if_missing()
    if wanted != "auto":
        raise BackendUnsupported(
            f"Executor {wanted!r} cannot take this problem: it {reason}. Pass Settings(executor='auto')."
        )
    return None


MOST_AT_ONCE = 256
"""Instances that an executor has left, or that stand beside such, which torch operations solve at a time."""

NUMBERS_AT_ONCE = 2**25
"""Numbers in one KKT matrix of each of them, at most: a dozen or so such tensors live at a time."""


def _part(form: QPForm) -> int:
    """Return how many instances torch operations solve at a time, which is the same for all values of the data."""
    size = form.n + form.p + form.m
    return max(1, min(MOST_AT_ONCE, NUMBERS_AT_ONCE // size**2))


def _put(target: Tensor, value: Tensor, where: Tensor) -> None:
    target.copy_(torch.where(where, value, target))


def _certificates(form: QPForm, known: Certificate | None, others: tuple[kkt.Rest, ...]) -> Certificate | None:
    if all(rest.found.certificate is None for rest in others):
        return known
    sizes = {"x": form.n, "nu": form.p, "lam": form.m, "lam_lower": form.n, "lam_upper": form.n}
    count = form.batch_shape.numel()
    rows = {name: form.q.new_full((count, size), torch.nan) for name, size in sizes.items()}
    for begin, end, mine, found in others:
        if found.certificate is not None:
            for target, value in zip(rows.values(), found.certificate, strict=True):
                _put(target[begin:end], value, mine.unsqueeze(-1))
    return Certificate(**{name: row.view(*form.batch_shape, sizes[name]) for name, row in rows.items()})


def _pullback(executor: Executor, data: Data, saved: Any) -> kkt.Pullback:
    def run(
        point: kkt.Point | Packed, gradients: tuple[Tensor | None, ...], needed: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        # (A form has no tensors for absent bounds, and bounds come last.)
        lower, upper = data.lower is not None, data.upper is not None
        if lower and upper:
            return executor.pullback(data, saved, point, gradients, needed)
        if upper:
            found = executor.pullback(data, saved, point, gradients, (*needed[:-1], False, needed[-1]))
            return (*found[:-2], found[-1])
        absent = (False,) if lower else (False, False)
        return executor.pullback(data, saved, point, gradients, (*needed, *absent))[: len(needed)]

    def many(vectors: tuple[Tensor | None, ...], forward: bool) -> kkt.Sides:
        return executor.derivative(data, saved, vectors, forward)

    return kkt.Pullback(run, many if executor.many_at_once else None)


def _system(found: pdipm.ActiveSystem | None, form: QPForm) -> kkt.System | None:
    """Return the factor of the final active set in the terms of ``kkt``."""
    if found is None:
        return None
    shape = kkt.bound_shape(form)
    none = torch.zeros(shape, dtype=torch.bool, device=form.device)
    fixed = none
    if form.lower is not None and form.upper is not None:
        fixed = (form.lower == form.upper).expand(shape)
    weak_row = torch.zeros_like(found.row)
    lower = none if found.lower is None else found.lower
    upper = none if found.upper is None else found.upper
    return kkt.System(found.factor, found.scaling, kkt.Activity(found.row, lower, upper, weak_row, none, none, fixed))
