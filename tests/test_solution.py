import pytest
import torch
from torch.utils import _pytree as pytree

import diffopt
from diffopt import Settings
from diffopt.solution import REMEDIES, Residuals, Status, status_counts


def solved(**kwargs):
    q = torch.tensor([[-1.0, 2.0], [3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    return q, diffopt.solve_qp(torch.eye(2, dtype=torch.float64), q, lower=0.0, **kwargs)


def test_fields_and_repr():
    _, solution = solved()
    assert solution.ok.tolist() == [True, True] and solution.status.dtype == torch.int8
    assert solution.s.shape == (2, 0) and solution.nu.shape == (2, 0) and solution.lam_upper.shape == (2, 2)
    text = repr(solution)
    assert "x=(2, 2)" in text and "SOLVED: 2" in text and "pdipm/cpu:dual" in text
    assert solution.iterations.dtype == torch.int64


def test_pytree_round_trip_keeps_the_value():
    _, solution = solved()
    leaves, spec = pytree.tree_flatten(solution)
    again = pytree.tree_unflatten(leaves, spec)
    assert torch.equal(again.value, solution.value) and again.backend == "pdipm"
    doubled = pytree.tree_map(lambda t: t if t is None else t * 2, solution)
    assert torch.equal(doubled.x, 2 * solution.x) and torch.equal(doubled.value, 2 * solution.value)


def test_it_prints_where_no_value_can_be_looked_at():
    texts = []

    def mapped(q):
        solution = diffopt.solve_qp(torch.eye(2, dtype=torch.float64), q, lower=0.0)
        texts.append(repr(solution))
        return solution.x

    torch.func.vmap(mapped)(torch.ones(3, 2, dtype=torch.float64))
    assert texts == ["Solution(x=(2,), status not known here, pdipm/cpu:dual)"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "how",
    [
        *({}, {"settings": Settings(executor="torch")}, {"settings": Settings(relaxation=0.1)}),
        *({"settings": Settings(selection="minimum_norm")}, {"on_infeasible": "closest"}, {"backend": "scipy"}),
    ],
)
def test_value_keeps_its_graph_when_first_read_without_one(mode, how):
    q = torch.tensor([1.0, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    data = dict(Q=None, q=q, A=torch.ones(1, 3, dtype=torch.float64), b=1.0, lower=0.0)
    solution = diffopt.solve_qp(**data, **how)  # type: ignore[arg-type]
    with mode():
        before = solution.value
    (grad,) = torch.autograd.grad(before.sum(), q)
    assert torch.allclose(grad, solution.x)
    with mode():
        plain = diffopt.solve_qp(**data, **how)  # type: ignore[arg-type]
        assert not plain.x.requires_grad
    assert not plain.value.requires_grad and torch.equal(plain.value, before)


def test_words():
    assert Status.UNSOLVED == 0 and len(Status) == 8
    assert set(REMEDIES) == set(Status) - {Status.SOLVED, Status.ALMOST_SOLVED}
    assert status_counts(torch.tensor([1, 1, 4])) == "SOLVED: 2, PRIMAL_INFEASIBLE: 1"
    assert Residuals(torch.tensor(1.0), torch.tensor(3.0), torch.tensor(2.0)).worst() == 3


@pytest.mark.parametrize("how", [{"executor": "torch"}, {"executor": "cpu"}, {"selection": "minimum_norm"}])
@pytest.mark.parametrize("grad", [True, False])
def test_a_value_is_never_computed_from_changed_data(how, grad):
    def fresh():
        # (No curvature in x_1, and no cost: a selection has something to do.)
        Q, q = torch.diag(torch.tensor([1.0, 0.0]).double()), torch.tensor([-1.0, 0.0], dtype=torch.float64)
        return Q, q, diffopt.solve_qp(Q.requires_grad_(grad), q, lower=0.0, upper=2.0, settings=Settings(**how))

    Q, q, solution = fresh()
    with torch.no_grad():
        Q.mul_(2)  # as an optimizer does
    with pytest.raises(diffopt.ChangedDataError, match="`Q` was changed in place after the solve.*Read `value` right"):
        _ = solution.value
    Q, q, solution = fresh()
    q.add_(1)
    with pytest.raises(diffopt.ChangedDataError, match="`q` was changed"):
        _ = solution.value
    Q, q, solution = fresh()
    with torch.no_grad():
        solution.x.add_(1)
    with pytest.raises(diffopt.ChangedDataError, match="`x` was changed"):
        _ = solution.value
    Q, q, solution = fresh()
    first = solution.value
    q.add_(1)
    assert solution.value is first and float(first.detach()) == -0.5
    Q, q, solution = fresh()
    q.untyped_storage().resize_(0)
    with pytest.raises(diffopt.ChangedDataError, match="`q` was freed .*let FSDP shard the module around the layer"):
        _ = solution.value
