"""qpax: an interior-point method in JAX, compiled and mapped over the batch."""

# pyright: reportMissingImports=false
from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.accuracy import Answer
from benchmarks.peers.base import TOLERANCE, Peer
from benchmarks.workload import PIECES, Array, Batch


class Qpax(Peer):
    name = "qpax"
    package = "qpax"
    batched = True
    note = "jit(vmap(...)) in float64, solver_tol 1e-9, target_kappa 1e-9 for the gradient"

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        import jax

        jax.config.update("jax_enable_x64", True)
        import qpax

        def primal(*data: Any) -> Any:
            return qpax.solve_qp_primal(*data, solver_tol=TOLERANCE, target_kappa=TOLERANCE)

        def pulled(incoming: Any, *data: Any) -> Any:
            return jax.vjp(primal, *data)[1](incoming)

        def solved(*data: Any) -> Any:
            return qpax.solve_qp(*data, solver_tol=TOLERANCE)

        self.jax = jax
        self.solved, self.pulled = jax.jit(jax.vmap(solved)), jax.jit(jax.vmap(pulled))

    def load(self, batch: Batch) -> None:
        self.case = batch.case
        self.data = [self.jax.numpy.asarray(getattr(batch, name)) for name in PIECES]
        self.incoming = self.jax.numpy.asarray(batch.incoming)

    def forward(self) -> Any:
        return self.jax.block_until_ready(self.solved(*self.data))

    def forward_backward(self) -> Any:
        return self.jax.block_until_ready(self.pulled(self.incoming, *self.data))

    def gradients(self, result: Any) -> dict[str, Array]:
        found = dict(zip(PIECES, result, strict=True))
        return {k: np.asarray(v) for k, v in found.items() if k not in "Ab" or self.case.p}

    def answer(self) -> Answer:
        x, _, lam, nu, _, iterations = (np.asarray(v) for v in self.forward())
        return Answer(x, nu, lam, iterations)
