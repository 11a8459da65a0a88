"""The solve with the KKT matrix of the active sets, u = K^-1 r: differentiable in r and in K, to any order."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt import kkt, transforms
from diffopt.active_system import ActiveSystem
from diffopt.linalg.matrices import SymmetricMatrix
from diffopt.linalg.saddle import Blocks


class Bound(NamedTuple):
    """An `ActiveSystem` with the structure in which K's tensors come."""

    system: ActiveSystem
    hessian: SymmetricMatrix


class Solve(torch.autograd.Function):
    """u = K^-1 r (or the transpose), differentiable in r and in K's data, to any order.

    du = K^-1 (dr - dK u). Inputs: the operator; whether r is known to be zero (then u is zero, and
    only its derivatives matter); transpose; the blocks of r; which inequality rows are equations, and which of their
    multipliers are unknowns; which instances failed; K's data (Q's tensors, A, G). The batch dimensions of r end with
    those of the operator: others before them are many right-hand sides of one system.
    """

    @staticmethod
    def forward(op: Bound, zero: bool, transpose: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        r = Blocks(*tensors[:4])
        if zero:
            return tuple(torch.zeros_like(v) for v in r)
        return tuple(op.system.solve(r, transpose))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.op, ctx.zero, ctx.transpose = inputs[0], inputs[1], inputs[2]
        kept = inputs[7:]
        ctx.count = len(kept)
        ctx.save_for_backward(*kept, *output)
        ctx.save_for_forward(*kept, *output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        op: Bound = ctx.op
        # (Read once: checkpointing gives each tensor a single time.)
        saved = ctx.saved_tensors
        kept, u = saved[: ctx.count], Blocks(*saved[ctx.count :])
        needed = ctx.needs_input_grad[10:]
        if ctx.zero and not torch.is_grad_enabled():
            # A step that is zero has a first derivative that does not see K's own change.
            needed = (False,) * len(needed)
        # A failed instance whose derivative nobody asked for (u = 0) adds nothing to a higher one: y may be NaN there.
        idle = kept[2] & ~torch.stack([(v != 0).any(-1, keepdim=True) for v in u if v.shape[-1]]).any(0)

        def pulled(*grads: Tensor) -> tuple[Tensor | None, ...]:
            y = Blocks(*Solve.apply(op, False, not ctx.transpose, *grads, *kept))
            used = Blocks(*(torch.where(idle, 0.0, v) for v in y)) if any(needed) else y
            return (*y, None, None, None, *_data_gradients(op, kept, needed, used, u, ctx.transpose))

        return None, None, None, *transforms.many_at_once(pulled, grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        op: Bound = ctx.op
        saved = transforms.primals(ctx.saved_tensors)
        kept, u = saved[: ctx.count], Blocks(*saved[ctx.count :])

        def pushed(*tangents: Tensor | None) -> tuple[Tensor, ...]:
            r = [torch.zeros_like(v) if t is None else t for v, t in zip(u, tangents[:4], strict=True)]
            right = Blocks(*r).minus(_matrix_tangent(op, kept, tangents[7:], u, ctx.transpose))
            return Solve.apply(op, False, ctx.transpose, *right, *kept)

        with transforms.seen_by_other_forward_modes():
            return transforms.many_at_once(pushed, tangents[3:])  # type: ignore[return-value]

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], op: Bound, zero: bool, transpose: bool, *tensors: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        dims = in_dims[3:]
        cores = (1, 1, 1, 1, 1, 1, 1, *op.hessian.core_dims(), 2, 2)
        leads = [v.dim() - core - (dim is not None) for v, core, dim in zip(tensors, cores, dims, strict=True)]
        # The batch dimensions of the operator itself, as far as this level shows them; r may have others before those.
        own, all_of_r = leads[4], leads[0]
        # A dimension of the operator goes first among the operator's. Any other makes many right-hand sides for one
        # factor, and goes first of all.
        is_own = dims[4] is not None
        place = all_of_r - own if is_own else 0
        moved = []
        for i, (v, dim, lead) in enumerate(zip(tensors, dims, leads, strict=True)):
            at = max(0, lead - own) if is_own else 0
            if dim is None:
                # Right-hand sides are counted; other things are shared by what they lack a dimension for.
                moved.append(v.unsqueeze(at) if i < 4 or at else v)
                continue
            v = v.movedim(dim, 0)
            missing = (own if is_own else all_of_r) - lead
            if missing > 0:
                v = v.reshape(info.batch_size, *[1] * missing, *v.shape[1:])
            moved.append(v.movedim(0, at))
        shape = torch.broadcast_shapes(*(v.shape[:-1] for v in moved[:4]))
        right = (v.expand(*shape, v.shape[-1]) for v in moved[:4])
        return Solve.apply(op, zero, transpose, *right, *moved[4:]), (place,) * 4


def _data_gradients(
    op: Bound, kept: tuple[Tensor, ...], needed: tuple[bool, ...], y: Blocks, u: Blocks, transpose: bool
) -> tuple[Tensor | None, ...]:
    """Return the gradient of -y'Ku with respect to those of K's data that need one."""
    *masks, A, G = kept
    equation, unknown, _, *parts = masks
    if transpose:
        equation, unknown = unknown, equation
    gradients: list[Tensor | None] = [None] * len(needed)
    if any(needed[:-2]):
        gradients[:-2] = op.hessian.with_tensors(*parts).pairing_gradient(y.x, u.x)
    if needed[-2]:
        gradients[-2] = outer(y.eq, u.x) + outer(u.eq, y.x)
    if needed[-1]:
        y_row, u_row = torch.where(equation, y.row, 0.0), torch.where(unknown, u.row, 0.0)
        gradients[-1] = outer(y_row, u.x) + outer(u_row, y.x)
    return tuple(
        -g.sum_to_size(t.shape) if need and g is not None else None
        for g, t, need in zip(gradients, kept[3:], needed, strict=True)
    )


def _matrix_tangent(
    op: Bound, kept: tuple[Tensor, ...], tangents: tuple[Tensor | None, ...], u: Blocks, transpose: bool
) -> Blocks:
    """Return dK u for tangents of K's data."""
    equation, unknown, _, *parts = kept[:-2]
    if transpose:
        equation, unknown = unknown, equation
    *d_parts, dA, dG = tangents
    x = op.hessian.with_tensors(*parts).tangent_matvec(tuple(d_parts), u.x)
    x = torch.zeros_like(u.x) if x is None else x
    eq, row = torch.zeros_like(u.eq), torch.zeros_like(u.row)
    if dA is not None:
        x, eq = x + kkt.rmatvec(dA, u.eq), kkt.matvec(dA, u.x)
    if dG is not None:
        x = x + kkt.rmatvec(dG, torch.where(unknown, u.row, 0.0))
        row = torch.where(equation, kkt.matvec(dG, u.x), 0.0)
    return Blocks(x, eq, row, torch.zeros_like(u.bound))


def outer(a: Tensor, b: Tensor) -> Tensor:
    return a.unsqueeze(-1) * b.unsqueeze(-2)
