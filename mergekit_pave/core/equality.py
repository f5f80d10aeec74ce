"""Which matrices of a weight are what they were in the base model: these have no task vector, so there is nothing to purify."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 1 << 22  # elements that are compared at a time


def equal_matrices(weight: Tensor | None, base: Tensor | None) -> tuple[int, ...]:
    """The numbers of the matrices of a weight that have the same values as those of the base model's.

    Args:
        weight: as it is stored: a matrix, number 0, or a stack of those of experts.
        base: likewise, in whichever precision.
    """
    if weight is None or base is None or weight.shape != base.shape:
        return ()
    pairs = zip(weight, base) if weight.dim() == 3 else [(weight, base)]
    return tuple(i for i, (own, other) in enumerate(pairs) if _equal(own, other))


def _equal(left: Tensor, right: Tensor) -> bool:
    rows = max(1, _BLOCK // left.shape[1])
    blocks = [left[:1], *left.split(rows)], [right[:1], *right.split(rows)]
    # A weight that was stored in fewer bits than the base model's has changed by rounding alone.
    return all(torch.equal(own, other.to(own.device, own.dtype)) for own, other in zip(*blocks))
