"""Exceptions and warnings. Every message says what, where, expected, got, and the remedy."""

from __future__ import annotations

import warnings
from typing import Any


class DiffoptError(Exception):
    """Base of every exception that diffopt raises on purpose."""


class ShapeError(DiffoptError, ValueError):
    """A tensor has the wrong shape, or shapes do not broadcast."""


class DtypeError(DiffoptError, TypeError):
    """A tensor has a dtype that cannot be used, or dtypes are mixed."""


class DeviceError(DiffoptError, ValueError):
    """Tensors live on different devices."""


class ParameterError(DiffoptError, TypeError):
    """A parameter is unknown, missing, given twice, or declared in a wrong way."""


class SettingsError(DiffoptError, ValueError):
    """A setting is unknown or has a value outside its range."""


class BackendError(DiffoptError):
    """Base of what can be wrong with the choice of a backend, and with what one returns."""


class UnknownBackend(BackendError, ValueError):
    """No backend of this name is registered."""


class BackendNotInstalled(BackendError, ImportError):
    """The backend is registered, but a package that it needs is not installed."""


class BackendUnsupported(BackendError, ValueError):
    """The backend cannot take this problem: its form, cone, dtype or device."""


class NotDifferentiableError(DiffoptError, NotImplementedError):
    """A derivative was asked for in a way that is not supported."""


class ChangedDataError(DiffoptError, RuntimeError):
    """Data was changed in place after the solve, and before what is computed from it on access was read."""


class SolveFailed(DiffoptError, RuntimeError):
    """At least one instance of a batch was not solved.

    Attributes:
        solution: the whole :class:`~diffopt.Solution`, with one status per instance.
    """

    def __init__(self, message: str, solution: Any = None) -> None:
        super().__init__(message)
        self.solution = solution


class GradientCheckFailed(DiffoptError, AssertionError):
    """`diffopt.check.gradients` found a derivative that differences do not confirm, or could compare none."""


class MissingPackage(DiffoptError, ImportError):
    """An optional package that this part of diffopt needs is not installed."""


class DiffoptWarning(UserWarning):
    """Base of every warning that diffopt gives."""


class InaccurateSolutionWarning(DiffoptWarning):
    """Some instance ended as ``ALMOST_SOLVED``: its residuals miss the tolerance but are <= 1e-6
    (closest problems of float32 data: before rounding)."""


class BackendLoadWarning(DiffoptWarning):
    """A third-party backend's entry point could not be loaded; the backend is left out."""


class CompiledExecutorWarning(DiffoptWarning):
    """A compiled executor is missing or cannot be used; torch operations, or a slower variant, do its work."""


class InaccurateGradientWarning(DiffoptWarning):
    """The linear system behind some instance's gradient could not be solved: its solution x is not unique."""


ADJOINT = 1e-6
"""Relative residual of the linear system behind a gradient up to which it counts as solved."""


def warn_of_gradients(poor: int, total: int) -> None:
    """Warn that the gradients of some instances are not to be relied on."""
    warnings.warn(
        f"The linear system behind the gradients of {poor} of {total} instances cannot be solved to a relative "
        f"residual of {ADJOINT:g}: their x is not unique, or nearly so, and has no derivative. They get the shortest "
        f"least-squares solution. `Solution.unique` says which they are, Settings(kink_rule='nan') gives them NaN.",
        InaccurateGradientWarning,
        stacklevel=3,
    )
