"""A layer is a module like any other: it copies, saves, moves, and takes part in what torch does with modules.

Each test says so with both executors and both dtypes, as ``make`` gives them, unless neither can make a difference.
"""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

import diffopt
import measures
from diffopt import Layer, ParameterError, QPStructure, Settings, SolveFailed, fixed, given, learned, precision
from tolerances import GRADIENT, SOLUTION

N = 4
Make = Callable[..., Layer]


@pytest.fixture(params=["torch", "cpu"])
def make(request: pytest.FixtureRequest, dtype: torch.dtype) -> Make:
    """Return what makes equal layers; their executor and dtype vary over the tests."""

    def layer(Q: Any = None, **options: Any) -> Layer:
        generator = torch.Generator().manual_seed(1)
        root = torch.randn(N, N, generator=generator, dtype=torch.float64).to(dtype)
        structure = QPStructure(
            N,
            Q=learned(root @ root.mT + torch.eye(N, dtype=dtype)) if Q is None else Q,
            q=given(),
            A=learned(torch.ones(1, N, dtype=dtype)),
            b=fixed(torch.ones(1, dtype=dtype)),
            lower=0.0,
        )
        return Layer(structure, settings=Settings(executor=request.param), **options)

    return layer


def costs(layer: Layer, count: int = 6) -> Tensor:
    """Return linear costs of the layer's dtype; every second component of x ends at its bound or so."""
    generator = torch.Generator().manual_seed(2)
    return 2 * torch.randn(count, N, generator=generator, dtype=torch.float64).to(layer.b.dtype)  # type: ignore[arg-type]


def loss(x: Tensor) -> Tensor:
    return (x - torch.linspace(0, 1, N, dtype=x.dtype)).square().sum()


def gradients(layer: nn.Module, q: Tensor) -> dict[str, Tensor]:
    """Return the gradients of the loss in the parameters that ask for one, by name; leaves none behind."""
    named = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss(layer(q=q)), list(named.values()))
    return dict(zip(named, found, strict=True))


def assert_same(one: nn.Module, other: nn.Module, q: Tensor) -> None:
    """The same solution and gradients, to the last bit, from parameters of its own."""
    assert torch.equal(one(q=q), other(q=q))
    mine, theirs = gradients(one, q), gradients(other, q)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert all(g.abs().max() > 1e-3 for g in mine.values())  # (a zero would equal any other)
    assert not {p.data_ptr() for p in one.parameters()} & {p.data_ptr() for p in other.parameters()}


def through_pickle(layer: Layer) -> Layer:
    return pickle.loads(pickle.dumps(layer))


def through_file(layer: Layer) -> Layer:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# ------------------------------------------------------------------------------ copies, files, moves


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_file])
def test_a_copy_solves_and_learns_alike(make: Make, copied: Callable[[Layer], Layer]) -> None:
    layer = make()
    q = costs(layer)
    loss(layer(q=q)).backward()  # after a solve, with gradients in place
    twin = copied(layer)
    assert_same(layer, twin, q)
    assert twin.settings.executor == layer.settings.executor
    with torch.no_grad():
        twin.get_parameter("A").mul_(2)
    assert not torch.equal(twin(q=q), layer(q=q))


def test_a_state_dict_passes_through_a_file_of_weights_only(make: Make) -> None:
    layer, fresh = make(), make(Q=learned(torch.eye(N)))
    q = costs(layer)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    stored = torch.load(file, weights_only=True)
    assert list(stored) == ["Q", "A", "b"]  # learned ones, then the fixed one
    fresh.to(layer.get_parameter("A").dtype).load_state_dict(stored)
    assert_same(layer, fresh, q)
    assigned = make()
    assigned.load_state_dict(stored, assign=True)
    assert torch.equal(assigned(q=q), layer(q=q))


def test_a_declaration_computed_from_other_tensors_is_no_obstacle() -> None:
    root = torch.eye(N, requires_grad=True)
    layer = Layer(QPStructure(N, Q=learned(root @ root.mT), q=given(), lower=0.0))
    q = torch.tensor([-1.0, 0.5, -2.0, 1.0])
    assert torch.equal(copy.deepcopy(layer)(q=q), layer(q=q))


def test_it_moves_to_another_dtype_and_back(make: Make) -> None:
    layer = make().double()
    q = costs(layer)
    twice = gradients(layer, q)
    assert layer(q=q).dtype == torch.float64 and all(g.dtype == torch.float64 for g in twice.values())
    layer.to(torch.float32)
    for name, gradient in gradients(layer, q.float()).items():
        assert gradient.dtype == torch.float32
        assert measures.relative(gradient, twice[name]) <= GRADIENT[torch.float32], name
    with pytest.raises(diffopt.DtypeError, match="`Q` has dtype torch.float16. Expected torch.float32 or"):
        layer.half()(q=q.half())


def test_a_solution_without_a_graph_travels(make: Make) -> None:
    layer = make()
    with torch.no_grad():
        solution = layer.solve(q=costs(layer))
    for twin in (pickle.loads(pickle.dumps(solution)), copy.deepcopy(solution)):
        for name in measures.OUTPUTS:
            assert torch.equal(getattr(twin, name), getattr(solution, name)), name
        assert repr(twin) == repr(solution) and torch.equal(twin.iterations, solution.iterations)


def test_a_failure_travels_with_its_solution() -> None:
    with pytest.raises(SolveFailed) as caught:
        diffopt.solve_qp(torch.eye(2), torch.zeros(2), lower=1.0, upper=0.0)
    twin = pickle.loads(pickle.dumps(caught.value))
    assert str(twin) == str(caught.value) and torch.equal(twin.solution.status, caught.value.solution.status)


# ------------------------------------------------------------------------------ devices (meta stands for a second one)


def test_a_tensor_on_another_device_is_named(make: Make) -> None:
    layer = make()
    q = costs(layer)
    with pytest.raises(diffopt.DeviceError, match="`q` is on meta but `Q` is on cpu.*Move it, for example `q.to"):
        layer(q=q.to("meta"))
    with pytest.raises(diffopt.DeviceError, match="`q` is on cpu but `Q` is on meta"):
        layer.to("meta")(q=q)
    with pytest.raises(diffopt.BackendUnsupported, match="pdipm: runs on cpu, cuda, the data is on meta"):
        layer(q=q.to("meta"))


class LeastSquares(diffopt.QuadraticProgram):
    """minimise |Mx - y|^2 / 2 + |x|^2 / 2 subject to x >= 0: y and M meet before there is a form."""

    def form(self, y: Tensor, M: Tensor) -> diffopt.QPForm:
        Q = M.mT @ M + torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
        return diffopt.QPForm(Q, -(y.unsqueeze(-1) * M).sum(-2), lower=0.0)


def test_a_parameter_on_another_device_is_named_where_ones_own_code_meets_it() -> None:
    layer = Layer(LeastSquares(M=learned(torch.ones(2, 3))))
    with pytest.raises(diffopt.DeviceError, match="`M` is on cpu but `y` is on meta"):
        layer(y=torch.ones(2, device="meta"))
    with pytest.raises(RuntimeError, match="shapes|size"):  # what is no matter of devices stays torch's own error
        layer(y=torch.ones(5))


# ------------------------------------------------------------------------------ what learns


def test_parts_can_be_frozen(make: Make) -> None:
    layer = make()
    q = costs(layer)
    whole = gradients(layer, q)
    layer.get_parameter("Q").requires_grad_(False)
    part = gradients(layer, q)
    assert list(part) == ["A"] and torch.equal(part["A"], whole["A"])
    layer.requires_grad_(False)
    assert not layer(q=q).requires_grad
    free = q.clone().requires_grad_()
    loss(layer(q=free)).backward()
    assert free.grad is not None and free.grad.abs().max() > 1e-3 and layer.get_parameter("A").grad is None


class PositiveDefinite(nn.Module):
    """From any square matrix to a positive definite one."""

    def forward(self, root: Tensor) -> Tensor:
        return root @ root.mT + torch.eye(N, dtype=root.dtype)

    def right_inverse(self, Q: Tensor) -> Tensor:
        return torch.linalg.cholesky(Q - torch.eye(N, dtype=Q.dtype))


def test_a_parametrised_part_gets_the_gradient_of_its_original(make: Make) -> None:
    layer, plain = make(), make()
    q = costs(layer)
    parametrize.register_parametrization(layer, "Q", PositiveDefinite())
    assert measures.relative(layer(q=q), plain(q=q)) <= SOLUTION[q.dtype]
    found = gradients(layer, q)
    root = layer.get_parameter("parametrizations.Q.original").detach()
    # Q = R R' + I, and dl/dQ is symmetric: dl/dR = 2 (dl/dQ) R.
    expected = 2 * gradients(plain, q)["Q"] @ root
    assert measures.relative(found["parametrizations.Q.original"], expected) <= GRADIENT[q.dtype]
    twin = make()
    parametrize.register_parametrization(twin, "Q", PositiveDefinite())
    twin.load_state_dict(layer.state_dict())
    assert_same(layer, twin, q)


def test_an_average_of_its_weights_is_a_layer(make: Make) -> None:
    layer = make()
    q, first = costs(layer), copy.deepcopy(layer)
    average = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    average.update_parameters(layer)  # the first one is taken as it is
    with torch.no_grad():
        layer.get_parameter("A").add_(1)
    average.update_parameters(layer)
    with torch.no_grad():
        first.get_parameter("A").add_(0.25)
    assert torch.equal(average(q=q), first(q=q)) and not torch.equal(average(q=q), layer(q=q))


# ------------------------------------------------------------------------------ how it is called


def test_it_stands_in_a_sequence(make: Make) -> None:
    layer = make()
    dtype = layer.get_parameter("A").dtype
    net = nn.Sequential(nn.Linear(3, N, dtype=dtype), layer, nn.Linear(N, 2, dtype=dtype))
    features = torch.randn(5, 3, dtype=dtype)
    out = net(features)
    assert torch.equal(out, net[2](layer(q=net[0](features))))
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


def test_values_without_a_name_go_by_the_order_of_the_problem() -> None:
    layer = Layer(QPStructure(2, Q=given(), q=given(), G=torch.ones(1, 2), h=given()))
    assert layer.problem.given_names() == ("Q", "q", "h")
    Q, q, h = torch.eye(2), torch.tensor([-1.0, -2.0]), torch.tensor([1.0])
    expected = layer(Q=Q, q=q, h=h)
    assert torch.equal(layer(Q, q, h), expected) and torch.equal(layer.solve(Q, q, h=h).x, expected)
    with pytest.raises(ParameterError, match=r"got 4 values without a name. A call gives 3 \(`Q`, `q`, `h`\)"):
        layer(Q, q, h, h)
    with pytest.raises(ParameterError, match="`q` was given twice, by its place and by its name"):
        layer(Q, q, q=q, h=h)
    with pytest.raises(ParameterError, match="needs `h`, which was not given"):
        layer(Q, q)


def test_a_functional_call_takes_other_parameters(make: Make) -> None:
    layer, other = make(), make()
    q = costs(layer)
    with torch.no_grad():
        other.get_parameter("A").mul_(0.5)
    parameters = {name: p.detach() for name, p in other.named_parameters()}
    assert torch.equal(torch.func.functional_call(layer, parameters, (q,)), other(q=q))

    found = torch.func.grad(lambda p: loss(torch.func.functional_call(layer, p, (q,))))(parameters)
    for name, expected in gradients(other, q).items():
        assert measures.relative(found[name], expected) <= GRADIENT[q.dtype]


def test_an_ensemble_is_one_batch(make: Make) -> None:
    models = [make(), make(), make()]
    for scale, model in zip((1.0, 0.5, 2.0), models, strict=True):
        with torch.no_grad():
            model.get_parameter("Q").mul_(scale)
            model.get_parameter("A").mul_(1.5 - 0.5 * scale)
    q = costs(models[0])
    parameters, buffers = torch.func.stack_module_state(models)  # type: ignore[arg-type]
    base = copy.deepcopy(models[0])

    def run(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(base, (parameters, buffers), (q,))

    x = torch.func.vmap(run)(parameters, buffers)
    assert x.shape == (3, len(q), N)
    found = torch.autograd.grad(sum(loss(v) for v in x), list(parameters.values()))  # type: ignore[arg-type]
    for i, model in enumerate(models):
        assert measures.relative(x[i], model(q)) <= SOLUTION[q.dtype]
        expected = gradients(model, q)
        for name, gradient in zip(parameters, found, strict=True):
            assert measures.relative(gradient[i], expected[name]) <= GRADIENT[q.dtype], (i, name)


def test_hooks_are_called_with_what_passes(make: Make) -> None:
    layer = make()
    q = costs(layer).requires_grad_()
    (free,) = torch.autograd.grad(loss(layer(q)), q)
    seen: dict[str, Any] = {}
    layer.register_forward_pre_hook(lambda module, args: seen.update(given=args))
    layer.register_forward_hook(lambda module, args, output: seen.update(x=output))
    layer.register_full_backward_pre_hook(lambda module, out: seen.update(out=out))
    layer.register_full_backward_hook(lambda module, into, out: (2 * into[0],))
    x = layer(q)
    loss(x).backward()
    assert seen["given"][0] is q and torch.equal(seen["x"], x)
    (incoming,) = seen["out"]
    assert torch.equal(incoming, 2 * (x.detach() - torch.linspace(0, 1, N, dtype=x.dtype)))
    assert q.grad is not None and torch.equal(q.grad, 2 * free)  # what the hook made of it


def test_inference_mode_changes_no_bit(make: Make) -> None:
    layer = make()
    q = costs(layer)
    with torch.inference_mode():
        solution = layer.solve(q=q)
    assert solution.x.is_inference() and not solution.x.requires_grad
    ordinary = layer.solve(q=q)
    for name in measures.OUTPUTS:
        assert torch.equal(getattr(solution, name), getattr(ordinary, name)), name
    loss(ordinary.x).backward()  # nothing that was made in inference mode has stayed behind


# ------------------------------------------------------------------------------ autocast


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_casts_half_precision_up_and_solves_outside(make: Make, half: torch.dtype) -> None:
    layer = make()
    q = costs(layer).to(half).requires_grad_()
    exact = q.detach().to(layer.get_parameter("A").dtype).requires_grad_()
    expected = layer.solve(q=exact)
    outputs = {name: getattr(expected, name) for name in measures.OUTPUTS}  # (the value is computed on access)
    with torch.autocast("cpu", dtype=half):
        solution = layer.solve(q=q)
        for name, output in outputs.items():
            assert torch.equal(getattr(solution, name), output), name
        assert (layer.get_parameter("A") @ solution.x.mT).dtype in (half, torch.float64)  # the region goes on
    loss(solution.x).backward()
    loss(expected.x).backward()
    assert q.grad is not None and exact.grad is not None and q.grad.dtype == half
    assert torch.equal(q.grad, exact.grad.to(half))
    with pytest.raises(diffopt.DtypeError, match="`q` has dtype"):
        layer(q=q)  # outside a region nothing is cast


def test_autocast_reaches_neither_parametrisations_nor_ones_own_code(dtype: torch.dtype) -> None:
    layer = Layer(LeastSquares(M=learned(torch.randn(5, N, dtype=dtype))))
    parametrize.register_parametrization(layer, "M", nn.Softplus())
    y = torch.randn(5, dtype=dtype)
    expected = layer(y=y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(y=y), expected)


def test_autocast_of_functions_and_structured_matrices() -> None:
    d, U, q = torch.rand(N) + 1, torch.randn(N, 1), torch.randn(3, N)
    half = [v.bfloat16() for v in (d, U, q)]
    wide = [v.float() for v in half]
    problem = LeastSquares(M=fixed(torch.ones(2, N)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = diffopt.solve_qp(diffopt.DiagonalPlusLowRank(half[0], half[1]), half[2], lower=0.0)
        pair = Layer(QPStructure(N, Q=given("diagonal_plus_low_rank"), lower=0.0))(Q=(half[0], half[1]), q=half[2])
        own = diffopt.solve(problem, {"y": half[2][:, :2]})
    full = diffopt.solve_qp(diffopt.DiagonalPlusLowRank(wide[0], wide[1]), wide[2], lower=0.0)
    assert torch.equal(low.x, full.x) and torch.equal(pair, full.x) and low.x.dtype == torch.float32
    assert torch.equal(low.value, full.value)
    assert torch.equal(own.x, diffopt.solve(problem, {"y": wide[2][:, :2]}).x)


def test_autocast_is_seen_without_the_question_that_torch_keeps_to_itself() -> None:
    assert not precision._lowered() and not precision.lowered()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert precision._lowered() and precision.lowered()
        with precision.full_precision():
            assert not precision._lowered() and not precision.lowered()


# ------------------------------------------------------------------------------ workers of a DataLoader


class Solved(Dataset[Tensor]):
    """Items that are solutions, found in the process that asks for them."""

    def __init__(self, layer: Layer, q: Tensor) -> None:
        self.layer, self.q = layer, q

    def __len__(self) -> int:
        return len(self.q)

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            return self.layer(q=self.q[index])


# Python warns of any fork beside other threads since 3.12; that solves survive one is what is tested.
forked = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def collected(layer: Layer, q: Tensor, **options: Any) -> Tensor:
    loader = DataLoader(Solved(layer, q), batch_size=2, **options)
    return torch.cat(list(loader))


@forked
def test_workers_that_are_forked_solve(make: Make) -> None:
    layer = make()
    q = costs(layer)
    loss(layer(q=q)).backward()  # the parent has solved, with threads of its own
    x = collected(layer, q, num_workers=2, multiprocessing_context="fork")
    assert torch.equal(x, collected(layer, q))


def test_workers_that_start_afresh_solve() -> None:
    layer = Layer(QPStructure(N, q=given(), Q=torch.eye(N), lower=0.0))
    q = torch.randn(4, N)
    x = collected(layer, q, num_workers=1, multiprocessing_context="spawn")
    assert torch.equal(x, collected(layer, q)) and torch.allclose(x, (-q).clamp_min(0))


@forked
def test_a_failure_in_a_worker_arrives_as_what_it_is() -> None:
    layer = Layer(QPStructure(1, Q=torch.eye(1), q=given(), lower=1.0, upper=0.0))
    with pytest.raises(SolveFailed, match="Caught SolveFailed in DataLoader worker(.*\n)*.*PRIMAL_INFEASIBLE"):
        collected(layer, torch.zeros(2, 1), num_workers=1, multiprocessing_context="fork")
