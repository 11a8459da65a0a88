"""The limit of the central path at weakly active rows: which share each of them takes."""

from __future__ import annotations

import torch
from torch import Tensor

from diffopt.linalg.saddle import Blocks, Rows, Saddle

MOST = 50


def central_ratio(saddle: Saddle, rows: Rows, weak_row: Tensor, weak_bound: Tensor) -> tuple[Tensor, Tensor]:
    """Return the limit of s/lam along the central path for weakly active rows, elsewhere 0.

    Near the limit point slack and multiplier of a weakly active row are both of order sqrt(mu),
    s = sqrt(mu) sigma, lam = sqrt(mu) l, and to leading order sigma = P l with P the reduced matrix
    of these rows, the strictly active ones holding with equality. So (sigma, l) is the solution of
    sigma = P l, sigma l = 1, sigma, l > 0: unique where P is nonsingular. It is found by damped Newton steps.

    Args:
        rows: strictly active rows, e = 0. weak_row, weak_bound: the weakly active ones.
    """
    ones_row, ones_bound = weak_row.to(torch.float64), weak_bound.to(torch.float64)
    sigma, ell = [ones_row, ones_bound], [ones_row.clone(), ones_bound.clone()]
    x = torch.zeros(torch.broadcast_shapes(saddle.Q.batch_shape, weak_row.shape[:-1]) + (saddle.Q.n,)).to(ones_row)
    w = Blocks(x, x.new_zeros(*x.shape[:-1], saddle.A.shape[-2]), ones_row * 0, ones_bound * 0)
    weak = [weak_row, weak_bound]
    strict = [rows.row_in, rows.bound_in]
    for _ in range(MOST):
        ratio = [torch.where(k, s / torch.where(k, v, 1.0), 0.0) for k, s, v in zip(weak, sigma, ell, strict=True)]
        factor = saddle.factor(Rows(strict[0] | weak_row, ratio[0], strict[1] | weak_bound, ratio[1]))
        # Newton for: K-stationarity = 0, C_strict x = 0, C_weak x + sigma = 0, sigma l = 1, with w the
        # primal-dual point whose weak multipliers are l. Bounds are rows x: force and distance share a sign.
        at = Blocks(w.x, w.eq, torch.where(weak_row, ell[0], w.row), torch.where(weak_bound, ell[1], w.bound))
        residual = factor.apply(at)
        row = torch.where(weak_row, -residual.row - ratio[0] * ell[0] + sigma[0] - 1 / ell[0].clamp_min(1e-300), -residual.row)
        bound = residual.bound
        if bound.shape[-1]:
            change = -residual.bound - ratio[1] * ell[1] + sigma[1] - 1 / ell[1].clamp_min(1e-300)
            bound = torch.where(weak_bound, change, -residual.bound)
        u = factor.solve(Blocks(-residual.x, -residual.eq, row, bound))
        step = [torch.where(weak_row, u.row, 0.0), torch.where(weak_bound, u.bound, 0.0)]
        slack = [
            torch.where(k, (1 - s * v) / torch.where(k, v, 1.0) - r * d, 0.0)
            for k, s, v, r, d in zip(weak, sigma, ell, ratio, step, strict=True)
        ]
        alpha = torch.ones_like(x[..., 0])
        for v, dv in ((sigma[0], slack[0]), (sigma[1], slack[1]), (ell[0], step[0]), (ell[1], step[1])):
            if v.shape[-1]:
                falling = torch.where(dv < 0, -v / torch.where(dv < 0, dv, -1.0), torch.inf)
                alpha = torch.minimum(alpha, 0.9 * falling.amin(-1))
        a = alpha.unsqueeze(-1)
        sigma = [v + a * dv for v, dv in zip(sigma, slack, strict=True)]
        ell = [v + a * dv for v, dv in zip(ell, step, strict=True)]
        w = Blocks(w.x + a * u.x, w.eq + a * u.eq, w.row + a * torch.where(strict[0], u.row, 0.0),
                   w.bound + a * torch.where(strict[1], u.bound, 0.0) if w.bound.shape[-1] else w.bound)  # fmt: skip
        if bool((alpha >= 1).all()) and max(float(d.abs().max()) if d.numel() else 0.0 for d in step) < 1e-10:
            break
    ratio = [torch.where(k, s / torch.where(k, v, 1.0), 0.0) for k, s, v in zip(weak, sigma, ell, strict=True)]
    return ratio[0], ratio[1]
