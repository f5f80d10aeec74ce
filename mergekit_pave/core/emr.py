"""EMR-Merging (Huang et al., arXiv 2405.17461): one change for all models, and for each model a mask and a scale.

With τᵢ = Wᵢ - W_base, entry by entry,

    γ = sign Σ τᵢ        τ = γ max {|τᵢ| : τᵢ γ > 0}        Mᵢ = [τᵢ γ > 0]

and over all entries of all tensors λᵢ = Σ |τᵢ| / Σ |Mᵢ τ|. Model i is then restored as W_base + λᵢ Mᵢ τ.

What is stored is W = W_base + τ in the precision of the merge. So τ is taken from there, also for λᵢ: it is what restoring adds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from mergekit_pave.core.exact import in_float64

_BITS = 8  # masks in a byte
_IN_CACHE, _ON_DEVICE = 2**17, 2**24  # multiples of it


@dataclass(frozen=True)
class Sums:
    """Sums over entries, which add up over tensors.

    Attributes:
        size: of |τᵢ|.
        kept: of |Mᵢ τ|.
        change: of (Wᵢ - W_base)², where Wᵢ is the model before anything was purified.
        product: of Mᵢ τ (Wᵢ - W_base).
        square: of Mᵢ τ².
        agreed: of Mᵢ.
        entries: of 1.
    """

    size: float = 0.0
    kept: float = 0.0
    change: float = 0.0
    product: float = 0.0
    square: float = 0.0
    agreed: float = 0.0
    entries: int = 0

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(a + b for a, b in zip(astuple(self), astuple(other))))

    @property
    def scale(self) -> float:
        """λᵢ. 1 where no entry of the model agrees with the others, as with a model that equals the base."""
        return self.size / self.kept if self.kept else 1.0

    @property
    def distance(self) -> float | None:
        """‖W_base + λᵢ Mᵢ τ - Wᵢ‖ / ‖Wᵢ - W_base‖; None where nothing has changed."""
        if not self.change:
            return None
        square = self.change - 2 * self.scale * self.product + self.scale**2 * self.square
        return math.sqrt(max(0.0, square) / self.change)


def unify(
    base: Tensor, models: Sequence[Tensor], dtype: torch.dtype, originals: Sequence[Tensor] | None = None
) -> tuple[Tensor, list[Tensor], list[Sums]]:
    """Merge one tensor of all models.

    Args:
        base: W_base, of any shape and device.
        models: Wᵢ, each of the same shape.
        dtype: of the merged tensor.
        originals: the models before they were purified, if they were.

    Returns:
        W in `dtype`; for each model its mask as `pack` makes it, and its sums.
    """
    merged = torch.empty(base.shape, dtype=dtype, device=base.device)
    masks = [torch.empty(packed_size(base.numel()), dtype=torch.uint8, device=base.device) for _ in models]
    sums = [in_float64(torch.zeros(6, device=base.device)) for _ in models]
    for part in _parts(base):
        start = in_float64(base.reshape(-1)[part])
        changes = [in_float64(model.reshape(-1)[part]) - start for model in models]
        sign = sum(changes).sign_()
        along = [change * sign for change in changes]  # above 0 where the mask is set
        largest = functools.reduce(torch.maximum, along).clamp_(min=0)
        merged.view(-1)[part] = (start + sign * largest).to(merged)
        stored = in_float64(merged.view(-1)[part]) - in_float64(base.reshape(-1)[part].to(dtype))
        for i, change in enumerate(changes):
            agreed = along[i] > 0
            masks[i][_packed(part)] = pack(agreed).to(base.device)
            own = change if originals is None else in_float64(originals[i].reshape(-1)[part]) - start
            sums[i] += _sums(change, own, stored * agreed, agreed)
    return merged, masks, [Sums(*found, entries=base.numel()) for found in (of_model.tolist() for of_model in sums)]


def _sums(change: Tensor, own: Tensor, kept: Tensor, agreed: Tensor) -> Tensor:
    """The first of `Sums`, on the device: numbers are only waited for once the tensor is done."""
    norms = [torch.linalg.vector_norm(of, ord=1) for of in (change, kept)]
    return torch.stack([*norms, own.dot(own), own.dot(kept), kept.dot(kept), agreed.sum().to(own)])


def restore(base: Tensor, merged: Tensor, mask: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """One tensor of model i, in the shape and the type of `merged`.

    Difference, product and sum are rounded one by one, so that the result is the same bit for bit on every processor. A mask's
    byte is looked up as eight factors, 0 or λ, which takes a third of the time of unpacking it.

    Args:
        base: W_base; it is taken in the type of `merged`.
        merged: W.
        mask: Mᵢ, packed, where `merged` is.
        scale: λᵢ.
        out: is overwritten; a contiguous tensor like `merged`.
    """
    out = torch.empty_like(merged) if out is None else out
    exact = torch.float64 if merged.dtype == torch.float64 else torch.float32
    of_byte = _bits().to(merged.device, exact) * scale
    starts, ends = base.reshape(-1), merged.reshape(-1)
    parts = list(_parts(merged, 2))
    # Memory that is asked for again and again is zeroed by the system each time, which would take as long as everything else.
    width = -(-max((part.stop - part.start for part in parts), default=0) // _BITS) * _BITS
    room = torch.empty(3, width, dtype=exact, device=merged.device)
    for part in parts:
        start, change, factors = room[:, : part.stop - part.start]
        start.copy_(starts[part].to(merged.dtype))
        change.copy_(ends[part]).sub_(start)
        rows = mask[_packed(part)].int()
        torch.index_select(of_byte, 0, rows, out=room[2, : len(rows) * _BITS].view(-1, _BITS))
        out.view(-1)[part] = change.mul_(factors).add_(start)
    return out


@functools.cache
def _bits() -> Tensor:
    """The eight entries that each byte of a mask stands for, (256, 8)."""
    return unpack(torch.arange(256, dtype=torch.uint8, device="cpu"), 256 * _BITS).view(256, _BITS)


# Eight booleans are an integer of 64 bits. This factor brings the lowest bit of each byte into the highest byte, and no two
# products meet anywhere.
_GATHER = 0x0102040810204080
# Copies a byte into each of eight; then each of these keeps another bit.
_COPY, _EACH = 0x0101010101010101, 0x8040201008040201 - 2**64


def packed_size(entries: int) -> int:
    """Bytes of a packed mask of so many entries."""
    return -(-entries // _BITS)


def pack(mask: Tensor) -> Tensor:
    """Eight entries of a mask in a byte, the first in its lowest bit.

    Args:
        mask: booleans, (n,).

    Returns:
        Bytes, (⌈n / 8⌉,).
    """
    if len(mask) % _BITS:
        mask = torch.nn.functional.pad(mask, (0, -len(mask) % _BITS))
    return (mask.view(torch.int64) * _GATHER >> 56).to(torch.uint8)  # of a negative number, too, the last eight bits


def unpack(packed: Tensor, size: int) -> Tensor:
    """The first `size` entries of a mask that `pack` has packed, as booleans."""
    return (packed.to(torch.int64).mul_(_COPY).bitwise_and_(_EACH).view(torch.uint8) != 0)[:size]


def _parts(tensor: Tensor, times: int = 1) -> Iterator[slice]:
    """Entries that are worked on together: on a CPU as many as its cache holds, or some times that if they are small or few."""
    size = times * _IN_CACHE if tensor.device.type == "cpu" else _ON_DEVICE
    for start in range(0, tensor.numel(), size):
        yield slice(start, min(start + size, tensor.numel()))


def _packed(part: slice) -> slice:
    """The bytes that hold the masks of some entries."""
    return slice(part.start // _BITS, packed_size(part.stop))
