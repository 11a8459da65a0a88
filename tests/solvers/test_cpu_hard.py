"""The compiled CPU executor: hard instances get the answer of torch operations, and failures stay where they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

import diffopt
import measures
from compiled import (
    FAILED,
    MATRICES,
    OUTPUTS,
    SIZES,
    Data,
    cotangents,
    drawn,
    everything,
    partly_failed,
    pick,
    present,
    pulled,
    same_bits,
)
from diffopt import Settings, Status
from diffopt.check import known
from diffopt.solvers.settings import KINK_RULES, KinkRule
from tolerances import GRADIENT, GRADIENT_REFERENCE, SOLUTION, X_REFERENCE

f64 = torch.float64


# ---- hard instances --------------------------------------------------------------------------------------------------


def program(n: int, count: int = 3, **pieces: Any) -> Data:
    """Return problems with Q = I and random q; pieces are added, numbers as float64 tensors."""
    generator = torch.Generator().manual_seed(n)
    q = torch.randn(count, n, generator=generator, dtype=f64)
    data = {"Q": torch.eye(n, dtype=f64), "q": q} | pieces
    return {name: v if isinstance(v, Tensor) else torch.full((n,), float(v), dtype=f64) for name, v in data.items()}


def row(*entries: float, n: int) -> Tensor:
    """Return one row whose first entries are given, and whose others are zero."""
    v = torch.zeros(1, n, dtype=f64)
    v[0, : len(entries)] = torch.tensor(entries, dtype=f64)
    return v


def side(*entries: float) -> Tensor:
    return torch.tensor(entries, dtype=f64)


def known_data(make: Callable[..., known.KnownProblem], *sizes: int, **options: Any) -> Callable[[int], Data]:
    return lambda k: present(make(3, *(k * v for v in sizes), batch=(3,), **options).arguments())


def ill_conditioned(k: int) -> Data:
    n = 5 * k
    basis = torch.linalg.qr(torch.randn(3, n, n, generator=torch.Generator().manual_seed(0), dtype=f64)).Q
    Q = (basis * 10 ** -torch.linspace(0, 10, n, dtype=f64)) @ basis.mT
    # Bounds hold x where the objective hardly does.
    return program(n, lower=-1, upper=1) | {"Q": 0.5 * (Q + Q.mT)}


HARD: dict[str, tuple[Callable[[int], Data], str | None]] = {
    # Each with the executor that all instances must have, if any.
    "one_variable": (lambda k: program(1, 4, lower=0.5), "cpu:dual"),
    "one_variable_both": (lambda k: program(1, 4, lower=-0.1, upper=0.1), "cpu:dual"),
    "one_variable_row": (lambda k: program(1, 4, G=row(2.0, n=1), h=side(0.5)), "cpu:dual"),
    "one_variable_free": (lambda k: program(1, 4), "cpu:dual"),
    "one_variable_fixed_by_a_row": (lambda k: program(1, 4, A=row(2.0, n=1), b=side(0.5)), "cpu:dual"),
    "unconstrained": (lambda k: program(5 * k), "cpu:dual"),
    "equalities_only": (known_data(known.quadratic_program, 5, 2), "cpu:dual"),
    "one_degree_of_freedom": (lambda k: known_data(known.quadratic_program, 5 * k, 5 * k - 1)(1), "cpu:dual"),
    "no_degree_of_freedom": (known_data(known.quadratic_program, 4, 4), "cpu:dual"),
    "rows_only": (known_data(known.quadratic_program, 5, 0, 4), "cpu:dual"),
    "most_rows": (known_data(known.quadratic_program, 10, 0, 19), "cpu:dual"),
    "bounds_only": (known_data(known.quadratic_program, 5, bounds="both"), "cpu:dual"),
    "lower_only": (known_data(known.quadratic_program, 5, 1, 3, bounds="lower"), "cpu:dual"),
    "upper_only": (known_data(known.quadratic_program, 5, 1, 3, bounds="upper"), "cpu:dual"),
    "all_bounds_infinite": (lambda k: program(5 * k, lower=-torch.inf, upper=torch.inf), "cpu:dual"),
    "lower_infinite": (lambda k: program(5 * k, lower=-torch.inf), "cpu:dual"),
    "all_rows_infinite": (lambda k: program(5 * k, G=row(1, 1, n=5 * k), h=side(torch.inf)), "cpu:dual"),
    "everything_infinite": (
        lambda k: program(5 * k, G=row(1, 1, n=5 * k), h=side(torch.inf), lower=-torch.inf, upper=torch.inf),
        "cpu:dual",
    ),
    "row_of_minus_infinity": (lambda k: program(5 * k, G=row(1, 1, n=5 * k), h=side(-torch.inf)), None),
    "lower_of_plus_infinity": (lambda k: program(5 * k, lower=torch.inf), None),
    "upper_of_minus_infinity": (lambda k: program(5 * k, upper=-torch.inf), None),
    "zero_row": (lambda k: program(5 * k, G=torch.zeros(2, 5 * k, dtype=f64), h=side(1, 2)), "cpu:dual"),
    "zero_row_at_zero": (lambda k: program(5 * k, G=torch.zeros(1, 5 * k, dtype=f64), h=side(0), lower=-0.1), None),
    "zero_row_below_zero": (lambda k: program(5 * k, G=torch.zeros(1, 5 * k, dtype=f64), h=side(-1)), None),
    "zero_equality": (lambda k: program(5 * k, A=torch.zeros(1, 5 * k, dtype=f64), b=side(0)), None),
    "impossible_equality": (lambda k: program(5 * k, A=torch.zeros(1, 5 * k, dtype=f64), b=side(1)), None),
    "weak_row": (lambda k: program(5 * k, G=row(1, n=5 * k), h=side(0), q=torch.zeros(3, 5 * k, dtype=f64)), None),
    "weak_bounds": (lambda k: program(5 * k, lower=0, q=torch.zeros(3, 5 * k, dtype=f64)), None),
    "fixed_variables": (lambda k: program(5 * k, lower=0.25, upper=0.25), None),
    "one_fixed_variable": (
        lambda k: program(5 * k, lower=row(1.25, n=5 * k)[0] - 1, upper=row(-0.75, n=5 * k)[0] + 1), None,
    ),
    "inconsistent_equalities": (
        lambda k: program(5 * k, A=row(1, 1, n=5 * k).repeat(2, 1), b=side(1, 2)), None,
    ),
    "singular": (known_data(known.quadratic_program, 6, 1, 4, bounds="both", singular=True), None),
    "indefinite": (lambda k: program(5 * k, lower=-1, upper=1) | {"Q": -torch.eye(5 * k, dtype=f64)}, None),
    "indefinite_in_one_direction": (
        lambda k: program(5 * k, lower=-1, upper=1) | {"Q": torch.diag(side(-1, *[1] * (5 * k - 1)))}, None,
    ),
    "zero_hessian": (lambda k: program(5 * k, lower=-1, upper=1) | {"Q": torch.zeros(5 * k, 5 * k, dtype=f64)}, None),
    "ill_conditioned": (ill_conditioned, None),
    "badly_scaled": (known_data(known.badly_scaled_program, 5, 1, 3, bounds="mixed"), "cpu:dual"),
    "contradicting_rows": (known_data(known.infeasible_program, 5, 1, 3, kind="rows", bounds="both"), None),
    "contradicting_equalities": (known_data(known.infeasible_program, 5, 2, 3, kind="equalities"), None),
    "contradicting_bounds": (known_data(known.infeasible_program, 5, 1, 3, kind="bounds"), None),
    "unbounded": (known_data(known.unbounded_program, 5, 1, 3, bounds="lower"), None),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::diffopt.errors.InaccurateSolutionWarning")
@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("size", SIZES)
def test_hard_instances_get_the_answer_of_torch(size: str, name: str) -> None:
    if size == "large" and name.startswith("one_variable"):
        return  # there is no large problem of one variable
    build, executor = HARD[name]
    for dtype in (f64, torch.float32) if executor else (f64,):
        data = {k: v.to(dtype) for k, v in build(SIZES[size]).items()}
        weights = cotangents(data, 1)
        ours, our_gradients = pulled(data, weights, Settings(executor="cpu"))
        theirs, their_gradients = pulled(data, weights, Settings(executor="torch"))
        assert ours.executor.startswith("cpu:") and executor in (None, ours.executor), ours.executor
        for count in ("status", "weakly_active", "dependent"):
            assert torch.equal(getattr(ours, count), getattr(theirs, count)), (count, ours, theirs)
        slack = 1e4 if name == "ill_conditioned" else 1.0  # cond(Q) = 1e10
        free = bool((ours.dependent > 0).any())  # multipliers of dependent rows are not unique
        for output in ("x", "s", "nu") if free else OUTPUTS:
            a, b = (getattr(s, output).nan_to_num(nan=7.0, posinf=9.0) for s in (ours, theirs))
            assert measures.relative(a, b) <= (X_REFERENCE * slack if dtype == f64 else SOLUTION[dtype]), output
        for piece, gradient in our_gradients.items():
            if free and piece in ("A", "G"):
                continue
            a, b = (v.nan_to_num(nan=7.0) for v in (gradient, their_gradients[piece]))
            limit = GRADIENT_REFERENCE * slack if dtype == f64 else GRADIENT[dtype]
            assert measures.relative(a, b) <= limit, (piece, a, b)


@pytest.mark.parametrize("extra", [{"extra_p": 1}, {"extra_m": 2}, {"extra_p": 1, "extra_m": 1, "bounds": "both"}])
@pytest.mark.parametrize("size", SIZES)
def test_repeated_rows_get_the_answer_of_torch(size: str, extra: dict[str, Any]) -> None:
    # x is unique; duals and their derivatives are shared out between the copies, which is ill-conditioned.
    data = known_data(known.redundant_program, 5, 1, 3, **extra)(SIZES[size])
    weights = cotangents(data, 1)
    ours, our_gradients = pulled(data, weights, outputs=("x",))
    theirs, their_gradients = pulled(data, weights, Settings(executor="torch"), outputs=("x",))
    for count in ("status", "weakly_active", "dependent"):
        assert torch.equal(getattr(ours, count), getattr(theirs, count)), (count, ours, theirs)
    assert bool((ours.dependent > 0).any())
    assert measures.relative(ours.x, theirs.x) <= X_REFERENCE
    for piece in ("Q", "q"):
        assert measures.relative(our_gradients[piece], their_gradients[piece]) <= GRADIENT_REFERENCE, piece


@pytest.mark.parametrize("apart", [1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("size", SIZES)
def test_nearly_repeated_rows_count_as_dependent_where_torch_says_so(size: str, apart: float) -> None:
    n = 5 * SIZES[size]
    a, change = torch.randn(2, n, generator=torch.Generator().manual_seed(0), dtype=f64)
    G = torch.stack([a, a + apart * change])
    data: dict[str, Any] = {"Q": torch.eye(n, dtype=f64), "q": -G.sum(0), "G": G, "h": torch.zeros(2, dtype=f64)}
    ours, theirs = (diffopt.solve_qp(**data, settings=Settings(executor=name)) for name in ("cpu", "torch"))
    assert int(ours.dependent) == int(theirs.dependent) == (apart < 1e-6)
    assert ours.executor == ("cpu:primal" if apart < 1e-4 else "cpu:dual")
    assert measures.relative(ours.x, theirs.x) <= X_REFERENCE


@pytest.mark.parametrize(
    "seed", [3, 9, 35]
)  # which of them needs that rows are counted depends on how sums are rounded
def test_more_active_rows_than_variables_depend_on_each_other(seed: int) -> None:
    """The dual of a support vector machine: all bounds and the equality hold at once, and Q is nearly singular."""
    n, generator = 16, torch.Generator().manual_seed(seed)
    y = torch.ones(n, dtype=f64)
    y[::2] = -1
    points = torch.randn(n, 2, generator=generator, dtype=f64) + 0.7 * y.unsqueeze(-1)
    distance = (points.unsqueeze(1) - points).square().sum(-1)
    q = torch.full((n,), -1.0, dtype=f64, requires_grad=True)
    data: dict[str, Any] = {"Q": torch.outer(y, y) * (-0.018 * distance).exp(), "A": y.unsqueeze(0), "b": 0.0}
    for count in (1, 8):  # alone, and in lanes
        solution = diffopt.solve_qp(q=q.expand(count, n), lower=0.0, upper=0.1353, **data)
        assert bool((solution.dependent == 1).all()) and bool((solution.x == 0.1353).all())
        assert float(torch.autograd.grad(solution.x.sum(), q)[0].abs().max()) <= 1e-15


@pytest.mark.parametrize("reduction", ["auto", "primal"])  # by the dual form, and by the general method
@pytest.mark.parametrize("bounds", [None, "lower", "upper", "both", "mixed"])
@pytest.mark.parametrize("size", SIZES)
def test_kinks_follow_the_rule(size: str, bounds: known.Bounds, reduction: Any) -> None:
    """Weakly active rows are counted by the compiled code; the rule "inactive" is its own, others are the engine's."""
    problem = known.degenerate_program(
        5, *(SIZES[size] * v for v in (5, 1, 3)), weak=2 * SIZES[size], bounds=bounds, batch=(3,)
    )
    data = present(problem.arguments())
    weights = cotangents(data, 3)
    found = {}
    for rule in get_args(KinkRule):
        if rule == "nan":  # see test_adjoint.py
            continue
        ours, found[rule] = pulled(data, weights, Settings(kink_rule=rule, reduction=reduction))
        theirs, expected = pulled(data, weights, Settings(kink_rule=rule, executor="torch"))
        assert ours.executor == ("cpu:dual" if reduction == "auto" else "cpu:primal")
        assert torch.equal(ours.weakly_active, problem.weakly_active), ours.weakly_active
        assert torch.equal(theirs.weakly_active, problem.weakly_active)
        for piece, gradient in expected.items():
            assert measures.relative(found[rule][piece], gradient) <= GRADIENT_REFERENCE, (rule, piece)
    assert set(found) == set(KINK_RULES) - {"nan"}
    for rule in ("active", "central"):  # they do differ
        assert measures.relative(found[rule]["q"], found["inactive"]["q"]) > 1e-3, rule


def test_the_polish_mends_an_active_set_rather_than_wait_for_the_method_to_find_it() -> None:
    g = torch.Generator().manual_seed(0)
    n, batch = 50, 64
    U, G, inside = (torch.randn(batch, *shape, dtype=f64, generator=g) for shape in ((n, n), (n, n), (n,)))
    Q = U @ U.mT + 1e-3 * torch.eye(n, dtype=f64)
    q, slack = (torch.rand(batch, n, dtype=f64, generator=g) for _ in range(2))
    h = (G @ inside.unsqueeze(-1)).squeeze(-1) + slack
    solution = diffopt.solve_qp(Q, q, G=G, h=h, settings=diffopt.Settings(executor="cpu"))
    steps = float(solution.iterations.double().mean())
    assert steps <= 6.7, steps  # (without, 7.1)


# ---- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_what_the_dual_form_leaves_is_answered_by_the_general_method(size: str) -> None:
    data, weights = partly_failed(size)
    solution, gradients = pulled(data, weights)
    assert solution.executor == "cpu:dual+primal"
    expected = [1, Status.PRIMAL_INFEASIBLE, 1, Status.NONFINITE_INPUT, Status.PRIMAL_INFEASIBLE, 1]
    assert solution.status.tolist() == expected, solution
    assert solution.certificate is not None
    theirs, their_gradients = pulled(data, weights, Settings(executor="torch"))
    assert theirs.certificate is not None and torch.equal(theirs.status, solution.status)
    for name, value in everything(theirs, their_gradients).items():
        if name not in ("iterations", *solution.residuals._asdict()):
            here = everything(solution, gradients)[name]
            assert measures.relative(here.nan_to_num(nan=7.0), value.nan_to_num(nan=7.0)) <= GRADIENT_REFERENCE, name
    for i in range(6):
        alone, own_gradients = pulled(pick(data, i), pick(weights, i))
        for name, value in everything(alone, own_gradients).items():
            assert same_bits(everything(solution, gradients)[name][i], value), (name, i)
        proofs = alone.certificate or [torch.full_like(v[i], torch.nan) for v in solution.certificate]
        for proof, value in zip(solution.certificate, proofs, strict=True):
            assert same_bits(proof[i], value), i
    for i in (1, 4):  # certificates are proofs
        rows = present({"A": data["A"][i], "G": data["G"][i]})
        _, nu, lam, lower, upper = (v[i] for v in solution.certificate)
        sides = (data["b"][i] * nu).sum() + (data["h"][i] * lam).sum()
        for bound, dual, sign in ((data["lower"][i], lower, -1), (data["upper"][i], upper, 1)):
            sides = sides + sign * torch.where(dual > 0, bound * dual, 0.0).sum()
        assert min(float(v.min()) for v in (lam, lower, upper)) >= 0 and abs(float(sides) + 1) <= 1e-9
        assert float((rows["A"].mT @ nu + rows["G"].mT @ lam - lower + upper).abs().max()) <= 1e-9
    assert solution.value[[1, 3, 4]].isnan().all() and solution.value[[0, 2, 5]].isfinite().all()


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("size", SIZES)
def test_the_gradient_of_a_failure_is_nan_where_it_is_asked_for(size: str, output: str) -> None:
    data, weights = partly_failed(size)
    whole = pulled(data, weights, outputs=(output,))[1]
    weights[output][list(FAILED)] = 0.0
    masked = pulled(data, weights, outputs=(output,))[1]
    good = [0, 2, 5]
    for name, gradient in whole.items():
        assert bool(gradient[good].isfinite().all()), name
        assert same_bits(masked[name][good], gradient[good]), name
        assert not masked[name][list(FAILED)].any(), name
    for i in FAILED:
        everywhere = torch.cat([gradient[i].flatten() for gradient in whole.values()])
        # Of s, a failure with infinite sides may have no derivative at all.
        assert bool(everywhere.isnan().any()), (i, output)
        assert bool((everywhere.isnan() | (everywhere == 0)).all()), (i, output)


@pytest.mark.parametrize("size", SIZES)
def test_failures_and_shared_tensors(size: str) -> None:
    """The sum over the batch is NaN if a failure takes part, and that of the others if it does not."""
    data, weights = partly_failed(size, shared=True)
    good = [0, 2, 5]
    _, whole = pulled(data, weights)
    alone = pulled(pick(data, good), pick(weights, good))[1]
    for v in weights.values():
        v[list(FAILED)] = 0.0
    _, masked = pulled(data, weights)
    for name in MATRICES:
        assert bool(whole[name].isnan().any()), name
        assert measures.relative(masked[name], alone[name]) <= 1e-12, name
    for name in set(data) - set(MATRICES):
        assert same_bits(whole[name][good], alone[name]) and same_bits(masked[name][good], alone[name]), name


def test_a_failure_reaches_only_its_own_part_of_what_is_partly_shared() -> None:
    data = drawn("small", 6)
    batch = {name: v.view(2, 3, *v.shape[1:]).clone() for name, v in data.items()}
    for name in ("Q", "G", "lower"):
        batch[name] = batch[name][:, :1]  # (2, 1, ...)
    batch |= {"lower": torch.full_like(batch["lower"], -9.0), "upper": torch.full_like(batch["upper"], 9.0)}
    batch["h"] = batch["h"] + 9
    batch["q"][0, 1, 0] = torch.nan
    weights = {name: v.view(2, 3, -1) for name, v in cotangents(data, 6).items()}
    solution, gradients = pulled(batch, weights)
    assert solution.ok.tolist() == [[True, False, True], [True, True, True]]
    for name in ("Q", "G", "lower"):
        assert gradients[name].shape[:2] == (2, 1)
        assert bool(gradients[name][1].isfinite().all()), name
    assert bool(gradients["Q"][0].isnan().any())
    second = pulled({k: v[1] for k, v in batch.items()}, {k: v[1] for k, v in weights.items()})[1]
    for name, gradient in second.items():
        assert measures.relative(gradients[name][1], gradient) <= 1e-12, name


def test_an_infinite_or_nan_cotangent_stays_in_its_instance() -> None:
    for size in SIZES:
        data = drawn(size, 3)
        weights = cotangents(data, 3)
        expected = pulled(data, weights)[1]
        weights["x"][1, 0], weights["lam"][1, 0] = torch.inf, torch.nan
        found = pulled(data, weights)[1]
        assert not found["q"][1].isfinite().all()
        for name, gradient in found.items():
            assert same_bits(gradient[[0, 2]], expected[name][[0, 2]]), name
