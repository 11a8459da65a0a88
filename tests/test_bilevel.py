"""Optimisation through optimisation: an inner loop that is differentiated, hyper-parameters learned through a solution.

Against closed forms written out here; the primary backend with both executors, in float64 (a hyper-gradient is a
second derivative or nearly one: in float32 there is nothing to compare to the digits of interest).
"""

import pytest
import scipy.optimize
import torch
from torch import Tensor, nn

import diffopt
from tolerances import DIFFERENCES, EXACT_ALGEBRA, GRADIENT

F64 = torch.float64


@pytest.fixture(params=["torch", "cpu"])
def settings(request: pytest.FixtureRequest) -> diffopt.Settings:
    """Each executor, insisted on."""
    return diffopt.Settings(executor=request.param)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# ------------------------------------------------------------------------------ MAML: gradients of gradient steps


N, TASKS, STEPS = 4, 3, 3


def simplex(settings: diffopt.Settings) -> diffopt.Layer:
    """The program whose learned q the inner loop adapts: minimise x'Qx/2 + q'x subject to sum x = 1, x >= 0."""
    root = random(N, N, seed=0)
    structure = diffopt.QPStructure(
        N,
        Q=diffopt.learned(root @ root.mT + torch.eye(N, dtype=F64)),
        q=diffopt.learned(torch.tensor([-1.0, 0.5, -2.0, 4.0], dtype=F64)),
        A=torch.ones(1, N, dtype=F64),
        b=1.0,
        lower=0.0,
    )
    return diffopt.Layer(structure, settings=settings)


def adapted(layer: diffopt.Layer, first: dict[str, Tensor], rate: Tensor, targets: Tensor) -> list[Tensor]:
    """Take gradient steps on |x - target|^2 / 2 for every task at once, and return x before each and after the last."""
    parameters = {name: p.expand(TASKS, *p.shape) for name, p in first.items()}
    points = [torch.func.functional_call(layer, parameters)]
    for _ in range(STEPS):
        loss = (points[-1] - targets).square().sum() / 2
        slopes = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
        parameters = {name: p - rate * slope for (name, p), slope in zip(parameters.items(), slopes, strict=True)}
        points.append(torch.func.functional_call(layer, parameters))
    return points


def test_the_gradient_of_an_inner_loop_is_that_of_its_closed_form(settings: diffopt.Settings) -> None:
    layer = simplex(settings)
    q, Q = layer.get_parameter("q").detach().requires_grad_(), layer.get_parameter("Q").detach()
    rate = torch.tensor(0.5, dtype=F64, requires_grad=True)
    targets, wanted = random(TASKS, N, seed=1), random(TASKS, N, seed=2)
    points = adapted(layer, {"q": q}, rate, targets)
    found = torch.autograd.grad((points[-1] - wanted).square().sum() / 2, [q, rate])

    # While the active set stays, x = c - P q, with P from the conditions of the free variables:
    free = points[0][0] > 1e-3
    assert 1 < int(free.sum()) < N and all(torch.equal(x > 1e-3, free.expand(TASKS, N)) for x in points)
    count = int(free.sum())
    K = torch.ones(count + 1, count + 1, dtype=F64)
    K[:count, :count], K[-1, -1] = Q[free][:, free], 0
    P = torch.zeros(N, N, dtype=F64)
    P[free.unsqueeze(-1) & free] = torch.linalg.inv(K)[:count, :count].flatten()
    # A step is q + rate P (x - target), so dq' = (I - rate P^2) dq + P (x - target) drate.
    M = torch.eye(N, dtype=F64) - rate.detach() * P @ P
    backward = -(points[-1].detach() - wanted) @ P
    expected_rate = torch.zeros((), dtype=F64)
    for x in points[-2::-1]:
        expected_rate = expected_rate + (backward * ((x.detach() - targets) @ P)).sum()
        backward = backward @ M
    assert torch.allclose(found[0], backward.sum(0), rtol=0, atol=EXACT_ALGEBRA)
    assert torch.allclose(found[1], expected_rate, rtol=0, atol=EXACT_ALGEBRA)
    assert found[0].abs().max() > 1e-2 and found[1].abs() > 1e-2


def test_an_inner_loop_may_adapt_the_matrix(settings: diffopt.Settings) -> None:
    """There a step is not affine: against central differences along one direction."""
    layer = simplex(settings)
    targets, wanted = random(TASKS, N, seed=1), random(TASKS, N, seed=2)
    rate = torch.tensor(0.5, dtype=F64)
    first = {name: p.detach() for name, p in layer.named_parameters()}
    root = random(N, N, seed=3)
    directions = {"Q": root + root.mT, "q": random(N, seed=4)}

    def outer(t: Tensor) -> Tensor:
        moved = {name: p + t * directions[name] for name, p in first.items()}
        return (adapted(layer, moved, rate, targets)[-1] - wanted).square().sum() / 2

    t = torch.zeros((), dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(outer(t), t)
    step = 1e-5
    sides = [float(outer(torch.tensor(s, dtype=F64, requires_grad=True)).detach()) for s in (step, -step)]
    difference = (sides[0] - sides[1]) / (2 * step)
    assert abs(difference) > 1e-2 and abs(float(slope) - difference) <= DIFFERENCES * (1 + abs(difference))


# ------------------------------------------------------------------------------ ridge regression


class Ridge(diffopt.QuadraticProgram):
    """minimise |Xw - y|^2 / 2 + penalty |w|^2 / 2, with the logarithm of the penalty learned."""

    def form(self, X: Tensor, y: Tensor, log_penalty: Tensor) -> diffopt.QPForm:
        return diffopt.QPForm(X.mT @ X + log_penalty.exp() * torch.eye(X.shape[-1], dtype=X.dtype), -(y @ X))


def regression() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training and validation data, few enough of the former for a penalty to help."""
    weights = random(6, seed=5)
    X, X_val = random(10, 6, seed=6), random(30, 6, seed=7)
    return X, X @ weights + 2 * random(10, seed=8), X_val, X_val @ weights


def ridge_loss(log_penalty: Tensor) -> tuple[Tensor, Tensor]:
    """Return the validation loss and its derivative in log_penalty, in closed form."""
    X, y, X_val, y_val = regression()
    H = X.mT @ X + log_penalty.exp() * torch.eye(6, dtype=F64)
    w = torch.linalg.solve(H, X.mT @ y)
    residual = X_val @ w - y_val
    # (X'X + c I) w = X'y, so dw/dc = -H^-1 w; and dc/dlog c = c.
    return residual.square().sum() / 2, -log_penalty.exp() * (residual @ X_val @ torch.linalg.solve(H, w))


@pytest.mark.parametrize("log_penalty", [-3.0, 0.0, 2.0])
def test_the_hypergradient_of_ridge_regression(settings: diffopt.Settings, log_penalty: float) -> None:
    X, y, X_val, y_val = regression()
    layer = diffopt.Layer(Ridge(log_penalty=diffopt.learned(torch.tensor(log_penalty, dtype=F64))), settings=settings)
    loss = (X_val @ layer(X=X, y=y) - y_val).square().sum() / 2
    loss.backward()
    value, slope = ridge_loss(torch.tensor(log_penalty, dtype=F64))
    found = layer.get_parameter("log_penalty").grad
    assert found is not None and slope.abs() > 1e-2
    assert torch.allclose(loss.detach(), value, rtol=EXACT_ALGEBRA)
    assert torch.allclose(found, slope, rtol=EXACT_ALGEBRA)


def test_the_penalty_of_a_ridge_regression_is_learned(settings: diffopt.Settings) -> None:
    X, y, X_val, y_val = regression()
    layer = diffopt.Layer(Ridge(log_penalty=diffopt.learned(torch.tensor(-3.0, dtype=F64))), settings=settings)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=30, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (X_val @ layer(X=X, y=y) - y_val).square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    best = scipy.optimize.minimize_scalar(
        lambda t: float(ridge_loss(torch.tensor(t, dtype=F64))[0]), bounds=(-5, 8), method="bounded"
    )
    assert -4 < best.x < 7
    found = layer.get_parameter("log_penalty").detach()
    assert float(found) == pytest.approx(best.x, abs=1e-4)  # (what a search by values alone can know)
    # A line search ends where losses, about 40 and known to 1e-14, no longer differ: at slopes of about sqrt(1e-14).
    assert ridge_loss(found)[1].abs() < 1e-6


# ------------------------------------------------------------------------------ support vector machine


class SupportVectors(diffopt.QuadraticProgram):
    """The dual: minimise a'(yy' * K)a/2 - sum a subject to y'a = 0, 0 <= a <= C, K_ij = exp(-gamma |X_i - X_j|^2).

    The multiplier of y'a = 0 is the offset of the decision function.
    """

    def form(self, X: Tensor, y: Tensor, log_C: Tensor, log_gamma: Tensor) -> diffopt.QPForm:
        signs = torch.outer(y, y)
        return diffopt.QPForm(
            signs * kernel(X, X, log_gamma), -torch.ones_like(y), A=y.unsqueeze(0), b=0.0, lower=0.0, upper=log_C.exp()
        )


def kernel(X: Tensor, Z: Tensor, log_gamma: Tensor) -> Tensor:
    return (-log_gamma.exp() * (X.unsqueeze(1) - Z).square().sum(-1)).exp()


class Classifier(nn.Module):
    def __init__(self, settings: diffopt.Settings, log_C: float = 0.0, log_gamma: float = -0.5) -> None:
        super().__init__()
        problem = SupportVectors(
            log_C=diffopt.learned(torch.tensor(log_C, dtype=F64)),
            log_gamma=diffopt.learned(torch.tensor(log_gamma, dtype=F64)),
        )
        self.program = diffopt.Layer(problem, settings=settings)

    def forward(self, X: Tensor, y: Tensor, Z: Tensor) -> tuple[Tensor, diffopt.Solution]:
        """Return the decision values at Z of the machine trained on X and y, and its solution."""
        solution = self.program.solve(X=X, y=y)
        log_gamma = self.program.get_parameter("log_gamma")
        return kernel(Z, X, log_gamma) @ (solution.x * y) + solution.nu, solution


def points(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return points of two classes that overlap."""
    y = torch.ones(count, dtype=F64)
    y[::2] = -1
    return random(count, 2, seed=seed) + 0.7 * y.unsqueeze(-1), y


def validation_loss(decision: Tensor, y: Tensor) -> Tensor:
    return nn.functional.softplus(-2 * y * decision).mean()


def test_the_hypergradients_of_a_support_vector_machine(settings: diffopt.Settings) -> None:
    (X, y), (Z, y_val) = points(16, seed=9), points(40, seed=10)
    model = Classifier(settings)
    decision, solution = model(X, y, Z)
    loss = validation_loss(decision, y_val)
    loss.backward()
    found = {name.removeprefix("program."): p.grad for name, p in model.named_parameters()}

    # Of C: the free a_F and the offset obey (K_FF * yy') a_F + y_F offset = 1 - C (K_FB * yy') 1, y_F'a_F = -C y_B'1.
    C, a = torch.ones((), dtype=F64), solution.x.detach()
    free, held = (a > 1e-6) & (a < C - 1e-6), a >= C - 1e-6
    assert free.sum() >= 3 and held.sum() >= 3 and solution.weakly_active == 0
    K = kernel(X, X, torch.tensor(-0.5, dtype=F64)) * torch.outer(y, y)
    count = int(free.sum())
    system = torch.zeros(count + 1, count + 1, dtype=F64)
    system[:count, :count], system[:count, -1], system[-1, :count] = K[free][:, free], y[free], y[free]
    right = -torch.cat([K[free][:, held].sum(-1), y[held].sum().unsqueeze(0)])
    moved = torch.linalg.solve(system, right)
    da, d_offset = held.double(), moved[-1]
    da[free] = moved[:-1]
    d_decision = kernel(Z, X, torch.tensor(-0.5, dtype=F64)) @ (da * y) + d_offset
    slope = torch.autograd.grad(validation_loss(leaf := decision.detach().requires_grad_(), y_val), leaf)[0]
    expected = float(C * (slope * d_decision).sum())
    assert found["log_C"] is not None and float(found["log_C"]) == pytest.approx(expected, rel=GRADIENT[F64])
    assert abs(expected) > 1e-3

    # Of both: central differences.
    step = 1e-5
    for name in ("log_C", "log_gamma"):
        sides = []
        for sign in (1, -1):
            other = Classifier(settings)
            with torch.no_grad():
                other.program.get_parameter(name).add_(sign * step)
                sides.append(float(validation_loss(other(X, y, Z)[0], y_val)))
        difference = (sides[0] - sides[1]) / (2 * step)
        gradient = found[name]
        assert gradient is not None and float(gradient) == pytest.approx(difference, abs=DIFFERENCES)
        assert abs(difference) > 1e-3


def test_the_hyperparameters_of_a_support_vector_machine_are_learned(settings: diffopt.Settings) -> None:
    (X, y), (Z, y_val) = points(16, seed=9), points(40, seed=10)
    model = Classifier(settings, log_gamma=1.0)  # so narrow that it learns the points by heart
    optimizer = torch.optim.Adam(model.parameters(), 0.2)
    losses = []
    for _ in range(20):
        loss = validation_loss(model(X, y, Z)[0], y_val)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.75 * losses[0], losses
