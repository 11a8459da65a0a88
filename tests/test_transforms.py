"""Every transform of torch, on every output, backend, executor and problem class; and the table that says so.

A case is a transform, a way to solve and a problem class; it checks every output that the class has. All data of the
problem move along two directions with two numbers t, and what is compared is the map from t to an output: its first
derivatives with central differences of the solve, its second with central differences of the first. A case that cannot
be is absent with the reason that the library, or torch, gives. `docs/transforms.md` is rendered from these cases:
``python tests/test_transforms.py`` writes it, and a test here compares.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import diffopt
from diffopt.check import known
from problems_catalogue import CappedSoftmax, Projection, structure

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "transforms.md"
MARK = "<!-- Rendered by tests/test_transforms.py from the cases that it runs. -->"

f64 = torch.float64
OUTPUTS = ("x", "s", "lam", "nu", "lam_lower", "lam_upper", "value")
FIRST, SECOND = 1e-6, 1e-4
"""Relative errors of first and second derivatives against central differences: the project's stated targets."""
ALIKE = 1e-9
"""The same by another way through torch, relative."""


class Way(NamedTuple):
    """A backend and who carries out its method."""

    backend: str
    executor: str = "auto"

    def __str__(self) -> str:
        return self.backend if self.executor == "auto" else f"{self.backend}:{self.executor}"

    def options(self) -> dict[str, Any]:
        accuracy = diffopt.backends.get(self.backend).can.accuracy
        settings = diffopt.Settings(tolerance=max(1e-9, accuracy), executor=self.executor)  # type: ignore[arg-type]
        return {"backend": self.backend, "settings": settings}


WAYS = (Way("pdipm", "cpu"), Way("pdipm", "torch"), *(Way(n) for n in diffopt.backends.names() if n != "pdipm"))


class Subject:
    """A problem class: a problem with data at which it is smooth, and which two numbers t move.

    Attributes:
        names: the outputs of this class.
        policy: ``on_infeasible``.
    """

    def __init__(
        self, title: str, problem: diffopt.DifferentiableProblem, data: dict[str, Any], policy: Any = None
    ) -> None:
        self.title, self.problem, self.policy = title, problem, policy
        generator = torch.Generator().manual_seed(0)

        def directions(name: str, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            u, v = (0.05 * torch.randn(value.shape, generator=generator, dtype=f64) for _ in range(2))
            return (value, u + u.mT, v + v.mT) if name == "Q" and value.dim() == 2 else (value, u, v)

        self.parts = {
            name: [directions(name, part) for part in (value if isinstance(value, tuple) else (value,))]
            for name, value in data.items()
        }
        form = problem.standard_form(problem.collect(self.params(torch.zeros(2, dtype=f64))))
        bounded = form.lower is not None or form.upper is not None
        sizes = {"s": form.m, "lam": form.m, "nu": form.p, "lam_lower": bounded, "lam_upper": bounded}
        self.names = [name for name in OUTPUTS if sizes.get(name, 1)]

    def params(self, t: Tensor) -> dict[str, Any]:
        """Return the data moved by t, ``(2,)``."""
        moved = {
            name: tuple([start + t[0] * u + t[1] * v for start, u, v in parts]) for name, parts in self.parts.items()
        }
        return {name: parts if len(parts) > 1 else parts[0] for name, parts in moved.items()}

    def outputs(self, way: Way) -> Callable[[Tensor], dict[str, Tensor]]:
        """Return the map from t to the outputs that have entries, each as a vector."""
        options, names = way.options(), self.names_of(way)

        def function(t: Tensor) -> dict[str, Tensor]:
            solution = diffopt.solve(self.problem, self.params(t), on_infeasible=self.policy, **options)
            return {name: getattr(solution, name).reshape(-1) for name in names}

        return function

    def names_of(self, way: Way) -> list[str]:
        """Return the outputs of this class that a backend determines."""
        return (
            [name for name in self.names if "lam" not in name and name != "nu"]
            if self.undetermined(way)
            else self.names
        )

    def undetermined(self, way: Way) -> str | None:
        """Return why multipliers are not among the outputs, or ``None``."""
        if self.policy == "closest" and way.backend == "scipy":
            return "the multipliers of a closest problem are not unique, and those that SciPy finds follow no rule"
        return None


def subjects() -> dict[str, Subject]:
    dense, data = structure(known.quadratic_program(3, 4, 1, 2, bounds="both"))
    linear, linear_data = structure(known.linear_program(6, 4, 1, 4, bounds="both"))
    low_rank, low_data = structure(known.quadratic_program(5, 4, 1, 2, bounds="both"), Q="diagonal_plus_low_rank")
    factor = torch.linspace(-1, 1, 4, dtype=f64).reshape(4, 1)
    low = low_data | {"Q": (torch.tensor([1.0, 2.0, 1.5, 1.2], dtype=f64), factor)}
    point = {"point": torch.tensor([1.0, 0.5], dtype=f64), "a": torch.ones(2, dtype=f64), "level": torch.tensor(1.0)}
    point["level"] = point["level"].double()
    # Infeasible whatever t is, and the least violation determines x.
    apart, apart_data = structure(known.quadratic_program(3, 2, 1, 2, bounds="both"))
    sides: dict[str, Any] = {"Q": [[2.0, 0.3], [0.3, 1.0]], "q": [0.5, -0.2]}
    sides |= {"A": [[1.0, -0.5]], "b": [2.0], "G": [[1.0, 0.5], [-0.3, 1.0]], "h": [-1.0, 9.0]}
    sides |= {"lower": [0.3, 0.2], "upper": [4.0, 4.0]}
    apart_data |= {name: torch.tensor(value, dtype=f64) for name, value in sides.items()}
    capped = {"c": torch.tensor([-1.0, 0.5, 0.0], dtype=f64), "cap": torch.tensor(0.4, dtype=f64)}
    return {
        "dense": Subject("Quadratic programs, dense Q", dense, data),
        "low_rank": Subject("Quadratic programs, Q diagonal plus low rank", low_rank, low),
        "linear": Subject("Linear programs", linear, linear_data),
        "own": Subject("Structures of one's own (`QuadraticProgram`)", Projection(), point),
        "elastic": Subject(
            "Infeasible programs, `on_infeasible=Elastic('squared')`",
            apart,
            apart_data,
            diffopt.Elastic("squared", row=5.0),
        ),
        "closest": Subject("Infeasible programs, `on_infeasible='closest'`", apart, apart_data, "closest"),
        "functions": Subject("Problems given by their functions (`DifferentiableProblem`)", CappedSoftmax(3), capped),
    }


SUBJECTS = subjects()
START = torch.zeros(2, dtype=f64)


class Reference(NamedTuple):
    values: dict[str, Tensor]
    first: dict[str, Tensor]
    second: dict[str, Tensor]


def reverse_jacobian(function: Callable[[Tensor], dict[str, Tensor]], t: Tensor) -> dict[str, Tensor]:
    t = t.clone().requires_grad_()
    return {
        name: torch.stack([torch.autograd.grad(entry, t, retain_graph=True)[0] for entry in value])
        for name, value in function(t).items()
    }


@functools.cache
def reference(subject: str, way: Way) -> Reference:
    """Return values, first and second derivatives by central differences; the second of the reverse-mode first."""
    function, step = SUBJECTS[subject].outputs(way), 1e-4

    def differences(function: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
        columns = []
        for direction in step * torch.eye(2, dtype=f64):
            high, low = function(START + direction), function(START - direction)
            columns.append({name: (high[name] - low[name]) / (2 * step) for name in high})
        return {name: torch.stack([column[name] for column in columns], -1) for name in columns[0]}

    return Reference(function(START), differences(function), differences(lambda t: reverse_jacobian(function, t)))


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.shape == expected[name].shape, name
        error = (value.detach() - expected[name].detach()).abs().max() / (1 + expected[name].detach().abs().max())
        assert error <= tolerance, (name, float(error))


# ------------------------------------------------------------------ what each transform does, and what it must give


def reverse(subject: str, way: Way) -> None:
    function, known_ = SUBJECTS[subject].outputs(way), reference(subject, way)
    assert any(slope.abs().max() > 1e-3 for slope in known_.first.values())  # t moves something
    assert_close(reverse_jacobian(function, START), known_.first, FIRST)


def forward(subject: str, way: Way) -> None:
    direction = torch.tensor([1.0, -2.0], dtype=f64)
    function, first = SUBJECTS[subject].outputs(way), reference(subject, way).first
    tangents = torch.func.jvp(function, (START,), (direction,))[1]
    assert_close(tangents, {name: slope @ direction for name, slope in first.items()}, FIRST)


def dual_numbers(subject: str, way: Way) -> None:
    direction = torch.tensor([1.0, -2.0], dtype=f64)
    function, first = SUBJECTS[subject].outputs(way), reference(subject, way).first
    with forward_ad.dual_level():
        outputs = function(forward_ad.make_dual(START, direction))
        tangents = {name: forward_ad.unpack_dual(value).tangent for name, value in outputs.items()}
    found = {name: torch.zeros(len(first[name]), dtype=f64) if t is None else t for name, t in tangents.items()}
    assert_close(found, {name: slope @ direction for name, slope in first.items()}, FIRST)


POINTS = torch.tensor([[0.0, 0.0], [0.1, -0.2], [-0.2, 0.1]], dtype=f64)


def stacked(values: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([value[name] for value in values]) for name in values[0]}


def vmap(subject: str, way: Way) -> None:
    function = SUBJECTS[subject].outputs(way)
    found = torch.func.vmap(function, in_dims=1)(POINTS.mT)
    assert_close(found, stacked([function(t) for t in POINTS]), ALIKE)


def nested_vmap(subject: str, way: Way) -> None:
    def outputs(a: Tensor, b: Tensor) -> dict[str, Tensor]:
        return SUBJECTS[subject].outputs(way)(torch.stack([a, b]))

    a, b = POINTS[1:, 0], POINTS[:, 1]
    found = torch.func.vmap(torch.func.vmap(outputs, (None, 0)), (0, None))(a, b)
    assert_close(found, stacked([stacked([outputs(i, j) for j in b]) for i in a]), ALIKE)


def backward_through_vmap(subject: str, way: Way) -> None:
    function, points = SUBJECTS[subject].outputs(way), POINTS.clone().requires_grad_()
    found = {
        name: torch.autograd.grad(value.sum(), points, retain_graph=True)[0]
        for name, value in torch.func.vmap(function)(points).items()
    }
    expected = stacked([{n: j.sum(0) for n, j in reverse_jacobian(function, t).items()} for t in POINTS])
    assert_close(found, expected, ALIKE)


def jacrev(subject: str, way: Way) -> None:
    found = torch.func.jacrev(SUBJECTS[subject].outputs(way))(START)
    assert_close(found, reference(subject, way).first, FIRST)


def jacfwd(subject: str, way: Way) -> None:
    found = torch.func.jacfwd(SUBJECTS[subject].outputs(way))(START)
    assert_close(found, reference(subject, way).first, FIRST)


def vmap_of_jacrev(subject: str, way: Way) -> None:
    function = SUBJECTS[subject].outputs(way)
    found = torch.func.vmap(torch.func.jacrev(function))(POINTS)
    assert_close(found, stacked([reverse_jacobian(function, t) for t in POINTS]), ALIKE)


def hessian(subject: str, way: Way) -> None:
    found = torch.func.hessian(SUBJECTS[subject].outputs(way))(START)
    assert_close(found, reference(subject, way).second, SECOND)


def double_backward(subject: str, way: Way) -> None:
    t, found = START.clone().requires_grad_(), {}
    for name, value in SUBJECTS[subject].outputs(way)(t).items():
        rows = [torch.autograd.grad(entry, t, create_graph=True)[0] for entry in value]
        second = [[torch.autograd.grad(s, t, retain_graph=True, materialize_grads=True, allow_unused=True)[0]
                   if s.requires_grad else torch.zeros(2, dtype=f64) for s in row] for row in rows]  # fmt: skip
        found[name] = torch.stack([torch.stack(row) for row in second])
    assert_close(found, reference(subject, way).second, SECOND)


def vector(subject: str, way: Way) -> Callable[[Tensor], Tensor]:
    function = SUBJECTS[subject].outputs(way)
    return lambda t: torch.cat(list(function(t).values()))


def gradcheck(subject: str, way: Way) -> None:
    function, t = vector(subject, way), START.clone().requires_grad_()
    assert torch.autograd.gradcheck(function, t, check_batched_grad=True, check_forward_ad=True)
    assert torch.autograd.gradcheck(function, t, check_forward_ad=True, fast_mode=True)


def gradgradcheck(subject: str, way: Way) -> None:
    function, t = vector(subject, way), START.clone().requires_grad_()
    assert torch.autograd.gradgradcheck(function, t)
    assert torch.autograd.gradgradcheck(function, t, fast_mode=True)


def compiled(subject: str, way: Way) -> None:
    function = SUBJECTS[subject].outputs(way)
    torch.compiler.reset()
    graph = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_close(graph(START), reference(subject, way).values, ALIKE)
    assert_close(reverse_jacobian(graph, START), reverse_jacobian(function, START), ALIKE)
    torch.compiler.reset()


class Module(torch.nn.Module):
    def __init__(self, function: Callable[[Tensor], dict[str, Tensor]]) -> None:
        super().__init__()
        self.function = function

    def forward(self, t: Tensor) -> dict[str, Tensor]:
        return self.function(t)


def exported(subject: str, way: Way) -> None:
    function = SUBJECTS[subject].outputs(way)
    program = torch.export.export(Module(function), (START,))
    assert_close(program.module()(POINTS[1]), function(POINTS[1]), ALIKE)


TRANSFORMS: dict[str, Callable[[str, Way], None]] = {
    "`backward`": reverse,
    "`torch.func.jvp`": forward,
    "`torch.autograd.forward_ad`": dual_numbers,
    "`vmap` over data": vmap,
    "`vmap` of `vmap`, each over some": nested_vmap,
    "`backward` through `vmap`": backward_through_vmap,
    "`jacrev`": jacrev,
    "`jacfwd`": jacfwd,
    "`vmap` of `jacrev`": vmap_of_jacrev,
    "`hessian`": hessian,
    "`backward` twice (`create_graph`)": double_backward,
    "`gradcheck`, batched and forward too": gradcheck,
    "`gradgradcheck`": gradgradcheck,
    "`torch.compile`, `backward`": compiled,
    "`torch.export`": exported,
}


@functools.cache
def absent(transform: str, subject: str, way: Way) -> str | None:
    """Return why a case cannot be, in the words of the library, or ``None``."""
    problem = SUBJECTS[subject]
    try:
        problem.outputs(way)(START)
    except diffopt.BackendUnsupported as error:
        return str(error).split(" cannot take this problem: it ")[-1].split(". ")[0]
    if transform == "`torch.export`" and not isinstance(problem.problem, diffopt.QuadraticProgram):
        try:
            torch.export.export(Module(problem.outputs(way)), (START,))
        except diffopt.NotDifferentiableError as error:
            return str(error).split(". ")[0]
    return None


def cases() -> Iterator[tuple[str, str, Way]]:
    for subject in SUBJECTS:
        for transform in TRANSFORMS:
            for way in WAYS:
                if absent(transform, subject, way) is None:
                    yield transform, subject, way


CASES = list(cases())
ALWAYS = ("`backward`", "`torch.func.jvp`", "`vmap` over data", "`hessian`")


def parameters() -> Iterator[Any]:
    """Return the cases for pytest. ``make test`` runs those of two classes (of the one the primary backend's), and of
    the others some of one way; ``make slow`` runs the rest."""
    for transform, subject, way in CASES:
        whole = subject == "functions" or (subject == "dense" and way.backend == "pdipm")
        some = transform in ALWAYS and way == next(case[2] for case in CASES if case[1] == subject)
        marks = [] if whole or some else [pytest.mark.slow]
        yield pytest.param(transform, subject, way, marks=marks, id=f"{transform}-{subject}-{way}".replace("`", ""))


@pytest.mark.parametrize(("transform", "subject", "way"), list(parameters()))
def test_transform(transform: str, subject: str, way: Way) -> None:
    TRANSFORMS[transform](subject, way)


# ------------------------------------------------------------------ the table


def rendered() -> str:
    """Return the tables: for each problem class a row for each transform, a column for each way, and the outputs."""
    lines = [MARK, ""]
    for subject, found in SUBJECTS.items():
        ways = [way for way in WAYS if any(case[1:] == (subject, way) for case in CASES)]
        lines += [
            f"### {found.title}",
            "",
            "| |" + "".join(f" {way} |" for way in ways),
            "| --- |" * 1 + " --- |" * len(ways),
        ]
        for transform in TRANSFORMS:
            cells = (" ".join(found.names_of(way)) if (transform, subject, way) in CASES else "absent" for way in ways)
            lines.append(f"| {transform} |" + "".join(f" {cell} |" for cell in cells))
        lines.append("")
        for way in WAYS:
            reasons = {reason for transform in TRANSFORMS if (reason := absent(transform, subject, way))}
            for reason in sorted(reasons):
                which = [transform for transform in TRANSFORMS if absent(transform, subject, way) == reason]
                where = f"{way}, {' and '.join(which)}" if way in ways else str(way)
                lines.append(f"- Absent: {where}: {reason}.")
            if way in ways and (reason := found.undetermined(way)):
                lines.append(f"- Absent: {way}, lam nu lam_lower lam_upper: {reason}.")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def test_the_page_shows_the_cases_that_run() -> None:
    text = PAGE.read_text()
    assert text[text.index(MARK) :] == rendered(), f"run `python tests/test_transforms.py` to write {PAGE.name} anew"


if __name__ == "__main__":
    head = PAGE.read_text()
    PAGE.write_text(head[: head.index(MARK)] + rendered())
    sys.exit(0)
