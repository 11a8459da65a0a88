"""Every structured matrix agrees with its dense form."""

import pytest
import torch

from diffopt import ParameterError, ShapeError
from diffopt.linalg import Dense, Diagonal, DiagonalPlusLowRank


def cases(batch):
    S = torch.randn(*batch, 4, 4, dtype=torch.float64)
    d = torch.randn(*batch, 4, dtype=torch.float64)
    return [Dense(S + S.mT), Diagonal(d), DiagonalPlusLowRank(d, torch.randn(*batch, 4, 2, dtype=torch.float64))]


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("kind", range(3))
def test_laws(batch, kind):
    Q = cases(batch)[kind]
    D, x = Q.dense(), torch.randn(3, 4, dtype=torch.float64)
    assert Q.n == 4 and Q.batch_shape == batch
    assert repr(Q).startswith(f"{type(Q).__name__}({tuple(Q.tensors()[0].shape)}")
    assert torch.allclose(D, D.mT)
    assert torch.allclose(Q.matvec(x), (D @ x[..., None])[..., 0])
    assert torch.allclose(Q.diagonal(), D.diagonal(dim1=-2, dim2=-1))
    d = torch.rand(4, dtype=torch.float64) + 0.5
    assert torch.allclose(Q.scaled(d).dense(), d[:, None] * D * d)
    assert torch.equal(Q.with_tensors(*Q.tensors()).dense(), D)
    assert (Q.column_norms() >= D.abs().amax(-2) - 1e-12).all()
    assert len(Q.core_dims()) == len(Q.tensors())


@pytest.mark.parametrize("kind", range(3))
def test_derivatives_of_products(kind):
    Q = cases((3,))[kind]
    tensors = tuple(t.clone().requires_grad_() for t in Q.tensors())
    x, y = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    pairing = (y * Q.with_tensors(*tensors).matvec(x)).sum()
    wanted = torch.autograd.grad(pairing, tensors)
    got = Q.pairing_gradient(y, x)
    if kind == 0:  # a dense Q is symmetric: only the symmetric part of its gradient means anything
        wanted = (0.5 * (wanted[0] + wanted[0].mT),)
    for a, b in zip(got, wanted, strict=True):
        assert torch.allclose(a, b)
    tangents = tuple(torch.randn_like(t) for t in tensors)
    _, wanted = torch.func.jvp(lambda *t: Q.with_tensors(*t).matvec(x), Q.tensors(), tangents)
    assert torch.allclose(Q.tangent_matvec(tangents, x), wanted)
    assert Q.tangent_matvec((None,) * len(tangents), x) is None
    if kind == 2:
        _, wanted = torch.func.jvp(lambda t: Q.with_tensors(Q.tensors()[0], t).matvec(x), Q.tensors()[1:], tangents[1:])
        assert torch.allclose(Q.tangent_matvec((None, tangents[1]), x), wanted)


@pytest.mark.parametrize("make", [Dense, Diagonal, lambda d: DiagonalPlusLowRank(d, torch.ones(3, 1))])
def test_what_is_no_tensor_is_refused(make):
    for value in ([1.0, 2.0, 3.0], 1.0, None):
        with pytest.raises(ParameterError, match=f"takes torch tensors, got {type(value).__name__}"):
            make(value)
    with pytest.raises(ShapeError, match="without dimensions"):
        make(torch.tensor(1.0))
