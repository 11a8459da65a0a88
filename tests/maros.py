"""Convex quadratic programs of the Maros-Meszaros set, with reference solutions; see tests/data/README.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

FILE = Path(__file__).parent / "data" / "maros_meszaros_open.npz"


class MarosProblem(NamedTuple):
    """One problem and its reference.

    Attributes:
        data: the arguments of `diffopt.solve_qp`, float64; what the problem does not have is ``None``.
        x: the reference solution, ``(n,)``; objective: 1/2 x'Qx + q'x there, without a constant.
        kkt: the worst relative residual of the reference.
        regular: at the reference the active rows seem independent, each with a multiplier.
    """

    name: str
    data: dict[str, Tensor | None]
    x: Tensor
    objective: float
    kkt: float
    regular: bool


def names() -> list[str]:
    """Return the names of all problems."""
    with np.load(FILE, allow_pickle=False) as file:
        return [str(name) for name in file["names"]]


def load(name: str) -> MarosProblem:
    """Return a problem in box form: general rows as G, bounds as lower and upper."""
    with np.load(FILE, allow_pickle=False) as file:
        read = {key.removeprefix(f"{name}/"): file[key] for key in file.files if key.startswith(f"{name}/")}
    n = read["q"].size

    def matrix(key: str, rows: int) -> Tensor:
        dense = np.zeros((rows, n))
        dense[read[f"{key}_row"], read[f"{key}_col"]] = read[f"{key}_val"]
        return torch.from_numpy(dense)

    def vector(values: Any) -> Tensor:
        return torch.from_numpy(np.array(values, dtype=np.float64))

    p, m, general = read["b"].size, read["h"].size, int(read["n_general"])
    bounded = {key: bool(np.isfinite(read[key]).any()) for key in ("lb", "ub")}
    data = {
        "Q": matrix("Q", n),
        "q": vector(read["q"]),
        "A": matrix("A", p) if p else None,
        "b": vector(read["b"]) if p else None,
        "G": matrix("G", m)[:general] if general else None,
        "h": vector(read["h"][:general]) if general else None,
        "lower": vector(read["lb"]) if bounded["lb"] else None,
        "upper": vector(read["ub"]) if bounded["ub"] else None,
    }
    regular = bool(read["licq"]) and bool(read["strict"])
    return MarosProblem(name, data, vector(read["z"]), float(read["obj"]), float(read["kkt_rel"]), regular)
