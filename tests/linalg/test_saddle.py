"""The three reductions solve the same system, and degenerate ones in the promised way."""

import pytest
import torch

from diffopt.linalg import Dense, Diagonal, DiagonalPlusLowRank
from diffopt.linalg.saddle import Blocks, Rows, Saddle, Shift, solve_minimum_norm

f64 = torch.float64
N, P, M, B = 5, 2, 4, 3


def shift(p=P, m=M, rho=0.0):
    return Shift(rho, *(torch.full((k,), 1e-10, dtype=f64) for k in (p, m, N)))


def data(kind, seed=0):
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *s: torch.randn(*s, dtype=f64, generator=generator)  # noqa: E731
    d = torch.rand(B, N, dtype=f64, generator=generator) + 0.5
    Q = {"dense": lambda: Dense(torch.diag_embed(d) + 0.1), "diagonal": lambda: Diagonal(d),
         "lowrank": lambda: DiagonalPlusLowRank(d, randn(B, N, 2))}[kind]()  # fmt: skip
    return Q, randn(P, N), randn(B, M, N), randn


def random_rows(e=None):
    row_in = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]]).bool()
    bound_in = torch.tensor([[0, 0, 0, 0, 1], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    zero = torch.zeros((), dtype=f64)
    return Rows(
        row_in, (zero if e is None else e[0]).expand(B, M), bound_in, (zero if e is None else e[1]).expand(B, N)
    )


def dense_system(Q, A, G, rows):
    """Return K as a matrix, rows that take no part replaced by the identity."""
    size = N + P + M + N
    K = torch.zeros(B, size, size, dtype=f64)
    C = torch.cat([A.expand(B, P, N), G, torch.eye(N, dtype=f64).expand(B, N, N)], -2)
    take = torch.cat([torch.ones(B, P).bool(), rows.row_in, rows.bound_in], -1)
    e = torch.cat([torch.zeros(B, P, dtype=f64), rows.row_e, rows.bound_e], -1)
    K[:, :N, :N] = Q.dense()
    K[:, :N, N:] = (C * take[..., None]).mT
    K[:, N:, :N] = C * take[..., None]
    K[:, N:, N:] = torch.diag_embed(torch.where(take, -e, 1.0))
    return K, take


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("e", [None, (torch.tensor(0.3, dtype=f64), torch.tensor(2.0, dtype=f64))])
@pytest.mark.parametrize(
    ("kind", "reduction"),
    [("dense", "dual"), ("dense", "primal"), ("diagonal", "diagonal"), ("diagonal", "primal"), ("lowrank", "diagonal")],
)
def test_reductions_solve_the_unreduced_system(kind, reduction, e, final):
    Q, A, G, randn = data(kind)
    rows = random_rows(e)
    factor = Saddle(Q, A, G, reduction, shift()).factor(rows, held=final)
    assert not factor.failed.any()
    r = Blocks(randn(B, N), randn(B, P), randn(B, M), randn(B, N))
    K, take = dense_system(Q, A, G, rows)
    right = torch.cat([r.x, torch.where(take, torch.cat([r.eq, r.row, r.bound], -1), 0.0)], -1)
    wanted = torch.linalg.solve(K, right)
    u, residual = factor.solve_accurately(r)
    assert (torch.cat(list(u), -1) - wanted).abs().max() < 1e-11
    assert residual.max() < 1e-13
    assert (torch.cat(list(factor.solve(r, 3)), -1) - wanted).abs().max() < 1e-9
    assert not factor.dependent().any()


@pytest.mark.parametrize(("kind", "reduction"), [("dense", "dual"), ("dense", "primal"), ("diagonal", "diagonal")])
def test_dependent_rows_give_the_minimum_norm_solution(kind, reduction):
    Q, A, G, randn = data(kind)
    G[:, 2] = G[:, 0]
    A[1] = 2 * A[0]
    rows = random_rows()
    factor = Saddle(Q, A, G, reduction, shift()).factor(rows, held=True)
    K, take = dense_system(Q, A, G, rows)
    assert factor.dependent().tolist() == [2, 1, 1]
    r = Blocks(randn(B, N), randn(B, P), randn(B, M), randn(B, N))
    right = torch.cat([r.x, torch.where(take, torch.cat([r.eq, r.row, r.bound], -1), 0.0)], -1)
    wanted = torch.linalg.pinv(K, hermitian=True, rtol=1e-10) @ right[..., None]
    u, _ = solve_minimum_norm(factor, r)
    assert (torch.cat(list(u), -1) - wanted[..., 0]).abs().max() < 1e-6
    consistent = factor.apply(Blocks(*(randn(*v.shape) for v in u)))
    u, residual = solve_minimum_norm(factor, consistent)
    assert residual.max() < 1e-9


def test_a_failed_factor_is_marked_and_spares_its_neighbours():
    Q, A, G, randn = data("dense")
    entries = Q.dense().clone()
    good = Saddle(Dense(entries), A, G, "dual", shift()).factor(random_rows())
    entries[1] = -torch.eye(N, dtype=f64)
    bad = Saddle(Dense(entries), A, G, "dual", shift()).factor(random_rows())
    assert bad.failed.tolist() == [False, True, False]
    r = Blocks(randn(B, N), randn(B, P), randn(B, M), randn(B, N))
    for a, b in zip(good.solve(r), bad.solve(r), strict=True):
        assert torch.equal(a[[0, 2]], b[[0, 2]])


def test_empty_blocks():
    A, G = torch.zeros(0, N, dtype=f64), torch.zeros(0, N, dtype=f64)
    none = torch.zeros(B, 0, dtype=f64)
    rows = Rows(none.bool(), none, none.bool(), none)
    r = Blocks(torch.randn(B, N, dtype=f64), none, none, none)
    for reduction in ("dual", "primal"):
        for final in (False, True):
            u = Saddle(Dense(torch.eye(N, dtype=f64) * 2), A, G, reduction, shift(0, 0)).factor(rows, final).solve(r)
            assert torch.allclose(u.x, r.x / 2)


def test_shared_data_is_factored_once():
    Q, A, G, randn = data("dense")
    shared = Dense(Q.dense()[0])
    system = Saddle(shared, A, G[0], "dual", shift())
    assert system.L.shape == (N, N) and system.S_eq.shape == (P, P)
    assert all(block.dim() == 2 for block in system.dual_blocks(True))
    rows, r = random_rows(), Blocks(randn(B, N), randn(B, P), randn(B, M), randn(B, N))
    wide = Saddle(Dense(shared.dense().expand(B, N, N)), A.expand(B, P, N), G[:1].expand(B, M, N), "dual", shift())
    for a, b in zip(system.factor(rows).solve(r), wide.factor(rows).solve(r), strict=True):
        assert torch.allclose(a, b, atol=1e-7)


def test_how_long_a_neighbour_is_refined_changes_no_bit():
    for seed in range(5):
        Q, A, G, randn = data("dense", seed)
        r = Blocks(randn(B, N), randn(B, P), randn(B, M), randn(B, N))
        found = []
        for delta in (1e-10, 1e-1):  # a large shift takes many refinements
            deltas = torch.tensor([[1e-10], [delta], [1e-10]], dtype=f64)
            slow = Shift(0.0, *(deltas.expand(B, k) for k in (P, M, N)))
            factor = Saddle(Q, A.expand(B, P, N), G, "dual", slow).factor(random_rows(), held=True)
            found.append(factor.solve_accurately(r)[0])
        for mine, again in zip(*found, strict=True):
            assert torch.equal(mine[[0, 2]], again[[0, 2]])
