"""Solvers of one program each, without gradients, in a Python loop over ready NumPy data."""

# pyright: reportMissingImports=false
from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from benchmarks.peers.base import TOLERANCE, LoopPeer, rows
from benchmarks.workload import Array, Batch


class Daqp(LoopPeer):
    name = "daqp"
    package = "daqp"
    note = "dual active-set method, primal_tol 1e-9"

    def load(self, batch: Batch) -> None:
        import daqp

        self.daqp = daqp
        self.none = np.full(batch.case.p + batch.case.m, -1e30)
        self.sense = np.array([5] * batch.case.p + [0] * batch.case.m, np.int32)
        super().load(batch)

    def prepare(self, batch: Batch, index: int) -> Any:
        C, d = rows(batch, index)
        return np.ascontiguousarray(batch.Q[index]), batch.q[index].copy(), C, d

    def solve_one(self, data: Any) -> tuple[Array, Array]:
        H, f, C, d = data
        # The loop keeps the sense as it was given: the solver marks active rows in it.
        x, _, _, info = self.daqp.solve(H, f, C, d, self.none, self.sense.copy(), primal_tol=TOLERANCE)
        return np.asarray(x), np.asarray(info["lam"])


class DaqpFromTorch(Daqp):
    name = "daqp (torch)"
    note = "as daqp, but from torch tensors to a torch tensor, as a program built on torch would call it"

    def load(self, batch: Batch) -> None:
        import torch

        super().load(batch)
        self.torch = torch
        self.tensors = [torch.from_numpy(v) for v in (batch.Q, batch.q, batch.A, batch.b, batch.G, batch.h)]

    def forward(self) -> list[tuple[Array, Array]]:
        Q, q, A, b, G, h = (tensor.numpy() for tensor in self.tensors)
        C, d = np.concatenate([A, G], 1), np.concatenate([b, h], 1)
        found = [self.solve_one(data) for data in zip(Q, q, C, d, strict=True)]
        self.x = self.torch.from_numpy(np.stack([x for x, _ in found]))
        return found


class Piqp(LoopPeer):
    name = "piqp"
    package = "piqp"
    note = "dense solver set up once, then updated; tolerances 1e-9"

    def load(self, batch: Batch) -> None:
        import piqp

        super().load(batch)
        self.solver = piqp.DenseSolver()
        settings = self.solver.settings
        settings.eps_abs = settings.eps_rel = TOLERANCE
        settings.eps_duality_gap_abs = settings.eps_duality_gap_rel = TOLERANCE
        P, q, A, b, G, h = self.ready[0]
        if batch.case.p:
            self.solver.setup(P, q, A, b, G, None, h)
        else:
            self.solver.setup(P, q, None, None, G, None, h)

    def prepare(self, batch: Batch, index: int) -> Any:
        A, b = (np.asfortranarray(batch.A[index]), batch.b[index]) if batch.case.p else (None, None)
        Q, G = np.asfortranarray(batch.Q[index]), np.asfortranarray(batch.G[index])
        return Q, batch.q[index], A, b, G, batch.h[index]

    def solve_one(self, data: Any) -> tuple[Array, Array]:
        P, q, A, b, G, h = data
        self.solver.update(P, q, A, b, G, None, h)
        self.solver.solve()
        result = self.solver.result
        return result.x.copy(), np.concatenate([result.y, result.z_u])


class Clarabel(LoopPeer):
    name = "clarabel"
    package = "clarabel"
    note = "a solver per program from ready sparse matrices, tolerances 1e-9"

    def load(self, batch: Batch) -> None:
        clarabel: Any = importlib.import_module("clarabel")
        self.clarabel = clarabel
        self.settings = clarabel.DefaultSettings()
        self.settings.verbose = False
        self.settings.tol_gap_abs = self.settings.tol_gap_rel = self.settings.tol_feas = TOLERANCE
        self.cones = [clarabel.ZeroConeT(batch.case.p)] if batch.case.p else []
        self.cones.append(clarabel.NonnegativeConeT(batch.case.m))
        super().load(batch)

    def prepare(self, batch: Batch, index: int) -> Any:
        from scipy.sparse import csc_matrix

        C, d = rows(batch, index)
        return csc_matrix(np.triu(batch.Q[index])), batch.q[index], csc_matrix(C), d

    def solve_one(self, data: Any) -> tuple[Array, Array]:
        found = self.clarabel.DefaultSolver(*data, self.cones, self.settings).solve()
        return np.asarray(found.x), np.asarray(found.z)


class Gurobi(LoopPeer):
    name = "gurobi"
    package = "gurobipy"
    note = "a model per program, barrier, tolerances 1e-9; the free licence limits the size"

    def load(self, batch: Batch) -> None:
        import gurobipy

        self.gurobipy = gurobipy
        self.environment = gurobipy.Env(empty=True)
        options = {
            "OutputFlag": 0, "Threads": self.threads, "Method": 2,
            "BarConvTol": TOLERANCE, "FeasibilityTol": TOLERANCE, "OptimalityTol": TOLERANCE,
        }  # fmt: skip
        for option, value in options.items():
            self.environment.setParam(option, value)
        self.environment.start()
        self.sense = np.array(["="] * batch.case.p + ["<"] * batch.case.m)
        super().load(batch)

    def prepare(self, batch: Batch, index: int) -> Any:
        return 0.5 * batch.Q[index], batch.q[index], *rows(batch, index)

    def solve_one(self, data: Any) -> tuple[Array, Array]:
        half, q, C, d = data
        with self.gurobipy.Model(env=self.environment) as model:
            x = model.addMVar(len(q), lb=-self.gurobipy.GRB.INFINITY)
            model.setMObjective(half, q, 0.0, xQ_L=x, xQ_R=x, xc=x)
            constraint = model.addMConstr(C, x, self.sense, d)
            model.optimize()
            return x.X, -constraint.Pi
