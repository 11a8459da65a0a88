"""Backends: who solves a problem. Contracts, registry, and one file per backend."""

import importlib
import pkgutil

from diffopt.backends.base import (
    Backend,
    Capabilities,
    InstancePoint,
    RawPoint,
    instances,
    screen,
    solve_each,
    stack,
)
from diffopt.backends.cvxpy_ import CvxpyBackend
from diffopt.backends.pdipm import PdipmBackend
from diffopt.backends.registry import Explanation, explain, get, names, register
from diffopt.backends.scipy_ import ScipyBackend

# Every module of this folder registers its backend by being imported: a new backend is one file.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "Backend",
    "Capabilities",
    "CvxpyBackend",
    "Explanation",
    "InstancePoint",
    "PdipmBackend",
    "RawPoint",
    "ScipyBackend",
    "explain",
    "get",
    "instances",
    "names",
    "register",
    "screen",
    "solve_each",
    "stack",
]
