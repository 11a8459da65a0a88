"""The contract of a backend: what is refused, what claims of success must stand, and the tools for adapters."""

import sys

import pytest
import torch

import diffopt
from closed_forms import FAILURES, everything, failing, form
from diffopt import Diagonal, DiagonalPlusLowRank, QPForm, Settings, Status
from diffopt.backends import Backend, Capabilities, InstancePoint, RawPoint, instances, stack
from diffopt.backends.base import farkas, in_float64, ray, screen, screen_bounds, solve_each
from diffopt.cones import NonnegativeCone
from diffopt.problems import NonlinearForm
from diffopt.solution import Certificate

f64 = torch.float64


class SecondOrderCone(NonnegativeCone):
    """A cone that no backend here has heard of."""


class Fixed(Backend):
    """Returns what the test says; the problem is min |x|^2 / 2 + q'x."""

    def __init__(self, x=None, status=Status.SOLVED, **more):
        self.x, self.status, self.more = x, status, more

    def _solve(self, form, settings):
        x = -form.q if self.x is None else self.x
        zero = torch.zeros_like(x)
        shape = form.batch_shape
        status = torch.full(shape, int(self.status), dtype=torch.int8)
        empty = x.new_zeros(*shape, form.p), x.new_zeros(*shape, form.m)
        return RawPoint(x, *empty, zero, zero, status, torch.ones(shape, dtype=torch.int64), **self.more)


def quadratic(q, **rows):
    q = torch.as_tensor(q, dtype=f64)
    return QPForm(torch.eye(q.shape[-1], dtype=f64), q, **rows)


def test_what_a_backend_refuses():
    class Narrow(Fixed):
        can = Capabilities(dtypes=frozenset({torch.float64}), devices=frozenset({"cuda", "mps"}))

    class Missing(Fixed):
        requires = ("torch", "a_package_that_is_not_there", "not_there.either")

    class Nonlinear(Fixed):
        can = Capabilities(forms=(NonlinearForm,))

    problem = quadratic([1.0, 2.0])
    assert Fixed().supports(problem) is None
    assert Missing.missing() == ("a_package_that_is_not_there", "not_there.either")
    expected = "needs a_package_that_is_not_there, not_there.either, which is not installed"
    assert Missing().supports(problem) == expected
    assert Nonlinear().supports(problem) == "takes NonlinearForm, not QPForm"
    assert Narrow().supports(problem) == "runs on cuda, mps, the data is on cpu"
    cone = quadratic([1.0], G=torch.ones(1, 1, dtype=f64), h=0.0, cone=SecondOrderCone(1))
    assert Fixed().supports(cone) == "does not take SecondOrderCone"
    single = QPForm(torch.eye(2), torch.ones(2))
    Narrow.can = Capabilities(dtypes=frozenset({torch.float64}))
    assert Narrow().supports(single) == "does not take torch.float32"


def test_a_package_that_is_blocked_is_missing(monkeypatch):
    class Needs(Fixed):
        requires = ("scipy",)

    assert Needs.missing() == ()
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert Needs.missing() == ("scipy",)


@pytest.mark.parametrize(
    ("claim", "error", "graded"),
    [
        (Status.SOLVED, 0.0, Status.SOLVED),
        (Status.SOLVED, 1e-7, Status.ALMOST_SOLVED),
        (Status.SOLVED, 1e-3, Status.NUMERICAL_ERROR),
        (Status.ALMOST_SOLVED, 0.0, Status.SOLVED),
        (Status.MAX_ITERATIONS, 0.0, Status.SOLVED),
        (Status.MAX_ITERATIONS, 1e-3, Status.MAX_ITERATIONS),
        (Status.NUMERICAL_ERROR, 1e-7, Status.ALMOST_SOLVED),
        (Status.NUMERICAL_ERROR, torch.nan, Status.NUMERICAL_ERROR),
        (Status.SOLVED, torch.nan, Status.NUMERICAL_ERROR),
        (Status.UNSOLVED, 0.0, Status.UNSOLVED),
        (Status.PRIMAL_INFEASIBLE, 0.0, Status.PRIMAL_INFEASIBLE),
        (Status.DUAL_INFEASIBLE, 0.0, Status.DUAL_INFEASIBLE),
        (Status.NONFINITE_INPUT, 0.0, Status.NONFINITE_INPUT),
    ],
)
def test_claims_are_checked_against_recomputed_residuals(claim, error, graded):
    q = torch.tensor([0.5, -0.5], dtype=f64)
    found = Fixed(x=-q + error, status=claim).solve(quadratic(q), Settings())
    assert found.status.dtype == torch.int8 and Status(int(found.status)) == graded
    exists = claim not in (Status.PRIMAL_INFEASIBLE, Status.DUAL_INFEASIBLE, Status.NONFINITE_INPUT)
    if exists:  # an iterate is kept, whatever became of it
        assert torch.equal(found.point.x.nan_to_num(), (-q + error).nan_to_num())
    else:
        assert found.point.x.isnan().all() and found.residuals.isnan().all()


def test_a_loose_tolerance_is_one_for_success():
    q = torch.tensor([0.5], dtype=f64)
    found = Fixed(x=-q + 1e-4).solve(quadratic(q), Settings(tolerance=1e-3))
    assert found.status == Status.SOLVED


def test_residuals_of_float32_data_are_taken_in_float64():
    # Rounded to float32, x_1 = -13650 leaves a violation of 1.3e-5 of the equality; a float32 sum shows 3e-6.
    Q, q = torch.tensor([[0.0, 0.0], [0.0, 5.1626e-05]]), torch.tensor([0.0, 0.7048])
    A, b = torch.tensor([[-1.3123, 0.0480]]), torch.tensor([-0.7648])
    for executor in ("auto", "torch"):
        solution = diffopt.solve_qp(Q, q, A, b, on_failure="return", settings=Settings(executor=executor))
        true = float((A.double() @ solution.x.double() - b.double()).abs() / (1 + b.double().abs()))
        assert true > 1e-5 and float(solution.residuals.primal) == pytest.approx(true, rel=1e-3)
        assert solution.status == Status.NUMERICAL_ERROR


def test_slacks_are_derived_unless_given():
    problem = quadratic([0.0, 0.0], G=torch.eye(2, dtype=f64), h=torch.tensor([1.0, -1e-10], dtype=f64))
    assert Fixed().solve(problem, Settings()).point.s.tolist() == [1, 0]  # in the cone
    s = torch.tensor([7.0, 0.0], dtype=f64)
    assert torch.equal(Fixed(s=s).solve(problem, Settings()).point.s, s)


def test_instances_of_a_broadcast_batch():
    q = torch.arange(12.0).reshape(2, 3, 2)
    G = torch.arange(6.0).reshape(3, 1, 2)
    problem = QPForm(DiagonalPlusLowRank(torch.ones(2), torch.ones(2, 1)), q, G=G, h=torch.ones(1), upper=4.0)
    listed = instances(problem)
    assert len(listed) == 6
    for i, data in enumerate(listed):
        assert all(v.dtype == f64 for v in data.values())
        assert torch.equal(data["q"], q.reshape(6, 2)[i].double())
        assert torch.equal(data["G"], G[i % 3].double())
        assert torch.equal(data["Q"], torch.eye(2, dtype=f64) + 1)
        assert data["A"].shape == (0, 2) and data["b"].shape == (0,)
        assert data["lower"].tolist() == [-torch.inf] * 2 and data["upper"].tolist() == [4, 4]
    assert instances(QPForm(Diagonal(torch.ones(2)), torch.ones(0, 2))) == []


def test_in_float64_is_exact_and_detached():
    problem = QPForm(torch.eye(2), torch.tensor([0.1, 0.2], requires_grad=True), lower=0.1)
    exact = in_float64(problem)
    assert (exact.dtype, exact.n, exact.batch_shape) == (f64, 2, ())
    assert torch.equal(exact.q, problem.q.detach().double()) and not exact.q.requires_grad
    assert torch.equal(exact.lower, torch.full((2,), 0.1).double())
    assert problem.dtype == torch.float32 and problem.q.requires_grad


@pytest.mark.parametrize("name", FAILURES)
def test_screen(name):
    problem, status = failing(name)
    (data,) = instances(problem)
    screened = screen(data)
    if status == Status.NONFINITE_INPUT or name in ("crossed bounds", "indefinite"):
        assert screened is not None and screened.status == status
    else:
        assert screened is None  # a solver has to find out


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["Q", "q", "A", "b", "G", "h", "lower", "upper"])
def test_screen_looks_at_every_piece(name, value):
    data, _ = everything()
    data = {k: v.clone() for k, v in data.items()}
    data[name].view(-1)[0] = value
    (instance,) = instances(form(data))
    absent = (name in ("h", "upper") and value == torch.inf) or (name == "lower" and value == -torch.inf)
    screened = screen(instance)
    assert screened is None if absent else (screened is not None and screened.status == Status.NONFINITE_INPUT)


def test_a_rounded_semidefinite_hessian_is_not_indefinite():
    data, _ = everything()
    for smallest, refused in ((0.0, False), (-1e-8, False), (-1e-6, True)):
        (instance,) = instances(form(data | {"Q": torch.diag(torch.tensor([smallest, 1, 1, 1, 1], dtype=f64))}))
        screened = screen(instance)
        assert (screened is not None) == refused
        assert not refused or screened.status == Status.NUMERICAL_ERROR


def test_certificate_of_crossed_bounds():
    lower, upper = torch.tensor([0.0, 3.0, 2.0], dtype=f64), torch.tensor([1.0, 1.0, 1.5], dtype=f64)
    found = screen_bounds(lower, upper, p=1, m=2)
    assert found is not None and found.certificate is not None
    x, nu, lam, lam_lower, lam_upper = found.certificate
    assert x.isnan().all() and nu.tolist() == [0] and lam.tolist() == [0, 0]
    assert lam_lower.tolist() == lam_upper.tolist() == [0, 0.5, 0]
    assert -lower @ lam_lower + upper @ lam_upper == -1
    assert screen_bounds(lower, lower, p=0, m=0) is None


def test_rays_are_normalised_and_checked():
    f64, inf = torch.float64, torch.inf
    Q = torch.diag(torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=f64))
    G = torch.tensor([[0.0, -1, 0, 0], [5, 0, 0, 0]], dtype=f64)
    sides = {"h": torch.tensor([1.0, inf], dtype=f64), "lower": [0.0, -inf, -inf, -inf], "upper": [inf, inf, 0, inf]}
    q = torch.tensor([-2.0, 1, 0, 0], dtype=f64)
    (data,) = diffopt.backends.instances(
        QPForm(
            Q,
            q,
            torch.tensor([[0.0, 0, 1, 0]], dtype=f64),
            3.0,
            G,
            **{k: torch.as_tensor(v, dtype=f64) for k, v in sides.items()},
        )
    )

    def along(*x):
        return ray(data, torch.tensor(x, dtype=f64))

    found = along(4.0, 0, 0, 0)
    assert found is not None and found.x.tolist() == [0.5, 0, 0, 0]
    assert found.nu.isnan().all() and found.nu.shape == (1,) and found.lam.shape == (2,)
    assert along(4.0, 0, 0, 1e-7) is not None and along(4.0, 3, 0, 0) is not None
    # The wrong way; curved; along an equality, a row, a bound that forbids it; no way at all.
    for x in ((-1.0, 0, 0, 0), (1, 0, 0, 1e-3), (1, 0, -1e-3, 0), (1, -1e-3, 0, 0), (-1, -1, 0, 0), (0, 0, 0, 0)):
        assert along(*map(float, x)) is None, x
    data["A"] = torch.zeros_like(data["A"])
    assert along(1.0, 0, -1, 0) is not None and along(1.0, 0, 1e-3, 0) is None and along(-1.0, -4, 0, 0) is None


def test_farkas_directions_are_normalised_and_checked():
    # x >= 0 and x0 + x1 <= -2 and an infinite upper bound: lam = 1/2, lam_lower = (1/2, 1/2).
    rows = {"G": torch.ones(1, 2, dtype=f64), "h": torch.tensor([-2.0], dtype=f64), "lower": 0.0}
    (data,) = instances(quadratic([0.0, 0.0], **rows))
    nu, none = torch.zeros(0, dtype=f64), torch.zeros(2, dtype=f64)
    lam, held = torch.tensor([3.0], dtype=f64), torch.tensor([3.0, 3.0], dtype=f64)
    found = farkas(data, nu, lam, held, none)
    assert found is not None
    assert found.lam.tolist() == [0.5] and found.lam_lower.tolist() == [0.5, 0.5] and found.x.isnan().all()
    assert farkas(data, nu, lam, held + 1e-7, none) is not None
    assert farkas(data, nu, lam, held + 1e-3, none) is None
    assert farkas(data, nu, -lam, -held, none) is None
    assert farkas(data, nu, lam, held, none + 3) is None  # leans on a bound that is not there
    assert farkas(data, nu, lam * torch.nan, held, none) is None


def test_stack():
    problem = QPForm(torch.eye(2), torch.zeros(3, 2), torch.ones(1, 2), torch.zeros(1))
    x = torch.tensor([0.1, 0.2], dtype=f64)
    zero, nothing = torch.zeros(2, dtype=f64), torch.zeros(0, dtype=f64)
    proof = Certificate(zero * torch.nan, torch.ones(1, dtype=f64), nothing, zero, zero)
    points = [
        InstancePoint(Status.SOLVED, x, x[:1], nothing, zero, zero, iterations=4, executor="b"),
        InstancePoint(Status.PRIMAL_INFEASIBLE, certificate=proof),
        InstancePoint(Status.MAX_ITERATIONS, x, iterations=9, executor="a"),
    ]
    raw = stack(problem, points, "none")
    assert raw.x.dtype == torch.float32 and torch.equal(raw.x[0], x.float())
    assert raw.x[1].isnan().all() and raw.nu[2].isnan().all() and raw.lam.shape == (3, 0)
    assert raw.status.tolist() == [1, 4, 3] and raw.iterations.tolist() == [4, 0, 9]
    assert raw.executor == "a+b"
    assert raw.certificate is not None
    assert raw.certificate.nu.isnan().squeeze(-1).tolist() == [True, False, True]
    empty = stack(QPForm(torch.eye(2), torch.zeros(4, 0, 2)), [], "none")
    assert empty.x.shape == (4, 0, 2) and empty.status.shape == (4, 0)
    assert (empty.executor, empty.certificate) == ("none", None)


def test_solve_each_polishes_if_asked_and_rounds_once():
    q = torch.tensor([1 / 3, 2 / 3])
    problem = QPForm(torch.eye(2), q, lower=-1.0)
    zero, nothing = torch.zeros(2, dtype=f64), torch.zeros(0, dtype=f64)

    def solve_one(data):
        return InstancePoint(Status.SOLVED, -data["q"] + 1e-3, nothing, nothing, zero, zero)

    rough = solve_each(problem, Settings(polish=False), instances(problem), solve_one, "rough")
    assert torch.equal(rough.x, (-q.double() + 1e-3).float()) and rough.executor == "rough"
    polished = solve_each(problem, Settings(), instances(problem), solve_one, "rough")
    assert torch.equal(polished.x, -q) and polished.s is not None and polished.s.shape == (0,)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "x",
            torch.zeros(3, 4, dtype=f64),
            r"wrong `x`. Expected shape \(3, 2\) of torch.float64, got shape \(3, 4\) of torch.float64",
        ),
        (
            "x",
            torch.zeros(3, 2),
            r"wrong `x`. Expected shape \(3, 2\) of torch.float64, got shape \(3, 2\) of torch.float32",
        ),
        ("x", torch.zeros(2, dtype=f64), r"Expected shape \(3, 2\) of torch.float64, got shape \(2,\)"),
        ("x", None, r"wrong `x`. .*got NoneType"),
        ("lam", torch.zeros(3, 1, dtype=f64), r"wrong `lam`. Expected shape \(3, 0\)"),
        ("s", torch.zeros(3, 1, dtype=f64), r"wrong `s`. Expected shape \(3, 0\)"),
        (
            "status",
            torch.tensor(1, dtype=torch.int8),
            r"wrong `status`. Expected whole numbers of shape \(3,\).*got shape \(\)",
        ),
        (
            "status",
            torch.ones(3),
            r"Expected whole numbers of shape \(3,\), one for each .* got shape \(3,\) of torch.float32",
        ),
        ("status", torch.full((3,), 77, dtype=torch.int8), "wrong `status`. Expected values of diffopt.Status, got 77"),
        ("status", Status.SOLVED, "wrong `status`. .*got Status"),
        ("iterations", 5, "wrong `iterations`. .*got int"),
    ],
)
def test_what_does_not_fit_the_form_is_refused(field, value, message):
    class Wrong(Fixed):
        def _solve(self, form, settings):
            raw = super()._solve(form, settings)
            setattr(raw, field, value)
            return raw

    with pytest.raises(diffopt.BackendError, match=f"Backend 'Wrong' returned a .*{message}"):
        Wrong().solve(quadratic(torch.ones(3, 2)), Settings())


def test_what_is_no_point_is_refused():
    class Nothing(Fixed):
        def _solve(self, form, settings):
            return None

    with pytest.raises(
        diffopt.BackendError, match=r"'Nothing' returned NoneType. Expected a diffopt.backends.RawPoint"
    ):
        Nothing().solve(quadratic([1.0]), Settings())


def test_an_instance_of_the_wrong_size_is_named():
    points = [InstancePoint(Status.SOLVED, *(torch.zeros(k, dtype=f64) for k in (2, 0, 0, 2, 2))) for _ in range(3)]
    points[1].lam_lower = torch.zeros(3, dtype=f64)
    with pytest.raises(diffopt.BackendError, match=r"instance 1, `lam_lower` is wrong. Expected \(2,\), got \(3,\)"):
        stack(quadratic(torch.ones(3, 2)), points, "default")


def test_a_claim_that_residuals_do_not_bear_out_is_told_apart_from_an_indefinite_hessian():
    q = torch.tensor([[0.5, -0.5], [1.0, 2.0]], dtype=f64)
    wrong = Fixed(x=-q + torch.tensor([[0.0], [0.1]], dtype=f64))
    with pytest.raises(diffopt.SolveFailed) as caught:
        diffopt.solve_qp(torch.eye(2, dtype=f64), q, backend=wrong)
    message = str(caught.value)
    assert (
        "[1]: NUMERICAL_ERROR (its point misses the optimality conditions; relative residuals: primal 0.0e" in message
    )
    assert "Q" not in message and "check that the problem is convex and its data well scaled" in message
    with pytest.raises(diffopt.SolveFailed, match=r"NUMERICAL_ERROR \(Q is not positive semidefinite"):
        diffopt.solve_qp(-torch.eye(2, dtype=f64), q, backend=Fixed(x=q + 0.1))
    with pytest.raises(diffopt.SolveFailed, match=r"NUMERICAL_ERROR\n"):
        diffopt.solve_qp(torch.eye(2, dtype=f64), q, backend=Fixed(x=q * torch.nan))
