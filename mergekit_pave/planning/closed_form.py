"""Which weights regmean merges in closed form, and which covariances it needs for that."""

from __future__ import annotations

import logging

from mergekit.common import ModelReference

from mergekit_pave.calibration.architecture import describe
from mergekit_pave.config import PaveConfig
from mergekit_pave.core.linear import Linear
from mergekit_pave.errors import PaveError
from mergekit_pave.planning.merge import Environment, PlannedTensor
from mergekit_pave.planning.select import linear_of
from mergekit_pave.planning.source import Source
from mergekit_pave.tasks.regmean import ClosedForm

LOG = logging.getLogger(__name__)


def plan_without_data(tensors: list[PlannedTensor], environment: Environment) -> dict[int, ClosedForm]:
    """What regmean merges in closed form where there is no `pave:` block.

    Raises:
        PaveError: it needs covariances.
    """
    layers, left = closed_form_layers(tensors, {}, environment)
    needed_layers(tensors, layers, {})
    LOG.info("regmean: %d tensors are merged in closed form, %d as task_arithmetic does", len(layers), len(left))
    return {place: ClosedForm(layer) for place, layer in layers.items()}


def models_with_data(config: PaveConfig, tensors: list[PlannedTensor]) -> list[ModelReference]:
    """The models whose covariances regmean may need, whether they are purified or not."""
    merged = (model for planned in tensors if planned.data_share for model in planned.models if model != planned.base)
    entries = ((model, config.listed(model)) for model in dict.fromkeys(merged))
    return [model for model, entry in entries if entry and (entry.data or entry.covariance)]


def closed_form_layers(
    tensors: list[PlannedTensor], sources: dict[ModelReference, Source], environment: Environment
) -> tuple[dict[int, Linear], dict[str, str]]:
    """The layers whose weights regmean merges in closed form, by place, and why it does not merge the other tensors so."""
    layers, left = {}, {}
    known = {model: source.architecture for model, source in sources.items()}
    for place, planned in enumerate(tensors):
        if planned.data_share is None:
            continue
        model = next(model for model in planned.models if model != planned.base)
        if model not in known:
            trust = environment.runtime.trust_remote_code
            known[model] = describe(model.config(trust_remote_code=trust), model.model.path, trust, model.model.revision)
        layer, reason = linear_of(known[model], planned.gather.weight_info[model] if planned.gather else None)
        if layer:
            layers[place] = layer
        else:
            left[planned.name] = reason
    return layers, left


def needed_layers(
    tensors: list[PlannedTensor], layers: dict[int, Linear], sources: dict[ModelReference, Source]
) -> dict[ModelReference, dict[int, Linear]]:
    """The layers of each model whose covariances are part of regmean's metric, by place.

    Raises:
        PaveError: nothing says what to measure a model with.
    """
    needed: dict[ModelReference, dict[int, Linear]] = {}
    for place in layers:
        planned = tensors[place]
        for model in planned.models if planned.data_share else ():
            if model == planned.base:
                continue
            if model not in sources:
                raise PaveError(
                    f"regmean: {planned.name} is merged with `covariance: {planned.data_share:g}`, so what its layer sees in "
                    f"{model} has to be measured. Add a `pave:` block with `data` (or a `covariance`) for it, and beside that "
                    "`purify: false` if it shall not be purified; or set `covariance: 0` under parameters, which needs no data"
                )
            linear, _ = linear_of(sources[model].architecture, planned.gather.weight_info[model])
            if linear is None or linear.stored_shape != layers[place].stored_shape:
                raise PaveError(f"regmean: {planned.name} is not the weight of the same linear layer in {model} as in the others")
            needed.setdefault(model, {})[place] = linear
    return needed
