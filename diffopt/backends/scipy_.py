"""SciPy: HiGHS for linear programs, SLSQP or trust-constr for everything smooth. One instance at a time, on CPU."""

from __future__ import annotations

import importlib
import warnings
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffopt import kkt
from diffopt.backends.base import (
    Backend,
    Capabilities,
    InstancePoint,
    RawPoint,
    farkas,
    in_float64,
    instances,
    per_instance,
    ray,
    recession,
    screen,
    screen_bounds,
    solve_each,
)
from diffopt.backends.registry import register
from diffopt.backends.units import in_own_unit
from diffopt.errors import SettingsError
from diffopt.linalg.scaling import equilibrate
from diffopt.problems.base import NonlinearForm, checked_start
from diffopt.problems.forms import Derivatives, Form, QPForm
from diffopt.solution import ALMOST, Status
from diffopt.solvers.settings import Settings

METHODS = ("auto", "SLSQP", "trust-constr")

LINEAR_STATUSES = {
    0: Status.SOLVED,
    1: Status.MAX_ITERATIONS,
    2: Status.PRIMAL_INFEASIBLE,
    3: Status.DUAL_INFEASIBLE,
    4: Status.NUMERICAL_ERROR,
}
"""From the statuses of ``linprog`` to ours; any other code is NUMERICAL_ERROR."""

SMOOTH_STATUSES = {
    "SLSQP": {0: Status.SOLVED, 9: Status.MAX_ITERATIONS},
    "trust-constr": {0: Status.MAX_ITERATIONS, 1: Status.SOLVED, 2: Status.SOLVED},
}
"""From the statuses of ``minimize`` to ours; any other code is NUMERICAL_ERROR. SLSQP often ends at a
solution because rounding hides every descent (code 8): `Backend.solve` believes its residuals."""

LINEAR_ITERATIONS, SMOOTH_ITERATIONS = 100, 10
"""Iterations of ``linprog`` and of ``minimize`` for each of `Settings.max_iterations`, which counts those of
an interior-point method: simplex, SQP and trust-region iterations are smaller steps."""

LINEAR_TOLERANCE = 1e-10
"""Primal and dual feasibility of HiGHS, absolute; the tightest that it takes."""

FEASIBLE = 1e-8
"""Violation, in units of the rows, that HiGHS can tell from rounding with some margin."""

DEPENDENT = 1e-10
"""Singular values of A below this times the largest are zero."""

INSIDE = 1e-12
"""How far inside its bounds a nonlinear problem is evaluated, in units of x; the polish goes the rest."""

SLSQP_TOLERANCE = 1e-14
"""``ftol``, in units of the equilibrated objective: SLSQP then runs until rounding stops it."""

TRUST_TOLERANCES = {"gtol": 1e-10, "xtol": 1e-12, "barrier_tol": 1e-10}
"""Of trust-constr, in equilibrated units."""

COMPLEMENTARITY = 100.0
"""Weight of a multiplier times its slack against the stationarity of the Lagrangian. At an active row
with slack 1e-7 it distorts the multiplier by 1e-10, at an inactive one with slack 0.1 it takes all but 1 %."""

CUTS = 100
"""Cutting planes tried as a proof of infeasibility."""

FAR = 1e8
"""Distance that stands for infinity, in equilibrated units of x and of what x has reached."""


@register("scipy")
class ScipyBackend(Backend):
    """Solves with SciPy, as a reference: linear programs by ``linprog`` (HiGHS), the rest by ``minimize``.

    The multipliers of the smooth methods are estimated by least squares at the point that they
    found, and the whole is polished by Newton steps on the optimality conditions (see
    `Settings.polish`). Without the polish expect relative residuals of 1e-7 (SLSQP) or 1e-4
    (trust-constr), and 1e-10 for linear programs. Slow where n reaches some hundreds.

    Args:
        method: ``"SLSQP"``, ``"trust-constr"``, or ``"auto"`` (default): SLSQP, and trust-constr
            where SLSQP misses by more than 1e-6. Measured on random QPs with n = 1 to 60, SLSQP was
            3 to 7 times as fast, and its residuals before the polish were 7e-8 at worst against 2e-4.
            ``linprog`` solves linear programs whatever the method.

    Raises:
        SettingsError: the method is none of these.
    """

    requires = ("scipy",)
    extra = "scipy"
    can = Capabilities(forms=(QPForm, NonlinearForm), batched=False, accuracy=1e-9, priority=10)

    def __init__(self, method: str = "auto") -> None:
        if method not in METHODS:
            raise SettingsError(f"Unknown method {method!r}. Expected one of {', '.join(map(repr, METHODS))}.")
        self.method = method

    def _solve(self, form: Form, settings: Settings) -> RawPoint:
        methods = ("SLSQP", "trust-constr") if self.method == "auto" else (self.method,)
        limit = settings.max_iterations
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about accuracy and degeneracy, which `Backend.solve` measures itself
            if isinstance(form, QPForm):

                def solve_one(data: dict[str, Tensor]) -> InstancePoint:
                    return in_own_unit(data, lambda d: _solve_qp(d, methods, limit))

                return solve_each(form, settings, instances(form), solve_one, methods[0])
            assert isinstance(form, NonlinearForm)
            return solve_each(
                form, settings, _instance_forms(form), lambda f: _solve_nonlinear(f, methods, limit), methods[0]
            )


# --- linear programs, and proofs that there is no solution ---------------------------------------------------

# Arrays in this part: A (p, n), b (p,), G (m, n), h (m,), lower and upper (n,), infinite where absent.


class _Rows(NamedTuple):
    A: Any
    b: Any
    G: Any
    h: Any
    lower: Any
    upper: Any


def _rows(data: dict[str, Tensor]) -> tuple[_Rows, Any]:
    """Return the constraints of one instance without the rows where h is infinite, and a mask of those kept."""
    A, b, G, h, lower, upper = (data[name].numpy() for name in _Rows._fields)
    present = np.isfinite(h)
    return _Rows(A, b, G[present], h[present], lower, upper), present


def _linprog(cost: Any, rows: _Rows, limit: int | None = None) -> Any:
    from scipy.optimize import linprog

    options = {f"{side}_feasibility_tolerance": LINEAR_TOLERANCE for side in ("primal", "dual")}
    bounds = np.stack([rows.lower, rows.upper], axis=1)
    return linprog(
        cost,
        A_ub=rows.G,
        b_ub=rows.h,
        A_eq=rows.A,
        b_eq=rows.b,
        bounds=bounds,
        method="highs",
        options=options if limit is None else options | {"maxiter": limit},
    )


def _multipliers(result: Any, present: Any) -> dict[str, Tensor]:
    # A marginal is the derivative of the value: dvalue/db = -nu, dvalue/dh = -lam,
    # dvalue/dlower = lam_lower, dvalue/dupper = -lam_upper.
    nu, lam_lower, lam_upper = -result.eqlin.marginals, result.lower.marginals, -result.upper.marginals
    lam = np.zeros(present.size)
    lam[present] = -result.ineqlin.marginals
    signed = {"lam": lam, "lam_lower": lam_lower, "lam_upper": lam_upper}
    return {"nu": torch.from_numpy(nu)} | {k: torch.from_numpy(np.maximum(v, 0)) for k, v in signed.items()}


def _solve_linear(data: dict[str, Tensor], limit: int) -> InstancePoint:
    rows, present = _rows(data)
    result = _linprog(data["q"].numpy(), rows, LINEAR_ITERATIONS * limit)
    status = LINEAR_STATUSES.get(result.status, Status.NUMERICAL_ERROR)
    point = InstancePoint(status, iterations=int(result.nit), executor="HiGHS")
    if status == Status.SOLVED:
        return replace(point, x=torch.from_numpy(result.x), **_multipliers(result, present))
    if status == Status.MAX_ITERATIONS:
        return point
    # HiGHS may know only that one of the two holds, and SciPy does not pass its certificates on.
    _, infeasible = _phase_one(data)
    without_solution = infeasible or _unbounded(data)
    return point if without_solution is None else replace(without_solution, iterations=point.iterations)


def _phase_one(data: dict[str, Tensor]) -> tuple[Tensor | None, InstancePoint | None]:
    """Return (a feasible point, ``None``) or (``None``, PRIMAL_INFEASIBLE with its certificate)."""
    rows, present = _rows(data)
    x, duals = _least_violation(rows)
    if duals is None:
        return (None if x is None else torch.from_numpy(x)), None
    lam = np.zeros(present.size)
    lam[present] = duals["lam"]
    certificate = farkas(data, **{k: torch.from_numpy(v) for k, v in (duals | {"lam": lam}).items()})
    return None, InstancePoint(Status.PRIMAL_INFEASIBLE, certificate=certificate, executor="HiGHS")


def _least_violation(rows: _Rows) -> tuple[Any, dict[str, Any] | None]:
    """Minimise the violation of Ax = b and Gx <= h, in units of the rows, within the bounds.

    The linear program is: minimise 1'(u + v + t) subject to Ax + u - v = b, Gx - t <= h. Its duals are
    a Farkas direction where its value is positive.

    Returns:
        (x, ``None``) when the violation is zero, (x, duals) when it is not, (``None``, ``None``) when
        HiGHS fails.
    """
    n, p, m = rows.lower.size, rows.b.size, rows.h.size
    units_A, units_G = (np.linalg.norm(matrix, axis=1) for matrix in (rows.A, rows.G))
    units_A, units_G = (np.where(units > 0, units, 1) for units in (units_A, units_G))
    A, b, G, h = rows.A / units_A[:, None], rows.b / units_A, rows.G / units_G[:, None], rows.h / units_G
    elastic = _Rows(
        np.hstack([A, np.eye(p), -np.eye(p), np.zeros((p, m))]),
        b,
        np.hstack([G, np.zeros((m, 2 * p)), -np.eye(m)]),
        h,
        np.concatenate([rows.lower, np.zeros(2 * p + m)]),
        np.concatenate([rows.upper, np.full(2 * p + m, np.inf)]),
    )
    result = _linprog(np.concatenate([np.zeros(n), np.ones(2 * p + m)]), elastic)
    if result.status != 0:
        return None, None
    finite = np.concatenate([b, h, rows.lower[np.isfinite(rows.lower)], rows.upper[np.isfinite(rows.upper)]])
    x = result.x[:n]
    if result.fun <= FEASIBLE * (1 + np.abs(finite).max(initial=0)):
        return x, None
    return x, {
        "nu": -result.eqlin.marginals / units_A,
        "lam": -result.ineqlin.marginals / units_G,
        "lam_lower": result.lower.marginals[:n],
        "lam_upper": -result.upper.marginals[:n],
    }


def _unbounded(data: dict[str, Tensor]) -> InstancePoint | None:
    """Return DUAL_INFEASIBLE with a ray of a *feasible* instance along which its objective falls, else ``None``."""
    if (program := recession(data)) is None:
        return None
    V, cost, A, G = (part.numpy() for part in program)
    one = np.ones(len(cost))
    result = _linprog(cost, _Rows(A, np.zeros(len(A)), G, np.zeros(len(G)), -one, one))
    certificate = ray(data, torch.from_numpy(V @ result.x), FEASIBLE) if result.status == 0 else None
    if certificate is None:
        return None
    return InstancePoint(Status.DUAL_INFEASIBLE, certificate=certificate, executor="HiGHS")


# --- quadratic programs --------------------------------------------------------------------------------------


def _solve_qp(data: dict[str, Tensor], methods: tuple[str, ...], limit: int) -> InstancePoint:
    if (screened := screen(data)) is not None:
        return screened
    if not data["Q"].any():
        return _solve_linear(data, limit)
    start, infeasible = _phase_one(data)
    if (without_solution := infeasible or _unbounded(data)) is not None:
        return without_solution
    present = torch.isfinite(data["h"])
    Q, q, A, b, G, h, lower, upper = data.values()
    form = QPForm(Q, q, A, b, G[present], h[present], lower, upper)
    point = _solve_smooth(_Smooth(form, start), methods, limit)
    if point.lam is not None:
        lam = torch.zeros_like(data["h"])
        lam[present] = point.lam
        point = replace(point, lam=lam)
    return point


# --- smooth programs -----------------------------------------------------------------------------------------


class _Smooth:
    """One instance of a form as functions of NumPy arrays, in equilibrated units.

    The methods of ``minimize`` have tolerances, trust regions and first Hessians of their own size: so x = d y,
    the rows of g times ``rows``, the objective times ``cost`` (see `Scaling`), from the linearisation at
    the start. All methods below take y.

    Attributes:
        start: y of a point where everything is finite, or ``None``.
        lower, upper: the bounds that the solver gets. Those of a nonlinear form are drawn in by `INSIDE`:
            its functions may not exist on them (x log x at 0), nor beyond.
        equalities: (C, c) with orthonormal rows, such that C y = c is e(x) = 0, which is affine: SLSQP
            does not take dependent rows.
        kernel: orthonormal columns, the kernel of C.
    """

    def __init__(self, form: Form, start: Tensor | None = None) -> None:
        self.form, self.nonlinear = form, not isinstance(form, QPForm)
        absent = torch.full((form.n,), torch.inf, dtype=torch.float64)
        self.lower = (-absent if form.lower is None else form.lower).numpy()
        self.upper = (absent if form.upper is None else form.upper).numpy()
        if self.nonlinear:
            gap = np.minimum(INSIDE, 0.25 * (self.upper - self.lower))
            self.lower, self.upper = self.lower + gap, self.upper - gap
        self.derived: tuple[Any, Derivatives] | None = None
        self.d, self.eq, self.rows, self.cost = np.ones(form.n), np.ones(form.p), np.ones(form.m), 1.0
        self.start = self._start(start)
        if self.start is not None:
            self._equilibrate(self.start)

    def _start(self, start: Tensor | None) -> Any | None:
        def between(free: float) -> Any:
            lower = np.where(np.isfinite(self.lower), self.lower, np.minimum(self.upper - 2, free - 1))
            upper = np.where(np.isfinite(self.upper), self.upper, np.maximum(self.lower + 2, free + 1))
            return 0.5 * (lower + upper)

        if start is None and isinstance(self.form, NonlinearForm):
            start = checked_start(self.form.problem, self.form.params)
        candidates = [between(0.0), between(1.0)]
        if start is not None:
            candidates.insert(0, np.clip(start.detach().numpy(), self.lower, self.upper))
        return next((x for x in candidates if self._finite(x)), None)

    def _finite(self, x: Any) -> bool:
        point = torch.from_numpy(x)
        values = [self.form.objective(point), self.form.equalities(point), self.form.inequalities(point)]
        gradient, hessian, *jacobians = self._derivatives(x)
        values += [gradient, hessian.dense(), *jacobians]
        return all(bool(torch.isfinite(value).all()) for value in values)

    def _equilibrate(self, x: Any) -> None:
        gradient, hessian, A, G = self._derivatives(x)
        scaling = equilibrate(hessian, A, G, gradient)
        self.d, self.eq, self.rows = (v.numpy() for v in scaling[:3])
        self.cost = float(scaling.cost)
        self.lower, self.upper, self.start = self.lower / self.d, self.upper / self.d, x / self.d
        left, values, right = np.linalg.svd(self.eq[:, None] * A.numpy() * self.d)
        rank = int((values > DEPENDENT * values.max(initial=0)).sum())
        away = left[:, :rank].T @ (self.eq * self.form.equalities(torch.from_numpy(x)).numpy()) / values[:rank]
        self.equalities = right[:rank], right[:rank] @ self.start - away
        self.kernel = right[rank:].T
        level = self.start - right[:rank].T @ (right[:rank] @ self.start - self.equalities[1])
        if (level > self.lower).all() and (level < self.upper).all() and self._finite(self.d * level):
            self.start = level  # trust-constr stalls between the equalities and a barrier
        self.derived = None

    def point(self, y: Any) -> Tensor:
        """Return x."""
        return torch.from_numpy(self.d * y)

    def objective(self, y: Any) -> float:
        value = self.cost * float(self.form.objective(self.point(y)))
        return value if np.isfinite(value) else np.inf  # outside its domain: no step may end here

    def inequalities(self, y: Any) -> Any:
        return self.rows * self.form.inequalities(self.point(y)).numpy()

    def derivatives(self, y: Any) -> Derivatives:
        """Return the derivatives of objective and constraints in original units."""
        if self.derived is None or not np.array_equal(self.derived[0], y):
            self.derived = np.array(y), self._derivatives(self.d * y)
        return self.derived[1]

    def _derivatives(self, x: Any, lam: Any = 0.0) -> Derivatives:
        # No nu: e is affine and adds no curvature.
        nu = torch.zeros(self.form.p, dtype=torch.float64)
        return kkt.derivatives(self.form, torch.from_numpy(x), torch.from_numpy(np.zeros(self.form.m) + lam), nu)

    def gradient(self, y: Any) -> Any:
        return self.cost * self.d * self.derivatives(y).gradient.numpy()

    def hessian(self, y: Any) -> Any:
        return self.cost * self.d[:, None] * self.derivatives(y).hessian.dense().numpy() * self.d

    def jacobian(self, y: Any) -> Any:
        return self.rows[:, None] * self.derivatives(y).inequality_jacobian.numpy() * self.d

    def equality_jacobian(self, y: Any) -> Any:
        return self.eq[:, None] * self.derivatives(y).equality_jacobian.numpy() * self.d

    def curvature(self, y: Any, lam: Any) -> Any:
        """Return the Hessian of lam'g."""
        if not self.nonlinear:
            return np.zeros((self.form.n, self.form.n))
        # The Lagrangian is f + lam'g: take away f.
        both = self._derivatives(self.d * y, self.rows * lam / self.cost).hessian.dense().numpy()
        return self.cost * self.d[:, None] * both * self.d - self.hessian(y)


def _solve_smooth(problem: _Smooth, methods: tuple[str, ...], limit: int) -> InstancePoint:
    """Return the best of the points that the methods find, tried in order until one is near a solution.

    Near is a residual of `ALMOST` already: from there the polish goes on by itself.
    """
    best, least, spent = InstancePoint(Status.NUMERICAL_ERROR), np.inf, 0
    for method in methods:
        y = problem.start
        try:
            y, code, iterations = _minimize(problem, method, limit)
            spent += iterations
            multipliers = _multipliers_at(problem, y)
        except (ValueError, ArithmeticError, RuntimeError, np.linalg.LinAlgError):
            pass  # values that the method or its linear algebra cannot take
        else:
            x = problem.point(y)
            point = kkt.Point(x, -problem.form.inequalities(x), *multipliers)
            if (worst := float(kkt.residuals(problem.form, point).worst())) < least:
                status = SMOOTH_STATUSES[method].get(code, Status.NUMERICAL_ERROR)
                best, least = InstancePoint(status, x, *multipliers, executor=method), worst
            if least <= ALMOST:
                break
        # A quadratic program has been shown to have a solution before.
        if problem.nonlinear and (status := _without_solution(problem, y)) is not None:
            return InstancePoint(status, iterations=spent, executor=method)
    return replace(best, iterations=spent)


def _minimize(problem: _Smooth, method: str, limit: int) -> tuple[Any, int, int]:
    """Return (y, the status code of ``minimize``, iterations)."""
    optimize: Any = importlib.import_module("scipy.optimize")  # its annotations know numbers only
    C, c = problem.equalities
    constraints: list[Any] = []
    if method == "SLSQP":
        options = {"maxiter": SMOOTH_ITERATIONS * limit, "ftol": SLSQP_TOLERANCE}
        if len(C):
            constraints.append({"type": "eq", "fun": lambda y: C @ y - c, "jac": lambda y: C})
        if problem.form.m:
            inside = {"fun": lambda y: -problem.inequalities(y), "jac": lambda y: -problem.jacobian(y)}
            constraints.append({"type": "ineq"} | inside)
    else:
        options = {"maxiter": SMOOTH_ITERATIONS * limit} | TRUST_TOLERANCES
        if len(C):
            constraints.append(optimize.LinearConstraint(C, c, c))
        if problem.form.m:
            slopes = problem.jacobian, problem.curvature
            constraints.append(optimize.NonlinearConstraint(problem.inequalities, -np.inf, 0, *slopes))
    bounded = np.isfinite(problem.lower).any() or np.isfinite(problem.upper).any()
    result = optimize.minimize(
        problem.objective,
        problem.start,
        jac=problem.gradient,
        hess=None if method == "SLSQP" else problem.hessian,
        bounds=optimize.Bounds(problem.lower, problem.upper, keep_feasible=problem.nonlinear) if bounded else None,
        constraints=constraints,
        method=method,
        options=options,
    )
    # Where every variable is fixed, SciPy returns at once, without a status.
    return result.x, int(result.get("status", 0)), int(result.get("nit", 0))


def _multipliers_at(problem: _Smooth, y: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Estimate (nu, lam, lam_lower, lam_upper): they make the Lagrangian stationary and the products with slacks small.

    minimise |g + A'nu + N'lam|^2 + |w s lam|^2 over nu and lam >= 0, where g is the gradient of the
    objective, N stacks the normals of rows and bounds, and s their slacks in units of the normals.
    No constraint is declared active: a multiplier of an inactive one costs its slack. nu is eliminated by
    projecting onto the kernel of A.
    """
    from scipy.optimize import nnls

    form, n = problem.form, problem.form.n
    g, A, G = problem.gradient(y), problem.equality_jacobian(y), problem.jacobian(y)
    # The bounds of the problem itself, not those drawn in for the solver.
    lower = np.full(n, -np.inf) if form.lower is None else form.lower.numpy() / problem.d
    upper = np.full(n, np.inf) if form.upper is None else form.upper.numpy() / problem.d
    below, above = np.isfinite(lower), np.isfinite(upper)
    slack = np.concatenate([-problem.inequalities(y), (y - lower)[below], (upper - y)[above]])
    normals = np.vstack([G, -np.eye(n)[below], np.eye(n)[above]])
    units = np.linalg.norm(normals, axis=1)
    units = np.where(units > 0, units, 1)
    multipliers = np.zeros(slack.size)
    if slack.size:
        stationarity = problem.kernel.T @ (normals / units[:, None]).T
        complementarity = np.diag(COMPLEMENTARITY * np.maximum(slack, 0) / units)
        target = np.concatenate([-problem.kernel.T @ g, np.zeros(slack.size)])
        multipliers = nnls(np.vstack([stationarity, complementarity]), target)[0] / units
    nu = np.linalg.lstsq(A.T, -(g + normals.T @ multipliers), rcond=DEPENDENT)[0] if form.p else np.zeros(0)
    lam, on_lower, on_upper = np.split(multipliers, [form.m, form.m + below.sum()])
    lam_lower, lam_upper = np.zeros(n), np.zeros(n)
    lam_lower[below], lam_upper[above] = on_lower, on_upper
    d, eq, rows, cost = problem.d, problem.eq, problem.rows, problem.cost
    found = (eq * nu / cost, rows * lam / cost, lam_lower / (cost * d), lam_upper / (cost * d))
    return tuple(torch.from_numpy(v) for v in found)  # type: ignore[return-value]


# --- nonlinear programs --------------------------------------------------------------------------------------


def _instance_forms(form: NonlinearForm) -> list[NonlinearForm]:
    """Return each instance of a batch as a form without batch dimensions, in float64 on the CPU."""
    exact, batch = in_float64(form), form.batch_shape
    core = {name: len(shape) for name, shape in form.problem.params}
    rows = {name: per_instance(value, core[name], batch) for name, value in exact.params.items()}
    twins = [exact.with_tensors({name: value[i] for name, value in rows.items()}) for i in range(batch.numel())]
    for twin in twins:
        twin.batch_shape = torch.Size()
    return twins


def _solve_nonlinear(form: NonlinearForm, methods: tuple[str, ...], limit: int) -> InstancePoint:
    absent = torch.full((form.n,), torch.inf, dtype=torch.float64)
    lower = -absent if form.lower is None else form.lower
    upper = absent if form.upper is None else form.upper
    bad = any(value.isnan().any() for value in form.params.values())
    if bad or not all((v > -torch.inf).all() for v in (-lower, upper)):  # false for NaN too
        return InstancePoint(Status.NONFINITE_INPUT)
    if crossing := screen_bounds(lower, upper, form.p, form.m):
        return crossing
    problem = _Smooth(form)
    if problem.start is None:
        infinite = any(value.isinf().any() for value in form.params.values())
        return InstancePoint(Status.NONFINITE_INPUT if infinite else Status.NUMERICAL_ERROR)
    return _solve_smooth(problem, methods, limit)


def _without_solution(problem: _Smooth, y: Any) -> Status | None:
    """Return PRIMAL_INFEASIBLE or DUAL_INFEASIBLE if a method that ended at y, no solution, did so for that."""
    if not np.isfinite(y).all():
        return None
    C, c = problem.equalities
    missed = max(np.abs(C @ y - c).max(initial=0), problem.inequalities(y).max(initial=0))
    if missed > ALMOST * (1 + np.abs(y).max()):
        return Status.PRIMAL_INFEASIBLE if _cut_off(problem, y) else None
    return Status.DUAL_INFEASIBLE if _falls_forever(problem, y) else None


def _cut_off(problem: _Smooth, y: Any) -> bool:
    """Return whether cutting planes prove that a convex instance is infeasible (Kelley 1960).

    A convex g lies above its tangent planes, so every tangent gives a linear constraint that all
    feasible points satisfy; the least violated point of those so far gives the next tangent.
    """
    n = problem.form.n
    G, h = np.zeros((0, n)), np.zeros(0)
    for _ in range(CUTS):
        tangent, g = problem.jacobian(y), problem.inequalities(y)
        if not (np.isfinite(tangent).all() and np.isfinite(g).all()):
            return False
        G, h = np.vstack([G, tangent]), np.concatenate([h, tangent @ y - g])
        found, violated = _least_violation(_Rows(*problem.equalities, G, h, problem.lower, problem.upper))
        if violated is not None or found is None:
            return violated is not None
        y = found
    return False


def _falls_forever(problem: _Smooth, y: Any) -> bool:
    """Return whether the objective falls without end along a ray from y, as far as `FAR` can tell.

    The slope of a convex objective along a ray only grows: where it is still clearly negative far out,
    and every constraint still holds there, there is no minimum. Tried are the way from the start to y, and
    the steepest descent that keeps the equalities.
    """
    slope = problem.gradient(y)
    C, c = problem.equalities
    reach = FAR * max(1.0, np.abs(y).max())
    for d in (y - problem.start, -problem.kernel @ (problem.kernel.T @ slope)):
        if (length := np.abs(d).max()) == 0 or not np.isfinite(length):
            continue
        far, beyond = y + reach * d / length, y + 2 * reach * d / length
        inside = (beyond >= problem.lower).all() and (beyond <= problem.upper).all()
        inside = inside and np.abs(C @ beyond - c).max(initial=0) <= ALMOST * reach
        inside = inside and problem.inequalities(beyond).max(initial=0) <= 0
        fall = problem.objective(far) - problem.objective(beyond)
        if inside and np.isfinite(fall) and fall > ALMOST * reach * np.abs(slope).max():
            return True
    return False
