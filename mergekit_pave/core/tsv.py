"""TSV-Merge: Task Singular Vectors (Gargiulo et al., arXiv 2412.00081).

Of the change D_i = W_i - W_base of each of M models only the largest 1/M of the singular triplets are kept. Together they fill
the space once. The singular vectors of different tasks still overlap, so they are replaced by the nearest orthonormal ones
before the triplets are summed:

    D_i ~ U_i S_i V_i^T,   W = W_base + lambda [U_1 .. U_M]' diag(S_1 .. S_M) [V_1 .. V_M]'^T,   X' = P Q^T for X = P S Q^T

All of this is float64: if two tasks are much alike, the nearest orthonormal vectors magnify rounding by the inverse of the
angle between them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

_EPS = torch.finfo(torch.float64).eps


def merge_changes(changes: Iterable[Tensor], models: int) -> Tensor:
    """The merged change of one matrix, (d_out, d_in) float64.

    Args:
        changes: of each model, (d_out, d_in) float64. They are borrowed one at a time. What is kept of all models together is as
            large as one decomposition, however many models there are.
        models: M, the number of models.
    """
    lefts, values, rights = zip(*map(functools.partial(_leading, models=models), changes))
    return (_orthonormal(torch.cat(lefts, dim=1)) * torch.cat(values)) @ _orthonormal(torch.cat(rights, dim=1)).mT


def _leading(change: Tensor, models: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest 1/M of the singular triplets of a (d_out, d_in) matrix: (d_out, k), (k,), (d_in, k)."""
    left, value, right = torch.linalg.svd(change, full_matrices=False)
    # The vectors of a value of zero are arbitrary, and would push aside those of other tasks.
    count = min(max(1, min(change.shape) // models), _rank(value, change))
    # Copies, because a view would keep all of the vectors in memory.
    return left[:, :count].clone(), value[:count], right[:count].mT.clone()


def _orthonormal(vectors: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns. If the columns depend on each other, it is the nearest on their span."""
    left, value, right = torch.linalg.svd(vectors, full_matrices=False)
    count = _rank(value, vectors)
    return left[:, :count] @ right[:count]


def _rank(values: Tensor, matrix: Tensor) -> int:
    """How many singular values of a matrix are larger than rounding."""
    return int((values > values.max() * max(matrix.shape) * _EPS).sum()) if len(values) else 0
