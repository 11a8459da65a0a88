"""Every tolerance of the tests, each with its reason. Changing one changes what is promised.

eps is 2.2e-16 in float64 and 1.2e-7 in float32. "Relative" is |got - expected| / (1 + |expected|) with the
largest magnitudes of a piece.
"""

from __future__ import annotations

import torch

KNOWN_POINT = 1e-14
"""KKT conditions at the stated point of a generated problem, relative to the largest term: they are set by
one evaluation of each line, with sums of at most some 20 terms."""

RESIDUAL = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Relative residuals of a SOLVED instance: the default of `Settings.tolerance`, as promised."""

X_REFERENCE = 1e-9
GRADIENT_REFERENCE = 1e-8
"""x and gradients against the extended-precision reference, relative, where cond(Q) <= 1e6, LICQ and a
margin hold: the project's stated targets."""

SOLUTION = {torch.float64: 1e-9, torch.float32: 1e-4}
"""x, duals and value against a known answer with cond(Q) <= 100, relative: eps times the condition of the
KKT matrix is below 1e-12; the float64 figure is the promise. In float32 the data itself is rounded by
6e-8, which the condition number of some 1e3 turns into 6e-5."""

GRADIENT = {torch.float64: 1e-8, torch.float32: 1e-3}
"""Gradients against the reference where cond(Q) <= 100, relative: the float64 figure is the promise; in
float32 they are products of two solutions, each with the error above."""

DIFFERENCES = 1e-5
"""Central differences of a float64 solve; the default of `diffopt.check.gradients`, whose docstring derives
an error of r^(2/3) for a solve with residual r: 1e-6 at the loosest accepted, r = 1e-9."""

EXACT_ALGEBRA = 1e-9
"""Two float64 routes to one number by different operations (forward and reverse mode, a scaled problem,
an identity of the envelope theorem), relative, where cond(Q) <= 100: both are within eps times the
condition of the KKT matrix, and a shared stopping tolerance does not enter, for points are polished."""

BATCH_LOOP = 1e-11
"""A batch against the loop over it, relative: the promise is 1e-12 times the condition number (library
kernels for other batch sizes differ in the last bits), and generated problems have cond(Q) <= 10."""


AGREEMENT = 1e-6
"""Two backends, relative, in float64, where cond(Q) <= 100: a solver that reaches relative residuals of 1e-9
errs in x by that times the condition of the KKT matrix, some 1e3. The project's figure for Clarabel."""


def answer(backend_accuracy: float, dtype: torch.dtype) -> float:
    """Return how close a backend's x and duals come to a known answer, relative, where cond(Q) <= 100.

    Args:
        backend_accuracy: the relative residual that the backend declares; times 1e3 as in `AGREEMENT`.
        dtype: of the data; in float32 the figure of `SOLUTION` is the larger.
    """
    return max(1e3 * backend_accuracy, SOLUTION[dtype])
