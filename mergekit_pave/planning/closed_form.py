"""Which weights regmean merges in closed form, and which covariances it needs for that."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from mergekit.common import ModelReference

from mergekit_pave.config import PaveConfig
from mergekit_pave.core.linear import Linear
from mergekit_pave.errors import PaveError
from mergekit_pave.planning.calibration import PlannedCalibration
from mergekit_pave.planning.merge import Merge
from mergekit_pave.planning.select import linear_of
from mergekit_pave.planning.source import Source
from mergekit_pave.tasks.regmean import ClosedForm, MeasuredLayer

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class RegMeanLayers:
    """What regmean merges in closed form. Empty with any other merge method.

    Attributes:
        layers: by the output tensor's number, the layer that the tensor is the weight of.
        reasons: by name, why the other output tensors are merged as task_arithmetic does.
        measured: the layers of each model whose covariances are needed, by the output tensor's number.
    """

    layers: dict[int, Linear]
    reasons: dict[str, str]
    measured: dict[ModelReference, dict[int, Linear]]

    def measured_of(self, model: ModelReference) -> list[Linear]:
        return list(self.measured.get(model, {}).values())


def plan_without_data(merge: Merge) -> dict[int, ClosedForm]:
    """What regmean merges in closed form where there is no `pave:` block.

    Raises:
        PaveError: it needs covariances.
    """
    regmean = find_layers(merge, {})
    LOG.info(
        "regmean: %d tensors are merged in closed form, %d as task_arithmetic does", len(regmean.layers), len(regmean.reasons)
    )
    return {number: ClosedForm(layer) for number, layer in regmean.layers.items()}


def models_with_data(config: PaveConfig, merge: Merge) -> list[ModelReference]:
    """The models whose covariances regmean may need, whether they are purified or not."""
    merged = dict.fromkeys(model for tensor in merge.tensors if tensor.data_share for model in tensor.fine_tuned)
    return [model for model in merged if (entry := config.listed(model)) and (entry.data or entry.covariance)]


def find_layers(merge: Merge, sources: dict[ModelReference, Source]) -> RegMeanLayers:
    """
    Args:
        sources: the models with data, or with a `covariance`.

    Raises:
        PaveError: covariances are needed, and nothing says what to measure a model with.
    """
    layers: dict[int, Linear] = {}
    reasons: dict[str, str] = {}
    architectures = {model: source.architecture for model, source in sources.items()}
    for number, planned in enumerate(merge.tensors):
        if planned.data_share is None:
            continue
        model = planned.fine_tuned[0]
        if model not in architectures:
            architectures[model] = merge.architecture(model)
        layer, reason = linear_of(architectures[model], planned.gather.weight_info[model] if planned.gather else None)
        if layer:
            layers[number] = layer
        else:
            reasons[planned.name] = reason
    return RegMeanLayers(layers, reasons, _measured_layers(merge, layers, sources))


def _measured_layers(
    merge: Merge, layers: dict[int, Linear], sources: dict[ModelReference, Source]
) -> dict[ModelReference, dict[int, Linear]]:
    measured: dict[ModelReference, dict[int, Linear]] = {}
    for number, layer in layers.items():
        planned = merge.tensors[number]
        for model in planned.fine_tuned if planned.data_share else ():
            if model not in sources:
                raise PaveError(
                    f"regmean: {planned.name} is merged with `covariance: {planned.data_share:g}`, so the inputs of its layer "
                    f"have to be measured in {model}. Add a `pave:` block with `data` (or a `covariance`) for this model, with "
                    "`purify: false` if it is not to be purified. Or set `covariance: 0` under parameters, which needs no data"
                )
            linear, _ = linear_of(sources[model].architecture, planned.gather.weight_info[model])
            if linear is None or linear.stored_shape != layer.stored_shape:
                raise PaveError(f"regmean: {planned.name} is not the weight of the same linear layer in {model} as in the others")
            measured.setdefault(model, {})[number] = linear
    return measured


def closed_forms(
    config: PaveConfig, regmean: RegMeanLayers, calibrations: dict[ModelReference, PlannedCalibration]
) -> dict[int, ClosedForm]:
    """How regmean merges the weight of each of its layers, by the output tensor's number."""
    return {
        number: ClosedForm(
            layer,
            tuple(
                MeasuredLayer(
                    model=model,
                    folder=str(calibrations[model].folder),
                    layer=of_model[number],
                    min_tokens=config.least_tokens(model, of_model[number].experts),
                )
                for model, of_model in regmean.measured.items()
                if number in of_model
            ),
            alignments={},
        )
        for number, layer in regmean.layers.items()
    }
