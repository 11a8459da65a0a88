"""Relaxed gradients: exact solutions with the derivatives of a smooth problem nearby.

The solution of a linear program sits at a vertex, and its derivative in the cost is zero almost everywhere. That of a
smooth problem nearby is not, and says in which direction the solution will jump. The solution stays the exact one;
its derivative is the exact one of the other problem, and no approximation of either.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from diffopt import implicit, kkt, transforms
from diffopt.cones import kinds
from diffopt.errors import BackendUnsupported, InaccurateSolutionWarning
from diffopt.gates import aliases, moved_like
from diffopt.problems.barrier import BarrierForm, with_ridge
from diffopt.problems.forms import Form, QPForm
from diffopt.solution import ALMOST, Solution, Status
from diffopt.solvers import central_path
from diffopt.solvers.executor import Data
from diffopt.solvers.settings import Settings


class Found(NamedTuple):
    """The relaxed problem, solved on plain tensors; ``residual`` ``(*batch,)``."""

    prepared: implicit.Prepared
    residual: Tensor
    failed: Tensor


Plainly = Callable[[Form, Callable[[Form], Found]], Found]
"""Calls a function with a form over plain tensors, also inside transforms of ``torch.func``."""


def relax(
    form: Form, solution: Solution, settings: Settings, solve: Callable[[Form], kkt.Solved], plainly: Plainly
) -> Solution:
    """Return an exact solution with the derivatives of a relaxed problem.

    Args:
        form: the problem, attached to its parameters.
        solution: its solution; the value keeps its own derivative, which is exact and not zero.
        settings: `Settings.relaxation` and `Settings.relaxation_mode`.
        solve: solves a form on plain tensors.
        plainly: see `Plainly`.

    Raises:
        BackendUnsupported: the problem is not a quadratic program over the nonnegative cone.
    """
    problem, work = _problem(form, solution, settings, solve)
    found = plainly(problem, work)
    _warn(solution, found)
    return _attached(form, problem, solution, found, settings)


def _problem(
    form: Form, solution: Solution, settings: Settings, solve: Callable[[Form], kkt.Solved]
) -> tuple[Form, Callable[[Form], Found]]:
    """Return the relaxed problem, attached, and what solves it on plain tensors."""
    check(form)
    assert isinstance(form, QPForm) and settings.relaxation is not None
    exact, size = form.widened(), settings.relaxation
    bad = transforms.plain(~solution.ok)
    weak = settings.weak_tolerance_for(torch.float64)
    if settings.relaxation_mode == "ridge":

        def ridge(plain: Form) -> Found:
            found = solve(plain)
            return _prepared(plain, found, found.residuals.amax(0), bad, settings.kink_rule, weak)

        return with_ridge(exact, size), ridge

    def barrier(plain: Form) -> Found:
        assert isinstance(plain, BarrierForm)
        return central_point(plain, bad, settings.kink_rule, weak)

    return BarrierForm(exact, size), barrier


def _warn(solution: Solution, found: Found) -> None:
    bad, failed, residual = map(transforms.plain, (~solution.ok, found.failed, found.residual))
    if not bool((failed & ~bad).any()):
        return
    warnings.warn(
        f"The relaxed problem of {int((failed & ~bad).sum())} of {failed.numel()} instances was not solved (worst "
        f"relative residual {float(residual[failed & ~bad].max()):.1e}); their gradient is NaN. A central path exists "
        f"only where some x satisfies all inequalities strictly and the solutions are bounded; "
        f"Settings(relaxation_mode='ridge') does without.",
        InaccurateSolutionWarning,
        stacklevel=6,
    )


def label(settings: Settings) -> str:
    """Return what `Solution.gradient` says."""
    return f"{settings.relaxation_mode}({settings.relaxation:g})"


def _attached(form: Form, problem: Form, solution: Solution, found: Found, settings: Settings) -> Solution:
    near = implicit.attach(problem, found.prepared)
    fields = {"x": near.x, "nu": near.nu}
    if isinstance(problem, BarrierForm):
        slacks, there = problem.slacks(near.x)
        fields["s"] = torch.where(there.row, slacks.row, 0.0)
        fields["lam"], low, high = problem.multipliers(near.x)
        # (Zero for fixed variables, whose forces are multipliers of the barrier problem; those of all others are zero.)
        fields["lam_lower"], fields["lam_upper"] = low + near.lam_lower, high + near.lam_upper
    else:
        fields |= {name: getattr(near, name) for name in ("s", "lam", "lam_lower", "lam_upper")}
    moved = {name: moved_like(getattr(solution, name).detach(), value.to(form.dtype)) for name, value in fields.items()}
    return replace(
        solution, **moved, gradient=label(settings), gradient_residual=found.residual, _value=lambda: solution.value
    )


class Reverse(NamedTuple):
    """The reverse pass of a solution with relaxed gradients, kept elsewhere, as `pulled.Reverse`."""

    solution: Solution
    found: Found
    settings: Settings

    def first_order(
        self, form: Form, point: kkt.Point, gradients: tuple[Tensor | None, ...], needed: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        """See `pulled.Reverse.first_order`."""
        with torch.no_grad():
            return self.with_graph(implicit.over_leaves(form, needed), point, gradients, needed)

    def with_graph(
        self, form: Form, point: kkt.Point, gradients: tuple[Tensor | None, ...], needed: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        """See `pulled.Reverse.with_graph`."""
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            form = form.with_tensors(aliases(form.tensors()))
            problem, _ = _problem(form, self.solution, self.settings, lambda plain: self.found.prepared.found)
            near = _attached(form, problem, self.solution, self.found, self.settings)
            outputs = (near.x, near.s, near.nu, near.lam, near.lam_lower, near.lam_upper)
            used = [(v, g) for v, g in zip(outputs, gradients, strict=True) if g is not None and v.requires_grad]
            inputs = [tensor for tensor, need in zip(form.tensors().values(), needed, strict=True) if need]
            found = iter(
                torch.autograd.grad(
                    [v for v, _ in used], inputs, [g for _, g in used],
                    create_graph=create_graph, allow_unused=True, materialize_grads=True,
                )
            )  # fmt: skip
        return tuple(next(found) if need else None for need in needed)


def reverse(form: Form, solution: Solution, settings: Settings, solve: Callable[[Form], kkt.Solved]) -> Reverse:
    """Return the reverse pass of an exact solution by the relaxed problem; on plain tensors."""
    problem, work = _problem(form, solution, settings, solve)
    found = work(problem)
    _warn(solution, found)
    return Reverse(solution, found, settings)


def check(form: Form) -> None:
    """Raise `BackendUnsupported` unless a form has relaxed gradients."""
    if isinstance(form, QPForm) and not kinds(form.cone) - {"NonnegativeCone"}:
        return
    what = ", ".join(sorted(kinds(form.cone))) if isinstance(form, QPForm) else type(form).__name__
    raise BackendUnsupported(
        f"`relaxation` takes quadratic and linear programs with inequalities, not {what}. Leave it out."
    )


def central_point(plain: BarrierForm, bad: Tensor, kink_rule: str, weak_tolerance: float) -> Found:
    """Solve a barrier problem on plain tensors; ``bad`` ``(*batch,)``: instances that are left out."""
    found, residual = _central(plain)
    return _prepared(plain, found, residual, bad, kink_rule, weak_tolerance)


def _central(plain: BarrierForm) -> tuple[kkt.Solved, Tensor]:
    qp = plain.qp
    data = Data(qp.Q, qp.q, qp.A, qp.b, qp.G, qp.h, qp.lower, qp.upper, qp.batch_shape)
    assert plain.kappa > 0
    at = central_path.solve(data, plain.kappa)
    x, none = at.x, at.x[..., :0]
    zero = torch.zeros_like(x)
    # The forces of fixed variables follow from stationarity; their sign says which side they belong to.
    force = plain.derivatives(x, none, at.nu).gradient + kkt.rmatvec(qp.A, at.nu)
    fixed = zero.bool() if qp.lower is None or qp.upper is None else (qp.lower == qp.upper).expand(x.shape)
    force = torch.where(fixed, -force, 0.0)
    point = kkt.Point(x, none, at.nu, none, (-force).clamp_min(0), force.clamp_min(0))
    status = torch.full(qp.batch_shape, int(Status.SOLVED), dtype=torch.int8, device=x.device)
    counts = torch.zeros_like(status, dtype=torch.int64)
    solved = kkt.Solved(point, status, torch.stack([at.residual] * 3), None, "central_path", "torch", counts)
    return solved, at.residual


def _prepared(
    plain: Form, found: kkt.Solved, residual: Tensor, bad: Tensor, kink_rule: str, weak_tolerance: float
) -> Found:
    failed = bad | ~(residual <= ALMOST)  # (NaN fails)
    status = torch.where(failed, int(Status.NUMERICAL_ERROR), found.status).to(torch.int8)
    point = kkt.Point(*(torch.where(failed.unsqueeze(-1), 0.0, v) for v in found.point))
    found = found.replace(point=point, status=status, system=None, pullback=None)
    return Found(implicit.prepare(plain, found, kink_rule, weak_tolerance), residual, failed)
