"""Problems that every backend must solve, with known answers: the cases of the contract suite.

A `Case` builds a `Posed` problem in a dtype. Add a case here and every backend is tested on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import diffopt
from diffopt.check import known
from diffopt.check.known import KnownProblem


@dataclass(frozen=True)
class Posed:
    """A problem with the values of its parameters.

    Attributes:
        problem, params: for `diffopt.solve`.
        answer: unique outputs, by name.
        gradients: returns d sum(weights * x) / d parameter for some parameters, where a formula is known.
        smooth: x is differentiable in every parameter (strict complementarity, independent active rows),
            so that central differences apply.
    """

    problem: diffopt.DifferentiableProblem
    params: dict[str, Any]
    answer: dict[str, Tensor]
    gradients: Callable[[Tensor], dict[str, Tensor]] | None = None
    smooth: bool = True

    def to(self, device: torch.device) -> Posed:
        """Return the same with parameters and answer on a device."""
        params = {
            name: tuple(part.to(device) for part in value) if isinstance(value, tuple) else value.to(device)
            for name, value in self.params.items()
        }
        return replace(self, params=params, answer={name: value.to(device) for name, value in self.answer.items()})


@dataclass(frozen=True)
class Case:
    """A named problem; ``build`` takes the dtype."""

    name: str
    build: Callable[[torch.dtype], Posed]


class Softmax(diffopt.DifferentiableProblem):
    """minimise c'x + sum x log x subject to sum x = 1: x = softmax(-c). Not a line of QP in it."""

    params = (diffopt.Param("c", ("n",)),)

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def objective(self, x: Tensor, params: Any) -> Tensor:
        return (params["c"] * x + torch.xlogy(x, x)).sum(-1)

    def equalities(self, x: Tensor, params: Any) -> Tensor:
        return x.sum(-1, keepdim=True) - 1

    def inequalities(self, x: Tensor, params: Any) -> Tensor:
        return x[..., :0]

    def start(self, params: Any) -> Tensor:
        return torch.full_like(params["c"], 1 / self.n)


class CappedSoftmax(Softmax):
    """The same with x_0 <= cap: where that binds, x_0 = cap and the others share 1 - cap."""

    params = (diffopt.Param("c", ("n",)), diffopt.Param("cap", ()))

    def inequalities(self, x: Tensor, params: Any) -> Tensor:
        return x[..., :1] - params["cap"].unsqueeze(-1)

    def start(self, params: Any) -> Tensor:
        # Inside the cap: a little less than it in the first place, the rest shared.
        first = torch.minimum(0.9 * params["cap"], torch.full_like(params["cap"], 1 / self.n)).unsqueeze(-1)
        first = first.expand(*params["c"].shape[:-1], 1)
        return torch.cat([first, ((1 - first) / (self.n - 1)).expand(*first.shape[:-1], self.n - 1)], -1)


class Projection(diffopt.QuadraticProgram):
    """A structure of a user's own: the projection of a point onto {x : a'x <= level, x >= 0}."""

    def form(self, point: Tensor, a: Tensor, level: Tensor) -> diffopt.QPForm:
        n = point.shape[-1]
        return diffopt.QPForm(
            Q=torch.eye(n, dtype=point.dtype, device=point.device),
            q=-point,
            G=a.unsqueeze(-2),
            h=level.unsqueeze(-1),
            lower=0.0,
        )


def structure(problem: KnownProblem, **forms: str) -> tuple[diffopt.QPStructure, dict[str, Tensor]]:
    """Return a structure in which everything present is given, and its arguments."""
    params = {name: value for name, value in problem.arguments().items() if value is not None}
    declared: dict[str, Any] = {"Q": None} | {name: diffopt.given(forms.get(name, "dense")) for name in params}
    return diffopt.QPStructure(problem.q.shape[-1], **declared), params


def generated(problem: KnownProblem, *unique: str) -> Posed:
    """Return a generated problem with its known answer (x and s, and the duals unless named otherwise)."""
    names = unique or ("x", "s", "lam", "nu", "lam_lower", "lam_upper")
    declared, params = structure(problem)
    return Posed(declared, params, {name: getattr(problem, name) for name in names}, smooth=not unique)


def equality_only(dtype: torch.dtype) -> Posed:
    return generated(known.quadratic_program(0, 4, 2, 0, batch=(3,), dtype=dtype))


def inequality_only(dtype: torch.dtype) -> Posed:
    return generated(known.quadratic_program(1, 4, 0, 5, batch=(3,), dtype=dtype))


def bounds_only(dtype: torch.dtype) -> Posed:
    return generated(known.quadratic_program(2, 4, bounds="lower", batch=(3,), dtype=dtype))


def two_sided_bounds(dtype: torch.dtype) -> Posed:
    return generated(known.quadratic_program(3, 4, 1, 2, bounds="both", batch=(3,), dtype=dtype))


def some_bounds_infinite(dtype: torch.dtype) -> Posed:
    return generated(known.quadratic_program(4, 5, 1, 2, bounds="mixed", batch=(3,), dtype=dtype))


def unconstrained(dtype: torch.dtype) -> Posed:
    return generated(known.quadratic_program(5, 4, batch=(3,), dtype=dtype))


def linear_program(dtype: torch.dtype) -> Posed:
    return generated(known.linear_program(6, 4, 1, 6, bounds="lower", batch=(3,), dtype=dtype))


def singular_hessian(dtype: torch.dtype) -> Posed:
    return generated(known.quadratic_program(7, 5, 1, 5, bounds="mixed", singular=True, batch=(3,), dtype=dtype))


def singular_without_inequalities(dtype: torch.dtype) -> Posed:
    # min x_1^2/2 - x_1 s.t. x_2 = b: Q = diag(1, 0) is singular even with the (absent) inequalities added.
    declared = diffopt.QPStructure(2, A=diffopt.given(), b=diffopt.given())
    b = torch.tensor([[3.0], [-2.0]], dtype=dtype)
    params = {
        "Q": torch.diag(torch.tensor([1.0, 0.0], dtype=dtype)), "q": torch.tensor([-1.0, 0.0], dtype=dtype),
        "A": torch.tensor([[0.0, 1.0]], dtype=dtype), "b": b,
    }  # fmt: skip
    return Posed(declared, params, {"x": torch.cat([torch.ones_like(b), b], -1), "nu": torch.zeros_like(b)})


def one_variable(dtype: torch.dtype) -> Posed:
    return generated(known.quadratic_program(8, 1, 0, 2, bounds="both", batch=(3,), dtype=dtype))


def shared_and_batched(dtype: torch.dtype) -> Posed:
    # Q, A and G shared by the batch, the rest not.
    return generated(known.quadratic_program(9, 4, 1, 4, bounds="both", batch=(3,), shared=True, dtype=dtype))


def one_problem_many_sides(dtype: torch.dtype) -> Posed:
    # Everything shared but q: min |x - c|^2/2 over the box [0, 1]^n is the clipped c.
    c = torch.tensor([[-0.5, 0.25, 1.75], [0.75, 2.0, -3.0]], dtype=dtype)
    declared = diffopt.QPStructure(3, lower=diffopt.given(), upper=diffopt.given())
    params = {"Q": torch.eye(3, dtype=dtype), "q": -c, "lower": torch.zeros(3, dtype=dtype), "upper": torch.tensor(1.0)}
    params["upper"] = params["upper"].to(dtype)
    answer = {"x": c.clamp(0, 1), "lam_lower": (-c).clamp_min(0), "lam_upper": (c - 1).clamp_min(0)}
    return Posed(declared, params, answer)


def two_batch_dimensions(dtype: torch.dtype) -> Posed:
    return generated(known.quadratic_program(10, 4, 1, 3, bounds="upper", batch=(2, 2), dtype=dtype))


def crossed_batch_dimensions(dtype: torch.dtype) -> Posed:
    # (3, 1) and (2,) broadcast to (3, 2): x = centre + shift, with an inactive row.
    centre, shift = torch.arange(3.0, dtype=dtype), torch.tensor([0.5, -0.5], dtype=dtype)
    point = torch.stack([centre, -centre], -1).unsqueeze(1)  # (3, 1, 2)
    h = (10 + shift).unsqueeze(-1)  # (2, 1)
    declared = diffopt.QPStructure(2, G=diffopt.given(), h=diffopt.given())
    params = {"Q": torch.eye(2, dtype=dtype), "q": -point, "G": torch.ones(1, 2, dtype=dtype), "h": h}
    x = point.expand(3, 2, 2)
    return Posed(declared, params, {"x": x, "s": (h - 0 * x.sum(-1, keepdim=True))})


def empty_batch(dtype: torch.dtype) -> Posed:
    return generated(known.quadratic_program(11, 4, 1, 3, bounds="both", batch=(0,), dtype=dtype))


def diagonal(dtype: torch.dtype) -> Posed:
    problem = known.quadratic_program(12, 4, 1, 3, bounds="both", batch=(3,), dtype=torch.float64)
    return _reshaped(problem, "diagonal", lambda d, U: torch.diag_embed(d), lambda d, U: d, dtype)


def scaled_identity(dtype: torch.dtype) -> Posed:
    problem = known.quadratic_program(13, 4, 1, 3, bounds="both", batch=(3,), dtype=torch.float64)
    eye = torch.eye(4, dtype=torch.float64)
    return _reshaped(problem, "scaled_identity", lambda d, U: d[..., :1, None] * eye, lambda d, U: d[..., 0], dtype)


def diagonal_plus_low_rank(dtype: torch.dtype) -> Posed:
    problem = known.quadratic_program(14, 4, 1, 3, bounds="lower", batch=(3,), dtype=torch.float64)
    return _reshaped(
        problem, "diagonal_plus_low_rank", lambda d, U: torch.diag_embed(d) + U @ U.mT, lambda d, U: (d, U), dtype
    )


def _reshaped(
    problem: KnownProblem, form: str, dense: Callable[..., Tensor], value: Callable[..., Any], dtype: torch.dtype
) -> Posed:
    """Return the problem with another Q, given in a form, and q changed so that the answer stays."""
    generator = torch.Generator().manual_seed(0)
    n, batch = problem.q.shape[-1], problem.batch_shape
    d = 0.5 + torch.rand(*batch, n, generator=generator, dtype=torch.float64)
    U = torch.randn(*batch, n, 2, generator=generator, dtype=torch.float64)
    assert problem.Q is not None
    change = ((problem.Q - dense(d, U)) @ problem.x.unsqueeze(-1)).squeeze(-1)
    declared, params = structure(problem, Q=form)
    given: dict[str, Any] = params | {"q": problem.q + change, "Q": value(d, U)}
    cast = {k: tuple(t.to(dtype) for t in v) if isinstance(v, tuple) else v.to(dtype) for k, v in given.items()}
    names = ("x", "s", "lam", "nu", "lam_lower", "lam_upper")
    return Posed(declared, cast, {name: getattr(problem, name).to(dtype) for name in names})


def fixed_variable(dtype: torch.dtype) -> Posed:
    """x_0 is fixed by lower = upper: an equality, and half of its gradient belongs to each side."""
    # min |x - c|^2/2 s.t. x_0 = t, x_0 + x_1 = r: x = (t, r - t).
    t, r = torch.tensor([0.5, -1.0], dtype=dtype), torch.tensor([2.0, 3.0], dtype=dtype)
    unbounded = torch.full_like(t, torch.inf)
    declared = diffopt.QPStructure(
        2, A=diffopt.given(), b=diffopt.given(), lower=diffopt.given(), upper=diffopt.given()
    )
    params = {
        "Q": torch.eye(2, dtype=dtype), "q": torch.tensor([-1.0, 0.5], dtype=dtype),
        "A": torch.ones(1, 2, dtype=dtype), "b": r.unsqueeze(-1),
        "lower": torch.stack([t, -unbounded], -1), "upper": torch.stack([t, unbounded], -1),
    }  # fmt: skip

    def gradients(weights: Tensor) -> dict[str, Tensor]:
        by_t = weights[..., 0] - weights[..., 1]
        half = torch.stack([by_t / 2, torch.zeros_like(by_t)], -1)
        return {"lower": half, "upper": half, "b": weights[..., 1:], "q": torch.zeros(2, dtype=dtype)}

    return Posed(declared, params, {"x": torch.stack([t, r - t], -1)}, gradients, smooth=False)


def all_fixed(dtype: torch.dtype) -> Posed:
    """Every variable is fixed by lower = upper: nothing is left to choose."""
    at = torch.tensor([[1.0, 2.0], [-0.5, 0.0]], dtype=dtype)
    declared = diffopt.QPStructure(2, lower=diffopt.given(), upper=diffopt.given())
    params = {"Q": torch.eye(2, dtype=dtype), "q": torch.ones(2, dtype=dtype), "lower": at, "upper": at.clone()}

    def gradients(weights: Tensor) -> dict[str, Tensor]:
        return {"lower": weights / 2, "upper": weights / 2, "q": torch.zeros(2, dtype=dtype)}

    return Posed(declared, params, {"x": at, "value": (at.square() / 2 + at).sum(-1)}, gradients, smooth=False)


def absent_sides(dtype: torch.dtype) -> Posed:
    """Infinite h, lower and upper are absent constraints; a row of zeros constrains nothing either."""
    infinite = torch.inf
    declared = diffopt.QPStructure(
        2, G=diffopt.given(), h=diffopt.given(), lower=diffopt.given(), upper=diffopt.given()
    )
    params = {
        "Q": torch.eye(2, dtype=dtype), "q": torch.tensor([[1.0, 1.0], [-3.0, 0.5]], dtype=dtype),
        "G": torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], dtype=dtype),
        "h": torch.tensor([infinite, -2.0, 1.0], dtype=dtype),
        "lower": torch.full((2,), -infinite, dtype=dtype), "upper": torch.tensor([2.0, infinite], dtype=dtype),
    }  # fmt: skip
    x = torch.tensor([[-1.0, -2.0], [2.0, -2.0]], dtype=dtype)
    lam = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.5, 0.0]], dtype=dtype)
    return Posed(
        declared, params, {"x": x, "lam": lam, "lam_upper": torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=dtype)}
    )


def repeated_row(dtype: torch.dtype) -> Posed:
    """An active row stands twice: x is that of one row, and moves when both sides move together."""
    # min |x - c|^2/2 s.t. a'x <= h twice, active: x = c - a (a'c - h) / a'a.
    c = torch.tensor([[2.0, 1.0, 0.0], [1.0, 3.0, -1.0]], dtype=dtype)
    a = torch.tensor([1.0, 2.0, 2.0], dtype=dtype)
    declared = diffopt.QPStructure(3, G=diffopt.given(), h=diffopt.given())
    params = {
        "Q": torch.eye(3, dtype=dtype), "q": -c, "G": torch.stack([a, a]), "h": torch.ones(2, dtype=dtype),
    }  # fmt: skip
    lam = (c @ a - 1) / 9

    def gradients(weights: Tensor) -> dict[str, Tensor]:
        return {"q": -(weights - (weights @ a).unsqueeze(-1) * a / 9)}

    answer = {"x": c - lam.unsqueeze(-1) * a, "s": torch.zeros(2, 2, dtype=dtype)}
    return Posed(declared, params, answer, gradients, smooth=False)


def redundant_equality(dtype: torch.dtype) -> Posed:
    return generated(known.redundant_program(15, 4, 2, 0, extra_p=1, batch=(3,), dtype=dtype), "x")


def own_structure(dtype: torch.dtype) -> Posed:
    point = torch.tensor([[2.0, 1.0], [0.5, 0.25], [3.0, -1.0]], dtype=dtype)
    params = {"point": point, "a": torch.tensor([1.0, 1.0], dtype=dtype), "level": torch.tensor(1.0, dtype=dtype)}
    x = torch.tensor([[1.0, 0.0], [0.5, 0.25], [1.0, 0.0]], dtype=dtype)
    # The first point projects onto the edge of the triangle's corner: keep away from that kink.
    point[0] = torch.tensor([1.0, 0.5], dtype=dtype)
    x[0] = torch.tensor([0.75, 0.25], dtype=dtype)
    return Posed(Projection(), params, {"x": x})


def entropy(dtype: torch.dtype) -> Posed:
    c = torch.tensor([[0.0, 0.5, -1.0], [1.0, -0.25, 0.3]], dtype=dtype)
    x = torch.softmax(-c, -1)

    def gradients(weights: Tensor) -> dict[str, Tensor]:
        return {"c": -x * (weights - (weights * x).sum(-1, keepdim=True))}

    value = -torch.logsumexp(-c, -1)
    return Posed(Softmax(3), {"c": c}, {"x": x, "value": value}, gradients)


def capped_entropy(dtype: torch.dtype) -> Posed:
    c = torch.tensor([[-1.0, 0.5, 0.0], [2.0, -0.25, 0.3]], dtype=dtype)  # binds in the first instance only
    cap = torch.tensor(0.4, dtype=dtype)
    free = torch.softmax(-c, -1)
    rest = torch.softmax(-c[0, 1:], -1) * 0.6
    x = torch.stack([torch.cat([cap.reshape(1), rest]), free[1]])
    # Stationarity: c_j + log x_j + 1 + nu = 0 for j > 0 and c_0 + log x_0 + 1 + nu + lam = 0.
    lam = (c[0, 1] + rest[0].log()) - (c[0, 0] + cap.log())
    answer = {"x": x, "lam": torch.stack([lam, torch.zeros_like(lam)]).unsqueeze(-1)}
    return Posed(CappedSoftmax(3), {"c": c, "cap": cap}, answer)


CASES = [
    Case(build.__name__, build)
    for build in (
        equality_only, inequality_only, bounds_only, two_sided_bounds, some_bounds_infinite, unconstrained,
        linear_program, singular_hessian, singular_without_inequalities, one_variable, shared_and_batched,
        one_problem_many_sides, two_batch_dimensions, crossed_batch_dimensions, empty_batch, diagonal,
        scaled_identity, diagonal_plus_low_rank, fixed_variable, all_fixed, absent_sides, repeated_row,
        redundant_equality, own_structure, entropy, capped_entropy,
    )
]  # fmt: skip
