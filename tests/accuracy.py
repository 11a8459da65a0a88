"""Print the accuracy that the tests demand, as measured: ``make accuracy``.

Worst relative errors of x and of the gradients of all data against the extended-precision active-set
reference (`reference.py`), and the distance of x to Clarabel, as it stops and after the polish that the
"cvxpy" backend gives it, over the instances of `laws/test_gradients_reference.py`; then float32 against float64
(`float32.py`). Both go into `docs/accuracy.md`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent / folder) for folder in ("laws", ".", "..")]

import test_gradients_reference as law

import diffopt
import float32
import measures
import test_maros
from benchmarks import pages
from diffopt.check import known

HEADS = ["n", "p", "m", "bounds", "x", "worst gradient", "x to Clarabel", "Clarabel itself", "x to Clarabel polished"]


def against_the_reference() -> str:
    """Return the table against the extended-precision reference, and its worst figures in a line below."""
    worst: dict[str, float] = {}
    count, lines = 0, []
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
            by_figure = [f"{value:.0e}" for value in (errors.x, gradient, ours_to_raw, own, to_polished)]
            by_figure[1] += f" (in {piece})"
            lines.append([str(n), str(p), str(m), bounds or "none", *by_figure])
    listing = ", ".join(f"{name} {value:.0e}" for name, value in worst.items())
    return (
        f"{pages.table(HEADS, lines)}\nMargin {law.MARGIN}, cond(Q) up to {law.CONDITION:.0e}; "
        f"worst of {count} instances: {listing}.\n"
    )


def main() -> None:
    for name, text in (
        ("reference", against_the_reference()),
        ("float32", float32.rendered(test_maros.REGULAR)),
    ):
        print(text)
        pages.write(pages.ACCURACY, name, text)


if __name__ == "__main__":
    main()
