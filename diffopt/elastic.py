"""Soft constraints: a program whose constraints may be violated at a price, as another program in more variables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from diffopt import transforms
from diffopt.errors import ParameterError, SettingsError, ShapeError
from diffopt.linalg.matrices import Dense, Diagonal, DiagonalPlusLowRank, SymmetricMatrix
from diffopt.problems.forms import QPForm, require_tensor
from diffopt.problems.structure import Declared, declare
from diffopt.shapes import check_same_kind, instances, stacked, where_instance, zeros_of
from diffopt.solution import Certificate, Report, Shifts, Solution, Status, no_shifts

Solve = Callable[[QPForm], Solution]
"""Solves and attaches a form, and never raises for failed instances."""

WEIGHT = 1e3
"""Weight of a soft constraint where none is given."""


class Elastic:
    r"""Soft constraints: what cannot be met is violated, at a price. For ``on_infeasible=``.

    minimise 1/2 x'Qx + q'x + sum_i w_i penalty(violation_i) subject to the constraints that stay hard, where the
    violation is |Ax - b| of an equality and max(Gx - h, 0) of an inequality.

    Args:
        penalty: ``"l1"`` (default), penalty(v) = v: an exact penalty. Where the problem is feasible and each weight is
            above the multiplier of its constraint, the solution is that of the problem itself; a smaller weight
            violates the constraint although it could be met. ``"squared"``, penalty(v) = v^2 / 2: smooth, spreads
            violations, and violates every constraint that has a multiplier, by multiplier / weight.
        eq, row: weights of the equalities, ``(*batch, p)``, and of the rows of G, ``(*batch, m)``; a number is the same
            for all; in objective units per unit of b or h (per its square for ``"squared"``), positive. +inf is a
            hard constraint, ``None`` makes all of the group hard. Default 1000. Zero is no weight, for a violation that
            costs nothing has no size; a constraint that is not there has an infinite side.
        bound: weights of the bounds, ``(*batch, n)``, the same for lower and upper; ``None`` (default): hard.

    Each weight may be declared `diffopt.given`, `diffopt.learned` or `diffopt.fixed`: in a `Layer` it then is an
    argument of the call, a parameter or a buffer, by the name ``elastic_eq``, ``elastic_row`` or ``elastic_bound``.
    Other values are fixed.

    The optimal value includes the penalties, so its derivative in a weight is the violation (squared: half its square).

    A call raises `ParameterError` where an entry of a tensor is no weight. Inside ``torch.compile``, where values
    cannot be looked at, that instance ends as NONFINITE_INPUT.

    Raises:
        SettingsError: an unknown penalty, or a number that is no weight.

    References:
        Nocedal and Wright (2006), "Numerical Optimization", theorem 17.3 (the l1 penalty is exact).
    """

    def __init__(
        self,
        penalty: Literal["l1", "squared"] = "l1",
        *,
        eq: Any = WEIGHT,
        row: Any = WEIGHT,
        bound: Any = None,
    ) -> None:
        if penalty not in ("l1", "squared"):
            raise SettingsError(f"`penalty` = {penalty!r} is unknown. Expected 'l1' or 'squared'.")
        self.penalty = penalty
        self.declared: dict[str, Declared] = {}
        for name, value in (("elastic_eq", eq), ("elastic_row", row), ("elastic_bound", bound)):
            if isinstance(value, int | float) and not value > 0:
                raise SettingsError(
                    f"`{name}` = {value!r} is out of range. Expected a positive weight, or None for hard."
                )
            declared = declare(value)
            if declared.form != "dense":
                raise ParameterError(f"`{name}` is declared {declared.form!r}; only Q has forms other than 'dense'.")
            self.declared[name] = declared

    def __repr__(self) -> str:
        return f"Elastic({self.penalty!r}, {', '.join(f'{k[8:]}={v.kind}' for k, v in self.declared.items())})"


class _Soft(NamedTuple):
    """A group of soft constraints: ``weight`` and ``reach``, ``(*batch, k)``. A violation is reach times a variable;
    that of a hard constraint costs something and reaches nothing, so it is zero (and no matrix holds +inf)."""

    weight: Tensor
    reach: Tensor


def solve(form: QPForm, elastic: Elastic, weights: Mapping[str, Any], inner: Solve, exactly: bool) -> Solution:
    """Solve a batch with soft constraints.

    Args:
        form: the problem, attached to its parameters.
        weights: of the soft constraints, by the names of their declarations.
        inner: see `Solve`.
        exactly: derivatives are those of what is solved, and not of another problem near it.
    """
    sizes = {"elastic_eq": form.p, "elastic_row": form.m, "elastic_bound": form.n}
    soft = {name: _soft(name, weights[name], sizes[name], form) for name in weights}
    own = all(_fits(group.weight.shape[:-1], form.batch_shape) for group in soft.values())
    # (Transforms cannot look at values.)
    if elastic.penalty == "l1" and exactly and own and not (torch.compiler.is_compiling() or transforms.active()):
        return _where_needed(form, elastic, soft, inner)
    return _softened(form, elastic, soft, inner)


def _fits(batch: torch.Size, whole: torch.Size) -> bool:
    return torch.broadcast_shapes(batch, whole) == whole


CERTAIN = 1e-6
"""How far below its weight a multiplier must be, relative, for a constraint to be met for certain."""


def _where_needed(form: QPForm, elastic: Elastic, soft: Mapping[str, _Soft], inner: Solve) -> Solution:
    """Solve the problem itself, and with soft constraints only the instances whose solutions differ.

    The l1 penalty is exact: a solution whose multipliers are below the weights is that of the soft problem, with the
    same derivatives, for no constraint that is met at a lower price than its weight is violated.
    """
    first = inner(form)
    with torch.no_grad():
        met = first.status == int(Status.SOLVED)
        duals = {"eq": (first.nu.abs(),), "row": (first.lam,), "bound": (first.lam_lower, first.lam_upper)}
        for name, group in soft.items():
            weight = torch.where(group.reach > 0, (1 - CERTAIN) * group.weight, torch.inf)
            for dual in duals[name.removeprefix("elastic_")]:
                met = met & (dual < weight).all(-1)
    if bool(met.all()):
        # (A gradient of zero in the weights is a gradient.)
        tie = sum((zeros_of(group.weight).sum(-1, keepdim=True) for group in soft.values()), first.x.new_zeros(1))
        return replace(first, x=first.x + tie, shifts=no_shifts(first), _value=lambda: first.value + tie.squeeze(-1))
    # (By torch operations an instance's last bits go by the size of the batch, which no neighbour is to change.)
    if first.executor.startswith(("torch", "cuda")) or not bool(met.any()):
        return _merged(met, None, first, _softened(form, elastic, soft, inner))
    rows, batch = (~met).flatten().nonzero().squeeze(-1), form.batch_shape
    part = {
        # (What is shared stays so: then matrices are, too.)
        name: _Soft(*(v if v.dim() == 1 else instances(v, 1, batch, rows) for v in group))
        for name, group in soft.items()
    }
    return _merged(met, rows, first, _softened(form.part(rows), elastic, part, inner))


def _merged(met: Tensor, rows: Tensor | None, first: Solution, second: Solution) -> Solution:
    """Return ``first`` where ``met`` ``(*batch,)`` holds, else ``second``: of the whole batch, or of these rows."""

    def merged(old: Tensor, new: Tensor) -> Tensor:
        if rows is None:
            return where_instance(met, old, new)
        core = old.shape[met.dim() :]
        return old.reshape(met.numel(), *core).index_copy(0, rows, new).reshape(old.shape)

    def report(old: Tensor, new: Tensor) -> Tensor:
        return torch.stack([merged(a, b) for a, b in zip(old, new, strict=True)])

    first_counts, counts = first.report.counts, second.report.counts
    spent = first.iterations if rows is None else first.iterations.flatten()[rows]
    counts = torch.cat([(counts[0] + spent).unsqueeze(0), counts[1:]])
    certificate, none = second.certificate, no_shifts(first)
    if certificate is not None:
        nothing = (first.x, first.nu, first.lam, first.x, first.x)
        old = (torch.full_like(v, torch.nan) for v in nothing)
        certificate = Certificate(*map(merged, old, certificate))
    assert second.shifts is not None
    names = ("x", "s", "lam", "nu", "lam_lower", "lam_upper", "status")
    return replace(
        first,
        **{name: merged(getattr(first, name), getattr(second, name)) for name in names},
        report=Report(report(first.report.residuals, second.report.residuals), report(first_counts, counts)),
        certificate=certificate,
        executor="+".join(dict.fromkeys([first.executor, second.executor])),
        shifts=Shifts(*map(merged, none, second.shifts)),
        _value=lambda: merged(first.value, second.value),
        _adjoint=lambda: merged(first.adjoint, second.adjoint),
    )


def _softened(form: QPForm, elastic: Elastic, soft: Mapping[str, _Soft], inner: Solve) -> Solution:
    """Solve all instances with a variable more for each soft constraint."""
    n, p, m = form.n, form.p, form.m
    eq, row, bound = (soft.get(name) for name in ("elastic_eq", "elastic_row", "elastic_bound"))
    lower, upper = (form.lower, form.upper) if bound is None else (None, None)
    # Rows: general ones first, then soft bounds.
    eye = torch.eye(n, dtype=form.dtype, device=form.device)
    G, h, slack = [form.G], [form.h], [row]
    if bound is not None:
        for side, sign in ((form.lower, -1), (form.upper, 1)):
            if side is not None:
                G, h, slack = [*G, sign * eye], [*h, sign * side], [*slack, bound]
    count = sum(v.shape[-1] for v in h)
    # Variables: x; what equalities miss (by both sides for the l1 penalty); by how much rows are exceeded.
    columns: list[tuple[Tensor | None, Tensor | None, Tensor]] = []
    signs = (1, -1) if elastic.penalty == "l1" else (1,)
    if eq is not None:
        columns += [(-sign * torch.diag_embed(eq.reach), None, eq.weight) for sign in signs]
    start = 0
    for group, side in zip(slack, h, strict=True):
        size = side.shape[-1]
        if group is not None:
            pad = torch.nn.functional.pad(torch.diag_embed(group.reach), (0, 0, start, count - start - size))
            columns.append((None, -pad, group.weight))
        start += size
    A = _beside(form.A, [form.A.new_zeros(p, w.shape[-1]) if a is None else a for a, _, w in columns])
    G_ = _beside(stacked(G), [form.G.new_zeros(count, w.shape[-1]) if g is None else g for _, g, w in columns])
    cost = _joined([w for _, _, w in columns], form) if columns else form.q.new_zeros(0)
    nothing = torch.zeros_like(cost)
    squared = elastic.penalty == "squared"
    Q = _extended(form.Q, cost if squared else nothing)
    q = _joined([form.q, nothing if squared else cost], form)
    free = torch.full_like(nothing, torch.inf)
    least = -free if squared else nothing
    low = high = None
    if lower is not None or not squared:
        low = _joined([form.q.new_full((n,), -torch.inf) if lower is None else lower, least], form)
    if upper is not None:
        high = _joined([upper, free], form)
    found = inner(QPForm(Q, q, A, form.b, G_, _joined(h, form), low, high))

    pieces = list(found.x[..., n:].split([w.shape[-1] for _, _, w in columns], -1))
    missed = [pieces.pop(0) for _ in (signs if eq is not None else ())]
    zero = zeros_of(found.x[..., :n])
    eq_shift = zeros_of(found.nu)
    if eq is not None:
        eq_shift = eq.reach * (missed[0] - missed[1] if len(missed) == 2 else missed[0])
    row_shift = zeros_of(found.s[..., :m])
    if row is not None:
        row_shift = row.reach * pieces.pop(0)
    low_shift = bound.reach * pieces.pop(0) if bound is not None and form.lower is not None else zero
    high_shift = bound.reach * pieces.pop(0) if bound is not None and form.upper is not None else zero

    def cut(point: Solution | Certificate) -> dict[str, Tensor]:
        lam_lower, lam_upper = point.lam_lower[..., :n], point.lam_upper[..., :n]
        if bound is not None:
            rest = list(point.lam[..., m:].split(n, -1)) if count > m else []
            lam_lower = rest.pop(0) if form.lower is not None else lam_lower
            lam_upper = rest.pop(0) if form.upper is not None else lam_upper
        return {
            "x": point.x[..., :n], "nu": point.nu, "lam": point.lam[..., :m],
            "lam_lower": lam_lower, "lam_upper": lam_upper,
        }  # fmt: skip

    certificate = None if found.certificate is None else Certificate(**cut(found.certificate))
    # (Rounding may leave -1e-17 of what is at least zero.)
    shifts = Shifts(eq_shift, *(v.clamp_min(0) for v in (row_shift, low_shift, high_shift)))
    return replace(
        found,
        **cut(found),
        s=found.s[..., :m],
        certificate=certificate,
        shifts=shifts,
        _value=lambda: found.value,
        _hessian=form.Q,
    )


def _soft(name: str, weight: Any, size: int, form: QPForm) -> _Soft:
    if isinstance(weight, int | float):
        weight = form.q.new_full((), float(weight))
    require_tensor(name, weight)
    check_same_kind({"q": form.q, name: weight})
    if weight.dim() == 0:
        weight = weight.expand(size)
    if weight.shape[-1] != size:
        raise ShapeError(
            f"`{name}` has {weight.shape[-1]} entries but there are {size} constraints of its kind. Expected shape "
            f"(*batch, {size}) or a single number, got {tuple(weight.shape)}."
        )
    weight = _positive(name, weight)
    hard = weight == torch.inf
    return _Soft(torch.where(hard, 1.0, weight), torch.where(hard, torch.zeros_like(weight), 1.0))


def _positive(name: str, weight: Tensor) -> Tensor:
    """Return a weight; where it cannot be looked at, with NaN for what is none.

    Raises:
        ParameterError: an entry is zero or negative. (NaN is data like any other: its instance fails.)
    """
    if torch.compiler.is_compiling():
        return torch.where(weight > 0, weight, torch.nan)
    wrong = transforms.plain(weight) <= 0
    if not bool(wrong.any()):
        return weight
    *index, entry = wrong.nonzero()[0].tolist()
    value = float(transforms.plain(weight)[(*index, entry)])
    raise ParameterError(
        f"`{name}` is {value:g} at entry {entry}{f', batch index {index}' if index else ''}. Expected positive weights "
        f"(+inf: hard). A weight that is learned or predicted stays positive if it is computed as "
        f"{name} = torch.nn.functional.softplus(raw) + 1e-3, with `{name}` declared diffopt.given()."
    )


def _joined(vectors: list[Tensor], form: QPForm) -> Tensor:
    """Concatenate vectors along their last dimension, over their common batch."""
    batch = torch.broadcast_shapes(*(v.shape[:-1] for v in vectors))
    return torch.cat([v.expand(*batch, v.shape[-1]) for v in vectors], -1)


def _beside(first: Tensor, rest: list[Tensor]) -> Tensor:
    batch = torch.broadcast_shapes(first.shape[:-2], *(v.shape[:-2] for v in rest))
    return torch.cat([v.expand(*batch, *v.shape[-2:]) for v in (first, *rest)], -1)


def _extended(Q: SymmetricMatrix, diagonal: Tensor) -> SymmetricMatrix:
    """Return the block diagonal matrix of Q and a diagonal, in Q's structure."""
    k = diagonal.shape[-1]
    if isinstance(Q, Dense):
        given = Q.given
        batch = torch.broadcast_shapes(given.shape[:-2], diagonal.shape[:-1])
        top = torch.nn.functional.pad(given, (0, k)).expand(*batch, Q.n, Q.n + k)
        bottom = torch.nn.functional.pad(torch.diag_embed(diagonal), (Q.n, 0)).expand(*batch, k, Q.n + k)
        return Dense(torch.cat([top, bottom], -2))
    entries = Q.tensors()[0]
    batch = torch.broadcast_shapes(entries.shape[:-1], diagonal.shape[:-1])
    joined = torch.cat([entries.expand(*batch, Q.n), diagonal.expand(*batch, k)], -1)
    if isinstance(Q, DiagonalPlusLowRank):
        return DiagonalPlusLowRank(joined, torch.nn.functional.pad(Q.factor, (0, 0, 0, k)))
    return Diagonal(joined)
