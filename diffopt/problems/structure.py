"""Where the values of a problem come from: given at the call, learned, fixed, or absent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffopt.errors import ParameterError

Kind = Literal["given", "learned", "fixed", "absent"]
FORMS = ("dense", "diagonal", "scaled_identity", "diagonal_plus_low_rank")


@dataclass(frozen=True, eq=False)
class Declared:
    """One declared piece of problem data. Made by `given`, `learned`, `fixed`, `absent`.

    Attributes:
        kind: where the value comes from.
        form: how a symmetric matrix is stored; ``"dense"`` for everything else.
        parts: the value as a tuple: two tensors for ``"diagonal_plus_low_rank"``, one for every
            other form, none for given and absent. A fixed number stays a Python number, which
            takes the dtype and device of the data that it meets.
    """

    kind: Kind
    form: str = "dense"
    parts: tuple[Tensor | float, ...] = ()

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ParameterError(f"Unknown matrix form {self.form!r}. Expected one of {', '.join(map(repr, FORMS))}.")

    def __deepcopy__(self, memo: dict[int, Any]) -> Declared:
        # Values alone, as a layer takes them: torch refuses to copy a tensor that was computed from others.
        parts = tuple(v.detach().clone() if isinstance(v, Tensor) else v for v in self.parts)
        return Declared(self.kind, self.form, parts)

    def part_names(self, name: str) -> tuple[str, ...]:
        """Return the names under which a layer registers the parts."""
        if self.form == "diagonal_plus_low_rank":
            return (f"{name}_diagonal", f"{name}_factor")
        return (name,)

    def value(self) -> Tensor | float | tuple[Tensor | float, ...]:
        """Return the value in the form that a call would give it."""
        return self.parts if len(self.parts) != 1 else self.parts[0]


def given(form: str = "dense") -> Declared:
    """Declare a value that every call gives by name.

    Args:
        form: for a Hessian Q: ``"dense"`` ``(*batch, n, n)``; ``"diagonal"`` ``(*batch, n)``;
            ``"scaled_identity"`` ``(*batch,)``; ``"diagonal_plus_low_rank"``, a pair (d, U) of
            ``(*batch, n)`` and ``(*batch, n, k)`` that means diag(d) + U U'.
    """
    return Declared("given", form)


def learned(value: Any, form: str = "dense") -> Declared:
    """Declare a value that a layer learns: an ``nn.Parameter`` starting at a copy of ``value``.

    Args:
        value: a floating tensor (or number), or for ``"diagonal_plus_low_rank"`` a pair of them.
        form: as in `given`.
    """
    return Declared("learned", form, _parts(value, form))


def fixed(value: Any, form: str = "dense") -> Declared:
    """Declare a constant: a buffer of the layer, a copy of ``value``. Arguments as in `learned`."""
    if isinstance(value, int | float):
        return Declared("fixed", form, (float(value),))
    return Declared("fixed", form, _parts(value, form))


def absent() -> Declared:
    """Declare that the problem does not have this piece."""
    return Declared("absent")


def declare(value: Any) -> Declared:
    """Return a declaration unchanged; ``None`` is absent, any other value is fixed."""
    if isinstance(value, Declared):
        return value
    return absent() if value is None else fixed(value)


def _parts(value: Any, form: str) -> tuple[Tensor, ...]:
    wanted = 2 if form == "diagonal_plus_low_rank" else 1
    values = tuple(value) if isinstance(value, tuple | list) and wanted == 2 else (value,)
    if len(values) != wanted:
        raise ParameterError(f"Form {form!r} takes a pair (diagonal, factor), got {type(value).__name__}.")
    return tuple(_as_tensor(v) for v in values)


def _as_tensor(value: Any) -> Tensor:
    if isinstance(value, int | float):
        return torch.tensor(float(value), dtype=torch.get_default_dtype())
    if not isinstance(value, Tensor):
        raise ParameterError(
            f"A learned or fixed value must be a torch tensor or a number, got {type(value).__name__}. "
            f"Convert it with torch.as_tensor(value)."
        )
    if not value.is_floating_point():
        raise ParameterError(
            f"A learned or fixed value must be floating point, got {value.dtype}. Convert it, "
            f"for example with value.double()."
        )
    return value
