"""diffopt itself, as a user calls it."""

from __future__ import annotations

from dataclasses import fields
from time import perf_counter
from typing import Any

from benchmarks.accuracy import Answer
from benchmarks.peers.base import TorchPeer, numpy
from benchmarks.workload import Array, Batch


class Diffopt(TorchPeer):
    name = "diffopt"
    package = "diffopt-torch"
    batched = True
    note = "solve_qp with default settings"
    executor: str | None = None

    def prepare(self) -> None:
        import diffopt

        self.diffopt = diffopt
        self.settings = None
        if self.executor is not None:
            known = {field.name for field in fields(diffopt.Settings)}
            if "executor" not in known:
                raise LookupError("this version has no setting `executor`")
            chosen: dict[str, Any] = {"executor": self.executor}
            self.settings = diffopt.Settings(**chosen)

    def solve(self, leaves: dict[str, Any]) -> Any:
        return self.solution(leaves).x

    def solution(self, leaves: dict[str, Any]) -> Any:
        options: dict[str, Any] = leaves | {"settings": self.settings}
        return self.diffopt.solve_qp(**options)

    def forward_backward_q(self) -> Any:
        """As `forward_backward`, with q alone requiring a gradient."""
        leaves = self.q_only()
        return self.torch.autograd.grad(self.solve(leaves), leaves["q"], self.incoming)

    def backward_seconds(self, q_only: bool, inner: int) -> float:
        """Return the seconds of a backward pass alone, on average over ``inner`` solves."""
        leaves = self.q_only() if q_only else self.leaves
        wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
        total = 0.0
        for _ in range(inner):
            x = self.solve(leaves)
            start = perf_counter()
            self.torch.autograd.grad(x, wanted, self.incoming)
            total += perf_counter() - start
        return total / inner

    def q_only(self) -> dict[str, Any]:
        return {name: leaf if name == "q" else leaf.detach() for name, leaf in self.leaves.items()}

    def gradients(self, result: Any) -> dict[str, Array]:
        return {"q": numpy(result[0])} if len(result) == 1 else super().gradients(result)

    def answer(self) -> Answer:
        found = self.solution(self.leaves)
        x, nu, lam, iterations = (numpy(v) for v in (found.x, found.nu, found.lam, found.iterations))
        return Answer(x, nu, lam, iterations, found.executor)


class DiffoptTorch(Diffopt):
    name = "diffopt (torch)"
    note = "solve_qp with executor='torch': no compiled code"
    executor = "torch"


def active_rows(batch: Batch) -> Array:
    """Return multipliers that are positive on the active rows only, ``(B, m)``."""
    import torch

    import diffopt

    data: dict[str, Any] = {name: torch.from_numpy(piece) for name, piece in batch.pieces().items()}
    return numpy(diffopt.solve_qp(**data).lam)
