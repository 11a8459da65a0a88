"""What a peer is: a solver prepared for a case, then called again and again on the same data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from benchmarks.accuracy import Answer
from benchmarks.workload import Array, Batch

TOLERANCE = 1e-9
"""What the peers are asked for, where they can be asked: diffopt's default for float64."""


class Peer(ABC):
    """One row of the tables. Only `forward`, `forward_backward` and `forward_backward_q` are timed.

    `load` prepares what a user would prepare once for many batches of one size, and holds the data in the
    form that the peer's own interface takes.

    Attributes:
        name: the name of the row.
        package: the distribution whose version is reported.
        differentiable: whether it has gradients. Without them only `forward` is measured.
        batched: whether it works on all programs of a batch at once. The time of another is that of its programs
            one by one, so that a few of them tell it.
        note: how it is set, for the report.
    """

    name: str
    package: str
    differentiable = True
    batched = False
    note = ""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    @abstractmethod
    def load(self, batch: Batch) -> None:
        """Prepare for a batch."""

    @abstractmethod
    def forward(self) -> Any:
        """Solve the batch, without what only gradients need."""

    @abstractmethod
    def answer(self) -> Answer:
        """Return what `forward` finds, with multipliers in the signs of diffopt."""

    def forward_backward(self) -> Any:
        """Solve the batch and pull the incoming gradient back to all data. Returns what `gradients` takes."""
        raise NotImplementedError

    def gradients(self, result: Any) -> dict[str, Array]:
        """Return the gradients by name of piece."""
        raise NotImplementedError


class TorchPeer(Peer):
    """A peer that takes torch tensors: `solve` is given leaves by name and returns x."""

    def load(self, batch: Batch) -> None:
        import torch

        torch.set_num_threads(self.threads)
        self.torch = torch
        self.case = batch.case
        self.leaves = {k: torch.from_numpy(v).requires_grad_() for k, v in batch.pieces().items()}
        self.incoming = torch.from_numpy(batch.incoming)
        self.prepare()

    def prepare(self) -> None:
        """Prepare what depends on sizes only."""

    @abstractmethod
    def solve(self, leaves: dict[str, Any]) -> Any:
        """Return x, differentiable in the leaves."""

    def forward(self) -> Any:
        with self.torch.no_grad():
            return self.solve(self.leaves)

    def forward_backward(self) -> Any:
        x = self.solve(self.leaves)
        return self.torch.autograd.grad(x, list(self.leaves.values()), self.incoming)

    def gradients(self, result: Any) -> dict[str, Array]:
        return {name: numpy(gradient) for name, gradient in zip(self.leaves, result, strict=True)}


class LoopPeer(Peer):
    """A solver of one program, called in a Python loop over data that lie ready as it wants them."""

    differentiable = False

    def load(self, batch: Batch) -> None:
        self.case = batch.case
        self.ready = [self.prepare(batch, i) for i in range(batch.case.batch)]

    @abstractmethod
    def prepare(self, batch: Batch, index: int) -> Any:
        """Return the data of one instance as `solve_one` takes them."""

    @abstractmethod
    def solve_one(self, data: Any) -> tuple[Array, Array]:
        """Return x and the multipliers of the rows [A; G]."""

    def forward(self) -> list[tuple[Array, Array]]:
        return [self.solve_one(data) for data in self.ready]

    def answer(self) -> Answer:
        found = self.forward()
        x, y = np.stack([x for x, _ in found]), np.stack([y for _, y in found])
        return Answer(x, y[:, : self.case.p], y[:, self.case.p :])


def rows(batch: Batch, index: int) -> tuple[Array, Array]:
    """Return [A; G] and [b; h] of one instance."""
    return (
        np.concatenate([batch.A[index], batch.G[index]]),
        np.concatenate([batch.b[index], batch.h[index]]),
    )


def numpy(tensor: Any) -> Array:
    """Return a tensor as an array."""
    return np.asarray(tensor.detach().numpy())
