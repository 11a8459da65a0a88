"""Gradients of what has failed."""

import pytest
import torch
from torch.autograd import forward_ad

import diffopt
from diffopt import Settings, SolveFailed, Status
from random_data import random_qp, tensor

f64 = torch.float64


def partly_infeasible(grad=True):
    """Return data of three instances of which the second has no feasible point."""
    Q, q = torch.eye(2, dtype=f64), torch.randn(3, 2, dtype=f64)
    G, h = tensor([1.0, 0.0], [-1.0, 0.0]).reshape(2, 2), tensor([1.0, 1.0], [-1.0, -1.0], [1.0, 1.0]).reshape(3, 2)
    return [t.requires_grad_(grad) for t in (Q, q, G, h)]


OUTPUTS = ("x", "s", "lam", "lam_lower", "lam_upper", "value")


def solve_partly(Q, q, G, h):
    return diffopt.solve_qp(Q, q, G=G, h=h, lower=-9.0, upper=9.0, on_failure="return")


@pytest.mark.parametrize("output", OUTPUTS)
def test_masked_failure_leaves_no_trace(output):
    data = partly_infeasible()
    solution = solve_partly(*data)
    assert solution.status.tolist() == [Status.SOLVED, Status.PRIMAL_INFEASIBLE, Status.SOLVED]
    value = getattr(solution, output)
    assert value[1].isnan().all() and value[[0, 2]].isfinite().all()
    got = torch.autograd.grad(value[solution.ok].sum(), data, allow_unused=True, materialize_grads=True)
    Q, q, G, h = (t.detach() for t in data)
    parts = [t.requires_grad_() for t in (Q.clone(), q[[0, 2]], G.clone(), h[[0, 2]])]
    wanted = torch.autograd.grad(
        getattr(solve_partly(*parts), output).sum(), parts, allow_unused=True, materialize_grads=True
    )
    assert torch.allclose(got[0], wanted[0]) and torch.allclose(got[2], wanted[2])
    for a, b in ((got[1], wanted[1]), (got[3], wanted[3])):
        assert torch.allclose(a[[0, 2]], b) and (a[1] == 0).all()


@pytest.mark.parametrize("output", OUTPUTS)
def test_unmasked_failure_gives_nan_and_only_there(output):
    data = partly_infeasible()
    got = torch.autograd.grad(getattr(solve_partly(*data), output).sum(), data)
    assert got[0].isnan().all() and got[2].isnan().any()  # shared by the failed instance
    assert got[1].isnan().any(-1).tolist() == [False, True, False]
    assert got[3].isnan().any(-1).tolist() == [False, True, False]


def one_failed(failure):
    """Return data of two instances, by name, of which the second has failed."""
    g = torch.Generator().manual_seed(0)
    data = {
        "Q": torch.eye(2, dtype=f64).repeat(2, 1, 1),
        "q": torch.randn(2, 2, dtype=f64, generator=g),
        "A": torch.ones(2, 1, 2, dtype=f64),
        "b": torch.zeros(2, 1, dtype=f64),
        "G": torch.ones(2, 1, 2, dtype=f64),
        "h": torch.ones(2, 1, dtype=f64),
        "lower": -torch.ones(2, 2, dtype=f64),
        "upper": torch.ones(2, 2, dtype=f64),
    }
    if failure == "nan":
        data["q"][1, 0] = torch.nan
    elif failure == "crossed":
        data["lower"][1, 0] = 2.0
    else:
        data["h"][1] = -1.0
    return data


FAILURES = ["nan", "crossed", "infeasible"]


@pytest.mark.parametrize("output", [*OUTPUTS, "nu"])
@pytest.mark.parametrize("failure", FAILURES)
def test_every_failure_gives_nan_in_all_data(output, failure):
    data = {name: v.requires_grad_() for name, v in one_failed(failure).items()}
    value = getattr(diffopt.solve_qp(**data, on_failure="return"), output)
    for name, slope in zip(data, torch.autograd.grad(value.sum(), list(data.values())), strict=True):
        assert slope[0].isfinite().all() and slope[1].isnan().any(), name


@pytest.mark.parametrize("executor", ["torch", "auto"])
@pytest.mark.parametrize("failure", FAILURES)
def test_every_failure_gives_nan_in_every_output_in_forward_mode(failure, executor):
    data = one_failed(failure)
    settings = Settings(executor=executor)
    for name in data:
        with forward_ad.dual_level():
            moved = data | {name: forward_ad.make_dual(data[name], torch.ones_like(data[name]))}
            solution = diffopt.solve_qp(**moved, settings=settings, on_failure="return")
            for output in (*OUTPUTS, "nu"):
                tangent = forward_ad.unpack_dual(getattr(solution, output)).tangent
                assert tangent[0].isfinite().all() and tangent[1].isnan().all(), (name, output)


def test_failure_in_forward_mode():
    data = partly_infeasible(grad=False)
    moved = torch.ones(3, 2, dtype=f64)
    still = moved.clone()
    still[1] = 0
    for k in (1, 3):
        for tangent, bad in ((moved, True), (still, False)):

            def outputs(v, k=k):
                changed = [*data[:k], v, *data[k + 1 :]]
                solution = solve_partly(*changed)
                return solution.x, solution.lam, solution.s, solution.value

            for change in torch.func.jvp(outputs, (data[k],), (tangent,))[1]:
                assert change[[0, 2]].isfinite().all()
                assert change[1].isnan().any() == bad


def test_where_over_a_failed_instance_is_no_mask_but_indexing_is():
    data = partly_infeasible()
    solution = solve_partly(*data)
    kept = solution.x[solution.ok].square().sum()
    assert torch.autograd.grad(kept, data[1], retain_graph=True)[0].isfinite().all()
    squares = torch.where(solution.ok[:, None], solution.x.square(), 0.0).sum()  # 0 times NaN on the way back
    assert squares.isfinite() and torch.autograd.grad(squares, data[1])[0][1].isnan().all()


@pytest.mark.parametrize("executor", ["torch", "auto"])
def test_a_masked_failure_leaves_no_trace_in_second_derivatives(executor):
    q, lower = torch.randn(2, 2, dtype=f64).requires_grad_(), tensor([-0.1, -0.1], [2.0, 0.0], grad=True)
    Q = torch.eye(2, dtype=f64).repeat(2, 1, 1).requires_grad_()
    settings = Settings(executor=executor)
    solution = diffopt.solve_qp(Q, q, lower=lower, upper=1.0, on_failure="return", settings=settings)
    assert solution.ok.tolist() == [True, False]
    data = (Q, q, lower)
    first = torch.autograd.grad(solution.x[solution.ok].square().sum(), data, create_graph=True)
    # Of all gradients, those of the failed instance (zeros) too.
    second = torch.autograd.grad(sum(g.sum() for g in first), data)
    assert all(g[0].isfinite().all() and not g[1].any() for g in second) and second[1][0].any()


def test_iteration_limit_keeps_its_iterate_but_has_no_gradient():
    data = random_qp()
    solution = diffopt.solve_qp(*data, settings=Settings(max_iterations=1), on_failure="return")
    assert (solution.status == Status.MAX_ITERATIONS).all() and solution.x.isfinite().all()
    assert torch.autograd.grad(solution.x.sum(), data[1])[0].isnan().all()
    assert (solution.dependent == -1).all()


def test_failure_raises_by_default_and_carries_the_solution():
    with pytest.raises(
        SolveFailed, match=r"1 of 3 instances were not solved by 'pdipm':\n  batch index \[1\]: PRIMAL_INF"
    ) as caught:
        Q, q, G, h = partly_infeasible()
        diffopt.solve_qp(Q, q, G=G, h=h)
    assert "on_failure='return'" in str(caught.value) and "relax them" in str(caught.value)
    assert caught.value.solution.ok.tolist() == [True, False, True]
