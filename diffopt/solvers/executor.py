"""The contract of an executor: who carries out the interior-point method for a batch of quadratic programs.

`diffopt.solvers.pdipm` in torch operations answers every instance on every device. The compiled executors are much
faster: `cpu_executor` answers everything too, `cuda_executor` what it can prove solved, and leaves the rest to torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from diffopt.linalg.matrices import SymmetricMatrix
from diffopt.packed import Packed
from diffopt.solution import Certificate
from diffopt.solvers.settings import Settings
from diffopt.warm_start import Start


class Data(NamedTuple):
    """A batch of quadratic programs as plain tensors; shapes as in `diffopt.QPForm`.

    Of a dense Q the symmetric part is meant: an executor symmetrises. h, lower and upper may be infinite. ``notes`` are
    for an executor to keep what depends on these shapes alone.
    """

    Q: SymmetricMatrix
    q: Tensor
    A: Tensor
    b: Tensor
    G: Tensor
    h: Tensor
    lower: Tensor | None
    upper: Tensor | None
    batch: torch.Size
    notes: dict[Any, Any] | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return Q's tensors, q, A, b, G, h, lower, upper."""
        return (*self.Q.tensors(), self.q, self.A, self.b, self.G, self.h, self.lower, self.upper)


class Point(Protocol):
    """Vectors of a solution, as `diffopt.kkt.Point` and `diffopt.packed.Packed` have them."""

    @property
    def x(self) -> Tensor: ...
    @property
    def nu(self) -> Tensor: ...
    @property
    def lam(self) -> Tensor: ...


class Answer(NamedTuple):
    """What a compiled executor found, in original units and the data's dtype, without a graph.

    Attributes:
        packed: the point, with the signs of `diffopt.Solution`, not to be used where the status is UNSOLVED; the
            residuals (primal, dual, gap, as in `diffopt.solution.Residuals`); the counts (iterations, weakly active
            rows, dependent rows, as in `diffopt.Solution`); and the statuses. SOLVED: the relative residuals, as
            recomputed from the original data, are at most the tolerance. UNSOLVED: another executor is to look at it.
        unsolved: how many instances are not SOLVED; ``None`` where nobody was to wait for that (`Settings.sync`).
        certificate: proofs for instances that have no solution; ``None`` if there are none, or nobody was to wait.
        saved: what `Executor.pullback` needs; ``None`` if it was not to be kept.
        name: which variant ran, for `diffopt.Solution.executor`.
    """

    packed: Packed
    unsolved: int | None
    certificate: Certificate | None
    saved: Any
    name: str


class Executor(ABC):
    """A compiled executor.

    Laws (tested): an instance's answer has the same bits whatever the batch size, its place and its
    neighbours' data; a SOLVED instance agrees with ``pdipm``; nothing raises because of values.

    Attributes:
        many_at_once: whether it has `derivative`.
    """

    many_at_once = False

    @abstractmethod
    def refuses(self, data: Data, settings: Settings) -> str | None:
        """Return why this executor cannot take the batch (its structure, size, device), or ``None``."""

    @abstractmethod
    def solve(
        self,
        data: Data,
        settings: Settings,
        tolerance: float,
        weak_tolerance: float,
        keep: bool,
        start: Start | None = None,
    ) -> Answer:
        """Solve what can be solved.

        Args:
            tolerance: worst relative residual of a SOLVED instance.
            weak_tolerance: see `Settings.weak_tolerance`.
            keep: whether `pullback` will be called.
            start: an earlier solution to begin with. An executor may leave it unused: a status never depends on it, and
                a solution that is unique only within the tolerance.
        """

    @abstractmethod
    def pullback(
        self, data: Data, saved: Any, point: Point, gradients: tuple[Tensor | None, ...], needed: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of a function of the solution with respect to the data, by one solve each.

        Args:
            saved: that of the answer, whose vectors still lie where they lay.
            point: these vectors.
            gradients: those with respect to x, s, nu, lam, lam_lower, lam_upper; ``None`` is zero.
            needed: for each of ``data.tensors()``, whether its gradient is wanted.

        Returns:
            For each of ``data.tensors()`` its gradient, in its shape (shared tensors: summed over the batch;
            Q's is symmetric), or ``None``. Zero from instances that are UNSOLVED and so another executor's; NaN from
            those that failed, if any incoming gradient is not zero. Where nobody waits (`Settings.sync`) UNSOLVED is
            failed. Weakly active rows are left out (the rule ``"inactive"``).
        """

    def derivative(
        self, data: Data, saved: Any, vectors: tuple[Tensor | None, ...], forward: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Apply the derivative of the solution to many vectors at once; where `many_at_once`.

        Args:
            saved: as in `pullback`.
            vectors: as ``gradients`` of `pullback`, each ``(many, *batch, size)``. ``forward``: tangents of the
                optimality conditions instead, in this order: of Qx + q + A'nu + G'lam; none; of b - Ax, of h - Gx, of
                lower, of upper.

        Returns:
            The gradients of q, b, h, lower and upper, each ``(many, *batch, size)`` and summed over nothing; those of
            bounds are ``None`` where there are none. ``forward``: the tangents of x, nu, lam, lam_lower and lam_upper.
            What `pullback` says of instances that are not SOLVED goes for each of the many.
        """
        raise NotImplementedError
