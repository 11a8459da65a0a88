"""A solution keeps its answer packed; whoever takes it apart, and where, sees the same."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import diffopt
from diffopt.packed import Arrangement, Packed

f64 = torch.float64


def problem(requires_grad: bool = False) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    U, q, G, A = (torch.randn(*s, dtype=f64, generator=g) for s in ((2, 5, 5), (2, 5), (2, 4, 5), (2, 1, 5)))
    data = {
        "Q": U @ U.mT + torch.eye(5, dtype=f64),
        "q": q,
        "A": A,
        "b": A.sum(-1) / 9,
        "G": G,
        "h": 0.1 + 0 * q[:, :4],
    }
    return {name: v.requires_grad_(requires_grad) for name, v in data.items()}


@pytest.mark.parametrize("make", [Packed.empty, Packed.sparing])
def test_every_piece_has_its_place(make: Callable[[Arrangement, Tensor], Packed]) -> None:
    batch, n, p, m = torch.Size((2, 3)), 4, 1, 2
    arrangement = Arrangement(batch, n, p, m)
    packed = make(arrangement, torch.zeros(1, dtype=torch.float32))
    places = packed.places()
    assert packed.rest.dtype == torch.float32 and packed.report.dtype == f64
    packed.rest.copy_(torch.arange(packed.rest.numel()))
    pieces = [packed.s, packed.nu, packed.lam, packed.lam_lower, packed.lam_upper]
    assert [tuple(v.shape) for v in pieces] == [(2, 3, m), (2, 3, p), (2, 3, m), (2, 3, n), (2, 3, n)]
    # Together they are all of it, in this order, and views.
    assert torch.equal(torch.cat([v.flatten() for v in pieces]), packed.rest)
    assert all(v.untyped_storage().data_ptr() == packed.rest.untyped_storage().data_ptr() for v in pieces)
    vectors = [packed.x, *pieces, packed.residuals, packed.counts, packed.status]
    assert places == tuple(v.data_ptr() for v in vectors) == packed.places()
    assert (packed.residuals.shape, packed.counts.shape, packed.status.shape) == ((3, 2, 3), (3, 2, 3), (2, 3))
    assert (packed.counts.dtype, packed.status.dtype) == (torch.int64, torch.int8)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_is_read_first_where_nothing_is_recorded_has_its_graph(mode: type) -> None:
    data = problem(requires_grad=True)
    expected = torch.autograd.grad(diffopt.solve_qp(**data).lam.square().sum(), data["h"])[0]
    solution = diffopt.solve_qp(**data)
    with mode():
        first = solution.lam
    assert first.requires_grad and solution.lam is first
    assert torch.equal(torch.autograd.grad(solution.lam.square().sum(), data["h"])[0], expected)


def test_what_is_read_inside_a_transform_does_not_stay_there() -> None:
    solution = diffopt.solve_qp(**problem())
    inside = torch.func.grad(lambda t: (t * solution.lam).sum())(torch.tensor(2.0, dtype=f64))
    assert torch.allclose(inside, solution.lam.sum())
    assert not torch._C._functorch.is_functorch_wrapped_tensor(solution.lam)  # pyright: ignore[reportAttributeAccessIssue]
    torch.func.vmap(lambda t: t * solution.nu.sum())(torch.ones(3))
    assert solution.nu.shape == (2, 1) and float(solution.nu.sum()) == float(diffopt.solve_qp(**problem()).nu.sum())


def through_file(solution: diffopt.Solution) -> diffopt.Solution:
    file = io.BytesIO()
    torch.save(solution, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_copies_have_everything() -> None:
    solution = diffopt.solve_qp(**problem())
    for twin in (
        *(copy.deepcopy(solution), copy.copy(solution)),
        *(pickle.loads(pickle.dumps(solution)), through_file(solution)),
    ):
        for name in ("x", "s", "lam", "nu", "lam_lower", "lam_upper", "status", "iterations", "value"):
            assert torch.equal(getattr(twin, name), getattr(solution, name)), name
        assert torch.equal(twin.residuals.gap, solution.residuals.gap) and twin.executor == solution.executor


def test_a_file_holds_the_values_of_a_solution_with_a_graph() -> None:
    solution = diffopt.solve_qp(**problem(requires_grad=True))
    assert torch.equal(through_file(solution).lam, solution.lam)


def test_fields_that_are_still_packed_are_listed() -> None:
    wanted = {"x", "s", "nu", "lam", "lam_lower", "lam_upper", "status", "report"}
    assert wanted <= set(dir(diffopt.solve_qp(**problem())))


def test_an_unknown_field_is_an_ordinary_error() -> None:
    with pytest.raises(AttributeError, match="'Solution' object has no attribute 'lambda_'"):
        diffopt.solve_qp(**problem()).lambda_  # noqa: B018


def test_gradients_of_multipliers_alone_and_together_agree() -> None:
    data = problem(requires_grad=True)
    names = ("x", "s", "lam", "nu", "lam_lower", "lam_upper")
    solution = diffopt.solve_qp(**data)
    together = torch.autograd.grad(sum(getattr(solution, k).sin().sum() for k in names), list(data.values()))
    parts = [torch.zeros_like(v) for v in data.values()]
    for name in names:
        one = getattr(diffopt.solve_qp(**data), name).sin().sum()
        found = torch.autograd.grad(one, list(data.values()), materialize_grads=True)
        parts = [a + b for a, b in zip(parts, found, strict=True)]
    for a, b in zip(together, parts, strict=True):
        assert torch.allclose(a, b, atol=1e-12)
