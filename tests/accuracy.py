"""Print the accuracy that the tests demand, as measured: ``make accuracy``.

Worst relative errors of x and of the gradients of all data against the extended-precision active-set
reference (`reference.py`), and the distance of x to Clarabel, as it stops and after the polish that the
"cvxpy" backend gives it, over the instances of `laws/test_gradients_reference.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent / folder) for folder in ("laws", ".", "..")]

import test_gradients_reference as law

import diffopt
import measures
from diffopt.check import known


def main() -> None:
    worst: dict[str, float] = {}
    count = 0
    print(f"margin {law.MARGIN}, cond(Q) up to {law.CONDITION:.0e}, {law.BATCH} instances a line")
    print(" n  p  m  bounds     x error    worst gradient error    x to Clarabel  its own error   polished")
    for n, p, m, bounds, more in law.STRUCTURES:
        for seed in law.SEEDS:
            problem = known.quadratic_program(
                seed, n, p, m, bounds=bounds, batch=(law.BATCH,), margin=law.MARGIN, condition=law.CONDITION, **more
            )
            errors = law.measured(problem)
            piece, gradient = max(errors.gradients.items(), key=lambda item: item[1])
            ours, raw, polished = (
                diffopt.solve_qp(**problem.arguments(), backend=name, settings=settings, on_failure="return").x
                for name, settings in (("pdipm", None), ("cvxpy", diffopt.Settings(polish=False)), ("cvxpy", None))
            )
            own, ours_to_raw, to_polished = (
                measures.relative(x, y) for x, y in ((raw, problem.x), (ours, raw), (ours, polished))
            )
            count += len(problem.instances())
            figures = {
                "x": errors.x, "gradients": gradient, "x to Clarabel": ours_to_raw, "Clarabel itself": own,
                "x to Clarabel polished": to_polished,
            }  # fmt: skip
            worst = {name: max(value, worst.get(name, 0.0)) for name, value in figures.items()}
            print(
                f"{n:2d} {p:2d} {m:2d}  {bounds or 'none':8s} {errors.x:9.1e}    {gradient:9.1e} (in {piece:5s})"
                f"{ours_to_raw:12.1e}{own:15.1e}{to_polished:11.1e}"
            )
    listing = ", ".join(f"{name} {value:.1e}" for name, value in worst.items())
    print(f"worst of {count} instances: {listing} (torch {torch.__version__})")


if __name__ == "__main__":
    main()
