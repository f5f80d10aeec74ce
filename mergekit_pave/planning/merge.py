"""A merge as mergekit has planned it, with the options of the command that runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Optional

from mergekit.common import ModelReference
from mergekit.io.tasks import GatherTensors
from transformers import PretrainedConfig

from mergekit_pave.cache.checkpoint import Checkpoint
from mergekit_pave.calibration.architecture import Architecture
from mergekit_pave.calibration.job import Runtime


@dataclass(frozen=True)
class PlannedTensor:
    """One output tensor as mergekit has planned it.

    Attributes:
        name: its name in the output.
        gather: the task that gathers its inputs, or None where mergekit does more than gather (vocabularies).
        models: the models in the order of the config.
        base: the base model of this tensor.
        t: its position in its slice, from 0 to 1, for gradients.
        names: all names that the output's tensor may have.
        data_share: how much of regmean's metric is to be C; None with any other merge method.
        weights: the `weight` of each fine-tuned model; the same for all where the method has none, or none is given.
        scale: regmean's `lambda`; 1 with any other merge method.
    """

    name: str
    gather: Optional[GatherTensors]
    models: tuple[ModelReference, ...]
    base: Optional[ModelReference]
    t: float
    names: tuple[str, ...]
    data_share: Optional[float] = None
    weights: dict[ModelReference, float] = field(default_factory=dict)
    scale: float = 1.0

    @property
    def fine_tuned(self) -> list[ModelReference]:
        """The models without the base model."""
        return [model for model in self.models if model != self.base]

    @property
    def has_base(self) -> bool:
        """Whether the base model's tensor is among the inputs."""
        return self.gather is not None and self.base in self.gather.weight_info


@dataclass(frozen=True)
class Reading:
    """How models are read.

    Attributes:
        checkpoint: gives the checkpoint of a model.
        generates: models may write their own samples (`data: generated`) meanwhile. Otherwise only the cache is asked.
    """

    runtime: Runtime
    transformers_cache: Optional[str]
    checkpoint: Callable[[ModelReference], Checkpoint]
    generates: bool


@dataclass(frozen=True)
class Merge(Reading):
    """A merge as mergekit has planned it, with the options of the command that runs it.

    Attributes:
        method: the name of the merge method.
        config: that of the merged model.
        tokenizer: the model whose tokenizer the merged model gets; None where it gets a new one, whose token ids may be others.
        tensors: all output tensors. A tensor's number, in this list, identifies it everywhere in the plan.
        names_read: gives, for each tensor of a model that a merge of whole models reads, all names that it may have.
        architecture: gives the architecture of a model.
        out_dtype: the precision that the merged model is written in; None where it is that of the inputs.
        base_only: the output tensors that `emr` takes from the base alone, with the reason.
        compares: weights may be read to find those that equal the base model's. Otherwise only the cache is asked.
        warnings: what is odd about the config itself.
    """

    method: str
    config: PretrainedConfig
    tokenizer: Optional[ModelReference]
    tensors: list[PlannedTensor]
    names_read: Callable[[ModelReference], list[list[str]]]
    architecture: Callable[[ModelReference], Architecture]
    out_dtype: Optional[str]
    base_only: dict[str, str]
    compares: bool
    warnings: list[str]

    @property
    def is_regmean(self) -> bool:
        return any(tensor.data_share is not None for tensor in self.tensors)

    @property
    def inputs(self) -> list[ModelReference]:
        """Every model that is read, each once."""
        return list(dict.fromkeys(model for tensor in self.tensors for model in (*tensor.models, tensor.base) if model))
