"""Gradients against central differences, through any backend."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt import infeasible, kkt
from diffopt.backends import Backend
from diffopt.errors import DtypeError, GradientCheckFailed, ParameterError, SettingsError
from diffopt.infeasible import Elastic
from diffopt.layer import Layer, solve
from diffopt.linalg.matrices import SymmetricMatrix
from diffopt.problems import DifferentiableProblem, Form, QPStructure
from diffopt.problems.base import require_problem
from diffopt.problems.structure import Declared
from diffopt.shapes import max_abs
from diffopt.solution import Solution
from diffopt.solvers.settings import Settings

OUTPUTS = ("x", "s", "lam", "nu", "lam_lower", "lam_upper", "value")

# Why an instance was not compared, a later reason prevailing over an earlier one; 0 is compared.
_REASONS = ("", "active set changes within the step", "weakly active row", "dependent active rows", "not solved")
MOVED, WEAK, DEPENDENT, FAILED = 1, 2, 3, 4

BEND, ROUNDING = 10, 100
"""Differences are taken to be off by so many times what their ends are off symmetry, and so many times the residual of
the solve (relative to the output). Two samples of noise may agree by chance, and rows may be ill-conditioned."""

_UNIQUE = ("x", "s", "value")
"""Outputs that are unique, and differentiable along changes that leave ``_ROWS`` alone, at a closest problem."""
_ROWS = ("A", "G")

SHIFTED = 1e-8
"""From which size, relative to x and s, the shift of a side (`Solution.shifts`) is more than noise."""


@dataclass(frozen=True)
class Row:
    """What the check found for one parameter and one output.

    Attributes:
        parameter, output: names; the two parts of a diagonal plus low rank Q are ``Q_diagonal``, ``Q_factor``.
        worst_error: largest |analytic - numeric| over directions and instances, relative to the size of the
            derivative, or to ``noise / tolerance`` where that is larger; 0 if nothing was compared.
        worst_instance: batch index of the worst one; ``None`` for a parameter that the batch shares
            (its derivative is that of the sum over the batch) or if nothing was compared.
        compared: instances compared along at least one direction.
        skipped: instances compared along none, counted by reason: there the solution has, or may have, a
            kink, or does not exist.
        derivative: size of the largest derivative met, for relative changes of the parameter.
        noise: what differences cannot resolve, at most. A derivative below it is confirmed as small, no more; the
            table shows it as "< noise".
    """

    parameter: str
    output: str
    worst_error: float
    worst_instance: tuple[int, ...] | None
    compared: int
    skipped: dict[str, int]
    derivative: float
    noise: float


@dataclass(frozen=True)
class GradientReport:
    """The result of `gradients`; print it for a table.

    Attributes:
        rows: one `Row` for each parameter and output.
        tolerance, step: as used (the step is relative to the size of each parameter).
        backend, executor: who solved.
        ok: True if no error exceeds the tolerance and every row compared something (an empty batch has
            nothing to compare and is ok).
    """

    rows: tuple[Row, ...]
    tolerance: float
    step: float
    backend: str
    executor: str

    @property
    def ok(self) -> bool:
        """See the class."""
        return all(self._verdict(row) == "ok" for row in self.rows)

    def raise_if_failed(self) -> None:
        """Raise `GradientCheckFailed`, with the table, unless `ok`."""
        if self.ok:
            return
        wrong = [f"{r.output} by {r.parameter}" for r in self.rows if self._verdict(r) == "wrong"]
        empty = [f"{r.output} by {r.parameter}" for r in self.rows if self._verdict(r) == "nothing compared"]
        parts = [f"Derivatives that central differences do not confirm: {', '.join(wrong)}."] if wrong else []
        if empty:
            parts.append(
                f"Nothing could be compared for: {', '.join(empty)}. Expected some instance away from kinks; "
                f"take other values of the parameters, or a smaller `step`."
            )
            if any(_REASONS[DEPENDENT] in row.skipped for row in self.rows):
                parts.append(
                    "Where active rows depend on each other, multipliers are not unique and x has a kink in other "
                    "directions than those that keep the rows consistent: differences have nothing to say, and the "
                    "gradient is the minimum-norm one. Take data at which fewer rows hold with equality (in an l1 "
                    "term written with extra variables: at which every entry moves), or leave out redundant rows."
                )
        raise GradientCheckFailed(" ".join(parts) + f"\n{self}")

    def _verdict(self, row: Row) -> str:
        if row.compared == 0 and row.skipped:
            return "nothing compared"
        return "ok" if row.worst_error <= self.tolerance else "wrong"

    def __str__(self) -> str:
        heads = ("parameter", "output", "derivative", "worst error", "compared", "skipped", "")
        lines: list[tuple[str, ...]] = [heads]
        for row in self.rows:
            where = f" at {row.worst_instance}" if row.worst_instance else ""
            skipped = ", ".join(f"{count} ({reason})" for reason, count in row.skipped.items()) or "0"
            error = f"{row.worst_error:.1e}" if row.compared else "-"
            size = f"{row.derivative:.1e}" if row.derivative > row.noise else f"< {row.noise:.1e}"
            verdict = self._verdict(row)
            cells = (row.parameter, row.output, size if row.compared else "-", error, str(row.compared), skipped)
            lines.append((*cells, verdict + where * (verdict == "wrong")))
        widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
        table = "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
        return (
            f"Gradients against central differences ({self.backend}/{self.executor}, "
            f"step {self.step:.1e}, tolerance {self.tolerance:.1e}): {'ok' if self.ok else 'FAILED'}\n{table}"
        )


def gradients(
    layer_or_problem: Layer | DifferentiableProblem,
    params: Mapping[str, Any],
    *,
    backend: str | Backend | None = None,
    settings: Settings | None = None,
    outputs: Sequence[str] = ("x",),
    directions: int = 3,
    step: float | None = None,
    tolerance: float = 1e-5,
    seed: int = 0,
) -> GradientReport:
    r"""Compare derivatives of a solution with central differences of the solve.

    For each output o, random cotangents v (one for each instance) and, for each parameter theta, random
    directions d, reverse mode's <d sum(v'o)/d theta, d> is compared with

        v' (o(theta + t d) - o(theta - t d)) / (2 t),

    instance by instance where the parameter has batch dimensions, and for the whole batch where it is
    shared. Entries of d are normal numbers times the largest finite magnitude in theta, so t is relative;
    infinite entries (absent bounds) do not move. A Q moves symmetrically, and when it is so close to singular
    that it could leave the positive semidefinite cone, by congruence: (I + tS) Q (I + tS)'.

    Instances at or near a kink are left out and counted with the reason: those with weakly active or dependent
    active rows, and those whose active set is not the same at both ends and in the middle. So are those
    that are not solved.

    Args:
        layer_or_problem: a `diffopt.Layer`, checked with its ``on_infeasible`` (its learned parameters and learned
            weights of `Elastic` constraints are checked too), or a problem.
        params: what a call gives, by name, in float64: parameters, and weights of `Elastic` constraints.
        backend, settings: as for `diffopt.solve`; those of the layer by default, ``"auto"`` for a problem.
        outputs: some of x, s, lam, nu, lam_lower, lam_upper, value.
        directions: how many for each parameter. Each costs two solves.
        step: t above, dimensionless. Default: the cube root of the worst relative residual of the
            solution, between 6e-6 (the cube root of the float64 eps) and 1e-2. Truncation errs by about
            t^2 and the noise r of the solve by r/t; both are r^(2/3) at t = r^(1/3).
        tolerance: largest accepted |analytic - numeric|, relative to the size of the derivative: the 2-norm of
            v * (o(theta + t d) - o(theta - t d)) / (2 t), which does not vanish where its entries cancel. Differences
            smaller than their own noise are accepted too; it is estimated by the solver's residual, relative to o, and
            by how far the two ends lie from the middle, and taken to be at most the tolerance times max(1, size of o).
        seed: of cotangents and directions.

    Returns:
        A `GradientReport`: print it, read ``report.ok``, or call ``report.raise_if_failed()``.

    Raises:
        DtypeError: a parameter is not float64: differences would drown in rounding.
        ParameterError: neither a layer nor a problem; ``params`` is no mapping, no output or an unknown one, or nothing
            to differentiate.
        SettingsError: ``directions``, ``step`` or ``tolerance`` is out of range.
    """
    _check_arguments(params, outputs, directions, step, tolerance)
    layer = layer_or_problem if isinstance(layer_or_problem, Layer) else None
    problem = layer_or_problem.problem if isinstance(layer_or_problem, Layer) else layer_or_problem
    require_problem(problem)
    own = None if layer is None else _own(layer)
    policy = None if layer is None else layer.on_infeasible
    prices, given = infeasible.take_weights(policy, params, own)
    values = problem.collect(given, own) | prices
    backend = backend or ("auto" if layer is None else layer.backend)
    settings = layer.settings if settings is None and layer is not None else settings
    leaves = _leaves(problem, policy, values)
    if not leaves:
        raise ParameterError(
            f"No parameter of {type(problem).__name__} is a floating tensor, so there is nothing to differentiate."
        )
    start = {leaf.name: leaf.tensor for leaf in leaves}
    opened, soft = _opened(problem), _opened_policy(policy)

    def run(tensors: Mapping[str, Tensor]) -> tuple[Solution, Tensor]:
        names = (name for name in (*opened.given_names(), *prices) if name in values)
        call = {name: _rebuilt(problem, name, values[name], tensors) for name in names}
        solution = solve(opened, call, backend=backend, settings=settings, on_failure="return", on_infeasible=soft)
        _, given = infeasible.take_weights(soft, call)
        return solution, _active(opened.standard_form(opened.collect(given)), solution)

    tracked = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
    base, pattern = run(tracked)
    generator = torch.Generator().manual_seed(seed)
    cotangents = {name: _normal(_entries(getattr(base, name), name), generator) for name in outputs}
    kinks = _kinks(base)
    least = torch.finfo(torch.float64).eps
    rounding = ROUNDING * base.residuals.worst().nan_to_num().clamp_min(least).unsqueeze(-1)
    # Rows that are shifted to the closest problem depend on each other: only changes of A and G tell them apart.
    closest = (kinks == DEPENDENT) & _shifted(base) if policy == "closest" else kinks < 0
    step = _step(base.residuals.worst()[kinks == 0]) if step is None else step

    rows: list[Row] = []
    for leaf in leaves:
        records = {output: _Record(leaf, base, tolerance) for output in outputs}
        movers = [_mover(leaf, step, generator) for _ in range(directions)]
        points = [move(sign * step) for move in movers for sign in (1.0, -1.0)]
        with torch.no_grad():
            ends = _ends(
                leaf, points, outputs, lambda moved, leaf=leaf: run(start | {leaf.name: moved}), len(kinks.shape)
            )
        for k in range(directions):
            end, other = points[2 * k : 2 * k + 2]
            above, below = ends[2 * k : 2 * k + 2]
            # Rounding moved the two ends a little: differentiate along what they really differ by.
            direction = torch.where(leaf.tensor.isfinite(), (end - other) / (2 * step), 0.0)
            reach = float(direction.abs().max()) if direction.numel() else 0.0
            same = ((above.pattern == pattern) & (below.pattern == pattern)).all(-1)
            moved = torch.where(above.ok & below.ok, torch.where(same, 0, MOVED), FAILED)
            for output, record in records.items():
                known = isinstance(problem, QPStructure) and leaf.name not in _ROWS and output in _UNIQUE
                codes = torch.where((kinks == 0) | (closest & known), moved, kinks)
                kept = (codes == 0).unsqueeze(-1)
                # An instance whose incoming gradient is exactly zero contributes nothing, whatever its state.
                weights = torch.where(kept, cotangents[output], 0.0)
                seen = weights.squeeze(-1) if output == "value" else weights
                gradient = _pulled_back(getattr(base, output), seen, tracked[leaf.name])
                middle, high, low = (
                    torch.where(kept, weights * _entries(o, output), 0.0)
                    for o in (getattr(base, output).detach(), above.outputs[output], below.outputs[output])
                )
                # (Gradients have rounding errors too, where x, and all differences with it, are exactly zero.)
                known_to = weights * least * (1 + reach) + rounding * middle / step
                slope, bend = (high - low) / (2 * step), (high - 2 * middle + low) / (2 * step)
                record.add(codes, gradient * direction, slope, BEND * bend, known_to, middle)
        rows += [record.row(leaf.name, output) for output, record in records.items()]
    return GradientReport(tuple(rows), tolerance, step, base.backend, base.executor)


def _check_arguments(params: Any, outputs: Any, directions: int, step: float | None, tolerance: float) -> None:
    if not isinstance(params, Mapping):
        raise ParameterError(
            f"`params` is {type(params).__name__}. Expected the given parameters by name, for example {{'q': q}}."
        )
    if isinstance(outputs, str) or not outputs:
        raise ParameterError(f"`outputs` = {outputs!r}. Expected some of {', '.join(OUTPUTS)}, for example ('x',).")
    if unknown := [name for name in outputs if name not in OUTPUTS]:
        raise ParameterError(f"Unknown output {', '.join(map(repr, unknown))}. Expected some of {', '.join(OUTPUTS)}.")
    if directions < 1:
        raise SettingsError(f"`directions` = {directions!r} is out of range. Expected at least 1.")
    for name, value in (("step", step), ("tolerance", tolerance)):
        if value is not None and not 0 < value < 1:
            raise SettingsError(f"`{name}` = {value!r} is out of range. Expected a number between 0 and 1.")


@dataclass(frozen=True)
class _Leaf:
    """One floating tensor of the parameters.

    Attributes:
        core: how many trailing dimensions belong to one instance; ``None`` where only the user's own
            code knows: then it counts as shared, and sums over the batch are compared.
        kind: "symmetric" matrices stay positive semidefinite when they move, "positive" vectors (diagonals, weights)
            at least zero; or "plain".
    """

    name: str
    tensor: Tensor
    core: int | None
    kind: str

    def batch_shape(self) -> torch.Size:
        return torch.Size() if self.core is None else self.tensor.shape[: self.tensor.dim() - self.core]


class _End(NamedTuple):
    """A solution with one parameter moved: its outputs, which constraints are active, what is solved."""

    outputs: dict[str, Tensor]
    pattern: Tensor
    ok: Tensor


def _ends(
    leaf: _Leaf,
    points: list[Tensor],
    outputs: Sequence[str],
    run: Callable[[Tensor], tuple[Solution, Tensor]],
    batch_dims: int,
) -> list[_End]:
    """Solve with the parameter at each of the points, in one batch where its batch dimensions are known."""
    if leaf.core is None:
        solved = [run(point) for point in points]
        return [_End({o: getattr(s, o) for o in outputs}, pattern, s.ok) for s, pattern in solved]
    # A leading dimension for the points, then the batch, to which this parameter's own dimensions align.
    gap = [1] * (batch_dims - len(leaf.batch_shape()))
    moved = torch.stack(points) if points else leaf.tensor.new_zeros((0, *leaf.tensor.shape))
    solution, pattern = run(moved.reshape(len(points), *gap, *leaf.tensor.shape))
    values = {o: getattr(solution, o) for o in outputs}
    return [_End({o: v[i] for o, v in values.items()}, pattern[i], solution.ok[i]) for i in range(len(points))]


class _Record:
    """Collects the comparisons of one parameter and one output over directions."""

    def __init__(self, leaf: _Leaf, solution: Solution, tolerance: float) -> None:
        self.batch = leaf.batch_shape()
        self.per_instance = leaf.core is not None and self.batch == solution.status.shape
        self.codes = torch.full_like(solution.status, FAILED, dtype=torch.int64)
        self.tolerance = tolerance
        self.gaps: list[Tensor] = []
        self.sizes: list[Tensor] = []
        self.noise = solution.x.new_zeros(self.batch)

    def add(
        self, codes: Tensor, products: Tensor, slopes: Tensor, bends: Tensor, rounding: Tensor, middle: Tensor
    ) -> None:
        """Add one direction.

        Args:
            codes: of `_REASONS`.
            products: of the gradient and the direction, entry by entry.
            slopes, bends, rounding, middle: ``(*batch, k)``, for each entry of the output, times its cotangent: the
                numeric derivative, what it may be off for want of symmetry and for rounding, the output itself.
        """
        core_dims = tuple(range(len(self.batch), products.dim()))
        analytic = products.sum(core_dims) if core_dims else products
        self.gaps.append((analytic - self._sum(slopes)).abs().detach())
        self.sizes.append(self._norm(slopes))
        most = self.tolerance * self._norm(middle).clamp_min(1)
        self.noise = torch.maximum(self.noise, torch.minimum(self._norm(bends) + self._norm(rounding), most))
        self.codes = torch.minimum(self.codes, codes)

    def _sum(self, terms: Tensor) -> Tensor:
        """Sum over the entries of the output, and over instances that share the parameter."""
        return terms.sum(-1).sum_to_size(self.batch)

    def _norm(self, terms: Tensor) -> Tensor:
        return self._sum(terms.square()).sqrt()

    def row(self, parameter: str, output: str) -> Row:
        counts = Counter(self.codes.flatten().tolist())
        compared = counts.pop(0, 0)
        worst, where, size, noise = 0.0, None, 0.0, 0.0
        if compared and self.noise.numel() and self.gaps:
            gaps, sizes = torch.stack(self.gaps), torch.stack(self.sizes)
            # NaN is an error too, and the largest of all; instances that were left out gave 0 to both sides.
            errors = torch.where(gaps == 0, 0.0, gaps / torch.maximum(sizes, self.noise / self.tolerance))
            errors = errors.nan_to_num(nan=torch.inf, posinf=torch.inf).amax(0)
            worst, size, noise = float(errors.max()), float(sizes.max()), float(self.noise.max())
            if self.per_instance:
                where = tuple(int(i) for i in (errors == errors.max()).nonzero()[0])
        skipped = {_REASONS[code]: count for code, count in sorted(counts.items())}
        return Row(parameter, output, worst, where, compared, skipped, size, noise)


def _entries(values: Tensor, output: str) -> Tensor:
    """Return an output as ``(*batch, k)``; the value has one entry."""
    return values.unsqueeze(-1) if output == "value" else values


def _step(residuals: Tensor) -> float:
    """Return the step that suits the noise of a solve; see `gradients`."""
    noise = float(residuals.max()) if residuals.numel() else 0.0
    return min(max(noise, torch.finfo(torch.float64).eps) ** (1 / 3), 1e-2)


def _own(layer: Layer) -> dict[str, Any]:
    """Return the learned and fixed values of a layer by the names of its parameters and weights."""
    own: dict[str, Any] = {}
    for name, declared in (layer.problem.declared | infeasible.declared_weights(layer.on_infeasible)).items():
        pairs = zip(declared.part_names(name), declared.parts, strict=False)
        parts = [getattr(layer, part) if isinstance(value, Tensor) else value for part, value in pairs]
        if parts:
            own[name] = tuple(parts) if len(parts) > 1 else parts[0]
    return own


def _opened(problem: DifferentiableProblem) -> DifferentiableProblem:
    """Return a copy of the problem whose learned and fixed parameters are given at the call too."""
    opened = copy.copy(problem)
    opened.declared = _all_given(problem.declared)
    return opened


def _opened_policy(policy: infeasible.Policy) -> infeasible.Policy:
    """Return a copy of the policy whose learned and fixed weights are given at the call too."""
    if not isinstance(policy, Elastic):
        return policy
    opened = copy.copy(policy)
    opened.declared = _all_given(policy.declared)
    return opened


def _all_given(declared: Mapping[str, Declared]) -> dict[str, Declared]:
    return {
        name: one if one.kind == "absent" else replace(one, kind="given", parts=()) for name, one in declared.items()
    }


def _leaves(problem: DifferentiableProblem, policy: infeasible.Policy, values: Mapping[str, Any]) -> list[_Leaf]:
    """Return the floating tensors of the given and learned parameters and weights."""
    leaves = []
    weights = infeasible.declared_weights(policy)
    for name, value in values.items():
        if (problem.declared | weights).get(name, Declared("given")).kind == "fixed":
            continue
        for leaf_name, tensor, core, kind in _parts(problem, name, value):
            if name in weights:
                core, kind = 1 if tensor.dim() else None, "positive"
            if not tensor.is_floating_point():
                continue
            if tensor.dtype != torch.float64:
                raise DtypeError(
                    f"`{leaf_name}` has dtype {tensor.dtype}. Expected torch.float64: in a shorter one, differences "
                    f"drown in rounding. Convert the parameters (`{name}.double()`) and a layer (`layer.double()`)."
                )
            leaves.append(_Leaf(leaf_name, tensor.detach(), core, kind))
    return leaves


def _parts(problem: DifferentiableProblem, name: str, value: Any) -> list[tuple[str, Tensor, int | None, str]]:
    """Return (name, tensor, instance dimensions, kind) of each tensor that a value consists of."""
    form = problem.declared[name].form if name in problem.declared else "dense"
    if isinstance(value, SymmetricMatrix):
        tensors, cores = value.tensors(), value.core_dims()
        kinds = ["symmetric"] if cores == (2,) else ["positive", "plain"]
    elif isinstance(value, tuple | list):
        tensors, cores, kinds = tuple(value), (1, 2), ["positive", "plain"]
    elif isinstance(value, Tensor):
        tensors, cores, kinds = (value,), (_core_dims(problem, name, value, form),), ["plain"]
        if form in ("diagonal", "scaled_identity"):
            kinds = ["positive"]
        elif name == "Q" and value.dim() >= 2 and value.shape[-1] == value.shape[-2]:
            kinds = ["symmetric"]
    else:
        return []
    names = [name] if len(tensors) == 1 else [f"{name}_diagonal", f"{name}_factor"]
    return list(zip(names, tensors, cores, kinds, strict=False))


def _core_dims(problem: DifferentiableProblem, name: str, value: Tensor, form: str) -> int | None:
    if isinstance(problem, QPStructure):
        dims = {"diagonal": 1, "scaled_identity": 0}.get(form, 2 if name in ("Q", "A", "G") else 1)
        return dims if value.dim() >= dims else None  # a single number as b, h or a bound is shared
    declared = {param.name: len(param.shape) for param in problem.params}
    return declared.get(name)


def _rebuilt(problem: DifferentiableProblem, name: str, value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return a parameter's value with its tensors replaced by those of the same names."""
    parts = [tensors.get(part, tensor) for part, tensor, _, _ in _parts(problem, name, value)]
    if isinstance(value, SymmetricMatrix):
        return value.with_tensors(*parts)
    if isinstance(value, tuple | list):
        return tuple(parts)
    return parts[0] if parts else value


def _mover(leaf: _Leaf, step: float, generator: torch.Generator) -> Callable[[float], Tensor]:
    """Draw a direction; return the function that moves the tensor along it by t, |t| <= step."""
    tensor = leaf.tensor
    noise = _normal(tensor, generator)
    finite = tensor.isfinite()
    largest = float(torch.where(finite, tensor, 0.0).abs().max()) if tensor.numel() else 0.0
    direction = torch.where(finite, noise, 0.0) * (largest or 1.0)
    if tensor.numel() == 0:
        return lambda t: tensor
    if leaf.kind == "positive" and bool((tensor - step * direction.abs() < 0).any()):
        return lambda t: tensor * (1 + t * noise)
    if leaf.kind == "symmetric":
        direction = 0.5 * (direction + direction.mT)
        reach = step * torch.linalg.matrix_norm(direction, ord=2)
        smallest = torch.linalg.eigvalsh(0.5 * (tensor + tensor.mT))[..., 0]
        if bool((smallest < reach).any()):
            eye = torch.eye(tensor.shape[-1], dtype=tensor.dtype, device=tensor.device)
            return lambda t: (eye + t * noise) @ tensor @ (eye + t * noise).mT
    return lambda t: tensor + t * direction


def _kinks(solution: Solution) -> Tensor:
    """Return a code of `_REASONS` for each instance."""
    codes = torch.zeros(solution.status.shape, dtype=torch.int64, device=solution.status.device)
    codes = torch.where(solution.dependent > 0, DEPENDENT, codes)
    codes = torch.where(solution.weakly_active > 0, WEAK, codes)
    return torch.where(solution.ok, codes, FAILED)


def _shifted(solution: Solution) -> Tensor:
    """Return which instances had sides shifted."""
    assert solution.shifts is not None
    return torch.cat([v.detach() != 0 for v in solution.shifts], -1).any(-1)


def _active(form: Form, solution: Solution) -> Tensor:
    """Return which rows, lower and upper bounds are active, ``(*batch, m + 2 n)``.

    A constraint counts as active where its multiplier is larger than its slack, each relative to
    the largest of its kind in the instance: multipliers to forces, slacks to x and s. Where sides were shifted
    (``on_infeasible``), which ones and in which direction follows.
    """
    x, s, lam, nu, lam_lower, lam_upper = (
        getattr(solution, name).detach() for name in ("x", "s", "lam", "nu", "lam_lower", "lam_upper")
    )
    with torch.no_grad():
        lower = -torch.inf if form.lower is None else form.lower.detach()
        upper = torch.inf if form.upper is None else form.upper.detach()
        force = kkt.gradient(form, x).detach()
    slack = torch.cat([s, x - lower, upper - x], -1)
    dual = torch.cat([lam, lam_lower, lam_upper], -1)
    sizes = [torch.where(slack.isfinite(), slack, 0.0), x]
    length = max_abs(torch.cat(sizes, -1)).unsqueeze(-1)
    forces = max_abs(torch.cat([dual, nu, force], -1)).unsqueeze(-1)
    active = dual * torch.where(length > 0, length, 1.0) > slack * torch.where(forces > 0, forces, 1.0)
    if solution.shifts is None:
        return active
    eq, row, low, high = (v.detach() / torch.where(length > 0, length, 1.0) for v in solution.shifts)
    moved = torch.cat([row, low, high], -1) > SHIFTED
    # (What was moved holds with equality, whatever its multiplier: under "closest" that is not unique.)
    return torch.cat([active | moved, moved, eq > SHIFTED, eq < -SHIFTED], -1)


def _pulled_back(output: Tensor, cotangent: Tensor, tensor: Tensor) -> Tensor:
    """Return the gradient of <cotangent, output>; zero where the output does not depend on the tensor."""
    if not output.requires_grad:
        return torch.zeros_like(tensor)
    (gradient,) = torch.autograd.grad(
        output, tensor, cotangent, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return gradient


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    # Drawn on the CPU, so that the same seed means the same numbers on every device.
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)
