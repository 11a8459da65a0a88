"""The registry of backends, and the choice among them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from diffopt.backends.base import Backend
from diffopt.errors import BackendError, BackendLoadWarning, BackendNotInstalled, BackendUnsupported, UnknownBackend
from diffopt.problems.base import DifferentiableProblem, require_problem
from diffopt.problems.forms import Form, QPForm

ENTRY_POINTS = "diffopt.backends"
_registered: dict[str, type[Backend]] = {}
_discovered = False


def register(name: str) -> Callable[[type[Backend]], type[Backend]]:
    """Register a `Backend` subclass under a name: ``@register("mine")``.

    A package can also register by an entry point of the group ``diffopt.backends`` that
    names a Backend subclass; it is loaded when backends are first listed or looked up. One that
    cannot be loaded gives a `BackendLoadWarning` and is left out.

    Raises:
        BackendError: the name is taken by another class or has a meaning of its own, or the class is
            not a complete `Backend`.
    """
    if not (isinstance(name, str) and name and name != "auto"):
        raise BackendError(f"A backend cannot be named {name!r}. Expected a nonempty string other than 'auto'.")

    def add(cls: type[Backend]) -> type[Backend]:
        if not (isinstance(cls, type) and issubclass(cls, Backend)):
            raise BackendError(f"Backend {name!r} is {cls!r}. Expected a subclass of diffopt.backends.Backend.")
        if inspect.isabstract(cls):
            unwritten = ", ".join(f"`{method}`" for method in sorted(cls.__abstractmethods__))
            raise BackendError(f"Backend {name!r} ({cls.__qualname__}) does not write {unwritten}.")
        taken = _registered.get(name)
        if taken is not None and taken is not cls:
            raise BackendError(
                f"A backend named {name!r} is already registered ({taken.__module__}.{taken.__qualname__}). "
                f"Choose another name."
            )
        cls.name = name
        _registered[name] = cls
        return cls

    return add


def _all() -> dict[str, type[Backend]]:
    global _discovered
    if not _discovered:
        _discovered = True
        broken = []
        for point in metadata.entry_points(group=ENTRY_POINTS):
            try:
                register(point.name)(point.load())
            except Exception as error:  # a package of someone else's: it must not break this one
                broken.append(f"{point.name!r} = {point.value!r} ({type(error).__name__}: {error})")
        if broken:
            warnings.warn(
                f"Backends left out because their entry point of group {ENTRY_POINTS!r} could not be loaded: "
                f"{'; '.join(broken)}. Repair or uninstall the packages that declare them.",
                BackendLoadWarning,
                stacklevel=3,
            )
    return _registered


def names(installed_only: bool = False) -> tuple[str, ...]:
    """Return the names of the registered backends; optionally only those whose packages are there."""
    return tuple(name for name, cls in _all().items() if not (installed_only and cls.missing()))


def get(backend: str | Backend) -> Backend:
    """Return the backend of this name (an instance is returned unchanged).

    Raises:
        UnknownBackend: nothing is registered under this name.
        BackendNotInstalled: a package that it needs is missing.
    """
    if isinstance(backend, Backend):
        cls, found = type(backend), backend
    elif isinstance(backend, str) and backend in _all():
        cls, found = _all()[backend], None
    else:
        raise UnknownBackend(
            f"Unknown backend {backend!r}. Expected 'auto', one of {', '.join(map(repr, names()))}, "
            f"or a diffopt.backends.Backend instance."
        )
    if missing := cls.missing():
        remedy = f"diffopt-torch[{cls.extra}]" if cls.extra else " ".join(missing)
        raise BackendNotInstalled(
            f"Backend {cls.name!r} is not installed: it needs {', '.join(missing)} "
            f"(available: {', '.join(names(installed_only=True))}). Install it with `pip install '{remedy}'`."
        )
    return cls() if found is None else found


def choose(backend: str | Backend, form: Form) -> Backend:
    """Return the backend that will solve ``form``.

    Args:
        backend: ``"auto"`` (the supporting backend with the highest priority), a name, or an instance.

    Raises:
        BackendUnsupported: the named backend, or for ``"auto"`` every backend, refuses; with reasons.
    """
    if not (isinstance(backend, str) and backend == "auto"):
        named = get(backend)
        if reason := named.supports(form):
            others = [name for name, why in _reasons(form).items() if why is None]
            remedy = f"Use {' or '.join(map(repr, others))}." if others else "No registered backend takes it."
            raise BackendUnsupported(f"Backend {named.name!r} cannot take this problem: it {reason}. {remedy}")
        return named
    # For the same shapes and cone the first of the ranking is asked once, as long as it is the first and needs nothing.
    notes = form.signature.notes if isinstance(form, QPForm) and form.cone is form.signature.cone else {}
    known: tuple[int, Backend] | None = notes.get("auto")
    if known is not None and known[0] == len(_all()):
        return known[1]
    for place, name in enumerate(_ranking()):
        if _reason(_all()[name], form) is None:
            chosen = _all()[name]()
            if place == 0 and not chosen.requires:
                notes["auto"] = len(_all()), chosen
            return chosen
    listing = "; ".join(f"{name}: {reason}" for name, reason in _reasons(form).items())
    raise BackendUnsupported(f"No registered backend can take this problem ({listing}).")


def _ranking() -> list[str]:
    """Return all names, the highest priority first; of equals, the one registered first."""
    return sorted(_all(), key=lambda name: -_all()[name].can.priority)


def _reason(cls: type[Backend], form: Form) -> str | None:
    if missing := cls.missing():  # before making an instance, which may need the package
        return f"needs {', '.join(missing)}, which is not installed"
    return cls().supports(form)


def _reasons(form: Form) -> dict[str, str | None]:
    return {name: _reason(cls, form) for name, cls in _all().items()}


@dataclass(frozen=True)
class Explanation:
    """Which backend ``backend="auto"`` takes, and why each other was not.

    Attributes:
        chosen: its name, or ``None`` when every backend refuses.
        reasons: for every other backend, the reason.
    """

    chosen: str | None
    reasons: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"chosen: {self.chosen or 'none, every backend refuses'}"]
        return "\n".join([*lines, *(f"  not {name}: {reason}" for name, reason in self.reasons.items())])


def explain(problem: DifferentiableProblem | Form, params: Mapping[str, Any] | None = None) -> Explanation:
    """Say which backend would solve a problem, and why each other one would not.

    Args:
        problem: a problem, with its parameters by name in ``params``; or a standard form.
        params: the values that a call would give.
    """
    if not isinstance(problem, Form):
        require_problem(problem)
        problem = problem.standard_form(problem.collect(params or {}))
    reasons = _reasons(problem)
    chosen = next((name for name in _ranking() if reasons[name] is None), None)
    told = {name: reason or _outranked(name, chosen) for name, reason in reasons.items() if name != chosen}
    return Explanation(chosen, told)


def _outranked(name: str, chosen: str | None) -> str:
    assert chosen is not None
    mine, best = _all()[name].can.priority, _all()[chosen].can.priority
    if mine == best:
        return f"could take it, but {chosen}, of the same priority ({best}), was registered first"
    return f"could take it, but its priority ({mine}) is lower than that of {chosen} ({best})"
