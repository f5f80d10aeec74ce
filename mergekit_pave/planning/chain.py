"""The tasks that purify the inputs of one output tensor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mergekit.common import ModelReference

from mergekit_pave.config import PaveConfig
from mergekit_pave.core.allocation import most_dropped
from mergekit_pave.errors import PaveError
from mergekit_pave.planning.merge import PlannedTensor
from mergekit_pave.planning.plan import Plan, PlannedWeight
from mergekit_pave.planning.source import Source
from mergekit_pave.tasks.decompose import DecomposeWeight, LoadTail, has_tail
from mergekit_pave.tasks.purify import AllocateRanks, GatherPurified, PurificationStats, PurifyTensor, load_stored


def add_tensor(
    plan: Plan,
    config: PaveConfig,
    planned: PlannedTensor,
    place: int,
    weights: list[PlannedWeight],
    sources: dict[ModelReference, Source],
) -> None:
    """Add the tasks that purify one output tensor's inputs.

    Raises:
        PaveError: the target is the task vector, and there is no base model.
    """
    gather = planned.gather
    has_base = planned.base is not None and planned.base in gather.weight_info
    # Uniform allocation is spectral allocation in which no model may lose more than its fair share.
    moves = config.allocation == "spectral" and len(weights) > 1
    tails = []
    for weight in weights:
        model, source = weight.model, sources[weight.model]
        if not has_base and config.setting(model, "target") == "task_vector":
            raise PaveError(
                f"pave.target: task_vector needs a base model, and {planned.name} of {model} is merged without one; "
                "give the merge a base_model, or use target: weights"
            )
        tail = LoadTail(
            model=model,
            tensor=weight.tensor,
            folder=str(source.tail_folder(weight.tensor)),
            count=most_dropped(min(weight.layer.shape), weight.drop) if moves else weight.drop,
            min_tokens=config.least_tokens(model, weight.layer.experts),
            unchanged=weight.unchanged,
        )
        tails.append(tail)
        covariances = source.calibration.folder
        cached = has_tail(Path(tail.folder), tail.count, tail.min_tokens)
        plan.weights.append(replace(weight, cached=cached, covariances=covariances))
        if not cached:
            plan.decompositions.append(
                DecomposeWeight(
                    model=model,
                    tensor=weight.tensor,
                    weight=load_stored(gather, model),
                    covariances=covariances,
                    layer=weight.layer,
                    regularization=weight.regularization,
                    folder=tail.folder,
                    count=tail.count,
                    min_tokens=tail.min_tokens,
                )
            )
    allocation = AllocateRanks(output=planned.name, tails=tuple(tails), shares=tuple(weight.drop for weight in weights))
    purified = {}
    for weight, tail in zip(weights, tails):
        model = weight.model
        purify = purified[model] = PurifyTensor(
            model=model,
            tensor=weight.tensor,
            weight=load_stored(gather, model),
            base=load_stored(gather, planned.base) if has_base else None,
            tail=tail,
            allocation=allocation,
            transposed=weight.layer.transposed,
            target=config.setting(model, "target"),
            dtype=gather.weight_info[model].force_dtype or gather.dtype,
        )
        plan.stats.append(PurificationStats(model=model, tensor=weight.tensor, purify=purify))
    plan.gathers[place] = GatherPurified(
        weight_info=gather.weight_info, dtype=gather.dtype, device=gather.device, purified=purified
    )
