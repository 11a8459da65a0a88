"""The CVXPY adapter: its solvers, their options, their codes."""

import subprocess
import sys

import pytest
import torch

import diffopt
from closed_forms import everything, form
from diffopt import BackendNotInstalled, BackendUnsupported, QPForm, Settings, SettingsError, Status
from diffopt.backends import CvxpyBackend, cvxpy_
from diffopt.backends.base import recession

f64 = torch.float64


def test_each_solver_is_called_by_name():
    for solver in ("CLARABEL", "OSQP", "SCS", "HIGHS"):
        data, answer = everything()
        found = CvxpyBackend(solver).solve(form(data), Settings())
        assert (found.backend, found.executor) == ("cvxpy", solver)
        assert torch.allclose(found.point.x, answer["x"], atol=1e-6)


def test_a_solver_of_linear_programs_takes_those_only():
    data, answer = everything(linear=True)
    found = CvxpyBackend("SCIPY").solve(form(data), Settings())
    assert torch.allclose(found.point.x, answer["x"]) and found.status == Status.SOLVED
    with pytest.raises(BackendUnsupported, match="CVXPY solver 'SCIPY' cannot take this problem.*such as 'CLARABEL'"):
        CvxpyBackend("SCIPY").solve(form(everything()[0]), Settings())


@pytest.mark.parametrize("solver", ["GLOP", "clarabell"])
def test_an_unknown_or_missing_solver_is_refused_at_once(solver):
    with pytest.raises(BackendNotInstalled, match=f"solver '{solver}' is unknown or not installed.*'CLARABEL'.*'OSQP'"):
        CvxpyBackend(solver)


@pytest.mark.parametrize("solver", ["CLARABEL", "OSQP", "SCS"])
def test_an_unknown_option_is_refused_at_once(solver):
    with pytest.raises(SettingsError, match=rf"solver '{solver}' refuses the options \{{'tolerence': 1e-06\}}"):
        CvxpyBackend(solver, tolerence=1e-6)


def test_an_option_that_stops_the_solver_early_is_no_unknown_one(monkeypatch):
    import cvxpy

    def fails(self, **options):
        raise cvxpy.error.SolverError("Solver 'CLARABEL' failed. Try another solver.")

    monkeypatch.setattr(cvxpy.Problem, "solve", fails)
    assert CvxpyBackend(max_iter=1).solver_options == {"max_iter": 1}


def test_options_reach_the_solver():
    data, _ = everything()
    raw = Settings(polish=False)
    loose = CvxpyBackend(tol_gap_abs=1e-2, tol_gap_rel=1e-2, tol_feas=1e-2).solve(form(data), raw)
    tight = CvxpyBackend().solve(form(data), raw)
    assert loose.iterations < tight.iterations
    assert loose.residuals.amax(0) > 1e-6 > 1e-9 >= tight.residuals.amax(0)
    assert loose.status == Status.NUMERICAL_ERROR  # a claim of success that the residuals do not bear out


def test_max_iterations():
    data, _ = everything()
    found = CvxpyBackend().solve(form(data), Settings(max_iterations=2, polish=False))
    assert found.status == Status.MAX_ITERATIONS and found.iterations == 2
    assert found.point.x.isfinite().all()
    for backend in (CvxpyBackend("OSQP", max_iter=3), CvxpyBackend("SCS", max_iters=3)):
        found = backend.solve(form(data), Settings(polish=False))
        assert found.iterations == 3 and found.status in (Status.MAX_ITERATIONS, Status.NUMERICAL_ERROR)


def test_the_default_tolerances_suffice_without_polish():
    problem = diffopt.check.known.quadratic_program(0, 8, 2, 8, bounds="mixed", batch=(6,))
    found = CvxpyBackend().solve(QPForm(**problem.arguments()), Settings(polish=False))
    assert bool((found.status == Status.SOLVED).all())
    assert found.residuals.amax(0).max() <= 1e-9


def test_inequality_duals_are_clipped_at_zero():
    problem = diffopt.check.known.quadratic_program(1, 6, 1, 10, bounds="both", batch=(4,))
    found = CvxpyBackend("OSQP").solve(QPForm(**problem.arguments()), Settings(polish=False))
    for duals in (found.point.lam, found.point.lam_lower, found.point.lam_upper):
        assert bool((duals >= 0).all())


@pytest.mark.parametrize(
    ("code", "status"),
    [*cvxpy_.STATUSES.items(), ("a code of tomorrow", Status.NUMERICAL_ERROR)],
)
def test_table_of_statuses(monkeypatch, code, status):
    run = cvxpy_._run

    def relabelled(problem, solver, options):
        run(problem, solver, options)
        return code

    monkeypatch.setattr(cvxpy_, "_run", relabelled)
    (point,) = (
        cvxpy_._solve_instance(d, "CLARABEL", {}, {})
        for d in diffopt.backends.instances(form(everything(linear=True)[0]))
    )
    assert point.status == status
    assert (point.x is not None) == (status in (Status.SOLVED, Status.ALMOST_SOLVED, Status.MAX_ITERATIONS))


@pytest.mark.parametrize(
    ("feasible", "status"), [("optimal", Status.DUAL_INFEASIBLE), ("infeasible", Status.PRIMAL_INFEASIBLE)]
)
def test_infeasible_or_unbounded_is_decided_by_a_second_solve(monkeypatch, feasible, status):
    codes = iter(["infeasible_or_unbounded", feasible])
    monkeypatch.setattr(cvxpy_, "_run", lambda *_: next(codes, "solver_error"))
    (data,) = diffopt.backends.instances(form(everything(linear=True)[0]))
    assert cvxpy_._solve_instance(data, "CLARABEL", {}, {}).status == status


@pytest.mark.parametrize("error", ["SolverError", "RuntimeError"])
def test_an_exception_of_the_solver_is_a_status_of_that_instance(monkeypatch, error):
    import cvxpy

    solve, calls = cvxpy.Problem.solve, []

    def second_fails(self, **options):
        calls.append(options)
        if len(calls) in (2, 3):
            raise {"SolverError": cvxpy.error.SolverError, "RuntimeError": RuntimeError}[error]("out of luck")
        return solve(self, **options)

    monkeypatch.setattr(cvxpy.Problem, "solve", second_fails)
    q = torch.arange(6, dtype=f64).reshape(3, 2)
    found = CvxpyBackend().solve(QPForm(torch.eye(2, dtype=f64), q, lower=-9.0), Settings())
    assert found.status.tolist() == [Status.SOLVED, Status.NUMERICAL_ERROR, Status.SOLVED]
    assert calls[2] == {"solver": "CLARABEL"} and "tol_feas" in calls[1]  # once more, as it does by itself
    assert torch.allclose(found.point.x[[0, 2]], -q[[0, 2]])


def test_the_registry_asks_about_a_problem_without_importing_cvxpy():
    code = """
import sys, torch, diffopt
form = diffopt.QPForm(torch.eye(2), torch.ones(2))
assert diffopt.backends.explain(form).chosen == "pdipm"
assert diffopt.backends.get("cvxpy").supports(form) is None
assert not {"cvxpy", "scipy.optimize"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_construction_without_cvxpy_waits_for_the_registry_to_refuse(monkeypatch):
    monkeypatch.setattr(CvxpyBackend, "requires", ("a_package_that_is_not_there",))
    backend = CvxpyBackend("OSQP", max_iter=10)
    with pytest.raises(BackendNotInstalled, match="needs a_package_that_is_not_there"):
        diffopt.backends.get(backend)


def test_a_bounded_program_has_no_ray():
    (data,) = diffopt.backends.instances(form(everything(linear=True)[0]))
    program = recession(data)
    assert program is not None and cvxpy_._falling(data, program, "CLARABEL", {}) is None
    for without in (form(everything()[0]), QPForm(None, torch.zeros(2, dtype=f64))):
        (data,) = diffopt.backends.instances(without)
        assert recession(data) is None
