"""A few eigenvectors of a matrix of which products take long. Vectors are rows, (vectors, n)."""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_pave.core.iteration import Map, orthonormal, outside, random_rows


def leading_by_krylov(apply: Map, n: int, count: int, like: Tensor) -> tuple[Tensor, Tensor] | None:
    """Leading eigenpairs of a positive semidefinite (n, n) operator by block Krylov steps with full orthogonalisation.

    Of all ways this multiplies the fewest vectors by the operator: good where each product takes long.

    Returns:
        `count` eigenvalues, descending, and their vectors (count, n). None if LAPACK on the whole matrix would be no slower, or
        if the eigenvalues lie so close together that the residual does not become small in time.
    """
    # A block finds an eigenvalue at most as often as it has rows.
    width, limit = max(8, count + 1), n // 3
    if 4 * width > limit:
        return None
    basis, images, rank = like.new_empty(limit, n), like.new_empty(limit, n), 0  # of both, `rank` rows are filled
    block = orthonormal(random_rows(width, n, like))
    next_check, before = 3 * width, None
    while rank + len(block) <= limit:
        image = apply(block)
        if not image.isfinite().all():
            return None
        basis[rank : rank + len(block)], images[rank : rank + len(block)] = block, image
        rank += len(block)
        block = orthonormal(outside(image, basis[:rank]))
        if rank < next_check:
            continue
        next_check = 1.25 * rank
        projected = images[:rank] @ basis[:rank].mT
        values, vectors = torch.linalg.eigh((projected + projected.mT) / 2)
        values, vectors = values.flip(0), vectors.flip(1)[:, :count].mT  # (m,), (count, m)
        # || v M - value v || of the Ritz vectors v. Divided by the gap this is the angle of their error at the cut.
        ritz = vectors @ basis[:rank]
        residual = (vectors @ images[:rank] - values[:count, None] * ritz).norm()
        allowed = torch.maximum(1e-5 * (values[count - 1] - values[count]), 1e-9 * values[count - 1])
        if residual <= allowed:
            return values[:count], ritz
        # Residuals fall faster and faster. If twice the present pace would not be enough, this will not end in time.
        rank_before, log_before = before or (rank, 0.0)
        before = rank, (residual / allowed).log().item()
        if log_before and rank + (rank - rank_before) / 2 * before[1] / max(log_before - before[1], 1e-3) > limit:
            return None
    return None
