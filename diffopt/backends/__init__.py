"""Backends: who solves a problem. Contracts, registry, and one file per backend."""

from diffopt.backends import cvxpy_ as _cvxpy
from diffopt.backends import pdipm as _pdipm
from diffopt.backends import scipy_ as _scipy
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
from diffopt.backends.registry import Explanation, explain, get, names, register

CvxpyBackend = _cvxpy.CvxpyBackend
PdipmBackend = _pdipm.PdipmBackend
ScipyBackend = _scipy.ScipyBackend

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
