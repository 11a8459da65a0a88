"""Batched Cholesky factors that never raise because of one bad instance."""

from __future__ import annotations

import torch
from torch import Tensor

from diffopt import waiting


def cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return lower factors of ``(*batch, k, k)`` matrices, and ``(*batch,)`` True where one failed.

    A failed instance gets the identity, so that what follows stays finite; the caller masks it.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    failed = (info != 0) | ~torch.isfinite(pivots).all(-1)
    if waiting.some(failed):
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        # In place: a copy may be laid out otherwise, and other kernels would change the neighbours' last bits.
        factor.copy_(torch.where(failed[..., None, None], eye, factor))
    return factor, failed


def cholesky_solve(factor: Tensor, vector: Tensor) -> Tensor:
    """Solve (L L') x = vector for ``(*batch, k)`` vectors; a shared factor serves the whole batch."""
    if vector.numel() == 0:
        batch = torch.broadcast_shapes(factor.shape[:-2], vector.shape[:-1])
        return vector.expand(*batch, vector.shape[-1])
    if factor.dim() == 2:
        flat = vector.reshape(-1, vector.shape[-1])
        return torch.cholesky_solve(flat.mT, factor).mT.reshape(vector.shape)
    return torch.cholesky_solve(vector.unsqueeze(-1), factor).squeeze(-1)


def lower_solve(factor: Tensor, matrix: Tensor) -> Tensor:
    """Solve L X = matrix for ``(*batch, k, c)``; a shared factor serves the whole batch."""
    if matrix.numel() == 0:
        batch = torch.broadcast_shapes(factor.shape[:-2], matrix.shape[:-2])
        return matrix.expand(*batch, *matrix.shape[-2:])
    if factor.dim() == 2 and matrix.dim() > 2:
        columns = matrix.movedim(-2, 0)
        solved = torch.linalg.solve_triangular(factor, columns.reshape(columns.shape[0], -1), upper=False)
        return solved.reshape(columns.shape).movedim(0, -2)
    return torch.linalg.solve_triangular(factor, matrix, upper=False)


def upper_solve_vector(factor: Tensor, vector: Tensor) -> Tensor:
    """Solve L' x = vector for ``(*batch, k)`` vectors; a shared factor serves the whole batch."""
    if factor.dim() == 2 and vector.numel():
        flat = vector.reshape(-1, vector.shape[-1])
        return torch.linalg.solve_triangular(factor.mT, flat.mT, upper=True).mT.reshape(vector.shape)
    return torch.linalg.solve_triangular(factor.mT, vector.unsqueeze(-1), upper=True).squeeze(-1)


def add_diagonal(matrix: Tensor, diagonal: Tensor) -> Tensor:
    """Return matrix + diag(diagonal), broadcasting; ``matrix`` is a temporary and may be overwritten."""
    batch = torch.broadcast_shapes(matrix.shape[:-2], diagonal.shape[:-1])
    if matrix.shape[:-2] != batch:
        matrix = matrix.expand(*batch, *matrix.shape[-2:]).clone()
    matrix.diagonal(dim1=-2, dim2=-1).add_(diagonal)
    return matrix


def pivots(factor: Tensor) -> Tensor:
    """Return the squared diagonal of a Cholesky factor, ``(*batch, k)``."""
    return factor.diagonal(dim1=-2, dim2=-1).square()
