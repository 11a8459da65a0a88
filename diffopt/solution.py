"""What a solve returns: one `Status` per instance, one `Solution` per batch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from diffopt.errors import ADJOINT
from diffopt.precision import full_precision, lowered
from diffopt.shapes import zeros_of


class Status(IntEnum):
    """How the solve of one instance ended. The default is `UNSOLVED`: success is never assumed."""

    UNSOLVED = 0
    SOLVED = 1
    ALMOST_SOLVED = 2
    MAX_ITERATIONS = 3
    PRIMAL_INFEASIBLE = 4
    DUAL_INFEASIBLE = 5
    NUMERICAL_ERROR = 6
    NONFINITE_INPUT = 7


ALMOST = 1e-6
"""Relative residual up to which a point that misses the tolerance is still ALMOST_SOLVED."""

INDEFINITE = 1e-7
"""A Q is refused as not convex when its smallest eigenvalue is below minus this (times the largest magnitude of one, in
the units in which a backend solves): far above what rounding does to a semidefinite matrix, also in float32."""

_SOLVED, _ALMOST_SOLVED = int(Status.SOLVED), int(Status.ALMOST_SOLVED)


def succeeded(status: Tensor) -> Tensor:
    """Return which instances have a solution: those SOLVED or ALMOST_SOLVED."""
    # (Numbers: torch.compile takes the comparison of a tensor with a member of an enumeration for False.)
    return (status == _SOLVED) | (status == _ALMOST_SOLVED)


def graded(worst: Tensor, tolerance: float) -> Tensor:
    """Return the int8 status of points by their worst relative residual: SOLVED, ALMOST_SOLVED or NUMERICAL_ERROR."""
    status = torch.where(worst <= max(ALMOST, tolerance), _ALMOST_SOLVED, int(Status.NUMERICAL_ERROR))
    return torch.where(worst <= tolerance, _SOLVED, status).to(torch.int8)


REMEDIES: dict[Status, str] = {
    Status.UNSOLVED: "no solver has run on it",
    Status.MAX_ITERATIONS: "raise `Settings.max_iterations`, loosen `Settings.tolerance`, or rescale the data",
    Status.PRIMAL_INFEASIBLE: "no x satisfies its constraints; relax them (see `Solution.certificate`)",
    Status.DUAL_INFEASIBLE: "its objective is unbounded below; add bounds or curvature (see `Solution.certificate`)",
    Status.NUMERICAL_ERROR: "check that the problem is convex and its data well scaled, or use float64",
    Status.NONFINITE_INPUT: "its data holds NaN or infinity (h and upper may be +inf and lower -inf: absent bounds)",
}
"""What to do about each failure; the message of `SolveFailed` quotes it."""


class Residuals(NamedTuple):
    """Relative residuals of the optimality conditions, each ``(*batch,)``, in the original data.

    With all norms the largest magnitude: ``primal`` is the worst violation of a constraint over
    1 + max(|Ax|, |b|, |Gx|, |h|), where h counts only in the rows that x violates (a finite bound counts
    as a row of G); ``dual`` is the gradient of the Lagrangian over 1 + max(|Qx|, |q|, |A'nu|, |G'lam|);
    ``gap`` is |x'Qx + q'x + b'nu + h'lam| over 1 + its largest term. 0 is exact; NaN where the point does
    not exist.
    """

    primal: Tensor
    dual: Tensor
    gap: Tensor

    def worst(self) -> Tensor:
        """Return the largest of the three, ``(*batch,)``."""
        return torch.maximum(torch.maximum(self.primal, self.dual), self.gap)


class Report(NamedTuple):
    """How a batch went, as two tensors: ``residuals`` ``(3, *batch)``, primal, dual and gap; ``counts``
    ``(3, *batch)`` int64, iterations, weakly active rows, dependent rows. `Solution` takes them apart on access."""

    residuals: Tensor
    counts: Tensor


class Shifts(NamedTuple):
    """How far the sides of the constraints were moved, in their units: x satisfies Ax = b + eq, Gx <= h + row
    and lower - low <= x <= upper + high, and is optimal for these (multipliers too).

    ``eq`` ``(*batch, p)`` has any sign; ``row`` ``(*batch, m)``, ``low`` and ``high`` ``(*batch, n)`` are >= 0.
    """

    eq: Tensor
    row: Tensor
    low: Tensor
    high: Tensor


def no_shifts(solution: Solution) -> Shifts:
    """Return shifts of zero, with the graph of a solution."""
    none = zeros_of(solution.x)
    return Shifts(zeros_of(solution.nu), zeros_of(solution.s), none, none)


@dataclass(frozen=True, eq=False)
class Solution:
    """The solution of a batch of problems. Signs: Lagrangian = f + nu'(Ax - b) + lam'(Gx - h)
    + lam_lower'(lower - x) + lam_upper'(x - upper), so all of lam, lam_lower, lam_upper are >= 0.

    Attributes:
        x: ``(*batch, n)``, the minimiser.
        s: ``(*batch, m)``, slack h - Gx >= 0, in the units of h.
        lam: ``(*batch, m)``, >= 0, objective units per unit of h: dvalue/dh = -lam.
        nu: ``(*batch, p)``, free: dvalue/db = -nu.
        lam_lower, lam_upper: ``(*batch, n)``, >= 0 (zeros where there is no bound):
            dvalue/dlower = lam_lower, dvalue/dupper = -lam_upper.
        value: ``(*batch,)``, the optimal value, computed on access (`ChangedDataError` if data was changed in
            place before). Its derivative is the partial derivative of the Lagrangian (the envelope theorem).
        status: ``(*batch,)`` int8, a `Status` per instance.
        ok: ``(*batch,)`` bool, True where the status is SOLVED or ALMOST_SOLVED.
        residuals: `Residuals`, recomputed from the original data.
        iterations: ``(*batch,)`` int64.
        weakly_active: ``(*batch,)`` int64, the number of constraints that hold with equality and
            have no multiplier. Above 0, x has a kink there and the gradient follows
            `Settings.kink_rule`.
        dependent: ``(*batch,)`` int64, how many rows too many the active rows hold (their number
            minus their rank, estimated). Above 0 the duals are not unique, and derivatives are
            claimed only along perturbations that keep the active rows consistent. -1 where unknown.
        certificate: for PRIMAL_INFEASIBLE and DUAL_INFEASIBLE instances the Farkas direction, else
            ``None`` (when no instance has one); see `Certificate`.
        backend, executor: who found the point.
        report: residuals and counts as they are kept; see `Report`.
        shifts: under ``on_infeasible="elastic"`` or ``"closest"``, how far each constraint was moved; else ``None``.
        gradient: what the derivatives are: ``"exact"``, or how they were relaxed (`Settings.relaxation`).
        gradient_residual: ``(*batch,)``, worst relative residual of the relaxed problem whose derivative is
            taken; above 1e-6 that problem was not solved, and the gradient is NaN. ``None`` for exact gradients.
        adjoint: ``(*batch,)``, computed on access: relative residual of the linear system behind the derivatives of x,
            refined, for a fixed right-hand side. Above 1e-6 x is not unique, or nearly so: it has no derivative, and
            what is returned is the shortest least-squares solution (NaN under ``kink_rule="nan"``). NaN where there
            is no solution, and where the system is not at hand (after a pytree, a file or a transform).
        unique: ``(*batch,)`` bool, computed on access: x is known to be the only solution. Else it is some solution, or
            the selected one.
        selection: which solution x is where it is not unique: ``"some"``, any; or that of `Settings.selection`.
        smallest_eigenvalue: ``(*batch,)``, of Q, computed on access from the data as it is then: below zero, beyond
            rounding, where a quadratic program is not convex. NaN where Q is not finite, or not at hand (after a
            pytree, a file or a transform; for problems given by their functions).

    x, s, lam, nu, lam_lower, lam_upper, value and shifts are differentiable in every tensor of the
    problem's data; the other fields are not. Registered as a pytree.
    """

    x: Tensor
    s: Tensor
    lam: Tensor
    nu: Tensor
    lam_lower: Tensor
    lam_upper: Tensor
    status: Tensor
    report: Report
    certificate: Certificate | None
    backend: str
    executor: str
    _value: Tensor | Callable[[], Tensor] = field(repr=False)
    shifts: Shifts | None = None
    gradient: str = "exact"
    gradient_residual: Tensor | None = None
    selection: str = "some"
    _hessian: Any = field(default=None, repr=False)
    _adjoint: Tensor | Callable[[], Tensor] | None = field(default=None, repr=False)

    @property
    def value(self) -> Tensor:
        """The optimal value, ``(*batch,)``; see the class."""
        if callable(self._value):
            # (What is kept is used outside of inference mode as well.)
            inside = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
            recording = torch.inference_mode(False) if inside else nullcontext()
            with recording, full_precision() if lowered() else nullcontext():
                object.__setattr__(self, "_value", self._value())
        return self._value  # type: ignore[return-value]

    @classmethod
    def later(cls, rest: Callable[[str], tuple[Any, bool]], **fields: Any) -> Solution:
        """Return a solution of which some fields are made when they are first read.

        Args:
            rest: returns the value of a field that is not among ``fields``, and whether to keep it.
            fields: all others, but for those that have their default.
        """
        made = object.__new__(cls)
        vars(made).update(fields, _rest=rest)
        return made

    def __getattr__(self, name: str) -> Any:
        rest = vars(self).get("_rest")
        if rest is None or name not in _LATER:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        value, keep = rest(name)
        if keep:
            vars(self)[name] = value
        return value

    def __getstate__(self) -> dict[str, Any]:
        """Return what travels to a file or another process: the values, not what would compute them."""
        made = {part.name: getattr(self, part.name) for part in fields(self)}
        made |= {"_value": self.value, "_hessian": None, "_adjoint": None}
        # (Copies: what an executor left packed is one piece of memory, and torch.save refuses views of several dtypes.)
        return pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, made)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *(part.name for part in fields(self))})

    @property
    def adjoint(self) -> Tensor:
        """``(*batch,)``; see the class."""
        if self._adjoint is None:
            return torch.full_like(self.residuals.gap, torch.nan)
        if callable(self._adjoint):
            with torch.no_grad(), full_precision() if lowered() else nullcontext():
                object.__setattr__(self, "_adjoint", self._adjoint())
        return self._adjoint  # type: ignore[return-value]

    @property
    def unique(self) -> Tensor:
        """``(*batch,)``; see the class."""
        return self.ok & (self.adjoint <= ADJOINT)

    @property
    def smallest_eigenvalue(self) -> Tensor:
        """``(*batch,)``; see the class."""
        if self._hessian is None:
            return torch.full_like(self.residuals.gap, torch.nan)
        return eigenvalues(self._hessian.dense())[..., 0].expand(self.status.shape)

    @property
    def residuals(self) -> Residuals:
        """Primal, dual and gap, each ``(*batch,)``; see the class."""
        return Residuals(*self.report.residuals.unbind(0))

    @property
    def iterations(self) -> Tensor:
        """``(*batch,)`` int64."""
        return self.report.counts[0]

    @property
    def weakly_active(self) -> Tensor:
        """``(*batch,)`` int64; see the class."""
        return self.report.counts[1]

    @property
    def dependent(self) -> Tensor:
        """``(*batch,)`` int64; see the class."""
        return self.report.counts[2]

    @property
    def ok(self) -> Tensor:
        """True where an instance was solved, ``(*batch,)``; mask with ``sol.x[sol.ok]``."""
        return succeeded(self.status)

    def __repr__(self) -> str:
        try:
            counts = status_counts(self.status) or "empty batch"
            worst = float(self.residuals.worst().nan_to_num(nan=torch.inf).max()) if self.status.numel() else 0.0
            how = f"{counts}, worst residual {worst:.1e}"
        except RuntimeError:  # inside vmap, and of tensors without values, nothing can be looked at
            how = "status not known here"
        return f"Solution(x={tuple(self.x.shape)}, {how}, {self.backend}/{self.executor})"


_LATER = ("s", "nu", "lam", "lam_lower", "lam_upper", "status", "report")
"""Fields that a solution may have packed; see `Solution.later`."""


class Certificate(NamedTuple):
    """Proof, per instance, that there is no solution. Rows without a claim are NaN.

    Primal infeasible: (nu, lam, lam_lower, lam_upper) with lam's >= 0, A'nu + G'lam - lam_lower
    + lam_upper = 0 and b'nu + h'lam - lower'lam_lower + upper'lam_upper = -1. Dual infeasible:
    a direction x with Qx = 0, Ax = 0, Gx <= 0, staying within finite bounds, and q'x = -1.
    """

    x: Tensor
    nu: Tensor
    lam: Tensor
    lam_lower: Tensor
    lam_upper: Tensor


def eigenvalues(matrix: Tensor) -> Tensor:
    """Return the eigenvalues of symmetric matrices ``(*batch, n, n)`` smallest first; NaN for those not finite."""
    matrix = matrix.detach()
    finite = torch.isfinite(matrix).all(-1).all(-1)
    found = torch.linalg.eigvalsh(torch.where(finite[..., None, None], matrix, 0.0))
    return torch.where(finite.unsqueeze(-1), found, torch.nan)


def status_counts(status: Tensor) -> str:
    """Return ``SOLVED: 3, PRIMAL_INFEASIBLE: 1`` for a tensor of statuses."""
    codes, counts = torch.unique(status.flatten().cpu(), return_counts=True)
    return ", ".join(f"{Status(int(c)).name}: {int(k)}" for c, k in zip(codes, counts, strict=True))


_CHILDREN = ("x", "s", "lam", "nu", "lam_lower", "lam_upper", "status", "value")
_OPTIONAL = ("certificate", "shifts", "gradient_residual")


def _flatten(solution: Solution) -> tuple[list[Any], tuple[str, str, str, str, tuple[str, ...]]]:
    # Every child has the batch dimensions first: where a transform adds one, it is the same for all of them.
    children = [getattr(solution, name) for name in _CHILDREN]
    children += [_three(part, 0, -1) for part in solution.report]
    # What there is not is no child: ``None`` would be a leaf, and transforms return tensors only.
    there = tuple(name for name in _OPTIONAL if getattr(solution, name) is not None)
    children += [getattr(solution, name) for name in there]
    return children, (solution.backend, solution.executor, solution.gradient, solution.selection, there)


def _unflatten(children: Any, context: tuple[str, str, str, str, tuple[str, ...]]) -> Solution:
    *fields, value, residuals, counts = list(children)[:10]
    backend, executor, gradient, selection, there = context
    optional = dict.fromkeys(_OPTIONAL) | dict(zip(there, list(children)[10:], strict=True))
    report = Report(_three(residuals, -1, 0), _three(counts, -1, 0))
    return Solution(
        *fields,
        report=report,
        backend=backend,
        executor=executor,
        gradient=gradient,
        selection=selection,
        _value=value,
        **optional,
    )


def _three(part: Any, place: int, target: int) -> Any:
    """Move the dimension of size 3 of a part of a `Report`; trees also hold other things than tensors."""
    return part.movedim(place, target) if isinstance(part, Tensor) and part.dim() else part


pytree.register_pytree_node(Solution, _flatten, _unflatten, serialized_type_name="diffopt.Solution")
