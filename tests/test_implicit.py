"""Gradients where they are not ordinary: kinks, dependent active rows, failures; and higher orders."""

import pytest
import torch

import diffopt
from diffopt import Diagonal, Settings, SolveFailed, Status, active_system, pulled
from diffopt.backends.pdipm import PdipmBackend
from diffopt.check import known

f64 = torch.float64


def tensor(*values, grad=False):
    return torch.tensor(values, dtype=f64, requires_grad=grad)


def random_qp(batch=3, n=5, m=6, p=2, seed=0, grad=True):
    g = torch.Generator().manual_seed(seed)
    L, q, A, G, x0 = (torch.randn(batch, *s, dtype=f64, generator=g) for s in ((n, n), (n,), (p, n), (m, n), (n,)))
    slack = torch.rand(batch, m, dtype=f64, generator=g)
    b, h = (A @ x0[..., None])[..., 0], (G @ x0[..., None])[..., 0] + slack
    data = [L @ L.mT + torch.eye(n, dtype=f64), q, A, b, G, h, x0 - 2, x0 + 0.7]
    return [t.requires_grad_(grad) for t in data]


def everything(*data, **kwargs):
    s = diffopt.solve_qp(*data, **kwargs)
    return torch.cat([s.x, s.s, s.lam, s.nu, s.lam_lower, s.lam_upper, s.value.unsqueeze(-1)], -1)


# ------------------------------------------------------------------ ordinary points, all orders


def test_reverse_and_forward_mode_of_every_output_in_all_data():
    assert torch.autograd.gradcheck(everything, random_qp(1, 3, 3, 1), atol=1e-6)
    assert torch.autograd.gradcheck(everything, random_qp(), atol=1e-6, check_forward_ad=True, fast_mode=True)


@pytest.mark.parametrize("structure", ["dense", "diagonal", "low_rank"])
def test_second_derivatives(structure):
    data = random_qp(2, 4, 4, 1)
    d, U = tensor(1.0, 2.0, 3.0, 1.5, grad=True), torch.randn(2, 4, 2, dtype=f64, requires_grad=True)
    hessian = {"dense": [data[0]], "diagonal": [d], "low_rank": [d, U]}[structure]
    weights = torch.randn(4 + 4 + 4 + 1 + 4 + 4 + 1, dtype=f64) / 4  # every output takes part
    make = {"dense": lambda Q: Q, "diagonal": Diagonal, "low_rank": diffopt.DiagonalPlusLowRank}[structure]

    def outputs(*tensors):
        k = len(hessian)
        return (everything(make(*tensors[:k]), *tensors[k:]) @ weights).tanh()

    inputs = (*hessian, *data[1:])
    assert torch.autograd.gradcheck(outputs, inputs, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(outputs, inputs, fast_mode=True, atol=1e-5)


def test_third_derivative_of_a_quadratic_program_is_exact():
    a = tensor(0.7, grad=True)
    x = diffopt.solve_qp(a.reshape(1, 1), tensor(-1.0)).x.sum()  # x = 1 / a
    for order, wanted in enumerate((-1 / 0.7**2, 2 / 0.7**3, -6 / 0.7**4)):
        (x,) = torch.autograd.grad(x, a, create_graph=True)
        assert abs(float(x.detach()) - wanted) < 1e-9 * abs(wanted), order


def test_functional_transforms():
    data = random_qp(2, 4, 4, 1, grad=False)
    q, v = data[1], torch.randn(2, 4, dtype=f64)

    def loss(q):
        return diffopt.solve_qp(data[0], q, *data[2:]).x.square().sum()

    slope = torch.func.grad(loss)(q)
    value, tangent = torch.func.jvp(loss, (q,), (v,))
    assert torch.allclose(tangent, (slope * v).sum()) and torch.allclose(value, loss(q))
    _, pullback = torch.func.vjp(loss, q)
    assert torch.allclose(pullback(torch.ones((), dtype=f64))[0], slope)

    def x(q):
        return diffopt.solve_qp(data[0], q, *data[2:]).x

    assert torch.allclose(torch.func.jacfwd(x)(q), torch.func.jacrev(x)(q), atol=1e-12)
    wanted = torch.autograd.functional.hessian(loss, q)
    assert wanted.abs().max() > 1e-3 and torch.allclose(torch.func.hessian(loss)(q), wanted, atol=1e-11)


@pytest.mark.parametrize("outer", [torch.func.jacrev, torch.func.jacfwd])
@pytest.mark.parametrize("inner", [torch.func.jacrev, torch.func.jacfwd])
def test_second_derivatives_by_every_pair_of_modes(outer, inner):
    # Forward mode in forward mode too, of which torch does not see a function's inner part by itself.
    data = [t[0] for t in random_qp(1, 3, 3, 1, grad=False)]

    def loss(Q, A):
        return everything(Q, data[1], A, *data[3:]).square().sum()

    wanted = torch.autograd.functional.hessian(loss, (data[0], data[2]))
    found = outer(inner(loss, (0, 1)), (0, 1))(data[0], data[2])
    for row, expected in zip(found, wanted, strict=True):
        for got, block in zip(row, expected, strict=True):
            assert block.abs().max() > 1e-3 and torch.allclose(got, block, rtol=1e-9, atol=1e-9)


def test_shared_data_gets_the_sum_and_Q_a_symmetric_gradient():
    data = random_qp(4)
    shared = [t[0].detach().clone().requires_grad_() for t in data]
    q = data[1]
    shared[1] = q
    weights = torch.randn(4, 5, dtype=f64)
    (weights * diffopt.solve_qp(*shared).x).sum().backward()
    wide = [t if t is q else t.detach().expand(4, *t.shape).clone().requires_grad_() for t in shared]
    together = torch.autograd.grad((weights * diffopt.solve_qp(*wide).x).sum(), wide)
    for t, each in zip(shared, together, strict=True):
        assert torch.allclose(t.grad, each if t is q else each.sum(0), atol=1e-10)
    assert torch.allclose(shared[0].grad, shared[0].grad.mT, atol=1e-14) and shared[0].grad.abs().max() > 1e-3


def test_data_computed_from_other_data_counts_once():
    q = tensor(-1.0, -2.0, grad=True)
    for create_graph in (False, True):
        x = diffopt.solve_qp(torch.eye(2, dtype=f64), q, G=torch.eye(2, dtype=f64), h=q / 4).x  # both rows hold
        (slope,) = torch.autograd.grad(x.sum(), q, create_graph=create_graph)
        assert torch.allclose(slope, tensor(0.25, 0.25))


def test_first_derivative_of_the_value_solves_no_system(monkeypatch):
    data = random_qp()
    solution = diffopt.solve_qp(*data, settings=Settings(executor="torch"))
    called = []
    solve = active_system.solve_minimum_norm
    monkeypatch.setattr(active_system, "solve_minimum_norm", lambda *a: called.append(1) or solve(*a))
    slopes = torch.autograd.grad(solution.value.sum(), data, retain_graph=True)
    assert not called and torch.allclose(slopes[3], -solution.nu, atol=1e-10)
    torch.autograd.grad(solution.x.sum(), data)
    assert len(called) == 1  # and one for everything else


def test_no_work_for_backward_without_gradients():
    data = random_qp(grad=False)
    assert not diffopt.solve_qp(*data).x.requires_grad
    with torch.no_grad():
        assert not diffopt.solve_qp(*random_qp()).x.requires_grad


def test_attaching_does_not_move_the_values():
    data = random_qp()
    a, b = everything(*data), everything(*[t.detach() for t in data])
    assert torch.equal(a, b)


def test_vmap_is_one_native_solve_and_its_backward_the_solvers_own(monkeypatch):
    problem = known.quadratic_program(6, 5, 1, 4, bounds="both", batch=(3,), shared=True)
    names, data = tuple(problem.arguments()), problem.arguments()
    shared = {name for name in names if data[name].dim() == (2 if name in "QAG" else 1)}
    assert "Q" in shared and "q" not in shared
    solved, calls = [], []
    solve, pull = PdipmBackend.solve, pulled._pulled
    monkeypatch.setattr(PdipmBackend, "solve", lambda self, form, *a: solved.append(form) or solve(self, form, *a))
    monkeypatch.setattr(pulled, "_pulled", lambda *a: calls.append(1) or pull(*a))
    leaves = [data[name].clone().requires_grad_() for name in names]
    in_dims = tuple(None if name in shared else 0 for name in names)
    mapped = torch.func.vmap(lambda *values: diffopt.solve_qp(**dict(zip(names, values, strict=True))), in_dims)
    solution = mapped(*leaves)
    assert len(solved) == 1 and solved[0].batch_shape == (3,) and solved[0].Q.batch_shape == ()
    native = diffopt.solve_qp(**data)
    for name in ("x", "lam", "value", "status", "iterations", "weakly_active"):
        assert torch.equal(getattr(solution, name), getattr(native, name)), name
    assert torch.equal(solution.residuals.primal, native.residuals.primal) and solution.executor == native.executor
    solution.x.sum().backward()
    assert len(calls) == 1 and leaves[0].grad is not None and leaves[0].grad.any()


def test_the_value_has_second_derivatives_where_sides_are_infinite():
    problem = known.quadratic_program(20, 7, 1, 3, bounds="both")
    data = problem.arguments()
    data["h"] = torch.where(problem.lam > 0, data["h"], torch.inf)
    data["lower"] = torch.where(problem.lam_lower > 0, data["lower"], -torch.inf)

    def value(q, **others):
        return diffopt.solve_qp(**data | {"q": q} | others).value

    q = data["q"].clone().requires_grad_()
    (slope,) = torch.autograd.grad(value(q), q, create_graph=True)
    assert torch.allclose(slope, diffopt.solve_qp(**data).x, atol=1e-9)
    (curvature,) = torch.autograd.grad(slope.sum(), q)
    finite = {"h": data["h"].clamp_max(1e3), "lower": data["lower"].clamp_min(-1e3)}
    assert torch.allclose(curvature, torch.func.hessian(lambda q: value(q, **finite))(data["q"]).sum(0), atol=1e-9)


# ------------------------------------------------------------------ kinks: the named rules

ONE_SIDED = {"inactive": 1.0, "active": 0.0, "central": 0.5, "minimum_norm": 0.5}


@pytest.mark.parametrize("rule", ONE_SIDED)
@pytest.mark.parametrize("as_bound", [True, False])
def test_rules_at_the_kink_of_relu(rule, as_bound):
    """min 1/2 (x - a)^2 subject to x >= 0, at a = 0: x = relu(a), lam = relu(-a)."""
    a, side = tensor(0.0, grad=True), tensor(0.0, grad=True)
    data = dict(lower=side) if as_bound else dict(G=-torch.ones(1, 1, dtype=f64), h=-side)
    solution = diffopt.solve_qp(torch.eye(1, dtype=f64), -a, **data, settings=Settings(kink_rule=rule))
    lam = solution.lam_lower if as_bound else solution.lam
    assert solution.weakly_active == 1 and abs(float(solution.x.detach())) < 1e-12
    t = ONE_SIDED[rule]
    got = torch.autograd.grad(solution.x.sum(), (a, side), retain_graph=True)
    assert torch.allclose(torch.cat(got), tensor(t, 0.0 if rule == "minimum_norm" else 1 - t), atol=1e-9)
    (slope,) = torch.autograd.grad(lam.sum(), a, retain_graph=True)
    assert torch.allclose(slope, tensor(t - 1.0), atol=1e-9)
    (slope,) = torch.autograd.grad(solution.value.sum(), a)
    assert torch.allclose(slope, tensor(0.0), atol=1e-9)  # the value has no kink: max(-a, 0)^2 / 2


def test_rules_against_one_sided_differences():
    """Two coupled weakly active bounds: 'inactive' and 'active' are the slopes with both out, both in."""
    P = tensor([1.0, 0.9], [0.9, 1.0]).reshape(2, 2)
    Q = torch.linalg.inv(P)
    jacobian = {}
    for rule in ONE_SIDED:
        a = torch.zeros(2, dtype=f64, requires_grad=True)
        solution = diffopt.solve_qp(Q, -(Q @ a), lower=0.0, settings=Settings(kink_rule=rule))
        assert solution.weakly_active == 2
        rows = [torch.autograd.grad(solution.x[i], a, retain_graph=True)[0] for i in range(2)]
        jacobian[rule] = torch.stack(rows)

    def difference(direction):
        step = 1e-6 * direction
        return diffopt.solve_qp(Q, -(Q @ step), lower=0.0).x / 1e-6

    up, down = tensor(1.0, 1.0), tensor(-1.0, -1.0)
    assert torch.allclose(jacobian["inactive"] @ up, difference(up), atol=1e-6)
    assert torch.allclose(jacobian["active"] @ down, -difference(down), atol=1e-6)
    # The limit along the central path, from minimising with a barrier at mu = 1e-12 (not the average).
    x = tensor(1.0, 1.0)
    for _ in range(300):
        gradient, hessian = Q @ x - 1e-12 / x, Q + torch.diag(1e-12 / x**2)
        step = -torch.linalg.solve(hessian, gradient)
        x = x + min(1.0, 0.9 / max(1e-30, float((-step / x).max()))) * step
    assert torch.allclose(jacobian["central"], torch.linalg.solve(hessian, Q), atol=1e-6)


def test_kink_rules_agree_where_there_is_no_kink():
    data = random_qp()
    gradients = []
    for rule in ONE_SIDED:
        # (Compiled code, which knows one rule alone, would differ in the last bits.)
        outputs = everything(*data, settings=Settings(kink_rule=rule, executor="torch"))
        gradients.append(torch.autograd.grad(outputs.tanh().sum(), data))
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))


def test_minimum_norm_rule_in_forward_mode_and_in_a_mixed_batch():
    a = tensor([0.0, 1.0], [0.0, -1.0]).reshape(2, 2)

    def x(a):
        return diffopt.solve_qp(torch.eye(2, dtype=f64), -a, lower=0.0, settings=Settings(kink_rule="minimum_norm")).x

    _, tangent = torch.func.jvp(x, (a,), (torch.ones_like(a),))
    assert torch.allclose(tangent, tensor([0.5, 1.0], [0.5, 0.0]).reshape(2, 2), atol=1e-9)


# ------------------------------------------------------------------ dependent active rows


def test_repeated_active_row():
    h, q = tensor(0.0, 0.0, grad=True), tensor(-1.0, grad=True)
    solution = diffopt.solve_qp(torch.eye(1, dtype=f64), q, G=torch.ones(2, 1, dtype=f64), h=h)
    assert solution.dependent == 1 and solution.weakly_active == 0
    slope_q, slope_h = torch.autograd.grad(solution.x.sum(), (q, h), retain_graph=True)
    # Both copies together are worth 1; each alone has no derivative, and the convention gives it half.
    assert torch.allclose(slope_h, tensor(0.5, 0.5)) and slope_q.abs().max() < 1e-12
    slope_q, slope_h = torch.autograd.grad(solution.lam.sum(), (q, h))
    assert torch.allclose(slope_q, tensor(-1.0)) and torch.allclose(slope_h, tensor(-0.5, -0.5))


def test_repeated_row_in_a_batch_with_regular_ones():
    q = tensor([-1.0], [1.0], [-2.0]).reshape(3, 1).requires_grad_()
    G = torch.ones(3, 2, 1, dtype=f64)
    G[2, 1] = 0.5
    h = torch.zeros(2, dtype=f64).expand(3, 2).clone()
    h[2, 1] = 1.0
    alone = diffopt.solve_qp(torch.eye(1, dtype=f64), q[2:], G=G[2:], h=h[2:])
    solution = diffopt.solve_qp(torch.eye(1, dtype=f64), q, G=G, h=h)
    assert solution.dependent.tolist() == [1, 0, 0]
    assert torch.equal(
        torch.autograd.grad(alone.lam.sum(), q)[0][2], torch.autograd.grad(solution.lam[2].sum(), q)[0][2]
    )


def sudoku_constraints():
    """Return the 64 equations of a 4 x 4 Sudoku over one-hot digits: cells, rows, columns, blocks."""
    index = torch.arange(64).reshape(4, 4, 4)
    groups = [index[r, c] for r in range(4) for c in range(4)]
    groups += [index[r, :, d] for r in range(4) for d in range(4)]
    groups += [index[:, c, d] for c in range(4) for d in range(4)]
    groups += [
        index[2 * i : 2 * i + 2, 2 * j : 2 * j + 2, d].flatten() for i in (0, 1) for j in (0, 1) for d in range(4)
    ]
    rows = torch.zeros(64, 64, dtype=f64)
    for k, members in enumerate(groups):
        rows[k, members.flatten()] = 1
    return rows


def test_the_true_sudoku_vertex():
    """48 active bounds and 40 equalities in 64 variables: the minimum-norm solution, by a dense pseudo-inverse."""
    grid = torch.tensor([[1, 2, 3, 4], [3, 4, 1, 2], [2, 1, 4, 3], [4, 3, 2, 1]])
    answer = torch.nn.functional.one_hot(grid - 1, 4).double()
    given = torch.zeros(4, 4, 1, dtype=f64)
    for cell in ((0, 0), (0, 2), (1, 1), (2, 2), (3, 3), (3, 0)):
        given[cell] = 1
    _, sizes, rows = torch.linalg.svd(sudoku_constraints())
    assert int((sizes > 1e-9).sum()) == 40
    A = (torch.randn(40, 40, dtype=f64) @ rows[:40]).requires_grad_()
    b = (A.detach() @ answer.flatten()).requires_grad_()
    q = -(answer * given).flatten()
    q.requires_grad_()
    solution = diffopt.solve_qp(Diagonal(torch.full((64,), 0.1, dtype=f64)), q, A, b, lower=0.0)
    assert solution.ok and (solution.x - answer.flatten()).abs().max() < 1e-12
    active = solution.lam_lower.detach() > 1e-6
    assert int(active.sum()) == 48 and solution.weakly_active == 0 and solution.dependent > 10
    v = torch.randn(64, dtype=f64)
    got = torch.autograd.grad((v * solution.x).sum(), (q, A, b))
    B = torch.cat([A.detach(), -torch.eye(64, dtype=f64)[active]])
    K = torch.zeros(64 + 88, 64 + 88, dtype=f64)
    K[:64, :64], K[:64, 64:], K[64:, :64] = 0.1 * torch.eye(64, dtype=f64), B.mT, B
    y = torch.linalg.pinv(K, hermitian=True, rtol=1e-10) @ torch.cat([v, torch.zeros(88, dtype=f64)])
    y_x, y_nu = -y[:64], -y[64:104]
    x, nu = solution.x.detach(), solution.nu.detach()
    for a, wanted in zip(got, (y_x, torch.outer(y_nu, x) + torch.outer(nu, y_x), -y_nu), strict=True):
        assert (a - wanted).abs().max() < 1e-8 * (1 + wanted.abs().max())
    _, tangent = torch.func.jvp(
        lambda b: diffopt.solve_qp(Diagonal(torch.full((64,), 0.1, dtype=f64)), q.detach(), A.detach(), b, lower=0.0).x,
        (b.detach(),), (torch.ones(40, dtype=f64),),
    )  # fmt: skip
    assert torch.allclose((v * tangent).sum(), got[2].sum(), atol=1e-8)


@pytest.mark.parametrize("reduction", ["auto", "dual", "primal"])
@pytest.mark.parametrize("executor", ["cpu", "torch", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_a_kink_without_a_weakly_active_row_is_seen(executor, reduction):
    """min (x - 1)^2 / 2 subject to x <= h1, x <= h2 at h = 0: multipliers 1/2 each, x = min(h1, h2, 1)."""
    device = "cuda" if executor == "cuda" else "cpu"
    settings = Settings(executor=executor, reduction=reduction)

    def solve(h):
        one = torch.ones(1, 1, dtype=f64, device=device)
        return diffopt.solve_qp(one, -one[0], G=one.expand(2, 1), h=h, settings=settings)

    h = torch.zeros(2, dtype=f64, device=device, requires_grad=True)
    solution = solve(h)
    assert solution.weakly_active == 0 and solution.dependent == 1
    assert torch.allclose(solution.lam.sum(), h.new_ones(())) and bool((solution.lam > 0.1).all())
    (slope,) = torch.autograd.grad(solution.x.sum(), h)
    along, size = h.new_tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, -1.0]]), 1e-3
    ahead, behind = (solve(sign * size * along).x[..., 0] / (sign * size) for sign in (1, -1))
    # Only along the first do the rows stay consistent, and x has a derivative: there it is this.
    assert torch.allclose(ahead, h.new_tensor([1.0, 0.0, 0.0, -1.0]))
    assert torch.allclose(behind, h.new_tensor([1.0, 1.0, 1.0, 1.0]))
    assert torch.allclose(along[0] @ slope, ahead[0]) and torch.allclose(along[0] @ slope, behind[0])
    # Along the others it is a convention, which lies between the one-sided slopes: each row has half.
    assert torch.allclose(slope, h.new_tensor([0.5, 0.5]))
    low, high = torch.minimum(ahead, behind), torch.maximum(ahead, behind)
    assert bool(((low - 1e-9 <= along @ slope) & (along @ slope <= high + 1e-9)).all())


# ------------------------------------------------------------------ failures


def partly_infeasible(grad=True):
    """Return data of three instances of which the second has no feasible point."""
    Q, q = torch.eye(2, dtype=f64), torch.randn(3, 2, dtype=f64)
    G, h = tensor([1.0, 0.0], [-1.0, 0.0]).reshape(2, 2), tensor([1.0, 1.0], [-1.0, -1.0], [1.0, 1.0]).reshape(3, 2)
    return [t.requires_grad_(grad) for t in (Q, q, G, h)]


OUTPUTS = ("x", "s", "lam", "lam_lower", "lam_upper", "value")


def solve_partly(Q, q, G, h):
    return diffopt.solve_qp(Q, q, G=G, h=h, lower=-9.0, upper=9.0, on_failure="return")


@pytest.mark.parametrize("output", OUTPUTS)
def test_masked_failure_leaves_no_trace(output):
    data = partly_infeasible()
    solution = solve_partly(*data)
    assert solution.status.tolist() == [Status.SOLVED, Status.PRIMAL_INFEASIBLE, Status.SOLVED]
    value = getattr(solution, output)
    assert value[1].isnan().all() and value[[0, 2]].isfinite().all()
    got = torch.autograd.grad(value[solution.ok].sum(), data, allow_unused=True, materialize_grads=True)
    Q, q, G, h = (t.detach() for t in data)
    parts = [t.requires_grad_() for t in (Q.clone(), q[[0, 2]], G.clone(), h[[0, 2]])]
    wanted = torch.autograd.grad(
        getattr(solve_partly(*parts), output).sum(), parts, allow_unused=True, materialize_grads=True
    )
    assert torch.allclose(got[0], wanted[0]) and torch.allclose(got[2], wanted[2])
    for a, b in ((got[1], wanted[1]), (got[3], wanted[3])):
        assert torch.allclose(a[[0, 2]], b) and (a[1] == 0).all()


@pytest.mark.parametrize("output", OUTPUTS)
def test_unmasked_failure_gives_nan_and_only_there(output):
    data = partly_infeasible()
    got = torch.autograd.grad(getattr(solve_partly(*data), output).sum(), data)
    assert got[0].isnan().all() and got[2].isnan().any()  # shared by the failed instance
    assert got[1].isnan().any(-1).tolist() == [False, True, False]
    assert got[3].isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("output", [*OUTPUTS, "nu"])
@pytest.mark.parametrize("failure", ["nan", "crossed", "infeasible"])
def test_every_failure_gives_nan_in_all_data(output, failure):
    g = torch.Generator().manual_seed(0)
    Q, q = torch.eye(2, dtype=f64).repeat(2, 1, 1), torch.randn(2, 2, dtype=f64, generator=g)
    A, b = torch.ones(2, 1, 2, dtype=f64), torch.zeros(2, 1, dtype=f64)
    G, h = torch.ones(2, 1, 2, dtype=f64), torch.ones(2, 1, dtype=f64)
    lower, upper = -torch.ones(2, 2, dtype=f64), torch.ones(2, 2, dtype=f64)
    if failure == "nan":
        q[1, 0] = torch.nan
    elif failure == "crossed":
        lower[1, 0] = 2.0
    else:
        h[1] = -1.0
    data = [t.requires_grad_() for t in (Q, q, A, b, G, h, lower, upper)]
    value = getattr(diffopt.solve_qp(*data, on_failure="return"), output)
    for name, slope in zip(
        ["Q", "q", "A", "b", "G", "h", "lower", "upper"], torch.autograd.grad(value.sum(), data), strict=True
    ):
        assert slope[0].isfinite().all() and slope[1].isnan().any(), name


def test_failure_in_forward_mode():
    data = partly_infeasible(grad=False)
    moved = torch.ones(3, 2, dtype=f64)
    still = moved.clone()
    still[1] = 0
    for k in (1, 3):
        for tangent, bad in ((moved, True), (still, False)):

            def outputs(v, k=k):
                changed = [*data[:k], v, *data[k + 1 :]]
                solution = solve_partly(*changed)
                return solution.x, solution.lam, solution.s, solution.value

            for change in torch.func.jvp(outputs, (data[k],), (tangent,))[1]:
                assert change[[0, 2]].isfinite().all()
                assert change[1].isnan().any() == bad


def test_where_over_a_failed_instance_is_no_mask_but_indexing_is():
    data = partly_infeasible()
    solution = solve_partly(*data)
    kept = solution.x[solution.ok].square().sum()
    assert torch.autograd.grad(kept, data[1], retain_graph=True)[0].isfinite().all()
    squares = torch.where(solution.ok[:, None], solution.x.square(), 0.0).sum()  # 0 times NaN on the way back
    assert squares.isfinite() and torch.autograd.grad(squares, data[1])[0][1].isnan().all()


@pytest.mark.parametrize("executor", ["torch", "auto"])
def test_a_masked_failure_leaves_no_trace_in_second_derivatives(executor):
    q, lower = torch.randn(2, 2, dtype=f64).requires_grad_(), tensor([-0.1, -0.1], [2.0, 0.0], grad=True)
    Q = torch.eye(2, dtype=f64).repeat(2, 1, 1).requires_grad_()
    settings = Settings(executor=executor)
    solution = diffopt.solve_qp(Q, q, lower=lower, upper=1.0, on_failure="return", settings=settings)
    assert solution.ok.tolist() == [True, False]
    data = (Q, q, lower)
    first = torch.autograd.grad(solution.x[solution.ok].square().sum(), data, create_graph=True)
    # Of all gradients, those of the failed instance (zeros) too.
    second = torch.autograd.grad(sum(g.sum() for g in first), data)
    assert all(g[0].isfinite().all() and not g[1].any() for g in second) and second[1][0].any()


def test_iteration_limit_keeps_its_iterate_but_has_no_gradient():
    data = random_qp()
    solution = diffopt.solve_qp(*data, settings=Settings(max_iterations=1), on_failure="return")
    assert (solution.status == Status.MAX_ITERATIONS).all() and solution.x.isfinite().all()
    assert torch.autograd.grad(solution.x.sum(), data[1])[0].isnan().all()
    assert (solution.dependent == -1).all()


def test_failure_raises_by_default_and_carries_the_solution():
    with pytest.raises(
        SolveFailed, match=r"1 of 3 instances were not solved by 'pdipm':\n  batch index \[1\]: PRIMAL_INF"
    ) as caught:
        Q, q, G, h = partly_infeasible()
        diffopt.solve_qp(Q, q, G=G, h=h)
    assert "on_failure='return'" in str(caught.value) and "relax them" in str(caught.value)
    assert caught.value.solution.ok.tolist() == [True, False, True]


def test_fixed_variables_share_their_gradient_between_the_two_sides():
    low, high = tensor(0.5, -1.0, grad=True), tensor(0.5, 1.0, grad=True)
    solution = diffopt.solve_qp(torch.eye(2, dtype=f64), tensor(0.0, 0.3), lower=low, upper=high)
    slopes = torch.autograd.grad(solution.x.sum(), (low, high), retain_graph=True)
    assert all(torch.allclose(s, tensor(0.5, 0.0)) for s in slopes)
    assert torch.allclose(solution.lam_lower, tensor(0.5, 0.0)) and solution.lam_upper.abs().max() == 0
    slopes = torch.autograd.grad(solution.lam_lower.sum(), (low, high))
    assert all(torch.allclose(s, tensor(0.5, 0.0)) for s in slopes)
