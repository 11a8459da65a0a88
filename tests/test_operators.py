"""A solve inside ``torch.compile`` and ``torch.export``: one graph, the same values and gradients as without."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import diffopt
import measures
from diffopt import living, operators
from diffopt.check import known
from problems_catalogue import CappedSoftmax, Projection
from tolerances import EXACT_ALGEBRA

f64 = torch.float64
STRUCTURES = ("diagonal_plus_low_rank", "linear")
PROBLEM = known.quadratic_program(3, 5, 2, 4, bounds="both", batch=(3,))


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """Start with no graph, and leave none."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def outputs(solution: diffopt.Solution) -> Tensor:
    pieces = [getattr(solution, name) for name in measures.OUTPUTS[:-1]]
    return torch.cat([*pieces, solution.value.unsqueeze(-1)], -1)


def assert_same(compiled: Any, plain: Any, arguments: dict[str, Any]) -> None:
    """Compare values and gradients of two functions of the same keyword arguments."""
    found = []
    for function in (compiled, plain):
        leaves = measures.tracked(arguments)
        value = function(**leaves)
        weights = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).reshape(value.shape)
        (weights * value).sum().backward()
        found.append((value, measures.gradients(leaves)))
    (value, gradients), (wanted, expected) = found
    assert torch.equal(value, wanted)
    assert gradients.keys() == expected.keys() and expected
    for name, gradient in gradients.items():
        assert measures.relative(gradient, expected[name]) <= EXACT_ALGEBRA, name


class Model(nn.Module):
    """A network that computes q, and a layer with learned constraints."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, dtype=f64)
        structure = diffopt.QPStructure(
            3, Q=diffopt.fixed(torch.eye(3, dtype=f64)), A=diffopt.learned(torch.ones(1, 3, dtype=f64)),
            b=diffopt.learned(torch.ones(1, dtype=f64)), lower=0.0,
        )  # fmt: skip
        self.layer = diffopt.Layer(structure, **options)

    def forward(self, features: Tensor) -> Tensor:
        return self.layer(q=self.first(features))


def test_a_model_with_a_layer_is_one_graph_whatever_values_and_batch_sizes() -> None:
    model, graphs = Model(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=graphs, fullgraph=True, dynamic=True)
    for batch, scale in ((5, 1.0), (7, 100.0), (2, 1e-3), (33, 1.0)):
        features = scale * torch.randn(batch, 3, dtype=f64)
        found = []
        for function in (compiled, model):
            model.zero_grad()
            x = function(features)
            x.square().sum().backward()
            found.append([x, *(parameter.grad for parameter in model.parameters())])
        for got, expected in zip(*found, strict=True):
            assert got is not None and expected is not None and expected.any()
            assert measures.relative(got, expected) <= EXACT_ALGEBRA
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
    assert graphs.frame_count == 1


@pytest.mark.parametrize("executor", ["auto", pytest.param("torch", marks=pytest.mark.slow)])
def test_every_output_and_all_data_of_a_fixed_shape(executor: Any) -> None:
    settings = diffopt.Settings(executor=executor)

    def solve(**data: Tensor) -> Tensor:
        return outputs(diffopt.solve_qp(**data, settings=settings))  # type: ignore[arg-type]

    assert_same(torch.compile(solve, backend="aot_eager", fullgraph=True), solve, PROBLEM.arguments())


@pytest.mark.parametrize("rule", ["central", "minimum_norm"])
def test_kink_rules(rule: Any) -> None:
    data = known.degenerate_program(7, 4, 1, 3, batch=(2,), weak=1).arguments()

    def solve(**data: Tensor) -> Tensor:
        return diffopt.solve_qp(**data, settings=diffopt.Settings(kink_rule=rule)).x  # type: ignore[arg-type]

    assert_same(torch.compile(solve, backend="aot_eager", fullgraph=True), solve, data)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
def test_inductor() -> None:
    def solve(**data: Tensor) -> Tensor:
        return outputs(diffopt.solve_qp(**data)).tanh()  # type: ignore[arg-type]

    compiled = torch.compile(solve, backend="inductor", fullgraph=True)
    leaves, same = measures.tracked(PROBLEM.arguments()), measures.tracked(PROBLEM.arguments())
    value, expected = compiled(**leaves), solve(**same)
    assert measures.relative(value, expected) <= EXACT_ALGEBRA  # its own tanh has other last bits
    value.sum().backward()
    expected.sum().backward()
    for name, gradient in measures.gradients(leaves).items():
        assert measures.relative(gradient, same[name].grad) <= EXACT_ALGEBRA, name


@pytest.mark.parametrize("form", ["diagonal", *(pytest.param(f, marks=pytest.mark.slow) for f in STRUCTURES)])
def test_structures_of_the_hessian(form: str) -> None:
    generator = torch.Generator().manual_seed(0)
    d, U = 1 + torch.rand(4, generator=generator, dtype=f64), torch.randn(4, 2, generator=generator, dtype=f64)
    q = torch.randn(3, 4, generator=generator, dtype=f64)

    def solve(d: Tensor, U: Tensor, q: Tensor) -> Tensor:
        Q = {"diagonal": diffopt.Diagonal(d), "diagonal_plus_low_rank": diffopt.DiagonalPlusLowRank(d, U)}.get(form)
        return outputs(diffopt.solve_qp(Q, q, lower=-1.0, upper=1.0))

    assert_same(torch.compile(solve, backend="aot_eager", fullgraph=True), solve, {"d": d, "U": U, "q": q})


def test_a_problem_given_by_its_functions() -> None:
    layer = diffopt.Layer(CappedSoftmax(3))
    data = {
        "c": torch.tensor([[-1.0, 0.5, 0.0], [2.0, -0.25, 0.3]], dtype=f64),
        "cap": torch.tensor(0.4, dtype=f64),
    }

    def solve(c: Tensor, cap: Tensor) -> Tensor:
        return outputs(layer.solve(c=c, cap=cap))

    assert_same(torch.compile(solve, backend="aot_eager", fullgraph=True), solve, data)


def test_a_structure_of_ones_own_made_inside() -> None:
    data = {"point": torch.tensor([[1.0, 0.5], [3.0, -1.0]], dtype=f64), "a": torch.tensor([1.0, 1.5], dtype=f64)}

    def solve(point: Tensor, a: Tensor) -> Tensor:
        return diffopt.solve(Projection(), {"point": point, "a": a, "level": a.new_ones(())}).x

    assert_same(torch.compile(solve, backend="aot_eager", fullgraph=True), solve, data)


@pytest.mark.parametrize("named", [True, False])
def test_other_backends_by_name_and_as_instances(named: bool) -> None:
    backend = "scipy" if named else diffopt.backends.get("scipy")
    q = torch.tensor([[-1.0, 2.0]], dtype=f64)

    def solve(q: Tensor) -> Tensor:
        return diffopt.solve_qp(torch.eye(2, dtype=f64), q, lower=0.0, backend=backend).x

    assert_same(torch.compile(solve, backend="eager", fullgraph=True), solve, {"q": q})
    solution = torch.compile(
        lambda q: diffopt.solve_qp(torch.eye(2, dtype=f64), q, backend=backend), backend="eager", fullgraph=True
    )(q)
    assert solution.backend == "scipy" and torch.allclose(solution.value, -q.square().sum(-1) / 2)


def infeasible_second(q: Tensor, upper: Tensor, on_failure: Any) -> diffopt.Solution:
    return diffopt.solve_qp(torch.eye(2, dtype=f64), q, lower=0.0, upper=upper, on_failure=on_failure)


def test_a_failure_is_raised_when_the_graph_runs() -> None:
    compiled = torch.compile(lambda q, u: infeasible_second(q, u, "raise").x, backend="aot_eager", fullgraph=True)
    q, upper = torch.zeros(3, 2, dtype=f64), torch.ones(3, 2, dtype=f64)
    assert compiled(q, upper).shape == (3, 2)
    upper[1] = -1
    with pytest.raises(
        diffopt.SolveFailed, match=r"1 of 3 instances.*\n  batch index \[1\]: PRIMAL_INFEASIBLE"
    ) as caught:
        compiled(q, upper)
    assert caught.value.solution.ok.tolist() == [True, False, True]
    assert caught.value.solution.value[1].isnan()


def test_returned_failures_are_masked_and_unmasked_as_without_compilation() -> None:
    def solve(q: Tensor, upper: Tensor) -> tuple[Tensor, ...]:
        solution = infeasible_second(q, upper, "return")
        return solution.x, solution.value, solution.ok, solution.residuals.primal, solution.iterations

    q = torch.tensor([[-0.5, 1.0], [0.5, 0.5], [-2.0, 0.25]], dtype=f64, requires_grad=True)
    upper = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [0.5, 0.5]], dtype=f64)
    compiled = torch.compile(solve, backend="aot_eager", fullgraph=True)
    for masked in (True, False):
        found = []
        for function in (compiled, solve):
            x, value, ok, primal, iterations = function(q, upper)
            assert ok.tolist() == [True, False, True] and primal.shape == iterations.shape == (3,)
            total = x[ok].sum() + value[ok].sum() if masked else x.sum() + value.sum()
            found.append(torch.autograd.grad(total, q)[0])
        assert found[0][1].isnan().all() != masked
        assert torch.equal(found[0].nan_to_num(99.0), found[1].nan_to_num(99.0))


def test_second_derivatives_where_the_compiler_takes_them() -> None:
    data = known.quadratic_program(1, 3, 1, 2, bounds="upper").arguments()
    data = {name: value for name, value in data.items() if value is not None}

    def loss(**data: Tensor) -> Tensor:
        return outputs(diffopt.solve_qp(**data)).pow(3).sum()  # type: ignore[arg-type]

    found = []
    for function in (torch.compile(loss, backend="eager", fullgraph=True), loss):
        leaves = measures.tracked(data)
        first = torch.autograd.grad(function(**leaves), list(leaves.values()), create_graph=True)
        found.append(torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), list(leaves.values())))
    for got, expected in zip(*found, strict=True):
        assert measures.relative(got, expected) <= EXACT_ALGEBRA
    assert all(expected.any() for expected in found[1][:6])
    q = torch.zeros(2, dtype=f64, requires_grad=True)
    whole = torch.compile(lambda q: diffopt.solve_qp(torch.eye(2, dtype=f64), q).x, backend="aot_eager", fullgraph=True)
    (slope,) = torch.autograd.grad(whole(q).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):  # torch says so, of any model
        torch.autograd.grad(slope.sum(), q)


@pytest.mark.parametrize("transform", ["jvp", "grad", "vmap of grad", "dual"])
def test_transforms_inside_a_graph_are_refused_and_never_wrong(transform: str) -> None:
    def x(q: Tensor) -> Tensor:
        return diffopt.solve_qp(torch.eye(2, dtype=f64), q, lower=0.0).x

    inside = {
        "jvp": lambda q: torch.func.jvp(x, (q,), (q,))[1],
        "grad": lambda q: torch.func.grad(lambda q: x(q).sum())(q),
        "vmap of grad": lambda q: torch.func.vmap(torch.func.grad(lambda q: x(q).sum()))(q.expand(2, 2)),
        "dual": x,
    }[transform]
    compiled = torch.compile(inside, backend="eager", fullgraph=True)
    q = torch.tensor([-1.0, 2.0], dtype=f64)
    if transform == "dual":
        assert torch.equal(compiled(q), x(q))  # and the graph that is made here must not be taken below
    level = torch.autograd.forward_ad.dual_level() if transform == "dual" else contextlib.nullcontext()
    with level:
        argument = torch.autograd.forward_ad.make_dual(q, q) if transform == "dual" else q
        with pytest.raises(Exception, match="raise NotDifferentiableError"):  # in the compiler's own report
            compiled(argument)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # by torch.export.load of torch 2.11
def test_export_writes_a_layer_down() -> None:
    model, features = Model(), torch.randn(5, 3, dtype=f64)
    batch = torch.export.Dim("batch", min=2, max=100)
    exported = torch.export.export(model.eval(), (features,), dynamic_shapes=({0: batch},))
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    for program in (exported, torch.export.load(file)):
        others = torch.randn(8, 3, dtype=f64)
        assert torch.equal(program.module()(others), model(others))


def test_export_cannot_write_functions_down() -> None:
    c, cap = torch.zeros(2, 3, dtype=f64), torch.tensor(0.5, dtype=f64)
    with pytest.raises(
        diffopt.NotDifferentiableError, match="torch.export cannot write down a problem given by its func"
    ):
        torch.export.export(diffopt.Layer(CappedSoftmax(3)), (), {"c": c, "cap": cap})


def written(**options: Any) -> tuple[list[Tensor], str]:
    data = {name: value for name, value in PROBLEM.arguments().items() if value is not None}
    form = diffopt.QPForm(**data)
    spec = operators.written(form, True, "auto", diffopt.Settings(**options), "raise")
    return [tensor.clone().requires_grad_() for tensor in form.tensors().values()], spec


def test_torch_checks_the_operators() -> None:
    data, spec = written()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.diffopt.solve.default, (data, spec), test_utils=tests)
    *point, status, _, _, _ = (v.detach() for v in operators.solve(data, spec))
    torch.library.opcheck(torch.ops.diffopt.value.default, (data, point, status, spec), test_utils=tests)


def test_what_a_solve_leaves_goes_with_its_number_and_is_found_again_without_it() -> None:
    data, spec = written()
    gc.collect()
    before = len(operators._left)
    *point, _, _, _, number = operators.solve(data, spec)
    point = [v.detach() for v in point]
    gradients, needed = [torch.ones_like(point[0]), *[None] * 5], [True] * len(data)
    assert len(operators._left) == before + 1
    plain = [tensor.detach() for tensor in data]
    wanted = operators.pullback(number, plain, point, gradients, needed, spec)
    moved = number.clone()
    del number
    gc.collect()
    assert len(operators._left) == before
    found = operators.pullback(moved, plain, point, gradients, needed, spec)
    assert any(gradient.any() for gradient in wanted)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_graph_does_not_outlive_its_problem() -> None:
    problem, c = CappedSoftmax(3), torch.zeros(2, 3, dtype=f64)
    form = problem.standard_form({"c": c, "cap": torch.tensor(0.5, dtype=f64)})
    spec = operators.written(form, False, "auto", diffopt.Settings(), "raise")
    data = list(form.tensors().values())
    assert operators.solve(data, spec)[0].shape == (2, 3)
    twin = copy.copy(problem)
    assert living.find(id(twin)) is twin and living.find(id(problem)) is problem
    del problem, form
    operators.read.cache_clear()
    gc.collect()
    with pytest.raises(
        diffopt.BackendError, match="The problem that this graph was compiled or exported with lives no"
    ):
        operators.solve(data, spec)


def test_a_graph_does_not_outlive_its_backend() -> None:
    data, _ = written()
    form = diffopt.QPForm(data[0], data[1])
    spec = operators.written(form, False, diffopt.backends.get("scipy"), diffopt.Settings(), "raise")
    gc.collect()
    tensors = list(form.tensors().values())
    with pytest.raises(
        diffopt.BackendError, match="The backend instance that this graph was compiled or exported with"
    ):
        operators.solve(tensors, spec)


def test_a_hessian_of_ones_own_is_refused_in_words() -> None:
    class Mine(diffopt.Diagonal):
        pass

    form = diffopt.QPForm(Mine(torch.ones(2, dtype=f64)), torch.zeros(2, dtype=f64))
    with pytest.raises(diffopt.NotDifferentiableError, match="take Q as one of Dense, Diagonal, .*, not as Mine"):
        operators.written(form, False, "auto", diffopt.Settings(), "raise")
