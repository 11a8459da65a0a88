"""The two auxiliary problems prove what they should, and nothing else."""

import pytest
import torch

from diffopt import Diagonal
from diffopt.solvers import certificates, pdipm

f64 = torch.float64


def scaled(q, G, h, lower=None, upper=None, Q=None):
    """Return a batch of two programs over three variables, in equilibrated units."""
    A, b = torch.zeros(0, 3, dtype=f64), torch.zeros(0, dtype=f64)
    Q = Diagonal(torch.zeros(3, dtype=f64)) if Q is None else Q
    return pdipm.scale(pdipm.Data(Q, q, A, b, G, h, lower, upper, torch.Size([2])))


def test_steepest_recession_finds_a_ray_where_there_is_one():
    q = torch.tensor([[-1.0, 0.5, 0.0], [1.0, 0.5, 0.0]], dtype=f64)  # falls along x_1 only in the first
    G, h = torch.tensor([[0.0, 1.0, 1.0]], dtype=f64), torch.ones(1, dtype=f64)
    lower = torch.zeros(3, dtype=f64)
    upper = torch.tensor([torch.inf, 1.0, 0.0], dtype=f64)  # x_3 is fixed
    qp = scaled(q, G, h, lower, upper)
    everywhere = torch.ones(2, dtype=torch.bool)
    ray = pdipm._auxiliary(certificates.steepest_recession(qp), qp.batch, everywhere).x
    proof = certificates.check_dual(qp, ray, everywhere, ~everywhere)
    assert proof.holds.tolist() == [True, False]
    v = proof.ray.x[0] * qp.scaling.d * qp.scaling.cost[0]
    assert abs(float(q[0] @ v) + 1) < 1e-12 and v[0] > 0 and v[1:].abs().max() < 1e-8


def test_curvature_stops_a_ray():
    q = torch.tensor([[-1.0, 0.0, 0.0], [0.0, 0.0, -1.0]], dtype=f64)
    Q = Diagonal(torch.tensor([0.0, 1.0, 1.0], dtype=f64))
    qp = scaled(q, torch.zeros(0, 3, dtype=f64), torch.zeros(0, dtype=f64), Q=Q)
    everywhere = torch.ones(2, dtype=torch.bool)
    ray = pdipm._auxiliary(certificates.steepest_recession(qp), qp.batch, everywhere).x
    assert certificates.check_dual(qp, ray, everywhere, ~everywhere).holds.tolist() == [True, False]


@pytest.mark.parametrize("bounded", [False, True])
def test_least_infeasibility_proves_only_infeasible_programs(bounded):
    G = torch.tensor([[1.0, 1.0, 0.0], [-1.0, -1.0, 0.0]], dtype=f64)
    h = torch.tensor([[1.0, -2.0], [1.0, -0.5]], dtype=f64)  # 2 <= x_1 + x_2 <= 1, and 0.5 <= ... <= 1
    lower = torch.zeros(3, dtype=f64) if bounded else None
    qp = scaled(torch.ones(2, 3, dtype=f64), G, h, lower)
    everywhere = torch.ones(2, dtype=torch.bool)
    found = pdipm._auxiliary(certificates.least_infeasibility(qp), qp.batch, everywhere)
    nu, z, y = pdipm._infeasibility_multipliers(qp, found)
    start = certificates.State(torch.zeros(2, 3, dtype=f64), nu, y, torch.zeros_like(z), z)
    proof = certificates.check_primal(qp, start, everywhere)
    assert proof.holds.tolist() == [True, False]
    assert certificates.check_primal(qp, start, ~everywhere).holds.any() == False  # noqa: E712
