"""QP structures: where values come from, forms of Q, and closed derivatives against derived ones."""

import pytest
import torch

import diffopt
from diffopt import ParameterError, QPForm, QPStructure, ShapeError, fixed, given, kkt, learned
from diffopt.problems.base import NonlinearForm

f64 = torch.float64


class TotalVariation(diffopt.QuadraticProgram):
    """min 1/2 |x - y|^2 + weight |Dx|_1, as a QP over (x, t)."""

    def __init__(self, n):
        D = torch.eye(n, dtype=f64)[:-1] - torch.eye(n, dtype=f64)[1:]
        super().__init__(weight=learned(torch.tensor(1.0, dtype=f64)), D=fixed(D))

    def form(self, y, weight, D):
        n, k = y.shape[-1], D.shape[0]
        eye = torch.eye(k, dtype=y.dtype)
        q = torch.cat([-y, weight.expand(*y.shape[:-1], k)], -1)
        G = torch.cat([torch.cat([D, -eye], -1), torch.cat([-D, -eye], -1)], -2)
        Q = diffopt.Diagonal(torch.cat([y.new_ones(n), y.new_zeros(k)]))
        return QPForm(Q, q, G=G, h=y.new_zeros(2 * k))


def test_structure_of_ones_own():
    layer = diffopt.Layer(TotalVariation(4))
    y = torch.tensor([[1.0, 1.2, 3.0, 3.1], [0, 0, 0, 0]], dtype=f64)
    x = layer(y=y)
    assert x.shape == (2, 7) and [n for n, _ in layer.named_parameters()] == ["weight"]
    # Two flat pieces, each pulled towards the other by weight / 2 per entry.
    assert torch.allclose(x[0, :4], torch.tensor([1.6, 1.6, 2.55, 2.55], dtype=f64))
    x[0, :4].square().sum().backward()
    assert torch.allclose(layer.weight.grad, torch.tensor(2 * (1.6 - 2.55), dtype=f64))


def test_it_prints_where_its_values_come_from():
    assert (
        repr(QPStructure(2, Q=learned(torch.eye(2)), lower=0.0)) == "QPStructure(n=2, Q=learned, q=given, lower=fixed)"
    )
    assert repr(TotalVariation(4)) == "TotalVariation(y=given, weight=learned, D=fixed)"


def test_an_argument_with_a_default_may_be_left_out():
    class Scaled(diffopt.QuadraticProgram):
        def form(self, y, weight=2.0, *, lower=None):
            return QPForm(weight * torch.eye(2, dtype=f64), -y, lower=lower)

    y = torch.tensor([1.0, -4.0], dtype=f64)
    layer = diffopt.Layer(Scaled())
    assert layer(y).tolist() == [0.5, -2.0] and layer(y, torch.tensor(4.0).double()).tolist() == [0.25, -1.0]
    assert layer(y=y, lower=0.0).tolist() == [0.5, 0.0]
    assert diffopt.Layer(Scaled(weight=given()))(y).tolist() == [0.5, -2.0]
    assert diffopt.solve(Scaled(weight=learned(torch.tensor(1.0, dtype=f64))), {"y": y}).x.tolist() == y.tolist()
    assert diffopt.check.gradients(layer, {"y": y}).ok
    with pytest.raises(ParameterError, match="Scaled needs `y`, which was not given"):
        layer(weight=1.0)


def test_arguments_without_a_name_are_refused():
    for form in (lambda self, *y: QPForm(None, *y), lambda self, **y: QPForm(None, **y), lambda self, y, /: y):
        with pytest.raises(
            ParameterError, match=r"Unnamed.form has the argument `\**y`. Expected an argument for each"
        ):
            type("Unnamed", (diffopt.QuadraticProgram,), {"form": form})


def test_closed_derivatives_equal_derived_ones():
    torch.manual_seed(0)
    n = 4
    S, U = torch.randn(2, n, n, dtype=f64), torch.randn(2, n, 2, dtype=f64)
    for Q in (
        S,
        diffopt.Diagonal(torch.rand(n, dtype=f64)),
        diffopt.DiagonalPlusLowRank(torch.rand(2, n, dtype=f64), U),
    ):
        form = QPForm(Q, torch.randn(2, n, dtype=f64), torch.randn(1, n, dtype=f64), torch.randn(1, dtype=f64),
                      torch.randn(2, 3, n, dtype=f64), torch.randn(3, dtype=f64))  # fmt: skip
        x, lam, nu = (torch.randn(2, k, dtype=f64) for k in (n, 3, 1))
        closed, derived = kkt.derivatives(form, x, lam, nu), kkt.derived(form, x, lam, nu)
        for a, b in zip(closed, derived, strict=True):
            a, b = (v if isinstance(v, torch.Tensor) else v.dense() for v in (a, b))
            assert torch.allclose(*torch.broadcast_tensors(a, b), atol=1e-12)


def test_qp_by_its_callables_equals_qp_by_its_form():
    problem = TotalVariation(3)
    params = problem.collect({"y": torch.tensor([[1.0, 2.0, 4.0]], dtype=f64)})
    problem.n = 5
    closed = problem.standard_form(params)
    x = torch.randn(1, 5, dtype=f64)
    assert torch.equal(problem.objective(x, params), closed.objective(x))
    assert torch.equal(problem.equalities(x, params), closed.equalities(x))
    assert torch.equal(problem.inequalities(x, params), closed.inequalities(x))
    assert problem.bounds(params) == (None, None) and problem.cone(params, 4).dim == 4
    assert torch.equal(problem.derivatives(x, x[..., :4], x[..., :0], params).gradient, closed.Q.matvec(x) + closed.q)


@pytest.mark.parametrize("kind", ["given", "learned", "fixed"])
@pytest.mark.parametrize("form", ["dense", "diagonal", "scaled_identity", "diagonal_plus_low_rank"])
def test_forms_of_Q(kind, form):
    d, U = torch.tensor([1.0, 2.0, 3.0], dtype=f64), torch.ones(3, 1, dtype=f64)
    value, dense = {
        "dense": (torch.diag(d), torch.diag(d)),
        "diagonal": (d, torch.diag(d)),
        "scaled_identity": (torch.tensor(2.0, dtype=f64), 2 * torch.eye(3, dtype=f64)),
        "diagonal_plus_low_rank": ((d, U), torch.diag(d) + U @ U.mT),
    }[form]
    declared = {"given": given, "learned": learned, "fixed": fixed}[kind]
    layer = diffopt.Layer(QPStructure(3, Q=declared(form=form) if kind == "given" else declared(value, form=form)))
    q = torch.tensor([1.0, -1.0, 2.0], dtype=f64)
    x = layer(q=q, **({"Q": value} if kind == "given" else {}))
    assert torch.allclose(x, -torch.linalg.solve(dense, q))
    learned_names = {name for name, _ in layer.named_parameters()}
    expected = {"Q_diagonal", "Q_factor"} if form == "diagonal_plus_low_rank" else {"Q"}
    assert learned_names == (expected if kind == "learned" else set())
    if kind == "learned":
        x.sum().backward()
        assert all(torch.isfinite(p.grad).all() and p.grad.abs().max() > 0 for p in layer.parameters())


def test_numbers_and_absent_pieces():
    for dtype in (f64, torch.float32):
        structure = QPStructure(
            2, Q=fixed(2.0, form="scaled_identity"), lower=0.0, upper=0.25, A=torch.ones(1, 2).to(dtype), b=0.3
        )
        x = diffopt.solve(structure, {"q": torch.tensor([-1.0, 0.0], dtype=dtype)}).x
        assert torch.allclose(x, torch.tensor([0.25, 0.05], dtype=dtype), atol=1e-6) and x.dtype == dtype
    linear = QPStructure(2, Q=None, q=given(), lower=0.0, upper=1.0)
    assert torch.allclose(diffopt.solve(linear, {"q": torch.tensor([1.0, -1.0])}).x, torch.tensor([0.0, 1.0]))
    no_q = QPStructure(2, Q=fixed(1.0, form="scaled_identity"), q=None, A=torch.ones(1, 2), b=1.0)
    assert torch.allclose(diffopt.solve(no_q, {}).x, torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: QPStructure(2, A=torch.ones(1, 2)), ParameterError, "`A` and `b` come together"),
        (lambda: QPStructure(2, G=given()), ParameterError, "`G` and `h` come together"),
        (lambda: QPStructure(2, q=given("diagonal")), ParameterError, "`q` is declared 'diagonal'; only Q has forms"),
        (
            lambda: TotalVariation.__mro__[1].__init__(TotalVariation(3), wait=learned(1.0)),
            ParameterError,
            "has no parameter `wait`",
        ),
    ],
)
def test_bad_declarations(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("structure", "params", "error", "message"),
    [
        (QPStructure(2), {"Q": torch.eye(2)}, ParameterError, "needs `q`, which was not given"),
        (QPStructure(2), {"q": torch.zeros(2)}, ParameterError, r"needs `Q`.*For a linear program.*\(n, Q=None\)"),
        (QPStructure(2), {"Q": torch.eye(2), "q": torch.zeros(2), "c": 1}, ParameterError, "takes no `c`.*`Q`, `q`"),
        (QPStructure(2), {"Q": torch.eye(2), "q": torch.zeros(2), "lower": 0.0}, ParameterError, "takes no `lower`"),
        (QPStructure(2, Q=torch.eye(2)), {"Q": torch.eye(2), "q": torch.zeros(2)}, ParameterError, "declared fixed"),
        (QPStructure(2), {"Q": torch.eye(2), "q": None}, ParameterError, "`q` is None, which would leave it out"),
        (QPStructure(2), {"Q": None, "q": torch.zeros(2)}, ParameterError, "`Q` is None"),
        (QPStructure(2), {"Q": torch.eye(2), "q": torch.zeros(3)}, ShapeError, r"declared with n = 2; got \(3,\)"),
        (QPStructure(2, Q=given("diagonal")), {"Q": torch.eye(3), "q": torch.zeros(2)}, ShapeError, "is declared diag"),
        (
            QPStructure(2, Q=given("diagonal_plus_low_rank")),
            {"Q": torch.eye(2), "q": torch.zeros(2)}, ParameterError, "expected a pair",
        ),
        (
            QPStructure(2, Q=given("diagonal_plus_low_rank")),
            {"Q": (torch.ones(2), torch.ones(3, 1)), "q": torch.zeros(2)}, ShapeError, "Expected a pair of",
        ),
    ],
)  # fmt: skip
def test_bad_calls(structure, params, error, message):
    with pytest.raises(error, match=message):
        diffopt.solve(structure, params)


def test_a_form_method_must_return_a_form():
    class Wrong(diffopt.QuadraticProgram):
        def form(self, q):
            return q

    with pytest.raises(ParameterError, match="Wrong.form returned Tensor. Expected a diffopt.QPForm"):
        diffopt.solve(Wrong(), {"q": torch.zeros(2)})


def test_nonlinear_form_of_a_qp_has_its_sizes():
    problem = TotalVariation(3)
    problem.n = 5
    problem.params = tuple(diffopt.Param(n, s) for n, s in (("y", (3,)), ("weight", ()), ("D", (2, 3))))
    form = NonlinearForm(problem, problem.collect({"y": torch.zeros(7, 3, dtype=f64)}))
    assert (form.n, form.p, form.m, form.batch_shape) == (5, 0, 4, (7,))


@pytest.mark.parametrize("n", [0, -1, 2.5, "3", True, None])
def test_the_number_of_variables_is_a_number(n):
    with pytest.raises(ParameterError, match="is no number of variables"):
        QPStructure(n)


@pytest.mark.parametrize("name", ["Q", "A", "G", "q", "lower", "upper"])
@pytest.mark.parametrize("declared", [fixed, learned])
def test_values_of_a_structure_have_its_size(name, declared):
    value = torch.ones(3, 3) if name in ("Q", "A", "G") else torch.ones(3)
    sides = {"A": {"b": 1.0}, "G": {"h": 1.0}}.get(name, {})
    with pytest.raises(ShapeError, match=rf"`{name}` has the wrong size. Expected 4 in its last dimension"):
        QPStructure(4, **{name: declared(value)}, **sides)
