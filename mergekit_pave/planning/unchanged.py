"""Weights that stay as they are because of their values: they equal the base model's, or calibration does not reach them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Optional

from mergekit.common import ModelReference
from mergekit.io.tasks import GatherTensors
from torch import Tensor

from mergekit_pave import cache
from mergekit_pave.cache.comparison import Comparison
from mergekit_pave.config import PaveConfig
from mergekit_pave.core.reasons import NEVER_CALLED, UNCHANGED
from mergekit_pave.planning.merge import Merge, PlannedTensor
from mergekit_pave.planning.plan import PlannedWeight, Reasons
from mergekit_pave.planning.source import Source, weights_identity
from mergekit_pave.tasks.calibrate import CalibrateModel, GivenCovariance
from mergekit_pave.tasks.purify import load_stored


@dataclass(frozen=True)
class Compared:
    """The weights that remain to be purified once those that equal the base model's are left out.

    Attributes:
        is_complete: it is known of all weights whether they equal the base model's.
    """

    weights: list[PlannedWeight]
    reasons: Reasons
    is_complete: bool


def leave_unchanged(
    config: PaveConfig, merge: Merge, weights: list[PlannedWeight], sources: dict[ModelReference, Source]
) -> Compared:
    """Leave out the weights that equal the base model's, and mark the experts that do."""
    pairs: dict[tuple[ModelReference, ModelReference], dict[str, Callable]] = {}
    for weight in weights:
        planned = merge.tensors[weight.number]
        if planned.has_base:
            read = functools.partial(_read_both, planned.gather, weight.model, planned.base)
            pairs.setdefault((weight.model, planned.base), {})[_pair_name(weight, planned)] = read
    comparisons = _compare(config, merge, pairs, sources)
    changed: list[PlannedWeight] = []
    reasons: Reasons = {}
    for weight in weights:
        planned = merge.tensors[weight.number]
        equal = comparisons[weight.model, planned.base].equal_to_base(_pair_name(weight, planned)) if planned.has_base else ()
        if len(equal) == len(weight.layer.layers):
            reasons.setdefault(weight.model, {})[weight.tensor] = UNCHANGED
        else:
            experts = tuple(weight.layer.experts[i] for i in equal)
            changed.append(replace(weight, unchanged=experts))
    return Compared(changed, reasons, is_complete=merge.compares or not pairs)


def _compare(
    config: PaveConfig,
    merge: Merge,
    pairs: dict[tuple[ModelReference, ModelReference], dict[str, Callable]],
    sources: dict[ModelReference, Source],
) -> dict[tuple[ModelReference, ModelReference], Comparison]:
    """What the cache knows of each model and base model; where weights may be read, what it lacks is found out."""
    root, comparisons = cache.cache_root(config.cache_dir), {}
    base_identities = {base: weights_identity(merge.checkpoint(base)) for base in dict.fromkeys(base for _, base in pairs)}
    for (model, base), read_both in pairs.items():
        identities = (sources[model].identity, base_identities[base])
        comparison = comparisons[model, base] = Comparison(root, identities, (str(model), str(base)))
        if merge.compares:
            files = [file for one in (model, base) for file in merge.checkpoint(one).files.values()]
            keep_all = not all(file.endswith(".safetensors") for file in files)
            comparison.compare(read_both, merge.runtime.quiet, keep_all)
    return comparisons


def _read_both(gather: GatherTensors, *models: ModelReference) -> list[Optional[Tensor]]:
    tasks = [load_stored(gather, model).model_copy(update={"device": None}) for model in models]
    return [task.execute() for task in tasks]


def _pair_name(weight: PlannedWeight, planned: PlannedTensor) -> str:
    """In a frankenmerge a weight may be merged with that of another layer of the base model."""
    base_tensor = planned.gather.weight_info[planned.base].name
    return weight.tensor if base_tensor == weight.tensor else f"{weight.tensor} / {base_tensor}"


def leave_never_called(
    weights: list[PlannedWeight], calibrations: dict[ModelReference, CalibrateModel | GivenCovariance]
) -> tuple[list[PlannedWeight], Reasons]:
    """Leave out the weights of layers that calibration does not reach. That is known once the covariances are in the cache."""
    missed = {model: set(task.never_called()) for model, task in calibrations.items() if task.is_measured}
    reasons: Reasons = {}
    for weight in weights:
        if weight.layer in missed.get(weight.model, ()):
            reasons.setdefault(weight.model, {})[weight.tensor] = NEVER_CALLED
    return [weight for weight in weights if weight.layer not in missed.get(weight.model, ())], reasons
