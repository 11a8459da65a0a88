"""The registry: who is there, who is chosen and why, and packages of others that register themselves."""

import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch

import diffopt
from diffopt.backends import Backend, Capabilities, CvxpyBackend, PdipmBackend, RawPoint, ScipyBackend, registry
from diffopt.errors import BackendError, BackendLoadWarning, BackendNotInstalled, BackendUnsupported, UnknownBackend
from diffopt.problems import NonlinearForm


class Origin(Backend):
    """Answers 0, which solves min |x|^2 / 2."""

    def _solve(self, form, settings):
        x = form.q.new_zeros(*form.batch_shape, form.n)
        status = torch.full(form.batch_shape, 1, dtype=torch.int8)
        iterations = torch.zeros(form.batch_shape, dtype=torch.int64)
        return RawPoint(x, x[..., :0], x[..., :0], x, x, status, iterations)


@pytest.fixture
def registered(monkeypatch):
    """A registry of this test's own that starts with the real backends."""
    monkeypatch.setattr(registry, "_registered", dict(registry._all()))
    monkeypatch.setattr(registry, "_discovered", True)
    return registry._registered


@pytest.fixture
def problem():
    return diffopt.QPForm(torch.eye(2), torch.zeros(2))


def subclass(name, **attributes):
    return type(name, (Origin,), attributes)


def test_names_and_instances():
    assert diffopt.backends.names() == ("cvxpy", "pdipm", "scipy")
    for name, cls in (("cvxpy", CvxpyBackend), ("pdipm", PdipmBackend), ("scipy", ScipyBackend)):
        backend = diffopt.backends.get(name)
        assert type(backend) is cls and backend.name == name
    mine = ScipyBackend("SLSQP")
    assert diffopt.backends.get(mine) is mine


@pytest.mark.parametrize("unknown", ["ipopt", "", None, ScipyBackend])
def test_unknown_backend(unknown, problem):
    expected = r"Unknown backend .*Expected 'auto', one of 'cvxpy', 'pdipm', 'scipy', or a diffopt.backends.Backend"
    with pytest.raises(UnknownBackend, match=expected):
        diffopt.backends.get(unknown)
    with pytest.raises(UnknownBackend):
        registry.choose(unknown, problem)


def test_missing_package(monkeypatch, problem):
    monkeypatch.setattr(CvxpyBackend, "requires", ("cvxpy_of_tomorrow",))
    assert diffopt.backends.names() == ("cvxpy", "pdipm", "scipy")
    assert diffopt.backends.names(installed_only=True) == ("pdipm", "scipy")
    message = (
        r"Backend 'cvxpy' is not installed: it needs cvxpy_of_tomorrow \(available: pdipm, scipy\)\. "
        r"Install it with `pip install 'diffopt-torch\[cvxpy\]'`\."
    )
    for choice in ("cvxpy", CvxpyBackend()):
        with pytest.raises(BackendNotInstalled, match=message):
            registry.choose(choice, problem)
    with pytest.raises(BackendNotInstalled, match=message):
        diffopt.solve_qp(torch.eye(2), torch.zeros(2), backend="cvxpy")
    told = diffopt.backends.explain(problem)
    assert told.reasons["cvxpy"] == "needs cvxpy_of_tomorrow, which is not installed"


def test_remedy_without_an_extra(registered, problem):
    diffopt.backends.register("remote")(subclass("Remote", requires=("no_such_solver", "nor_this")))
    with pytest.raises(BackendNotInstalled, match=r"pip install 'no_such_solver nor_this'"):
        diffopt.backends.get("remote")


def test_register(registered, problem):
    mine = diffopt.backends.register("origin")(subclass("Mine"))
    assert mine.name == "origin" and "origin" in diffopt.backends.names()
    assert diffopt.backends.register("origin")(mine) is mine  # the same class again is no conflict
    found = diffopt.solve_qp(torch.eye(2), torch.zeros(2), backend="origin")
    assert found.backend == "origin" and bool(found.ok)
    with pytest.raises(BackendError, match="'origin' is already registered .*Mine.* Choose another name"):
        diffopt.backends.register("origin")(subclass("Other"))


@pytest.mark.parametrize("name", ["auto", "", None, Origin])
def test_names_that_are_refused(registered, name):
    with pytest.raises(BackendError, match="Expected a nonempty string other than 'auto'"):
        diffopt.backends.register(name)


def test_classes_that_are_refused(registered):
    for thing in (int, Origin(), "diffopt"):
        with pytest.raises(BackendError, match="Expected a subclass of diffopt.backends.Backend"):
            diffopt.backends.register("thing")(thing)
    with pytest.raises(BackendError, match=r"Backend 'thing' \(Unfinished\) does not write `_solve`"):
        diffopt.backends.register("thing")(type("Unfinished", (Backend,), {}))
    assert "thing" not in diffopt.backends.names()


def test_auto_takes_the_highest_priority_that_can(registered, problem):
    assert registry.choose("auto", problem).name == "pdipm"
    for name, can in (
        ("nonlinear", Capabilities(forms=(NonlinearForm,), priority=1000)),
        ("first", Capabilities(priority=500)),
        ("second", Capabilities(priority=500)),
    ):
        diffopt.backends.register(name)(subclass(name, can=can))
    assert registry.choose("auto", problem).name == "first"
    explanation = diffopt.backends.explain(problem)
    assert explanation.chosen == "first"
    assert explanation.reasons == {
        "cvxpy": "could take it, but its priority (20) is lower than that of first (500)",
        "pdipm": "could take it, but its priority (100) is lower than that of first (500)",
        "scipy": "could take it, but its priority (10) is lower than that of first (500)",
        "nonlinear": "takes NonlinearForm, not QPForm",
        "second": "could take it, but first, of the same priority (500), was registered first",
    }
    lines = str(explanation).splitlines()
    assert lines[0] == "chosen: first" and "  not nonlinear: takes NonlinearForm, not QPForm" in lines


def test_explain_takes_a_problem_and_its_parameters():
    structure = diffopt.QPStructure(n=2, lower=0.0)
    params = {"Q": torch.eye(2), "q": torch.zeros(2)}
    assert diffopt.backends.explain(structure, params).chosen == "pdipm"
    with pytest.raises(diffopt.ParameterError):
        diffopt.backends.explain(structure, {"Q": torch.eye(2)})
    with pytest.raises(diffopt.ParameterError, match="`problem` is Layer. Expected.* Pass its `.problem`."):
        diffopt.backends.explain(diffopt.Layer(structure), params)  # type: ignore[arg-type]


def test_a_named_backend_that_cannot(registered, problem):
    narrow = Capabilities(dtypes=frozenset({torch.float64}))
    diffopt.backends.register("narrow")(subclass("Narrow", can=narrow))
    message = "Backend 'narrow' cannot take this problem: it does not take torch.float32. Use 'cvxpy' or 'pdipm' or"
    with pytest.raises(BackendUnsupported, match=message):
        registry.choose("narrow", problem)


def test_nobody_can(registered, problem):
    registered.clear()
    diffopt.backends.register("narrow")(subclass("Narrow", can=Capabilities(dtypes=frozenset({torch.float64}))))
    with pytest.raises(BackendUnsupported, match=r"can take this problem \(narrow: does not take torch.float32\)"):
        registry.choose("auto", problem)
    with pytest.raises(BackendUnsupported, match="does not take torch.float32. No registered backend takes it."):
        registry.choose("narrow", problem)
    explanation = diffopt.backends.explain(problem)
    assert explanation.chosen is None
    assert str(explanation).startswith("chosen: none, every backend refuses\n  not narrow: ")


def test_a_backend_without_its_package_is_not_constructed(registered, problem):
    def constructed(self):
        raise ImportError("needs what is not there")

    diffopt.backends.register("eager")(subclass("Eager", requires=("not_there",), __init__=constructed))
    assert registry.choose("auto", problem).name == "pdipm"
    assert "not_there" in diffopt.backends.explain(problem).reasons["eager"]


def entry_points(monkeypatch, **loaders):
    """Pretend that packages declare these entry points; a loader that is an exception is raised."""

    def point(name, loaded):
        def load():
            if isinstance(loaded, Exception):
                raise loaded
            return loaded

        return SimpleNamespace(name=name, value=f"their_package:{name}", load=load)

    monkeypatch.setattr(registry, "_discovered", False)
    points = [point(name, loaded) for name, loaded in loaders.items()]
    monkeypatch.setattr(registry.metadata, "entry_points", lambda group: points)


def test_entry_points_are_loaded_once(registered, monkeypatch):
    theirs = subclass("Theirs")
    entry_points(monkeypatch, theirs=theirs, cvxpy=CvxpyBackend)  # one that registers itself as well is no conflict
    assert diffopt.backends.names() == ("cvxpy", "pdipm", "scipy", "theirs")
    assert type(diffopt.backends.get("theirs")) is theirs


def test_broken_entry_points_warn_once_and_are_left_out(registered, monkeypatch, problem):
    good = subclass("Good")
    entry_points(
        monkeypatch,
        broken=ImportError("No module named 'their_dependency'"),
        pdipm=subclass("Impostor"),
        unfinished=type("Unfinished", (Backend,), {}),
        good=good,
    )
    with pytest.warns(BackendLoadWarning) as caught:
        assert registry.choose("auto", problem).name == "pdipm"
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "'broken' = 'their_package:broken' (ImportError: No module named 'their_dependency')" in message
    assert "already registered" in message and "does not write `_solve`" in message
    assert "Repair or uninstall" in message
    assert diffopt.backends.names() == ("cvxpy", "pdipm", "scipy", "good")  # and no second warning
    assert type(diffopt.backends.get("pdipm")) is PdipmBackend


BACKEND_OF_ANOTHER_PACKAGE = '''
"""A backend in a package of its own: problems without constraints, by one solve."""

import torch
from diffopt.backends import Backend, Capabilities, RawPoint

class Direct(Backend):
    can = Capabilities(batched=True, priority=-1)

    def _solve(self, form, settings):
        x = torch.linalg.solve(form.Q.dense(), -form.q.unsqueeze(-1)).squeeze(-1)
        zero, empty = torch.zeros_like(x), x[..., :0]
        status = torch.ones(form.batch_shape, dtype=torch.int8)
        return RawPoint(x, empty, empty, zero, zero, status, status.long())
'''

PROJECT_OF_ANOTHER_PACKAGE = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "diffopt-test-direct"
version = "1.0"

[tool.setuptools]
py-modules = ["diffopt_test_direct"]

[project.entry-points."diffopt.backends"]
direct = "diffopt_test_direct:Direct"
broken = "diffopt_test_direct:NotThere"
"""

USE_OF_ANOTHER_PACKAGE = """
import warnings
import torch, diffopt

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert diffopt.backends.names() == ("cvxpy", "pdipm", "scipy", "direct"), diffopt.backends.names()
    diffopt.backends.names()
(warning,) = caught
assert issubclass(warning.category, diffopt.errors.BackendLoadWarning), warning
assert "'broken' = 'diffopt_test_direct:NotThere'" in str(warning.message)

solution = diffopt.solve_qp(2 * torch.eye(2), torch.tensor([[2.0, 4.0]]), backend="direct")
assert solution.x.tolist() == [[-1, -2]] and solution.backend == "direct" and bool(solution.ok)
explanation = diffopt.backends.explain(diffopt.QPForm(torch.eye(2), torch.ones(2)))
assert explanation.chosen == "pdipm" and "its priority (-1) is lower" in explanation.reasons["direct"]
"""


def test_another_package_registers_by_an_entry_point(tmp_path, monkeypatch):
    source, target = tmp_path / "source", tmp_path / "installed"
    source.mkdir()
    (source / "pyproject.toml").write_text(PROJECT_OF_ANOTHER_PACKAGE)
    (source / "diffopt_test_direct.py").write_text(textwrap.dedent(BACKEND_OF_ANOTHER_PACKAGE))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index"]
    options = ["--no-deps", "--no-build-isolation", "--target", str(target)]
    subprocess.run([*pip, *options, str(source)], check=True)
    here = str(diffopt.__path__[0]).removesuffix("diffopt")
    monkeypatch.setenv("PYTHONPATH", f"{target}{':' if sys.platform != 'win32' else ';'}{here}")
    subprocess.run([sys.executable, "-c", USE_OF_ANOTHER_PACKAGE], check=True)
