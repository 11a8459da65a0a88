"""The primary solver on ordinary, degenerate and impossible data: status, accuracy, certificates."""

import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import diffopt
from diffopt import Diagonal, Settings, Status, waiting
from diffopt.check import known
from diffopt.linalg.matrices import Dense
from diffopt.linalg.saddle import Factor
from diffopt.solvers import pdipm
from diffopt.solvers.newton_system import NewtonSystem
from diffopt.solvers.scaled_qp import State

f64 = torch.float64
EXECUTORS = [("torch", "dual"), ("torch", "primal"), ("cpu", "dual")]


def optnet(batch, n, m, p=0, seed=0):
    """Problems of OptNet's timing experiment: cond(Q) about 1e4 to 1e6, half of the rows active."""
    g = torch.Generator().manual_seed(seed)
    U = torch.rand(batch, n, n, dtype=f64, generator=g)
    x0, G, A, q = (torch.randn(batch, *s, dtype=f64, generator=g) for s in ((n,), (m, n), (p, n), (n,)))
    h = (G @ x0[..., None])[..., 0] + torch.rand(batch, m, dtype=f64, generator=g)
    return U @ U.mT + 1e-3 * torch.eye(n, dtype=f64), q, A, (A @ x0[..., None])[..., 0], G, h


@pytest.mark.parametrize(("executor", "reduction"), EXECUTORS)
@pytest.mark.parametrize("sizes", [(16, 10, 10, 0), (8, 20, 30, 5), (4, 60, 60, 10)])
def test_optnet_problems_to_rounding(sizes, executor, reduction):
    solution = diffopt.solve_qp(*optnet(*sizes), settings=Settings(executor=executor, reduction=reduction))
    assert solution.executor == f"{executor}:{reduction}"
    assert solution.residuals.worst().max() < 1e-12
    assert solution.iterations.max() <= 20


def test_reductions_agree():
    Q, q, A, b, G, h = optnet(8, 12, 8, 3)
    d = Q.diagonal(dim1=-2, dim2=-1)
    answers = {}
    for reduction in ("diagonal", "dual", "primal"):
        matrix = Diagonal(d) if reduction == "diagonal" else torch.diag_embed(d)
        settings = Settings(reduction=reduction, executor="torch")
        answers[reduction] = diffopt.solve_qp(matrix, q, A, b, G, h, lower=-1.0, settings=settings)
        assert answers[reduction].executor == f"torch:{reduction}"
    for name in ("x", "lam", "nu", "lam_lower", "s"):
        for other in ("dual", "primal"):
            assert torch.allclose(getattr(answers["diagonal"], name), getattr(answers[other], name), atol=1e-9)


def test_unsafe_instances_leave_the_fast_reduction_alone():
    Q, q, A, b, G, h = optnet(4, 6, 4)
    settings = Settings(executor="torch")
    alone = diffopt.solve_qp(Q, q, A, b, G, h, settings=settings)
    Q = Q.clone()
    Q[2] = torch.diag(torch.tensor([1.0, 1, 1, 1, 1, 0], dtype=f64))
    lower = torch.full((4, 6), -torch.inf, dtype=f64)
    mixed = diffopt.solve_qp(Q, q, A, b, G, h, settings=settings)
    assert (alone.executor, mixed.executor) == ("torch:dual", "torch:dual+primal")
    assert mixed.ok.all() or mixed.status[2] == Status.DUAL_INFEASIBLE
    keep = [0, 1, 3]
    assert torch.equal(alone.x[keep], mixed.x[keep]) and torch.equal(alone.lam[keep], mixed.lam[keep])
    absent = diffopt.solve_qp(Q, q, A, b, G, h, lower=lower, settings=settings)
    assert torch.allclose(absent.x[keep], mixed.x[keep], atol=1e-9)


def test_scale_of_the_data_does_not_matter():
    Q, q, A, b, G, h = optnet(4, 6, 6, 2)
    plain = diffopt.solve_qp(Q, q, A, b, G, h)
    for k in (1e-6, 1e6):
        scaled = diffopt.solve_qp(k * Q, k * q, A, b, G, h)
        assert torch.allclose(scaled.x, plain.x, atol=1e-8) and torch.allclose(scaled.lam / k, plain.lam, atol=1e-8)
        rows = diffopt.solve_qp(Q, q, k * A, k * b, k * G, k * h)
        assert torch.allclose(rows.x, plain.x, atol=1e-8) and torch.allclose(rows.lam * k, plain.lam, atol=1e-8)
        columns = diffopt.solve_qp(Q / k**2, q / k, A / k, b, G / k, h)
        assert torch.allclose(columns.x / k, plain.x, atol=1e-8)


@pytest.mark.parametrize(("executor", "reduction"), EXECUTORS)
def test_cycling_problems_converge(executor, reduction):
    # Textbook Mehrotra cycles on about one in 3,000 of these.
    settings = Settings(executor=executor, reduction=reduction)
    solution = diffopt.solve_qp(*optnet(4096, 6, 6, seed=1), settings=settings)
    assert (solution.status == Status.SOLVED).all() and solution.iterations.max() <= 25


@pytest.mark.parametrize("reduction", ["diagonal", "dual", "primal"])
def test_a_sudoku_that_cycles_in_spite_of_recentring(reduction):
    with np.load(Path(__file__).parents[1] / "data" / "cycling_sudoku.npz") as f:
        puzzle, A, w = (torch.from_numpy(f[name]).double() for name in ("puzzle", "A", "w"))
    Q = Diagonal(torch.full((64,), 0.1, dtype=f64)) if reduction == "diagonal" else 0.1 * torch.eye(64, dtype=f64)
    settings = Settings(reduction=reduction, max_iterations=30)
    assert diffopt.solve_qp(Q, -puzzle, A, A @ w.exp(), lower=0.0, settings=settings).ok


def farkas_holds(solution, i, Q, q, A, b, G, h, lower, upper):
    x, nu, lam, low, up = (v[i] for v in solution.certificate)
    pull = A.mT @ nu + G.mT @ lam - low + up
    depth = b @ nu + h @ lam
    depth = depth - torch.where(low > 0, low * lower, 0.0).sum() + torch.where(up > 0, up * upper, 0.0).sum()
    signs = min(float(v.min()) if v.numel() else 0.0 for v in (lam, low, up)) >= 0
    return signs and pull.abs().max() < 1e-7 and abs(float(depth) + 1) < 1e-9 and x.isnan().all()


def test_primal_infeasible_with_certificate():
    g = torch.Generator().manual_seed(0)
    inf = torch.full((4,), torch.inf, dtype=f64)
    for linear in (False, True):
        G = torch.randn(3, 4, dtype=f64, generator=g)
        y = torch.rand(3, dtype=f64, generator=g) + 0.1
        G = torch.cat([G, -(y @ G)[None]])
        h = torch.randn(3, dtype=f64, generator=g)
        h = torch.cat([h, -(y @ h)[None] - 0.1])
        h = torch.stack([h, h + torch.tensor([0, 0, 0, 10.0], dtype=f64)])  # the second instance is feasible
        Q = None if linear else torch.eye(4, dtype=f64)
        q = G.mT @ -torch.ones(4, dtype=f64)
        solution = diffopt.solve_qp(Q, q, G=G, h=h, on_failure="return")
        assert solution.status.tolist() == [Status.PRIMAL_INFEASIBLE, Status.SOLVED]
        assert solution.x[0].isnan().all() and solution.x[1].isfinite().all()
        assert solution.value.isnan().tolist() == [True, False] and solution.residuals.worst()[0].isnan()
        none = torch.zeros(0, 4, dtype=f64), torch.zeros(0, dtype=f64)
        assert farkas_holds(solution, 0, Q, q, *none, G, h[0], -inf, inf)
        assert all(v[1].isnan().all() for v in solution.certificate)


def test_bounds_against_equalities_and_bounds_against_bounds():
    A, b = torch.ones(1, 3, dtype=f64), torch.tensor([[1.0], [4.0]], dtype=f64)
    lower, upper = torch.zeros(3, dtype=f64), torch.ones(3, dtype=f64)
    q, eye = torch.zeros(3, dtype=f64), torch.eye(3, dtype=f64)
    solution = diffopt.solve_qp(eye, q, A, b, lower=lower, upper=upper, on_failure="return")
    assert solution.status.tolist() == [Status.SOLVED, Status.PRIMAL_INFEASIBLE]
    none = torch.zeros(0, 3, dtype=f64), torch.zeros(0, dtype=f64)
    assert farkas_holds(solution, 1, eye, q, A, b[1], *none, lower, upper)
    crossed = torch.stack([lower, torch.tensor([0.0, 2.0, 0.0], dtype=f64)])
    solution = diffopt.solve_qp(eye, q, lower=crossed, upper=upper, on_failure="return")
    assert solution.status.tolist() == [Status.SOLVED, Status.PRIMAL_INFEASIBLE]
    empty = torch.zeros(0, 3, dtype=f64), torch.zeros(0, dtype=f64)
    assert farkas_holds(solution, 1, eye, q, *empty, *empty, crossed[1], upper)
    fixed = diffopt.solve_qp(eye, q, A, b, lower=upper, upper=upper, on_failure="return")
    assert fixed.status.tolist() == [Status.PRIMAL_INFEASIBLE, Status.PRIMAL_INFEASIBLE]


def test_inconsistent_equalities():
    A = torch.tensor([[1.0, 1.0], [2.0, 2.0]], dtype=f64)
    b = torch.tensor([[1.0, 2.0], [1.0, 3.0]], dtype=f64)
    solution = diffopt.solve_qp(torch.eye(2, dtype=f64), torch.zeros(2, dtype=f64), A, b, on_failure="return")
    assert solution.status.tolist() == [Status.SOLVED, Status.PRIMAL_INFEASIBLE]
    assert torch.allclose(solution.x[0], torch.tensor([0.5, 0.5], dtype=f64)) and solution.dependent.tolist() == [1, -1]


def test_unbounded_with_ray():
    Q = torch.diag(torch.tensor([1.0, 0.0], dtype=f64))
    q = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, -1.0]], dtype=f64)
    solution = diffopt.solve_qp(
        Q, q, G=torch.tensor([[1.0, 1.0]], dtype=f64), h=torch.ones(1, dtype=f64), on_failure="return"
    )
    assert solution.status.tolist() == [Status.DUAL_INFEASIBLE, Status.SOLVED, Status.SOLVED]
    ray = solution.certificate.x[0]
    assert (Q @ ray).abs().max() < 1e-8 and ray.sum() <= 1e-8 and abs(float(q[0] @ ray) + 1) < 1e-9
    assert solution.certificate.lam[0].isnan().all()
    both = diffopt.solve_qp(
        None, q[:1], G=torch.tensor([[1.0, 0], [-1, 0]], dtype=f64), h=-torch.ones(2, dtype=f64), on_failure="return"
    )
    assert both.status.tolist() == [Status.PRIMAL_INFEASIBLE]  # unbounded too, but there is no x at all


@pytest.mark.parametrize("piece", ["Q", "q", "A", "b", "G", "h", "lower", "upper"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nonfinite_input_is_a_status_of_its_instance(piece, value):
    Q, q, A, b, G, h = optnet(3, 4, 3, 1)
    data = dict(Q=Q, q=q, A=A, b=b, G=G, h=h, lower=q * 0 - 9, upper=q * 0 + 9)
    plain = diffopt.solve_qp(**data)
    data[piece] = data[piece].clone()
    data[piece][1].view(-1)[0] = value
    absent = (piece in ("h", "upper") and value == torch.inf) or (piece == "lower" and value == -torch.inf)
    solution = diffopt.solve_qp(**data, on_failure="return")
    assert solution.status.tolist() == [1, Status.SOLVED if absent else Status.NONFINITE_INPUT, 1]
    assert torch.equal(solution.x[[0, 2]], plain.x[[0, 2]]) and torch.equal(solution.nu[[0, 2]], plain.nu[[0, 2]])
    assert solution.x[1].isnan().all() != absent


@pytest.mark.parametrize("far", [1e6, 1e12, 1e20, 1e25])
def test_far_sides_are_as_good_as_absent(far):
    Q, q = torch.eye(2, dtype=f64), torch.tensor([1.0, 0.5], dtype=f64)
    row = torch.ones(1, 2, dtype=f64)
    for sides in (dict(lower=-far, upper=far), dict(upper=far), dict(G=row, h=far), dict(A=row, b=-1.5, lower=-far)):
        assert torch.allclose(diffopt.solve_qp(Q, q, **sides).x, -q, atol=1e-9)
    # A linear program with many solutions: any of them, but none near the far bound.
    x = diffopt.solve_qp(None, -torch.ones(2, dtype=f64), G=row, h=1.0, lower=0.0, upper=far).x
    assert abs(float(x.sum()) - 1) < 1e-9


def curved(least, dtype=f64, structure="dense"):
    """Return Hessians with eigenvalues (1, 1) and (1, least)."""
    entries = torch.tensor([[1.0, 1.0], [1.0, least]], dtype=dtype)
    if structure == "diagonal":
        return Diagonal(entries)
    basis = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=dtype)
    return basis @ torch.diag_embed(entries) @ basis.mT


REFUSING = [("pdipm", "torch"), ("pdipm", "cpu"), ("cvxpy", "auto"), ("scipy", "auto")]


@pytest.mark.parametrize("structure", ["dense", "diagonal"])
@pytest.mark.parametrize(("backend", "executor"), REFUSING)
def test_nonconvex_is_refused_with_the_smallest_eigenvalue(backend, executor, structure):
    settings = {"settings": Settings(executor=executor), "backend": backend, "lower": -1.0, "upper": 1.0}
    q = torch.tensor([0.3, 0.2], dtype=f64)
    solution = diffopt.solve_qp(curved(-1e-5, structure=structure), q, on_failure="return", **settings)
    assert solution.status.tolist() == [Status.SOLVED, Status.NUMERICAL_ERROR]
    assert torch.allclose(solution.smallest_eigenvalue, torch.tensor([1.0, -1e-5], dtype=f64))
    with pytest.raises(
        diffopt.SolveFailed, match=r"\[1\]: NUMERICAL_ERROR \(Q is not positive semidefinite: .* -1.00e-05,"
    ):
        diffopt.solve_qp(curved(-1e-5, structure=structure), q, **settings)


@pytest.mark.parametrize(("backend", "executor"), REFUSING)
def test_what_rounding_makes_indefinite_is_solved(backend, executor):
    settings = {"settings": Settings(executor=executor), "backend": backend, "lower": -1.0, "upper": 1.0}
    solution = diffopt.solve_qp(curved(-1e-9), torch.tensor([0.3, 0.2], dtype=f64), **settings)
    assert solution.ok.all() and solution.smallest_eigenvalue[1] < -0.9e-9


def test_the_eigenvalue_of_what_is_not_there():
    solution = diffopt.solve_qp(
        curved(torch.nan), torch.zeros(2, dtype=f64), lower=-1.0, upper=1.0, on_failure="return"
    )
    assert solution.smallest_eigenvalue.isnan().tolist() == [False, True]
    leaves, spec = torch.utils._pytree.tree_flatten(solution)
    assert torch.utils._pytree.tree_unflatten(leaves, spec).smallest_eigenvalue.isnan().all()
    compiled = torch.compile(lambda q: diffopt.solve_qp(curved(-1.0), q, lower=-1.0, upper=1.0).x, backend="eager")
    with pytest.raises(diffopt.SolveFailed, match="smallest eigenvalue is -1.00e"):
        compiled(torch.zeros(2, dtype=f64))


def test_iteration_limit_keeps_the_iterate():
    solution = diffopt.solve_qp(*optnet(4, 10, 10), settings=Settings(max_iterations=2), on_failure="return")
    assert (solution.status == Status.MAX_ITERATIONS).all() and solution.x.isfinite().all()
    assert (solution.iterations <= 2).all() and (solution.residuals.worst() > 1e-6).all()


def test_without_polish_and_loose_tolerance():
    problem = optnet(8, 10, 10)
    exact = diffopt.solve_qp(*problem, settings=Settings(executor="torch"))
    rough = diffopt.solve_qp(*problem, settings=Settings(polish=False, tolerance=1e-6))
    assert rough.ok.all() and (rough.iterations <= exact.iterations).all()
    assert 1e-14 < (rough.x - exact.x).abs().max() < 1e-2
    assert rough.residuals.worst().max() > exact.residuals.worst().max()


def test_float32_is_solved_in_float64_and_rounded_once():
    problem = [t.float() for t in optnet(8, 20, 20, 4)]
    single = diffopt.solve_qp(*problem)
    double = diffopt.solve_qp(*[t.double() for t in problem])
    assert single.x.dtype == torch.float32 and (single.status == Status.SOLVED).all()
    assert torch.equal(single.x, double.x.float()) and torch.equal(single.lam, double.lam.float())


@pytest.mark.parametrize("linear", [False, True])
def test_vertices_fixed_variables_and_pairs(linear):
    # x in the simplex: a vertex, with redundant copies of its rows and a fixed variable beside it.
    q = torch.tensor([-3.0, 1.0, 2.0, 0.0], dtype=f64)
    A = torch.tensor([[1.0, 1, 1, 0], [2, 2, 2, 0]], dtype=f64)
    lower, upper = torch.tensor([0.0, 0, 0, 0.7], dtype=f64), torch.tensor([1.0, 1, 1, 0.7], dtype=f64)
    Q = None if linear else 0.1 * torch.eye(4, dtype=f64)
    pair = torch.tensor([[1.0, 0, 0, 0], [-1, 0, 0, 0]], dtype=f64)
    solution = diffopt.solve_qp(
        Q, q, A, torch.tensor([1.0, 2.0], dtype=f64), pair, torch.tensor([1.0, -1.0], dtype=f64), lower, upper
    )
    assert torch.allclose(solution.x, torch.tensor([1.0, 0, 0, 0.7], dtype=f64), atol=1e-12)
    assert solution.dependent >= 1
    force = solution.lam_upper[3] - solution.lam_lower[3]
    assert torch.allclose(force, torch.tensor(0.0 if linear else -0.07, dtype=f64), atol=1e-10)


def test_sizes_zero_and_one():
    empty = diffopt.solve_qp(torch.eye(2, dtype=f64), torch.zeros(0, 2, dtype=f64), lower=0.0)
    assert empty.x.shape == (0, 2) and empty.status.shape == (0,) and "empty batch" in repr(empty)
    assert empty.value.shape == (0,)
    one = diffopt.solve_qp(torch.ones(1, 1, dtype=f64), torch.tensor([-3.0], dtype=f64), upper=2.0)
    assert one.x.tolist() == [2.0] and torch.allclose(one.lam_upper, torch.ones(1, dtype=f64))
    zero = diffopt.solve_qp(torch.zeros(1, 1, dtype=f64), torch.zeros(1, dtype=f64))
    assert zero.ok and zero.x.isfinite().all()


def test_a_far_side_hides_no_violation_from_the_solver():
    eye, none = torch.eye(2, dtype=f64), torch.zeros(0, 2, dtype=f64)
    data = pdipm.Data(
        Dense(eye), -torch.ones(2, dtype=f64), none, none[:, 0], eye, torch.tensor([0.0, 1e30], dtype=f64),
        None, torch.tensor([torch.inf, 1e25], dtype=f64), torch.Size(),
    )  # fmt: skip
    qp = pdipm.scale(data)
    state = State(torch.ones(2, dtype=f64), none[:, 0], none[:, 0], torch.ones(4, dtype=f64), torch.zeros(4, dtype=f64))
    _, infeasible = qp.relative_residuals(state)
    assert infeasible == 0.5


STALLED = {
    "far away": {
        "Q": [[1.13e7, 0.406], [0.406, 2.24e-8]], "q": [9.66, -5.38e-4], "A": [[-38.2, 1.44e-6]], "b": [0.0109],
        "lower": [7.74e-5, 4630.0],
    },
    "one variable": {
        "Q": [[1.19e-7]], "q": [-1.03e-4], "G": [[0.0162], [0.0106]], "h": [16.5, 107.0], "lower": [-987.0],
    },
    "rows forgotten": {
        "Q": [[0.00266, -15.1, 0.362], [-15.1, 158000.0, -1770.0], [0.362, -1770.0, 61.5]],
        "q": [-694.0, -3.58e6, -54.8], "A": [[-2.06, -32600.0, -59.3], [-0.00298, -5.35, 0.0129]],
        "b": [1.92e-5, 5.04e-9], "G": [[1350.0, 945000.0, 129000.0], [-0.00213, 9.41, 0.0378]],
        "h": [-0.0232, 1080.0], "lower": [-7740.0, -7.38e-6, -1.59e-7],
    },
    "rows forgotten, large bounds": {
        "Q": [[3.92e-10, 0.00105, 1.63e-9], [0.00105, 3870.0, 0.00622], [1.63e-9, 0.00622, 4.02e-8]],
        "q": [0.737, -2.24e-5, -2.22e-7], "A": [[-3.21e-7, 0.442, 3.22e-7], [-3.96e-9, -0.000156, 8.23e-9]],
        "b": [-2.65e-7, -2.88e-9],
        "G": [[-1.89e-10, -0.00878, 4.77e-9], [-0.000817, 1600.0, 0.000304], [6.87e-6, 69.0, 4.79e-6]],
        "h": [76.6, -0.000245, 0.000366], "lower": [-6.92e7, -4.61, -1.77e8],
    },
}  # fmt: skip
"""Badly scaled programs of which the first steps are blocked again and again from the ordinary start, and of the last
two from far inside too."""


@pytest.mark.parametrize("name", STALLED)
@pytest.mark.parametrize(("executor", "reduction"), EXECUTORS)
def test_other_starts_solve_what_stalls(executor, reduction, name):
    data = {k: torch.tensor(v, dtype=f64) for k, v in STALLED[name].items()}
    solution = diffopt.solve_qp(**data, settings=Settings(executor=executor, reduction=reduction), on_failure="return")
    assert solution.status == Status.SOLVED and solution.residuals.worst() < 1e-12


def singular_along(count, n, curvature=0.0):
    """Return Q and q that fall along v, where Q's curvature is ``curvature``; v all but misses the last variable.

    So the pivots of a Cholesky factorisation without exchanges do not show that Q is singular.
    """
    g = torch.Generator().manual_seed(0)
    v, L, r = (torch.randn(count, *s, dtype=f64, generator=g) for s in ((n,), (n, n), (n, 1)))
    v[:, -1] = 10 ** (-3 - 2 * torch.rand(count, dtype=f64, generator=g))
    v = v / v.norm(dim=-1, keepdim=True)
    along = v.unsqueeze(-1) * v.unsqueeze(-2)
    across = torch.eye(n, dtype=f64) - along
    Q = across @ (L @ L.mT / n + 0.1 * torch.eye(n, dtype=f64)) @ across + curvature * along
    return 0.5 * (Q + Q.mT), (across @ r).squeeze(-1) - v


@pytest.mark.parametrize("executor", ["torch", "cpu"])
def test_unboundedness_is_proven_where_pivots_do_not_show_a_singular_hessian(executor):
    Q, q = singular_along(500, 10)
    solution = diffopt.solve_qp(Q, q, settings=Settings(executor=executor), on_failure="return")
    assert (solution.status == Status.DUAL_INFEASIBLE).all()
    Q, q = singular_along(500, 10, curvature=1e-7)
    solution = diffopt.solve_qp(Q, q, settings=Settings(executor=executor), on_failure="return")
    assert (solution.status == Status.SOLVED).all()


@pytest.mark.parametrize(("owner", "name", "call"), [(NewtonSystem, "step", 5), (Factor, "solve_accurately", 1)])
def test_torch_operations_are_interrupted_and_leave_nothing_behind(monkeypatch, owner, name, call):
    """In the middle of the iteration, and of the reverse pass."""
    Q, q, A, b, G, h = optnet(4, 6, 6, 2)
    settings = Settings(executor="torch", sync=False)
    ordinary, calls = getattr(owner, name), []

    def pressed(self, *args):
        calls.append(args)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)  # as Ctrl-C does
        return ordinary(self, *args)

    def run(interrupted=False):
        leaf = q.clone().requires_grad_()
        if interrupted and owner is NewtonSystem:
            monkeypatch.setattr(owner, name, pressed)
        x = diffopt.solve_qp(Q, leaf, A, b, G, h, settings=settings, on_failure="return").x
        if interrupted:
            monkeypatch.setattr(owner, name, pressed)
        return torch.autograd.grad(x.square().sum(), leaf)[0]

    expected = run()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores SIGINT
    try:
        with pytest.raises(KeyboardInterrupt):
            run(interrupted=True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(calls) == call and torch.is_grad_enabled() and waiting.allowed()
    monkeypatch.undo()
    assert torch.equal(run(), expected)


@pytest.mark.parametrize("executor", ["torch", "cpu"])
def test_fixed_variables_are_no_pairs_of_bounds(executor):
    """Where every variable is fixed there is nothing to iterate for: a pair of bounds without interior takes steps."""
    problem = known.quadratic_program(0, 5, batch=(4,))
    settings = Settings(executor=executor)
    solution = diffopt.solve_qp(problem.Q, problem.q, lower=problem.x, upper=problem.x, settings=settings)
    assert torch.equal(solution.x, problem.x) and not bool(solution.iterations.any())


@pytest.mark.parametrize("executor", ["torch", "cpu"])
def test_a_diagonal_entry_below_zero_by_rounding_is_zero(executor):
    """In the units that equilibration chooses, of such an entry alone, it would be -1."""
    Q, q = torch.diag(torch.tensor([1.0, 1.0, -1e-17])), torch.tensor([0.5, 2.0, 0.25])
    solution = diffopt.solve_qp(Q.double(), q.double(), lower=-1.0, upper=1.0, settings=Settings(executor=executor))
    assert solution.x.tolist() == pytest.approx([-0.5, -1.0, -1.0], abs=1e-9)
