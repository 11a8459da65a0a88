"""What is said of instances that were not solved: warnings, errors, and their texts."""

from __future__ import annotations

import warnings
from typing import Literal

from torch import Tensor

from diffopt import transforms
from diffopt.errors import InaccurateSolutionWarning, SolveFailed
from diffopt.solution import ALMOST, REMEDIES, Residuals, Solution, Status, eigenvalues, succeeded

OnFailure = Literal["raise", "return"]
MOST_NAMED = 8
ROUNDED = 1e-12
"""Negative eigenvalue, relative to the largest magnitude of one, that may be rounding error."""


def report(solution: Solution, on_failure: OnFailure) -> None:
    """Warn of almost solved instances, and raise for failed ones if so asked."""
    status = transforms.plain(solution.status)
    if bool((status == Status.SOLVED).all()):
        return
    almost = (status == Status.ALMOST_SOLVED).nonzero().tolist()
    failed = (~succeeded(status)).nonzero().tolist()
    if failed and on_failure == "raise":
        raise SolveFailed(_failure_message(solution, status, failed), solution)
    if almost:
        worst = transforms.plain(solution.residuals.worst())[status == Status.ALMOST_SOLVED].max()
        warnings.warn(
            f"{len(almost)} of {status.numel()} instances are only almost solved (worst relative residual "
            f"{float(worst):.1e}; first at batch index {_index(almost[0])}). Loosen `Settings.tolerance` to accept "
            f"them, or use a backend of higher accuracy.",
            InaccurateSolutionWarning,
            stacklevel=4,
        )


def _failure_message(solution: Solution, statuses: Tensor, failed: list[list[int]]) -> str:
    lines = [f"{len(failed)} of {statuses.numel()} instances were not solved by {solution.backend!r}:"]
    seen: list[Status] = []
    for index in failed[:MOST_NAMED]:
        status = Status(int(statuses[tuple(index)]))
        seen.append(status)
        lines.append(f"  batch index {_index(index)}: {status.name}{_reason(solution, status, index)}")
    if len(failed) > MOST_NAMED:
        lines.append(f"  and {len(failed) - MOST_NAMED} more")
    lines += [f"{status.name}: {REMEDIES[status]}." for status in dict.fromkeys(seen)]
    if solution.selection == "analytic_centre" and Status.NUMERICAL_ERROR in seen:
        lines.append(
            "Solutions that go on without end have no analytic centre; Settings(selection='minimum_norm') has."
        )
    if solution.shifts is not None and Status.PRIMAL_INFEASIBLE in seen:
        lines.append(
            "What has no weight (by default the bounds) or an infinite one is not soft, and contradicts itself: see "
            "diffopt.Elastic(bound=...)."
        )
    lines.append(
        "Pass on_failure='return' to get every instance with its status, and use those where `solution.ok` holds."
    )
    return "\n".join(lines)


def _reason(solution: Solution, status: Status, index: list[int]) -> str:
    """Return what is known of why an instance ended as NUMERICAL_ERROR: its Hessian, or how far off its point is."""
    if status != Status.NUMERICAL_ERROR:
        return ""
    return _curvature(solution, index) or _distance(solution, index)


def _distance(solution: Solution, index: list[int]) -> str:
    residuals = transforms.plain(solution.report.residuals)[(slice(None), *index)]
    if not bool(residuals.max() > ALMOST):  # (NaN: there is no point)
        return ""
    found = ", ".join(f"{name} {value:.1e}" for name, value in zip(Residuals._fields, residuals.tolist(), strict=True))
    return f" (its point misses the optimality conditions; relative residuals: {found})"


def _curvature(solution: Solution, index: list[int]) -> str:
    """Return what to say of the Hessian of a failed instance, if it is that which made it fail."""
    if solution._hessian is None or transforms.active():
        return ""
    matrix = solution._hessian.dense()
    found = eigenvalues(matrix.expand(*solution.status.shape, *matrix.shape[-2:])[tuple(index)].double())
    least, largest = float(found[0]), float(found.abs().max())
    if not least < -ROUNDED * largest:
        return ""
    return (
        f" (Q is not positive semidefinite: its smallest eigenvalue is {least:.2e}, its largest {float(found[-1]):.2e})"
    )


def _index(index: list[int]) -> str:
    return f"[{', '.join(map(str, index))}]" if index else "() (the only instance)"
