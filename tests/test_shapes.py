import pytest
import torch

from diffopt.errors import DeviceError, DtypeError, ShapeError
from diffopt.shapes import broadcast_batch, check_same_kind, matvec, max_abs, rmatvec


def test_products_broadcast_shared_and_batched():
    A, B = torch.randn(3, 5), torch.randn(2, 3, 5)
    x, y = torch.randn(2, 5), torch.randn(2, 3)
    for M in (A, B):
        full = M.expand(2, 3, 5)
        assert torch.allclose(matvec(M, x), torch.einsum("bij,bj->bi", full, x))
        assert torch.allclose(rmatvec(M, y), torch.einsum("bij,bi->bj", full, y))
    assert matvec(A[:0], x).shape == (2, 0)
    assert torch.equal(max_abs(x[..., :0]), torch.zeros(2))


def test_broadcast_names_both_tensors():
    assert broadcast_batch({"Q": (3, 1), "q": (4,)}) == (3, 4)
    with pytest.raises(ShapeError, match=r"`b`, \(3,\).*\(2,\).*`Q`"):
        broadcast_batch({"Q": (2,), "b": (3,)})


def test_mixed_kinds_are_named():
    with pytest.raises(DtypeError, match=r"`q` has dtype torch.float32 but `Q` has torch.float64"):
        check_same_kind({"Q": torch.zeros(2, dtype=torch.float64), "q": torch.zeros(2)})
    with pytest.raises(DtypeError, match=r"`Q` has dtype torch.int64.*Q.double\(\)"):
        check_same_kind({"Q": torch.zeros(2, dtype=torch.int64)})
    with pytest.raises(DeviceError, match=r"`q` is on meta but `Q` is on cpu"):
        check_same_kind({"Q": torch.zeros(2), "q": torch.zeros(2, device="meta")})
