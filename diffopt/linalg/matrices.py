"""Symmetric matrices with structure: dense, diagonal, diagonal plus low rank.

A Hessian is declared in the smallest of these that holds it, and solvers ask for its products
rather than its entries. All are plain containers of attached tensors: autograd sees through them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from diffopt.errors import ParameterError, ShapeError
from diffopt.shapes import matvec, rmatvec


class SymmetricMatrix(ABC):
    """A batch of symmetric n x n matrices, ``(*batch, n, n)`` in meaning if not in storage.

    Laws (tested for every subclass): ``matvec(x) = dense() @ x``; ``diagonal()`` is the diagonal of
    ``dense()``; ``scaled(d).dense() = diag(d) dense() diag(d)``; ``with_tensors(*tensors())`` is
    the same matrix.
    """

    n: int

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(str(tuple(tensor.shape)) for tensor in self.tensors())})"

    @property
    @abstractmethod
    def batch_shape(self) -> torch.Size:
        """The batch shape of the storage; () for a matrix that a whole batch shares."""

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors that define the matrix."""

    @abstractmethod
    def with_tensors(self, *tensors: Tensor) -> SymmetricMatrix:
        """Return the same structure over other tensors."""

    @abstractmethod
    def matvec(self, x: Tensor) -> Tensor:
        """Return the product with x, ``(*batch, n)``."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """Return the diagonal, ``(*batch, n)``."""

    @abstractmethod
    def dense(self) -> Tensor:
        """Return all entries, ``(*batch, n, n)``."""

    @abstractmethod
    def scaled(self, d: Tensor) -> SymmetricMatrix:
        """Return diag(d) Q diag(d) in the same structure; d is ``(*batch, n)``."""

    @abstractmethod
    def column_norms(self) -> Tensor:
        """Return the largest magnitude of each column (an upper bound will do), ``(*batch, n)``."""

    @abstractmethod
    def tangent_matvec(self, tangents: tuple[Tensor | None, ...], x: Tensor) -> Tensor | None:
        """Return dQ x for tangents of `tensors` (``None`` for no change)."""

    @abstractmethod
    def pairing_gradient(self, y: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """Return the gradient of y'Qx with respect to each of `tensors`, one per instance."""

    @abstractmethod
    def core_dims(self) -> tuple[int, ...]:
        """Return how many trailing dimensions of each of `tensors` belong to one instance."""


class Dense(SymmetricMatrix):
    """Q given by its entries, ``(*batch, n, n)``. The symmetric part is meant: (Q + Q') / 2.

    Args:
        given: the entries.
        symmetric: they are known to be symmetric, so their symmetric part need not be formed.

    ``tensors()`` are the entries as given; ``entries`` is their symmetric part, formed when first asked for.
    """

    def __init__(self, given: Tensor, symmetric: bool = False) -> None:
        self.given = given
        self.symmetric = symmetric
        self.n = _last("Dense(Q)", given)
        self._entries = given if symmetric else None

    @property
    def entries(self) -> Tensor:
        """The symmetric part, ``(*batch, n, n)``."""
        if self._entries is None:
            self._entries = 0.5 * (self.given + self.given.mT)
        return self._entries

    @property
    def batch_shape(self) -> torch.Size:
        return self.given.shape[:-2]

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.given,)

    def with_tensors(self, *tensors: Tensor) -> Dense:
        return Dense(*tensors, symmetric=self.symmetric)

    def core_dims(self) -> tuple[int, ...]:
        return (2,)

    def matvec(self, x: Tensor) -> Tensor:
        return matvec(self.entries, x)

    def diagonal(self) -> Tensor:
        return self.given.diagonal(dim1=-2, dim2=-1)

    def dense(self) -> Tensor:
        return self.entries

    def scaled(self, d: Tensor) -> Dense:
        return Dense(d.unsqueeze(-1) * self.entries * d.unsqueeze(-2), symmetric=True)

    def tangent_matvec(self, tangents: tuple[Tensor | None, ...], x: Tensor) -> Tensor | None:
        (tangent,) = tangents
        if tangent is None:
            return None
        return matvec(tangent, x) if self.symmetric else 0.5 * (matvec(tangent, x) + rmatvec(tangent, x))

    def pairing_gradient(self, y: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        outer = y.unsqueeze(-1) * x.unsqueeze(-2)
        return (0.5 * (outer + outer.mT),)

    def column_norms(self) -> Tensor:
        return self.entries.abs().amax(-2)


class Diagonal(SymmetricMatrix):
    """Q = diag(d), d ``(*batch, n)``."""

    def __init__(self, entries: Tensor) -> None:
        self.entries = entries
        self.n = _last("Diagonal(d)", entries)

    @property
    def batch_shape(self) -> torch.Size:
        return self.entries.shape[:-1]

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.entries,)

    def with_tensors(self, *tensors: Tensor) -> Diagonal:
        return Diagonal(*tensors)

    def core_dims(self) -> tuple[int, ...]:
        return (1,)

    def matvec(self, x: Tensor) -> Tensor:
        return self.entries * x

    def diagonal(self) -> Tensor:
        return self.entries

    def dense(self) -> Tensor:
        return torch.diag_embed(self.entries)

    def scaled(self, d: Tensor) -> Diagonal:
        return Diagonal(d * self.entries * d)

    def tangent_matvec(self, tangents: tuple[Tensor | None, ...], x: Tensor) -> Tensor | None:
        return None if tangents[0] is None else tangents[0] * x

    def pairing_gradient(self, y: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return (y * x,)

    def column_norms(self) -> Tensor:
        return self.entries.abs()


class DiagonalPlusLowRank(SymmetricMatrix):
    """Q = diag(d) + U U', d ``(*batch, n)``, U ``(*batch, n, k)``."""

    def __init__(self, entries: Tensor, factor: Tensor) -> None:
        self.entries = entries
        self.factor = factor
        self.n = _last("DiagonalPlusLowRank(d, U)", entries)

    @property
    def batch_shape(self) -> torch.Size:
        return torch.broadcast_shapes(self.entries.shape[:-1], self.factor.shape[:-2])

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.entries, self.factor)

    def with_tensors(self, *tensors: Tensor) -> DiagonalPlusLowRank:
        return DiagonalPlusLowRank(*tensors)

    def core_dims(self) -> tuple[int, ...]:
        return (1, 2)

    def matvec(self, x: Tensor) -> Tensor:
        return self.entries * x + matvec(self.factor, rmatvec(self.factor, x))

    def diagonal(self) -> Tensor:
        return self.entries + self.factor.square().sum(-1)

    def dense(self) -> Tensor:
        return torch.diag_embed(self.entries) + self.factor @ self.factor.mT

    def scaled(self, d: Tensor) -> DiagonalPlusLowRank:
        return DiagonalPlusLowRank(d * self.entries * d, d.unsqueeze(-1) * self.factor)

    def tangent_matvec(self, tangents: tuple[Tensor | None, ...], x: Tensor) -> Tensor | None:
        entries, factor = tangents
        total = None if entries is None else entries * x
        if factor is None:
            return total
        change = matvec(factor, rmatvec(self.factor, x)) + matvec(self.factor, rmatvec(factor, x))
        return change if total is None else total + change

    def pairing_gradient(self, y: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        by_x = y.unsqueeze(-1) * rmatvec(self.factor, x).unsqueeze(-2)
        by_y = x.unsqueeze(-1) * rmatvec(self.factor, y).unsqueeze(-2)
        return (y * x, by_x + by_y)

    def column_norms(self) -> Tensor:
        # |UU'|_j <= |u_j| * max_i |u_i| by Cauchy-Schwarz: an upper bound, without forming UU'.
        lengths = self.factor.square().sum(-1).sqrt()
        largest = lengths.amax(-1, keepdim=True) if self.n else lengths
        return self.entries.abs() + lengths * largest


def _last(name: str, tensor: Tensor) -> int:
    """Return the last size of a tensor that a matrix is made of; ``name`` is how that is written."""
    try:
        return tensor.shape[-1]
    except AttributeError as error:
        raise ParameterError(f"diffopt.{name} takes torch tensors, got {type(tensor).__name__}.") from error
    except IndexError as error:
        raise ShapeError(f"diffopt.{name} got a tensor without dimensions. Expected one of (*batch, n).") from error
