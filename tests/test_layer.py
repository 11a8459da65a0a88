"""The layer as a module, and what it says to bad input."""

import copy

import pytest
import torch

import diffopt
from diffopt import (
    BackendNotInstalled,
    BackendUnsupported,
    InaccurateSolutionWarning,
    Layer,
    ParameterError,
    QPStructure,
    Settings,
    SettingsError,
    SolveFailed,
    Status,
    UnknownBackend,
    fixed,
    given,
    learned,
)
from problems_catalogue import Softmax


def structure():
    return QPStructure(
        3,
        Q=fixed(1.0, form="scaled_identity"),
        q=given(),
        A=learned(torch.ones(1, 3)),
        b=learned(torch.ones(1)),
        lower=0.0,
    )


def test_layers_of_one_structure_share_nothing():
    problem = structure()
    one, two = Layer(problem), Layer(problem)
    assert [name for name, _ in one.named_parameters()] == ["A", "b"]
    with torch.no_grad():
        one.b.fill_(2.0)
    q = torch.zeros(3)
    assert torch.allclose(one(q=q).sum(), torch.tensor(2.0)) and torch.allclose(two(q=q).sum(), torch.tensor(1.0))
    assert torch.allclose(diffopt.solve(problem, {"q": q}).x.sum(), torch.tensor(1.0))
    assert "QPStructure, backend='auto', on_failure='raise'" in repr(one)


def test_it_trains_moves_and_copies_like_any_module():
    layer = Layer(structure()).double()
    q, target = torch.randn(16, 3, dtype=torch.float64), torch.tensor([0.5, 0.25, 0.0], dtype=torch.float64)
    optimizer = torch.optim.Adam(layer.parameters(), 0.05)
    losses = []
    for _ in range(30):
        loss = (layer(q=q) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(q=q), layer(q=q)) and twin.A is not layer.A
    fresh = Layer(structure()).double()
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(q=q), layer(q=q))
    assert layer.float()(q=q.float()).dtype == torch.float32


def test_batch_dimensions_lead_and_broadcast():
    x = Layer(structure())(q=torch.randn(4, 1, 3) + torch.zeros(1, 5, 1))
    assert x.shape == (4, 5, 3) and torch.allclose(x.sum(-1), torch.ones(4, 5), atol=1e-5)


BAD = [
    (lambda: Layer(torch.eye(2)), ParameterError, "`problem` is Tensor. Expected a diffopt.DifferentiableProblem"),
    (
        lambda: Layer(structure(), backend="cvx"),
        UnknownBackend,
        "Unknown backend 'cvx'. Expected 'auto', one of .*'pdipm'",
    ),
    (
        lambda: Layer(structure(), settings={"tolerance": 1}),
        SettingsError,
        r"`settings` is dict. Expected diffopt.Settings\(...\)",
    ),
    (
        lambda: Layer(structure(), on_failure="ignore"),
        SettingsError,
        "`on_failure` = 'ignore' is unknown. Expected 'raise' or 'return'",
    ),
    (
        lambda: Layer(QPStructure),  # type: ignore[arg-type]
        ParameterError,
        "`problem` is the class QPStructure. Expected a diffopt.DifferentiableProblem",
    ),
    (lambda: diffopt.solve(diffopt.QPForm(None, torch.ones(2))), ParameterError, "`problem` is QPForm. Expected a"),  # type: ignore[arg-type]
    (
        lambda: Layer(QPStructure(3, A=torch.ones(1, 3, requires_grad=True), b=1.0)),
        ParameterError,
        r"`A` of QPStructure is fixed, but its value requires a gradient.*given\(\).*learned\(...\).*value.detach\(\)",
    ),
    (lambda: Layer(structure())(), ParameterError, "needs `q`, which was not given"),
    (lambda: Layer(structure())(q=torch.zeros(3), A=torch.ones(1, 3)), ParameterError, "`A` is declared learned"),
    (lambda: diffopt.solve_qp(torch.eye(2), torch.zeros(2), backend="nope"), UnknownBackend, "Unknown backend 'nope'"),
    (lambda: diffopt.solve_qp(torch.eye(2), torch.zeros(2), settings=3), SettingsError, "`settings` is int"),
    (lambda: diffopt.solve(structure(), {"q": torch.zeros(3)}, on_failure="x"), SettingsError, "`on_failure` = 'x'"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr(diffopt.backends.CvxpyBackend, "requires", ("surely_not_installed",))
    with pytest.raises(BackendNotInstalled, match=r"needs surely_not_installed .*pip install 'diffopt-torch\[cvxpy\]'"):
        Layer(structure(), backend="cvxpy")


def test_a_backend_that_cannot_take_the_problem_says_why():
    with pytest.raises(
        BackendUnsupported, match="'pdipm' cannot take this problem: it takes QPForm, not NonlinearForm. Use 'scipy'"
    ):
        diffopt.solve(Softmax(2), {"c": torch.zeros(2)}, backend="pdipm")


def test_many_failures_are_counted_and_unbatched_ones_named():
    eye = torch.eye(1, dtype=torch.float64)
    lower = torch.ones(20, 1, dtype=torch.float64)
    with pytest.raises(SolveFailed, match="20 of 20 instances.*\n(.*\n)*  and 12 more"):
        diffopt.solve_qp(eye, torch.zeros(1, dtype=torch.float64), lower=lower, upper=0.0)
    with pytest.raises(SolveFailed, match=r"batch index \(\) \(the only instance\): PRIMAL_INFEASIBLE"):
        diffopt.solve_qp(eye, torch.zeros(1, dtype=torch.float64), lower=1.0, upper=0.0)


def test_almost_solved_warns_and_is_differentiable():
    q = torch.tensor([[-1.0, 0.3, 2.0]], dtype=torch.float64, requires_grad=True)
    settings = Settings(tolerance=1e-15, polish=False, max_iterations=6)
    G = torch.tensor([[1.0, 1.0, 0.3], [0.2, -1.0, 1.0]], dtype=torch.float64)
    Q = torch.diag(torch.tensor([1.0, 2.3, 0.7], dtype=torch.float64))
    with pytest.warns(InaccurateSolutionWarning, match=r"1 of 1 instances are only almost solved.*batch index \[0\]"):
        solution = diffopt.solve_qp(Q, q, G=G, h=torch.full((2,), 0.1, dtype=torch.float64), settings=settings)
    assert solution.status.tolist() == [Status.ALMOST_SOLVED]
    assert torch.autograd.grad(solution.x.sum(), q)[0].isfinite().all()


@pytest.mark.parametrize("name", ["forward", "problem", "train"])
def test_a_parameter_named_like_an_attribute_of_a_layer(name):
    def form(self, q, **more):
        return diffopt.QPForm(Q=torch.eye(2), q=q)

    named = type("Named", (diffopt.QuadraticProgram,), {"form": form, "param_names": lambda self: ("q", name)})
    with pytest.raises(diffopt.ParameterError, match=f"Named has a learned parameter `{name}`, a name that a layer"):
        diffopt.Layer(named(**{name: diffopt.learned(torch.ones(2))}))
