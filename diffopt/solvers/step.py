"""What an interior-point step needs to know of the cone: here the nonnegative orthant.

A second cone adds its own versions of these functions; the main loop does not change.
All act on s and z ``(*batch, M)`` with ``on`` marking the rows that an instance has.
"""

from __future__ import annotations

import torch
from torch import Tensor


def complementarity(s: Tensor, z: Tensor, on: Tensor) -> Tensor:
    """Return mu, the average of s_i z_i over the rows of an instance, ``(*batch,)``; 0 without rows."""
    return torch.where(on, s * z, 0.0).sum(-1) / on.sum(-1).clamp_min(1)


def interior_start(s: Tensor, z: Tensor, on: Tensor) -> tuple[Tensor, Tensor]:
    """Shift s and z into the interior by the same amount in every row.

    References:
        Vandenberghe (2010), "The CVXOPT linear and quadratic cone program solvers", section 5.3.
    """
    return _shifted(s, on), _shifted(z, on)


def _shifted(v: Tensor, on: Tensor) -> Tensor:
    if not v.shape[-1]:
        return v
    lowest = torch.where(on, v, torch.inf).amin(-1, keepdim=True)
    largest = torch.where(on, v.abs(), 0.0).amax(-1, keepdim=True)
    shift = torch.where(lowest > 1e-3 * (1 + largest), 0.0, 1 - lowest)
    return torch.where(on, v + torch.where(torch.isfinite(shift), shift, 0.0), 1.0)


def longest_step(s: Tensor, z: Tensor, ds: Tensor, dz: Tensor, on: Tensor) -> Tensor:
    """Return the largest alpha <= 1 with s + alpha ds >= 0 and z + alpha dz >= 0, ``(*batch,)``."""
    alpha = s.new_ones(s.shape[:-1])
    for v, dv in ((s, ds), (z, dz)):
        if v.shape[-1]:
            towards = on & (dv < 0)
            ratio = torch.where(towards, -v / torch.where(towards, dv, -1.0), torch.inf)
            alpha = torch.minimum(alpha, ratio.amin(-1))
    return alpha
