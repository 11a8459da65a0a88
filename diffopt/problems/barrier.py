"""Quadratic programs made smooth: by a logarithmic barrier, or by a ridge on Q."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffopt.cones import NonnegativeCone
from diffopt.linalg.matrices import Dense, SymmetricMatrix
from diffopt.problems.forms import Derivatives, Form, QPForm
from diffopt.shapes import matvec, rmatvec


class Sides(NamedTuple):
    """Something for each inequality: rows ``(*batch, m)``, lower and upper bounds ``(*batch, n)``."""

    row: Tensor
    low: Tensor
    high: Tensor


class BarrierForm(Form):
    """minimise 1/2 x'Qx + q'x - kappa sum_i log(s_i) subject to Ax = b, over the slacks s of all inequalities.

    Its solution is the point of the central path at complementarity kappa: s_i lam_i = kappa with lam_i = kappa / s_i.
    Fixed variables (lower = upper) stay fixed; infinite sides have no barrier.

    Args:
        qp: the program, over the nonnegative cone.
        kappa: in units of the objective, positive.
    """

    def __init__(self, qp: QPForm, kappa: float) -> None:
        self.qp, self.kappa = qp, kappa
        self.n, self.p, self.m = qp.n, qp.p, 0
        self.cone = NonnegativeCone(0)
        self.dtype, self.device, self.batch_shape = qp.dtype, qp.device, qp.batch_shape

    @property
    def lower(self) -> Tensor | None:  # type: ignore[override]
        """The lower bounds of fixed variables, -inf elsewhere; ``None`` where no variable can be fixed."""
        return self._where_fixed(self.qp.lower, -torch.inf)

    @property
    def upper(self) -> Tensor | None:  # type: ignore[override]
        """The upper bounds of fixed variables, as `lower`."""
        return self._where_fixed(self.qp.upper, torch.inf)

    def _where_fixed(self, bound: Tensor | None, absent: float) -> Tensor | None:
        if bound is None or self.qp.lower is None or self.qp.upper is None:
            return None
        return torch.where(self.qp.lower == self.qp.upper, bound, absent)

    def tensors(self) -> dict[str, Tensor]:
        return self.qp.tensors()

    def with_tensors(self, tensors: dict[str, Tensor]) -> BarrierForm:
        return BarrierForm(self.qp.with_tensors(tensors), self.kappa)

    def core_dims(self) -> tuple[int, ...]:
        return self.qp.core_dims()

    def rebatched(self, tensors: dict[str, Tensor]) -> BarrierForm:
        return BarrierForm(self.qp.rebatched(tensors), self.kappa)

    def slacks(self, x: Tensor) -> tuple[Sides, Sides]:
        """Return the slacks at x, 1 where there is no barrier, and where there is one."""
        qp, none = self.qp, x.new_full((), torch.inf)
        low = none.expand(x.shape) if qp.lower is None else x - qp.lower
        high = none.expand(x.shape) if qp.upper is None else qp.upper - x
        free = torch.ones((), dtype=torch.bool, device=x.device)
        if qp.lower is not None and qp.upper is not None:
            free = qp.lower < qp.upper
        there = Sides(torch.isfinite(qp.h), torch.isfinite(low) & free, torch.isfinite(high) & free)
        slacks = (qp.h - matvec(qp.G, x), low, high)
        return Sides(*(torch.where(a, s, 1.0) for a, s in zip(there, slacks, strict=True))), there

    def multipliers(self, x: Tensor) -> Sides:
        """Return kappa / s, 0 where there is no barrier."""
        s, there = self.slacks(x)
        return Sides(*(torch.where(a, self.kappa / v, 0.0) for a, v in zip(there, s, strict=True)))

    def objective(self, x: Tensor) -> Tensor:
        s, there = self.slacks(x)
        logs = [torch.where(a, v.log(), 0.0).sum(-1) for a, v in zip(there, s, strict=True)]
        return self.qp.objective(x) - self.kappa * (logs[0] + logs[1] + logs[2])

    def equalities(self, x: Tensor) -> Tensor:
        return self.qp.equalities(x)

    def inequalities(self, x: Tensor) -> Tensor:
        return x[..., :0]

    def derivatives(self, x: Tensor, lam: Tensor, nu: Tensor) -> Derivatives:
        qp, force = self.qp, self.multipliers(x)
        gradient = qp.Q.matvec(x) + qp.q + rmatvec(qp.G, force.row) - force.low + force.high
        # d(kappa / s) = lam^2 / kappa ds
        row, low, high = (v.square() / self.kappa for v in force)
        hessian = qp.Q.dense() + qp.G.mT @ (row.unsqueeze(-1) * qp.G) + torch.diag_embed(low + high)
        return Derivatives(gradient, Dense(hessian, symmetric=True), qp.A, qp.G[..., :0, :])


def with_ridge(form: QPForm, ridge: float) -> QPForm:
    """Return the program with Q + ridge I, in Q's structure."""
    first, *rest = form.Q.tensors()
    if isinstance(form.Q, Dense):
        first = first + ridge * torch.eye(form.n, dtype=first.dtype, device=first.device)
    else:
        first = first + ridge
    Q: SymmetricMatrix = form.Q.with_tensors(first, *rest)
    return QPForm(Q, form.q, form.A, form.b, form.G, form.h, form.lower, form.upper)
