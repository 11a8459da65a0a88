import torch

from diffopt.cones import NonnegativeCone, ProductCone, kinds

CONES = [NonnegativeCone(4), ProductCone(NonnegativeCone(1), NonnegativeCone(3))]


def test_laws():
    for cone in CONES:
        inside, outside = torch.tensor([0.0, 1, 2, 0]), torch.tensor([0.0, 1, -2, 0])
        assert cone.dim == 4
        assert cone.violation(inside).max() == 0
        assert torch.equal(cone.violation(outside), torch.tensor([0.0, 0, 2, 0]))
        assert cone.product(inside, torch.tensor([3.0, 0, 0, 5])).abs().max() == 0
        assert cone.product(inside, torch.tensor([3.0, 0, 1, 5])).abs().max() == 2
        assert torch.equal(cone.product(cone.identity(inside), outside), outside)
        assert kinds(cone) == {"NonnegativeCone"}
        assert "NonnegativeCone" in repr(cone)
