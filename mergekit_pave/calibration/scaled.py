"""A merge with another λ than it was made with: its weights are scaled while they are read."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from mergekit_pave.calibration.subjects import Weights
from mergekit_pave.calibration.weights import Tensors


@dataclass(frozen=True)
class Scaled:
    """Weights base + ratio (merged - base), in the precision of the merge.

    Attributes:
        base, merged: have tensors of the same names and shapes.
    """

    base: Weights
    merged: Weights
    ratio: float

    def tensors(self) -> Tensors:
        return _ScaledTensors(self, self.base.tensors(), self.merged.tensors())

    def all(self) -> dict[str, Tensor]:
        base = self.base.all()
        return {name: self.scale(base[name], tensor) for name, tensor in self.merged.all().items()}

    def scale(self, base: Tensor, merged: Tensor) -> Tensor:
        """One tensor. Sums are float64, so that it is rounded once."""
        if not merged.is_floating_point():
            return merged
        start = base.double()
        return (start + self.ratio * (merged.double() - start)).to(merged.dtype)


class _ScaledTensors:
    """See `Scaled`."""

    def __init__(self, scaled: Scaled, base: Tensors, merged: Tensors):
        self._scaled, self._base, self._merged = scaled, base, merged
        self.names: Collection[str] = merged.names

    def find(self, names: list[str]) -> Tensor | None:
        merged = self._merged.find(names)
        return None if merged is None else self._scaled.scale(self._base.find(names), merged)

    def flush(self) -> None:
        self._base.flush()
        self._merged.flush()
