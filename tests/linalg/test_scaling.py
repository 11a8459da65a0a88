import torch

from diffopt.linalg import Dense, Diagonal
from diffopt.linalg.scaling import equilibrate, power_of_two, regularisation


def test_factors_are_powers_of_two_and_balance():
    generator = torch.Generator().manual_seed(0)
    n, m = 6, 5
    spread = 10 ** (6 * torch.rand(n, dtype=torch.float64, generator=generator) - 3)
    Q = torch.eye(n, dtype=torch.float64) / spread / spread[:, None]
    G = torch.randn(m, n, dtype=torch.float64, generator=generator) / spread
    A, q = G[:2] * 1e4, torch.ones(n, dtype=torch.float64)
    d, eq, rows, cost = equilibrate(Dense(Q), A, G, q)
    for v in (d, eq, rows):
        assert torch.equal(v.log2(), v.log2().round())
    assert cost.log2() % 2 == 0  # a power of four, so that its root is exact too
    for scaled in (eq[:, None] * A * d, rows[:, None] * G * d):
        assert scaled.abs().amax(-1).min() > 0.2 and scaled.abs().amax(-1).max() < 5
    assert 0.2 < (cost * Dense(Q).scaled(d).column_norms()).max() < 5


def test_shared_data_has_shared_factors_and_linear_programs_scale_by_q():
    A = torch.ones(1, 3, dtype=torch.float64)
    q = torch.tensor([[1e6, 0, 0], [1e-6, 0, 0]], dtype=torch.float64)
    scaling = equilibrate(Diagonal(torch.zeros(3, dtype=torch.float64)), A, A[:0], q)
    assert scaling.d.shape == (3,) and scaling.eq.shape == (1,)
    assert ((scaling.cost * scaling.d * q).abs().amax(-1) - 1).abs().max() <= 1
    scaling = equilibrate(Diagonal(torch.ones(3, dtype=torch.float64)), A, A[:0], q)
    assert scaling.cost.unique().numel() == 1


def test_power_of_two_leaves_no_bad_factor():
    value = torch.tensor([0.0, -1.0, torch.inf, torch.nan, 3.0, 0.7])
    assert torch.equal(power_of_two(value), torch.tensor([1.0, 1, 1, 1, 4, 0.5]))


def test_zero_rows_and_columns_are_harmless():
    zero = torch.zeros(2, 3, dtype=torch.float64)
    scaling = equilibrate(Diagonal(zero[0]), zero, zero, zero[0])
    assert all(torch.equal(v, torch.ones_like(v)) for v in scaling)
    shift = regularisation(scaling, "primal")
    assert shift.rho > 0 and (shift.row > 0).all()
