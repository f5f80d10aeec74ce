"""Which weights are purified, and why each other tensor is not."""

from __future__ import annotations

import math
from typing import Any, Optional

from mergekit.common import ModelReference
from mergekit.config import evaluate_setting

from mergekit_pave.calibration.architecture import Architecture
from mergekit_pave.config import PaveConfig
from mergekit_pave.core.allocation import fair_share
from mergekit_pave.core.linear import Linear
from mergekit_pave.errors import PaveError
from mergekit_pave.planning.merge import PlannedTensor
from mergekit_pave.planning.plan import PlannedWeight
from mergekit_pave.planning.source import Source

_NOT_LINEAR = "not the weight of a linear layer"


def select(
    config: PaveConfig, tensors: list[PlannedTensor], sources: dict[ModelReference, Source]
) -> tuple[dict[int, list[PlannedWeight]], dict[ModelReference, dict[str, str]]]:
    """The weights to purify by output tensor, and per model why each other tensor is left as it is."""
    chosen: dict[int, list[PlannedWeight]] = {}
    reasons: dict[ModelReference, dict[str, str]] = {model: {} for model in sources}
    _check_patterns(config, tensors, sources)
    for place, planned in enumerate(tensors):
        for model in planned.models:
            if model not in sources or model == planned.base:
                continue
            info = planned.gather.weight_info[model] if planned.gather else None
            tensor = info.name if info else planned.name
            linear, reason = linear_of(sources[model].architecture, info)
            include, exclude = config.setting(model, "include"), config.setting(model, "exclude")
            if include and not any(pattern in tensor for pattern in include):
                reason = reason or "not under include"
            elif any(pattern in tensor for pattern in exclude):
                reason = "under exclude"
            if not reason:
                drop = fair_share(min(linear.shape), _rank_ratio(config, model, tensor, planned.t))
                if drop:
                    weight = PlannedWeight(model, tensor, planned.name, linear, drop, config.setting(model, "regularization"))
                    chosen.setdefault(place, []).append(weight)
                    continue
                reason = "rank_ratio keeps every component"
            reasons[model][tensor] = reason
    for model, source in sources.items():
        _check_coverage(model, source.architecture, reasons[model])
    return chosen, reasons


def _check_patterns(config: PaveConfig, tensors: list[PlannedTensor], sources: dict[ModelReference, Source]) -> None:
    """Every pattern has to match something: an `include` or a filter a linear weight, an `exclude` any tensor."""
    matchable: dict[str, set[str]] = {"include": set(), "exclude": set()}
    for planned in tensors:
        for model in sources.keys() & set(planned.models) if planned.gather else ():
            info = planned.gather.weight_info[model]
            matchable["exclude"].add(info.name)
            if linear_of(sources[model].architecture, info)[0]:
                matchable["include"].add(info.name)
    for key, names in matchable.items():
        for pattern in sorted({pattern for model in sources for pattern in config.setting(model, key)}):
            if not any(pattern in name for name in names):
                what = "linear weight" if key == "include" else "tensor"
                raise PaveError(f"pave.{key}: {pattern!r} is part of no {what}'s name, so it selects nothing")
    settings = [config.rank_ratio, *(config.entry(model).rank_ratio for model in sources)]
    conditions = [condition for setting in settings for condition in (setting if isinstance(setting, list) else [setting])]
    for condition in conditions:
        pattern = getattr(condition, "filter", None)
        if pattern not in (None, "*") and not any(pattern in name for name in matchable["include"]):
            raise PaveError(f"pave.rank_ratio: the filter {pattern!r} is part of no linear weight's name")


def _check_coverage(model: ModelReference, architecture: Architecture, reasons: dict[str, str]) -> None:
    """Refuse a model most of whose matrices would silently keep their plain task vector: experts of an unknown kind, say."""
    missed = {}
    for tensor, reason in reasons.items():
        shape = architecture.weights.get(architecture.weight_name([tensor]) or "", ())
        if reason == _NOT_LINEAR and len(shape) > 1:
            missed[tensor] = math.prod(shape)
    linear = sum(layer.size for layer in architecture.linears.values())
    if sum(missed.values()) > linear:
        largest = max(missed, key=missed.get)
        raise PaveError(
            f"pave: {model} has more weights in {len(missed)} tensors that cannot be purified (such as {largest}) than in its "
            "linear layers; put them under pave.exclude to merge them as they are"
        )


def linear_of(architecture: Architecture, info: Any) -> tuple[Optional[Linear], Optional[str]]:
    """The layer that a tensor is the weight of, or why it is none that can be purified."""
    if info is None or info.vocabulary_axis is not None:
        return None, "vocabulary"
    names = [info.name, *(info.aliases or ())]
    if linear := architecture.linear(names):
        return linear, None
    name = architecture.weight_name(names)
    if name is None:
        return None, "unknown to the architecture"
    if name in architecture.routers:
        return None, "router"
    if name in architecture.heads:
        return None, "head"
    return None, _NOT_LINEAR


def _rank_ratio(config: PaveConfig, model: ModelReference, tensor: str, t: float) -> float:
    """mergekit's resolution of a parameter: the first scope with a value for this tensor, else the default."""
    for setting in (config.entry(model).rank_ratio, config.rank_ratio):
        if setting is not None:
            value = evaluate_setting(tensor, setting, t, validate=float)
            if value is not None:
                return value
    return PaveConfig.model_fields["rank_ratio"].default
