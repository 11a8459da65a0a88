"""cvxpylayers: a cone program through CVXPY, solved by Clarabel and differentiated by diffcp."""

# pyright: reportMissingImports=false
from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.accuracy import Answer
from benchmarks.peers.base import TorchPeer, numpy


class Cvxpylayers(TorchPeer):
    name = "cvxpylayers"
    package = "cvxpylayers"
    note = (
        "CvxpyLayer made once, |L'x|^2 with Q = LL' by torch's Cholesky (the form its rules ask for); "
        "Clarabel with tolerances 1e-11 (no setting made it more accurate); diffcp's dense mode for the gradient"
    )

    sizes: tuple[int, int, int] | None = None

    def prepare(self) -> None:
        import cvxpy as cp
        from cvxpylayers.torch import CvxpyLayer

        n, m, p = sizes = self.case.n, self.case.m, self.case.p
        if sizes == self.sizes:
            return
        self.sizes = sizes
        x, root, q = cp.Variable(n), cp.Parameter((n, n)), cp.Parameter(n)
        G, h = cp.Parameter((m, n)), cp.Parameter(m)
        sides = [cp.Parameter((p, n)), cp.Parameter(p)] if p else []
        inequalities, equalities = G @ x <= h, [sides[0] @ x == sides[1]] if p else []
        problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(root @ x) + q @ x), [inequalities, *equalities])
        parameters = [root, q, G, h, *sides]
        multipliers = [constraint.dual_variables[0] for constraint in (inequalities, *equalities)]
        options = {
            "solve_method": "Clarabel",
            "n_jobs_forward": self.threads,
            **dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-11),
        }
        # Options of the gradient: without gradients they would reach the solver, which does not know them.
        self.with_gradient = {"mode": "dense", "n_jobs_backward": self.threads}
        self.layer = CvxpyLayer(problem, parameters, [x], solver_args=options)
        self.layer_with_multipliers = CvxpyLayer(problem, parameters, [x, *multipliers], solver_args=options)

    def arguments(self, leaves: dict[str, Any]) -> list[Any]:
        root = self.torch.linalg.cholesky(leaves["Q"]).mT
        return [root, *(leaves[name] for name in ("q", "G", "h", "A", "b") if name in leaves)]

    def solve(self, leaves: dict[str, Any]) -> Any:
        options = self.with_gradient if self.torch.is_grad_enabled() else None
        return self.layer(*self.arguments(leaves), solver_args=options)[0]

    def answer(self) -> Answer:
        with self.torch.no_grad():
            x, lam, *nu = self.layer_with_multipliers(*self.arguments(self.leaves))
        return Answer(numpy(x), numpy(nu[0]) if nu else np.zeros((self.case.batch, 0)), numpy(lam))
