"""Bad data is refused at once: start from a working case and break one thing at a time."""

import numpy as np
import pytest
import torch

import diffopt
from diffopt import DeviceError, Diagonal, DiagonalPlusLowRank, DtypeError, ParameterError, QPForm, ShapeError
from diffopt.cones import NonnegativeCone, ProductCone


def working(**changes):
    good = dict(
        Q=torch.eye(4), q=torch.zeros(4), A=torch.zeros(1, 4), b=torch.zeros(1), G=torch.zeros(2, 3, 4),
        h=torch.zeros(3), lower=torch.zeros(4), upper=1.0,
    )  # fmt: skip
    return good | changes


def test_shapes_of_a_working_form():
    form = QPForm(**working())
    assert (form.n, form.p, form.m, form.batch_shape) == (4, 1, 3, (2,))
    assert torch.equal(form.upper, torch.ones(4)) and form.cone.dim == 3
    assert repr(form) == "QPForm(n=4, p=1, m=3, batch=(2,), Q=Dense((4, 4)), lower, upper)"
    assert QPForm(**working(b=2.0, h=1.0)).h.tolist() == [1, 1, 1]
    assert QPForm(**working(h=torch.tensor(1.0), lower=torch.tensor(0.0))).h.shape == (3,)
    assert QPForm(None, torch.zeros(4)).Q.diagonal().sum() == 0
    cone = ProductCone(NonnegativeCone(1), NonnegativeCone(2))
    assert QPForm(**working(cone=cone)).cone is cone


BROKEN = [
    (dict(Q=torch.zeros(4, 3)), ShapeError, r"`Q` is not square. Expected Q of shape \(\*batch, 4, 4\), got \(4, 3\)"),
    (dict(Q=torch.zeros(4)), ShapeError, r"`Q` is not square.*diffopt.Diagonal"),
    (dict(Q=torch.eye(3)), ShapeError, r"`Q` is 3 x 3 but `q` has 4 entries"),
    (dict(Q=Diagonal(torch.ones(3))), ShapeError, "`Q` is 3 x 3 but q has 4 entries"),
    (dict(Q=[[1.0]]), ParameterError, r"`Q` must be a torch tensor, got list.*torch.as_tensor\(Q\)"),
    (dict(Q=2.0), ParameterError, r"`Q` is a number, 2.0. Expected.*torch.full\(\(4,\), 2.0\).*scaled_identity"),
    (dict(Q=Diagonal(np.ones(4))), ParameterError, "`Q` must be a torch tensor, got ndarray"),
    (
        dict(Q=DiagonalPlusLowRank(torch.ones(4), torch.ones(1, 4))), ShapeError,
        r"The factor of `Q`.*Expected U of shape \(\*batch, 4, k\).*got \(1, 4\). If it is transposed, pass its `.mT`",
    ),
    (dict(Q=DiagonalPlusLowRank(torch.ones(4), torch.ones(4))), ShapeError, r"factor of `Q`.*got \(4,\).$"),
    (dict(Q=torch.eye(4).to_sparse()), ParameterError, r"`Q` is a sparse tensor.*Pass `Q.to_dense\(\)`"),
    (dict(A=torch.zeros(1, 4).to_sparse()), ParameterError, "`A` is a sparse tensor"),
    (dict(G=torch.zeros(2, 3, 4).to_sparse()), ParameterError, "`G` is a sparse tensor"),
    (dict(q=torch.tensor(1.0)), ShapeError, "`q` has no dimensions"),
    (dict(q=torch.zeros(0)), ShapeError, "`q` has no entries"),
    (dict(q=None), ParameterError, "`q` must be a torch tensor, got NoneType"),
    (
        dict(G=torch.zeros(2, 4, 3)), ShapeError,
        r"`G` has 3 columns but there are 4 variables. Expected G of shape \(\*batch, m, 4\), got \(2, 4, 3\). "
        r"If G is transposed, pass `G.mT`.",
    ),
    (dict(A=torch.zeros(1, 5)), ShapeError, r"`A` has 5 columns.*\(\*batch, p, 4\), got \(1, 5\)"),
    (
        dict(G=torch.zeros(4)), ShapeError,
        r"`G` has no rows and columns. Expected.*\(\*batch, m, 4\), got \(4,\). For one row pass `G.unsqueeze\(0\)`",
    ),
    (dict(h=torch.zeros(2)), ShapeError, r"`h` has 2 entries but `G` has 3 rows. Expected h of shape \(\*batch, 3\)"),
    (dict(b=torch.zeros(2)), ShapeError, "`b` has 2 entries but `A` has 1 rows"),
    (dict(h=None), ParameterError, "`G` was given without `h`. Expected both or neither"),
    (dict(A=None), ParameterError, "`b` was given without `A`"),
    (dict(h=[1.0]), ParameterError, "`h` must be a torch tensor, got list"),
    (dict(lower=torch.zeros(3)), ShapeError, r"`lower` has 3 entries but there are 4 variables.*single number"),
    (dict(upper="1"), ParameterError, "`upper` must be a torch tensor, got str"),
    (dict(cone=NonnegativeCone(2)), ShapeError, "`cone` has dimension 2 but G has 3 rows"),
    (dict(q=torch.zeros(4).double()), DtypeError, "`q` has dtype torch.float64 but `Q` has torch.float32"),
    (dict(Q=torch.eye(4).long()), DtypeError, r"`Q` has dtype torch.\w+. Expected torch.float32 or torch.float64"),
    (dict(h=torch.zeros(3, device="meta")), DeviceError, r"`h` is on meta but `Q` is on cpu.*h.to\(Q.device\)"),
    (dict(q=torch.zeros(3, 4)), ShapeError, r"batch dimensions of `G`, \(2,\), do not broadcast with \(3,\)"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), BROKEN)
def test_broken_data(changes, error, message):
    with pytest.raises(error, match=message):
        QPForm(**working(**changes))


def test_shapes_that_passed_before_do_not_let_other_data_through():
    q, none, side = torch.zeros(4), None, torch.tensor(1.0)
    A = torch.ones(2, 4)
    for _ in range(2):  # (the second time the shapes are known)
        assert QPForm(torch.eye(4), q).p == 0
        form = QPForm(torch.eye(4), q, A, side, lower=side)
        assert form.b.shape == (2,) and form.lower is not None and form.lower.shape == (4,)
        for broken in (dict(b=torch.ones(2)), dict(A=A), dict(h=torch.ones(2)), dict(G=A, h=none)):
            with pytest.raises(ParameterError, match="without"):
                QPForm(torch.eye(4), q, **broken)
        with pytest.raises(ParameterError, match="must be a torch tensor"):
            QPForm(torch.eye(4), q.numpy())
        with pytest.raises(ParameterError, match="`Q` is a sparse tensor"):
            QPForm(torch.eye(4).to_sparse(), q)  # (a dense one of this shape has passed the checks)


def test_with_tensors_is_the_same_form():
    form = QPForm(**working())
    twin = form.with_tensors({name: 2 * tensor for name, tensor in form.tensors().items()})
    x = torch.randn(2, 4)
    assert torch.allclose(twin.objective(x), 2 * form.objective(x))
    assert torch.allclose(twin.inequalities(x), 2 * form.inequalities(x))
    assert (twin.n, twin.p, twin.m, twin.batch_shape) == (form.n, form.p, form.m, form.batch_shape)
    assert not any(
        t.requires_grad for t in QPForm(**working(q=torch.zeros(4).requires_grad_())).detach().tensors().values()
    )


def test_only_the_symmetric_part_of_Q_is_meant():
    Q = torch.tensor([[2.0, 1.0], [0.0, 2.0]], requires_grad=True)
    form = QPForm(Q, torch.zeros(2))
    assert torch.equal(form.Q.dense(), torch.tensor([[2.0, 0.5], [0.5, 2.0]]))
    assert torch.equal(QPForm(diffopt.Dense(Q), torch.zeros(2)).Q.dense(), form.Q.dense())
    form.objective(torch.tensor([1.0, 3.0])).backward()
    assert torch.equal(Q.grad, Q.grad.mT)
