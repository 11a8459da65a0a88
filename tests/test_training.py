"""A layer inside a training step: accumulated and clipped gradients, anomaly mode, checkpoints, failures in a batch.

With both executors, and both dtypes.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import diffopt
import measures
from tolerances import GRADIENT

N, FEATURES = 4, 3
FEASIBLE = [True, False, True, True, False, True]


class Net(nn.Module):
    """A linear map, then a program with a learned Hessian and a learned row."""

    def __init__(self, executor: str, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        root = random(N, N)
        structure = diffopt.QPStructure(
            N,
            Q=diffopt.learned(root @ root.mT + torch.eye(N, dtype=dtype)),
            q=diffopt.given(),
            G=diffopt.learned(random(1, N).abs()),
            h=diffopt.learned(torch.full((1,), 0.5, dtype=dtype)),
            lower=diffopt.given(),
            upper=10.0,
        )
        self.costs = nn.Linear(FEATURES, N, dtype=dtype)
        with torch.no_grad():
            self.costs.weight.copy_(random(N, FEATURES))
            self.costs.bias.copy_(random(N) - 1)
        self.program = diffopt.Layer(structure, settings=diffopt.Settings(executor=executor), on_failure="return")

    def forward(self, features: Tensor, lower: Tensor) -> diffopt.Solution:
        return self.program.solve(q=self.costs(features), lower=lower)

    def gradients(self) -> dict[str, Tensor]:
        """Take the gradients that have arrived, by name."""
        found = {name: p.grad for name, p in self.named_parameters() if p.grad is not None}
        self.zero_grad()
        assert len(found) == 5 and all(g.abs().max() > 1e-3 for g in found.values())
        return found


@pytest.fixture(params=["torch", "auto"])
def net(request: pytest.FixtureRequest, dtype: torch.dtype) -> Net:
    """A model on each executor ("auto": compiled code, and torch operations where that leaves something)."""
    return Net(request.param, dtype)


def batch(net: Net, feasible: list[bool] | None = None) -> tuple[Tensor, Tensor]:
    """Return features, and lower bounds that leave room for an instance or do not."""
    generator = torch.Generator().manual_seed(4)
    dtype = net.costs.weight.dtype
    features = torch.randn(6, FEATURES, generator=generator, dtype=torch.float64).to(dtype)
    lower = torch.full((6, N), -0.3, dtype=dtype)
    if feasible is not None:
        lower[~torch.tensor(feasible)] = 11.0
    return features, lower


def losses(x: Tensor) -> Tensor:
    """Return the loss of each instance."""
    return (x - torch.linspace(-1, 1, N, dtype=x.dtype)).square().sum(-1)


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert measures.relative(gradient, expected[name]) <= GRADIENT[gradient.dtype], name


def test_gradients_accumulate_over_parts_of_a_batch(net: Net) -> None:
    features, lower = batch(net)
    solution = net(features, lower)
    assert (solution.lam > 0).any() and (solution.lam_lower > 0).any()  # here, and so below, rows and bounds are active
    losses(solution.x).mean().backward()
    whole = net.gradients()
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        (losses(net(features[part], lower[part]).x).sum() / len(features)).backward()
    assert_near(net.gradients(), whole)


def test_gradients_are_clipped(net: Net) -> None:
    losses(net(*batch(net)).x).sum().backward()
    expected = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    norm = nn.utils.clip_grad_norm_(net.parameters(), 0.1, error_if_nonfinite=True)
    clipped = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    assert torch.allclose(norm, expected.norm()) and norm > 0.1
    assert torch.allclose(clipped, 0.1 * expected / expected.norm(), atol=1e-6)


# ------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpoints_change_no_bit(net: Net, use_reentrant: bool) -> None:
    features, lower = batch(net)
    features.requires_grad_()

    def x(features: Tensor) -> Tensor:
        return net(features, lower).x

    losses(x(features)).sum().backward()
    plain, into = net.gradients(), features.grad
    features.grad = None
    losses(checkpoint(x, features, use_reentrant=use_reentrant)).sum().backward()
    again = net.gradients()
    assert all(torch.equal(again[name], plain[name]) for name in plain)
    assert features.grad is not None and into is not None and torch.equal(features.grad, into)


def test_second_derivatives_pass_a_checkpoint(net: Net) -> None:
    features, lower = batch(net)
    features.requires_grad_()

    def curvature(run: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        (slope,) = torch.autograd.grad(losses(run(features)).sum(), features, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), [*net.parameters()][:2])

    def x(features: Tensor) -> Tensor:
        return net(features, lower).x

    for plain, again in zip(curvature(x), curvature(lambda v: checkpoint(x, v, use_reentrant=False)), strict=True):
        assert torch.equal(plain, again) and plain.abs().max() > 1e-3


# ------------------------------------------------------------------------------ failures in a batch


@pytest.mark.parametrize("output", ["x", "value"])
def test_a_loss_that_masks_failures_learns_from_the_others(net: Net, output: str) -> None:
    features, lower = batch(net, FEASIBLE)
    features.requires_grad_()
    solution = net(features, lower)
    assert solution.ok.tolist() == FEASIBLE

    def total(solution: diffopt.Solution, kept: Tensor) -> Tensor:
        return (losses(solution.x[kept]) if output == "x" else solution.value[kept].square()).sum()

    total(solution, solution.ok).backward()
    found = net.gradients()
    assert all(bool(g.isfinite().all()) for g in found.values())
    assert features.grad is not None and not features.grad[~solution.ok].any()

    alone = net(features[solution.ok].detach(), lower[solution.ok])
    assert bool(alone.ok.all())
    total(alone, alone.ok).backward()
    assert_near(found, net.gradients())


def test_a_batch_of_which_nothing_is_left_gives_zero(net: Net) -> None:
    solution = net(*batch(net, [False] * 6))
    assert not solution.ok.any()
    kept = losses(solution.x[solution.ok])
    (kept.sum() / max(len(kept), 1)).backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and not p.grad.any(), name


def test_anomaly_mode_passes_masked_failures_and_stops_at_others(net: Net) -> None:
    with torch.autograd.set_detect_anomaly(True):
        solution = net(*batch(net, FEASIBLE))
        losses(solution.x[solution.ok]).sum().backward(retain_graph=True)
        net.gradients()
        with (
            pytest.warns(UserWarning, match="(detected in|induced by) (Solve|_Pulled)Backward"),
            pytest.raises(RuntimeError, match="returned nan values"),
        ):
            solution.x.sum().backward()


def test_a_model_learns_while_instances_fail(net: Net) -> None:
    features, lower = batch(net, FEASIBLE)
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    seen = []
    for _ in range(15):
        solution = net(features, lower)
        loss = losses(solution.x[solution.ok]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(float(loss.detach()))
    assert solution.ok.tolist() == FEASIBLE and seen[-1] < 0.7 * seen[0], seen
