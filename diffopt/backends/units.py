"""Programs whose solutions are large, handed to foreign solvers in a unit of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from diffopt.backends.base import InstancePoint
from diffopt.linalg.scaling import power_of_two
from diffopt.solution import Certificate

LARGE = 1e6
"""Size of a solution, beside its data, from which it is the unit."""


def in_own_unit(data: dict[str, Tensor], solve_one: Callable[[dict[str, Tensor]], InstancePoint]) -> InstancePoint:
    """Return the answer of a solver that gets an instance with a solution of ordinary size.

    Solvers know of sizes near 1: their tolerances are partly absolute, and beyond some 1e9 they take a side for a
    contradiction. x and s grow with b and the sides, multipliers with q; with curvature, each with all of these.

    Args:
        data: one of `instances`.
        solve_one: must not raise because of values.
    """
    size = _size(data)
    force = size if data["Q"].any() else _unit(data["q"])
    if size == force == 1:
        return solve_one(data)
    units = {"q": force, "b": size, "h": size, "lower": size, "upper": size}
    point = solve_one({name: value / units.get(name, 1.0) for name, value in data.items()})

    def grown(name: str, unit: float) -> Tensor | None:
        value = getattr(point, name)
        return None if value is None else unit * value

    proof = point.certificate
    if proof is not None:  # (normalised to what is size, or force, times as much in original units)
        proof = Certificate(proof.x / force, *(v / size for v in proof[1:]))
    x, (nu, lam, low, high) = grown("x", size), (grown(v, force) for v in ("nu", "lam", "lam_lower", "lam_upper"))
    return dataclasses.replace(point, x=x, nu=nu, lam=lam, lam_lower=low, lam_upper=high, certificate=proof)


def _size(data: dict[str, Tensor]) -> float:
    """Return the power of two that the solution is at least about as large as; 1 where it need not be `LARGE`."""
    Q, q = data["Q"], data["q"]
    lengths = (data[name].abs().amax(-1) for name in ("A", "G"))
    eq, rows = (
        torch.where(length > 0, data[side].abs() / length, 0.0)  # (rows of zeros say nothing about x)
        for side, length in zip(("b", "h"), lengths, strict=True)
    )
    # As `ScaledQP` does: a side that x = 0 meets need not be near, but a linear program ends at sides.
    signed = torch.cat([rows * data["h"].sign(), -data["lower"], data["upper"]])
    if Q.any():
        free = q / Q.abs().max()
    else:
        ahead = signed[(signed > 0) & signed.isfinite()]
        free = ahead.amin(0, keepdim=True) if len(ahead) else ahead
    return _unit(torch.cat([eq, signed.clamp_max(0), free]))


def _unit(values: Tensor) -> float:
    sizes = torch.nan_to_num(values.abs(), nan=0.0, posinf=0.0)
    largest = sizes.amax() if len(sizes) else values.new_zeros(())
    return float(power_of_two(largest)) if largest > LARGE else 1.0
