"""Which tensors of a planned merge are purified, and the tasks that do it.

Works on what mergekit has planned (`PlannedTensor`) and returns what has to take the place of its inputs. Reads
configurations, tokenizers, samples and the headers of weights, but no weights, so that every mistake in the `pave:` block
shows before any work.
"""

from __future__ import annotations

import collections

from mergekit.common import ModelReference

from mergekit_pave.config import PaveConfig
from mergekit_pave.core.linear import Linear
from mergekit_pave.errors import PaveError
from mergekit_pave.planning.chain import add_tensor
from mergekit_pave.planning.checks import check_complete, check_sizes
from mergekit_pave.planning.closed_form import closed_form_layers, models_with_data, needed_layers
from mergekit_pave.planning.header import header_of
from mergekit_pave.planning.merge import Environment, PlannedTensor
from mergekit_pave.planning.plan import Plan, PlannedWeight
from mergekit_pave.planning.select import select
from mergekit_pave.planning.source import Source
from mergekit_pave.planning.unchanged import leave_never_called, leave_unchanged
from mergekit_pave.planning.warnings import base_is_merged, sample_warnings
from mergekit_pave.tasks.calibrate import CalibrateModel, GivenCovariance
from mergekit_pave.tasks.decompose import DecomposeWeight
from mergekit_pave.tasks.regmean import ClosedForm


def make_plan(config: PaveConfig, tensors: list[PlannedTensor], environment: Environment) -> Plan:
    """Plan the purification of a merge.

    Raises:
        PaveError: anything in the block that does not fit the models or the data.
    """
    models = {model: None for planned in tensors for model in planned.models if config.entry(model)}
    regmean = any(planned.data_share is not None for planned in tensors)
    if missed := [entry.model for entry in config.models if entry.purify and entry.model not in models]:
        raise PaveError(f"pave.models: mergekit takes no tensor of {missed[0]}, so it cannot be purified; remove its entry")
    if not models and not regmean:
        raise PaveError("pave.models: every model has `purify: false`, so nothing would be purified; remove the block instead")
    sources = {
        model: Source(config, model, environment) for model in dict.fromkeys([*models, *models_with_data(config, tensors)])
    }
    if sources:
        any_source, *_ = sources.values()
        inputs = dict.fromkeys(model for planned in tensors for model in (*planned.models, planned.base) if model)
        check_sizes(tensors, environment.checkpoint)
        check_complete(
            {model: environment.checkpoint(model).files for model in inputs},
            environment.reads,
            lambda model, name: sources.get(model, any_source).architecture.loaded_as(name),
        )
    chosen, reasons = select(config, tensors, {model: sources[model] for model in models})
    purified = {weight.model for weights in chosen.values() for weight in weights}
    idle = [model for model in models if model not in purified]
    if idle and not regmean:
        told = "; ".join(f"{count} {reason}" for reason, count in collections.Counter(reasons[idle[0]].values()).items())
        raise PaveError(
            f"pave: no tensor of {idle[0]} would be purified ({told}). Widen rank_ratio, include or exclude, "
            "or give the model `purify: false`"
        )
    layers, left = closed_form_layers(tensors, sources, environment)
    needed = needed_layers(tensors, layers, sources)
    for model, source in list(sources.items()):
        if used := [*_layers_of(model, chosen), *needed.get(model, {}).values()]:
            source.prepare(tuple(dict.fromkeys(used)))
        else:  # nothing of it is purified, and no covariance of it is asked for
            del sources[model]
    compared = leave_unchanged(chosen, tensors, sources, reasons, environment)
    for model, source in sources.items():
        purified_layers = _layers_of(model, chosen)
        source.settle((*purified_layers, *needed.get(model, {}).values()), purified_layers)
        leave_never_called(model, source.calibration, chosen, reasons.setdefault(model, {}))

    plan = Plan(compared=compared, warnings=[*sample_warnings(sources), *base_is_merged(tensors, purified, environment)])
    for place, weights in chosen.items():
        if weights:
            add_tensor(plan, config, tensors[place], place, weights, sources)
    plan.decompositions = _each_once(plan.decompositions)
    calibrations: dict[str, CalibrateModel | GivenCovariance] = {}  # two names of one model share what is measured
    for model in (*(task.model for task in plan.decompositions), *needed):
        calibrations.setdefault(sources[model].calibration.folder, sources[model].calibration)
    plan.calibrations = list(calibrations.values())
    for place, layer in layers.items():
        covariances = (
            (model, sources[model].calibration.folder, own[place], config.least_tokens(model, own[place].experts))
            for model, own in needed.items()
            if place in own
        )
        plan.closed_forms[place] = ClosedForm(layer, tuple(covariances))
    plan.header = header_of(config, tensors, sources, reasons) | {"warnings": plan.warnings}
    if regmean:
        plan.header["regmean"] = {"as_task_arithmetic": left}
    return plan


def _layers_of(model: ModelReference, chosen: dict[int, list[PlannedWeight]]) -> list[Linear]:
    """The layers of a model whose weights are to be purified."""
    return [weight.layer for weights in chosen.values() for weight in weights if weight.model == model]


def _each_once(decompositions: list[DecomposeWeight]) -> list[DecomposeWeight]:
    """Of a weight that goes to several places, as in a frankenmerge, the decomposition that has enough for all of them."""
    largest: dict[str, DecomposeWeight] = {}
    for task in decompositions:
        if task.folder not in largest or largest[task.folder].count < task.count:
            largest[task.folder] = task
    return list(largest.values())
