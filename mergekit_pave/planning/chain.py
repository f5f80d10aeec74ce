"""The tasks that purify the inputs of one output tensor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from mergekit.common import ModelReference

from mergekit_pave.config import PaveConfig
from mergekit_pave.core.allocation import most_dropped
from mergekit_pave.errors import PaveError
from mergekit_pave.planning.calibration import PlannedCalibration
from mergekit_pave.planning.merge import PlannedTensor
from mergekit_pave.planning.plan import PlannedWeight
from mergekit_pave.tasks.decompose import DecomposeWeight, LoadTail, has_tail
from mergekit_pave.tasks.purify import AllocateRanks, GatherPurified, PurificationStats, PurifyTensor, load_stored


@dataclass(frozen=True)
class Chain:
    """The tasks that purify the inputs of one output tensor.

    Attributes:
        weights: these inputs, with what the cache has of them.
        decompositions: of those that the cache lacks.
    """

    weights: list[PlannedWeight]
    decompositions: list[DecomposeWeight]
    stats: list[PurificationStats]
    gather: GatherPurified


def make_chain(
    config: PaveConfig,
    planned: PlannedTensor,
    weights: list[PlannedWeight],
    calibrations: dict[ModelReference, PlannedCalibration],
) -> Chain:
    """
    Args:
        weights: the inputs of the output tensor that are to be purified.

    Raises:
        PaveError: the target is the task vector, and there is no base model.
    """
    gather = planned.gather
    # Uniform allocation is spectral allocation in which no model may lose more than its fair share.
    moves = config.allocation == "spectral" and len(weights) > 1
    tails, cached, decompositions = [], [], []
    for weight in weights:
        model, calibration = weight.model, calibrations[weight.model]
        if not planned.has_base and config.setting(model, "target") == "task_vector":
            raise PaveError(
                f"pave.target: task_vector needs a base model, and {planned.name} of {model} is merged without one; "
                "give the merge a base_model, or use target: weights"
            )
        tail = LoadTail(
            model=model,
            tensor=weight.tensor,
            folder=str(calibration.tails / weight.tensor.replace("/", "_")),
            count=most_dropped(min(weight.layer.shape), weight.drop) if moves else weight.drop,
            min_tokens=config.least_tokens(model, weight.layer.experts),
            unchanged=weight.unchanged,
        )
        tails.append(tail)
        covariances = str(calibration.folder)
        is_cached = has_tail(Path(tail.folder), tail.count, tail.min_tokens)
        cached.append(replace(weight, cached=is_cached, covariances=covariances))
        if not is_cached:
            decompositions.append(
                DecomposeWeight(
                    model=model,
                    tensor=weight.tensor,
                    weight=load_stored(gather, model),
                    covariances=covariances,
                    layer=weight.layer,
                    regularization=weight.regularization,
                    tail=tail,
                )
            )
    allocation = AllocateRanks(output=planned.name, tails=tuple(tails), shares=tuple(weight.drop for weight in weights))
    purified = {
        weight.model: PurifyTensor(
            model=weight.model,
            tensor=weight.tensor,
            weight=load_stored(gather, weight.model),
            base=load_stored(gather, planned.base) if planned.has_base else None,
            tail=tail,
            allocation=allocation,
            transposed=weight.layer.transposed,
            target=config.setting(weight.model, "target"),
            dtype=gather.weight_info[weight.model].force_dtype or gather.dtype,
        )
        for weight, tail in zip(weights, tails)
    }
    return Chain(
        weights=cached,
        decompositions=decompositions,
        stats=[PurificationStats(model=model, tensor=task.tensor, purify=task) for model, task in purified.items()],
        gather=GatherPurified(weight_info=gather.weight_info, dtype=gather.dtype, device=gather.device, purified=purified),
    )


def each_once(decompositions: list[DecomposeWeight]) -> list[DecomposeWeight]:
    """Of a weight that goes to several output tensors, as in a frankenmerge, the decomposition that has enough for all."""
    largest: dict[str, DecomposeWeight] = {}
    for task in decompositions:
        if task.folder not in largest or largest[task.folder].tail.count < task.tail.count:
            largest[task.folder] = task
    return list(largest.values())
