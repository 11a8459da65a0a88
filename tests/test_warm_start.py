"""What `start` takes and refuses, and where it goes: layers, backends, transforms, compiled graphs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import diffopt
import measures
from diffopt.backends import Capabilities, RawPoint
from diffopt.backends.base import Backend
from diffopt.check import known
from diffopt.warm_start import Start
from tolerances import EXACT_ALGEBRA

N, P, M, BATCH = 6, 2, 5, 4


def posed() -> dict[str, Any]:
    problem = known.quadratic_program(0, N, P, M, bounds="both", batch=(BATCH,))
    return {name: v for name, v in problem.arguments().items() if v is not None}


def near(arguments: dict[str, Any]) -> dict[str, Any]:
    return arguments | {"q": arguments["q"] + 1e-4}


def bound(names: list[str], values: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(names, values, strict=True))


def moved(arguments: dict[str, Any], q: Any) -> dict[str, Any]:
    return arguments | {"q": q}


def fields(solution: Any) -> dict[str, Tensor]:
    return {name: getattr(solution, name).detach() for name in Start._fields}


def test_part_of_a_start_without_equalities() -> None:
    start = Start(torch.ones(2, 3, N), torch.ones(2, 3, 0), torch.ones(M), torch.zeros(N), torch.zeros(N))
    part = start.part(2, 5, torch.Size((2, 3)))
    assert [tuple(v.shape) for v in part] == [(3, N), (3, 0), (3, M), (3, N), (3, N)]


# ------------------------------------------------------------------ bad starts


def test_a_start_that_is_no_solution() -> None:
    arguments = posed()
    with pytest.raises(diffopt.ParameterError, match=r"`start` is Tensor without tensor `x`, .*Expected a diffopt.Sol"):
        diffopt.solve_qp(**arguments, start=arguments["q"])
    partly = fields(diffopt.solve_qp(**arguments)) | {"nu": None}
    with pytest.raises(diffopt.ParameterError, match=r"SimpleNamespace without tensor `nu`\."):
        diffopt.solve_qp(**arguments, start=SimpleNamespace(**partly))


@pytest.mark.parametrize("name", Start._fields)
def test_a_start_of_another_shape(name: str) -> None:
    arguments = posed()
    found = fields(diffopt.solve_qp(**arguments))
    size = found[name].shape[-1]
    for wrong in (
        found[name][..., :-1],  # another problem
        found[name][:3],  # another batch
        found[name].expand(2, BATCH, size),  # more batch dimensions
        found[name].new_zeros(()),
    ):
        message = rf"`start.{name}` has shape .*\(\*batch, {size}\) .* \({BATCH},\).*leave `start` out"
        with pytest.raises(diffopt.ShapeError, match=message):
            diffopt.solve_qp(**arguments, start=SimpleNamespace(**found | {name: wrong}))


def test_a_start_of_another_dtype_or_device() -> None:
    arguments = posed()
    found = fields(diffopt.solve_qp(**arguments))
    with pytest.raises(diffopt.DtypeError, match=r"`start.lam` is torch.float32, the data is torch.float64"):
        diffopt.solve_qp(**arguments, start=SimpleNamespace(**found | {"lam": found["lam"].float()}))
    with pytest.raises(diffopt.DeviceError, match=r"`start.nu` is on meta, the data on cpu"):
        diffopt.solve_qp(**arguments, start=SimpleNamespace(**found | {"nu": found["nu"].to("meta")}))


def test_a_start_does_not_go_with_other_problems_in_its_place() -> None:
    arguments = posed()
    start = diffopt.solve_qp(**arguments)
    policies: tuple[Any, ...] = ("elastic", "closest")
    for policy in policies:
        with pytest.raises(diffopt.SettingsError, match=r"`start` and on_infeasible=.* do not go together"):
            diffopt.solve_qp(**arguments, on_infeasible=policy, start=start)


# ------------------------------------------------------------------ layers


class Started(diffopt.QuadraticProgram):
    """A structure with a parameter of that name."""

    def form(self, start: Tensor) -> diffopt.QPForm:
        return diffopt.QPForm(Q=torch.eye(2, dtype=start.dtype), q=-start)


def test_a_parameter_called_start() -> None:
    with pytest.raises(diffopt.ParameterError, match=r"Started has a parameter `start`.*another name"):
        diffopt.Layer(Started())
    at = torch.ones(2, dtype=torch.float64)
    first = diffopt.solve(Started(), {"start": at})  # apart from it
    assert torch.equal(diffopt.solve(Started(), {"start": at}, start=first).x, at)
    assert torch.equal(diffopt.Layer(Started(start=diffopt.learned(at)))().detach(), at)


def test_a_layer_in_a_loop() -> None:
    arguments = posed()
    names = {name: diffopt.given() for name in arguments if name != "q"}
    layer = diffopt.Layer(diffopt.QPStructure(N, **names))
    solution, steps = None, []
    for _ in range(4):
        arguments = near(arguments)
        cold = layer.solve(**arguments)
        solution = layer.solve(**arguments, start=solution)
        steps.append((int(solution.iterations.sum()), int(cold.iterations.sum())))
        assert measures.relative(solution.x, cold.x) <= EXACT_ALGEBRA
        assert torch.equal(layer(**arguments, start=solution), solution.x)
    assert steps[0][0] == steps[0][1] > 0 and all(warm == 0 for warm, _ in steps[1:])


def test_relaxed_gradients_from_a_start() -> None:
    problem = known.linear_program(1, 5, 1, 8, bounds="lower", batch=(3,))
    arguments: dict[str, Any] = {name: v for name, v in problem.arguments().items() if v is not None} | {"Q": None}
    settings = diffopt.Settings(relaxation=1e-2)
    found = []
    start = diffopt.solve_qp(**arguments)
    for given in (None, start):
        leaf = arguments["q"].clone().requires_grad_()
        solution = diffopt.solve_qp(**moved(arguments, leaf), settings=settings, start=given)
        solution.x.square().sum().backward()
        found.append((solution.iterations, leaf.grad))
    assert not bool(found[1][0].any()) and bool(found[0][0].all())
    assert measures.relative(found[1][1], found[0][1]) <= EXACT_ALGEBRA


def test_autocast() -> None:
    arguments = {name: v.to(torch.bfloat16) for name, v in posed().items()}
    with torch.autocast("cpu", torch.bfloat16):
        first = diffopt.solve_qp(**arguments, on_failure="return")
        again = diffopt.solve_qp(**arguments, start=first, on_failure="return")
    assert first.x.dtype == torch.float32
    assert torch.equal(again.status, first.status) and not bool(again.iterations[again.ok].any())


# ------------------------------------------------------------------ backends


class Curious(Backend):
    """Says what it was given. Not registered."""

    name = "curious"
    can = Capabilities(warm_start=True)
    seen: Any = ()

    def _solve(self, form: Any, settings: Any, start: Any = None) -> RawPoint:
        type(self).seen = start
        x = -form.q
        none, zeros = x[..., :0], torch.zeros(form.batch_shape, dtype=torch.int64)
        return RawPoint(x, none, none, 0 * x, 0 * x, zeros.to(torch.int8) + 1, zeros)


def test_backends_say_whether_they_use_a_start() -> None:
    uses = {name: diffopt.backends.get(name).can.warm_start for name in diffopt.backends.names()}
    assert uses.pop("pdipm") and not any(uses.values())
    Q, q = torch.eye(2, dtype=torch.float64), torch.ones(3, 2, dtype=torch.float64)
    start = diffopt.solve_qp(Q, q)
    diffopt.solve_qp(Q, q, backend=Curious(), start=start)
    assert isinstance(Curious.seen, Start) and torch.equal(Curious.seen.x, start.x)
    diffopt.solve_qp(Q, q, backend=Curious())
    assert Curious.seen is None


@pytest.mark.parametrize("name", ["cvxpy", "scipy"])
def test_other_backends_ignore_a_start_but_check_it(name: str) -> None:
    arguments = posed()
    start = diffopt.solve_qp(**arguments)
    cold = diffopt.solve_qp(**arguments, backend=name)
    warm = diffopt.solve_qp(**arguments, backend=name, start=start)
    assert torch.equal(warm.x, cold.x) and torch.equal(warm.iterations, cold.iterations)
    with pytest.raises(diffopt.ShapeError, match="start.x"):
        diffopt.solve_qp(**arguments, backend=name, start=SimpleNamespace(**fields(start) | {"x": start.x[:2]}))


# ------------------------------------------------------------------ transforms and compiled graphs


def test_vmap_over_data_and_start() -> None:
    arguments = posed()
    start = diffopt.solve_qp(**arguments)
    after = near(arguments)
    cold = diffopt.solve_qp(**after)
    assert bool(start.value.isfinite().all())  # (torch 2.11 cannot compute it while it compiles)
    names, data = list(after), list(after.values())

    def one(start: Any, *values: Tensor) -> diffopt.Solution:
        return diffopt.solve_qp(**bound(names, values), start=start)

    warm = torch.func.vmap(one)(start, *data)
    assert not bool(warm.iterations.any()) and bool(cold.iterations.all())
    assert measures.relative(warm.x, cold.x) <= EXACT_ALGEBRA
    # Nested, the second dimension of the start first; and one start for all.
    twice = [torch.stack([v, v], 1) for v in data]
    flat = SimpleNamespace(**{name: v.unsqueeze(1).expand(-1, 2, -1) for name, v in fields(start).items()})

    def nested(x: Tensor, nu: Tensor, lam: Tensor, lower: Tensor, upper: Tensor, *values: Tensor) -> Tensor:
        inner = SimpleNamespace(x=x, nu=nu, lam=lam, lam_lower=lower, lam_upper=upper)
        return one(inner, *values).iterations

    steps = torch.func.vmap(torch.func.vmap(nested))(*fields(flat).values(), *twice)
    assert steps.shape == (BATCH, 2) and not bool(steps.any())
    turned = [v.movedim(0, 1) for v in fields(start).values()]
    steps = torch.func.vmap(nested, in_dims=(*(1,) * 5, *(0,) * len(data)))(*turned, *data)
    assert not bool(steps.any())
    first = SimpleNamespace(**{name: v[0] for name, v in fields(start).items()})
    steps = torch.func.vmap(lambda *values: one(first, *values).iterations)(*[v[:1] for v in data])  # pyright: ignore[reportArgumentType]
    assert not bool(steps.any())


def test_derivatives_of_torch_func() -> None:
    arguments = posed()
    start = diffopt.solve_qp(**arguments)
    after = near(arguments)

    def x(q: Tensor, start: Any = None) -> Tensor:
        return diffopt.solve_qp(**moved(after, q), start=start).x[0]

    for derivative in (torch.func.jacrev, torch.func.jacfwd):
        got, expected = derivative(lambda q: x(q, start))(after["q"]), derivative(x)(after["q"])
        assert measures.relative(got, expected) <= EXACT_ALGEBRA

    def chained(q: Tensor) -> Tensor:  # the start is wrapped by the derivative, too
        return x(q + 1e-4, diffopt.solve_qp(**moved(after, q))).square().sum()

    def plain(q: Tensor) -> Tensor:
        return x(q + 1e-4).square().sum()

    assert measures.relative(torch.func.grad(chained)(after["q"]), torch.func.grad(plain)(after["q"])) <= EXACT_ALGEBRA


@pytest.mark.parametrize("derivative", [torch.func.jacrev, torch.func.jacfwd])
def test_vmap_of_a_start_around_a_derivative(derivative: Any) -> None:
    arguments = posed()
    start = diffopt.solve_qp(**arguments)
    one = {name: v[0] for name, v in arguments.items()}

    def x(q: Tensor, start: Any) -> Tensor:
        return diffopt.solve_qp(**moved(one, q), start=start).x

    def jacobian(q: Tensor, start: Any) -> Tensor:
        return derivative(lambda q: x(q, start))(q)

    got = torch.func.vmap(jacobian)(arguments["q"], start)
    expected = torch.func.vmap(lambda q: jacobian(q, None))(arguments["q"])
    assert measures.relative(got, expected) <= EXACT_ALGEBRA
    with pytest.raises(diffopt.NotDifferentiableError, match="A `start` that torch.func.vmap maps"):
        torch.func.vmap(lambda start: jacobian(one["q"], start))(start)


def test_in_a_compiled_graph() -> None:
    arguments = posed()
    start = diffopt.solve_qp(**arguments)
    after = near(arguments)

    def function(q: Tensor, start: Any) -> tuple[Tensor, Tensor]:
        solution = diffopt.solve_qp(**moved(after, q), start=start)
        return solution.x, solution.iterations

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for given in (start, None):
        leaf, twin = (after["q"].clone().requires_grad_() for _ in range(2))
        x, steps = compiled(leaf, given)
        expected, plainly = function(twin, given)
        x.square().sum().backward()
        expected.square().sum().backward()
        assert torch.equal(x, expected) and torch.equal(steps, plainly) and torch.equal(steps > 0, plainly > 0)
        assert bool(steps.any()) == (given is None)
        assert measures.relative(leaf.grad, twin.grad) <= EXACT_ALGEBRA
    names, data = list(after), list(after.values())

    def each(start: Any, *values: Tensor) -> Tensor:
        return diffopt.solve_qp(**bound(names, values), start=start).iterations

    mapped = torch.compile(lambda start, *values: torch.func.vmap(each)(start, *values), backend="aot_eager")
    assert not bool(mapped(start, *data).any())
    leaves = SimpleNamespace(**{name: v.clone().requires_grad_() for name, v in fields(start).items()})
    assert not compiled(after["q"], leaves)[0].requires_grad
    with pytest.raises(diffopt.ShapeError, match="start.x"):
        compiled(after["q"], SimpleNamespace(**fields(start) | {"x": start.x[:, :-1]}))
