"""Differentiable optimization layers for PyTorch.

The public names of the package are those of ``__all__``; whatever is not listed may change.
"""

from diffopt import backends, check
from diffopt._version import __version__
from diffopt.errors import (
    BackendError,
    BackendLoadWarning,
    BackendNotInstalled,
    BackendUnsupported,
    ChangedDataError,
    CompiledExecutorWarning,
    DeviceError,
    DiffoptError,
    DiffoptWarning,
    DtypeError,
    GradientCheckFailed,
    InaccurateGradientWarning,
    InaccurateSolutionWarning,
    MissingPackage,
    NotDifferentiableError,
    ParameterError,
    SettingsError,
    ShapeError,
    SolveFailed,
    UnknownBackend,
)
from diffopt.infeasible import Elastic
from diffopt.layer import Layer, solve, solve_qp
from diffopt.linalg import Dense, Diagonal, DiagonalPlusLowRank
from diffopt.problems import (
    DifferentiableProblem,
    Param,
    QPForm,
    QPStructure,
    QuadraticProgram,
    absent,
    fixed,
    given,
    learned,
)
from diffopt.solution import Certificate, Residuals, Shifts, Solution, Status
from diffopt.solvers.settings import Settings

__all__ = [
    "BackendError",
    "BackendLoadWarning",
    "BackendNotInstalled",
    "BackendUnsupported",
    "Certificate",
    "ChangedDataError",
    "CompiledExecutorWarning",
    "Dense",
    "DeviceError",
    "Diagonal",
    "DiagonalPlusLowRank",
    "DifferentiableProblem",
    "DiffoptError",
    "DiffoptWarning",
    "DtypeError",
    "Elastic",
    "GradientCheckFailed",
    "InaccurateGradientWarning",
    "InaccurateSolutionWarning",
    "Layer",
    "MissingPackage",
    "NotDifferentiableError",
    "Param",
    "ParameterError",
    "QPForm",
    "QPStructure",
    "QuadraticProgram",
    "Residuals",
    "Settings",
    "SettingsError",
    "ShapeError",
    "Shifts",
    "Solution",
    "SolveFailed",
    "Status",
    "UnknownBackend",
    "__version__",
    "absent",
    "backends",
    "check",
    "fixed",
    "given",
    "learned",
    "solve",
    "solve_qp",
]
