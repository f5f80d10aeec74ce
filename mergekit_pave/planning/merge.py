"""A merge as mergekit has planned it, and what its run has to offer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Optional

from mergekit.common import ModelReference
from mergekit.io.tasks import GatherTensors

from mergekit_pave.cache.checkpoint import Checkpoint
from mergekit_pave.calibration.job import Runtime


@dataclass(frozen=True)
class PlannedTensor:
    """One output tensor as mergekit has planned it.

    Attributes:
        name: its name in the output.
        gather: the task that gathers its inputs, or None where mergekit does more than gather (vocabularies).
        models: the models in the order of the config.
        base: the base model of this tensor.
        t: its place in its slice, for gradients.
        data_share: how much of regmean's metric is to be C, if that is the merge method.
    """

    name: str
    gather: Optional[GatherTensors]
    models: tuple[ModelReference, ...]
    base: Optional[ModelReference]
    t: float
    data_share: Optional[float] = None


@dataclass(frozen=True)
class Environment:
    """What a run has to offer: options of the command, and checkpoints.

    Attributes:
        reads: the tensors that a merge of whole models would read of one, each with all names that it may have.
        compares: weights may be read, to find those that equal the base model's.
        merge_method: the name of the method.
    """

    runtime: Runtime
    transformers_cache: Optional[str]
    checkpoint: Callable[[ModelReference], Checkpoint]
    reads: Callable[[ModelReference], list[list[str]]]
    compares: bool
    merge_method: str
