"""The contract of a backend: declare what it can take, return a raw point."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, NoReturn, TypeVar, cast

import torch
from torch import Tensor

from diffopt import kkt, waiting
from diffopt.cones import kinds
from diffopt.errors import BackendError, BackendUnsupported
from diffopt.living import Living
from diffopt.problems.forms import Form, QPForm
from diffopt.shapes import described
from diffopt.solution import INDEFINITE, Certificate, Residuals, Status, graded, succeeded
from diffopt.solvers.settings import Settings
from diffopt.warm_start import Start

AnyForm = TypeVar("AnyForm", bound=Form)


@dataclass(frozen=True)
class Capabilities:
    """What a backend can take, as data; `Backend.supports` is written once over it.

    Attributes:
        forms: classes of standard forms.
        cones: class names of the cones of ``Gx + s = h``.
        devices, dtypes: where the data may live. A backend that converts does so exactly:
            float32 data is solved in float64 and rounded once, at the end.
        batched: solves a batch at once rather than one instance at a time.
        accuracy: relative residual that it ordinarily reaches in float64.
        asynchronous: can solve without waiting for the device (`Settings.sync` = False).
        priority: ``backend="auto"`` takes the supporting backend with the highest.
        warm_start: makes use of an earlier solution: ``_solve(form, settings, start)``, where ``start`` is a
            `diffopt.warm_start.Start` that fits the form, or ``None``. Other backends never see one, and solve as ever.
    """

    forms: tuple[type[Form], ...] = (QPForm,)
    cones: frozenset[str] = frozenset({"NonnegativeCone"})
    devices: frozenset[str] = frozenset({"cpu"})
    dtypes: frozenset[torch.dtype] = frozenset({torch.float32, torch.float64})
    batched: bool = False
    accuracy: float = 1e-9
    asynchronous: bool = False
    priority: int = 0
    warm_start: bool = False


@dataclass
class RawPoint:
    """What a backend found: tensors of the form's dtype and device, without a graph.

    Attributes:
        x ``(*batch, n)``; lam ``(*batch, m)``, lam_lower and lam_upper ``(*batch, n)``, all >= 0;
        nu ``(*batch, p)``: with the signs of `diffopt.Solution`.
        status: ``(*batch,)`` int8: the solver's own verdict; `Backend.solve` checks it.
        iterations: ``(*batch,)`` int64.
        certificate: Farkas directions, where some instance has one.
        executor: which variant ran, for `diffopt.Solution.executor`.
        s: ``(*batch, m)``; h - Gx by default.
        residuals: recomputed from the original data by the backend itself (a fast executor does);
            by default `Backend.solve` computes them.
        system: the factored KKT system of the final active set, if the backend has it at hand;
            ``implicit`` builds its own otherwise.
    """

    x: Tensor
    nu: Tensor
    lam: Tensor
    lam_lower: Tensor
    lam_upper: Tensor
    status: Tensor
    iterations: Tensor
    certificate: Certificate | None = None
    executor: str = "default"
    s: Tensor | None = None
    residuals: Residuals | None = None
    system: Any = None


class Backend(Living, ABC):
    """A solver behind the contract of `RawPoint`. Subclasses write `_solve` and declare ``can``.

    Laws (tested for every registered backend over every problem class): an instance reported
    SOLVED has relative residuals <= the tolerance, ALMOST_SOLVED <= 1e-6; signs are those of
    `diffopt.Solution`; an instance's result does not depend on its neighbours; nothing raises
    because of the *values* of the data.
    """

    name: ClassVar[str] = ""
    requires: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""
    can: ClassVar[Capabilities] = Capabilities()

    @classmethod
    def missing(cls) -> tuple[str, ...]:
        """Return the packages that it needs and that are not installed, without importing any."""
        return tuple(package for package in cls.requires if not _installed(package))

    def supports(self, form: Form) -> str | None:
        """Return ``None`` if this backend can take the form, else the reason why not."""
        if missing := self.missing():
            return f"needs {', '.join(missing)}, which is not installed"
        if not isinstance(form, self.can.forms):
            return f"takes {', '.join(f.__name__ for f in self.can.forms)}, not {type(form).__name__}"
        if extra := kinds(form.cone) - self.can.cones:
            return f"does not take {', '.join(sorted(extra))}"
        if form.device.type not in self.can.devices:
            return f"runs on {', '.join(sorted(self.can.devices))}, the data is on {form.device.type}"
        if form.dtype not in self.can.dtypes:
            return f"does not take {form.dtype}"
        return None

    @torch.no_grad()
    def solve(self, form: Form, settings: Settings, keep: bool = False, start: Start | None = None) -> kkt.Solved:
        """Solve a batch without a graph, recompute the residuals from the original data, and correct the status.

        Args:
            form: the problem.
            settings: see `Settings`.
            keep: whether a pullback will be of use.
            start: an earlier solution that fits the form; used by backends that can (`Capabilities`).

        Raises:
            BackendError: what `_solve` returned is no `RawPoint` of this form.
        """
        if not settings.sync and not self.can.asynchronous:
            raise BackendUnsupported(
                f"Backend {self.name!r} computes on the host, and so waits for the device. Pass Settings(sync=True), "
                f"or take the backend 'pdipm' with a quadratic program."
            )
        form = form.detach()
        solve: Callable[..., RawPoint] = self._solve
        with waiting.allow(settings.sync):
            raw = solve(form, settings, start) if self.can.warm_start else solve(form, settings)
        _check_raw(self.name or type(self).__name__, raw, form, settings)
        s = -form.inequalities(raw.x) if raw.s is None else raw.s
        s = s + form.cone.violation(s)  # in the cone; what was outside counts as primal residual
        point = kkt.Point(raw.x, s, raw.nu, raw.lam, raw.lam_lower, raw.lam_upper)
        residuals = _residuals(form, point) if raw.residuals is None else raw.residuals
        status = _checked(raw.status, residuals.worst(), settings.tolerance_for(form.dtype))
        failed = (status == Status.PRIMAL_INFEASIBLE) | (status == Status.DUAL_INFEASIBLE)
        failed = failed | (status == Status.NONFINITE_INPUT)
        # An infeasible or non-finite instance has no solution: NaN, so that no loss can use it unawares.
        point = kkt.Point(*(torch.where(failed.unsqueeze(-1), torch.nan, v) for v in point))
        stacked = torch.where(failed, torch.nan, torch.stack(residuals)).to(form.dtype)
        return kkt.Solved(
            point, status, stacked, raw.certificate, self.name, raw.executor, raw.iterations, system=raw.system,
            sync=settings.sync,
        )  # fmt: skip

    @abstractmethod
    def _solve(self, form: Form, settings: Settings) -> RawPoint:
        """Find a point of every instance. Must not raise because of values: use statuses."""


def _check_raw(backend: str, raw: Any, form: Form, settings: Settings) -> None:
    """Refuse what is no point of the form: broadcasting would make something of most of it."""

    def refuse(what: str, expected: str, got: str) -> NoReturn:
        raise BackendError(f"Backend {backend!r} returned a wrong {what}. Expected {expected}, got {got}.")

    if not isinstance(raw, RawPoint):
        raise BackendError(f"Backend {backend!r} returned {type(raw).__name__}. Expected a diffopt.backends.RawPoint.")
    sizes = {"x": form.n, "nu": form.p, "lam": form.m, "lam_lower": form.n, "lam_upper": form.n}
    vectors = {name: (getattr(raw, name), size) for name, size in sizes.items()}
    if raw.s is not None:
        vectors["s"] = (raw.s, form.m)
    for name, (value, size) in vectors.items():
        wanted = (*form.batch_shape, size)
        if not isinstance(value, Tensor) or value.shape != wanted or value.dtype != form.dtype:
            refuse(f"`{name}`", f"shape {wanted} of {form.dtype}", described(value))
    for name in ("status", "iterations"):
        value, wanted = getattr(raw, name), tuple(form.batch_shape)
        fits = isinstance(value, Tensor) and value.shape == wanted
        if not fits or value.is_floating_point():
            refuse(f"`{name}`", f"whole numbers of shape {wanted}, one for each instance", described(value))
    if settings.sync:
        unknown = raw.status[(raw.status < 0) | (raw.status >= len(Status))]
        if unknown.numel():
            refuse("`status`", "values of diffopt.Status", str(int(unknown[0])))


def _residuals(form: Form, point: kkt.Point) -> Residuals:
    # In float64: a float32 sum whose terms cancel can hide a violation that is there.
    if isinstance(form, QPForm):
        form, point = form.widened(), kkt.Point(*(v.double() for v in point))
    return kkt.residuals(form, point)


def _checked(status: Tensor, worst: Tensor, tolerance: float) -> Tensor:
    """Return statuses in which every claim of success is backed by recomputed residuals."""
    found = graded(worst, tolerance)
    # A solver that gave up may still stand on a good point: believe the residuals, both ways.
    stopped = (status == Status.MAX_ITERATIONS) | (status == Status.NUMERICAL_ERROR)
    return torch.where(succeeded(status) | (stopped & succeeded(found)), found, status).to(torch.int8)


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # a parent package is missing, or sys.modules blocks it
        return False


def in_float64(form: AnyForm) -> AnyForm:
    """Return the form over detached float64 CPU tensors (float32 converts exactly)."""
    twin = form.with_tensors({k: v.detach().to("cpu", torch.float64) for k, v in form.tensors().items()})
    twin.dtype, twin.device = torch.float64, torch.device("cpu")
    return cast(AnyForm, twin)


def instances(form: QPForm) -> list[dict[str, Tensor]]:
    """Return the data of each instance of a batch, for backends that solve one at a time.

    Each is a dict of float64 CPU tensors: dense ``Q (n, n)``, ``q``, ``A``, ``b``, ``G``, ``h``,
    ``lower`` and ``upper`` (infinite where absent).
    """
    exact = in_float64(form)
    infinite = exact.q.new_full((form.n,), torch.inf)
    data = {
        "Q": per_instance(exact.Q.dense(), 2, form.batch_shape),
        "q": per_instance(exact.q, 1, form.batch_shape),
        "A": per_instance(exact.A, 2, form.batch_shape),
        "b": per_instance(exact.b, 1, form.batch_shape),
        "G": per_instance(exact.G, 2, form.batch_shape),
        "h": per_instance(exact.h, 1, form.batch_shape),
        "lower": per_instance(-infinite if exact.lower is None else exact.lower, 1, form.batch_shape),
        "upper": per_instance(infinite if exact.upper is None else exact.upper, 1, form.batch_shape),
    }
    return [{name: tensor[i] for name, tensor in data.items()} for i in range(form.batch_shape.numel())]


def per_instance(tensor: Tensor, core_dims: int, batch_shape: torch.Size) -> Tensor:
    """Return a tensor whose last ``core_dims`` dimensions belong to one instance as ``(count, *core)``."""
    core = tensor.shape[tensor.dim() - core_dims :]
    return tensor.expand((*batch_shape, *core)).reshape((batch_shape.numel(), *core))


@dataclass
class InstancePoint:
    """The answer of a one-at-a-time solver for one instance, as float64 CPU tensors or ``None``.

    Signs are those of `diffopt.Solution`; ``executor`` is which variant ran, "" for none.
    """

    status: Status
    x: Tensor | None = None
    nu: Tensor | None = None
    lam: Tensor | None = None
    lam_lower: Tensor | None = None
    lam_upper: Tensor | None = None
    iterations: int = 0
    executor: str = ""
    certificate: Certificate | None = None


def screen(data: dict[str, Tensor]) -> InstancePoint | None:
    """Return the answer to an instance that no solver need see, else ``None``.

    Args:
        data: one of `instances`.

    NONFINITE_INPUT for NaN anywhere, for infinite Q, q, A, b or G, and for an infinite h, lower or
    upper that is no absent constraint; PRIMAL_INFEASIBLE for lower > upper; NUMERICAL_ERROR for
    an indefinite Q.
    """
    if not all(torch.isfinite(data[name]).all() for name in ("Q", "q", "A", "b", "G")):
        return InstancePoint(Status.NONFINITE_INPUT)
    absent = -torch.inf
    if not all((v > absent).all() for v in (data["h"], -data["lower"], data["upper"])):  # false for NaN too
        return InstancePoint(Status.NONFINITE_INPUT)
    if crossing := screen_bounds(data["lower"], data["upper"], data["b"].shape[0], data["h"].shape[0]):
        return crossing
    eigenvalues = torch.linalg.eigvalsh(data["Q"])
    if eigenvalues.min() < -INDEFINITE * eigenvalues.abs().max():
        return InstancePoint(Status.NUMERICAL_ERROR)
    return None


def screen_bounds(lower: Tensor, upper: Tensor, p: int, m: int) -> InstancePoint | None:
    """Return PRIMAL_INFEASIBLE with its certificate where lower > upper, else ``None``.

    Args:
        lower, upper: bounds of one instance, ``(n,)``.
        p, m: numbers of equalities and inequalities, for the shapes of the certificate.
    """
    crossing = lower > upper
    if not crossing.any():
        return None
    worst = torch.where(crossing, lower - upper, -torch.inf).argmax()
    multiplier = torch.zeros_like(lower)
    multiplier[worst] = 1 / (lower[worst] - upper[worst])
    rows = Certificate(
        x=torch.full_like(lower, torch.nan),
        nu=lower.new_zeros(p),
        lam=lower.new_zeros(m),
        lam_lower=multiplier,
        lam_upper=multiplier,
    )
    return InstancePoint(Status.PRIMAL_INFEASIBLE, certificate=rows)


CERTIFIED = 1e-6
"""Residual of A'nu + G'lam - lam_lower + lam_upper, relative to the sum of magnitudes, up to which a
Farkas direction of a foreign solver is passed on; and of a ray, see `ray`."""


def farkas(
    data: dict[str, Tensor], nu: Tensor, lam: Tensor, lam_lower: Tensor, lam_upper: Tensor
) -> Certificate | None:
    """Return a solver's proof of primal infeasibility, normalised as `Certificate` says, if it holds.

    Args:
        data: one of `instances`.
        nu, lam, lam_lower, lam_upper: a candidate direction, with the signs of `diffopt.Solution`.
    """
    lam, lam_lower, lam_upper = (v.clamp_min(0) for v in (lam, lam_lower, lam_upper))

    def total(side: Tensor, multiplier: Tensor) -> Tensor:
        return (torch.where(multiplier == 0, 0, side) * multiplier).sum()  # an absent side is infinite

    value = data["b"] @ nu + total(data["h"], lam) - total(data["lower"], lam_lower) + total(data["upper"], lam_upper)
    A, G = data["A"], data["G"]
    residual = A.mT @ nu + G.mT @ lam - lam_lower + lam_upper
    sizes = A.abs().mT @ nu.abs() + G.abs().mT @ lam + lam_lower + lam_upper
    if not (value < 0 and residual.abs().max() <= CERTIFIED * sizes.max()):
        return None
    x = torch.full_like(lam_lower, torch.nan)
    return Certificate(x, *(v / -value for v in (nu, lam, lam_lower, lam_upper)))


KERNEL = 1e-12
"""Eigenvalues of Q below this times the largest are zero: rounding leaves some 1e-16, and a direction of
curvature is no ray, however small the curvature."""


class Recession(NamedTuple):
    """The linear program whose solution is a direction in which the objective falls for ever, if there is one.

    minimise cost'y subject to Ay = 0, Gy <= 0, -1 <= y <= 1; the direction is d = V y with V a basis of the kernel of
    Q. Rows have unit length before they meet V; finite bounds are rows of G.
    """

    V: Tensor
    cost: Tensor
    A: Tensor
    G: Tensor


def recession(data: dict[str, Tensor]) -> Recession | None:
    """Return the program of one of `instances`; ``None`` where the objective falls in no direction for ever."""
    q, eye = data["q"], torch.eye(len(data["q"]), dtype=torch.float64)
    eigenvalues, vectors = torch.linalg.eigh(data["Q"])
    V, scale = vectors[:, eigenvalues <= KERNEL * eigenvalues.abs().max()], q.abs().max()
    if V.shape[1] == 0 or scale == 0:
        return None

    def unit(rows: Tensor) -> Tensor:
        rows = rows[(rows != 0).any(-1)]
        return rows / rows.norm(dim=-1, keepdim=True)

    present, below, above = (torch.isfinite(data[name]) for name in ("h", "lower", "upper"))
    G = torch.cat([unit(data["G"][present]), -eye[below], eye[above]])
    return Recession(V, V.mT @ q / scale, unit(data["A"]) @ V, G @ V)


def ray(data: dict[str, Tensor], x: Tensor, accuracy: float = CERTIFIED) -> Certificate | None:
    """Return a proof that the objective is unbounded below, normalised as `Certificate` says, if it holds.

    Args:
        data: one of `instances`.
        x: a candidate direction, ``(n,)``.
        accuracy: by how much it may miss Qx, Ax, Gx and the bounds, relative to rows and x.
    """
    fall = -(data["q"] @ x)
    errors = {"Q": (data["Q"] @ x).abs(), "A": (data["A"] @ x).abs(), "G": (data["G"] @ x).clamp_min(0)}
    errors["G"] = torch.where(torch.isfinite(data["h"]), errors["G"], 0)  # an absent row
    relative = [error / (data[name].norm(dim=-1) + (data[name] == 0).all(-1)) for name, error in errors.items()]
    relative.append(torch.where(torch.isfinite(data["lower"]), -x, 0))
    relative.append(torch.where(torch.isfinite(data["upper"]), x, 0))
    worst, size = torch.cat(relative).max(), x.abs().max()
    # (A fall that the violation could have bought proves nothing.)
    if not (worst <= accuracy * size and fall > accuracy * size * data["q"].abs().max()):
        return None
    missing = (torch.full_like(data[side], torch.nan) for side in ("b", "h", "q", "q"))
    return Certificate(x / fall, *missing)


def stack(form: Form, points: list[InstancePoint], executor: str) -> RawPoint:
    """Stack instance answers into a `RawPoint` with the form's batch shape, dtype and device."""

    def joined(name: str, rows: list[Any], size: int) -> Tensor:
        missing = torch.full((size,), torch.nan, dtype=torch.float64)
        values = [missing if row is None else getattr(row, name) for row in rows]
        values = [missing if value is None else value for value in values]
        for i, value in enumerate(values):
            if value.shape != missing.shape:
                raise BackendError(
                    f"In what a backend returned for instance {i}, `{name}` is wrong. Expected ({size},), got "
                    f"{tuple(value.shape)}."
                )
        stacked = torch.stack(values) if values else missing.new_zeros(0, size)
        return stacked.reshape(*form.batch_shape, size).to(form.device, form.dtype)

    def flags(values: list[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).reshape(form.batch_shape).to(form.device)

    sizes = {"x": form.n, "nu": form.p, "lam": form.m, "lam_lower": form.n, "lam_upper": form.n}
    claims = [point.certificate for point in points]
    certificate = None
    if any(claim is not None for claim in claims):
        certificate = Certificate(**{name: joined(name, claims, size) for name, size in sizes.items()})
    return RawPoint(
        *(joined(name, points, size) for name, size in sizes.items()),
        status=flags([int(point.status) for point in points], torch.int8),
        iterations=flags([point.iterations for point in points], torch.int64),
        certificate=certificate,
        executor="+".join(sorted({point.executor for point in points if point.executor})) or executor,
    )


def solve_each(
    form: Form, settings: Settings, data: list[Any], solve_one: Callable[[Any], InstancePoint], executor: str
) -> RawPoint:
    """Solve one instance after the other in float64 on the CPU, polish, and round once to the form's dtype.

    Args:
        form: the batch.
        settings: `Settings.polish` decides about the Newton polish on the KKT conditions.
        data: what ``solve_one`` gets for each instance of the flattened batch.
        solve_one: must not raise because of values.
        executor: reported where no instance point names one.
    """
    exact = in_float64(form)
    raw = stack(exact, [solve_one(instance) for instance in data], executor)
    s = -exact.inequalities(raw.x)
    point = kkt.Point(raw.x, s, raw.nu, raw.lam, raw.lam_lower, raw.lam_upper)
    if settings.polish:
        point = kkt.polish(exact, point, settings.weak_tolerance_for(torch.float64))

    def rounded(tensor: Tensor) -> Tensor:
        return tensor.to(form.device, form.dtype)

    certificate = raw.certificate
    return RawPoint(
        *(rounded(v) for v in (point.x, point.nu, point.lam, point.lam_lower, point.lam_upper)),
        status=raw.status.to(form.device),
        iterations=raw.iterations.to(form.device),
        certificate=None if certificate is None else Certificate(*map(rounded, certificate)),
        executor=raw.executor,
        s=rounded(point.s),
    )
