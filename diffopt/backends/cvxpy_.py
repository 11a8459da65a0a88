"""CVXPY: Clarabel by default, any installed CVXPY solver by name. One instance at a time, on CPU."""

from __future__ import annotations

import importlib
import warnings
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffopt.backends.base import (
    Backend,
    Capabilities,
    InstancePoint,
    RawPoint,
    Recession,
    farkas,
    instances,
    ray,
    recession,
    screen,
    solve_each,
)
from diffopt.backends.registry import register
from diffopt.backends.units import in_own_unit
from diffopt.errors import BackendNotInstalled, BackendUnsupported, SettingsError
from diffopt.problems.forms import Form, QPForm
from diffopt.solution import Certificate, Status
from diffopt.solvers.settings import Settings

DEFAULT_SOLVER = "CLARABEL"

STATUSES: dict[str, Status] = {
    "optimal": Status.SOLVED,
    "optimal_inaccurate": Status.ALMOST_SOLVED,
    "user_limit": Status.MAX_ITERATIONS,
    "infeasible": Status.PRIMAL_INFEASIBLE,
    "infeasible_inaccurate": Status.PRIMAL_INFEASIBLE,
    "unbounded": Status.DUAL_INFEASIBLE,
    "unbounded_inaccurate": Status.DUAL_INFEASIBLE,
    "solver_error": Status.NUMERICAL_ERROR,
}
"""From CVXPY's statuses to ours; any other code is NUMERICAL_ERROR. `Backend.solve` checks claims of success."""


@register("cvxpy")
class CvxpyBackend(Backend):
    """Solves with CVXPY, as a reference: a mature solver behind a modelling language.

    Slow beside the other backends (some milliseconds an instance go to the modelling), and
    independent of them. The duals of the infinite rows of h and of infinite bounds are zero;
    a fixed variable (lower = upper) is one equality, whose dual goes to the side of its sign.

    Args:
        solver: the name of an installed CVXPY solver. Default ``"CLARABEL"``.
        solver_options: options of that solver, by CVXPY's names; they win over the defaults of this
            adapter, which ask for more accuracy than the solvers' own.

    Raises:
        BackendNotInstalled: CVXPY does not find this solver.
        SettingsError: the solver refuses an option.
    """

    requires = ("cvxpy",)
    extra = "cvxpy"
    can = Capabilities(forms=(QPForm,), batched=False, accuracy=1e-9, priority=20)

    def __init__(self, solver: str = DEFAULT_SOLVER, **solver_options: Any) -> None:
        self.solver = solver
        self.solver_options = solver_options
        # CVXPY depends on Clarabel, so the plain default needs no look: importing CVXPY takes seconds,
        # and the registry makes an instance of every backend that it asks about a problem.
        if (solver != DEFAULT_SOLVER or solver_options) and not self.missing():
            _check_solver(solver, solver_options)

    def _solve(self, form: Form, settings: Settings) -> RawPoint:
        assert isinstance(form, QPForm)
        tight = _tight_options(self.solver, settings) | self.solver_options

        def solve_one(data: dict[str, Tensor]) -> InstancePoint:
            answer = screen(data)
            return answer or in_own_unit(data, lambda d: _solve_instance(d, self.solver, tight, self.solver_options))

        return solve_each(form, settings, instances(form), solve_one, self.solver)


def _check_solver(solver: str, options: dict[str, Any]) -> None:
    cp = _cvxpy()
    installed = cp.installed_solvers()
    if solver not in installed:
        raise BackendNotInstalled(
            f"CVXPY solver {solver!r} is unknown or not installed. Expected one of "
            f"{', '.join(map(repr, installed))}. Install the Python package of that solver, or choose another one."
        )
    x = cp.Variable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Each solver checks its options in its own way, and only when it runs: so run it once.
            cp.Problem(cp.Minimize(x), [x >= 1]).solve(solver=solver, **options)
    except Exception as error:
        if isinstance(error, cp.error.SolverError) and f"'{solver}' failed" in str(error):
            return  # it took them, and with them did not get far: a matter of statuses
        raise SettingsError(
            f"CVXPY solver {solver!r} refuses the options {options!r}: {error} "
            f"Expected options of this solver by CVXPY's names; see its page in CVXPY's documentation."
        ) from error


def _tight_options(solver: str, settings: Settings) -> dict[str, Any]:
    # A point at tolerance t of its solver misses our relative residuals by up to a factor of 10 or
    # so, since norms and scales differ: ask for a tenth of what is wanted. Clarabel reaches 1e-10 on
    # data that is scaled well.
    if solver == "CLARABEL":
        tight = min(1e-10, 0.1 * settings.tolerance_for(torch.float64))
        return {"tol_gap_abs": tight, "tol_gap_rel": tight, "tol_feas": tight, "max_iter": settings.max_iterations}
    # First-order solvers take thousands of cheap iterations where interior points take tens, and end
    # far from 1e-10: ask for what gives the polish the right active set. Their limits are in
    # their own units.
    if solver == "OSQP":
        # Its own polish prints to stdout when it has nothing to do, verbose or not.
        polish = "polish" if metadata.version("osqp").startswith("0.") else "polishing"
        return {"eps_abs": 1e-8, "eps_rel": 1e-8, "max_iter": 1000 * settings.max_iterations, polish: False}
    if solver == "SCS":
        return {"eps_abs": 1e-9, "eps_rel": 1e-9, "max_iters": 1000 * settings.max_iterations}
    return {}


def _solve_instance(
    data: dict[str, Tensor], solver: str, tight: dict[str, Any], plain: dict[str, Any]
) -> InstancePoint:
    cp = _cvxpy()
    Q, q, A, b, G, h, lower, upper = (data[name].numpy() for name in ("Q", "q", "A", "b", "G", "h", "lower", "upper"))
    x = cp.Variable(q.size)
    # Which entries of each kind of constraint are there: an infinite side is an absent constraint.
    fixed = lower == upper
    present = {
        "nu": torch.ones_like(data["b"], dtype=torch.bool).numpy(),
        "lam": torch.isfinite(data["h"]).numpy(),
        "fixed": fixed,
        "lam_lower": (lower > -torch.inf) & ~fixed,
        "lam_upper": (upper < torch.inf) & ~fixed,
    }
    make = {
        "nu": lambda i: A[i] @ x == b[i],
        "lam": lambda i: G[i] @ x <= h[i],
        "fixed": lambda i: x[i] == lower[i],
        "lam_lower": lambda i: x[i] >= lower[i],
        "lam_upper": lambda i: x[i] <= upper[i],
    }
    constraints = {name: make[name](mask.nonzero()[0]) for name, mask in present.items() if mask.any()}
    # Conic solvers refuse a problem without any constraint.
    unconstrained = [] if constraints else [np.zeros(q.size) @ x <= 1]
    # psd_wrap: CVXPY's own test of Q fails by rounding, and `screen` has refused an indefinite Q.
    cost = q @ x + (0.5 * cp.quad_form(x, cp.psd_wrap(Q)) if Q.any() else 0)
    problem = cp.Problem(cp.Minimize(cost), [*constraints.values(), *unconstrained])
    code = _run(problem, solver, tight)
    if code == "solver_error" and tight != plain:  # out of reach: then as accurate as the solver does by itself
        code = _run(problem, solver, plain)
    if code == "infeasible_or_unbounded":
        feasibility = _run(cp.Problem(cp.Minimize(0), problem.constraints), solver, plain)
        code = "infeasible" if STATUSES.get(feasibility) == Status.PRIMAL_INFEASIBLE else "unbounded"
    status = STATUSES.get(code, Status.NUMERICAL_ERROR)
    iterations = int(getattr(problem.solver_stats, "num_iters", None) or 0)

    # CVXPY's Lagrangian has our signs: + nu'(Ax - b) + lam'(Gx - h) + lam_lower'(lower - x) + ...
    duals: dict[str, Tensor] = {}
    for name, mask in present.items():
        duals[name] = torch.zeros(mask.size, dtype=torch.float64)
        if name in constraints:
            value = constraints[name].dual_value
            values = torch.nan if value is None else torch.as_tensor(value, dtype=torch.float64).reshape(-1)
            duals[name][torch.from_numpy(mask)] = values
    # A dual of an inactive row can be negative by the accuracy of the solver. That of a fixed
    # variable, L = ... + mu (x - lower), belongs to the bound of its sign.
    nu, lam = duals["nu"], duals["lam"].clamp_min(0)
    lam_lower = duals["lam_lower"].clamp_min(0) + (-duals["fixed"]).clamp_min(0)
    lam_upper = duals["lam_upper"].clamp_min(0) + duals["fixed"].clamp_min(0)
    if status == Status.PRIMAL_INFEASIBLE:  # then the duals are a Farkas direction, if the solver has one
        certificate = farkas(data, nu, lam, lam_lower, lam_upper)
        return InstancePoint(status, iterations=iterations, certificate=certificate)
    if status == Status.DUAL_INFEASIBLE:
        program = recession(data)
        if program is None:  # the objective falls in no direction for ever: the solver is wrong
            return InstancePoint(Status.NUMERICAL_ERROR, iterations=iterations)
        return InstancePoint(status, iterations=iterations, certificate=_falling(data, program, solver, tight))
    if status == Status.NUMERICAL_ERROR or x.value is None:
        return InstancePoint(status, iterations=iterations)
    solution = torch.as_tensor(x.value, dtype=torch.float64)
    return InstancePoint(status, solution, nu, lam, lam_lower, lam_upper, iterations)


def _falling(data: dict[str, Tensor], program: Recession, solver: str, options: dict[str, Any]) -> Certificate | None:
    """Return a direction in which the objective falls for ever, if the solver finds one. (CVXPY passes none on.)"""
    cp = _cvxpy()
    V, cost, A, G = (part.numpy() for part in program)
    y = cp.Variable(len(cost))
    constraints = [y <= 1, y >= -1]
    constraints += [A @ y == 0] if len(A) else []
    constraints += [G @ y <= 0] if len(G) else []
    _run(cp.Problem(cp.Minimize(cost @ y), constraints), solver, options)
    return None if y.value is None else ray(data, torch.from_numpy(V @ y.value))


def _run(problem: Any, solver: str, options: dict[str, Any]) -> str:
    error_class = _cvxpy().error.SolverError
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about accuracy, which `Backend.solve` measures itself
            problem.solve(solver=solver, **options)
    except error_class:
        try:
            problem.get_problem_data(solver)
        except error_class as error:
            raise BackendUnsupported(
                f"CVXPY solver {solver!r} cannot take this problem: {error} Expected a solver of convex "
                f"quadratic programs, such as {DEFAULT_SOLVER!r}."
            ) from error
        return "solver_error"
    except Exception:  # whatever a foreign solver throws, one instance must not end the batch
        return "solver_error"
    return problem.status


def _cvxpy() -> Any:
    return importlib.import_module("cvxpy")
