"""Ranks over the models of one output tensor, W' of each, and mergekit's gather with these among its inputs."""

from __future__ import annotations

from typing import Any, Optional

from mergekit.common import ImmutableMap, ModelReference, dtype_from_name
from mergekit.graph import Task
from mergekit.io.tasks import GatherTensors, LoadTensor
from torch import Tensor

from mergekit_pave.core.allocation import allocate_ranks
from mergekit_pave.core.failures import advising
from mergekit_pave.core.purification import purify_weight
from mergekit_pave.errors import PaveError
from mergekit_pave.tasks.base import TensorTask
from mergekit_pave.tasks.decompose import LoadTail


class AllocateRanks(Task[dict]):
    """How many components each model drops of one output tensor.

    An expert is allocated over those models in which it has a tail. No model drops more than the `count` of its `LoadTail`.

    Value: by model, one number for each of the slices in its tail.

    Attributes:
        tails: one for each model.
        shares: what each of the models would drop on its own.
    """

    output: str
    tails: tuple[LoadTail, ...]
    shares: tuple[int, ...]

    def __hash__(self) -> int:
        return hash((AllocateRanks, self.output))

    def arguments(self) -> dict[str, Task]:
        return {str(place): tail for place, tail in enumerate(self.tails)}

    def group_label(self) -> Optional[str]:
        return self.tails[-1].group_label()

    def execute(self, **tails: dict[str, Any]) -> dict[ModelReference, list[int]]:
        values = [tails[str(place)] for place in range(len(self.tails))]
        experts: dict[Any, list[tuple[int, int]]] = {}  # by expert: (place of the model, number of the slice)
        for place, tail in enumerate(values):
            for i, of_slice in enumerate(tail["slices"]):
                experts.setdefault(of_slice["expert"], []).append((place, i))
        drops = [[0] * len(tail["slices"]) for tail in values]
        for of_expert in experts.values():
            spectra = [_spectrum(values[place], i) for place, i in of_expert]
            shares, caps = [self.shares[place] for place, _ in of_expert], [self.tails[place].count for place, _ in of_expert]
            for (place, i), drop in zip(of_expert, allocate_ranks(spectra, shares, caps)):
                drops[place][i] = drop
        return {task.model: of_model for task, of_model in zip(self.tails, drops)}


def _spectrum(tail: dict[str, Any], i: int) -> list[float]:
    """The singular values in the tail of one matrix over its largest, ascending."""
    return (tail["values"][i] / (tail["slices"][i]["largest"] or 1.0)).tolist()


class PurifyTensor(TensorTask):
    """W' of one weight. Value: see `purify_weight`."""

    weight: LoadTensor
    base: Optional[LoadTensor]
    tail: LoadTail
    allocation: AllocateRanks
    transposed: bool
    target: str
    dtype: Optional[str]

    def arguments(self) -> dict[str, Task]:
        inputs = {"weight": self.weight, "tail": self.tail, "allocation": self.allocation}
        return inputs | ({"base": self.base} if self.base else {})

    def execute(self, weight: Tensor, tail: dict, allocation: dict, base: Optional[Tensor] = None) -> dict[str, Any]:
        if self.target == "task_vector" and base is None:
            raise PaveError(f"{self.model}: {self.tensor} is not in the base model; put it under pave.exclude")
        with advising(f"{self.model}: purifying {self.tensor}", weight.device):
            return purify_weight(
                weight,
                base,
                tail,
                allocation[self.model],
                transposed=self.transposed,
                target=self.target,
                dtype=dtype_from_name(self.dtype) or weight.dtype,
                row={"tensor": self.tensor, "output": self.allocation.output, "model": str(self.model)},
            )


class PurificationStats(TensorTask):
    """What purification did to one weight.

    Value: {rows: of the report, one for each matrix, left_as_they_are: see `purify_weight`}.
    """

    purify: PurifyTensor

    def arguments(self) -> dict[str, Task]:
        return {"purified": self.purify}

    def priority(self) -> int:
        # It runs at once, so that the purified tensor is not kept in memory for it.
        return 100

    def uses_accelerator(self) -> bool:
        return False

    def execute(self, purified: dict[str, Any]) -> dict[str, Any]:
        return {"rows": purified["stats"], "left_as_they_are": purified["left_as_they_are"]}


class GatherPurified(GatherTensors):
    """mergekit's gather, with some of its inputs purified. Inputs are read as stored and cast here."""

    purified: ImmutableMap[ModelReference, PurifyTensor]

    def arguments(self) -> dict[str, Task]:
        return {
            f"{model}:{info.name}": self.purified[model] if model in self.purified else load_stored(self, model)
            for model, info in self.weight_info.items()
        }

    def execute(self, **kwargs) -> dict[ModelReference, Tensor]:
        tensors = super().execute(**tensors_of(kwargs))
        for model, tensor in tensors.items():
            dtype = self.weight_info[model].force_dtype or self.dtype
            tensors[model] = tensor.to(dtype_from_name(dtype)) if dtype else tensor
        return tensors


def tensors_of(inputs: dict[str, Any]) -> dict[str, Optional[Tensor]]:
    """The tensors alone. Some of the inputs are values of `PurifyTensor`, which hold statistics beside the tensor."""
    return {key: value["tensor"] if isinstance(value, dict) else value for key, value in inputs.items()}


def load_stored(gather: GatherTensors, model: ModelReference) -> LoadTensor:
    """The task that reads one of a gather's tensors in the precision in which it is stored."""
    info = gather.weight_info[model]
    return LoadTensor(
        model=model,
        tensor=info.name,
        device=gather.device,
        optional=info.optional,
        aliases=info.aliases,
        tied_names=info.tied_names,
    )
