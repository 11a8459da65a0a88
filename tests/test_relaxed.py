"""Relaxed gradients: exact solutions with the derivatives of a smooth problem nearby."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import optimize
from torch import Tensor

import diffopt
import measures
from diffopt import Elastic, Settings, Status
from diffopt.check import known
from diffopt.solvers import central_path
from diffopt.solvers.executor import Data
from problems_catalogue import Softmax
from tolerances import DIFFERENCES, EXACT_ALGEBRA, SOLUTION

FLOAT64 = torch.float64
OUTPUTS = ("x", "s", "nu", "lam", "lam_lower", "lam_upper")
Values = dict[str, Tensor]


def tensor(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=FLOAT64)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def problem(name: str) -> Values:
    """Return one instance as tensors; what is absent is left out."""
    if name == "linear":
        found = known.linear_program(5, 5, 1, 4, bounds="both")
    else:
        found = known.quadratic_program(6, 5, 2, 4, bounds="mixed", condition=10.0)
    data = {k: v.clone() for k, v in found.arguments().items() if v is not None}
    data.setdefault("Q", torch.zeros(5, 5, dtype=FLOAT64))
    if name == "infinite sides":
        data["h"][1] = torch.inf
    if name == "fixed variable":
        data["lower"] = data["lower"].clamp_min(-3)
        data["lower"][1] = data["upper"][1] = found.x[1]
    return data


def central_point(data: Values, kappa: float, start: np.ndarray) -> np.ndarray:
    """Return (x, nu) with Qx + q + A'nu + sum of forces = 0, Ax = b, by root finding; each force is kappa / slack.

    A variable with lower = upper is eliminated: its x is given, and it has no equation.
    """
    d = {k: v.detach().numpy() for k, v in data.items()}
    n, p = len(d["q"]), len(d["b"])
    low, high = d["lower"], d["upper"]
    fixed = low == high

    def conditions(w: np.ndarray) -> np.ndarray:
        x, nu = w[:n], w[n:]
        forces = d["G"].T @ (kappa / (d["h"] - d["G"] @ x))
        with np.errstate(divide="ignore", invalid="ignore"):
            walls = np.where(fixed, 0, -kappa / (x - low) + kappa / (high - x))
        slope = 0.5 * (d["Q"] + d["Q"].T) @ x + d["q"] + d["A"].T @ nu + forces + walls
        return np.concatenate([np.where(fixed, x - low, slope), d["A"] @ x - d["b"]])

    found = optimize.root(conditions, start, method="hybr", options={"xtol": 1e-14})
    assert np.abs(conditions(found.x)).max() <= 1e-11
    x = found.x[:n]
    assert (d["h"] - d["G"] @ x > 0).all() and ((x > low) & (x < high) | fixed).all()
    assert len(found.x) == n + p
    return found.x


def reference(data: Values, kappa: float, start: np.ndarray) -> Tensor:
    """Return all outputs at the central point, as one vector."""
    w = central_point(data, kappa, start)
    n = len(data["q"])
    x, nu = torch.from_numpy(w[:n]), torch.from_numpy(w[n:])
    s = data["h"] - data["G"] @ x
    fixed = data["lower"] == data["upper"]
    finite = torch.where(s.isinf(), 0.0, s)
    low = torch.where(fixed, 0.0, kappa / (x - data["lower"]))
    high = torch.where(fixed, 0.0, kappa / (data["upper"] - x))
    # A fixed variable's force, lam_upper - lam_lower, is what stationarity leaves for it.
    Q, A, G = 0.5 * (data["Q"] + data["Q"].mT), data["A"], data["G"]
    high = torch.where(fixed, -(Q @ x + data["q"] + A.mT @ nu + G.mT @ (kappa / s)), high)
    return torch.cat([x, finite, nu, kappa / s, low, high])


def start_of(data: Values, kappa: float) -> np.ndarray:
    Q = diffopt.Dense(data["Q"])
    rest = (data[k] for k in ("q", "A", "b", "G", "h", "lower", "upper"))
    point = central_path.solve(Data(Q, *rest, torch.Size()), kappa)
    assert float(point.residual) <= 1e-12
    return torch.cat([point.x, point.nu]).numpy()


def outputs(solution: diffopt.Solution) -> Tensor:
    return torch.cat([getattr(solution, name).flatten() for name in OUTPUTS])


@pytest.mark.parametrize("kappa", [1.0, 1e-2])
@pytest.mark.parametrize("name", ["ordinary", "linear", "infinite sides", "fixed variable"])
def test_the_gradient_is_that_of_the_central_path(name: str, kappa: float) -> None:
    data = problem(name)
    start = start_of(data, kappa)
    leaves = measures.tracked(data)
    solution = diffopt.solve_qp(**leaves, settings=Settings(relaxation=kappa))
    y = outputs(solution)
    weights = random(y.numel(), seed=1)
    if name == "infinite sides":
        weights[5 + 1] = 0.0  # the slack of a row that is not there
    finite = torch.where(y.isfinite(), y, 0.0)
    if name == "fixed variable":
        weights[-10 + 1] = -weights[-5 + 1]  # (how its force is divided is a convention)
    gradient = dict(zip(leaves, torch.autograd.grad((weights * finite).sum(), list(leaves.values())), strict=True))
    t = 1e-6 if kappa < 0.1 else 6e-6
    for i, (piece, value) in enumerate(data.items()):
        move = random(*value.shape, seed=10 + i)
        if name == "fixed variable" and piece in ("lower", "upper"):
            move[1] = 0.0
        high, low = (
            reference(data | {piece: torch.where(value.isfinite(), value + sign * t * move, value)}, kappa, start)
            for sign in (1, -1)
        )
        numeric = float((weights * (high - low)).sum()) / (2 * t)
        exact = float((gradient[piece] * move).sum())
        assert abs(exact - numeric) <= DIFFERENCES * (1 + abs(numeric)), (piece, exact, numeric)
        assert abs(numeric) > 1e-3 or piece in ("lower", "upper"), piece  # it does not vanish
    assert solution.gradient == f"central_path({kappa:g})" and solution.gradient_residual is not None
    assert float(solution.gradient_residual) <= 1e-12


def test_a_fixed_variable_moves_with_its_bounds() -> None:
    data = problem("fixed variable")
    leaves = measures.tracked(data)
    solution = diffopt.solve_qp(**leaves, settings=Settings(relaxation=0.1))
    lower, upper = torch.autograd.grad(solution.x[1], [leaves["lower"], leaves["upper"]])
    assert lower.tolist() == pytest.approx([0, 0.5, 0, 0, 0]) and upper.tolist() == pytest.approx([0, 0.5, 0, 0, 0])


@pytest.mark.parametrize("name", ["ordinary", "linear"])
def test_the_gradient_is_that_with_a_ridge(name: str) -> None:
    data, ridge = problem(name), 0.3
    leaves = measures.tracked(data)
    solution = diffopt.solve_qp(**leaves, settings=Settings(relaxation=ridge, relaxation_mode="ridge"))
    y = outputs(solution)
    weights = random(y.numel(), seed=1)
    gradient = torch.autograd.grad((weights * y).sum(), list(leaves.values()))
    t = 6e-6
    for i, ((piece, value), g) in enumerate(zip(data.items(), gradient, strict=True)):
        move = random(*value.shape, seed=10 + i)

        def at(sign: float, piece: str = piece, value: Tensor = value, move: Tensor = move) -> Tensor:
            moved = data | {piece: torch.where(value.isfinite(), value + sign * t * move, value)}
            moved["Q"] = moved["Q"] + ridge * torch.eye(5, dtype=FLOAT64)
            return outputs(diffopt.solve_qp(**moved, backend="cvxpy", settings=Settings(tolerance=1e-8)))

        numeric = float((weights * (at(1) - at(-1))).sum()) / (2 * t)
        assert abs(float((g * move).sum()) - numeric) <= DIFFERENCES * (1 + abs(numeric)), piece
    assert solution.gradient == "ridge(0.3)" and float(solution.gradient_residual) <= 1e-9  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["central_path", "ridge"])
def test_the_solution_itself_is_exact(mode: Any) -> None:
    arguments = known.linear_program(7, 6, 1, 4, bounds="both", batch=(3,)).arguments()
    leaves = measures.tracked(arguments)
    settings = Settings(relaxation=0.1, relaxation_mode=mode)
    plain, relaxed = diffopt.solve_qp(**leaves), diffopt.solve_qp(**leaves, settings=settings)
    for name in measures.OUTPUTS:
        assert torch.equal(getattr(plain, name), getattr(relaxed, name)), name
    q = leaves["q"]
    exact, near = (torch.autograd.grad((random(3, 6, seed=0) * s.x).sum(), q)[0] for s in (plain, relaxed))
    assert float(exact.abs().max()) <= EXACT_ALGEBRA
    assert mode == "ridge" or bool((near.abs().amax(-1) > 1e-3).all())
    # The value has a derivative that is exact, and not zero.
    assert measures.relative(torch.autograd.grad(relaxed.value.sum(), q)[0], plain.x.detach()) <= EXACT_ALGEBRA
    assert plain.gradient == "exact" and plain.gradient_residual is None
    with torch.no_grad():
        without = diffopt.solve_qp(**leaves, settings=settings)
    assert without.gradient == "exact" and not without.x.requires_grad  # nothing was relaxed


def test_small_relaxations_approach_the_exact_gradient() -> None:
    data = known.quadratic_program(8, 5, 1, 4, bounds="both", batch=(2,), condition=10.0).arguments()
    errors = []
    for relaxation in (None, 1e-2, 1e-4, 1e-6):
        leaves = measures.tracked(data)
        solution = diffopt.solve_qp(**leaves, settings=Settings(relaxation=relaxation))
        (random(2, 5, seed=0) * solution.x).sum().backward()
        gradient = torch.cat([v.grad.flatten() for v in leaves.values()])
        errors.append(gradient if relaxation is None else float((gradient - errors[0]).abs().max()))
    assert errors[3] < 0.1 * errors[2] < 0.01 * errors[1] < 0.1


def test_a_decision_is_learned_through_a_linear_program() -> None:
    # The cheapest of three; the costs are moved until it is the third. The exact gradient is zero, and moves nothing.
    structure = diffopt.QPStructure(
        3, Q=None, q=diffopt.learned(tensor(1.0, 2.0, 3.0)), A=torch.ones(1, 3, dtype=FLOAT64), b=1.0, lower=0.0
    )
    ends = []
    for relaxation in (None, 0.3):
        layer = diffopt.Layer(structure, settings=Settings(relaxation=relaxation))
        optimizer = torch.optim.SGD(layer.parameters(), 1.0)
        for _ in range(20):
            optimizer.zero_grad()
            (layer() - tensor(0.0, 0.0, 1.0)).square().sum().backward()
            optimizer.step()
        ends.append(layer().tolist())
    assert ends[0] == pytest.approx([1, 0, 0]) and ends[1] == pytest.approx([0, 0, 1])


@pytest.mark.parametrize("mode", ["central_path", "ridge"])
@pytest.mark.parametrize("form", ["dense", "diagonal", "low rank"])
def test_structures_and_shared_data(form: str, mode: Any) -> None:
    """In a batch with shared data the gradient is the sum over a loop, with dense data the same."""
    d, U, q = 1 + random(4, seed=0).abs(), random(4, 2, seed=1), random(3, 4, seed=2)
    settings = Settings(relaxation=0.05, relaxation_mode=mode)

    def solve(d: Tensor, U: Tensor, q: Tensor, form: str) -> Tensor:
        dense = torch.diag(d) + (U @ U.mT if form == "low rank" else 0.0)
        given = {
            "dense": dense, "diagonal": diffopt.Diagonal(d), "low rank": diffopt.DiagonalPlusLowRank(d, U)
        }[form]  # fmt: skip
        Q: Any = given if q.dim() > 1 else dense
        G = torch.ones(1, 4, dtype=FLOAT64)
        return diffopt.solve_qp(Q, q, G=G, h=0.1, lower=-1.0, upper=1.0, settings=settings).x

    leaves = [v.requires_grad_() for v in (d, U, q)]
    weights = random(3, 4, seed=3)
    whole = torch.autograd.grad((weights * solve(*leaves, form)).sum(), leaves, allow_unused=True)
    loop = torch.autograd.grad(
        torch.stack([(weights[i] * solve(d, U, q[i], form)).sum() for i in range(3)]).sum(), leaves, allow_unused=True
    )
    for a, b in zip(whole, loop, strict=True):
        assert (a is None and b is None) or measures.relative(a, b) <= EXACT_ALGEBRA


@pytest.mark.parametrize("mode", ["central_path", "ridge"])
def test_other_modes_of_differentiation(mode: Any) -> None:
    data = problem("ordinary")
    settings = Settings(relaxation=0.05, relaxation_mode=mode)

    def x(q: Tensor, h: Tensor) -> Tensor:
        return diffopt.solve_qp(**data | {"q": q, "h": h}, settings=settings).x

    values = (data["q"], data["h"])
    forward, reverse = torch.func.jacfwd(x, (0, 1))(*values), torch.func.jacrev(x, (0, 1))(*values)
    for a, b in zip(forward, reverse, strict=True):
        assert measures.relative(a, b) <= EXACT_ALGEBRA

    # Second derivatives are those of the relaxed problem too: the gradient of its gradient.
    def slope(G: Tensor, create_graph: bool) -> Tensor:
        solution = diffopt.solve_qp(**data | {"G": G}, settings=settings)
        total = (tensor(1.0, -2.0, 3.0, 0.5, 1.0) * solution.x).sum() + solution.lam.sum()
        return torch.autograd.grad(total, G, create_graph=create_graph)[0]

    G, move, t = data["G"].clone().requires_grad_(), random(4, 5, seed=4), 6e-6
    (second,) = torch.autograd.grad((slope(G, True) * move).sum(), G)
    high, low = (slope((data["G"] + sign * t * move).requires_grad_(), False) for sign in (1, -1))
    numeric = (high - low) / (2 * t)
    assert measures.relative(second, numeric) <= DIFFERENCES
    assert float(numeric.abs().max()) > 1e-2


@pytest.mark.parametrize("mode", ["central_path", "ridge"])
def test_float32(mode: Any) -> None:
    data = {k: v.float() for k, v in problem("linear").items()}
    found = []
    for values in (data, {k: v.double() for k, v in data.items()}):
        leaves = measures.tracked(values)
        solution = diffopt.solve_qp(**leaves, settings=Settings(relaxation=0.05, relaxation_mode=mode))
        assert solution.x.dtype == values["q"].dtype
        outputs(solution).square().sum().backward()
        found.append({k: v.grad for k, v in leaves.items()})
    for name, gradient in found[0].items():
        assert gradient is not None and gradient.dtype == torch.float32
        assert measures.relative(gradient, found[1][name]) <= 10 * SOLUTION[torch.float32], name


@pytest.mark.parametrize("mode", ["central_path", "ridge"])
def test_failed_instances_pass_nan_where_asked(mode: Any) -> None:
    data = known.quadratic_program(9, 4, 1, 3, bounds="both", batch=(3,), condition=10.0).arguments()
    data = {k: v.clone() for k, v in data.items() if v is not None}
    data["lower"][1, 0] = data["upper"][1, 0] + 1
    leaves = measures.tracked(data)
    settings = Settings(relaxation=0.1, relaxation_mode=mode)
    solution = diffopt.solve_qp(**leaves, settings=settings, on_failure="return")
    assert solution.ok.tolist() == [True, False, True] and bool(solution.x[1].isnan().all())
    tensors = list(leaves.values())
    masked = torch.autograd.grad(outputs_of(solution, solution.ok), tensors, retain_graph=True)
    assert all(bool(g.isfinite().all()) and not g[1].any() for g in masked)
    assert all(bool(g[0].any() and g[2].any()) for g in masked[:-1])  # (no upper bound is active)
    unmasked = torch.autograd.grad(solution.x.sum(), tensors)
    assert all(bool(g[[0, 2]].isfinite().all()) for g in unmasked) and bool(unmasked[1][1].isnan().all())


def outputs_of(solution: diffopt.Solution, mask: Tensor) -> Tensor:
    return torch.stack([getattr(solution, name)[mask].square().sum() for name in OUTPUTS]).sum()


def test_without_an_interior_there_is_no_central_path() -> None:
    # Two opposite rows leave no room; the second instance has some.
    h, q = tensor([0.0, 0.0], [1.0, 1.0]), tensor([1.0, -0.3], [1.0, -0.3]).requires_grad_()
    G, Q = tensor([1.0, 1.0], [-1.0, -1.0]), torch.eye(2, dtype=FLOAT64)
    with pytest.warns(diffopt.InaccurateSolutionWarning, match="relaxed problem of 1 of 2 .*relaxation_mode='ridge'"):
        solution = diffopt.solve_qp(Q, q, G=G, h=h, settings=Settings(relaxation=0.1))
    assert solution.status.tolist() == [Status.SOLVED] * 2 and solution.gradient_residual is not None
    assert float(solution.gradient_residual[0]) > 1e-6 > float(solution.gradient_residual[1])
    (gradient,) = torch.autograd.grad(solution.x.sum(), q)
    assert bool(gradient[0].isnan().all() and gradient[1].isfinite().all())
    ridge = Settings(relaxation=0.1, relaxation_mode="ridge")
    (gradient,) = torch.autograd.grad(diffopt.solve_qp(Q, q, G=G, h=h, settings=ridge).x.sum(), q)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("penalty", ["l1", "squared"])
def test_elastic_constraints_have_relaxed_gradients(penalty: Any) -> None:
    # minimise x with x >= h at a price; the central path of the elastic problem in closed form by root finding.
    kappa, w, h = 0.1, 2.0, 1.0
    side, weight = tensor(-h).requires_grad_(), tensor(w).requires_grad_()
    data = {"Q": tensor([1.0]), "q": tensor(0.5), "G": tensor([-1.0])}
    options: Any = {"on_infeasible": Elastic(penalty, row=weight), "settings": Settings(relaxation=kappa)}
    solution = diffopt.solve_qp(**data, h=side, **options)
    assert solution.gradient == f"central_path({kappa:g})" and solution.shifts is not None

    def point(h: float, w: float) -> np.ndarray:
        def conditions(z: np.ndarray) -> np.ndarray:
            x, v, lam = z
            price = w - kappa / v if penalty == "l1" else w * v
            return np.array([x + 0.5 - lam, price - lam, (x + v - h) * lam - kappa])

        return optimize.root(conditions, np.array([0.7, 0.6, 1.0]), options={"xtol": 1e-14}).x

    got = torch.autograd.grad((solution.x + 2 * solution.shifts.row).sum(), (side, weight))
    t = 1e-6
    for i, (dh, dw) in enumerate(((-t, 0.0), (0.0, t))):
        difference = (point(h + dh, w + dw) - point(h - dh, w - dw)) / (2 * t)
        assert float(got[i]) == pytest.approx(difference[0] + 2 * difference[1], rel=DIFFERENCES)


def test_learned_settings_are_checked() -> None:
    q = torch.zeros(2, requires_grad=True)
    with pytest.raises(diffopt.SettingsError, match="`relaxation` = 0.0 is out of range. Expected None or a positive"):
        Settings(relaxation=0.0)
    with pytest.raises(diffopt.SettingsError, match="`relaxation_mode` = 'barrier'.*'central_path', 'ridge'"):
        Settings(relaxation=1.0, relaxation_mode="barrier")  # type: ignore[arg-type]
    with pytest.raises(diffopt.SettingsError, match="`relaxation` and on_infeasible='closest' do not go together"):
        diffopt.solve_qp(torch.eye(2), q, lower=0.0, on_infeasible="closest", settings=Settings(relaxation=1.0))

    with pytest.raises(diffopt.BackendUnsupported, match="`relaxation` takes quadratic and linear programs .*not Nonl"):
        diffopt.solve(Softmax(2), {"c": q}, settings=Settings(relaxation=1.0))
