"""The contract of a problem class."""

from __future__ import annotations

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
from diffopt.shapes import broadcast_batch, check_same_kind

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
        n: number of variables.
        params: the parameters, as `Param`.

    Laws: f is convex in x, e affine, g convex (so that a KKT point is a minimiser); all are twice
    differentiable in x and once in theta where they are evaluated; instances of a batch do not
    depend on each other; every method accepts any leading batch shape of x, broadcasting with
    that of the parameters.
    """

    n: int
    params: tuple[Param, ...] = ()

    def __init__(self, **declared: Any) -> None:
        names = self.param_names()
        self.declared: dict[str, Declared] = {}
        for name, value in declared.items():
            if name not in names:
                raise ParameterError(
                    f"{type(self).__name__} has no parameter `{name}`. Expected one of {_listing(names)}."
                )
            self.declared[name] = declare(value)

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
            if name not in values:
                raise ParameterError(
                    f"{type(self).__name__} needs `{name}`, which was not given. "
                    f"Expected {_listing(self.given_names())}, got {_listing(tuple(given))}."
                )
        return {name: (own[name] if name in own else values.get(name)) for name in names}

    def given_names(self) -> tuple[str, ...]:
        """Return the names of the parameters that a call must give."""
        return tuple(n for n in self.param_names() if n not in self.declared or self.declared[n].kind == "given")

    def standard_form(self, params: Params) -> Form:
        """Return the form of these parameter values; by default the callables themselves."""
        return NonlinearForm(self, params)


class NonlinearForm(Form):
    """A problem given by its callables: its own standard form."""

    def __init__(self, problem: DifferentiableProblem, params: Params) -> None:
        self.problem = problem
        self.params: dict[str, Tensor] = dict(params)
        for name, value in self.params.items():
            require_tensor(name, value)
        self.n = problem.n
        self.dtype, self.device = check_same_kind(self.params)
        batches = _check_shapes(problem, self.params)
        x = torch.zeros(self.n, dtype=self.dtype, device=self.device)
        with torch.no_grad():
            equalities, inequalities = problem.equalities(x, self.params), problem.inequalities(x, self.params)
            lower, upper = problem.bounds(self.params)
        self.p, self.m = equalities.shape[-1], inequalities.shape[-1]
        self.cone = problem.cone(self.params, self.m)
        for name, value in (("lower", lower), ("upper", upper)):
            if (full := bound(name, value, self.n, x)) is not None:
                batches[name] = tuple(full.shape[:-1])
        self.batch_shape = broadcast_batch(batches)

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


def _check_shapes(problem: DifferentiableProblem, params: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
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
