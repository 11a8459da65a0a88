"""Derivatives of torch.func by the solver's own derivative: as by the Newton step, and where they are taken."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import diffopt
import measures
from diffopt import Diagonal, DiagonalPlusLowRank, Settings, transformed, transforms
from diffopt.backends.registry import choose
from diffopt.check import known
from diffopt.problems.forms import QPForm
from diffopt.solvers.cpu_executor import CpuExecutor
from tolerances import EXACT_ALGEBRA

f64 = torch.float64


def everything(Q=None, *data, **kwargs):
    s = diffopt.solve_qp(Q, *data, **kwargs)
    return torch.cat([s.x, s.s, s.lam, s.nu, s.lam_lower, s.lam_upper, s.value.unsqueeze(-1)], -1)


def ordinary(n, p, m, seed=20):
    return known.quadratic_program(seed, n, p, m, bounds="both").arguments()


def infinite_sides():
    data = ordinary(7, 1, 3)
    h, lower = data["h"].clone(), data["lower"].clone()
    inactive = (data["G"] @ known.quadratic_program(20, 7, 1, 3, bounds="both").x < h - 1e-3).nonzero()[0]
    h[inactive] = torch.inf
    lower[known.quadratic_program(20, 7, 1, 3, bounds="both").lam_lower == 0] = -torch.inf
    return data | {"h": h, "lower": lower}


def fixed_variable():
    data = ordinary(6, 1, 2)
    data["lower"] = data["upper"] = torch.where(torch.arange(6) == 2, 0.3, torch.nan).to(f64)
    return data | {
        "lower": torch.where(data["lower"].isnan(), -9.0, data["lower"]),
        "upper": torch.where(data["upper"].isnan(), 9.0, data["upper"]),
    }


def repeated_row():
    data = ordinary(6, 1, 3)
    return data | {"G": torch.cat([data["G"], data["G"]]), "h": torch.cat([data["h"], data["h"]])}


CASES = {
    "in lanes": lambda: ordinary(7, 1, 3),
    "in one piece": lambda: ordinary(40, 3, 12),
    "bounds alone": lambda: {k: v for k, v in ordinary(7, 1, 3).items() if k not in "AbGh"},
    "rows alone": lambda: known.quadratic_program(3, 6, 2, 4).arguments(),
    "linear": lambda: known.linear_program(6, 6, 1, 5, bounds="both").arguments(),
    "weakly active": lambda: known.degenerate_program(7, 7, 1, 3, bounds="both", weak=1).arguments(),
    "infinite sides": infinite_sides,
    "fixed variable": fixed_variable,
    "repeated row": repeated_row,
}


@pytest.fixture
def calls(monkeypatch):
    """Count solves of the CPU executor and calls of its derivative."""
    counted = {"solve": 0, "derivative": 0}

    def counting(name):
        method = getattr(CpuExecutor, name)

        def counted_method(self, *args, **kwargs):
            counted[name] += 1
            return method(self, *args, **kwargs)

        monkeypatch.setattr(CpuExecutor, name, counted_method)

    counting("solve")
    counting("derivative")
    return counted


def by_newton_step(function, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(transforms, "direct", False)
        return function()


def assert_same(found, expected, tolerance=EXACT_ALGEBRA):
    for got, wanted in zip(found, expected, strict=True):
        assert got.shape == wanted.shape
        assert (got - wanted).abs().max() <= tolerance * (1 + wanted.abs().max())


@pytest.mark.parametrize("transform", ["jacrev", "jacfwd"])
@pytest.mark.parametrize("case", CASES)
def test_a_jacobian_is_one_solve_and_one_derivative(case, transform, calls, monkeypatch):
    data = {name: value for name, value in CASES[case]().items() if value is not None}
    names = list(data)

    def function(*values):
        return everything(**dict(zip(names, values, strict=True)))

    def jacobian():
        return getattr(torch.func, transform)(function, tuple(range(len(names))))(*(data[name] for name in names))

    found = jacobian()
    assert calls == {"solve": 1, "derivative": 1}
    assert sum(bool(part.any()) for part in found) >= len(names) - 1  # (upper bounds need not be active)
    # (Slacks of active rows: rounding error by either way.)
    assert_same(found, by_newton_step(jacobian, monkeypatch), tolerance=1e-9)


def test_the_value_takes_no_system_for_its_first_derivative(monkeypatch):
    data = {name: value.clone().requires_grad_() for name, value in ordinary(7, 1, 3).items()}
    solution = diffopt.solve_qp(**data)
    monkeypatch.setattr(CpuExecutor, "pullback", None)  # (nobody calls it)
    slopes = dict(zip(data, torch.autograd.grad(solution.value, list(data.values())), strict=True))
    assert torch.equal(slopes["b"], -solution.nu) and torch.equal(slopes["h"], -solution.lam) and slopes["Q"].any()


@pytest.mark.parametrize("Q", ["diagonal", "low_rank"])
def test_structured_hessians(Q, calls, monkeypatch):
    data = ordinary(6, 1, 2)
    parts = [torch.linspace(1, 2, 6, dtype=f64), torch.linspace(-1, 1, 12, dtype=f64).reshape(6, 2)]
    parts, structure = (parts[:1], Diagonal) if Q == "diagonal" else (parts, DiagonalPlusLowRank)
    rest = [value for name, value in data.items() if name != "Q"]

    def function(*values):
        return everything(structure(*values[: len(parts)]), *values[len(parts) :])

    places = tuple(range(len(parts) + len(rest)))
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        found = transform(function, places)(*parts, *rest)
        assert_same(found, by_newton_step(lambda t=transform: t(function, places)(*parts, *rest), monkeypatch), 1e-9)
    assert calls["derivative"] == 2


def stacked(count=3):
    problems = [ordinary(7, 1, 3, seed) for seed in range(20, 20 + count)]
    return {name: torch.stack([problem[name] for problem in problems]) for name in problems[0]}


def moved(f, data, *names):
    """Return the function of some pieces of one problem."""
    return lambda *values: f(**one(data) | dict(zip(names, values, strict=True)))


def mapped(transform):
    return torch.func.vmap(transform)


BATCHES = {
    "jacrev of a batch": lambda f, d: torch.func.jacrev(lambda q: f(**d | {"q": q}))(d["q"]),
    "jacfwd of a batch": lambda f, d: torch.func.jacfwd(lambda q: f(**d | {"q": q}))(d["q"]),
    "jacobian in what is shared": lambda f, d: torch.func.jacrev(lambda G: f(**d | {"G": G}))(d["G"][0]),
    "tangents of what is shared": lambda f, d: torch.func.jacfwd(lambda A: f(**d | {"A": A}))(d["A"][0]),
    "vmap of jacrev": lambda f, d: mapped(torch.func.jacrev(moved(f, d, "q", "h"), (0, 1)))(d["q"], d["h"]),
    "vmap of jacfwd": lambda f, d: mapped(torch.func.jacfwd(moved(f, d, "q", "h"), (0, 1)))(d["q"], d["h"]),
    "gradients of each sample in what they share": lambda f, d: torch.func.vmap(
        torch.func.grad(lambda G, q: moved(f, d, "G", "q")(G, q).square().sum()), (None, 0)
    )(d["G"][0], d["q"]),
    "gradient through vmap": lambda f, d: torch.func.grad(lambda q: mapped(moved(f, d, "q"))(q).square().sum())(d["q"]),
    "vmap of vmap of jacrev": lambda f, d: torch.func.vmap(
        torch.func.vmap(torch.func.jacrev(moved(f, d, "q", "h")), (0, None)), (None, 0)
    )(d["q"][:2], d["h"]),
    "tangents mapped outside the data": lambda f, d: mapped(
        lambda v: mapped(lambda q: torch.func.jvp(moved(f, d, "q"), (q,), (v,))[1])(d["q"])
    )(torch.eye(7, dtype=f64)[:2]),
    "a batch of which vmap maps one dimension": lambda f, d: mapped(
        torch.func.jacrev(lambda h: f(**d | {"h": h.unsqueeze(-2)}))
    )(d["h"][:2]),
}


def one(data):
    return {name: value[0] for name, value in data.items()}


@pytest.mark.parametrize("name", BATCHES)
def test_derivatives_of_batches(name, calls, monkeypatch):
    data = stacked()
    found = BATCHES[name](everything, data)
    assert calls["solve"] == 1 and calls["derivative"] >= (0 if name == "gradient through vmap" else 1)
    expected = by_newton_step(lambda: BATCHES[name](everything, data), monkeypatch)
    found, expected = (v if isinstance(v, tuple) else (v,) for v in (found, expected))
    assert all(bool(part.any()) for part in found)
    assert_same(found, expected, tolerance=1e-9)


def test_float32_and_what_cannot_be_taken(calls, monkeypatch):
    data = {name: value.float() for name, value in ordinary(7, 1, 3).items()}

    def function(q):
        return everything(**data | {"q": q})

    for transform in (torch.func.jacrev, torch.func.jacfwd):
        found = transform(function)(data["q"])
        expected = by_newton_step(lambda t=transform: t(function)(data["q"]), monkeypatch)
        assert found.dtype == torch.float32
        assert (found - expected).abs().max() <= 1e-4 * (1 + expected.abs().max())
    assert calls["derivative"] == 2
    double = ordinary(7, 1, 3)
    for other in (Settings(executor="torch"), Settings(kink_rule="central")):
        torch.func.jacrev(lambda q, other=other: diffopt.solve_qp(**double | {"q": q}, settings=other).x)(double["q"])
    torch.func.jacrev(lambda q: diffopt.solve_qp(**double | {"q": q}, backend="cvxpy").x)(double["q"])
    assert calls["derivative"] == 2


def test_failures_pass_nan_to_who_asks_and_to_nobody_else(calls):
    data = stacked()
    data["lower"][1, 0] = data["upper"][1, 0] + 1

    def x(q):
        return diffopt.solve_qp(**data | {"q": q}, on_failure="return").x

    for transform in (torch.func.jacrev, torch.func.jacfwd):
        found = transform(x)(data["q"])  # (instance, entry, instance, entry)
        assert found[1, :, 1].isnan().all() and not found[1, :, [0, 2]].any()
        assert found[[0, 2]].isfinite().all() and found[0, :, 0].any() and not found[0, :, 1].any()
    assert calls["derivative"] == 2
    with pytest.raises(diffopt.SolveFailed, match=r"batch index \[1\]"):
        torch.func.jacrev(lambda q: diffopt.solve_qp(**data | {"q": q}).x)(data["q"])


@pytest.mark.parametrize("size", [7, 40])
def test_each_of_many_vectors_is_what_it_is_alone(size):
    data = ordinary(size, 2, 5)
    form = QPForm(**data)
    found = choose("pdipm", form).solve(form, Settings(), keep=True)
    assert found.pullback is not None and found.pullback.many is not None
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(50, len(v), generator=generator, dtype=f64) for v in found.point]
    vectors[0][3], vectors[0][5] = torch.nan, torch.inf
    for v in vectors:
        v[7] = 0
    many = found.pullback.many(tuple(vectors), False)
    for i in (0, 2, 4, 7, 23, 24, 49):
        alone = found.pullback.many(tuple(v[i : i + 1] for v in vectors), False)
        assert all(torch.equal(a[i], b[0]) for a, b in zip(many, alone, strict=True))
        names = list(form.tensors())
        pulled = dict(
            zip(names, found.pullback.run(found.point, tuple(v[i] for v in vectors), (True,) * 8), strict=True)
        )
        assert_same((a[i] for a in many), (pulled[name] for name in ("q", "b", "h", "lower", "upper")))
    assert many[0][3].isnan().any() and not any(v[7].any() for v in many)
    assert all(v[[i for i in range(50) if i not in (3, 5)]].isfinite().all() for v in many)


@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize("case", [case for case in CASES if case not in ("linear", "repeated row")])
def test_columns_of_the_inverse(case, forward):
    form = QPForm(**CASES[case]())
    found = choose("pdipm", form).solve(form, Settings(), keep=True)
    assert found.pullback is not None and found.pullback.many is not None
    sizes = [form.n, 0 if forward else form.m, form.p, form.m, form.n, form.n]
    total = sum(sizes)
    units = torch.eye(total, dtype=f64)
    # An orthogonal matrix of them has no zeros, so that one is a solve for each row.
    mixed = torch.linalg.qr(torch.randn(total, total, generator=torch.Generator().manual_seed(1), dtype=f64))[0]

    def many(rows):
        pieces = [piece if piece.shape[1] else None for piece in rows.split(sizes, 1)]
        if form.lower is None:
            pieces[4:] = [None, None]
        return [v for v in found.pullback.many(tuple(pieces), forward) if v is not None and v.numel()]

    # (A vector for s goes with its like; each of the others alone, and a zero beside it.)
    others = [i for i in range(total) if not form.n <= i < form.n + sizes[1]]
    inverse = many(torch.cat([units[others], torch.zeros(1, total, dtype=f64)]))
    expected = [mixed.mT @ v for v in many(mixed)]
    assert_same([v[:-1] for v in inverse], [v[others] for v in expected], tolerance=1e-9)
    assert any(bool(v.any()) for v in inverse) and not any(v[-1].any() for v in inverse)
    assert_same(many(units), expected, tolerance=1e-9)


def test_what_is_made_when_it_is_asked_for():
    data = ordinary(7, 1, 3)
    plain = diffopt.solve_qp(**data)
    seen = {}

    def function(q):
        solution = diffopt.solve_qp(**data | {"q": q})
        seen.update(status=solution.status, report=solution.report, iterations=int(solution.iterations))
        return torch.cat([solution.s, solution.lam_upper]), solution

    for transform in (torch.func.jacrev, torch.func.jacfwd):
        jacobian, solution = transform(function, has_aux=True)(data["q"])
        assert jacobian.any()
        if transform is torch.func.jacrev:
            for name in ("x", "s", "lam", "nu", "lam_lower", "lam_upper", "value", "status"):
                assert torch.equal(getattr(solution, name), getattr(plain, name))
        assert not any(map(transforms.wrapped, (seen["status"], *seen["report"])))
        assert seen["iterations"] == plain.iterations


# ------------------------------------------------------------------ where a derivative of the derivative is wanted


def test_a_derivative_that_is_wanted_outside(calls, monkeypatch):
    data = ordinary(7, 1, 3)
    q = data["q"].clone().requires_grad_()

    def total(q):
        return torch.func.jacrev(lambda Q: diffopt.solve_qp(**data | {"Q": Q, "q": q}).x)(data["Q"]).square().sum()

    (slope,) = torch.autograd.grad(total(q), q)
    assert slope.any() and calls["derivative"] == 0
    step = torch.zeros_like(q)
    step[0] = 1e-5
    rise = float((total(data["q"] + step) - total(data["q"] - step)) / 2e-5)
    assert calls["derivative"] == 2 and abs(rise - float(slope[0])) <= 1e-6 * (1 + abs(rise))


def test_the_pullback_is_linear_and_can_itself_be_differentiated(calls):
    data = ordinary(7, 1, 3)
    _, pullback = torch.func.vjp(lambda q: diffopt.solve_qp(**data | {"q": q}).x, data["q"])
    v, u = torch.randn(2, 7, dtype=f64)
    (forward,) = torch.func.jvp(pullback, (v,), (u,))[1]
    assert forward.any() and torch.allclose(forward, pullback(u)[0])
    (outer,) = torch.func.vjp(lambda v: pullback(v)[0], v)[1](u)
    assert torch.allclose(outer @ v, pullback(v)[0] @ u)
    leaf = v.clone().requires_grad_()
    (plain,) = torch.autograd.grad(pullback(leaf)[0] @ u, leaf)
    assert torch.allclose(plain, outer)
    many = torch.func.vmap(torch.func.grad(lambda v: pullback(v)[0] @ u))(torch.stack([v, u]))
    assert torch.allclose(many, outer.expand(2, 7))


def test_torch_refuses_to_linearize():
    # docs/transforms.md says so, and what to do instead. Does it go one day, then take that out, and test it.
    q = torch.ones(3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="trying to get value out of a tracing tensor"):
        torch.func.linearize(lambda q: diffopt.solve_qp(None, q, lower=0.0, upper=1.0).x, q)


def test_torch_autograd_inside_a_transform():
    data = ordinary(7, 1, 3)

    def slope(q):
        (first,) = torch.autograd.grad(diffopt.solve_qp(**data | {"q": q}).x.pow(3).sum(), q, create_graph=True)
        return first

    def second(q):
        return torch.func.vjp(slope, q)[1](torch.ones_like(q))[0]

    expected = torch.func.hessian(lambda q: diffopt.solve_qp(**data | {"q": q}).x.pow(3).sum())(data["q"]).sum(0)
    assert expected.any() and torch.allclose(second(data["q"]), expected, atol=1e-9)
    q = torch.stack([data["q"], data["q"] + 0.01])
    assert torch.allclose(torch.func.vmap(second)(q)[0], expected, atol=1e-9)


def test_without_what_torch_may_lack(monkeypatch):
    monkeypatch.setattr(transforms, "direct", False)
    monkeypatch.setattr(transformed, "attach", None)
    data = ordinary(7, 1, 3)
    assert torch.func.jacrev(lambda q: diffopt.solve_qp(**data | {"q": q}).x)(data["q"]).any()


def test_jacobians_have_the_same_bits_by_any_number_of_threads(threads: Callable[[int], None]) -> None:
    data = known.quadratic_program(3, 60, 5, 40, bounds="mixed").arguments()
    given = {name: v for name, v in data.items() if v is not None}
    sides = given["q"], given["b"], given["h"]
    vectors = torch.randn(50, 60, dtype=f64, generator=torch.Generator().manual_seed(0))

    def x(q, b, h):
        return diffopt.solve_qp(**(given | {"q": q, "b": b, "h": h})).x

    found = []
    for count in (1, 2, 3):
        threads(count)
        # The first by an inverse, which one thread forms; the vectors of the second are shared out.
        several = torch.func.vmap(torch.func.vjp(x, *sides)[1])(vectors)
        found.append((*torch.func.jacrev(x, (0, 1, 2))(*sides), *several))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    for jacobian, product in zip(found[0][:3], found[0][3:], strict=True):
        assert measures.relative(product, vectors @ jacobian) <= EXACT_ALGEBRA
