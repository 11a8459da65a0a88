"""Quadratic programs: structures of one's own, and the ready one whose parameters are the data."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from diffopt.cones import Cone
from diffopt.errors import ParameterError, ShapeError
from diffopt.linalg.matrices import Diagonal, DiagonalPlusLowRank, SymmetricMatrix
from diffopt.problems.base import DifferentiableProblem, Params
from diffopt.problems.forms import Derivatives, QPForm, bound, require_tensor
from diffopt.problems.structure import FORMS, Declared, declare
from diffopt.shapes import SUPPORTED_DTYPES, check_same_kind


class QuadraticProgram(DifferentiableProblem):
    """A quadratic program whose data is any torch function of its parameters.

    A subclass writes one method, ``form(self, ...) -> QPForm``. Its arguments are the
    parameters: those declared in the constructor are learned or fixed, the others are
    given at the call, which may leave out those that have a default.

    Example::

        class Projection(diffopt.QuadraticProgram):       # onto {x : a'x <= 1}, a learned
            def form(self, point, a):
                return diffopt.QPForm(Q=torch.eye(3), q=-point, G=a[None], h=torch.ones(1))

        layer = diffopt.Layer(Projection(a=diffopt.learned(torch.ones(3))))
        x = layer(point=torch.randn(8, 3))
    """

    _names: tuple[str, ...] = ()

    @abstractmethod
    def form(self, *args: Any, **params: Any) -> QPForm:
        """Return the standard form of these parameter values, by ordinary torch operations."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.form is QuadraticProgram.form or cls.param_names is not QuadraticProgram.param_names:
            return  # an abstract class between, or one that names its parameters itself
        # Once for a class: it takes longer than a small solve.
        arguments = list(inspect.signature(cls.form).parameters.values())[1:]
        for argument in arguments:
            if argument.kind not in (argument.POSITIONAL_OR_KEYWORD, argument.KEYWORD_ONLY):
                raise ParameterError(
                    f"{cls.__name__}.form has the argument `{argument}`. Expected an argument for each parameter, with "
                    f"the parameter's name: def form(self, y, weight)."
                )
        cls._names = tuple(argument.name for argument in arguments)
        cls.optional = frozenset(argument.name for argument in arguments if argument.default is not argument.empty)

    def param_names(self) -> tuple[str, ...]:
        return self._names

    def standard_form(self, params: Params) -> QPForm:
        try:
            form = self.form(**params)
        except RuntimeError:
            # Where parameters of two devices or dtypes meet in what a user wrote, torch does not know their names.
            tensors = {name: v for name, v in params.items() if isinstance(v, Tensor) and v.dtype in SUPPORTED_DTYPES}
            check_same_kind(tensors)
            raise
        if not isinstance(form, QPForm):
            raise ParameterError(
                f"{type(self).__name__}.form returned {type(form).__name__}. Expected a diffopt.QPForm."
            )
        return form

    def objective(self, x: Tensor, params: Params) -> Tensor:
        return self.standard_form(params).objective(x)

    def equalities(self, x: Tensor, params: Params) -> Tensor:
        return self.standard_form(params).equalities(x)

    def inequalities(self, x: Tensor, params: Params) -> Tensor:
        return self.standard_form(params).inequalities(x)

    def bounds(self, params: Params) -> tuple[Tensor | None, Tensor | None]:
        form = self.standard_form(params)
        return form.lower, form.upper

    def cone(self, params: Params, m: int) -> Cone:
        return self.standard_form(params).cone

    def derivatives(self, x: Tensor, lam: Tensor, nu: Tensor, params: Params) -> Derivatives:
        return self.standard_form(params).derivatives(x, lam, nu)


class QPStructure(QuadraticProgram):
    """The quadratic program whose parameters are its data: Q, q, A, b, G, h, lower, upper.

    Args:
        n: number of variables.
        Q, q, A, b, G, h, lower, upper: `diffopt.given`, `diffopt.learned` or `diffopt.fixed`;
            a tensor or number stands for a fixed value, ``None`` for an absent piece (an absent Q
            is zero: a linear program). Shapes as in `QPForm`; Q also in the forms that
            `diffopt.given` lists; a number as b, h, lower or upper is the same for every entry.

    Raises:
        ParameterError: A without b, G without h, or a form other than ``"dense"`` outside Q.
    """

    def __init__(
        self,
        n: int,
        Q: Any = Declared("given"),
        q: Any = Declared("given"),
        A: Any = None,
        b: Any = None,
        G: Any = None,
        h: Any = None,
        lower: Any = None,
        upper: Any = None,
    ) -> None:
        pieces = {"Q": Q, "q": q, "A": A, "b": b, "G": G, "h": h, "lower": lower, "upper": upper}
        super().__init__(**{name: declare(value) for name, value in pieces.items()})
        if not isinstance(n, Integral) or isinstance(n, bool) or n < 1:
            raise ParameterError(f"`n` = {n!r} is no number of variables. Expected a whole number >= 1.")
        self.n = int(n)
        for name, declared in self.declared.items():
            if name != "Q" and declared.form != "dense":
                raise ParameterError(f"`{name}` is declared {declared.form!r}; only Q has forms other than 'dense'.")
        for left, right in (("A", "b"), ("G", "h")):
            if (self.declared[left].kind == "absent") != (self.declared[right].kind == "absent"):
                raise ParameterError(f"`{left}` and `{right}` come together: declare both or neither.")
        for name in ("Q", "q", "A", "G", "lower", "upper"):
            declared = self.declared[name]
            value = declared.value() if declared.parts and declared.form == "dense" else None
            if isinstance(value, Tensor) and value.dim() and value.shape[-1] != n:
                raise ShapeError(
                    f"`{name}` has the wrong size. Expected {n} in its last dimension, since the structure is declared "
                    f"with n = {n}; got {tuple(value.shape)}."
                )

    def collect(self, given: Params, own: Params | None = None) -> dict[str, Any]:
        for name, value in given.items():
            if value is None:
                raise ParameterError(
                    f"`{name}` is None, which would leave it out. Expected a tensor, since the structure declares it "
                    f"diffopt.given(). Pass one, or declare `{name}` None in the structure."
                )
        return super().collect(given, own)

    def _hint(self, missing: str) -> str:
        return " For a linear program declare it: QPStructure(n, Q=None)." if missing == "Q" else ""

    def form(self, Q: Any, q: Any, A: Any, b: Any, G: Any, h: Any, lower: Any, upper: Any) -> QPForm:
        if q is None or isinstance(q, int | float):
            parts = Q if isinstance(Q, tuple) else (Q,)
            like = next((t for t in (*parts, A, b, G, h, lower, upper) if isinstance(t, Tensor)), torch.empty(0))
            q = like.new_full((self.n,), q or 0.0)
        require_tensor("q", q)
        if q.dim() < 1 or q.shape[-1] != self.n:
            raise ShapeError(
                f"`q` has the wrong size. Expected (*batch, {self.n}), since the structure was declared with "
                f"n = {self.n}; got {tuple(q.shape)}."
            )
        hessian = symmetric_matrix("Q", Q, self.declared["Q"].form, self.n, q)
        return QPForm(hessian, q, A, b, G, h, bound("lower", lower, self.n, q), bound("upper", upper, self.n, q))


def symmetric_matrix(name: str, value: Any, form: str, n: int, like: Tensor) -> Any:
    """Return a value in one of the declared forms as what `QPForm` takes for Q.

    A number takes the dtype and device of ``like``.
    """
    if isinstance(value, int | float) and form in ("scaled_identity", "diagonal"):
        return Diagonal(like.new_full((n,), float(value)))
    if value is None or isinstance(value, SymmetricMatrix):
        return value
    if form == "diagonal_plus_low_rank":
        if not (isinstance(value, tuple | list) and len(value) == 2):
            raise ParameterError(
                f"`{name}` is declared {form!r}: expected a pair (diagonal, factor), got {type(value).__name__}."
            )
        diagonal, factor = value
        require_tensor(f"{name}_diagonal", diagonal)
        require_tensor(f"{name}_factor", factor)
        if diagonal.dim() == 0:
            diagonal = diagonal.expand(n)
        if diagonal.shape[-1] != n or factor.dim() < 2 or factor.shape[-2] != n:
            raise ShapeError(
                f"`{name}` has the wrong shape. Expected a pair of (*batch, {n}) and (*batch, {n}, k), "
                f"got {tuple(diagonal.shape)} and {tuple(factor.shape)}."
            )
        return DiagonalPlusLowRank(diagonal, factor)
    require_tensor(name, value)
    assert isinstance(value, Tensor)
    if form == "scaled_identity":
        return Diagonal(value.unsqueeze(-1).expand(*value.shape, n))
    if form == "diagonal":
        if value.dim() < 1 or value.shape[-1] != n:
            raise ShapeError(f"`{name}` is declared diagonal: expected (*batch, {n}), got {tuple(value.shape)}.")
        return Diagonal(value)
    assert form in FORMS
    return value
