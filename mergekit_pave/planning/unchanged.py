"""Weights that stay as they are because of what is known of them: they equal the base model's, or calibration missed them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Optional

from mergekit.common import ModelReference
from mergekit.io.tasks import GatherTensors
from torch import Tensor

from mergekit_pave import cache
from mergekit_pave.core.reasons import NEVER_CALLED, UNCHANGED
from mergekit_pave.planning.merge import Environment, PlannedTensor
from mergekit_pave.planning.plan import PlannedWeight
from mergekit_pave.planning.source import Source
from mergekit_pave.tasks.calibrate import CalibrateModel, GivenCovariance
from mergekit_pave.tasks.purify import load_stored


def leave_unchanged(
    chosen: dict[int, list[PlannedWeight]],
    tensors: list[PlannedTensor],
    sources: dict[ModelReference, Source],
    reasons: dict[ModelReference, dict[str, str]],
    environment: Environment,
) -> bool:
    """Take out what equals the base model's. Returns whether all of it is known."""
    pairs: dict[tuple[ModelReference, ModelReference], dict[str, Callable]] = {}
    bases: dict[int, ModelReference] = {
        place: tensors[place].base for place in chosen if tensors[place].base in tensors[place].gather.weight_info
    }
    for place, base in bases.items():
        gather = tensors[place].gather
        for weight in chosen[place]:
            read = functools.partial(_read_both, gather, weight.model, base)
            pairs.setdefault((weight.model, base), {})[_pair_name(weight, gather, base)] = read
    comparisons, identities = {}, {}
    for (model, base), of_models in pairs.items():
        if base not in identities:
            checkpoint = environment.checkpoint(base)
            identities[base] = cache.weights_identity(checkpoint.folder, list(checkpoint.files.values()))
        comparison = sources[model].comparison(identities[base], str(base))
        if environment.compares:
            files = [*environment.checkpoint(model).files.values(), *checkpoint.files.values()]
            keep_all = not all(file.endswith(".safetensors") for file in files)
            comparison.compare(of_models, environment.runtime.quiet, keep_all)
        comparisons[model, base] = comparison
    for place, base in bases.items():
        for weight in list(chosen[place]):
            equal = comparisons[weight.model, base].known(_pair_name(weight, tensors[place].gather, base))
            if len(equal) == len(weight.layer.layers):
                chosen[place].remove(weight)
                reasons[weight.model][weight.tensor] = UNCHANGED
            elif equal:
                experts = tuple(weight.layer.experts[i] for i in equal)
                chosen[place][chosen[place].index(weight)] = replace(weight, unchanged=experts)
    return environment.compares or not pairs


def _read_both(gather: GatherTensors, *models: ModelReference) -> list[Optional[Tensor]]:
    tasks = [load_stored(gather, model).model_copy(update={"device": None}) for model in models]
    return [task.execute() for task in tasks]


def _pair_name(weight: PlannedWeight, gather: GatherTensors, base: ModelReference) -> str:
    """In a frankenmerge a weight may be merged with that of another layer of the base model."""
    other = gather.weight_info[base].name
    return weight.tensor if other == weight.tensor else f"{weight.tensor} / {other}"


def leave_never_called(
    model: ModelReference,
    calibration: CalibrateModel | GivenCovariance,
    chosen: dict[int, list[PlannedWeight]],
    reasons: dict[str, str],
) -> None:
    """What calibration does not reach is known beforehand where the covariances are in the cache."""
    if calibration.is_done:
        missed = set(calibration.never_called())
        for weights in chosen.values():
            for weight in [weight for weight in weights if weight.model == model and weight.layer in missed]:
                weights.remove(weight)
                reasons[weight.tensor] = NEVER_CALLED
