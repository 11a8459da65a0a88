"""Checks for users: gradients against central differences, and problems with known answers.

``diffopt.check.strategies`` needs Hypothesis and is imported when it is first used.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from diffopt.check import known
from diffopt.check.gradients import GradientReport, Row, gradients

if TYPE_CHECKING:
    from diffopt.check import strategies

__all__ = ["GradientReport", "Row", "gradients", "known", "strategies"]


def __getattr__(name: str) -> ModuleType:
    if name == "strategies":
        return importlib.import_module("diffopt.check.strategies")
    raise AttributeError(f"module 'diffopt.check' has no attribute {name!r}")
