"""Models to be run: where their weights come from."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor

from mergekit_pave.calibration.architecture import Architecture
from mergekit_pave.calibration.lockstep import Loads, WholeModel
from mergekit_pave.calibration.models import load_tensors
from mergekit_pave.calibration.weights import Checkpoint, StreamedModel, Tensors, stored_weights


class Weights(Protocol):
    """The weights of a model, to be read in parts or all at once."""

    def tensors(self) -> Tensors:
        """
        Raises:
            UnknownWeightError: they cannot be read in parts.
        """

    def all(self) -> dict[str, Tensor]:
        """All of them, by their names in a checkpoint."""


@dataclass(frozen=True)
class Stored:
    """The weights in a folder."""

    folder: str

    def tensors(self) -> Tensors:
        return Checkpoint(self.folder)

    def all(self) -> dict[str, Tensor]:
        return dict(stored_weights(self.folder))


@dataclass(frozen=True)
class WithHead:
    """The backbone of one model under the head of another.

    Attributes:
        architecture: of the model that the head is from.
    """

    backbone: Weights
    head: Weights
    architecture: Architecture

    def tensors(self) -> Tensors:
        return _TwoTensors(self.backbone.tensors(), self.head.tensors(), self.architecture)

    def all(self) -> dict[str, Tensor]:
        heads = {name: tensor for name, tensor in self.head.all().items() if not self.architecture.is_of_backbone(name)}
        return heads | {name: tensor for name, tensor in self.backbone.all().items() if self.architecture.is_of_backbone(name)}


class _TwoTensors:
    """See `WithHead`."""

    def __init__(self, backbone: Tensors, head: Tensors, architecture: Architecture):
        self._backbone, self._head, self._architecture = backbone, head, architecture
        self.names: Collection[str] = {*backbone.names, *head.names}

    def find(self, names: list[str]) -> Tensor | None:
        return (self._backbone if self._architecture.is_of_backbone(names[0]) else self._head).find(names)

    def flush(self) -> None:
        self._backbone.flush()
        self._head.flush()


@dataclass(frozen=True)
class Subject:
    """A model to be run.

    Attributes:
        name: for messages.
        cls, config: transformers'.
    """

    name: str
    cls: Any
    config: transformers.PretrainedConfig
    weights: Weights

    def streamed(self, dtype: torch.dtype, device: str) -> Loads:
        """The model with weights that come and go.

        Raises:
            UnknownWeightError: it has to be loaded whole.
        """
        return StreamedModel(self.cls, self.config, self.weights.tensors(), dtype, device)

    def whole(self, device: str) -> Loads:
        """The model with all of its weights.

        Raises:
            PaveError: some are missing.
        """
        return WholeModel(load_tensors(self.cls, self.config, self.weights.all(), device, self.name, with_head=True))
