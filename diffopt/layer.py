"""What users call: a problem, a backend and a gradient put together."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffopt import implicit, infeasible, operators, pulled, relaxed, selected, transformed, transforms, warm_start
from diffopt.backends.base import Backend
from diffopt.backends.registry import choose, get
from diffopt.errors import (
    InaccurateSolutionWarning,
    NotDifferentiableError,
    ParameterError,
    SettingsError,
    SolveFailed,
)
from diffopt.infeasible import Elastic
from diffopt.linalg.matrices import SymmetricMatrix
from diffopt.precision import full_precision, lowered, raised
from diffopt.problems.base import DifferentiableProblem, Params
from diffopt.problems.forms import Form, QPForm
from diffopt.solution import REMEDIES, Certificate, Report, Solution, Status, eigenvalues, succeeded
from diffopt.solvers.settings import Settings
from diffopt.warm_start import Start

OnFailure = Literal["raise", "return"]
OnInfeasible = Elastic | Literal["elastic", "closest"] | None
_DEFAULT = Settings()
MOST_NAMED = 8
ROUNDED = 1e-12
"""Negative eigenvalue, relative to the largest magnitude of one, that may be rounding error."""


class Layer(nn.Module):
    """An optimization problem as a module: parameters in, solution out, gradients to everything.

    Learned values of the problem become ``nn.Parameter``, fixed ones buffers, as copies: two
    layers of one problem share nothing. The others are given at each call, by name or in the order of
    ``problem.given_names()`` (so a layer that takes one tensor fits into ``nn.Sequential``).

    Args:
        problem: a `DifferentiableProblem`.
        backend: ``"auto"``, a name in ``diffopt.backends.names()``, or a backend instance.
        settings: see `Settings`.
        on_failure: ``"raise"`` (default) raises `SolveFailed` when any instance is not solved;
            ``"return"`` returns all of them, and ``solve(...).ok`` says which to use.
        on_infeasible: what becomes of a quadratic program that no x satisfies. ``None`` (default): it fails.
            ``"elastic"`` or an `Elastic`: its constraints are soft, at a price (in every instance, feasible or
            not). ``"closest"``: the sides b, h, lower and upper are shifted by the least shifts, in the 2-norm of
            all of them, that some x satisfies, and that program is solved; feasible instances are left as they
            are. `Solution.shifts` says by how much.

    Raises:
        UnknownBackend, BackendNotInstalled, SettingsError: at construction.
        ParameterError: at construction, too: a parameter that calls give is named `start`.
    """

    def __init__(
        self,
        problem: DifferentiableProblem,
        backend: str | Backend = "auto",
        settings: Settings | None = None,
        on_failure: OnFailure = "raise",
        on_infeasible: OnInfeasible = None,
    ) -> None:
        super().__init__()
        if not isinstance(problem, DifferentiableProblem):
            raise ParameterError(
                f"`problem` is {type(problem).__name__}. Expected a diffopt.DifferentiableProblem, for "
                f"example diffopt.QPStructure(n=...)."
            )
        if "start" in problem.given_names():
            raise ParameterError(
                f"{type(problem).__name__} has a parameter `start`, but calls of a layer take an earlier solution "
                f"under this name. Give the parameter another name, declare it learned or fixed, or use "
                f"diffopt.solve, which takes the parameters apart from `start`."
            )
        self.problem = problem
        self.backend = _checked_backend(backend)
        self.settings = _checked_settings(settings)
        self.on_failure: OnFailure = _checked_policy(on_failure, self.settings)
        self.on_infeasible: infeasible.Policy = infeasible.checked_policy(on_infeasible)
        self._parts: dict[str, tuple[str | float, ...]] = {}
        for name, declared in (problem.declared | infeasible.declared_weights(self.on_infeasible)).items():
            kept: list[str | float] = []
            for part_name, part in zip(declared.part_names(name), declared.parts, strict=False):
                if not isinstance(part, Tensor):
                    kept.append(part)
                    continue
                copy = part.detach().clone()
                if declared.kind == "learned":
                    self.register_parameter(part_name, nn.Parameter(copy))
                else:
                    self.register_buffer(part_name, copy)
                kept.append(part_name)
            if kept:
                self._parts[name] = tuple(kept)

    def forward(self, *ordered: Any, start: Any = None, **given: Any) -> Tensor:
        """Return the minimiser x, ``(*batch, n)``. Arguments, errors, derivatives as in `solve`."""
        return self.solve(*ordered, start=start, **given).x

    def solve(self, *ordered: Any, start: Any = None, **given: Any) -> Solution:
        """Solve for the given parameter values and return the whole `Solution`.

        Inside a region of ``torch.autocast`` half-precision values are cast up, and the solve leaves the region.

        Args:
            ordered: the first of the parameters below, in the order of ``problem.given_names()``.
            start: an earlier `Solution` of a problem of the same sizes (or anything with x, nu, lam, lam_lower and
                lam_upper), with the same batch dimensions or some that broadcast to them. It saves steps where
                little has changed: each instance first tries its active set, then begins the method near it,
                then without it. It changes no status, and no solution that is unique; no gradient flows into it.
                Instances of it that were not solved are left out. A backend that has no use for it ignores it.
            given: the parameters that the problem does not declare learned or fixed, by name (and weights of `Elastic`
                constraints that are declared so); batch dimensions lead and broadcast, a tensor without them is shared.

        Raises:
            ParameterError, ShapeError, DtypeError, DeviceError: bad input, before anything is solved.
            SettingsError: ``start`` together with ``on_infeasible``.
            BackendUnsupported: no backend, or not the named one, takes the problem.
            SolveFailed: an instance was not solved and ``on_failure="raise"``.

        Differentiable in:
            every given and learned tensor.
        """
        values = self._named(ordered, given) if ordered else given
        if lowered():
            with full_precision():
                return self._solve(raised(values, chain(self.parameters(), self.buffers())), start)
        return self._solve(values, start)

    def _solve(self, given: Mapping[str, Any], start: Any) -> Solution:
        own = {name: self._own(parts) for name, parts in self._parts.items()}
        policy = self.on_infeasible
        weights: dict[str, Any] = {}
        if policy is not None:
            weights, given = infeasible.take_weights(policy, given, own)
        form = self.problem.standard_form(self.problem.collect(given, own))
        return _solve_form(form, self.backend, self.settings, self.on_failure, policy, weights, start)

    def _named(self, ordered: tuple[Any, ...], given: dict[str, Any]) -> dict[str, Any]:
        """Return all values by name."""
        names = self.problem.given_names()
        listing = ", ".join(f"`{name}`" for name in names) or "none"
        if len(ordered) > len(names):
            raise ParameterError(
                f"{type(self.problem).__name__} got {len(ordered)} values without a name. A call gives "
                f"{len(names)} ({listing}); the others are declared learned, fixed or absent."
            )
        for name in names[: len(ordered)]:
            if name in given:
                raise ParameterError(
                    f"`{name}` was given twice, by its place and by its name. The order is {listing}. Give it once."
                )
        return dict(zip(names, ordered, strict=False)) | given

    def _own(self, parts: tuple[str | float, ...]) -> Any:
        values = tuple(getattr(self, part) if isinstance(part, str) else part for part in parts)
        return values if len(values) != 1 else values[0]

    def extra_repr(self) -> str:
        backend = self.backend if isinstance(self.backend, str) else self.backend.name
        return f"{type(self.problem).__name__}, backend={backend!r}, on_failure={self.on_failure!r}"


def solve(
    problem: DifferentiableProblem,
    params: Params | None = None,
    *,
    backend: str | Backend = "auto",
    settings: Settings | None = None,
    on_failure: OnFailure = "raise",
    on_infeasible: OnInfeasible = None,
    start: Any = None,
) -> Solution:
    """Solve a batch of problems of any class.

    Args:
        problem: the problem class; its learned and fixed values are those of its declarations.
        params: the other parameter values, by name.
        backend, settings, on_failure, on_infeasible: as in `Layer`; start: as in `Layer.solve`.

    Returns, raises, differentiable in: as `Layer.solve`.
    """
    solver, chosen = _checked_backend(backend), _checked_settings(settings)
    policy = _checked_policy(on_failure, chosen)
    soft = infeasible.checked_policy(on_infeasible)

    def run(params: Params) -> Solution:
        weights, given = infeasible.take_weights(soft, params)
        form = problem.standard_form(problem.collect(given))
        return _solve_form(form, solver, chosen, policy, soft, weights, start)

    params = params or {}
    if lowered():
        own = (part for declared in problem.declared.values() for part in declared.parts if isinstance(part, Tensor))
        with full_precision():
            return run(raised(params, own))
    return run(params)


def solve_qp(
    Q: Tensor | SymmetricMatrix | None,
    q: Tensor,
    A: Tensor | None = None,
    b: Tensor | float | None = None,
    G: Tensor | None = None,
    h: Tensor | float | None = None,
    lower: Tensor | float | None = None,
    upper: Tensor | float | None = None,
    *,
    backend: str | Backend = "auto",
    settings: Settings | None = None,
    on_failure: OnFailure = "raise",
    on_infeasible: OnInfeasible = None,
    start: Any = None,
) -> Solution:
    r"""Solve a batch of quadratic programs.

    minimise 1/2 x'Qx + q'x subject to Ax = b, Gx <= h, lower <= x <= upper.

    Args:
        Q, q, A, b, G, h, lower, upper: as in `QPForm`; Q = ``None`` is a linear program.
        backend, settings, on_failure, on_infeasible: as in `Layer`; start: as in `Layer.solve`.

    Returns:
        :class:`Solution`, with the signs stated there.

    Raises:
        ShapeError, DtypeError, DeviceError, ParameterError, BackendError, SolveFailed: as `Layer.solve`.

    Differentiable in:
        every tensor given, the weights of an `Elastic` too; Q's gradient is symmetric. Where a constraint is
        weakly active the derivative follows ``settings.kink_rule``.

    References:
        Amos and Kolter (2017), "OptNet", equations 6 to 8 (dG there has a factor D(lam) too many).
    """
    solver, chosen = _checked_backend(backend), _checked_settings(settings)
    policy = _checked_policy(on_failure, chosen)
    soft, weights = None, None
    if on_infeasible is not None:
        soft = infeasible.checked_policy(on_infeasible)
        weights = infeasible.take_weights(soft, {})[0]
    if lowered():
        data = {"Q": Q, "q": q, "A": A, "b": b, "G": G, "h": h, "lower": lower, "upper": upper}
        with full_precision():
            return _solve_form(QPForm(**raised(data)), solver, chosen, policy, soft, weights, start)
    return _solve_form(QPForm(Q, q, A, b, G, h, lower, upper), solver, chosen, policy, soft, weights, start)


def _solve_form(
    form: Form, backend: str | Backend, settings: Settings, on_failure: OnFailure, policy: infeasible.Policy = None,
    weights: dict[str, Any] | None = None, start: Any = None,
) -> Solution:  # fmt: skip
    near = None if start is None else warm_start.read(start)
    if policy is None:
        solution, reported = _attached(form, backend, settings, on_failure, near)
    else:
        _refuse_together(form, settings, policy, near)

        def each(form: QPForm) -> Solution:
            return _attached(form, backend, settings, "return", None)[0]

        solution = infeasible.solve(form, policy, weights or {}, each, settings.tolerance_for(form.dtype))
        reported = False
    if reported or not settings.sync:
        return solution
    if torch.compiler.is_compiling():
        return operators.reported(solution, on_failure)
    _report(solution, on_failure)
    return solution


def _refuse_together(form: Form, settings: Settings, policy: infeasible.Policy, near: Start | None) -> None:
    if near is not None:
        raise SettingsError(
            f"`start` and on_infeasible={policy!r} do not go together: other problems than this one are solved "
            f"then, of which the start says nothing. Leave `start` out."
        )
    if not settings.sync:
        raise SettingsError(
            "`on_infeasible` looks at values, which Settings(sync=False) forbids. Leave out one of the two."
        )
    if settings.selection is not None:
        raise SettingsError(
            "`selection` and `on_infeasible` do not go together: the problem that is solved has other variables, or "
            "sides that only just meet. Leave one of them out."
        )
    if policy == "closest" and settings.relaxation is not None:
        raise SettingsError(
            "`relaxation` and on_infeasible='closest' do not go together: the closest problem has no interior, "
            "and so no central path. Use on_infeasible='elastic', or leave `relaxation` out."
        )


def _attached(
    form: Form, backend: str | Backend, settings: Settings, on_failure: OnFailure, near: Start | None
) -> tuple[Solution, bool]:
    """Return the solution, attached to the form, and whether no more need be said about its failures."""
    if settings.selection is not None:
        return _selected(form, backend, settings, on_failure, near)
    if settings.relaxation is None:
        return _exactly(form, backend, settings, on_failure, near)
    relaxed.check(form)
    if torch.compiler.is_compiling():
        return _exactly(form, backend, settings, on_failure, near)  # (the operators know of it)
    if any(map(transforms.mapped_here, form.tensors().values())):
        return _mapped(form, backend, settings, on_failure, near), True
    solution, reported = _exactly(form, backend, settings, on_failure, near)
    if not implicit.needs_graph(form):
        return solution, reported

    def work(plain: Form) -> Any:
        return choose(backend, plain).solve(plain, settings)

    return relaxed.relax(form, solution, settings, work, _plainly), reported


def _selected(
    form: Form, backend: str | Backend, settings: Settings, on_failure: OnFailure, near: Start | None
) -> tuple[Solution, bool]:
    selected.check(form)
    assert isinstance(form, QPForm)
    if torch.compiler.is_compiling():
        raise NotDifferentiableError(
            "Settings(selection=...) does not go inside torch.compile or torch.export. Call the layer outside."
        )
    if any(map(transforms.mapped_here, form.tensors().values())):
        return _mapped(form, backend, settings, on_failure, near), True
    if transforms.active():
        raise NotDifferentiableError(
            "Settings(selection=...) does not go inside the derivatives of torch.func, because it looks at values. Use "
            "torch.autograd.grad or backward; torch.func.vmap over the data does go."
        )
    inner = settings.replace(selection=None)

    def second(form: QPForm) -> Solution:
        return _exactly(form, backend, inner, "return", None)[0]

    first, _ = _exactly(form, backend, inner, "return", near)
    return selected.select(form, first, settings, second), False


def _exactly(
    form: Form, backend: str | Backend, settings: Settings, on_failure: OnFailure, near: Start | None
) -> tuple[Solution, bool]:
    if torch.compiler.is_compiling():
        return operators.solution(form, backend, settings, on_failure, near), True
    if transforms.active():
        return _transformed(form, backend, settings, on_failure, near), True
    if near is not None:
        near = warm_start.fitted(near, form)
    solver = choose(backend, form)
    attached = implicit.needs_graph(form)
    found = solver.solve(form, settings, attached, near)
    solution = pulled.attach_solved(form, found, attached, settings.kink_rule, settings.weak_tolerance_for(form.dtype))
    return solution, found.solved


def _plainly(form: Form, work: Callable[[Form], relaxed.Found]) -> relaxed.Found:
    """Call a function with the form over plain tensors, also inside the transforms of ``torch.func``."""
    if not transforms.active():
        with torch.no_grad():
            return work(form.detach())
    done: list[relaxed.Found] = []

    def run(inner: Form) -> tuple[Tensor, ...]:
        done.append(work(inner.detach()))
        return (*implicit.flatten(done[0].prepared), done[0].residual, done[0].failed)

    call = transforms.Call(form, run, implicit.BATCH_SECOND, all_layers=True)
    tensors = (tensor.detach() for tensor in form.tensors().values())
    *prepared, residual, failed = transforms.Unwrapped.apply(call, *tensors)
    return relaxed.Found(implicit.unflatten(done[0].prepared, tuple(prepared)), residual, failed)


def _transformed(
    form: Form, backend: str | Backend, settings: Settings, on_failure: OnFailure, near: Start | None
) -> Solution:
    """Solve inside transforms of ``torch.func``.

    Is the innermost a vmap over the data, then the mapped dimension becomes a leading batch dimension, and the rest is
    an ordinary call, by the fastest way that there is. Otherwise a derivative is being taken: the problem is solved on
    tensors unwrapped to the last, and the solution attached to the wrapped ones: by its solver's own derivative where
    nobody takes a derivative of that, else by its Newton step, which torch then transforms as it does any function.
    """
    tensors = form.tensors().values()
    if any(map(transforms.mapped_here, tensors)):
        return _mapped(form, backend, settings, on_failure, near)
    rule, weak_tolerance = settings.kink_rule, settings.weak_tolerance_for(form.dtype)
    known: Any = None
    layers = transforms.layers_of(tensors)
    if layers is not None:
        with transforms.outside():
            plain = layers.plain(form)
            first = None if near is None else warm_start.fitted(layers.start(near, form), plain)
            known = choose(backend, plain).solve(plain, settings, True, first)
            if settings.sync and not known.solved:
                _report(pulled.attach_solved(plain, known, False, rule, weak_tolerance), on_failure)
        if isinstance(form, QPForm) and isinstance(plain, QPForm) and transformed.takes(known, rule):
            return transformed.attach(form, plain, known, layers, weak_tolerance)
        with transforms.outside():
            known = known.unpacked()

    def prepare(plain: Form) -> implicit.Prepared:
        found = known
        if found is None:
            bare = None if near is None else warm_start.fitted(Start(*map(transforms.bare, near)), plain)
            found = choose(backend, plain).solve(plain, settings, start=bare)
        prepared = implicit.prepare(plain, found, rule, weak_tolerance)
        if known is None and settings.sync:
            _report(implicit.attach(plain, prepared), on_failure)
        return prepared

    return implicit.attach(form, implicit.prepared_inside(form, prepare), transformed=True)


_FIELDS = ("x", "s", "lam", "nu", "lam_lower", "lam_upper", "status")


def _mapped(
    form: Form, backend: str | Backend, settings: Settings, on_failure: OnFailure, near: Start | None
) -> Solution:
    """Solve with the dimension that the innermost vmap maps as the first batch dimension."""
    lead = len(form.batch_shape)
    inside = None if near is None else Start(*(transforms.mapped_first(v, lead, 1) for v in near))
    done: list[Solution] = []

    def run(inner: Form) -> tuple[Tensor, ...]:
        solution = _solve_form(inner, backend, settings, on_failure, start=inside)
        done.append(solution)
        certificate = () if solution.certificate is None else solution.certificate
        relaxation = () if solution.gradient_residual is None else (solution.gradient_residual,)
        return (*solution.report, *(getattr(solution, name) for name in _FIELDS), *certificate, *relaxation)

    call = transforms.Call(form, run, second=2)
    residuals, counts, *rest = transforms.Unwrapped.apply(call, *form.tensors().values())
    (whole,) = done
    fields, rest = rest[: len(_FIELDS)], rest[len(_FIELDS) :]
    certificate, rest = ((), rest) if whole.certificate is None else (rest[:5], rest[5:])

    def value() -> Tensor:
        # On access, as elsewhere. (The tensors only say which dimension is mapped.)
        again = transforms.Call(form, lambda _: (whole.value,), second=0)
        return transforms.Unwrapped.apply(again, *form.tensors().values())[0]

    return Solution(
        **dict(zip(_FIELDS, fields, strict=True)),
        report=Report(residuals, counts),
        certificate=Certificate(*certificate) if certificate else None,
        backend=whole.backend,
        executor=whole.executor,
        gradient=whole.gradient,
        selection=whole.selection,
        gradient_residual=rest[0] if rest else None,
        _value=value,
    )


def _report(solution: Solution, on_failure: OnFailure) -> None:
    """Warn of almost solved instances, and raise for failed ones if so asked."""
    status = transforms.plain(solution.status)
    if bool((status == Status.SOLVED).all()):
        return
    almost = (status == Status.ALMOST_SOLVED).nonzero().tolist()
    failed = (~succeeded(status)).nonzero().tolist()
    if failed and on_failure == "raise":
        raise SolveFailed(_failure_message(solution, status, failed), solution)
    if almost:
        worst = transforms.plain(solution.residuals.worst())[status == Status.ALMOST_SOLVED].max()
        warnings.warn(
            f"{len(almost)} of {status.numel()} instances are only almost solved (worst relative residual "
            f"{float(worst):.1e}; first at batch index {_index(almost[0])}). Loosen `Settings.tolerance` to accept "
            f"them, or use a backend of higher accuracy.",
            InaccurateSolutionWarning,
            stacklevel=4,
        )


operators.report = _report


def _failure_message(solution: Solution, statuses: Tensor, failed: list[list[int]]) -> str:
    lines = [f"{len(failed)} of {statuses.numel()} instances were not solved by {solution.backend!r}:"]
    seen: list[Status] = []
    for index in failed[:MOST_NAMED]:
        status = Status(int(statuses[tuple(index)]))
        seen.append(status)
        lines.append(f"  batch index {_index(index)}: {status.name}{_curvature(solution, status, index)}")
    if len(failed) > MOST_NAMED:
        lines.append(f"  and {len(failed) - MOST_NAMED} more")
    lines += [f"{status.name}: {REMEDIES[status]}." for status in dict.fromkeys(seen)]
    if solution.selection == "analytic_centre" and Status.NUMERICAL_ERROR in seen:
        lines.append(
            "Solutions that go on without end have no analytic centre; Settings(selection='minimum_norm') has."
        )
    lines.append(
        "Pass on_failure='return' to get every instance with its status, and use those where `solution.ok` holds."
    )
    return "\n".join(lines)


def _curvature(solution: Solution, status: Status, index: list[int]) -> str:
    """Return what to say of the Hessian of a failed instance, if it is that which made it fail."""
    if status != Status.NUMERICAL_ERROR or solution._hessian is None or transforms.active():
        return ""
    matrix = solution._hessian.dense()
    found = eigenvalues(matrix.expand(*solution.status.shape, *matrix.shape[-2:])[tuple(index)].double())
    least, largest = float(found[0]), float(found.abs().max())
    if not least < -ROUNDED * largest:
        return ""
    return (
        f" (Q is not positive semidefinite: its smallest eigenvalue is {least:.2e}, its largest {float(found[-1]):.2e})"
    )


def _index(index: list[int]) -> str:
    return f"[{', '.join(map(str, index))}]" if index else "() (the only instance)"


def _checked_backend(backend: str | Backend) -> str | Backend:
    # (Inside a graph that is being traced, the operator looks it up when it runs.)
    if not (isinstance(backend, str) and backend == "auto") and not torch.compiler.is_compiling():
        get(backend)
    return backend


def _checked_settings(settings: Settings | None) -> Settings:
    if settings is not None and not isinstance(settings, Settings):
        raise SettingsError(
            f"`settings` is {type(settings).__name__}. Expected diffopt.Settings(...), for example "
            f"diffopt.Settings(tolerance=1e-8)."
        )
    return _DEFAULT if settings is None else settings


def _checked_policy(on_failure: str, settings: Settings) -> OnFailure:
    if on_failure not in ("raise", "return"):
        raise SettingsError(f"`on_failure` = {on_failure!r} is unknown. Expected 'raise' or 'return'.")
    if on_failure == "raise" and not settings.sync:
        raise SettingsError(
            "Settings(sync=False) cannot raise for a failed instance: nobody looks at the statuses. Expected "
            "on_failure='return'; `solution.ok`, a tensor on the device, says which instances to use."
        )
    return on_failure  # type: ignore[return-value]
