"""Cones: where the slack of ``Gx + s = h`` lives. Everything that depends on the cone asks here."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Cone(ABC):
    """A closed self-dual convex cone K in R^dim, acting on the last dimension of a tensor.

    Laws (tested for every cone): ``violation(s)`` is 0 exactly on K; for s, lam in K,
    ``product(s, lam)`` is 0 if and only if s'lam = 0; ``identity`` is interior and
    ``product(identity, v) = v``.
    """

    dim: int

    @abstractmethod
    def violation(self, s: Tensor) -> Tensor:
        """Return how far s is outside K, elementwise, >= 0, shaped like s."""

    @abstractmethod
    def product(self, s: Tensor, lam: Tensor) -> Tensor:
        """Return the Jordan product of s and lam, shaped like s: complementarity is product = 0."""

    @abstractmethod
    def identity(self, like: Tensor) -> Tensor:
        """Return the unit of the Jordan product, ``(dim,)``, with dtype and device of ``like``."""


class NonnegativeCone(Cone):
    """The nonnegative orthant: componentwise ``s >= 0``."""

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def violation(self, s: Tensor) -> Tensor:
        return (-s).clamp_min(0)

    def product(self, s: Tensor, lam: Tensor) -> Tensor:
        return s * lam

    def identity(self, like: Tensor) -> Tensor:
        return torch.ones(self.dim, dtype=like.dtype, device=like.device)

    def __repr__(self) -> str:
        return f"NonnegativeCone({self.dim})"


class ProductCone(Cone):
    """The product of cones, in the order in which they share the last dimension."""

    def __init__(self, *factors: Cone) -> None:
        self.factors = factors
        self.sizes = [factor.dim for factor in factors]
        self.dim = sum(self.sizes)

    def violation(self, s: Tensor) -> Tensor:
        pieces = s.split(self.sizes, -1)
        return torch.cat([c.violation(v) for c, v in zip(self.factors, pieces, strict=True)], -1)

    def product(self, s: Tensor, lam: Tensor) -> Tensor:
        pairs = zip(self.factors, s.split(self.sizes, -1), lam.split(self.sizes, -1), strict=True)
        return torch.cat([c.product(u, v) for c, u, v in pairs], -1)

    def identity(self, like: Tensor) -> Tensor:
        return torch.cat([factor.identity(like) for factor in self.factors])

    def __repr__(self) -> str:
        return f"ProductCone({', '.join(map(repr, self.factors))})"


def kinds(cone: Cone) -> frozenset[str]:
    """Return the class names of the cones that make up ``cone``; backends declare which they take."""
    if isinstance(cone, ProductCone):
        return frozenset().union(*(kinds(factor) for factor in cone.factors))
    return frozenset({type(cone).__name__})
