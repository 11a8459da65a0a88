"""What users call: a problem, a backend and a gradient put together."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffopt import dispatch, failures, infeasible, operators, warm_start
from diffopt.backends.base import Backend
from diffopt.backends.registry import get
from diffopt.errors import ParameterError, SettingsError
from diffopt.failures import OnFailure
from diffopt.infeasible import Elastic
from diffopt.linalg.matrices import SymmetricMatrix
from diffopt.precision import full_precision, lowered, raised
from diffopt.problems.base import DifferentiableProblem, Params, require_problem
from diffopt.problems.forms import Form, QPForm
from diffopt.solution import Solution
from diffopt.solvers.settings import Settings
from diffopt.warm_start import Start

OnInfeasible = Elastic | Literal["elastic", "closest"] | None
_DEFAULT = Settings()


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
        ParameterError: at construction, too: a parameter that calls give is named `start`, one that is learned or
            fixed is named like an attribute of the layer, or a fixed value requires a gradient.
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
        require_problem(problem)
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
                if hasattr(self, part_name) or "." in part_name:
                    raise ParameterError(
                        f"{type(problem).__name__} has a {declared.kind} parameter `{part_name}`, a name that a layer "
                        f"cannot register: it has an attribute of this name, or the name has a dot. Give it another."
                    )
                if declared.kind == "fixed" and part.requires_grad:
                    raise ParameterError(
                        f"`{part_name}` of {type(problem).__name__} is fixed, but its value requires a gradient, which "
                        f"would not reach it from a layer's copy. Declare it diffopt.given() and pass it at each call, "
                        f"or diffopt.learned(...) for a parameter of the layer; for a constant, pass value.detach()."
                    )
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
    require_problem(problem)
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
        solution, reported = dispatch.attached(form, backend, settings, on_failure, near)
    else:
        _refuse_together(form, settings, policy, near)

        def each(form: QPForm) -> Solution:
            return dispatch.attached(form, backend, settings, "return", None)[0]

        tolerance, exactly = settings.tolerance_for(form.dtype), settings.relaxation is None
        solution = infeasible.solve(form, policy, weights or {}, each, tolerance, exactly)
        reported = False
    if reported or not settings.sync:
        return solution
    if torch.compiler.is_compiling():
        return operators.reported(solution, on_failure)
    failures.report(solution, on_failure)
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
