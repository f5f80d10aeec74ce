"""Attention masks that take little memory while a batch waits between two blocks.

A mask has a number for each pair of tokens, and a suspended forward pass keeps it. For long samples this is more than all of the
hidden states. Along a row a mask changes a few times at most, and so do T5's biases by distance. So only runs of equal numbers
are kept. Each function that computes with the mask gets it in full, the same bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

_SMALL = 1 << 14  # numbers of one head and one sample: smaller masks are not worth packing
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ABOUT = {Tensor.dim, Tensor.size, Tensor.numel, Tensor.is_floating_point} | {
    getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_meta")
}


class PackedMask(Tensor):
    """A tensor (samples, heads, queries, keys) that is kept as runs of equal numbers. Functions get the tensor in full."""

    _runs: list[tuple[Tensor, Tensor]]  # for each head of each sample, in main memory: the numbers as bits, and their counts
    _changed: Tensor | None

    @staticmethod
    def of(mask: Tensor) -> Tensor:
        """The mask packed, or as it is if packing would save little."""
        if isinstance(mask, PackedMask) or mask.dim() != 4 or mask.shape[-1] * mask.shape[-2] < _SMALL:
            return mask
        runs = []
        for head in (head for sample in mask for head in sample):
            flat = head.reshape(-1)
            bits = flat.view(_BITS[flat.itemsize])
            starts = (bits[1:] != bits[:-1]).nonzero()[:, 0] + 1
            if starts.numel() * 4 * (4 + flat.itemsize) > flat.numel() * flat.itemsize:
                return mask
            starts = torch.cat((starts.new_zeros(1), starts))
            lengths = starts.diff(append=starts.new_tensor([flat.numel()]))
            runs.append((bits[starts].cpu(), lengths.to("cpu", torch.int32)))
        packed = Tensor._make_wrapper_subclass(PackedMask, mask.shape, dtype=mask.dtype, device=mask.device)
        packed._runs, packed._changed = runs, None
        return packed

    def full(self) -> Tensor:
        """The tensor in full."""
        if self._changed is not None:
            return self._changed
        with torch._C.DisableTorchFunctionSubclass():
            shape, dtype, device = self.shape, self.dtype, self.device
        full = torch.empty(shape, dtype=dtype, device=device)
        for head, (bits, lengths) in zip(full.flatten(0, 1), self._runs):
            # NumPy does this fifty times as fast as torch.
            repeated = torch.from_numpy(np.repeat(bits.numpy(), lengths.numpy()))
            head.copy_(repeated.view(dtype).view(shape[2:]))
        return full

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        full = {id(packed): (packed, packed.full()) for packed in tree_leaves((args, kwargs)) if isinstance(packed, cls)}
        versions = {key: tensor._version for key, (_, tensor) in full.items()}
        args, kwargs = tree_map_only(cls, lambda packed: full[id(packed)][1], (args, kwargs))
        result = func(*args, **kwargs)
        for key, (packed, tensor) in full.items():
            if tensor._version != versions[key]:  # the function has written to it
                packed._changed = tensor
        return result

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """For operations that reach the tensor below the level of `__torch_function__`."""
        return func(*tree_map_only(cls, cls.full, args), **tree_map_only(cls, cls.full, kwargs or {}))


def pack(values: Any) -> Any:
    """The outputs of a block, with the masks among them packed."""
    return tree_map_only(Tensor, PackedMask.of, values)


@contextlib.contextmanager
def packed_masks() -> Iterator[None]:
    """Within this context transformers makes packed masks."""

    def packing(make: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: pack(make(*args, **kwargs))

    before = dict(ALL_MASK_ATTENTION_FUNCTIONS._local_mapping)
    for name, make in dict(ALL_MASK_ATTENTION_FUNCTIONS).items():
        ALL_MASK_ATTENTION_FUNCTIONS[name] = packing(make)
    try:
        yield
    finally:
        ALL_MASK_ATTENTION_FUNCTIONS._local_mapping = before
