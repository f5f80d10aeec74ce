"""Memory for large tensors."""

from __future__ import annotations

import contextlib
import math
import mmap

import torch
from torch import Tensor

_HUGE_PAGE = 1 << 21  # bytes, on x86-64 and mostly on ARM


def empty_in_huge_pages(like: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor with the shape and device of another, contiguous.

    Linux hands out new memory in pages of 4 KB and clears each when it is first written to. For a tensor that is written once
    this takes about as long as a thin product; in pages of 2 MB, which have to be asked for, a fraction of it.
    """
    size = math.prod(like.shape) * dtype.itemsize
    if like.device.type != "cpu" or size < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(like.shape, dtype=dtype, device=like.device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # returned when the tensor is let go
    with contextlib.suppress(OSError):  # a kernel that was built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(like.shape)
