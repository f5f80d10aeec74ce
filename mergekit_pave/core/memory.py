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

    Linux provides new memory in pages of 4 KB and clears each page when it is first written to. For a tensor that is written
    once, this takes about as long as a thin product. In pages of 2 MB, which a program has to ask for, it takes a fraction.
    """
    num_bytes = math.prod(like.shape) * dtype.itemsize
    if like.device.type != "cpu" or num_bytes < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(like.shape, dtype=dtype, device=like.device)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # freed with the tensor
    with contextlib.suppress(OSError):  # the kernel was built without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(like.shape)
