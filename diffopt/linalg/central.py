"""The limit of the central path at weakly active rows: which share each of them takes."""

from __future__ import annotations

import torch
from torch import Tensor

from diffopt.linalg.saddle import Blocks, Rows, Saddle

MOST = 50
SETTLED = 1e-12


def central_ratio(saddle: Saddle, strict: Rows, weak_row: Tensor, weak_bound: Tensor) -> tuple[Tensor, Tensor]:
    """Return the limit of s/lam along the central path for weakly active rows, 0 for the others.

    Near the limit point, slack and multiplier of a weakly active row are both of order sqrt(mu):
    s = sqrt(mu) sigma, lam = sqrt(mu) l. To leading order (sigma, l) solves

        Qx + A'nu + C_strict' lam + C_weak' l = 0,  Ax = 0,  C_strict x = 0,  C_weak x + sigma = 0,
        sigma l = 1,  sigma, l > 0,

    which has one solution where the weak rows are independent of the others. Found by damped Newton steps:
    with e = sigma / l, C_weak dx - e dl = -C_weak x - 1/l.

    Args:
        strict: the strictly active rows, e = 0.
        weak_row: ``(*batch, m)`` bool. weak_bound: ``(*batch, n)`` (or 0): +1 for a weakly active upper
            bound, -1 for a lower one, 0 elsewhere.
    """
    sign = torch.cat([weak_row.double(), weak_bound.double()], -1)
    weak, m = sign != 0, weak_row.shape[-1]
    sigma, ell = weak.double(), weak.double()
    shape = weak.shape[:-1]
    zeros, done = weak.double() * 0, torch.zeros(shape, dtype=torch.bool, device=sign.device)
    at = Blocks(
        sigma.new_zeros(*shape, saddle.Q.n), sigma.new_zeros(*shape, saddle.A.shape[-2]), zeros[..., :m], zeros[..., m:]
    )
    for _ in range(MOST):
        ratio = torch.where(weak, sigma / torch.where(weak, ell, 1.0), 0.0)
        rows = Rows(strict.row_in | weak_row, ratio[..., :m], strict.bound_in | (weak_bound != 0), ratio[..., m:])
        factor = saddle.factor(rows, held=True)
        force = torch.where(weak, sign * ell, torch.cat([at.row, at.bound], -1))
        residual = factor.apply(at._replace(row=force[..., :m], bound=force[..., m:]))
        own = torch.where(weak, -ratio * sign * ell - sign / torch.where(weak, ell, 1.0), 0.0)
        right = Blocks(-residual.x, -residual.eq, own[..., :m] - residual.row, own[..., m:] - residual.bound)
        u = factor.solve(right)
        step = torch.cat([u.row, u.bound], -1)
        change_ell = torch.where(weak, sign * step, 0.0)
        change_sigma = torch.where(weak, (1 - sigma * ell) / torch.where(weak, ell, 1.0) - ratio * change_ell, 0.0)
        alpha = sigma.new_ones(shape)
        for v, dv in ((sigma, change_sigma), (ell, change_ell)):
            reach = torch.where(dv < 0, -v / torch.where(dv < 0, dv, -1.0), torch.inf).amin(-1)
            alpha = torch.minimum(alpha, 0.9 * reach)
        # (An instance that has settled stays as it is: how long its neighbours take is nothing to it.)
        a = torch.where(done, 0.0, alpha).unsqueeze(-1)
        sigma, ell = sigma + a * change_sigma, ell + a * change_ell
        moved = torch.where(weak, 0.0, torch.cat([at.row, at.bound], -1) + a * step)
        at = Blocks(at.x + a * u.x, at.eq + a * u.eq, moved[..., :m], moved[..., m:])
        settled = torch.maximum(change_sigma.abs(), change_ell.abs()) <= SETTLED * (sigma + ell)
        done = done | (settled | ~weak).all(-1)
        if bool(done.all()):
            break
    ratio = torch.where(weak, sigma / torch.where(weak, ell, 1.0), 0.0)
    return ratio[..., :m], ratio[..., m:]
