"""What torch is doing around a call."""

from __future__ import annotations

from collections.abc import Callable

import torch

transforming: Callable[[], bool] = torch._C._are_functorch_transforms_active  # pyright: ignore[reportAttributeAccessIssue]
"""Return whether any transform of ``torch.func`` is at work."""
