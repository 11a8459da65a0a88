"""qpth: the layer of the OptNet paper, a batched interior-point method in torch operations."""

# pyright: reportMissingImports=false
from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.accuracy import Answer
from benchmarks.peers.base import TorchPeer, numpy


class Qpth(TorchPeer):
    name = "qpth"
    package = "qpth"
    batched = True
    note = "QPFunction with its defaults (eps 1e-12, at most 20 iterations), without the check of Q"

    def prepare(self) -> None:
        from qpth.qp import QPFunction

        self.function = QPFunction(verbose=-1, check_Q_spd=False)
        self.absent = self.torch.empty(0, dtype=self.torch.float64)

    def solve(self, leaves: dict[str, Any]) -> Any:
        A, b = leaves.get("A", self.absent), leaves.get("b", self.absent)
        return self.function(leaves["Q"], leaves["q"], leaves["G"], leaves["h"], A, b)

    def answer(self) -> Answer:
        x = self.solve(self.leaves)
        nu = numpy(x.grad_fn.nus) if self.case.p else np.zeros((self.case.batch, 0))
        return Answer(numpy(x), nu, numpy(x.grad_fn.lams))
