"""Optimality of any problem: derivatives, residuals, which rows are active, and a Newton polish.

Everything here follows from the methods of a `Form`: objective, equalities, inequalities, bounds and
cone. Where a form has closed forms of its derivatives they are used; otherwise they are
derived by ``torch.func``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt.linalg.matrices import Dense, SymmetricMatrix
from diffopt.linalg.saddle import Blocks, Factor, Rows, Saddle
from diffopt.linalg.scaling import Scaling, equilibrate, regularisation
from diffopt.packed import Packed
from diffopt.problems.forms import Derivatives, Form, QPForm
from diffopt.shapes import matvec, max_abs, rmatvec
from diffopt.solution import Certificate, Residuals, succeeded


class Point(NamedTuple):
    """A primal-dual point: x ``(*batch, n)``, s and lam ``(*batch, m)``, nu ``(*batch, p)``,
    lam_lower and lam_upper ``(*batch, n)``; signs as in `diffopt.Solution`."""

    x: Tensor
    s: Tensor
    nu: Tensor
    lam: Tensor
    lam_lower: Tensor
    lam_upper: Tensor


def failed(status: Tensor) -> Tensor:
    """Return which instances have no solution, ``(*batch,)``."""
    return ~succeeded(status)


def safe(point: Point, failed: Tensor) -> Point:
    """Return the point with harmless values, all different, in failed instances: NaN times 0 is not 0."""

    def filled(v: Tensor) -> Tensor:
        filler = torch.linspace(0.7, 1.3, v.shape[-1], dtype=v.dtype, device=v.device)
        return torch.where(failed.unsqueeze(-1), filler, v)

    return Point(*(filled(v) for v in point))


def derivatives(form: Form, x: Tensor, lam: Tensor, nu: Tensor) -> Derivatives:
    """Return the derivatives of a form at a point: its closed forms, or derived ones."""
    closed = form.derivatives(x, lam, nu)
    return derived(form, x, lam, nu) if closed is None else closed


def derived(form: Form, x: Tensor, lam: Tensor, nu: Tensor) -> Derivatives:
    """Derive gradient, Hessian of the Lagrangian and Jacobians from the callables, by ``torch.func``.

    Instances do not depend on each other, so the derivative of a sum over the batch is that of each.
    """

    def lagrangian(x: Tensor) -> Tensor:
        constraints = (nu * form.equalities(x)).sum() + (lam * form.inequalities(x)).sum()
        return form.objective(x).sum() + constraints

    # By reverse mode twice: forward mode inside would forbid forward mode outside.
    hessian = _jacobian(torch.func.grad(lagrangian), x)
    return Derivatives(
        gradient(form, x),
        Dense(0.5 * (hessian + hessian.mT), symmetric=True),
        _jacobian(form.equalities, x),
        _jacobian(form.inequalities, x),
    )


def gradient(form: Form, x: Tensor) -> Tensor:
    """Return the gradient of the objective, ``(*batch, n)``."""
    if isinstance(form, QPForm):
        return form.Q.matvec(x) + form.q
    return torch.func.grad(lambda x: form.objective(x).sum())(x)


def _jacobian(function, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    values, pullback = torch.func.vjp(function, x)[:2]
    size = values.shape[-1]
    if size == 0:
        return x.new_zeros(*x.shape[:-1], 0, x.shape[-1])
    basis = torch.eye(size, dtype=x.dtype, device=x.device)
    basis = basis.reshape(size, *[1] * (values.dim() - 1), size).expand(size, *values.shape)
    return torch.func.vmap(lambda v: pullback(v)[0])(basis).movedim(0, -2)


def residuals(form: Form, point: Point) -> Residuals:
    """Return the relative residuals of a point in the original data; see `Residuals`.

    A nonlinear problem is judged by its linearisation at x: A and G are its Jacobians, b = Ax - e(x) and
    h = Gx - g(x), and the gradient of f stands for Qx + q.
    """
    x = point.x
    if isinstance(form, QPForm):
        slopes, A, G = [form.Q.matvec(x), form.q], form.A, form.G
    else:
        first = derivatives(form, x, point.lam, point.nu)
        slopes, A, G = [first.gradient], first.equality_jacobian, first.inequality_jacobian
    e, g = form.equalities(x), form.inequalities(x)
    Ax, Gx = matvec(A, x), matvec(G, x)
    b, h = Ax - e, Gx - g
    there = torch.isfinite(h) | torch.isnan(h)
    violation = form.cone.violation(torch.where(there, -g, 0.0))
    pull, push = rmatvec(A, point.nu), rmatvec(G, torch.where(there, point.lam, 0.0))
    side = torch.where(there, h * point.lam, 0.0).sum(-1)
    sizes = [Ax, b, torch.where(there, Gx, 0.0), torch.where(violation > 0, h, 0.0)]
    errors = [e, violation]
    for bound, dual, sign in ((form.lower, point.lam_lower, -1), (form.upper, point.lam_upper, 1)):
        if bound is None:
            continue
        finite = torch.isfinite(bound) | torch.isnan(bound)
        push = push + sign * torch.where(finite, dual, 0.0)
        side = side + sign * torch.where(finite, bound * dual, 0.0).sum(-1)
        errors.append(torch.where(finite, sign * (x - bound), 0.0).clamp_min(0))
        sizes += [torch.where(finite, x, 0.0), torch.where(errors[-1] > 0, bound, 0.0)]
    primal = _largest(errors) / (1 + _largest(sizes))
    dual = max_abs(sum(slopes) + pull + push) / (1 + _largest([*slopes, pull, push]))
    terms = [(v * x).sum(-1) for v in slopes] + [(b * point.nu).sum(-1), side]
    gap = torch.stack(torch.broadcast_tensors(*terms))
    shape = torch.broadcast_shapes(x.shape[:-1], gap.shape[1:])
    gap = gap.sum(0).abs() / (1 + gap.abs().amax(0))
    return Residuals(primal.expand(shape), dual.expand(shape), gap.expand(shape))


def _largest(vectors: list[Tensor]) -> Tensor:
    return torch.stack(torch.broadcast_tensors(*(max_abs(v) for v in vectors))).amax(0)


class Activity(NamedTuple):
    """Which rows hold with equality, boolean: ``(*batch, m)`` for rows, ``(*batch, n)`` for bounds or
    ``(*batch, 0)`` when the form has none.

    ``row``, ``lower``, ``upper``: active with a multiplier, or active by decision. ``weak_*``: hold
    with equality without a multiplier. ``fixed``: lower = upper.
    """

    row: Tensor
    lower: Tensor
    upper: Tensor
    weak_row: Tensor
    weak_lower: Tensor
    weak_upper: Tensor
    fixed: Tensor

    def weak_count(self) -> Tensor:
        """Return the number of weakly active rows of each instance."""
        return self.weak_row.sum(-1) + self.weak_lower.sum(-1) + self.weak_upper.sum(-1)


def activity(form: Form, point: Point, scaling: Scaling, tolerance: float) -> Activity:
    """Read the active set of a point in equilibrated units (in others it would depend on units).

    Args:
        tolerance: a row is weakly active when slack and multiplier are both at most this.
    """
    d, _, rows, cost = scaling
    shape = bound_shape(form)
    none = torch.zeros(shape, dtype=torch.bool, device=form.device)

    def read(slack: Tensor, dual: Tensor) -> tuple[Tensor, Tensor]:
        there = torch.isfinite(slack)
        weak = there & (slack <= tolerance) & (dual <= tolerance)
        return there & (dual > slack) & ~weak, weak

    row, weak_row = read(point.s * rows, point.lam * cost / rows)
    lower, weak_lower, upper, weak_upper, fixed = none, none, none, none, none
    if form.lower is not None and form.upper is not None:
        fixed = (form.lower == form.upper).expand(shape)
    if form.lower is not None:
        lower, weak_lower = read((point.x - form.lower) / d, point.lam_lower * cost * d)
    if form.upper is not None:
        upper, weak_upper = read((form.upper - point.x) / d, point.lam_upper * cost * d)
    return Activity(row, lower & ~fixed, upper & ~fixed, weak_row, weak_lower & ~fixed, weak_upper & ~fixed, fixed)


def bound_shape(form: Form) -> tuple[int, ...]:
    """Return the shape of what there is one of per bounded variable."""
    return (*form.batch_shape, 0 if form.lower is None and form.upper is None else form.n)


def rows_of(active: Activity, ratio_row: Tensor | None = None, ratio_bound: Tensor | None = None) -> Rows:
    """Return which rows take part in the KKT system of an active set, e = 0 unless ratios are given."""
    bound = active.lower | active.upper | active.fixed
    zero = torch.zeros((), dtype=torch.float64, device=bound.device)
    return Rows(
        active.row,
        zero.expand(active.row.shape) if ratio_row is None else ratio_row,
        bound,
        zero.expand(bound.shape) if ratio_bound is None else ratio_bound,
    )


class System(NamedTuple):
    """The KKT matrix of an active set, equilibrated and factored, in float64.

    ``active``: the rows that it was factored for.
    """

    factor: Factor
    scaling: Scaling
    active: Activity


Sides = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
"""What belongs to q, b, h, lower and upper, or to x, nu, lam, lam_lower and lam_upper."""


class Pullback(NamedTuple):
    """A solver's own first-order reverse pass, for weakly active rows left out (the rule ``"inactive"``), of the
    instances that it solved itself; the others (failed, or in `Solved.others`) pass zero.

    ``run(point, gradients, needed)``: the gradients for each tensor of the form, in the order of `Form.tensors`
    (``None`` where not needed), from those for the entries of the point, in its order (``None`` is zero). Shared
    tensors get the sum over the batch.

    ``many(vectors, forward)``, where the solver has it: the derivative of all instances at many vectors at once; see
    `diffopt.solvers.executor.Executor.derivative`.
    """

    run: Callable[[Point | Packed, tuple[Tensor | None, ...], tuple[bool, ...]], tuple[Tensor | None, ...]]
    many: Callable[[tuple[Tensor | None, ...], bool], Sides] | None = None


class Rest(NamedTuple):
    """Instances of a batch that another solver solved, after the first had left them: those of ``mine``
    ``(end - begin,)``, among the places from begin to end of the flattened batch, all of which ``found`` has."""

    begin: int
    end: int
    mine: Tensor
    found: Solved


class Solved:
    """A solved batch: detached values of the fields of `diffopt.Solution`. Backends make it, ``implicit``
    attaches it. ``residuals`` ``(3, *batch)``: primal, dual, gap. Where the solver has them: ``system``, the factored
    KKT system of the final active set; ``pullback``; and ``counts`` ``(3, *batch)`` as in `Report`, of which
    ``iterations`` is the first. ``others``: instances that the solver had left to another one; their values are
    in place, their counts and derivatives are not.
    ``solved``: whether every instance is SOLVED, where that is known without looking. ``packed``: point, status,
    residuals and counts as an executor left them, from which those are taken when they are asked for. ``sync``: whether
    the host may wait for values (`Settings.sync`)."""

    point: Point
    status: Tensor
    residuals: Tensor
    counts: Tensor | None

    def __init__(
        self,
        point: Point | None,
        status: Tensor | None,
        residuals: Tensor | None,
        certificate: Certificate | None,
        backend: str,
        executor: str,
        iterations: Tensor | None = None,
        counts: Tensor | None = None,
        system: System | None = None,
        pullback: Pullback | None = None,
        others: tuple[Rest, ...] = (),
        solved: bool = False,
        packed: Packed | None = None,
        sync: bool = True,
    ) -> None:
        self.certificate, self.backend, self.executor, self.iterations = certificate, backend, executor, iterations
        self.system, self.pullback, self.others, self.solved, self.packed = system, pullback, others, solved, packed
        self.sync = sync
        if packed is None:
            assert point is not None and status is not None and residuals is not None
            self.point, self.status, self.residuals, self.counts = point, status, residuals, counts

    def __getattr__(self, name: str) -> Any:
        packed: Packed | None = vars(self).get("packed")
        if packed is None or name not in ("point", "status", "residuals", "counts"):
            raise AttributeError(name)
        value = Point(*packed.vectors()) if name == "point" else getattr(packed, name)
        setattr(self, name, value)
        return value

    def unpacked(self) -> Solved:
        """Return a copy with everything taken apart: inside a transform the views would be its own."""
        return self.replace(point=self.point, status=self.status, residuals=self.residuals, counts=self.counts)

    def replace(self, **changes: Any) -> Solved:
        """Return a copy with some fields changed."""
        twin = object.__new__(Solved)
        vars(twin).update(vars(self), **changes)
        return twin


def assemble(form: Form, point: Point) -> tuple[Saddle, Scaling]:
    """Linearise a form at a point and prepare its saddle-point system for any active set, in float64."""
    d = derivatives(form, point.x, point.lam, point.nu)
    Q = d.hessian.with_tensors(*(_clean(t) for t in d.hessian.tensors()))
    A, G, slope = _clean(d.equality_jacobian), _clean(d.inequality_jacobian), _clean(d.gradient)
    scaling = equilibrate(Q, A, G, slope)
    return scaled_saddle(Q, A, G, scaling), scaling


def scaled_saddle(Q: SymmetricMatrix, A: Tensor, G: Tensor, scaling: Scaling) -> Saddle:
    """Return the saddle-point system of float64 data in equilibrated units."""
    d, eq, rows, _ = scaling
    Q = scaling.hessian(Q)
    A = eq.unsqueeze(-1) * A * d.unsqueeze(-2)
    G = rows.unsqueeze(-1) * G * d.unsqueeze(-2)
    return Saddle(Q, A, G, "primal", regularisation(scaling, "primal"))


def _clean(tensor: Tensor) -> Tensor:
    # Failed instances may hold NaN; they are masked later and must only not spoil a factorisation.
    return torch.nan_to_num(tensor.detach().double(), nan=0.0, posinf=0.0, neginf=0.0)


def to_scaled(r: Blocks, scaling: Scaling) -> Blocks:
    """Bring a right-hand side (residuals in original units) into equilibrated units."""
    d, eq, rows, cost = scaling
    bound = r.bound / d if r.bound.shape[-1] else r.bound
    return Blocks(cost * d * r.x, eq * r.eq, rows * r.row, bound)


def to_original(u: Blocks, scaling: Scaling) -> Blocks:
    """Bring a solution (x and duals in equilibrated units) back into original units."""
    d, eq, rows, cost = scaling
    bound = u.bound / (cost * d) if u.bound.shape[-1] else u.bound
    return Blocks(d * u.x, eq * u.eq / cost, rows * u.row / cost, bound)


def bound_target(form: Form, active: Activity) -> Tensor:
    """Return the value that each active bound holds x at (the mean of the two for a fixed variable)."""
    shape = (*form.batch_shape, form.n)
    lower = torch.zeros(shape, dtype=form.dtype, device=form.device) if form.lower is None else form.lower
    upper = lower if form.upper is None else form.upper
    held = torch.where(active.lower, lower, torch.where(active.upper, upper, 0.0))
    return torch.where(active.fixed, 0.5 * (lower + upper), held)


def conditions(form: Form, active: Activity, w: Blocks, ratio_row: Tensor, ratio_bound: Tensor) -> Blocks:
    """Return F(w; theta), the optimality conditions of an active set, attached to the form's tensors.

    w holds x, nu, lam and the combined force lam_upper - lam_lower of the bounds:

        stationarity   grad f + J_e' nu + J_g' lam + force
        equalities     e(x)
        active rows    g(x) - ratio lam
        active bounds  x - target - ratio force
    """
    lam = torch.where(active.row, w.row, 0.0)
    held = active.lower | active.upper | active.fixed
    force = torch.where(held, w.bound, 0.0) if held.shape[-1] else w.bound
    if isinstance(form, QPForm):
        slope = form.Q.matvec(w.x) + form.q + rmatvec(form.A, w.eq) + rmatvec(form.G, lam)
    else:

        def lagrangian(x: Tensor) -> Tensor:
            constraints = (w.eq * form.equalities(x)).sum() + (lam * form.inequalities(x)).sum()
            return form.objective(x).sum() + constraints

        slope = torch.func.grad(lagrangian)(w.x)
    row = torch.where(active.row, form.inequalities(w.x) - ratio_row * lam, 0.0)
    if not held.shape[-1]:
        return Blocks(slope, form.equalities(w.x), row, force)
    bound = torch.where(held, w.x - bound_target(form, active) - ratio_bound * force, 0.0)
    return Blocks(slope + force, form.equalities(w.x), row, bound)


def bound_force(form: Form, point: Point) -> Tensor:
    """Return the combined force lam_upper - lam_lower of the bounds, in the shape of `bound_shape`."""
    force = point.lam_upper - point.lam_lower
    return force[..., : bound_shape(form)[-1]]


def bound_duals(form: Form, active: Activity, force: Tensor) -> tuple[Tensor, Tensor]:
    """Split the combined force of the bounds into (lam_lower, lam_upper), each ``(*batch, n)``.

    A fixed variable's force belongs to the side that its sign says.
    """
    if not force.shape[-1]:
        none = force.new_zeros(*form.batch_shape, form.n)
        return none, none
    lower = torch.where(active.lower | (active.fixed & (force < 0)), -force, 0.0)
    upper = torch.where(active.upper | (active.fixed & (force >= 0)), force, 0.0)
    return lower, upper


@torch.no_grad()
def polish(form: Form, point: Point, weak_tolerance: float, most: int = 3) -> Point:
    """Take Newton steps on the conditions of the active set; keep what lowers the residuals.

    For points of solvers that stop at a tolerance of their own. An instance whose signs would break,
    or whose residual does not fall, is returned unchanged.
    """
    for _ in range(most):
        before = residuals(form, point).worst()
        saddle, scaling = assemble(form, point)
        safe = torch.isfinite(before)
        clean = Point(*(torch.where(safe.unsqueeze(-1), v, 0.0) for v in point))
        active = activity(form, clean, scaling, weak_tolerance)
        active = active._replace(
            row=active.row & safe.unsqueeze(-1),
            lower=active.lower & safe.unsqueeze(-1),
            upper=active.upper & safe.unsqueeze(-1) & ~active.lower,
        )
        zero = clean.x.new_zeros(())
        w = Blocks(clean.x, clean.nu, clean.lam, bound_force(form, clean))
        F = conditions(form, active, w, zero, zero)
        scaled = to_scaled(Blocks(*(-_clean(v) for v in F)), scaling)
        u, _ = saddle.factor_active(rows_of(active)).solve_accurately(scaled)
        step = Blocks(*(v.to(form.dtype) for v in to_original(u, scaling)))
        lam = torch.where(active.row, w.row + step.row, 0.0)
        x = w.x + step.x
        slack = -form.inequalities(x)
        lam_lower, lam_upper = bound_duals(form, active, w.bound + step.bound)
        new = Point(
            x,
            torch.where(active.row, 0.0, slack).clamp_min(0),
            w.eq + step.eq,
            lam.clamp_min(0),
            lam_lower.clamp_min(0),
            lam_upper.clamp_min(0),
        )
        after = residuals(form, new).worst()
        better = (after < before).unsqueeze(-1)
        point = Point(*(torch.where(better, a, b) for a, b in zip(new, point, strict=True)))
        if not bool(better.any()):
            break
    return point
