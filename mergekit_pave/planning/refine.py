"""What is refined, why other tensors are not, and which merges cannot be refined."""

from __future__ import annotations

import collections
import copy
import math

import torch
from mergekit.common import ModelReference, dtype_from_name

from mergekit_pave.cache import cache_root
from mergekit_pave.calibration.architecture import NO_BLOCK, Architecture, describe
from mergekit_pave.calibration.calls import called_again
from mergekit_pave.calibration.job import Job
from mergekit_pave.calibration.token_rows import SIDES
from mergekit_pave.config import PaveConfig
from mergekit_pave.core.linear import Linear
from mergekit_pave.errors import PaveError
from mergekit_pave.planning.calibration import PlannedCalibration
from mergekit_pave.planning.merge import Merge, PlannedTensor
from mergekit_pave.planning.select import linear_of
from mergekit_pave.planning.warnings import BETWEEN_TWO
from mergekit_pave.tasks.refine import RefinedLayer, Refinement

SHARED = "its weight is used by several layers"
OUTSIDE = "in no block"
EXPERTS = "experts of a mixture"
WEIGHTLESS = "every weight is 0"


def models_to_refine(config: PaveConfig, merge: Merge) -> list[ModelReference]:
    """The experts of a merge that is to be refined.

    Raises:
        PaveError: refining does not go with this merge.
    """
    if config.refinement is None:
        return []
    if merge.method in BETWEEN_TWO:
        raise PaveError(f"pave.refine: {merge.method} merges one model with the base model, and refining needs several")
    for planned in merge.tensors:
        if planned.base is None:
            raise PaveError(
                f"pave.refine: {merge.method} merges without a base model here; set base_model to the one that they share"
            )
        for model in planned.fine_tuned:
            if planned.weights[model] < 0:
                raise PaveError(
                    f"pave.refine: {model} has a negative weight ({planned.weights[model]:g} in {planned.name}), so its outputs "
                    "are not to be kept; make it positive, or leave `refine` out"
                )
    return list(dict.fromkeys(model for planned in merge.tensors for model in planned.fine_tuned))


def plan_refinement(
    config: PaveConfig, merge: Merge, calibrations: dict[ModelReference, PlannedCalibration]
) -> tuple[Refinement | None, dict[str, str]]:
    """What is to be refined, and by tensor why each other one keeps what the method gives it.

    Args:
        calibrations: of all `models_to_refine`.

    Raises:
        PaveError: the models cannot be followed side by side.
    """
    models = models_to_refine(config, merge)
    if not models:
        return None, {}
    experts = {model: _job(config, calibrations[model]) for model in models}
    base = merge.tensors[0].base
    model_config = copy.deepcopy(merge.config)  # it changes when the model is run, and mergekit writes the merge's
    architecture = describe(model_config, base.model.path, merge.runtime.trust_remote_code, base.model.revision)
    for model, job in experts.items():
        if any(sample.is_pictured for sample in job.encoded):
            raise PaveError(
                f"pave.refine: {model} reads images with texts, and such models cannot be refined yet; leave `refine` out"
            )
    layers: dict[str, RefinedLayer] = {}
    reasons: dict[str, str] = {}
    for number, planned in enumerate(merge.tensors):
        linear, reason = _layer(planned, models, experts)
        shares = {model: planned.weights[model] for model in planned.fine_tuned if planned.weights[model] > 0}
        reason = reason or _unfit(linear, architecture) or (None if shares else WEIGHTLESS)
        if reason:
            reasons[planned.name] = reason
            continue
        layers[linear.module] = RefinedLayer(
            number=number,
            name=planned.name,
            linear=linear,
            gather=planned.gather,
            base=planned.base,
            shares=shares,
        )
    if not layers:
        counts = "; ".join(f"{count} {reason}" for reason, count in collections.Counter(reasons.values()).items())
        raise PaveError(f"pave.refine: no tensor of this merge would be refined ({counts}); leave `refine` out")
    names = filter(None, (architecture.weight_name(list(planned.names)) for planned in merge.tensors))
    merged = {architecture.block_of(name) for name in names} | {NO_BLOCK}
    for model, job in experts.items():
        _check_blocks(model, job.architecture, merged)
    if layer := called_again(next(iter(experts.values())), layers):
        raise PaveError(
            f"pave.refine: {models[0]} calls {layer} more than once for a sample, but refining fits each layer to all of its "
            "inputs at once; leave `refine` out"
        )
    sized = (i for i, planned in enumerate(merge.tensors) if planned.gather is None and _is_embedding(planned, architecture))
    numbers = {
        number: name
        for number, planned in enumerate(merge.tensors)
        if (name := architecture.weight_name(list(planned.names))) not in architecture.heads
    }
    refinement = Refinement(
        settings=config.refinement,
        layers=layers,
        experts=experts,
        config=model_config,
        architecture=architecture,
        resized=next(sized, None),
        numbers=tuple(numbers),
        folder=cache_root(config.cache_dir),
        size=_itemsize(merge) * sum(math.prod(architecture.weights[name]) for name in numbers.values() if name),
        runtime=merge.runtime,
    )
    return refinement, reasons


def _itemsize(merge: Merge) -> int:
    """Bytes of a number in the precision that the merge computes in."""
    name = next((planned.gather.dtype for planned in merge.tensors if planned.gather), None)
    dtype = getattr(merge.config, "dtype", None)
    dtype = dtype_from_name(name) or (dtype_from_name(dtype) if isinstance(dtype, str) else dtype)
    return (dtype or torch.float32).itemsize


def _check_blocks(model: ModelReference, expert: Architecture, merged: set[str]) -> None:
    own = {path for path, num_weights in expert.blocks.items() if num_weights} | {NO_BLOCK}
    if alone := sorted(own ^ merged):
        owner, other = ("the merged model", model) if alone[0] in merged else (model, "the merged model")
        raise PaveError(
            f"pave.refine: {owner} has the block {alone[0]}, and {other} has none of this place. Refining runs the models side "
            "by side, so they have to have the same blocks; leave `refine` out"
        )


def _is_embedding(planned: PlannedTensor, architecture: Architecture) -> bool:
    return set(SIDES).intersection(architecture.token_rows.get(architecture.weight_name(list(planned.names)) or "", ())) != set()


def _job(config: PaveConfig, calibration: PlannedCalibration) -> Job:
    """What a model is run on. Nothing of it is stored, so unless the user says otherwise, more tokens count than in C."""
    settings = config.calibration_of(calibration.source.model)
    return calibration.job if settings.max_tokens else calibration.job.with_more_counted(settings.seed)


def _layer(
    planned: PlannedTensor, models: list[ModelReference], experts: dict[ModelReference, Job]
) -> tuple[Linear | None, str | None]:
    """The layer that an output tensor is the weight of, in all models; or why it is not refined.

    Raises:
        PaveError: the tensor has another place in one of the models.
    """
    found: Linear | None = None
    for model in planned.fine_tuned or models:
        info = planned.gather.weight_info[model] if planned.gather and model in planned.gather.weight_info else None
        linear, reason = linear_of(experts[model].architecture, info)
        if linear is None:
            return None, reason
        if info.name != planned.name or (found and linear != found):
            raise PaveError(
                f"pave.refine: {planned.name} is merged from {info.name} of {model}. Refining runs the models side by side, so "
                "each layer has to have the same place in all of them; leave `refine` out"
            )
        found = linear
    return found, None if planned.has_base else "the base model's weight is not part of its merge"


def _unfit(linear: Linear, architecture: Architecture) -> str | None:
    if linear.experts:
        return EXPERTS
    if linear.shared:
        return SHARED
    return OUTSIDE if architecture.block_of(linear.module) == NO_BLOCK else None
