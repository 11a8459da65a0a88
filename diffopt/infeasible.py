"""Problems that no x satisfies: soft constraints, and the closest problem that has a solution.

Both are transformations of a quadratic program into others, which are solved and differentiated as any other; so
every backend, device and derivative that a program has they have too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from diffopt import kkt, transforms
from diffopt.cones import kinds
from diffopt.errors import BackendUnsupported, ParameterError, SettingsError, ShapeError
from diffopt.gates import gate
from diffopt.linalg.matrices import Dense, Diagonal, DiagonalPlusLowRank, SymmetricMatrix
from diffopt.problems.forms import Form, QPForm, require_tensor
from diffopt.problems.structure import Declared, declare
from diffopt.shapes import check_same_kind
from diffopt.solution import ALMOST, Certificate, Report, Shifts, Solution, Status, graded, succeeded

WEIGHT = 1e3
"""Weight of a soft constraint where none is given."""

Solve = Callable[[QPForm], Solution]
"""Solves and attaches a form, and never raises for failed instances."""


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


Policy = Elastic | Literal["closest"] | None
"""What happens to a problem that no x satisfies."""


def checked_policy(policy: Any) -> Policy:
    """Return a policy; ``"elastic"`` stands for ``Elastic()``.

    Raises:
        SettingsError: it is none.
    """
    if policy == "elastic":
        return Elastic()
    if policy is None or policy == "closest" or isinstance(policy, Elastic):
        return policy
    raise SettingsError(
        f"`on_infeasible` = {policy!r} is unknown. Expected None, 'elastic', 'closest', or diffopt.Elastic(...)."
    )


def declared_weights(policy: Policy) -> dict[str, Declared]:
    """Return the declarations of a policy's weights, by name."""
    return policy.declared if isinstance(policy, Elastic) else {}


def take_weights(
    policy: Policy, given: Mapping[str, Any], own: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the values of a policy's weights, and what else was given.

    Args:
        given: the values given at a call, by name, among them the weights that are declared so.
        own: values of the learned and fixed weights; those of the declarations by default.

    Raises:
        ParameterError: a weight was not given, or was given and is not to be.
    """
    rest, weights = dict(given), {}
    for name, declared in declared_weights(policy).items():
        if declared.kind == "given":
            if name not in rest:
                raise ParameterError(f"The elastic constraints need `{name}`, which was not given. Pass {name}=... .")
            weights[name] = rest.pop(name)
        elif name in rest:
            raise ParameterError(
                f"`{name}` is declared {declared.kind} and cannot be given at a call. "
                f"Declare it diffopt.given() to pass it."
            )
        elif declared.kind != "absent":
            weights[name] = own[name] if own is not None and name in own else declared.value()
    return weights, rest


def solve(form: Form, policy: Policy, weights: Mapping[str, Any], solve: Solve, tolerance: float) -> Solution:
    """Solve a batch of quadratic programs under a policy.

    Args:
        form: the problem, attached to its parameters.
        policy, weights: see `checked_policy`, `take_weights`.
        solve: see `Solve`.
        tolerance: relative residual of a SOLVED instance.

    Raises:
        BackendUnsupported: the problem is not a quadratic program over the nonnegative cone.
    """
    if not isinstance(form, QPForm) or kinds(form.cone) - {"NonnegativeCone"}:
        what = type(form).__name__ if not isinstance(form, QPForm) else ", ".join(sorted(kinds(form.cone)))
        raise BackendUnsupported(
            f"`on_infeasible` takes quadratic and linear programs with inequalities, not {what}. Leave it out, and "
            f"write the soft constraints into the problem."
        )
    if isinstance(policy, Elastic):
        return _solve_elastic(form, policy, weights, solve)
    return _solve_closest(form, solve, tolerance)


# ---- elastic ---------------------------------------------------------------------------------------------------------


class _Soft(NamedTuple):
    """A group of soft constraints: ``weight`` and ``reach``, ``(*batch, k)``. A violation is reach times a variable;
    that of a hard constraint costs something and reaches nothing, so it is zero (and no matrix holds +inf)."""

    weight: Tensor
    reach: Tensor


def _solve_elastic(form: QPForm, elastic: Elastic, weights: Mapping[str, Any], solve: Solve) -> Solution:
    n, p, m = form.n, form.p, form.m
    sizes = {"elastic_eq": p, "elastic_row": m, "elastic_bound": n}
    soft = {name: _soft(name, weights[name], sizes[name], form) for name in weights}
    eq, row, bound = (soft.get(name) for name in sizes)
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
    G_ = _beside(_stacked(G), [form.G.new_zeros(count, w.shape[-1]) if g is None else g for _, g, w in columns])
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
    found = solve(QPForm(Q, q, A, form.b, G_, _joined(h, form), low, high))

    pieces = list(found.x[..., n:].split([w.shape[-1] for _, _, w in columns], -1))
    missed = [pieces.pop(0) for _ in (signs if eq is not None else ())]
    zero = _zeros(found.x[..., :n])
    eq_shift = _zeros(found.nu)
    if eq is not None:
        eq_shift = eq.reach * (missed[0] - missed[1] if len(missed) == 2 else missed[0])
    row_shift = _zeros(found.s[..., :m])
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
        found, **cut(found), s=found.s[..., :m], certificate=certificate, shifts=shifts, _value=lambda: found.value
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


def _stacked(matrices: list[Tensor]) -> Tensor:
    batch = torch.broadcast_shapes(*(v.shape[:-2] for v in matrices))
    return torch.cat([v.expand(*batch, *v.shape[-2:]) for v in matrices], -2)


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


# ---- closest feasible ------------------------------------------------------------------------------------------------


class _Sides(NamedTuple):
    """Something for each constraint: equalities, rows, lower and upper bounds (of no entries where there are none)."""

    eq: Tensor
    row: Tensor
    low: Tensor
    high: Tensor


CLEAR = 1e-7
"""Violation, relative to the sides, from which on an instance counts as infeasible without trying to solve it; below it
(and above what the first phase can tell from zero) only if it cannot be solved. Also the largest relative error of the
proof."""

LEAST = 1e-9
"""Shift, relative to the sides, that is told from zero in the first phase: the tolerance of float64. To take a larger
one for zero, such as the tolerance of float32, would leave a shifted problem that misses being feasible by as much."""


def _solve_closest(form: QPForm, solve: Solve, tolerance: float) -> Solution:
    """Find the least shifts of the sides that some x satisfies, and solve: for these, where any is needed.

    First phase. With C x <= d all constraints (equalities too), the least shifts are t = y, the solution of

        minimise 1/2 |y|^2 + d'y subject to C'y = 0, y >= 0 for inequalities,

    the dual of minimise 1/2 |t|^2 subject to Cx - t <= d: strictly convex whatever C is.

    Second phase. Constraints with y > 0 hold with equality wherever the shifts are least. As inequalities they would
    leave a feasible set without interior, so they are held as equalities. These depend on each other (C'y = 0), but
    their sides d + t are consistent, and stay so when the data moves: so the minimum-norm derivative of these dependent
    rows (see ``optimal_value``) is the derivative.
    """
    # In float64: sides that were rounded to float32 would contradict each other again.
    exact = form.widened()
    d = _sides(exact)
    if not sum(v.shape[-1] for v in d):
        first = solve(form)
        return replace(first, shifts=_no_shifts(first), _value=lambda: first.value)
    problem = _least_shifts(exact)
    least = solve(problem)
    joined = torch.where(least.ok.unsqueeze(-1), least.x, 0.0)
    y = _split(joined, exact)
    with torch.no_grad():
        size = 1 + torch.where(torch.isfinite(problem.q), problem.q.abs(), 0.0).amax(-1, keepdim=True)
        most = (joined.abs() / size).amax(-1)
        depth = -(torch.where(joined == 0, 0.0, problem.q) * joined).sum(-1)
        # That d'y < 0 where C'y = 0 and y >= 0 proves it; rounding errors of an unpolished y = 0 do not.
        error = torch.where(least.ok, problem.equalities(joined).abs().amax(-1), torch.inf)
        clear = (most > CLEAR) & (error <= CLEAR * depth)
        # (A first phase that was not polished errs by its residuals, in each shift that is zero too.)
        noise = torch.nan_to_num(10 * least.report.residuals.amax(0)).clamp(min(LEAST, tolerance), tolerance)
    # (Instances that clearly have no solution are not tried: proving it once more would cost the most of all.)
    first = solve(_made_feasible(form, clear))
    codes = (Status.PRIMAL_INFEASIBLE, Status.NUMERICAL_ERROR, Status.MAX_ITERATIONS)
    failed = torch.stack([first.status == int(code) for code in codes]).any(0)
    use = clear | (failed & (most > noise))
    zero = _no_shifts(first)
    if _nowhere(use):
        return replace(first, shifts=zero, _value=lambda: first.value)
    none = zero.low
    held = _Sides(*(((v.abs() > noise.unsqueeze(-1) * size) & use.unsqueeze(-1)).detach() for v in y))
    # Equalities are held anyway, so all of their shift counts.
    counted = held._replace(eq=use.unsqueeze(-1))
    t = _Sides(*(torch.where(mask, v, 0.0) for mask, v in zip(counted, y, strict=True)))

    shifted = _shifted(exact, t)
    second = solve(_with_held(shifted, held))
    point, dependent = _unheld(shifted, held, t, second)
    detached = kkt.Point(*(v.detach() for v in point))
    # (For forward mode, which torch.compile has not; that of torch 2.11 cannot make the detached twin.)
    judge = shifted if torch.compiler.is_compiling() else shifted.detach()
    found = _judged(judge, detached, form.dtype, least, second, tolerance)
    status, residuals, spoiled = found
    counts = torch.stack([first.iterations + least.iterations + second.iterations, second.weakly_active, dependent])
    point = kkt.Point(*(gate(v, spoiled) for v in point))
    value = gate(second.value.unsqueeze(-1), spoiled).squeeze(-1)

    def merged(new: Tensor, old: Tensor) -> Tensor:
        mask = use.unsqueeze(-1) if old.dim() > use.dim() else use
        return torch.where(mask, new.to(old.dtype), old)

    status = merged(status, first.status)
    bound = [v if v.shape[-1] else none.to(v.dtype) for v in (t.low, t.high)]
    executors = dict.fromkeys([first.executor, least.executor, second.executor])
    return Solution(
        *(merged(getattr(point, k), getattr(first, k)) for k in ("x", "s", "lam", "nu", "lam_lower", "lam_upper")),
        status=status,
        report=Report(
            torch.where(use, residuals.to(first.report.residuals.dtype), first.report.residuals),
            torch.where(use, counts, first.report.counts),
        ),
        certificate=_remaining(first, second, use, status),
        backend=first.backend,
        executor="+".join(executors),
        _value=lambda: merged(value, first.value),
        shifts=Shifts(*(v.to(form.dtype) for v in (t.eq, t.row, *bound))),
    )


def _nowhere(mask: Tensor) -> bool:
    """Return whether a mask is known to be true nowhere. (While a graph is traced there are no values.)"""
    return not torch.compiler.is_compiling() and not bool(transforms.plain(mask).any())


def _no_shifts(solution: Solution) -> Shifts:
    none = _zeros(solution.x)
    return Shifts(_zeros(solution.nu), _zeros(solution.s), none, none)


def _zeros(like: Tensor) -> Tensor:
    """Return zeros with the graph of a tensor: a loss of the shifts has a gradient where nothing is shifted, too."""
    return like.masked_fill(like.new_ones((), dtype=torch.bool), 0.0)


def _made_feasible(form: QPForm, where: Tensor) -> QPForm:
    """Return the form with sides that x = 0 satisfies in the marked instances."""
    if _nowhere(where):
        return form
    mask = where.unsqueeze(-1)
    b, h = torch.where(mask, 0.0, form.b), torch.where(mask, form.h.detach().clamp_min(1), form.h)
    lower = None if form.lower is None else torch.where(mask, form.lower.detach().clamp_max(-1), form.lower)
    upper = None if form.upper is None else torch.where(mask, form.upper.detach().clamp_min(1), form.upper)
    return QPForm(form.Q, form.q, form.A, b, form.G, h, lower, upper)


def _sides(form: QPForm) -> _Sides:
    none = form.q[..., :0]
    low = none if form.lower is None else -form.lower
    sides = (form.b, form.h, low, none if form.upper is None else form.upper)
    return _Sides(*(v.expand(*form.batch_shape, v.shape[-1]) for v in sides))


def _split(y: Tensor, form: QPForm) -> _Sides:
    sizes = [form.p, form.m, *(0 if bound is None else form.n for bound in (form.lower, form.upper))]
    return _Sides(*y.split(sizes, -1))


def _least_shifts(form: QPForm) -> QPForm:
    """Return the problem of the first phase, over y in the order of `_Sides`; see `_solve_closest`."""
    d = torch.cat(_sides(form), -1)
    # An infinite side is no constraint; NaN and the wrong infinity stay, and make the instance fail.
    absent = d == torch.inf
    eye = torch.eye(form.n, dtype=form.dtype, device=form.device)
    rows = [form.A, form.G]
    rows += [] if form.lower is None else [-eye]
    rows += [] if form.upper is None else [eye]
    size = d.shape[-1]
    upper = torch.where(absent, d.new_zeros(()), torch.inf)
    lower = torch.cat([d.new_full((form.p,), -torch.inf), d.new_zeros(size - form.p)])
    cost = torch.where(absent, 0.0, d)
    return QPForm(Diagonal(d.new_ones(size)), cost, A=_stacked(rows).mT, b=0.0, lower=lower, upper=upper)


def _shifted(form: QPForm, t: _Sides) -> QPForm:
    lower = None if form.lower is None else form.lower - t.low
    upper = None if form.upper is None else form.upper + t.high
    return QPForm(form.Q, form.q, form.A, form.b + t.eq, form.G, form.h + t.row, lower, upper)


def _with_held(form: QPForm, held: _Sides) -> QPForm:
    """Return the form with some of its inequalities as equalities. Rows that are not held are rows of zeros."""
    A = _stacked([form.A, torch.where(held.row.unsqueeze(-1), form.G, 0.0)])
    b = torch.cat([form.b, torch.where(held.row, form.h, 0.0)], -1)
    h = torch.where(held.row, torch.inf, form.h)
    lower, upper = form.lower, form.upper
    # (Bounds that crossed now meet: either is as good.)
    at = upper if lower is None else lower
    if lower is not None and upper is not None:
        at = torch.where(held.low, lower, upper)
    if at is not None:
        low, high = held.low if lower is not None else held.high, held.high if upper is not None else held.low
        infinite = form.q.new_full((form.n,), torch.inf)
        lower = torch.where(low | high, at, -infinite if lower is None else lower)
        upper = torch.where(low | high, at, infinite if upper is None else upper)
    return QPForm(form.Q, form.q, A, b, form.G, h, lower, upper)


def _unheld(form: QPForm, held: _Sides, t: _Sides, found: Solution) -> tuple[kkt.Point, Tensor]:
    """Return the solution of the second phase as a point of the shifted problem, and its dependent rows.

    The multipliers of held constraints have any sign. They are not unique: C't = 0, so a multiple of the shifts, which
    are positive, can be added. The smallest that leaves none negative is.
    """
    p, n = form.p, form.n
    nu, lam = found.nu[..., :p], found.lam + torch.where(held.row, found.nu[..., p:], 0.0)
    force = found.lam_upper - found.lam_lower
    low, high = (
        torch.where(_wide(held.low, n), -force, found.lam_lower),
        torch.where(_wide(held.high, n), force, found.lam_upper),
    )
    both = _wide(held.low, n) & _wide(held.high, n)
    low, high = torch.where(both, found.lam_lower, low), torch.where(both, found.lam_upper, high)
    low, high = torch.where(_wide(held.high, n) & ~both, 0.0, low), torch.where(_wide(held.low, n) & ~both, 0.0, high)
    shifts = [t.row, *(v if v.shape[-1] else torch.zeros_like(low) for v in (t.low, t.high))]
    masks = [held.row, _wide(held.low, n), _wide(held.high, n)]
    ratios = [
        torch.where(mask, -dual / torch.where(mask, shift, 1.0), 0.0)
        for mask, dual, shift in zip(masks, (lam, low, high), shifts, strict=True)
    ]
    more = torch.cat(ratios, -1).amax(-1, keepdim=True).clamp_min(0)
    lam, low, high = (
        # (Never below zero, for want of rounding.)
        torch.where(mask, (dual + more * shift).clamp_min(0), dual)
        for mask, dual, shift in zip(masks, (lam, low, high), shifts, strict=True)
    )
    s = torch.where(held.row, 0.0, found.s)
    # (Each row of zeros counts as dependent.)
    dependent = torch.where(found.dependent < 0, -1, found.dependent - (~held.row).sum(-1))
    return kkt.Point(found.x, s, nu + more * t.eq, lam, low, high), dependent


def _wide(mask: Tensor, n: int) -> Tensor:
    return mask if mask.shape[-1] else mask.new_zeros(*mask.shape[:-1], n)


class _Verdict(NamedTuple):
    status: Tensor
    residuals: Tensor
    spoiled: Tensor


@torch.no_grad()
def _judged(
    form: Form, point: kkt.Point, dtype: torch.dtype, least: Solution, found: Solution, tolerance: float
) -> _Verdict:
    """Return status and residuals: those of the shifted problem, and not below those of the first phase.

    Both are those of the point rounded to ``dtype``. Multipliers of constraints that depend on each other can be large
    and cancel, and their rounding then costs more than the tolerance, but not x: the instance is ALMOST_SOLVED.

    ``spoiled``: instances that the second phase solved and that fail all the same.
    """
    residuals = torch.stack(kkt.residuals(form, kkt.Point(*(v.to(dtype).to(v.dtype) for v in point))))
    residuals = torch.maximum(residuals, least.report.residuals)
    status = graded(residuals.amax(0), tolerance)
    if dtype != form.dtype:
        exact = torch.maximum(torch.stack(kkt.residuals(form, point)), least.report.residuals).amax(0)
        status = torch.where(~succeeded(status) & (exact <= ALMOST), int(Status.ALMOST_SOLVED), status)
    status = torch.where(found.ok, status, found.status)
    return _Verdict(status, residuals, found.ok & ~succeeded(status))


def _remaining(first: Solution, second: Solution, use: Tensor, status: Tensor) -> Certificate | None:
    """Return the certificates of instances that have no solution still: of an unbounded closest problem, too."""
    if torch.compiler.is_compiling():
        return None  # (operators return none)
    known = Certificate(*(v.new_full(v.shape, torch.nan) for v in (first.x, first.nu, first.s, first.x, first.x)))
    known = known if first.certificate is None else first.certificate
    keep = ~use & ((status == int(Status.PRIMAL_INFEASIBLE)) | (status == int(Status.DUAL_INFEASIBLE)))
    kept = Certificate(*(torch.where(keep.unsqueeze(-1), v, torch.nan) for v in known))
    if second.certificate is not None:
        falls = use & (status == int(Status.DUAL_INFEASIBLE))
        kept = kept._replace(x=torch.where(falls.unsqueeze(-1), second.certificate.x.to(kept.x.dtype), kept.x))
        keep = keep | falls
    return None if _nowhere(keep) else kept
