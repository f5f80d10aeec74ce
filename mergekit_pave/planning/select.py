"""Which weights are purified, and why each other tensor is not."""

from __future__ import annotations

import collections
import math
from typing import Any, Optional

from mergekit.common import ModelReference
from mergekit.config import evaluate_setting

from mergekit_pave.calibration.architecture import Architecture
from mergekit_pave.config import PaveConfig
from mergekit_pave.core.allocation import fair_share
from mergekit_pave.core.linear import Linear
from mergekit_pave.errors import PaveError
from mergekit_pave.planning.merge import Merge
from mergekit_pave.planning.names import own_names
from mergekit_pave.planning.plan import PlannedWeight, Reasons
from mergekit_pave.planning.source import Source

_NOT_LINEAR = "not the weight of a linear layer"


def models_to_purify(config: PaveConfig, merge: Merge) -> list[ModelReference]:
    """
    Raises:
        PaveError: mergekit takes no tensor of one of them.
    """
    models = list(dict.fromkeys(model for tensor in merge.tensors for model in tensor.models if config.entry(model)))
    if unused := [entry.model for entry in config.models if config.entry(entry.model) and entry.model not in models]:
        raise PaveError(f"pave.models: mergekit takes no tensor of {unused[0]}, so it cannot be purified; remove its entry")
    return models


def select(config: PaveConfig, merge: Merge, sources: dict[ModelReference, Source]) -> tuple[list[PlannedWeight], Reasons]:
    """The weights to purify, in the order of the output tensors, and per model why each other tensor is left as it is.

    Raises:
        PaveError: a pattern matches nothing, most of a model cannot be purified, or nothing of a model is selected.
    """
    if sources:
        _check_patterns(config, merge, sources)
    weights: list[PlannedWeight] = []
    reasons: Reasons = {model: {} for model in sources}
    for number, planned in enumerate(merge.tensors):
        for model in planned.fine_tuned:
            if model not in sources:
                continue
            info = planned.gather.weight_info[model] if planned.gather else None
            tensor = info.name if info else planned.name
            linear, reason = linear_of(sources[model].architecture, info)
            include, exclude = config.setting(model, "include"), config.setting(model, "exclude")
            if include and not any(pattern in tensor for pattern in include):
                reason = reason or "not under include"
            elif any(pattern in tensor for pattern in exclude):
                reason = "under exclude"
            drop = 0 if reason else fair_share(min(linear.shape), _rank_ratio(config, model, tensor, planned.t))
            if drop:
                regularization = config.setting(model, "regularization")
                weights.append(PlannedWeight(model, tensor, planned.name, number, linear, drop, regularization))
            else:
                reasons[model][tensor] = reason or "rank_ratio keeps every component"
    for model, source in sources.items():
        _check_coverage(model, source.architecture, reasons[model])
    if not merge.is_regmean:  # which merges the other models in closed form all the same
        _check_each_model_has_weights(weights, reasons)
    return weights, reasons


def _check_each_model_has_weights(weights: list[PlannedWeight], reasons: Reasons) -> None:
    purified = {weight.model for weight in weights}
    for model, of_model in reasons.items():
        if model not in purified:
            counts = "; ".join(f"{count} {reason}" for reason, count in collections.Counter(of_model.values()).items())
            raise PaveError(
                f"pave: no tensor of {model} would be purified ({counts}). Widen rank_ratio, include or exclude, or give the "
                "model `purify: false`"
            )


def _check_patterns(config: PaveConfig, merge: Merge, sources: dict[ModelReference, Source]) -> None:
    """Every pattern has to match something: an `include` or a filter a linear weight, an `exclude` any tensor."""
    names: dict[str, set[str]] = {"include": set(), "exclude": set()}
    for planned in merge.tensors:
        for model in sources.keys() & set(planned.models) if planned.gather else ():
            info = planned.gather.weight_info[model]
            names["exclude"].add(info.name)
            if linear_of(sources[model].architecture, info)[0]:
                names["include"].add(info.name)
    for key, kind in (("include", "linear weight"), ("exclude", "tensor")):
        for pattern in sorted({pattern for model in sources for pattern in config.setting(model, key)}):
            if not any(pattern in name for name in names[key]):
                raise PaveError(f"pave.{key}: {pattern!r} is part of no {kind}'s name, so it selects nothing")
    settings = [config.rank_ratio, *(config.entry(model).rank_ratio for model in sources)]
    conditions = [condition for setting in settings for condition in (setting if isinstance(setting, list) else [setting])]
    for condition in conditions:
        pattern = getattr(condition, "filter", None)
        if pattern not in (None, "*") and not any(pattern in name for name in names["include"]):
            raise PaveError(f"pave.rank_ratio: the filter {pattern!r} is part of no linear weight's name")


def _check_coverage(model: ModelReference, architecture: Architecture, reasons: dict[str, str]) -> None:
    """Refuse a model most of whose matrices would silently keep their plain task vector, such as experts of an unknown kind."""
    num_weights = {}
    for tensor, reason in reasons.items():
        shape = architecture.weights.get(architecture.weight_name([tensor]) or "", ())
        if reason == _NOT_LINEAR and len(shape) > 1:
            num_weights[tensor] = math.prod(shape)
    if sum(num_weights.values()) > sum(linear.num_weights for linear in architecture.linears.values()):
        largest = max(num_weights, key=num_weights.get)
        raise PaveError(
            f"pave: {model} has more weights in {len(num_weights)} tensors that cannot be purified (such as {largest}) than in "
            "its linear layers; put them under pave.exclude to merge them as they are"
        )


def linear_of(architecture: Architecture, info: Any) -> tuple[Optional[Linear], Optional[str]]:
    """The layer that a tensor is the weight of, or the reason why the tensor cannot be purified."""
    if info is None or info.vocabulary_axis is not None:
        return None, "vocabulary"
    names = list(own_names(info))
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
