"""``Settings(sync=False)``: nothing reads a value back, and the results are those of the ordinary mode."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import diffopt
from diffopt import BackendUnsupported, Settings, SettingsError, Status, waiting
from diffopt.solvers import cuda_executor
from diffopt.solvers.cuda_executor import CudaExecutor
from measures import relative
from solvers.cuda.shim import ShimLauncher

OUTPUTS = ("x", "s", "lam", "nu", "lam_lower", "lam_upper", "value")
f64 = torch.float64
Problem = dict[str, Any]  # tensors


FORBIDDEN = {
    "aten::_local_scalar_dense", "aten::is_nonzero", "aten::item", "aten::equal", "aten::nonzero", "aten::argwhere",
    "aten::nonzero_static", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
    "aten::repeat_interleave", "aten::allclose",
}  # fmt: skip
"""Operations that read values, or whose shapes depend on them."""


class NothingIsRead(TorchDispatchMode):
    """Fails where the host reads a value."""

    def __enter__(self) -> Any:
        self.patches = pytest.MonkeyPatch()
        for name in ("tolist", "numpy", "cpu"):  # these go past the dispatcher
            self.patches.setattr(Tensor, name, self.read)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.patches.undo()
        super().__exit__(*error)

    @staticmethod
    def read(*_: Any) -> Any:
        raise AssertionError("the host reads values")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        assert name not in FORBIDDEN, f"{name} reads values"
        masks = args[1] if name in ("aten::index", "aten::index_put", "aten::index_put_") else ()
        assert not any(v is not None and v.dtype == torch.bool for v in masks), f"{name} by a mask reads values"
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["cpu", "torch", "cuda"])
def executor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each executor; the kernels of the last one behind a host compiler's shim."""
    monkeypatch.setattr(cuda_executor, "_executor", CudaExecutor(ShimLauncher()))
    yield request.param


def problem(batch: int = 5, n: int = 7, m: int = 4, p: int = 2) -> Problem:
    """Return random programs of which the third cannot be solved: q is NaN."""
    g = torch.Generator().manual_seed(2)
    U, A, G = (torch.randn(batch, k, n, dtype=f64, generator=g) for k in (n, p, m))
    x, q = (torch.randn(batch, n, dtype=f64, generator=g) for _ in range(2))
    room = torch.rand(batch, m, dtype=f64, generator=g)
    q[2] = torch.nan
    data = {"Q": U @ U.mT + 0.1 * torch.eye(n, dtype=f64), "q": 3 * q, "A": A, "b": (A @ x[..., None])[..., 0]}
    return data | {"G": G, "h": (G @ x[..., None])[..., 0] + room, "lower": x - 0.5}


def solved(
    data: Problem, keep: Tensor, outputs: tuple[str, ...] = OUTPUTS, **settings: Any
) -> tuple[diffopt.Solution, dict[str, Tensor]]:
    """Solve, and differentiate a function of the outputs of those instances for which ``keep`` holds."""
    leaves = {name: v.clone().requires_grad_() for name, v in data.items()}
    solution = diffopt.solve_qp(**leaves, settings=Settings(**settings), on_failure="return")
    total = torch.zeros((), dtype=f64)
    for k, name in enumerate(outputs):
        v = getattr(solution, name)
        weight = torch.cos(torch.arange(float(v[0].numel()), dtype=v.dtype) + k).reshape(v[0].shape)
        # (What is NaN must not be multiplied by zero: its gradient has to be zero.)
        total = total + torch.where(keep.reshape(-1, *[1] * (v.dim() - 1)), v * weight, 0.0).sum()
    found = torch.autograd.grad(total, list(leaves.values()))
    return solution, dict(zip(leaves, found, strict=True))


GOOD = torch.tensor([True, True, False, True, True])


def test_nothing_is_read_forward_or_backward(executor: str) -> None:
    with NothingIsRead():
        solution, gradients = solved(problem(), GOOD, executor=executor, sync=False, max_iterations=25)
    assert solution.executor.startswith(executor)
    assert all(bool(v[GOOD].isfinite().all()) for v in gradients.values())


def test_the_ordinary_mode_does_read(executor: str) -> None:
    with NothingIsRead(), pytest.raises(AssertionError, match="reads values"):
        solved(problem(), GOOD, executor=executor)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_results_are_those_of_the_ordinary_mode(executor: str, dtype: torch.dtype) -> None:
    data = {name: v.to(dtype) for name, v in problem().items()}
    plain, gradients = solved(data, GOOD, executor=executor)
    other, others = solved(data, GOOD, executor=executor, sync=False, max_iterations=25)
    assert torch.equal(plain.ok, GOOD) and torch.equal(other.ok, GOOD)
    left = executor == "cuda"  # the ordinary mode leaves the third to torch operations
    assert other.status[2] == (Status.UNSOLVED if left else Status.NONFINITE_INPUT) and plain.status[2] != 0
    for name in (*OUTPUTS, "iterations", "weakly_active", "dependent", "status"):
        assert torch.equal(getattr(other, name)[GOOD], getattr(plain, name)[GOOD]), name
    for mine, theirs in zip(other.residuals, plain.residuals, strict=True):
        assert torch.equal(mine[GOOD], theirs[GOOD])
    assert other.x[2].isnan().all() and (other.certificate is None or bool(other.certificate.nu.isnan().all()))
    for name, gradient in others.items():
        # (In torch operations the factor of the forward pass does not serve the backward pass: rounding.)
        error = relative(gradient[GOOD], gradients[name][GOOD])
        assert error <= (0 if executor != "torch" else 1e-12 if dtype == f64 else 1e-6), (name, error)
        assert bool((gradient[2] == 0).all())


def test_a_failed_instance_has_no_gradient(executor: str) -> None:
    data = problem()
    data["A"], data["G"] = data["A"][0], data["G"][0]
    data["h"] = data["h"].abs() + 9
    data["b"] = data["b"][0]
    for outputs in (("x",), ("lam",), OUTPUTS):
        _, gradients = solved(data, GOOD | True, outputs, executor=executor, sync=False, max_iterations=25)
        assert all(bool(gradients[name][2].isnan().all()) for name in ("q", "Q"))
        assert all(bool(gradients[name].isnan().all()) for name in ("A", "b", "G"))  # shared with it
        assert bool(gradients["q"][GOOD].isfinite().all())
    _, gradients = solved(data, GOOD, executor=executor, sync=False, max_iterations=25)
    assert all(bool(v.isfinite().all()) for v in gradients.values())


def test_a_budget_that_is_too_small(executor: str) -> None:
    settings = Settings(executor=executor, sync=False, max_iterations=1)
    solution = diffopt.solve_qp(**problem(n=12, m=10), settings=settings, on_failure="return")
    assert not solution.ok.all()
    assert not torch.isin(solution.status[~solution.ok], torch.tensor([1, 2])).any()


def test_inside_vmap_and_torch_compile() -> None:
    data, names = problem(), ("Q", "q", "A", "b", "G", "h", "lower")
    settings = Settings(sync=False)

    def x(*values: Tensor) -> Tensor:
        return diffopt.solve_qp(**dict(zip(names, values, strict=True)), settings=settings, on_failure="return").x

    expected = diffopt.solve_qp(**data, on_failure="return").x
    values = [data[name] for name in names]
    assert torch.equal(torch.func.vmap(x)(*values)[GOOD], expected[GOOD])
    assert torch.equal(torch.compile(x, backend="eager", fullgraph=True)(*values)[GOOD], expected[GOOD])


def test_an_infeasible_instance_is_not_proven_so_at_any_price(executor: str) -> None:
    data = problem()
    data["q"][2] = 0.0
    data["h"][1] -= 100
    solution = diffopt.solve_qp(**data, settings=Settings(executor=executor, sync=False), on_failure="return")
    assert solution.ok.tolist() == [True, False, True, True, True]


def test_what_does_not_go_together() -> None:
    settings = Settings(sync=False)
    with pytest.raises(SettingsError, match=r"cannot raise for a failed instance.*on_failure='return'"):
        diffopt.solve_qp(**problem(), settings=settings)
    with pytest.raises(SettingsError, match="cannot raise"):
        diffopt.Layer(diffopt.QPStructure(n=2, Q=1.0), settings=settings)
    with pytest.raises(SettingsError, match="`on_infeasible` looks at values"):
        diffopt.solve_qp(**problem(), settings=settings, on_failure="return", on_infeasible="closest")
    with pytest.raises(BackendUnsupported, match=r"'scipy' computes on the host.*'pdipm'"):
        diffopt.solve_qp(**problem(), backend="scipy", settings=settings, on_failure="return")
    for values in (dict(kink_rule="central"), dict(relaxation=0.1)):
        with pytest.raises(SettingsError, match="`sync` = False is out of range. Expected True with kink rules"):
            Settings(sync=False, **values)


def test_what_waits_is_decided_for_one_thread_and_inside_only() -> None:
    none = torch.zeros(2, dtype=torch.bool)
    assert waiting.allowed() and not waiting.some(none) and waiting.every(~none)
    with pytest.raises(KeyError), waiting.allow(False):
        assert waiting.some(none) and not waiting.every(~none)
        with waiting.allow(True):
            assert not waiting.some(none)
        raise KeyError
    assert waiting.allowed()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", [7, 40, 150])
def test_captured_in_a_graph(n: int, dtype: torch.dtype) -> None:  # pragma: cuda
    """Forward and backward are captured once, and replayed on other data."""
    first, second = ({k: v.to("cuda", dtype) for k, v in problem(6, n, n // 2, 2).items()} for _ in range(2))
    for data in (first, second):
        data["q"][2] = data["q"][1]
    second["q"] = second["q"].flip(0).contiguous()
    layer_data = {name: v.clone().requires_grad_() for name, v in first.items()}
    settings = Settings(sync=False, executor="cuda")

    def step() -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        solution = diffopt.solve_qp(**layer_data, settings=settings, on_failure="return")
        gradients = torch.autograd.grad(solution.x.square().sum() + solution.lam.sum(), list(layer_data.values()))
        return solution.x, solution.status, gradients

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles the kernels
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x, status, gradients = step()
    for data in (second, first):
        with torch.no_grad():
            for name, leaf in layer_data.items():
                leaf.copy_(data[name])
        graph.replay()
        got = [v.clone() for v in (x, status, *gradients)]
        expected_x, expected_status, expected = step()
        for mine, theirs in zip(got, (expected_x, expected_status, *expected), strict=True):
            assert torch.equal(mine, theirs)
