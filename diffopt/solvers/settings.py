"""What a user can tune, with units, defaults and which direction is looser."""

from __future__ import annotations

from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, ClassVar, Literal

import torch

from diffopt.errors import SettingsError

KinkRule = Literal["inactive", "active", "central", "minimum_norm", "nan"]
Selection = Literal["minimum_norm", "analytic_centre"]
RelaxationMode = Literal["central_path", "ridge"]
KINK_RULES: tuple[str, ...] = ("inactive", "active", "central", "minimum_norm", "nan")


@dataclass(frozen=True, init=False)
class Settings:
    """Settings of a solve. Immutable; `replace` makes a changed copy.

    Attributes:
        tolerance: relative residual (primal, dual and gap; see `Residuals`) at which an instance is
            SOLVED. Dimensionless. Default ``None``: 1e-9 in float64, 1e-5 in float32. Larger is looser.
        max_iterations: iterations of the solver before an instance ends as MAX_ITERATIONS.
            Default 60. Smaller is looser.
        kink_rule: which derivative is returned where a constraint holds with equality and has no
            multiplier ("weakly active"): ``"inactive"`` (default) leaves such rows out, ``"active"``
            holds them with equality, ``"central"`` is the limit along the central path,
            ``"minimum_norm"`` the shortest solution when these rows are left undecided. ``"nan"`` gives NaN to every
            instance that has such constraints, or active ones that depend on each other, or an x that is not unique.
        weak_tolerance: a row is weakly active when its slack and its multiplier are both below this,
            in the units of the equilibrated problem (about 1 for ordinary data). Default ``None``:
            1e-7 in float64, 1e-3 in float32. Larger counts more rows.
        polish: solve for the exact point of the final active set (default True). False is looser:
            the interior-point end point is returned, and its small multipliers blur the gradient.
        reduction: how the primary backend eliminates: ``"auto"`` (default), ``"dual"`` (m x m),
            ``"diagonal"`` or ``"primal"`` (n x n). Affects speed, not what is solved.
        executor: who carries out the primary backend's method: ``"auto"`` (default) takes compiled code
            where it can take the problem, ``"torch"`` torch operations, ``"cpu"`` or ``"cuda"`` insist on
            compiled code. Affects speed, not what is solved; `Solution.executor` says who it was.
        relaxation: ``None`` (default): gradients are exact. A positive number: solutions are exact, but x, s and the
            multipliers get the derivatives of a problem nearby, for programs whose exact derivative is zero or a
            jump (linear ones). Larger is smoother, and further from the exact derivative. `Solution.gradient`
            names what was done. The optimal value keeps its exact derivative.
        relaxation_mode: which problem nearby: ``"central_path"`` (default), the point with s_i lam_i = relaxation for
            every inequality and bound (in units of the objective), or ``"ridge"``, the solution with
            Q + relaxation I (objective units per squared unit of x).
        sync: whether the host may wait for the device (default True). False: nothing reads a value back, forward or
            backward, so that a solve can be captured in a CUDA graph. Then nothing can be raised because of values
            (``on_failure="return"`` is required), few certificates are found, and what the executor ``"cuda"`` leaves
            unsolved stays UNSOLVED. Goes with the kink rule ``"inactive"`` and without relaxation.
        selection: which solution x is, of programs that have many (linear ones, singular Q). ``None`` (default): some
            solution, as the solver found it. ``"minimum_norm"``: the shortest, in the 2-norm of x.
            ``"analytic_centre"``: that of the largest product of the slacks of all inequalities and bounds that are
            not the same for all solutions; the solutions must be bounded. By a second solve of the instances whose x
            is not known to be unique; gradients are those of the selected solution.
    """

    tolerance: float | None
    max_iterations: int
    kink_rule: KinkRule
    weak_tolerance: float | None
    polish: bool
    reduction: Literal["auto", "dual", "diagonal", "primal"]
    executor: Literal["auto", "torch", "cpu", "cuda"]
    relaxation: float | None
    relaxation_mode: RelaxationMode
    sync: bool
    selection: Selection | None
    text: ClassVar[str]  # of each instance: all of the above, for `read`; operators in compiled graphs carry it

    def __init__(
        self,
        *,
        tolerance: float | None = None,
        max_iterations: int = 60,
        kink_rule: KinkRule = "inactive",
        weak_tolerance: float | None = None,
        polish: bool = True,
        reduction: Literal["auto", "dual", "diagonal", "primal"] = "auto",
        executor: Literal["auto", "torch", "cpu", "cuda"] = "auto",
        relaxation: float | None = None,
        relaxation_mode: RelaxationMode = "central_path",
        sync: bool = True,
        selection: Selection | None = None,
        **unknown: Any,
    ) -> None:
        names = _NAMES
        if unknown:
            raise SettingsError(f"Unknown setting {', '.join(map(repr, unknown))}. Expected one of {', '.join(names)}.")
        _check("tolerance", tolerance, _below_one(tolerance), "None or a number between 0 and 1")
        whole = isinstance(max_iterations, Integral) and not isinstance(max_iterations, bool)
        _check("max_iterations", max_iterations, whole and max_iterations >= 1, "a whole number >= 1")
        _check("kink_rule", kink_rule, kink_rule in KINK_RULES, f"one of {', '.join(map(repr, KINK_RULES))}")
        _check("weak_tolerance", weak_tolerance, _below_one(weak_tolerance), "None or a number between 0 and 1")
        for name, value in (("polish", polish), ("sync", sync)):
            _check(name, value, isinstance(value, bool), "True or False")
        reductions = ("auto", "dual", "diagonal", "primal")
        _check("reduction", reduction, reduction in reductions, f"one of {', '.join(map(repr, reductions))}")
        executors = ("auto", "torch", "cpu", "cuda")
        _check("executor", executor, executor in executors, f"one of {', '.join(map(repr, executors))}")
        positive = relaxation is None or (_is_number(relaxation) and 0 < relaxation < float("inf"))
        _check("relaxation", relaxation, positive, "None or a positive number")
        modes = ("central_path", "ridge")
        _check("relaxation_mode", relaxation_mode, relaxation_mode in modes, f"one of {', '.join(map(repr, modes))}")
        selections = (None, "minimum_norm", "analytic_centre")
        _check("selection", selection, selection in selections, f"one of {', '.join(map(repr, selections))}")
        exact = relaxation is None and kink_rule != "nan"
        alone = "None where there is a relaxation, and under the kink rule 'nan'"
        _check("selection", selection, selection is None or exact, alone)
        if not sync:
            _check("sync", sync, selection is None, "True with a selection")
            together = kink_rule == "inactive" and relaxation is None
            _check("sync", sync, together, "True with kink rules other than 'inactive', and with a relaxation")
        values = (
            *(tolerance, int(max_iterations), kink_rule, weak_tolerance, polish, reduction, executor),
            *(None if relaxation is None else float(relaxation), relaxation_mode, sync, selection),
        )
        for name, value in zip(names, values, strict=True):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "text", ",".join([str(value) for value in values]))

    @staticmethod
    def read(text: str) -> Settings:
        """Return the settings of this ``text``."""
        values: Any = dict(zip(_NAMES, text.split(","), strict=True))
        for name in ("tolerance", "weak_tolerance", "relaxation"):
            values[name] = None if values[name] == "None" else float(values[name])
        values["selection"] = None if values["selection"] == "None" else values["selection"]
        for name in ("polish", "sync"):
            values[name] = values[name] == "True"
        return Settings(**values | {"max_iterations": int(values["max_iterations"])})

    def replace(self, **changes: Any) -> Settings:
        """Return a copy with some settings changed."""
        return Settings(**{f.name: getattr(self, f.name) for f in fields(self)} | changes)

    def tolerance_for(self, dtype: torch.dtype) -> float:
        """Return `tolerance`, or its default for this dtype."""
        if self.tolerance is not None:
            return self.tolerance
        return 1e-9 if dtype == torch.float64 else 1e-5

    def weak_tolerance_for(self, dtype: torch.dtype) -> float:
        """Return `weak_tolerance`, or its default for this dtype."""
        if self.weak_tolerance is not None:
            return self.weak_tolerance
        return 1e-7 if dtype == torch.float64 else 1e-3


_NAMES = tuple(f.name for f in fields(Settings))


def _is_number(value: Any) -> bool:
    # (A tensor is none: its value would have to be looked at, and a compiled graph cannot write it down.)
    return isinstance(value, Real) and not isinstance(value, bool)


def _below_one(value: Any) -> bool:
    return value is None or (_is_number(value) and 0 < value < 1)


def _check(name: str, value: object, valid: bool, expected: str) -> None:
    if not valid:
        raise SettingsError(f"Setting `{name}` = {value!r} is out of range. Expected {expected}.")
