"""One solution of many, by name: the shortest, or the analytic centre of all of them.

Where x is not unique, the solver returns some solution. Its multipliers say which constraints every solution holds with
equality, and Qx is the same for all: these, and the other constraints, describe the set of all solutions, on which a
second problem is solved that has one solution. It is a program as any other, its data are those of the first, and its
derivatives therefore those of the selected solution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from diffopt import implicit, kkt, optimal_value, relaxed
from diffopt.cones import kinds
from diffopt.errors import BackendUnsupported
from diffopt.gates import gate
from diffopt.linalg.matrices import Diagonal
from diffopt.problems.barrier import BarrierForm
from diffopt.problems.forms import Form, QPForm
from diffopt.shapes import matvec
from diffopt.solution import Report, Solution, Status, graded
from diffopt.solvers.settings import Settings


class _Held(NamedTuple):
    """Inequalities that every solution holds with equality: rows ``(*batch, m)``, bounds ``(*batch, n)`` or none."""

    row: Tensor
    low: Tensor
    high: Tensor


class _Second(NamedTuple):
    """The solution of the second problem: x, attached; where it was solved; its kinks and iterations; by whom."""

    x: Tensor
    ok: Tensor
    weakly_active: Tensor
    iterations: Tensor
    executor: str


def check(form: Form) -> None:
    """Raise `BackendUnsupported` unless solutions of a form can be selected."""
    if isinstance(form, QPForm) and not kinds(form.cone) - {"NonnegativeCone"}:
        return
    what = ", ".join(sorted(kinds(form.cone))) if isinstance(form, QPForm) else type(form).__name__
    raise BackendUnsupported(
        f"`selection` takes quadratic and linear programs with inequalities, not {what}. Leave it out."
    )


def select(form: QPForm, first: Solution, settings: Settings, solve: Callable[[QPForm], Solution]) -> Solution:
    """Return the selected solution where x is not known to be unique, and elsewhere the first.

    An instance whose second problem is not solved ends as NUMERICAL_ERROR, with the first solution.

    Args:
        form: the problem, attached to its parameters.
        first: its solution.
        settings: `Settings.selection`.
        solve: solves and attaches a form, and never raises for failed instances.
    """
    name = settings.selection
    assert name is not None
    use = first.ok & ~first.unique
    if not bool(use.any()):
        return replace(first, selection=name)
    # In float64: sides that were rounded to float32 would contradict each other.
    exact = form.widened()
    at = torch.where(use.unsqueeze(-1), first.x.double(), 0.0)  # (no NaN of a failed instance meets the data)
    held = _held(exact, first, settings, use, name == "analytic_centre")
    face = _face(exact, at, held, use)
    second = _centre(face, ~use, settings) if name == "analytic_centre" else _shortest(face, solve)

    x = second.x
    s = torch.where(held.row, 0.0, torch.where(torch.isfinite(exact.h), exact.h - matvec(exact.G, x), torch.inf))
    s = s.clamp_min(0)  # (rounding)
    duals = (first.nu, first.lam, first.lam_lower, first.lam_upper)
    point = kkt.Point(x, s, *(v.double() for v in duals))
    take = use & second.ok
    with torch.no_grad():
        rounded = kkt.Point(*(v.detach().to(form.dtype).double() for v in point))
        residuals = torch.stack(kkt.residuals(exact.detach(), rounded)).to(first.report.residuals.dtype)
        status = graded(residuals.amax(0), settings.tolerance_for(form.dtype))
        status = torch.where(second.ok, status, int(Status.NUMERICAL_ERROR))
        failed = use & (status == int(Status.NUMERICAL_ERROR))
        status = torch.where(use, status, first.status).to(torch.int8)
        more = torch.stack([first.iterations + second.iterations, second.weakly_active, first.dependent])

    def merged(new: Tensor, old: Tensor) -> Tensor:
        return gate(torch.where(take.unsqueeze(-1), new.to(old.dtype), old), failed)

    x, s = merged(x, first.x), merged(s, first.s)
    nu, lam, lam_lower, lam_upper = (gate(v, failed) for v in duals)

    point = kkt.Point(x, s, nu, lam, lam_lower, lam_upper)
    attached = implicit.needs_graph(form)

    def value() -> Tensor:
        # Computed on access, with the graph that the other fields have, wherever that is.
        with torch.set_grad_enabled(attached):
            return optimal_value.value(form, point, status, attached)

    return Solution(
        *(x, s, lam, nu, lam_lower, lam_upper),
        status=status,
        report=Report(
            torch.where(take, residuals, first.report.residuals), torch.where(take, more, first.report.counts)
        ),
        certificate=first.certificate,
        backend=first.backend,
        executor="+".join(dict.fromkeys([first.executor, second.executor])),
        _value=optimal_value.unless_changed(form, point._asdict(), value),
        _hessian=form.Q,
        _adjoint=lambda: first.adjoint,
        selection=name,
    )


@torch.no_grad()
def _held(form: QPForm, first: Solution, settings: Settings, use: Tensor, weak_too: bool) -> _Held:
    """Read which inequalities have a multiplier; ``weak_too``: also those that hold with equality without one."""
    plain = form.detach()
    point = (first.x, first.s, first.nu, first.lam, first.lam_lower, first.lam_upper)
    mask = use.unsqueeze(-1)
    safe = kkt.Point(*(torch.where(mask, v.double(), 1.0) for v in point))
    _, scaling = kkt.assemble(plain, safe)
    active = kkt.activity(plain, safe, scaling, settings.weak_tolerance_for(form.dtype))
    row, low, high = active.row, active.lower, active.upper
    if weak_too:
        row, low, high = row | active.weak_row, low | active.weak_lower, high | active.weak_upper
    return _Held(row & mask, low & mask, high & mask)


def _face(form: QPForm, at: Tensor, held: _Held, use: Tensor) -> QPForm:
    """Return the set of all solutions as a problem without an objective.

    Every solution x satisfies Qx = Q at, and the held inequalities as equations; rows that are not held are zero.
    Equations may repeat each other. Their sides are consistent, and stay so as long as the set changes smoothly.
    """
    mask, n = use.unsqueeze(-1), form.n
    Q = torch.where(mask.unsqueeze(-1), form.Q.dense(), 0.0)
    rows = torch.where(held.row.unsqueeze(-1), form.G, 0.0)
    batch = form.batch_shape
    A = torch.cat([M.expand(*batch, *M.shape[-2:]) for M in (form.A, Q, rows)], -2)
    sides = (form.b, torch.where(mask, form.Q.matvec(at), 0.0), torch.where(held.row, form.h, 0.0))
    b = torch.cat([v.expand(*batch, v.shape[-1]) for v in sides], -1)
    lower, upper = form.lower, form.upper
    infinite = form.q.new_full((n,), torch.inf)
    if lower is not None or upper is not None:
        low, high = -infinite if lower is None else lower, infinite if upper is None else upper
        lower, upper = torch.where(held.high, high, low), torch.where(held.low, low, high)
    return QPForm(
        Diagonal(form.q.new_zeros(n)), form.q.new_zeros(n), A, b, form.G, torch.where(held.row, torch.inf, form.h),
        lower, upper,
    )  # fmt: skip


def _shortest(face: QPForm, solve: Callable[[QPForm], Solution]) -> _Second:
    """Minimise |x|^2 / 2."""
    one = Diagonal(torch.ones_like(face.q))
    found = solve(QPForm(one, face.q, face.A, face.b, face.G, face.h, face.lower, face.upper))
    return _Second(found.x, found.ok, found.weakly_active, found.iterations, found.executor)


def _centre(face: QPForm, idle: Tensor, settings: Settings) -> _Second:
    """Maximise the product of the slacks of all inequalities that are not held."""
    problem = BarrierForm(face, 1.0)
    plain = problem.detach()
    assert isinstance(plain, BarrierForm)
    with torch.no_grad():
        found = relaxed.central_point(plain, idle, settings.kink_rule, settings.weak_tolerance_for(torch.float64))
    none = torch.zeros_like(idle, dtype=torch.int64)
    return _Second(implicit.attach(problem, found.prepared).x, ~found.failed, none, none, "torch")
