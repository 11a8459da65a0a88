"""proxsuite: the QPLayer of its torch module, over the dense ProxQP solver."""

# pyright: reportMissingImports=false
from __future__ import annotations

import os
from typing import Any

from benchmarks.accuracy import Answer
from benchmarks.peers.base import TOLERANCE, TorchPeer, numpy


class Proxsuite(TorchPeer):
    name = "proxsuite"
    package = "proxsuite"
    note = (
        "QPLayer with eps and eps_backward 1e-9, rho_backward and mu_backward 1e-10; its gradient buffers follow "
        "torch's default dtype, set to float64; with several threads omp_parallel over all of them"
    )

    def prepare(self) -> None:
        from proxsuite.torch.qplayer import QPFunction

        torch = self.torch
        torch.set_default_dtype(torch.float64)
        parallel = self.threads > 1 and self.case.batch > 1
        if parallel:
            # The layer takes half of what this says; here it shall have every thread.
            os.cpu_count = lambda: 2 * self.threads
        self.function = QPFunction(
            eps=TOLERANCE, eps_backward=TOLERANCE, rho_backward=1e-10, mu_backward=1e-10, omp_parallel=parallel
        )
        self.lowest = torch.full((self.case.batch, self.case.m), -1e20)
        self.absent = torch.empty(0)

    def everything(self, leaves: dict[str, Any]) -> Any:
        A, b = leaves.get("A", self.absent), leaves.get("b", self.absent)
        return self.function(leaves["Q"], leaves["q"], A, b, leaves["G"], self.lowest, leaves["h"])

    def solve(self, leaves: dict[str, Any]) -> Any:
        return self.everything(leaves)[0]

    def answer(self) -> Answer:
        x, nu, lam = (numpy(v) for v in self.everything(self.leaves))
        return Answer(x, nu, lam)
