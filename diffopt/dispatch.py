"""By which way a form is solved and its solution attached: plainly, compiled, inside the transforms of ``torch.func``,
relaxed, or by a selection among many solutions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffopt import failures, implicit, operators, pulled, relaxed, selected, transformed, transforms, warm_start
from diffopt.backends.base import Backend
from diffopt.backends.registry import choose
from diffopt.errors import NotDifferentiableError
from diffopt.failures import OnFailure
from diffopt.problems.forms import Form, QPForm
from diffopt.solution import Certificate, Report, Solution
from diffopt.solvers.settings import Settings
from diffopt.warm_start import Start


def attached(
    form: Form, backend: str | Backend, settings: Settings, on_failure: OnFailure, near: Start | None
) -> tuple[Solution, bool]:
    """Return the solution, attached to the form, and whether no more need be said about its failures."""
    if settings.selection is not None:
        return _selected(form, backend, settings, on_failure, near)
    if settings.relaxation is None:
        return _exactly(form, backend, settings, on_failure, near)
    relaxed.check(form)
    if torch.compiler.is_compiling():
        return _exactly(form, backend, settings, on_failure, near)  # (the operators know of it)
    if any(map(transforms.mapped_here, form.tensors().values())):
        return _mapped(form, backend, settings, on_failure, near), True
    solution, reported = _exactly(form, backend, settings, on_failure, near)
    if not implicit.needs_graph(form):
        return solution, reported

    def work(plain: Form) -> Any:
        return choose(backend, plain).solve(plain, settings)

    return relaxed.relax(form, solution, settings, work, _plainly), reported


def _selected(
    form: Form, backend: str | Backend, settings: Settings, on_failure: OnFailure, near: Start | None
) -> tuple[Solution, bool]:
    selected.check(form)
    assert isinstance(form, QPForm)
    if torch.compiler.is_compiling():
        raise NotDifferentiableError(
            "Settings(selection=...) does not go inside torch.compile or torch.export. Call the layer outside."
        )
    if any(map(transforms.mapped_here, form.tensors().values())):
        return _mapped(form, backend, settings, on_failure, near), True
    if transforms.active():
        raise NotDifferentiableError(
            "Settings(selection=...) does not go inside the derivatives of torch.func, because it looks at values. Use "
            "torch.autograd.grad or backward; torch.func.vmap over the data does go."
        )
    inner = settings.replace(selection=None)

    def second(form: QPForm) -> Solution:
        return _exactly(form, backend, inner, "return", None)[0]

    first, _ = _exactly(form, backend, inner, "return", near)
    return selected.select(form, first, settings, second), False


def _exactly(
    form: Form, backend: str | Backend, settings: Settings, on_failure: OnFailure, near: Start | None
) -> tuple[Solution, bool]:
    if torch.compiler.is_compiling():
        return operators.solution(form, backend, settings, on_failure, near), True
    if transforms.active():
        return _transformed(form, backend, settings, on_failure, near), True
    if near is not None:
        near = warm_start.fitted(near, form)
    solver = choose(backend, form)
    needed = implicit.needs_graph(form)
    found = solver.solve(form, settings, needed, near)
    solution = pulled.attach_solved(form, found, needed, settings.kink_rule, settings.weak_tolerance_for(form.dtype))
    return solution, found.solved


def _plainly(form: Form, work: Callable[[Form], relaxed.Found]) -> relaxed.Found:
    """Call a function with the form over plain tensors, also inside the transforms of ``torch.func``."""
    if not transforms.active():
        with torch.no_grad():
            return work(form.detach())
    done: list[relaxed.Found] = []

    def run(inner: Form) -> tuple[Tensor, ...]:
        done.append(work(inner.detach()))
        return (*implicit.flatten(done[0].prepared), done[0].residual, done[0].failed)

    call = transforms.Call(form, run, implicit.BATCH_SECOND, all_layers=True)
    tensors = (tensor.detach() for tensor in form.tensors().values())
    *prepared, residual, failed = transforms.Unwrapped.apply(call, *tensors)
    return relaxed.Found(implicit.unflatten(done[0].prepared, tuple(prepared)), residual, failed)


def _transformed(
    form: Form, backend: str | Backend, settings: Settings, on_failure: OnFailure, near: Start | None
) -> Solution:
    """Solve inside transforms of ``torch.func``.

    Is the innermost a vmap over the data, then the mapped dimension becomes a leading batch dimension, and the rest is
    an ordinary call, by the fastest way that there is. Otherwise a derivative is being taken: the problem is solved on
    tensors unwrapped to the last, and the solution attached to the wrapped ones: by its solver's own derivative where
    nobody takes a derivative of that, else by its Newton step, which torch then transforms as it does any function.
    """
    tensors = form.tensors().values()
    if any(map(transforms.mapped_here, tensors)):
        return _mapped(form, backend, settings, on_failure, near)
    rule, weak_tolerance = settings.kink_rule, settings.weak_tolerance_for(form.dtype)
    known: Any = None
    layers = transforms.layers_of(tensors)
    if layers is not None:
        with transforms.outside():
            plain = layers.plain(form)
            first = None if near is None else warm_start.fitted(layers.start(near, form), plain)
            known = choose(backend, plain).solve(plain, settings, True, first)
            if settings.sync and not known.solved:
                failures.report(pulled.attach_solved(plain, known, False, rule, weak_tolerance), on_failure)
        if isinstance(form, QPForm) and isinstance(plain, QPForm) and transformed.takes(known, rule):
            return transformed.attach(form, plain, known, layers, weak_tolerance)
        with transforms.outside():
            known = known.unpacked()

    def prepare(plain: Form) -> implicit.Prepared:
        found = known
        if found is None:
            bare = None if near is None else warm_start.fitted(Start(*map(transforms.bare, near)), plain)
            found = choose(backend, plain).solve(plain, settings, start=bare)
        prepared = implicit.prepare(plain, found, rule, weak_tolerance)
        if known is None and settings.sync:
            failures.report(implicit.attach(plain, prepared), on_failure)
        return prepared

    return implicit.attach(form, implicit.prepared_inside(form, prepare), transformed=True)


_FIELDS = ("x", "s", "lam", "nu", "lam_lower", "lam_upper", "status")


def _mapped(
    form: Form, backend: str | Backend, settings: Settings, on_failure: OnFailure, near: Start | None
) -> Solution:
    """Solve with the dimension that the innermost vmap maps as the first batch dimension."""
    lead = len(form.batch_shape)
    inside = None if near is None else Start(*(transforms.mapped_first(v, lead, 1) for v in near))
    done: list[Solution] = []

    def run(inner: Form) -> tuple[Tensor, ...]:
        solution, reported = attached(inner, backend, settings, on_failure, inside)
        if settings.sync and not reported:
            failures.report(solution, on_failure)
        done.append(solution)
        certificate = () if solution.certificate is None else solution.certificate
        relaxation = () if solution.gradient_residual is None else (solution.gradient_residual,)
        return (*solution.report, *(getattr(solution, name) for name in _FIELDS), *certificate, *relaxation)

    call = transforms.Call(form, run, second=2)
    residuals, counts, *rest = transforms.Unwrapped.apply(call, *form.tensors().values())
    (whole,) = done
    fields, rest = rest[: len(_FIELDS)], rest[len(_FIELDS) :]
    certificate, rest = ((), rest) if whole.certificate is None else (rest[:5], rest[5:])

    def value() -> Tensor:
        # On access, as elsewhere. (The tensors only say which dimension is mapped.)
        again = transforms.Call(form, lambda _: (whole.value,), second=0)
        return transforms.Unwrapped.apply(again, *form.tensors().values())[0]

    return Solution(
        **dict(zip(_FIELDS, fields, strict=True)),
        report=Report(residuals, counts),
        certificate=Certificate(*certificate) if certificate else None,
        backend=whole.backend,
        executor=whole.executor,
        gradient=whole.gradient,
        selection=whole.selection,
        gradient_residual=rest[0] if rest else None,
        _value=value,
    )
