"""Standard forms: what a problem looks like once its parameters have values.

A `Form` is one batch of problems with all data in place. Backends solve forms, ``kkt`` judges
points of forms, ``implicit`` attaches solutions to the tensors of forms.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt.cones import Cone, NonnegativeCone
from diffopt.errors import ParameterError, ShapeError
from diffopt.linalg.matrices import Dense, Diagonal, DiagonalPlusLowRank, SymmetricMatrix
from diffopt.modes import transforming
from diffopt.shapes import broadcast_batch, check_same_kind, instances, matvec


class Derivatives(NamedTuple):
    """First and second derivatives of a form at a point (x, lam, nu).

    ``gradient`` ``(*batch, n)`` of the objective; ``hessian`` of the Lagrangian;
    ``equality_jacobian`` ``(*batch, p, n)``; ``inequality_jacobian`` ``(*batch, m, n)``.
    """

    gradient: Tensor
    hessian: SymmetricMatrix
    equality_jacobian: Tensor
    inequality_jacobian: Tensor


class Form(ABC):
    """minimise f(x) subject to e(x) = 0, -g(x) in K, lower <= x <= upper, for a batch.

    ``lower`` and ``upper`` are ``None`` where the form has no such bounds; an entry of -inf or
    +inf is an absent bound.
    """

    n: int
    p: int
    m: int
    cone: Cone
    lower: Tensor | None
    upper: Tensor | None
    batch_shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor that the form depends on, by name, attached."""

    @abstractmethod
    def with_tensors(self, tensors: dict[str, Tensor]) -> Form:
        """Return the same form over other tensors (same names)."""

    @abstractmethod
    def core_dims(self) -> tuple[int, ...]:
        """Return how many trailing dimensions of each of `tensors` belong to one instance."""

    @abstractmethod
    def rebatched(self, tensors: dict[str, Tensor]) -> Form:
        """Return the same form over other tensors (same names), whose batch dimensions may be others."""

    @abstractmethod
    def objective(self, x: Tensor) -> Tensor:
        """Return f(x), ``(*batch,)``."""

    @abstractmethod
    def equalities(self, x: Tensor) -> Tensor:
        """Return e(x), ``(*batch, p)``: zero at a feasible point."""

    @abstractmethod
    def inequalities(self, x: Tensor) -> Tensor:
        """Return g(x), ``(*batch, m)``: <= 0 (its negative in the cone) at a feasible point."""

    def derivatives(self, x: Tensor, lam: Tensor, nu: Tensor) -> Derivatives | None:
        """Return closed forms of the derivatives, or ``None``: then ``kkt`` derives them."""
        return None

    def detach(self) -> Form:
        """Return the form over detached tensors."""
        return self.with_tensors({name: tensor.detach() for name, tensor in self.tensors().items()})


class Signature:
    """What forms of the same shapes, dtypes and devices have in common, made when the first of them passed its checks.

    Attributes:
        dtype, device, batch_shape: of the form.
        cone: the nonnegative cone of its inequalities.
        notes: for others to keep what depends on the signature alone, under keys of their own.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, batch_shape: torch.Size, m: int) -> None:
        self.dtype, self.device, self.batch_shape = dtype, device, batch_shape
        self.cone = NonnegativeCone(m)
        self.notes: dict[Any, Any] = {}
        self._no_rows: tuple[Tensor, Tensor] | None = None

    def no_rows(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return the matrix and the side of constraints of which there are none."""
        if self._no_rows is not None:
            return self._no_rows
        made = _no_rows(q.shape[-1], q)
        # A tensor made inside a transform or in inference mode is of no use outside.
        if not (transforming() or torch.is_inference_mode_enabled()):
            self._no_rows = made
        return made


MOST_SIGNATURES = 1000
_signatures: dict[tuple[object, ...], Signature] = {}


class QPForm(Form):
    """minimise 1/2 x'Qx + q'x subject to Ax = b, Gx + s = h, s in K, lower <= x <= upper.

    Args:
        Q: ``(*batch, n, n)``, positive semidefinite (its symmetric part is meant, and its gradient
            is symmetric); or a `diffopt.linalg.matrices.SymmetricMatrix`; or ``None`` for a
            linear program.
        q: ``(*batch, n)``.
        A, b: ``(*batch, p, n)`` and ``(*batch, p)``, both or neither; a number as b or h fills it.
        G, h: ``(*batch, m, n)`` and ``(*batch, m)``, both or neither; h = +inf is no constraint.
        lower, upper: ``(*batch, n)`` or a number; -inf and +inf are absent bounds.
        cone: K, of dimension m; nonnegative by default.

    Batch dimensions lead and broadcast; a tensor without them is shared by the batch.

    Raises:
        ShapeError, DtypeError, DeviceError, ParameterError: at construction.
    """

    Q: SymmetricMatrix
    q: Tensor
    A: Tensor
    b: Tensor
    G: Tensor
    h: Tensor

    def __init__(
        self,
        Q: Tensor | SymmetricMatrix | None,
        q: Tensor,
        A: Tensor | None = None,
        b: Tensor | float | None = None,
        G: Tensor | None = None,
        h: Tensor | float | None = None,
        lower: Tensor | float | None = None,
        upper: Tensor | float | None = None,
        cone: Cone | None = None,
    ) -> None:
        self._tensors: dict[str, Tensor] | None = None
        # Checks cost more than a small problem, so they are done once for each combination of shapes.
        # (A graph that is being traced has shapes of its own, which may be symbols.)
        data = Q, q, A, b, G, h, lower, upper
        key = None if cone is not None or torch.compiler.is_compiling() else _key(*data)
        known = None if key is None else _signatures.get(key)
        if known is None:
            known = self._check(Q, q, A, b, G, h, lower, upper, cone)
            if key is not None and all(isinstance(v, Tensor) and v.dim() for v in data if v is not None):
                if len(_signatures) >= MOST_SIGNATURES:
                    _signatures.clear()
                _signatures[key] = known
        else:
            self.n, self.q, self.Q = q.shape[-1], q, Dense(Q)  # type: ignore[arg-type]
            self.A, self.b = (A, b) if A is not None else known.no_rows(q)  # type: ignore[assignment]
            self.G, self.h = (G, h) if G is not None else known.no_rows(q)  # type: ignore[assignment]
            self.lower, self.upper = lower, upper  # type: ignore[assignment]
            self.p, self.m = self.A.shape[-2], self.G.shape[-2]
            self.cone = known.cone
        self.signature = known
        self.dtype, self.device, self.batch_shape = known.dtype, known.device, known.batch_shape

    def _check(
        self, Q: Tensor | SymmetricMatrix | None, q: Tensor, A: Tensor | None, b: Tensor | float | None,
        G: Tensor | None, h: Tensor | float | None, lower: Tensor | float | None, upper: Tensor | float | None,
        cone: Cone | None,
    ) -> Signature:  # fmt: skip
        """Check everything, and put it in place."""
        require_tensor("q", q)
        if q.dim() < 1:
            raise ShapeError("`q` has no dimensions. Expected q of shape (*batch, n), got ().")
        self.n = n = q.shape[-1]
        if n == 0:
            raise ShapeError("`q` has no entries. Expected q of shape (*batch, n) with n >= 1.")
        self.q = q
        self.Q = _hessian(Q, q, n)
        self.A, self.b = _rows("A", A, "b", b, n, q)
        self.G, self.h = _rows("G", G, "h", h, n, q)
        self.p, self.m = self.A.shape[-2], self.G.shape[-2]
        self.lower = bound("lower", lower, n, q)
        self.upper = bound("upper", upper, n, q)
        tensors = self.tensors()
        dtype, device = check_same_kind(tensors)
        for name, tensor in tensors.items():
            if tensor.layout is not torch.strided:
                raise ParameterError(
                    f"`{name}` is a sparse tensor ({tensor.layout}). Expected a dense one. Pass `{name}.to_dense()`."
                )
        dims = dict(zip(tensors, self.core_dims(), strict=True))
        batch = broadcast_batch({k: t.shape[: t.dim() - dims[k]] for k, t in tensors.items()})
        known = Signature(dtype, device, batch, self.m)
        self.cone = known.cone if cone is None else cone
        if self.cone.dim != self.m:
            raise ShapeError(f"`cone` has dimension {self.cone.dim} but G has {self.m} rows. Expected the same number.")
        return known

    def __repr__(self) -> str:
        bounds = [name for name in ("lower", "upper") if getattr(self, name) is not None]
        sizes = f"n={self.n}, p={self.p}, m={self.m}, batch={tuple(self.batch_shape)}, Q={self.Q}"
        return f"QPForm({', '.join([sizes, *bounds])})"

    def core_dims(self) -> tuple[int, ...]:
        vectors = (1,) * (int(self.lower is not None) + int(self.upper is not None))
        return (*self.Q.core_dims(), 1, 2, 1, 2, 1, *vectors)

    def tensors(self) -> dict[str, Tensor]:
        if self._tensors is None:
            self._tensors = self._named()
        return self._tensors

    def _named(self) -> dict[str, Tensor]:
        parts = self.Q.tensors()
        if len(parts) == 1 and self.lower is None and self.upper is None:  # (the rest of this, for the usual form)
            return {"Q": parts[0], "q": self.q, "A": self.A, "b": self.b, "G": self.G, "h": self.h}
        names = ("Q",) if len(parts) == 1 else ("Q_diagonal", "Q_factor")
        named = dict(zip(names, parts, strict=True))
        named |= {"q": self.q, "A": self.A, "b": self.b, "G": self.G, "h": self.h}
        if self.lower is not None:
            named["lower"] = self.lower
        if self.upper is not None:
            named["upper"] = self.upper
        return named

    def with_tensors(self, tensors: dict[str, Tensor]) -> QPForm:
        # The twin is not checked again: it has the shapes of this form.
        twin = object.__new__(type(self))
        vars(twin).update(vars(self), _tensors=None)
        count = len(self.Q.tensors())
        names = list(tensors)
        twin.Q = self.Q.with_tensors(*(tensors[name] for name in names[:count]))
        for name in names[count:]:
            setattr(twin, name, tensors[name])
        return twin

    def widened(self) -> QPForm:
        """Return the form over float64 tensors, attached."""
        if self.dtype == torch.float64:
            return self
        Q = self.Q.with_tensors(*(tensor.double() for tensor in self.Q.tensors()))
        lower, upper = (None if v is None else v.double() for v in (self.lower, self.upper))
        q, A, b, G, h = (v.double() for v in (self.q, self.A, self.b, self.G, self.h))
        return QPForm(Q, q, A, b, G, h, lower, upper, None if self.cone is self.signature.cone else self.cone)

    def rebatched(self, tensors: dict[str, Tensor]) -> QPForm:
        twin = self.with_tensors(tensors)
        Q = twin.Q.given if isinstance(twin.Q, Dense) else twin.Q
        cone = None if self.cone is self.signature.cone else self.cone
        return QPForm(Q, twin.q, twin.A, twin.b, twin.G, twin.h, twin.lower, twin.upper, cone)

    def part(self, places: slice | Tensor) -> QPForm:
        """Return the problems at these places of the flattened batch, ``(k,)``, as a batch of one dimension; what all
        instances share has none."""
        tensors = {}
        for (name, tensor), dims in zip(self.tensors().items(), self.core_dims(), strict=True):
            lead, core = tensor.shape[: tensor.dim() - dims], tensor.shape[tensor.dim() - dims :]
            shared = lead.numel() == 1
            tensors[name] = tensor.reshape(core) if shared else instances(tensor, dims, self.batch_shape, places)
        twin = self.with_tensors(tensors)
        many = len(places) if isinstance(places, Tensor) else places.stop - places.start
        twin.batch_shape = torch.Size((many,))
        twin.signature = Signature(self.dtype, self.device, twin.batch_shape, self.m)
        return twin

    def objective(self, x: Tensor) -> Tensor:
        return ((0.5 * self.Q.matvec(x) + self.q) * x).sum(-1)

    def equalities(self, x: Tensor) -> Tensor:
        return matvec(self.A, x) - self.b

    def inequalities(self, x: Tensor) -> Tensor:
        return matvec(self.G, x) - self.h

    def derivatives(self, x: Tensor, lam: Tensor, nu: Tensor) -> Derivatives:
        return Derivatives(self.Q.matvec(x) + self.q, self.Q, self.A, self.G)


def require_tensor(name: str, value: object) -> None:
    """Raise `ParameterError` unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise ParameterError(
            f"`{name}` must be a torch tensor, got {type(value).__name__}. Convert it with torch.as_tensor({name})."
        )


def bound(name: str, value: Tensor | float | None, n: int, like: Tensor) -> Tensor | None:
    """Return a bound as ``(*batch, n)``; a number is the same bound for every variable."""
    if value is None:
        return None
    if isinstance(value, int | float):
        return torch.full((n,), float(value), dtype=like.dtype, device=like.device)  # (shared, also under vmap)
    require_tensor(name, value)
    if value.dim() == 0:
        return value.expand(n)
    if value.shape[-1] != n:
        raise ShapeError(
            f"`{name}` has {value.shape[-1]} entries but there are {n} variables. Expected {name} of shape "
            f"(*batch, {n}) or a single number, got {tuple(value.shape)}."
        )
    return value


def _hessian(Q: Tensor | SymmetricMatrix | None, q: Tensor, n: int) -> SymmetricMatrix:
    if Q is None:
        return Diagonal(torch.zeros(n, dtype=q.dtype, device=q.device))
    if isinstance(Q, SymmetricMatrix):
        if Q.n != n:
            raise ShapeError(f"`Q` is {Q.n} x {Q.n} but q has {n} entries. Expected the same number.")
        if isinstance(Q, Dense):
            return _hessian(Q.given, q, n)
        for tensor in Q.tensors():
            require_tensor("Q", tensor)
        if isinstance(Q, DiagonalPlusLowRank) and (Q.factor.dim() < 2 or Q.factor.shape[-2] != n):
            # (Not found out later: a factor of one row would broadcast.)
            hint = " If it is transposed, pass its `.mT`." if Q.factor.dim() > 1 and Q.factor.shape[-1] == n else ""
            raise ShapeError(
                f"The factor of `Q`, diffopt.DiagonalPlusLowRank(d, U), has the wrong shape. Expected U of shape "
                f"(*batch, {n}, k), since `q` has {n} entries; got {tuple(Q.factor.shape)}.{hint}"
            )
        return Q
    if isinstance(Q, int | float):
        raise ParameterError(
            f"`Q` is a number, {Q!r}. Expected a tensor (*batch, {n}, {n}), or None for a linear program. For this "
            f"number times the identity pass diffopt.Diagonal(torch.full(({n},), {float(Q)})), or in a structure "
            f'declare Q with form="scaled_identity".'
        )
    require_tensor("Q", Q)
    if Q.dim() < 2 or Q.shape[-1] != Q.shape[-2]:
        raise ShapeError(
            f"`Q` is not square. Expected Q of shape (*batch, {n}, {n}), got {tuple(Q.shape)}. "
            f"For a diagonal Q pass diffopt.Diagonal(d)."
        )
    if Q.shape[-1] != n:
        raise ShapeError(
            f"`Q` is {Q.shape[-1]} x {Q.shape[-1]} but `q` has {n} entries. "
            f"Expected Q of shape (*batch, {n}, {n}), got {tuple(Q.shape)}."
        )
    return Dense(Q)


def _key(*data: Any) -> tuple[object, ...] | None:
    """Return the shapes, dtypes and devices of ordinary data, of matrices the layouts too; ``None`` for numbers,
    structures and half of a pair."""
    Q, q, A, b, G, h, lower, upper = data
    # (Written out: this is a tenth of a small solve. What has no shape is found out by its error.)
    try:
        return (
            Q.shape, Q.dtype, Q.device, Q.layout, q.shape, q.dtype, q.device,
            None if A is None and b is None else (A.shape, A.dtype, A.device, A.layout, b.shape, b.dtype, b.device),  # pyright: ignore[reportOptionalMemberAccess]
            None if G is None and h is None else (G.shape, G.dtype, G.device, G.layout, h.shape, h.dtype, h.device),  # pyright: ignore[reportOptionalMemberAccess]
            None if lower is None else (lower.shape, lower.dtype, lower.device),
            None if upper is None else (upper.shape, upper.dtype, upper.device),
        )  # fmt: skip
    except AttributeError:
        return None


def _no_rows(n: int, like: Tensor) -> tuple[Tensor, Tensor]:
    options: Any = {"dtype": like.dtype, "device": like.device}
    return torch.empty((0, n), **options), torch.empty((0,), **options)


def _rows(
    name: str, matrix: Tensor | None, side_name: str, side: Tensor | float | None, n: int, like: Tensor
) -> tuple[Tensor, Tensor]:
    if matrix is None and side is None:
        return _no_rows(n, like)
    for present, missing, value in ((name, side_name, side), (side_name, name, matrix)):
        if value is None:
            raise ParameterError(f"`{present}` was given without `{missing}`. Expected both or neither.")
    require_tensor(name, matrix)
    assert isinstance(matrix, Tensor) and side is not None
    rows = "p" if name == "A" else "m"
    if matrix.dim() < 2 or matrix.shape[-1] != n:
        hint = f" If {name} is transposed, pass `{name}.mT`." if n in matrix.shape[-2:-1] else ""
        what = f"{matrix.shape[-1]} columns but there are {n} variables" if matrix.dim() > 1 else "no rows and columns"
        if tuple(matrix.shape) == (n,):
            hint = f" For one row pass `{name}.unsqueeze(0)`."
        raise ShapeError(
            f"`{name}` has {what}. Expected {name} of shape (*batch, {rows}, {n}), got {tuple(matrix.shape)}.{hint}"
        )
    if isinstance(side, int | float):
        side = torch.full((matrix.shape[-2],), float(side), dtype=like.dtype, device=like.device)
    require_tensor(side_name, side)
    if side.dim() == 0:
        side = side.expand(matrix.shape[-2])
    if side.shape[-1] != matrix.shape[-2]:
        raise ShapeError(
            f"`{side_name}` has {side.shape[-1]} entries but `{name}` has {matrix.shape[-2]} rows. Expected "
            f"{side_name} of shape (*batch, {matrix.shape[-2]}), got {tuple(side.shape)}."
        )
    return matrix, side
