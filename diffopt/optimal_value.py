"""The optimal value and its derivative, that of the Lagrangian (the envelope theorem): no system is solved for it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffopt import kkt
from diffopt.errors import ChangedDataError
from diffopt.gates import Gate, Stationary, aliases, only_derivative
from diffopt.problems.forms import Form


def value(form: Form, point: kkt.Point, status: Tensor, attached: bool) -> Tensor:
    """Return the optimal value ``(*batch,)`` at a point, with its derivative, that of the Lagrangian, if both are
    ``attached``."""
    failed = kkt.failed(status)
    plain = kkt.Point(*(v.detach() for v in point))
    return lagrangian_value(form, point, plain, kkt.safe(plain, failed), failed, attached)


def lagrangian_value(
    form: Form, point: kkt.Point, values: kkt.Point, safe: kkt.Point, failed: Tensor, attached: bool
) -> Tensor:
    """Return the optimal value. Its derivative is that of the Lagrangian, whose slope in x, lam, nu is 0."""
    objective = form.detach().objective(values.x)
    if not attached:
        return objective
    bad = failed.unsqueeze(-1)
    x, _, nu, lam, lower, upper = (
        Stationary.apply(torch.where(bad, a, b - (v - c))) for a, b, v, c in zip(safe, point, values, safe, strict=True)
    )
    g = form.inequalities(x)
    total = form.objective(x) + (nu * form.equalities(x)).sum(-1)
    # (What is infinite must not meet its multiplier, or the gradient of that is NaN.)
    total = total + (lam * torch.where(torch.isfinite(g), g, 0.0)).sum(-1)
    for bound, dual, sign in ((form.lower, lower, -1), (form.upper, upper, 1)):
        if bound is not None:
            total = total + sign * (dual * torch.where(torch.isfinite(bound), x - bound, 0.0)).sum(-1)
    change = Gate.apply(only_derivative(total).unsqueeze(-1), failed).squeeze(-1)
    return objective + change


def value_through(form: Form, point: kkt.Point, values: kkt.Point, status: Tensor) -> Tensor:
    """Return the optimal value, attached to the form and through the point.

    Args:
        point: the attached solution; values: the same without a derivative.
    """
    failed = kkt.failed(status)
    return lagrangian_value(form, point, values, kkt.safe(values, failed), failed, attached=True)


def value_gradients(
    form: Form, point: kkt.Point, status: Tensor, gradient: Tensor, create_graph: bool
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return the gradients that the optimal value passes to the tensors of the form and to the point.

    To the first go the partial derivatives of the Lagrangian. To the second goes zero, of which the derivative is none.
    """
    with torch.enable_grad():
        form = form.with_tensors(aliases(form.tensors()))
        point = kkt.Point(*aliases(point._asdict()).values())
        failed = kkt.failed(status)
        plain = kkt.Point(*(v.detach() for v in point))
        total = lagrangian_value(form, point, plain, kkt.safe(plain, failed), failed, attached=True)
        inputs = (*form.tensors().values(), *point)
        tracked = [v for v in inputs if v.requires_grad]
        found = iter(
            torch.autograd.grad(
                total, tracked, gradient, create_graph=create_graph, materialize_grads=True, allow_unused=True
            )
        )
        gradients = tuple(next(found) if v.requires_grad else torch.zeros_like(v) for v in inputs)
    return gradients[: -len(point)], gradients[-len(point) :]


def unless_changed(form: Form, point: dict[str, Tensor], value: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return ``value``, with an error where data or point were changed in place between now and the call."""
    tensors = form.tensors()
    try:
        before = [tensor._version for tensor in tensors.values()] + [tensor._version for tensor in point.values()]
    except RuntimeError:  # tensors of inference mode do not count their changes
        return value

    def checked() -> Tensor:
        for (name, tensor), version in zip((tensors | point).items(), before, strict=True):
            freed = _is_freed(tensor)
            if tensor._version != version or freed:
                raise ChangedDataError(
                    f"`{name}` was {'freed' if freed else 'changed in place'} after the solve and before "
                    f"`Solution.value` was first read, which is computed then. Read `value` right after the solve"
                    f"{', or let FSDP shard the module around the layer and not the layer itself' if freed else ''}."
                )
        return value()

    return checked


def _is_freed(tensor: Tensor) -> bool:
    try:
        return tensor.untyped_storage().nbytes() == 0 < tensor.numel()
    except RuntimeError:  # a tensor inside a transform of torch.func has no storage of its own
        return False
