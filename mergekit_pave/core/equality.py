"""Which matrices of a weight equal the base model's. These have no task vector, so there is nothing to purify."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 1 << 22  # elements that are compared at a time


def equal_matrices(weight: Tensor | None, base: Tensor | None) -> tuple[int, ...]:
    """The numbers of those matrices of a weight that have the same values in the base model.

    Args:
        weight: as it is stored: one matrix, whose number is 0, or a stack of the matrices of experts.
        base: the base model's weight, in any precision.
    """
    if weight is None or base is None or weight.shape != base.shape:
        return ()
    pairs = zip(weight, base) if weight.dim() == 3 else [(weight, base)]
    return tuple(i for i, pair in enumerate(pairs) if _equal(*pair))


def _equal(matrix: Tensor, base: Tensor) -> bool:
    rows = max(1, _BLOCK // matrix.shape[1])
    # The first row alone comes first: where a weight has changed, this row tells, and the rest is never read.
    blocks, of_base = [matrix[:1], *matrix.split(rows)], [base[:1], *base.split(rows)]
    # A weight that is stored in fewer bits than the base model's may have changed by rounding alone. That counts as equal.
    return all(torch.equal(block, other.to(block.device, block.dtype)) for block, other in zip(blocks, of_base))
