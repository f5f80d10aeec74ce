"""A restored model's weights, made while they are read."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from mergekit_pave.calibration.weights import Tensors
from mergekit_pave.emr.restore import Restored


@dataclass(frozen=True, eq=False)
class RestoredWeights:
    """See `calibration.subjects.Weights`."""

    restored: Restored

    def tensors(self) -> Tensors:
        return _RestoredTensors(self.restored)

    def all(self) -> dict[str, Tensor]:
        return dict(self.restored.tensors())


class _RestoredTensors:
    """See `RestoredWeights`."""

    def __init__(self, restored: Restored):
        self._restored = restored
        self.names: Collection[str] = restored.stored.keys()

    def find(self, names: list[str]) -> Tensor | None:
        name = next((name for name in names if name in self.names), None)
        return None if name is None else self._restored.tensor(name)

    def flush(self) -> None:
        """Nothing is kept."""
