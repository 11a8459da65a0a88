"""moreau: a compiled conic solver with a torch interface of its own."""

# pyright: reportMissingImports=false
from __future__ import annotations

from typing import Any

from benchmarks.accuracy import Answer
from benchmarks.peers.base import TOLERANCE, TorchPeer, numpy


class Moreau(TorchPeer):
    name = "moreau"
    package = "moreau"
    note = "torch.Solver, which takes its active-set method at these sizes; primal_tol 1e-9"

    def prepare(self) -> None:
        import moreau
        from moreau.torch import Solver

        torch, (n, rows) = self.torch, (self.case.n, self.case.m + self.case.p)
        settings = moreau.Settings(batch_size=self.case.batch, device="cpu", enable_grad=True, **self.method(moreau))
        self.solver = Solver(
            n,
            rows,
            P_row_offsets=torch.arange(0, n * n + 1, n),
            P_col_indices=torch.arange(n).repeat(n),
            A_row_offsets=torch.arange(0, rows * n + 1, n),
            A_col_indices=torch.arange(n).repeat(rows),
            cones=moreau.Cones(num_zero_cones=self.case.p, num_nonneg_cones=self.case.m),
            settings=settings,
        )

    def method(self, moreau: Any) -> dict[str, Any]:
        return {"solver": "active_set", "active_set_settings": moreau.ActiveSetSettings(primal_tol=TOLERANCE)}

    def solution(self, leaves: dict[str, Any]) -> Any:
        matrix, side = leaves["G"].flatten(1), leaves["h"]
        if self.case.p:
            matrix = self.torch.cat([leaves["A"].flatten(1), matrix], 1)
            side = self.torch.cat([leaves["b"], side], 1)
        return self.solver.solve(leaves["Q"].flatten(1), matrix, leaves["q"], side)

    def solve(self, leaves: dict[str, Any]) -> Any:
        return self.solution(leaves).x

    def answer(self) -> Answer:
        found = self.solution(self.leaves)
        z = numpy(found.z)
        return Answer(numpy(found.x), z[:, : self.case.p], z[:, self.case.p :])


class MoreauInterior(Moreau):
    name = "moreau (ipm)"
    note = "torch.Solver with its interior-point method, tolerances 1e-11 (at 1e-9 its gradients lose digits)"

    def method(self, moreau: Any) -> dict[str, Any]:
        names = ("tol_gap_abs", "tol_gap_rel", "tol_feas")
        chosen = moreau.IPMSettings(**dict.fromkeys(names, 1e-11), diff_method="exact")
        return {"solver": "ipm", "ipm_settings": chosen}
