"""The compiled CPU executor and torch operations give the same solutions and the same derivatives."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import diffopt
import measures
from diffopt import kkt
from diffopt.problems.forms import QPForm
from diffopt.solvers.cpu_executor import LANES_UP_TO
from tolerances import GRADIENT, GRADIENT_REFERENCE, SOLUTION, X_REFERENCE

OUTPUTS = measures.OUTPUTS[:-1]  # the value follows from x
EPS = torch.finfo(torch.float64).eps


class Drawn(NamedTuple):
    """A batch of problems, the weights of a linear function of all outputs, and the largest cond(Q)."""

    data: dict[str, Tensor]
    weights: dict[str, Tensor]
    condition: float
    recipe: str


class Draw:
    """Random numbers from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def batch(self, count: int, large: bool, shared: bool, dtype: torch.dtype, decades: float) -> Drawn:
        """Draw feasible problems with cond(Q) up to 10**decades; ``large``: too large for a lane of a register."""
        bounds = (None, "lower", "upper", "both")[self.integer(0, 3)]
        n = self.integer(LANES_UP_TO + 1, LANES_UP_TO + 25) if large else self.integer(1, LANES_UP_TO)
        p = self.integer(0, n // 3) if large else self.integer(0, min(n // 2, LANES_UP_TO - n))
        m = self.integer(0, int((0.9 if bounds else 1.9) * n))
        if not large:
            m = min(m, LANES_UP_TO - (n if bounds else 0))
        lead = () if shared else (count,)
        condition = 10 ** (decades * float(self.uniform()))
        basis = torch.linalg.qr(self.normal(*lead, n, n)).Q
        Q = (basis * condition ** -self.uniform(*lead, 1, n)) @ basis.mT
        A, G = self.normal(*lead, p, n), self.normal(*lead, m, n)
        x = self.normal(count, n, 1)
        data = {"Q": Q + 0.1 * (basis - basis.mT) / condition, "q": 3 * self.normal(count, n)}  # not symmetric
        if p:
            data |= {"A": A, "b": (A @ x).squeeze(-1)}
        if m:
            h = (G @ x).squeeze(-1) + self.uniform(count, m)
            data |= {"G": G, "h": torch.where(self.uniform(count, m) < 0.1, torch.inf, h)}
        for side, sign in (("lower", -1), ("upper", 1)):
            if bounds in (side, "both"):
                bound = x.squeeze(-1) + sign * self.uniform(count, n)
                data[side] = torch.where(self.uniform(count, n) < 0.3, sign * torch.inf, bound)
        sizes = {"x": n, "s": m, "lam": m, "nu": p, "lam_lower": n, "lam_upper": n}
        weights = {name: self.normal(count, size).to(dtype) for name, size in sizes.items()}
        recipe = f"{count} of n={n} p={p} m={m} bounds={bounds} shared={shared} {dtype} cond={condition:.0e}"
        return Drawn({name: v.to(dtype) for name, v in data.items()}, weights, condition, recipe)

    def general(self, count: int, kind: str) -> Drawn:
        """Draw problems that do not go by the dual form; ``kind``: "rows" (many), "diagonal" or "low_rank"."""
        drawn = self.batch(count, False, self.integer(0, 1) == 1, torch.float64, 2.0)
        data, n = dict(drawn.data), drawn.data["q"].shape[-1]
        if kind == "rows":
            G = self.normal(count, 3 * n, n)
            x = self.normal(count, n, 1)
            for side, sign in (("lower", -1), ("upper", 1)):
                if side in data:
                    data[side] = x.squeeze(-1) + sign * self.uniform(count, n)
            if "b" in data:
                data["b"] = (data["A"] @ x).squeeze(-1)
            data |= {"G": G, "h": (G @ x).squeeze(-1) + self.uniform(count, 3 * n)}
        else:
            data["Q"] = 0.1 + self.uniform(*data["Q"].shape[:-1])
            if kind == "low_rank":
                data["factor"] = self.normal(n, 3)
        m = data["G"].shape[-2] if "G" in data else 0
        weights = drawn.weights | {"s": self.normal(count, m), "lam": self.normal(count, m)}
        return Drawn(data, weights, 100.0, f"{kind}: {drawn.recipe}, m={m}")


def solved(drawn: Drawn, executor: Any) -> tuple[diffopt.Solution, dict[str, Tensor]]:
    """Solve, and differentiate the linear function of all finite outputs in every input."""
    leaves = measures.tracked(drawn.data)
    given: dict[str, Any] = dict(leaves)
    if "factor" in given:
        given["Q"] = diffopt.DiagonalPlusLowRank(given["Q"], given.pop("factor"))
    elif drawn.recipe.startswith("diagonal"):
        given["Q"] = diffopt.Diagonal(given["Q"])
    solution = diffopt.solve_qp(**given, settings=diffopt.Settings(executor=executor))
    total = sum(
        torch.where(value.isfinite(), drawn.weights[name] * value, 0.0).sum()
        for name in OUTPUTS
        for value in [getattr(solution, name)]
    )
    gradients = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)  # type: ignore[arg-type]
    return solution, dict(zip(leaves, gradients, strict=True))


def rounding(data: dict[str, Tensor], solution: diffopt.Solution) -> dict[str, Tensor]:
    """Return what the sums in each residual can round away: eps times their terms, all taken positive."""

    def size(name: str, *shape: int) -> Tensor:
        v = data.get(name)
        return torch.zeros(shape) if v is None else torch.where(v.isinf(), 0.0, v.abs())

    x, nu, lam, force = (
        v.detach().abs().unsqueeze(-1)
        for v in (solution.x, solution.nu, solution.lam, solution.lam_lower + solution.lam_upper)
    )
    n, p, m = x.shape[-2], nu.shape[-2], lam.shape[-2]
    Q, A, G = size("Q", n, n), size("A", p, n).to(x.dtype), size("G", m, n).to(x.dtype)
    q, b, h = (size(k, s).to(x.dtype).unsqueeze(-1) for k, s in (("q", n), ("b", p), ("h", m)))
    sides = size("lower", n).to(x.dtype) + size("upper", n)
    primal = torch.cat([A @ x + b, G @ x + h, x], -2)
    dual = Q @ x + q + A.mT @ nu + G.mT @ lam + force
    gap = x * (Q @ x + q), b * nu, h * lam, sides.unsqueeze(-1) * force
    total = sum(v.sum((-1, -2)) for v in gap)
    units = 8 * (n + p + m) * EPS
    return {"primal": units * primal.amax((-1, -2)), "dual": units * dual.amax((-1, -2)), "gap": units * total}


def compare(drawn: Drawn) -> None:
    """Check one batch; the worst errors are in the messages."""
    ours, our_gradients = solved(drawn, "cpu")
    theirs, their_gradients = solved(drawn, "torch")
    kind = drawn.recipe.split(":")[0]
    expected = {"rows": "cpu:primal", "diagonal": "cpu:diagonal", "low_rank": "cpu:diagonal"}.get(kind, "cpu:dual")
    assert ours.executor == expected and theirs.executor.startswith("torch:"), (ours.executor, drawn.recipe)
    for name in ("status", "weakly_active", "dependent"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), (name, drawn.recipe)
    sides = [drawn.data[name].isfinite().any(-1) for name in ("h", "lower", "upper") if name in drawn.data]
    for constrained in sides:
        assert bool((ours.iterations >= constrained).all()), (ours.iterations, drawn.recipe)
    double = drawn.data["q"].dtype == torch.float64
    limit = X_REFERENCE if double else SOLUTION[torch.float32]
    errors = {}
    for name in OUTPUTS:
        a, b = getattr(ours, name), getattr(theirs, name)
        assert torch.equal(a.isinf(), b.isinf()), (name, drawn.recipe)
        errors[name] = measures.relative(a.nan_to_num(posinf=0.0), b.nan_to_num(posinf=0.0))
    assert max(errors.values()) <= limit, (errors, drawn.recipe)
    limit = GRADIENT_REFERENCE * max(1, drawn.condition / 1e6) if double else GRADIENT[torch.float32]
    errors = {name: measures.relative(our_gradients[name], their_gradients[name]) for name in drawn.data}
    assert max(errors.values()) <= limit, (errors, drawn.recipe)
    if double and expected == "cpu:dual":
        point = (getattr(ours, name).detach() for name in kkt.Point._fields)
        again = kkt.residuals(QPForm(**drawn.data), kkt.Point(*point))
        allowed = rounding(drawn.data, ours)
        for name, mine, recomputed in zip(again._fields, ours.residuals, again, strict=True):
            assert bool(((mine - recomputed).abs() <= allowed[name]).all()), (name, mine, recomputed, drawn.recipe)


@pytest.mark.parametrize("seed", range(10))
def test_a_hundred_random_instances(seed: int) -> None:
    draw = Draw(seed)
    single = torch.float32 if seed % 3 == 2 else torch.float64
    for shared, dtype, decades in ((False, torch.float64, 6.0), (True, torch.float64, 7.0), (False, single, 2.0)):
        for count in (1, 3, 9, 16):
            compare(draw.batch(count, False, shared, dtype, decades))
        for count in (1, 4):
            compare(draw.batch(count, True, shared, dtype, decades))


@pytest.mark.parametrize("kind", ["rows", "diagonal", "low_rank"])
def test_random_instances_of_other_kinds(kind: str) -> None:
    draw = Draw(17)
    for count in (1, 3, 9) * 4:
        compare(draw.general(count, kind))
