"""The primary backend: the batched primal-dual interior-point method of `diffopt.solvers`."""

from __future__ import annotations

import torch
from torch import Tensor

from diffopt import kkt
from diffopt.backends.base import Backend, Capabilities, RawPoint
from diffopt.backends.registry import register
from diffopt.problems.forms import Form, QPForm
from diffopt.solution import Certificate
from diffopt.solvers import pdipm
from diffopt.solvers.settings import Settings


@register("pdipm")
class PdipmBackend(Backend):
    """Solves batches of convex QPs and LPs by torch operations, on any device.

    Works in float64 whatever the dtype of the data: float32 data gives float32 results, rounded once.
    ``Solution.executor`` reads ``torch:`` and the reduction that was used.
    """

    can = Capabilities(forms=(QPForm,), devices=frozenset({"cpu", "cuda"}), batched=True, accuracy=1e-9, priority=100)

    def _solve(self, form: Form, settings: Settings) -> RawPoint:
        assert isinstance(form, QPForm)

        def double(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.double()

        data = pdipm.Data(
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
        # Rounding to float32 costs about 1e-7: the float64 solve stops where that is what remains.
        tolerance = min(settings.tolerance_for(form.dtype), 1e-8 if form.dtype == torch.float32 else 1.0)
        result = pdipm.solve(data, settings, tolerance)
        x, nu, lam, lam_lower, lam_upper, s = (v.to(form.dtype) for v in result[:6])
        certificate = None if result.ray is None else Certificate(*(v.to(form.dtype) for v in result.ray))
        return RawPoint(
            x, nu, lam, lam_lower, lam_upper, result.status, result.iterations, certificate,
            executor=f"torch:{result.reduction}", s=s, system=_system(result.system, form),
        )  # fmt: skip


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
