"""Gradients at kinks, by the named rules, and where active rows depend on each other."""

import pytest
import torch

import diffopt
from diffopt import Diagonal, Settings
from random_data import everything, random_qp, tensor

f64 = torch.float64


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
