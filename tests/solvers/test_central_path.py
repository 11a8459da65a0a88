"""The central point of a batch: s_i lam_i = kappa, in original units, whatever the scaling."""

from __future__ import annotations

import pytest
import torch

import diffopt
from diffopt.check import known
from diffopt.check.known import KnownProblem
from diffopt.problems.barrier import BarrierForm
from diffopt.shapes import rmatvec
from diffopt.solvers import central_path
from diffopt.solvers.executor import Data


def data(problem: KnownProblem) -> tuple[diffopt.QPForm, Data]:
    form = diffopt.QPForm(**problem.arguments())
    vectors = (form.q, form.A, form.b, form.G, form.h, form.lower, form.upper)
    return form, Data(form.Q, *vectors, form.batch_shape)


PROBLEMS = {
    "ordinary": known.quadratic_program(0, 6, 2, 4, bounds="mixed", batch=(8,)),
    "singular": known.quadratic_program(1, 6, 0, 10, bounds="lower", singular=True, batch=(8,)),
    "linear": known.linear_program(2, 6, 1, 8, bounds=None, batch=(8,)),
    "degenerate": known.degenerate_program(3, 6, 1, 4, bounds="both", weak=2, batch=(8,)),
    "redundant": known.redundant_program(4, 6, 1, 4, extra_p=1, extra_m=2, bounds="upper", batch=(8,)),
    "badly scaled": known.badly_scaled_program(5, 6, 1, 4, bounds="both", batch=(8,)),
    "equalities only": known.quadratic_program(6, 5, 2, 0, batch=(2,)),
}


@pytest.mark.parametrize("kappa", [10.0, 1e-2, 1e-6])
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_point_satisfies_its_conditions(name: str, kappa: float) -> None:
    form, given = data(PROBLEMS[name])
    point = central_path.solve(given, kappa)
    assert float(point.residual.max()) <= 1e-9
    # In original units, by the barrier problem itself: its slope vanishes on Ax = b, and every slack is positive.
    barrier = BarrierForm(form, kappa)
    slacks, there = barrier.slacks(point.x)
    assert all(bool((s[on.expand(s.shape)] > 0).all()) for s, on in zip(slacks, there, strict=True))
    slope = barrier.derivatives(point.x, point.x[..., :0], point.nu).gradient
    size = 1 + torch.maximum(slope.abs(), rmatvec(form.A, point.nu).abs()).amax(-1)
    for force in barrier.multipliers(point.x):
        size = torch.maximum(size, force.abs().amax(-1)) if force.shape[-1] else size
    error = (slope + rmatvec(form.A, point.nu)).abs().amax(-1) / size
    # A force kappa / s errs by the rounding of its slack, a difference of numbers of size 1 (or 1e4): eps |x| / s.
    least = torch.cat([s.expand(*form.batch_shape, s.shape[-1]) for s in slacks], -1).amin(-1).clamp_max(1)
    reach = 1 + torch.cat([point.x, form.h.expand(*form.batch_shape, form.m)], -1).abs().amax(-1)
    assert bool((error <= 1e-10 + 100 * torch.finfo(torch.float64).eps * reach / least).all())


def test_no_instance_changes_another() -> None:
    _, given = data(known.quadratic_program(0, 6, 2, 4, bounds="both", batch=(8,)))
    whole = central_path.solve(given, 0.1)
    assert given.upper is not None
    h, upper = given.h.clone(), given.upper.clone()
    h[3, 0] = torch.nan
    upper[5, 0] = -1e6  # far below the lower bound
    again = central_path.solve(given._replace(h=h, upper=upper), 0.1)
    others = [0, 1, 2, 4, 6, 7]
    assert torch.equal(again.x[others], whole.x[others]) and torch.equal(again.residual[others], whole.residual[others])
    assert not bool((again.residual[[3, 5]] <= 1e-6).any())
