"""A solve as operators of torch, so that ``torch.compile`` and ``torch.export`` take it whole.

Inside a compiled graph a solve is one node, ``torch.ops.diffopt.solve``, and its reverse pass another. What they do is
decided when they run: shapes, and not values, decide the graph. Everything that is no tensor goes into a `Spec`, a
string.

A reverse pass needs what the solve has left behind (a factor, memory of compiled code), which is no tensor either. The
operator returns a number instead, in a tensor whose memory owns it: when the memory goes, so does what was left.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from diffopt import failures, kkt, living, optimal_value, pulled, relaxed, transforms, warm_start
from diffopt.backends.base import Backend
from diffopt.backends.registry import choose
from diffopt.errors import BackendError, NotDifferentiableError
from diffopt.failures import OnFailure
from diffopt.linalg.matrices import Dense, Diagonal, DiagonalPlusLowRank, SymmetricMatrix
from diffopt.problems.base import DifferentiableProblem, NonlinearForm
from diffopt.problems.forms import Form, QPForm
from diffopt.solution import Report, Solution
from diffopt.solvers.settings import Settings
from diffopt.warm_start import Start

Found = TypeVar("Found")
_MATRICES: dict[str, type[SymmetricMatrix]] = {
    "Dense": Dense, "Diagonal": Diagonal, "DiagonalPlusLowRank": DiagonalPlusLowRank,
}  # fmt: skip


class Spec(NamedTuple):
    """What a graph says of a solve beside its tensors.

    ``kind``: the structure of Q, or ``#`` and the number of a problem given by its functions; ``names`` of the tensors;
    ``p``, ``m``: of a problem given by its functions (of a quadratic program, tensors say it); ``backend``: a name, or
    ``#`` and the number of an instance; ``keep``: whether a reverse pass may come.
    """

    kind: str
    names: tuple[str, ...]
    p: int
    m: int
    keep: bool
    backend: str
    on_failure: OnFailure
    settings: Settings

    def form(self, tensors: Sequence[Tensor]) -> Form:
        """Return the form over these tensors, in the order of ``names``."""
        named: dict[str, Any] = dict(zip(self.names, tensors, strict=True))
        if self.kind.startswith("#"):
            return NonlinearForm(_living(self.kind, DifferentiableProblem, "problem", "compile again"), named)
        matrix = _MATRICES[self.kind]
        parts = [named.pop(name) for name in list(named) if name.startswith("Q")]
        Q = parts[0] if matrix is Dense else matrix(*parts)
        return QPForm(Q, **named)

    def chosen(self, form: Form) -> Backend:
        """Return the backend that solves the form."""
        if not self.backend.startswith("#"):
            return choose(self.backend, form)
        return choose(_living(self.backend, Backend, "backend instance", "pass the name of a registered backend"), form)


def _living(number: str, kind: type[Found], what: str, remedy: str) -> Found:
    """Return the object that a `Spec` refers to as ``#`` and a number."""
    found = living.find(int(number[1:]))
    if not isinstance(found, kind):
        raise BackendError(
            f"The {what} that this graph was compiled or exported with lives no more: a graph refers to it, and does "
            f"not hold it. Keep it, or {remedy}."
        )
    return found


@torch.compiler.assume_constant_result
def _exporting() -> bool:
    # (Asked while tracing, and not of the tracer: that of torch 2.11 always says yes.)
    return torch.compiler.is_exporting()


def written(form: Form, keep: bool, backend: str | Backend, settings: Settings, on_failure: OnFailure) -> str:
    """Write a `Spec` as a string, in operations that ``torch.compile`` follows."""
    p, m = 0, 0
    if isinstance(form, QPForm):
        kind = type(form.Q).__name__
        if kind not in _MATRICES:
            raise NotDifferentiableError(
                f"torch.compile and torch.export take Q as one of {', '.join(_MATRICES)}, not as {kind}."
            )
    else:
        assert isinstance(form, NonlinearForm)
        kind, p, m = f"#{id(form.problem)}", form.p, form.m
        if _exporting():
            raise NotDifferentiableError(
                "torch.export cannot write down a problem given by its functions: the solver calls them. Expected a "
                "quadratic program (a subclass of diffopt.QuadraticProgram). torch.compile takes both."
            )
    name = backend if isinstance(backend, str) else f"#{id(backend)}"
    return ";".join([kind, ",".join(form.tensors()), str(p), str(m), str(int(keep)), name, on_failure, settings.text])


@lru_cache(maxsize=1000)
def read(text: str) -> Spec:
    """Return the `Spec` that `written` wrote."""
    kind, names, p, m, keep, backend, on_failure, settings = text.split(";", 7)
    policy: Any = on_failure
    return Spec(kind, tuple(names.split(",")), int(p), int(m), keep == "1", backend, policy, Settings.read(settings))


# ------------------------------------------------------------------ what a solve leaves behind


Reverse = pulled.Reverse | relaxed.Reverse


class _Memory(np.ndarray):
    """One number, and what it stands for. A tensor over it keeps it alive."""

    reverse: Reverse


_numbers = itertools.count(1)
_left: WeakValueDictionary[int, _Memory] = WeakValueDictionary()


def _leave(reverse: Reverse | None) -> Tensor:
    memory = np.zeros(1, dtype=np.int64).view(_Memory)
    if reverse is not None:
        memory[0] = next(_numbers)
        memory.reverse = reverse
        _left[int(memory[0])] = memory
    return torch.from_numpy(memory)


# ------------------------------------------------------------------ the operators

Ten = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _solved(
    data: Sequence[Tensor], start: Sequence[Tensor], spec: Spec, keep: bool
) -> tuple[kkt.Solved, Tensor, Reverse | None]:
    settings = spec.settings
    with transforms.plain_inside_an_operator():
        form = spec.form([tensor.detach() for tensor in data])
        near = warm_start.fitted(Start(*(v.detach() for v in start)), form) if start else None
        found = spec.chosen(form).solve(form, settings, keep, near)
        rule, weak_tolerance = settings.kink_rule, settings.weak_tolerance_for(form.dtype)
        if settings.relaxation is None or not keep:
            return found, *pulled.apart(form, found, rule, weak_tolerance, keep)
        counts, _ = pulled.apart(form, found, rule, weak_tolerance, keep=False)
        exact = pulled.attach_solved(form, found, False, rule, weak_tolerance)
        reverse = relaxed.reverse(form, exact, settings, lambda near: spec.chosen(near).solve(near, settings))
    return found, counts, reverse


@torch.library.custom_op("diffopt::solve", mutates_args=())
def solve(data: Sequence[Tensor], start: Sequence[Tensor], spec: str) -> Ten:
    """Return x, s, nu, lam, lam_lower, lam_upper, status, residuals and counts (batch dimensions first), and the number
    of what the solve has left behind for its reverse pass. ``start``: the tensors of a `Start`, or none."""
    parsed = read(spec)
    found, counts, reverse = _solved(data, start, parsed, parsed.keep)
    if parsed.settings.sync and not found.solved:
        values = kkt.Point(*(v.detach() for v in found.point))
        whole = Solution(
            values.x, values.s, values.lam, values.nu, values.lam_lower, values.lam_upper, found.status,
            Report(found.residuals, counts), found.certificate, found.backend, found.executor,
            lambda: parsed.form([tensor.detach() for tensor in data]).objective(values.x),
            _hessian=getattr(parsed.form([tensor.detach() for tensor in data]), "Q", None),
        )  # fmt: skip
        failures.report(whole, parsed.on_failure)
    x, *rest = (*found.point, found.status, found.residuals.double().movedim(0, -1), counts.movedim(0, -1))
    # As the one below promises; and outputs of an operator must not share memory.
    copies = (part.clone(memory_format=torch.contiguous_format) for part in rest)
    return (x.contiguous(), *copies, _leave(reverse))  # type: ignore[return-value]


@solve.register_fake
def _(data: Sequence[Tensor], start: Sequence[Tensor], spec: str) -> Ten:
    parsed = read(spec)
    batch, (n, p, m) = _batch(data, parsed), _sizes(data, parsed)
    like = data[0]
    point = (like.new_empty((*batch, size)) for size in (n, m, p, m, n, n))
    status = like.new_empty(batch, dtype=torch.int8)
    residuals, counts = (like.new_empty((*batch, 3), dtype=kind) for kind in (torch.float64, torch.int64))
    return (*point, status, residuals, counts, torch.empty(1, dtype=torch.int64))  # type: ignore[return-value]


@torch.library.custom_op("diffopt::pullback", mutates_args=())
def pullback(
    number: Tensor, data: Sequence[Tensor], point: Sequence[Tensor], gradients: Sequence[Tensor | None],
    needed: Sequence[bool], spec: str,
) -> list[Tensor]:  # fmt: skip
    """Return the gradients for those of the data that need one, from those for the entries of the point."""
    data = [tensor.detach() for tensor in data]
    memory = _left.get(int(number))
    if memory is not None:
        reverse = memory.reverse
    else:  # what a solve left does not travel with a copy of its number: solve again
        _, _, again = _solved(data, (), read(spec), keep=True)
        assert again is not None
        reverse = again
    with transforms.plain_inside_an_operator():
        found = reverse.first_order(read(spec).form(data), kkt.Point(*point), tuple(gradients), tuple(needed))
    given = {g.data_ptr() for g in gradients if g is not None}
    wanted = [
        torch.zeros_like(tensor) if gradient is None else gradient.contiguous()
        for tensor, gradient, need in zip(data, found, needed, strict=True)
        if need
    ]
    # (An operator must not return what it was given.)
    return [gradient.clone() if gradient.data_ptr() in given else gradient for gradient in wanted]


@pullback.register_fake
def _(
    number: Tensor, data: Sequence[Tensor], point: Sequence[Tensor], gradients: Sequence[Tensor | None],
    needed: Sequence[bool], spec: str,
) -> list[Tensor]:  # fmt: skip
    return [tensor.new_empty(tensor.shape) for tensor, need in zip(data, needed, strict=True) if need]


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    data, start, ctx.spec = inputs
    ctx.count, ctx.unused = len(data), [None] * len(start)
    ctx.save_for_backward(*data, *output[:6], output[9])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[list[Tensor | None], list[None], None]:
    data, (*point, number) = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
    gradients, parsed = grads[:6], read(ctx.spec)
    needed = tuple(tensor.requires_grad for tensor in data)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        memory = _left.get(int(number))
        reverse = memory.reverse if memory is not None else _solved(data, (), parsed, keep=True)[2]
        assert reverse is not None
        return list(reverse.with_graph(parsed.form(data), kkt.Point(*point), gradients, needed)), ctx.unused, None
    found = iter(pullback(number, list(data), point, list(gradients), list(needed), ctx.spec))
    return [next(found) if need else None for need in needed], ctx.unused, None


solve.register_autograd(_backward, setup_context=_keep_for_backward)


@torch.library.custom_op("diffopt::value", mutates_args=())
def value(data: Sequence[Tensor], point: Sequence[Tensor], status: Tensor, spec: str) -> Tensor:
    """Return the optimal values of a batch, whose derivative is that of the Lagrangian."""
    with transforms.plain_inside_an_operator():
        return read(spec).form([tensor.detach() for tensor in data]).objective(point[0].detach()).clone()


@value.register_fake
def _(data: Sequence[Tensor], point: Sequence[Tensor], status: Tensor, spec: str) -> Tensor:
    return data[0].new_empty(status.shape)


@torch.library.custom_op("diffopt::value_pullback", mutates_args=())
def value_pullback(
    gradient: Tensor, data: Sequence[Tensor], point: Sequence[Tensor], status: Tensor, needed: Sequence[bool], spec: str
) -> list[Tensor]:
    """Return the gradients for those of the data that need one: partial derivatives of the Lagrangian."""
    leaves = [v.detach().requires_grad_(need) for v, need in zip(data, needed, strict=True)]
    plain = kkt.Point(*(v.detach() for v in point))
    with transforms.plain_inside_an_operator():
        found, _ = optimal_value.value_gradients(read(spec).form(leaves), plain, status, gradient, create_graph=False)
    return [g.contiguous() for g, need in zip(found, needed, strict=True) if need]


@value_pullback.register_fake
def _(
    gradient: Tensor, data: Sequence[Tensor], point: Sequence[Tensor], status: Tensor, needed: Sequence[bool], spec: str
) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor, need in zip(data, needed, strict=True) if need]


def _keep_for_value(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    data, point, status, ctx.spec = inputs
    ctx.count = len(data)
    ctx.save_for_backward(*data, *point, status)


def _value_backward(ctx: Any, gradient: Tensor) -> tuple[list[Tensor | None], list[Tensor | None], None, None]:
    data, (*point, status) = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
    needed = [tensor.requires_grad for tensor in data]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        if read(ctx.spec).settings.relaxation is not None:
            raise NotDifferentiableError(
                "Inside torch.compile, the value of a problem with relaxed gradients has no second derivative: that "
                "goes through the exact point. Read it outside."
            )
        # The second derivative goes through the point as well.
        form = read(ctx.spec).form(data)
        first, second = optimal_value.value_gradients(form, kkt.Point(*point), status, gradient, create_graph=True)
        return list(first), list(second), None, None
    found = iter(value_pullback(gradient, list(data), point, status, needed, ctx.spec))
    # (The slope of the Lagrangian in the point is zero.)
    return [next(found) if need else None for need in needed], [None] * len(point), None, None


value.register_autograd(_value_backward, setup_context=_keep_for_value)


Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("diffopt::checked", mutates_args=())
def checked(
    x: Tensor, s: Tensor, nu: Tensor, lam: Tensor, lower: Tensor, upper: Tensor, status: Tensor, residuals: Tensor,
    counts: Tensor, backend: str, on_failure: str,
) -> Six:  # fmt: skip
    """Return a point, having raised or warned for what was not solved."""
    policy: Any = on_failure
    plain = [v.detach() for v in (x, s, nu, lam, lower, upper)]
    with transforms.plain_inside_an_operator():
        whole = Solution(
            plain[0], plain[1], plain[3], plain[2], plain[4], plain[5], status,
            report=Report(residuals, counts), certificate=None, backend=backend, executor="auto",
            _value=lambda: x.new_full(status.shape, torch.nan),
        )  # fmt: skip
        failures.report(whole, policy)
    return tuple(v.clone() for v in plain)  # type: ignore[return-value]


@checked.register_fake
def _(
    x: Tensor, s: Tensor, nu: Tensor, lam: Tensor, lower: Tensor, upper: Tensor, status: Tensor, residuals: Tensor,
    counts: Tensor, backend: str, on_failure: str,
) -> Six:  # fmt: skip
    return tuple(torch.empty_like(v) for v in (x, s, nu, lam, lower, upper))  # type: ignore[return-value]


def _unchanged(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    return *grads, None, None, None, None, None


checked.register_autograd(_unchanged)


# ------------------------------------------------------------------ under vmap


def _first(tensor: Tensor, dim: int | None, core: int, batch: int, size: int) -> Tensor:
    """Return a tensor with its mapped dimension first, and after it as many batch dimensions as any has."""
    if dim is None:
        return tensor
    tensor = tensor.movedim(dim, 0)
    lead = tensor.dim() - 1 - core
    return tensor.reshape(size, *[1] * (batch - lead), *tensor.shape[1:])


def _data_first(info: Any, dims: Sequence[int | None], data: Sequence[Tensor], spec: str) -> list[Tensor]:
    cores = _cores(read(spec))
    leads = [v.dim() - core - (dim is not None) for v, core, dim in zip(data, cores, dims, strict=True)]
    found = zip(data, dims, cores, strict=True)
    return [_first(v, dim, core, max(leads), info.batch_size) for v, dim, core in found]


@solve.register_vmap
def _(
    info: Any, in_dims: tuple[Any, ...], data: Sequence[Tensor], start: Sequence[Tensor], spec: str
) -> tuple[Ten, tuple[Any, ...]]:
    moved = _data_first(info, in_dims[0], data, spec)
    batch = len(_batch(moved, read(spec))) - 1
    near = [
        v if dim is None else transforms.aligned(v.movedim(dim, 0), 1, batch, 1)
        for v, dim in zip(start, in_dims[1], strict=True)
    ]
    return solve(moved, near, spec), (*(0,) * 9, None)


def _point_first(info: Any, tensor: Tensor, dim: int | None) -> Tensor:
    return tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


@value.register_vmap
def _(
    info: Any, in_dims: tuple[Any, ...], data: Sequence[Tensor], point: Sequence[Tensor], status: Tensor, spec: str
) -> tuple[Tensor, int]:
    moved = [_point_first(info, v, dim) for v, dim in zip(point, in_dims[1], strict=True)]
    return value(_data_first(info, in_dims[0], data, spec), moved, _point_first(info, status, in_dims[2]), spec), 0


@checked.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Six, tuple[int, ...]]:
    moved = [_point_first(info, v, dim) for v, dim in zip(inputs[:7], in_dims, strict=False)]
    # (What is counted for each instance lies behind the kinds of it.)
    rest = (_point_first(info, v, dim).movedim(0, 1) for v, dim in zip(inputs[7:9], in_dims[7:9], strict=True))
    return checked(*moved, *rest, *inputs[9:]), (0,) * 6


# ------------------------------------------------------------------ shapes


def _cores(spec: Spec) -> tuple[int, ...]:
    """Return how many trailing dimensions of each tensor belong to one instance."""
    if spec.kind.startswith("#"):
        problem = living.find(int(spec.kind[1:]))
        sizes = {name: len(shape) for name, shape in problem.params}
        return tuple(sizes[name] for name in spec.names)
    of_Q = {"Dense": (2,), "Diagonal": (1,), "DiagonalPlusLowRank": (1, 2)}[spec.kind]
    return (*of_Q, *({"A": 2, "G": 2}.get(name, 1) for name in spec.names[len(of_Q) :]))


def _batch(data: Sequence[Tensor], spec: Spec) -> torch.Size:
    leads = (tensor.shape[: tensor.dim() - core] for tensor, core in zip(data, _cores(spec), strict=True))
    return torch.broadcast_shapes(*leads)


def _sizes(data: Sequence[Tensor], spec: Spec) -> tuple[int, int, int]:
    if spec.kind.startswith("#"):
        return living.find(int(spec.kind[1:])).n, spec.p, spec.m
    named = dict(zip(spec.names, data, strict=True))
    return named["q"].shape[-1], named["A"].shape[-2], named["G"].shape[-2]


# ------------------------------------------------------------------ what a compiled call returns


INSIDE = (
    "Inside torch.compile, a solve can be mapped by vmap, and differentiated by backward() alone: torch gives "
    "operators neither forward mode nor the derivatives of torch.func. Call those (grad, jvp, jacrev, hessian, a dual "
    "level) on the model without torch.compile."
)


def reported(solution: Solution, on_failure: OnFailure) -> Solution:
    """Return a solution that was put together from others, having raised or warned when the graph runs."""
    s, (residuals, counts) = solution, solution.report
    x, slack, nu, lam, lower, upper = checked(
        s.x, s.s, s.nu, s.lam, s.lam_lower, s.lam_upper, s.status, residuals, counts, s.backend, on_failure
    )
    return replace(s, x=x, s=slack, nu=nu, lam=lam, lam_lower=lower, lam_upper=upper, _value=lambda: solution.value)


def solution(
    form: Form, backend: str | Backend, settings: Settings, on_failure: OnFailure, near: Start | None = None
) -> Solution:
    """Solve by the operators; for the eyes of ``torch.compile`` and ``torch.export``.

    Which backend and executor it was is only known when the graph runs: the names are those that were asked for, and a
    certificate is not returned.
    """
    inside = transforms.active()
    if transforms.forward_mode() or (inside and not transforms.vmaps_alone()):
        raise NotDifferentiableError(INSIDE)
    data = list(form.tensors().values())
    # (A mapped tensor does not show whether it needs a gradient.)
    keep = torch.is_grad_enabled() and (inside or any(tensor.requires_grad for tensor in data))
    spec = written(form, keep, backend, settings, on_failure)
    x, s, nu, lam, lower, upper, status, residuals, counts, _ = solve(data, list(near or ()), spec)
    return Solution(
        x, s, lam, nu, lower, upper, status,
        report=Report(residuals.movedim(-1, 0), counts.movedim(-1, 0)),
        certificate=None,
        backend=backend if isinstance(backend, str) else backend.name,
        executor=settings.executor,
        gradient="exact" if settings.relaxation is None else relaxed.label(settings),
        _value=lambda: value(data, [x, s, nu, lam, lower, upper], status, spec),
    )  # fmt: skip
