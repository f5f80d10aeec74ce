"""TSV-Merge: Task Singular Vectors (Gargiulo et al., arXiv 2412.00081).

Of the change D_i = W_i - W_base of each of M models only the largest 1/M of the singular triplets are kept. Together they fill
the space once. The singular vectors of different tasks still overlap, so they are replaced by the nearest orthonormal ones
before the triplets are summed:

    D_i ~ U_i S_i V_i^T,   W = W_base + lambda [U_1 .. U_M]' diag(S_1 .. S_M) [V_1 .. V_M]'^T,   X' = P Q^T for X = P S Q^T

All of this is float64: if two tasks are much alike, the nearest orthonormal vectors magnify rounding by the inverse of the
angle between them.

Both steps are eigenproblems of Gram matrices: U_i are eigenvectors of D_i D_i^T (for a wide D_i), V_i = D_i^T U_i S_i^-1, and
X' = X (X^T X)^-1/2, for two models one of half the size. They cost less than singular value decompositions, on a GPU far less.
But in a Gram matrix rounding hides what is small beside the largest. So triplets are taken in turns: those that stand out from
the rounding, and then, of what is left of D_i without them, those that stand out there. Where this does not lead to the end, or
X^T X is too ill-conditioned, there is the decomposition itself.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mergekit_pave.core.eigenpairs import leading_eigenpairs
from mergekit_pave.core.failures import NOT_CONVERGED
from mergekit_pave.core.gram import upper_gram

_EPS = torch.finfo(torch.float64).eps
# Vectors that end where the eigenvalue of a Gram matrix falls by a gap are wrong by eps / gap, and where it has fallen to v, the
# other vectors are wrong by eps / v, both as shares of the largest. So gap and v have to be larger than these.
_GAP, _SMALLEST = 1e-8, 1e-5
_TURNS = 7  # each covers two and a half decades of singular values or more, and there are sixteen
_WRONG = 1e-7  # by how much X' may be wrong
_RANGE = 1e-250, 1e300  # of a Gram matrix in which nothing has overflowed, and nothing that counts has vanished


def merge_changes(changes: Iterable[Tensor], models: int) -> Tensor:
    """The merged change of one matrix, (d_out, d_in) float64.

    Args:
        changes: of each model, (d_out, d_in) float64. They are borrowed one at a time. What is kept of all models together is as
            large as one decomposition, however many models there are.
        models: M, the number of models. The merged change of one is its own.
    """
    if models == 1:
        return next(iter(changes))
    lefts, values, rights = zip(*map(functools.partial(_leading, models=models), changes))
    return (_orthonormal(lefts) * torch.cat(values)) @ _orthonormal(rights).mT


def _leading(change: Tensor, models: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest 1/M of the singular triplets of a (d_out, d_in) matrix: (d_out, k), (k,), (d_in, k).

    The vectors of a value of zero are arbitrary, and would push aside those of other tasks. So there are none.
    """
    count = max(1, min(change.shape) // models)
    is_tall = change.shape[0] > change.shape[1]
    found = None
    with contextlib.suppress(*NOT_CONVERGED):
        found = _leading_in_turns(change.mT if is_tall else change, count)
    if found:
        return found[::-1] if is_tall else found
    left, value, right = torch.linalg.svd(change, full_matrices=False)
    count = min(count, _rank(value, change))
    # Copies, because a view would keep all of the vectors in memory.
    return left[:, :count].clone(), value[:count], right[:count].mT.clone()


def _leading_in_turns(change: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """The same of an (n, m) matrix, n <= m, by eigenproblems; None where rounding may have spoilt it."""
    left, values, right = change.new_empty(len(change), 0), change.new_empty(0), change.new_empty(change.shape[1], 0)
    rest = change
    for _ in range(_TURNS):
        if not rest.any():
            return left, values, right
        vectors = _outstanding(rest, count - len(values))  # (n, j)
        if vectors is None:
            return None
        if len(values):  # beside what is left, rounding in what has been taken may be large
            vectors = torch.linalg.qr(vectors - left @ (left.mT @ vectors)).Q
        others = rest.mT @ vectors
        others -= right @ (right.mT @ others)
        found = torch.linalg.vector_norm(others, dim=0)
        others /= found.clamp(min=_RANGE[0])
        values = torch.cat([values, found])
        left, right = torch.cat([left, vectors], dim=1), torch.cat([right, others], dim=1)
        rank = _rank(values, change)
        if rank < len(values) or len(values) == count:
            return left[:, :rank], values[:rank], right[:, :rank]
        rest = rest - (vectors * found) @ others.mT
    return None


def _outstanding(rest: Tensor, count: int) -> Tensor | None:
    """Leading left singular vectors of an (n, m) matrix that is not zero: `count`, or the first of them that can be trusted.

    None if none can be.
    """
    gram = upper_gram(rest.mT)
    if not _RANGE[0] < gram.diagonal().max() < _RANGE[1]:
        return None
    values, vectors = leading_eigenpairs(gram, min(count + 1, len(gram)))
    values = torch.nn.functional.pad(values, (0, 1))[: count + 1]  # behind all n values there is nothing
    trusted = (values[:-1] - values[1:] > _GAP * values[0]) & (values[:-1] > _SMALLEST * values[0])
    return vectors[:, : int(trusted.nonzero()[-1]) + 1] if trusted.any() else None


def _orthonormal(parts: Sequence[Tensor]) -> Tensor:
    """X' for X = [X_1 .. X_M], each part with orthonormal columns: the nearest matrix that has them throughout.

    If the columns of X depend on each other, it is the nearest on their span.
    """
    parts = [part for part in parts if part.shape[1]] or parts[:1]
    if len(parts) == 1:
        return parts[0]
    with contextlib.suppress(*NOT_CONVERGED):
        found = _orthonormal_pair(*parts) if len(parts) == 2 else _orthonormal_by_gram(torch.cat(parts, dim=1))
        if found is not None:
            return found
    vectors = torch.cat(parts, dim=1)
    left, value, right = torch.linalg.svd(vectors, full_matrices=False)
    count = _rank(value, vectors)
    return left[:, :count] @ right[:count]


def _orthonormal_by_gram(vectors: Tensor) -> Tensor | None:
    """X (X^T X)^-1/2, or None where rounding may have spoilt it."""
    values, rotation = torch.linalg.eigh(upper_gram(vectors), UPLO="U")
    # In the basis of the eigenvectors X' is wrong by eps / (v_i v_j)^1/2 at most.
    if not (values > 0).all() or _EPS * (1 / values).sum() > _WRONG:
        return None
    return vectors @ ((rotation * values.rsqrt()) @ rotation.mT)


def _orthonormal_pair(a: Tensor, b: Tensor) -> Tensor | None:
    """The same for X = [A B], by an eigenproblem of half the size.

    With C = A^T B = P S Q^T the Gram matrix is I + [0 C; C^T 0] and has the eigenvalues 1 + S and 1 - S. The inverse of its root
    is made of C and of functions of C^T C = Q S^2 Q^T.
    """
    c = a.mT @ b
    squares, rotation = torch.linalg.eigh(upper_gram(c), UPLO="U")
    if not (squares < 1).all() or _EPS * (2 / (1 - squares)).sum() > _WRONG:
        return None
    r = (1 - squares).sqrt()
    # (1 + S)^-1/2 and (1 - S)^-1/2 have the mean 1 + S^2 even, and half of their difference is S odd.
    total = (2 + 2 * r).sqrt()  # of (1 + S)^1/2 and (1 - S)^1/2
    even, odd = ((rotation * values) @ rotation.mT for values in ((1 + 2 * r) / ((1 + r) * r * (total + 2 * r)), 1 / (r * total)))
    projected = a @ c  # A A^T B
    return torch.cat([a + (projected @ even - b @ odd) @ c.mT, b - projected @ odd + b @ (c.mT @ (c @ even))], dim=1)


def _rank(values: Tensor, matrix: Tensor) -> int:
    """How many singular values of a matrix are larger than rounding."""
    return int((values > values.max() * max(matrix.shape) * _EPS).sum()) if len(values) else 0
