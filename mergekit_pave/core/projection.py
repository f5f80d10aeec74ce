"""Taking directions out of a weight: W' = W - U_t U_t^T W, in W's own precision, reading W once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mergekit_pave.core.exact import float32_products, in_float64

# Elements of W that are in float32 at a time. On a CPU a block fits its cache, but is large enough to keep several cores busy.
_CPU_BLOCK, _BLOCK = 1 << 19, 1 << 24


def coefficients(weight: Tensor, directions: Tensor, base: Tensor | None = None) -> Tensor:
    """U_t^T W, or U_t^T (W - W_base), (k, d_in), for directions U_t (d_out, k); float32 unless the weight is more precise."""
    precision = torch.promote_types(weight.dtype, torch.float32)
    directions = directions.to(precision)
    result = directions.new_zeros(directions.shape[1], weight.shape[1])
    with float32_products(weight.device):
        for rows in _blocks(weight):
            part = weight[rows].to(precision)
            result.addmm_(directions[rows].mT, part if base is None else part - base[rows].to(precision))
    return result


def drop_components(
    weight: Tensor, directions: Tensor, removed: Tensor, base: Tensor | None = None, *, out: Tensor
) -> tuple[float, float | None]:
    """Write W' = W - U_t R, where R are the `coefficients` of W, or of W - W_base for the target `task_vector`.

    This is one thin product, and a merge with a full cache spends its time here. So it is float32 unless the weight is more
    precise, and W is read once.

    Args:
        weight: W, (d_out, d_in).
        directions: U_t, (d_out, k), orthonormal columns.
        removed: R, (k, d_in).
        base: W_base, (d_out, d_in), if there is one.
        out: where W' goes, (d_out, d_in); it must not overlap with the other tensors.

    Returns:
        The norm of what was removed, ||W' - W||_F, and that of the change, ||W - W_base||_F, or None without a base.
    """
    precision = torch.promote_types(weight.dtype, torch.float32)
    directions, removed = directions.to(precision), removed.to(precision)
    change = 0.0  # squared
    blocks = _blocks(weight)
    # The same memory for all blocks: to get new memory from the system takes longer than the product that is written to it.
    buffers = directions.new_empty(1 if base is None else 2, blocks[0].stop, weight.shape[1])
    with float32_products(weight.device):
        for rows in blocks:
            part = buffers[0, : len(out[rows])].copy_(weight[rows])
            if base is not None:
                change += _square(buffers[1, : len(part)].copy_(base[rows]).sub_(part))
            out[rows] = part.addmm_(directions[rows], removed, alpha=-1)
    # U_t is orthonormal, so what is removed has the norm of its coefficients.
    return math.sqrt(_square(removed)), None if base is None else math.sqrt(change)


def _blocks(weight: Tensor) -> list[slice]:
    """The rows of a (d_out, d_in) weight, a few at a time."""
    elements = _CPU_BLOCK if weight.device.type == "cpu" else _BLOCK
    height = max(1, min(len(weight), elements // weight.shape[1]))
    return [slice(start, start + height) for start in range(0, len(weight), height)]


def _square(x: Tensor) -> float:
    """||x||_F^2, summed in float64, because a sum of a million squares is not exact in float32."""
    return in_float64(torch.linalg.vector_norm(x, dim=1)).square().sum().item()


def matrices(weight: Tensor, transposed: bool) -> Tensor:
    """A view of a weight as a stack of its matrices: (1 or the number of experts, d_out, d_in)."""
    stacked = weight if weight.dim() == 3 else weight[None]
    return stacked.mT if transposed else stacked
