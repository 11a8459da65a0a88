"""The contract of a problem class."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt.cones import Cone, NonnegativeCone
from diffopt.errors import ParameterError, ShapeError
from diffopt.living import Living
from diffopt.problems.forms import Derivatives, Form, bound, require_tensor
from diffopt.problems.structure import Declared, declare
from diffopt.shapes import broadcast_batch, check_same_kind, described

Params = Mapping[str, Any]


class Param(NamedTuple):
    """A parameter of a problem class: its name, and the symbolic shape of one instance.

    ``Param("c", ("n",))`` is a tensor ``(*batch, n)``; a symbol stands for the same number
    wherever it occurs, and ``"n"`` for the number of variables.
    """

    name: str
    shape: tuple[str | int, ...]


class DifferentiableProblem(Living, ABC):
    """minimise f(x; theta) subject to e(x; theta) = 0, g(x; theta) <= 0, lower <= x <= upper.

    A subclass states the mathematics in ordinary torch code; everything about optimality
    and derivatives follows from these methods. Declare learned and fixed values in the constructor
    (``super().__init__(weight=diffopt.learned(...))``); other parameters are given at the call.

    Attributes:
        n: number of variables; the class or its constructor sets it.
        params: the parameters, as `Param`.

    What the methods return is checked once for each call, with two points at once, where SciPy solves the problem.

    Laws: f is convex in x, e affine, g convex (so that a KKT point is a minimiser); all are twice
    differentiable in x and once in theta where they are evaluated; instances of a batch do not
    depend on each other; every method accepts any leading batch shape of x, broadcasting with
    that of the parameters.
    """

    n: int
    params: tuple[Param, ...] = ()
    optional: frozenset[str] = frozenset()  # parameters that a call may leave out

    def __init__(self, **declared: Any) -> None:
        _check_params(self)
        names = self.param_names()
        self.declared: dict[str, Declared] = {}
        for name, value in declared.items():
            if name not in names:
                raise ParameterError(
                    f"{type(self).__name__} has no parameter `{name}`. Expected one of {_listing(names)}."
                )
            self.declared[name] = declare(value)

    def __repr__(self) -> str:
        declared: dict[str, Declared] = vars(self).get("declared", {})
        kinds = {name: declared[name].kind if name in declared else "given" for name in self.param_names()}
        listed = [f"{name}={kind}" for name, kind in kinds.items() if kind != "absent"]
        size = [f"n={self.n}"] if hasattr(self, "n") else []
        return f"{type(self).__name__}({', '.join(size + listed)})"

    def __getattr__(self, name: str) -> Any:  # (of what is missing; it costs those that are there nothing)
        if name == "declared":
            raise ParameterError(
                f"{type(self).__name__} was made without its declarations. Call super().__init__(), with the learned "
                f"and fixed values by name, in {type(self).__name__}.__init__."
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @abstractmethod
    def objective(self, x: Tensor, params: Params) -> Tensor:
        """Return f, ``(*batch,)``."""

    @abstractmethod
    def equalities(self, x: Tensor, params: Params) -> Tensor:
        """Return e, ``(*batch, p)``; p = 0 where there are none (``x[..., :0]``)."""

    @abstractmethod
    def inequalities(self, x: Tensor, params: Params) -> Tensor:
        """Return g, ``(*batch, m)``, <= 0 or with its negative in the cone; m = 0 where none."""

    def bounds(self, params: Params) -> tuple[Tensor | float | None, Tensor | float | None]:
        """Return (lower, upper), each ``(*batch, n)``, a number, or ``None``."""
        return None, None

    def cone(self, params: Params, m: int) -> Cone:
        """Return the cone of the m inequalities; nonnegative by default."""
        return NonnegativeCone(m)

    def derivatives(self, x: Tensor, lam: Tensor, nu: Tensor, params: Params) -> Derivatives | None:
        """Return closed forms of the derivatives, or ``None`` (the default) to have them derived."""
        return None

    def start(self, params: Params) -> Tensor | None:
        """Return a point, ``(*batch, n)``, in the domain of f, for solvers that need a start."""
        return None

    def param_names(self) -> tuple[str, ...]:
        """Return the names of all parameters, in order."""
        return tuple(param.name for param in self.params)

    def collect(self, given: Params, own: Params | None = None) -> dict[str, Any]:
        """Join the values given at a call with the learned and fixed ones.

        Args:
            given: values by name.
            own: values of the learned and fixed parameters; those of the declarations by default.

        Raises:
            ParameterError: a name is unknown, missing, or was declared learned or fixed.
        """
        names = self.param_names()
        if own is None:
            own = {name: d.value() for name, d in self.declared.items() if d.parts}
        values: dict[str, Any] = {}
        for name, value in given.items():
            kind = self.declared[name].kind if name in self.declared else "given"
            if name not in names or kind == "absent":
                raise ParameterError(
                    f"{type(self).__name__} takes no `{name}`. Expected {_listing(self.given_names())}."
                )
            if kind != "given":
                raise ParameterError(
                    f"`{name}` is declared {kind} in {type(self).__name__} and cannot be given at a call. "
                    f"Declare it diffopt.given() to pass it."
                )
            values[name] = value
        for name in self.given_names():
            if name not in values and name not in self.optional:
                raise ParameterError(
                    f"{type(self).__name__} needs `{name}`, which was not given. "
                    f"Expected {_listing(self.given_names())}, got {_listing(tuple(given))}.{self._hint(name)}"
                )
        if self.optional:
            left_out = [n for n in self.given_names() if n not in values]
            names = tuple(n for n in names if n not in left_out)
        return {name: (own[name] if name in own else values.get(name)) for name in names}

    def _hint(self, missing: str) -> str:
        """Return what else to say of a parameter that was not given, after a space."""
        return ""

    def given_names(self) -> tuple[str, ...]:
        """Return the names of the parameters that a call gives, in order; it may leave out the optional ones."""
        return tuple(n for n in self.param_names() if n not in self.declared or self.declared[n].kind == "given")

    def standard_form(self, params: Params) -> Form:
        """Return the form of these parameter values; by default the callables themselves."""
        return NonlinearForm(self, params)


def require_problem(problem: object) -> None:
    """Raise `ParameterError` unless ``problem`` is one."""
    if isinstance(problem, DifferentiableProblem):
        return
    what = f"the class {problem.__name__}" if isinstance(problem, type) else type(problem).__name__
    inner = getattr(problem, "problem", None)
    hint = " Pass its `.problem`." if isinstance(inner, DifferentiableProblem) else ""
    raise ParameterError(
        f"`problem` is {what}. Expected a diffopt.DifferentiableProblem, for example diffopt.QPStructure(n=...).{hint}"
    )


class NonlinearForm(Form):
    """A problem given by its callables: its own standard form."""

    def __init__(self, problem: DifferentiableProblem, params: Params) -> None:
        self.problem = problem
        self.params: dict[str, Tensor] = dict(params)
        for name, value in self.params.items():
            require_tensor(name, value)
        self.n = _checked_n(problem)
        self.dtype, self.device = check_same_kind(self.params)
        batches = _check_shapes(problem, self.params)
        like = torch.zeros(self.n, dtype=self.dtype, device=self.device)
        with torch.no_grad():
            both = problem.bounds(self.params)
            if not (isinstance(both, tuple | list) and len(both) == 2):
                raise ParameterError(
                    f"{type(problem).__name__}.bounds returned {described(both)}. Expected a pair (lower, upper); "
                    f"None stands for a bound that there is not."
                )
            for name, value in zip(("lower", "upper"), both, strict=True):
                if (full := bound(name, value, self.n, like)) is not None:
                    batches[name] = tuple(full.shape[:-1])
            self.batch_shape = broadcast_batch(batches)
            # Two points for each instance: a sum over all of them shows.
            x = like.new_zeros(2, *self.batch_shape, self.n)
            self.p = _check_returned(problem, "equalities", problem.equalities(x, self.params), self.batch_shape)
            self.m = _check_returned(problem, "inequalities", problem.inequalities(x, self.params), self.batch_shape)
            outside: Any = torch.linalg.LinAlgError  # pyright: ignore[reportPrivateImportUsage]
            with contextlib.suppress(outside):  # x = 0 may be outside its domain
                _check_returned(problem, "objective", problem.objective(x, self.params), self.batch_shape)
        self.cone = problem.cone(self.params, self.m)

    @property
    def lower(self) -> Tensor | None:  # type: ignore[override]
        """The lower bounds, attached to the parameters."""
        return self._bound("lower", 0)

    @property
    def upper(self) -> Tensor | None:  # type: ignore[override]
        """The upper bounds, attached to the parameters."""
        return self._bound("upper", 1)

    def _bound(self, name: str, side: int) -> Tensor | None:
        like = torch.zeros((), dtype=self.dtype, device=self.device)
        return bound(name, self.problem.bounds(self.params)[side], self.n, like)

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.params)

    def with_tensors(self, tensors: dict[str, Tensor]) -> NonlinearForm:
        twin = object.__new__(NonlinearForm)
        vars(twin).update(vars(self), params=dict(tensors))
        return twin

    def core_dims(self) -> tuple[int, ...]:
        sizes = {name: len(shape) for name, shape in self.problem.params}
        return tuple(sizes[name] for name in self.params)

    def rebatched(self, tensors: dict[str, Tensor]) -> NonlinearForm:
        return NonlinearForm(self.problem, tensors)

    def objective(self, x: Tensor) -> Tensor:
        return self.problem.objective(x, self.params)

    def equalities(self, x: Tensor) -> Tensor:
        return self.problem.equalities(x, self.params)

    def inequalities(self, x: Tensor) -> Tensor:
        return self.problem.inequalities(x, self.params)

    def derivatives(self, x: Tensor, lam: Tensor, nu: Tensor) -> Derivatives | None:
        return self.problem.derivatives(x, lam, nu, self.params)


def _check_params(problem: DifferentiableProblem) -> None:
    params: Any = problem.params
    if isinstance(params, Param) or not all(isinstance(param, Param) for param in _listed(params)):
        raise ParameterError(
            f"{type(problem).__name__}.params is {params!r}. Expected a tuple of diffopt.Param, for example "
            f'(diffopt.Param("c", ("n",)),), with its comma.'
        )


def _listed(params: Any) -> tuple[Any, ...]:
    return tuple(params) if isinstance(params, tuple | list) else (params,)


def _checked_n(problem: DifferentiableProblem) -> int:
    n: Any = getattr(problem, "n", None)
    if not hasattr(n, "__index__"):
        raise ParameterError(
            f"{type(problem).__name__} says no number of variables: n = {n!r}. Set `n`, an int, in the class "
            f"or in its constructor (self.n = n)."
        )
    return n


def checked_start(problem: DifferentiableProblem, params: Params) -> Tensor | None:
    """Return the start of a problem with one instance, ``(n,)``, or ``None``."""
    start: Any = problem.start(params)
    if start is None or (isinstance(start, Tensor) and start.shape == (problem.n,)):
        return start
    raise ShapeError(
        f"{type(problem).__name__}.start returned {described(start)} for one instance. "
        f"Expected a tensor ({problem.n},)."
    )


def _check_returned(problem: DifferentiableProblem, name: str, value: Any, batch_shape: torch.Size) -> int:
    """Return how many numbers a method gives for a point, from its value at two points."""
    core = 0 if name == "objective" else 1
    shape = value.shape if isinstance(value, Tensor) else None
    lead = None if shape is None or len(shape) < core else shape[: len(shape) - core]
    wanted = len(batch_shape) + 1
    if lead is not None and (core and shape is not None and shape[-1] == 0):
        return 0  # there are none, in whatever batch
    if lead is None or len(lead) != wanted or lead[0] != 2 or not _broadcasts(lead[1:], batch_shape):
        remedy = (
            "Sum over the last dimension only, .sum(-1), so that every instance has a value of its own."
            if core == 0
            else "Keep the last dimension, also of a single row (keepdim=True, x[..., :1]); x[..., :0] is none at all."
        )
        raise ShapeError(
            f"{type(problem).__name__}.{name} returned {described(value)} for x of shape "
            f"(2, {_batch(batch_shape)}{problem.n}). Expected (2, {_batch(batch_shape)}{'k' if core else ''}): one "
            f"{'row of numbers' if core else 'number'} for each instance. {remedy}"
        )
    return value.shape[-1] if core else 1


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Return whether a shape expands to the target."""
    if len(shape) > len(target):
        return False
    return all(a in (1, b) for a, b in zip(reversed(shape), reversed(target), strict=False))


def _batch(shape: tuple[int, ...]) -> str:
    return "".join(f"{size}, " for size in shape)


def _check_shapes(problem: DifferentiableProblem, params: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    _check_params(problem)
    sizes: dict[str | int, int] = {"n": problem.n}
    batches: dict[str, tuple[int, ...]] = {}
    for name, shape in problem.params:
        tensor = params[name]
        core = tensor.shape[tensor.dim() - len(shape) :] if tensor.dim() >= len(shape) else ()
        matches = tensor.dim() >= len(shape) and all(
            size == (symbol if isinstance(symbol, int) else sizes.setdefault(symbol, size))
            for symbol, size in zip(shape, core, strict=True)
        )
        if not matches:
            expected = ", ".join(str(sizes.get(symbol, symbol)) for symbol in shape)
            raise ShapeError(
                f"`{name}` has the wrong shape for {type(problem).__name__}. Expected "
                f"(*batch{', ' if shape else ''}{expected}), got {tuple(tensor.shape)}."
            )
        batches[name] = tuple(tensor.shape[: tensor.dim() - len(shape)])
    return batches


def _listing(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names) if names else "no parameters"
