"""Residuals by hand, active sets in any units, and the polish of foreign points."""

import torch

import diffopt
from diffopt import QPForm, kkt
from diffopt.linalg.scaling import equilibrate

f64 = torch.float64


def tensor(*values):
    return torch.tensor(values, dtype=f64)


def point(form, x, nu=(), lam=(), lower=None, upper=None):
    x = tensor(*x)
    zero = torch.zeros_like(x)
    return kkt.Point(
        x, -form.inequalities(x), tensor(*nu), tensor(*lam),
        zero if lower is None else tensor(*lower), zero if upper is None else tensor(*upper),
    )  # fmt: skip


def test_residuals_by_hand():
    form = QPForm(
        torch.diag(tensor(2, 4)), tensor(-2, -4), tensor(1, 1)[None], tensor(3), tensor(1, 0)[None], tensor(0.5),
        lower=tensor(-torch.inf, 2), upper=tensor(torch.inf, torch.inf),
    )  # fmt: skip
    r = kkt.residuals(form, point(form, (1, 1), (0.5,), (2.0,), (0.0, 1.0)))
    # Ax - b = -1, Gx - h = 0.5, lower - x = 1; largest of Ax = 2, b = 3, Gx = 1, h = .5, x_2 = 1, lower = 2.
    assert torch.allclose(r.primal, tensor(1 / 4))
    # Qx + q = (0, 0), A'nu = (.5, .5), G'lam + bounds = (2, -1): sum (2.5, -.5); largest term |Qx| = 4.
    assert torch.allclose(r.dual, tensor(2.5 / 5))
    # x'Qx = 6, q'x = -6, b'nu = 1.5, h'lam - lower'lam_lower = 1 - 2 = -1.
    assert torch.allclose(r.gap, tensor(0.5 / 7))


def test_absent_sides_do_not_count():
    form = QPForm(torch.eye(2, dtype=f64), tensor(0, 0), G=tensor(1, 0)[None], h=tensor(torch.inf), upper=torch.inf)
    assert kkt.residuals(form, point(form, (0, 0), (), (0.0,))).worst() == 0


def test_far_sides_that_are_met_hide_no_violation():
    """x_1 = 1 violates x_1 <= 0 by 1, whatever x_2 may be."""
    G = torch.eye(2, dtype=f64)
    rows = QPForm(torch.eye(2, dtype=f64), tensor(-1, 0), G=G, h=tensor(0, 1e30))
    assert kkt.residuals(rows, point(rows, (1, 0), (), (0.0, 0.0))).primal == 0.5
    bounds = QPForm(torch.eye(2, dtype=f64), tensor(-1, 0), lower=tensor(-1e25, -1e25), upper=tensor(0, 1e30))
    assert kkt.residuals(bounds, point(bounds, (1, 0))).primal == 0.5
    # A violated side counts, however large.
    low = QPForm(torch.eye(2, dtype=f64), tensor(-1, 0), lower=tensor(9, 0))
    assert kkt.residuals(low, point(low, (1, 0))).primal == 8 / 10


def test_residuals_of_nonlinear_problems_match_those_of_the_qp():
    class Plain(diffopt.DifferentiableProblem):
        n, params = 2, (diffopt.Param("q", ("n",)),)

        def objective(self, x, p):
            return x.square().sum(-1) + (p["q"] * x).sum(-1)

        def equalities(self, x, p):
            return x.sum(-1, keepdim=True) - 1

        def inequalities(self, x, p):
            return x - 3

    q = tensor(1, -2)
    general = Plain().standard_form({"q": q})
    form = QPForm(
        2 * torch.eye(2, dtype=f64), q, torch.ones(1, 2, dtype=f64), tensor(1), torch.eye(2, dtype=f64), tensor(3, 3)
    )
    at = point(form, (1.0, 0.5), (0.2,), (0.1, 0.3))
    a, b = kkt.residuals(form, at), kkt.residuals(general, at)
    assert torch.allclose(a.primal, b.primal) and torch.allclose(a.gap * 7, b.gap * 7, atol=1)
    assert (a.dual > 0) == (b.dual > 0)


def test_activity_does_not_depend_on_units():
    for k in (1e-6, 1.0, 1e6):
        for rows in (1e-4, 1.0, 1e4):
            Q, q, G = k * torch.eye(2, dtype=f64), k * tensor(-2, 0.5), rows * torch.eye(2, dtype=f64)
            h = rows * tensor(1, 1)
            solution = diffopt.solve_qp(Q, q, G=G, h=h)
            form = QPForm(Q, q, G=G, h=h)
            at = kkt.Point(solution.x, solution.s, solution.nu, solution.lam, solution.lam_lower, solution.lam_upper)
            scaling = equilibrate(form.Q, form.A, form.G, form.q)
            active = kkt.activity(form, at, scaling, 1e-7)
            assert active.row.tolist() == [True, False] and not active.weak_row.any()


def test_polish_makes_a_rough_point_exact_and_leaves_a_wrong_one():
    g = torch.Generator().manual_seed(0)
    U = torch.randn(5, 4, 4, dtype=f64, generator=g)
    q, G = torch.randn(5, 4, dtype=f64, generator=g), torch.randn(5, 3, 4, dtype=f64, generator=g)
    form = QPForm(U @ U.mT + torch.eye(4, dtype=f64), q, G=G, h=torch.full((3,), 0.1, dtype=f64), lower=-0.2, upper=1.0)
    exact = diffopt.solve_qp(form.Q, form.q, G=form.G, h=form.h, lower=form.lower, upper=form.upper)
    fields = (exact.x, exact.s, exact.nu, exact.lam, exact.lam_lower, exact.lam_upper)
    noise = [1e-5 * torch.rand(v.shape, dtype=f64, generator=g) for v in fields]
    rough = kkt.Point(*(v + e for v, e in zip(fields, noise, strict=True)))
    polished = kkt.polish(form, rough, 1e-7)
    assert (polished.x - exact.x).abs().max() < 1e-12 and (polished.lam - exact.lam).abs().max() < 1e-12
    assert (polished.lam_lower - exact.lam_lower).abs().max() < 1e-12
    far = kkt.Point(*(torch.full_like(v, torch.nan) for v in fields))
    assert all(v.isnan().all() for v in kkt.polish(form, far, 1e-7))
