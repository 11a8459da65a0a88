"""The answer to a batch in three tensors, which are taken apart when somebody asks.

For one small problem every new tensor costs a tenth of its solve, and most callers use x alone.
"""

from __future__ import annotations

import torch
from torch import Tensor


def model(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return one number under a shape: ``torch.empty_like`` of it takes half the time of ``torch.empty``."""
    with torch.inference_mode(False):
        one = torch.empty((), dtype=dtype, device=device)
        return one.new_empty(shape) if 0 in shape else one.expand(shape)


class Arrangement:
    """Where everything lies in the tensors of a `Packed` answer; depends on shapes alone.

    Args:
        batch: batch dimensions.
        n, p, m: variables, equalities, inequalities.
    """

    __slots__ = ("batch", "begins", "count", "models", "report_size", "rest_size", "shapes", "x_shape")

    def __init__(self, batch: torch.Size, n: int, p: int, m: int) -> None:
        self.batch, self.count = batch, batch.numel()
        self.x_shape = (*batch, n)
        sizes = (m, p, m, n, n)  # of s, nu, lam, lam_lower, lam_upper
        self.shapes = tuple((*batch, size) for size in sizes)
        begins = [0]
        for size in sizes:
            begins.append(begins[-1] + self.count * size)
        *self.begins, self.rest_size = begins
        self.report_size = 6 * self.count + (self.count + 7) // 8
        self.models: dict[tuple[torch.dtype, torch.device], tuple[Tensor, ...]] = {}

    def _models(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        made = (
            model(self.x_shape, dtype, device),
            model((self.rest_size,), dtype, device),
            model((self.report_size,), torch.float64, device),
            model((self.report_size + self.rest_size,), torch.float64, device),
        )
        self.models[dtype, device] = made
        return made

    def piece(self, rest: Tensor, which: int) -> Tensor:
        """Return s (0), nu (1), lam (2), lam_lower (3) or lam_upper (4), as a view of `Packed.rest` or its like."""
        shape = self.shapes[which]
        return rest.narrow(0, self.begins[which], self.count * shape[-1]).view(shape)

    def residuals(self, report: Tensor) -> Tensor:
        """Return the residuals ``(3, *batch)``, float64, as a view of `Packed.report`."""
        return report[: 3 * self.count].view(3, *self.batch)

    def counts(self, report: Tensor) -> Tensor:
        """Return the counts ``(3, *batch)``, int64, likewise."""
        return report[3 * self.count : 6 * self.count].view(torch.int64).view(3, *self.batch)

    def status(self, report: Tensor) -> Tensor:
        """Return the statuses ``(*batch,)``, int8, likewise."""
        return report[6 * self.count :].view(torch.int8)[: self.count].view(self.batch)


class Packed:
    """An answer to a batch, in the data's dtype, without a graph.

    Attributes:
        x: ``(*batch, n)``.
        rest: s, nu, lam, lam_lower, lam_upper, one behind the other.
        report: float64: residuals; as int64 counts; as int8 statuses. See `Arrangement`.
    """

    __slots__ = ("_rest", "arrangement", "report", "x")

    def __init__(self, arrangement: Arrangement, x: Tensor, rest: Tensor | None, report: Tensor) -> None:
        # (Without a `rest` it lies behind the report.)
        self.arrangement, self.x, self._rest, self.report = arrangement, x, rest, report

    @classmethod
    def empty(cls, arrangement: Arrangement, like: Tensor) -> Packed:
        """Return tensors to be filled, on the device and in the dtype of ``like``."""
        dtype, device = like.dtype, like.device
        x, rest, report, _ = arrangement.models.get((dtype, device)) or arrangement._models(dtype, device)
        return cls(arrangement, torch.empty_like(x), torch.empty_like(rest), torch.empty_like(report))

    @classmethod
    def sparing(cls, arrangement: Arrangement, like: Tensor) -> Packed:
        """As `empty`, with one tensor less: where nothing is attached to ``rest``, few callers look at it."""
        dtype, device = like.dtype, like.device
        x, _, _, both = arrangement.models.get((dtype, device)) or arrangement._models(dtype, device)
        return cls(arrangement, torch.empty_like(x), None, torch.empty_like(both))

    @property
    def rest(self) -> Tensor:
        """See the class."""
        if self._rest is not None:
            return self._rest
        return self.report[self.arrangement.report_size :].view(self.x.dtype)[: self.arrangement.rest_size]

    def places(self) -> tuple[int, ...]:
        """Return the addresses of x, s, nu, lam, lam_lower, lam_upper, residuals, counts and statuses."""
        count, width, report = self.arrangement.count, self.x.element_size(), self.report.data_ptr()
        at = report + 8 * self.arrangement.report_size if self._rest is None else self._rest.data_ptr()
        _, nu, lam, lower, upper = self.arrangement.begins
        return (
            self.x.data_ptr(), at, at + width * nu, at + width * lam, at + width * lower, at + width * upper,
            report, report + 24 * count, report + 48 * count,
        )  # fmt: skip

    def vectors(self) -> tuple[Tensor, ...]:
        """Return x, s, nu, lam, lam_lower, lam_upper."""
        return (self.x, *(self.arrangement.piece(self.rest, which) for which in range(5)))

    @property
    def s(self) -> Tensor:
        """``(*batch, m)``."""
        return self.arrangement.piece(self.rest, 0)

    @property
    def nu(self) -> Tensor:
        """``(*batch, p)``."""
        return self.arrangement.piece(self.rest, 1)

    @property
    def lam(self) -> Tensor:
        """``(*batch, m)``."""
        return self.arrangement.piece(self.rest, 2)

    @property
    def lam_lower(self) -> Tensor:
        """``(*batch, n)``."""
        return self.arrangement.piece(self.rest, 3)

    @property
    def lam_upper(self) -> Tensor:
        """``(*batch, n)``."""
        return self.arrangement.piece(self.rest, 4)

    @property
    def residuals(self) -> Tensor:
        """``(3, *batch)`` float64."""
        return self.arrangement.residuals(self.report)

    @property
    def counts(self) -> Tensor:
        """``(3, *batch)`` int64."""
        return self.arrangement.counts(self.report)

    @property
    def status(self) -> Tensor:
        """``(*batch,)`` int8."""
        return self.arrangement.status(self.report)
