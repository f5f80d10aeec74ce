"""The steps of planning."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from mergekit.common import ModelReference

from mergekit_pave.config import PaveConfig
from mergekit_pave.core.linear import Linear
from mergekit_pave.planning.calibration import check_given, plan_calibration
from mergekit_pave.planning.chain import each_once, make_chain
from mergekit_pave.planning.checks import check_complete, check_sizes
from mergekit_pave.planning.closed_form import closed_forms, find_layers, models_with_data
from mergekit_pave.planning.emr import plan_emr
from mergekit_pave.planning.header import header_of
from mergekit_pave.planning.merge import Merge
from mergekit_pave.planning.plan import Plan, PlannedWeight, Reasons
from mergekit_pave.planning.refine import models_to_refine, plan_refinement
from mergekit_pave.planning.select import models_to_purify, select
from mergekit_pave.planning.source import Source, open_sources
from mergekit_pave.planning.unchanged import leave_never_called, leave_unchanged
from mergekit_pave.planning.vocabulary import models_to_count, plan_vocabulary
from mergekit_pave.planning.warnings import base_is_merged, idle_block, precision_warnings, sample_warnings, unchanged_warnings
from mergekit_pave.tasks.calibrate import CalibrateModel, GivenCovariance
from mergekit_pave.tasks.decompose import DecomposeWeight


def make_plan(config: PaveConfig, merge: Merge) -> Plan:
    """Plan the purification of a merge.

    Raises:
        PaveError: anything in the block that does not fit the models or the data.
    """
    check_given(config)
    to_purify = models_to_purify(config, merge)
    counted, to_refine = models_to_count(config, merge), models_to_refine(config, merge)
    measurable = dict.fromkeys([*to_purify, *models_with_data(config, merge), *counted, *to_refine])
    sources = open_sources(config, measurable, merge)
    emr = plan_emr(config, merge)
    if sources or emr:
        check_sizes(merge)
    if sources:
        check_complete(merge, {model: source.architecture for model, source in sources.items()})

    selected, reasons = select(config, merge, {model: sources[model] for model in to_purify})
    regmean = find_layers(merge, sources)
    planned = {
        model: plan_calibration(config, source, layers, regmean.measured_of(model), merge)
        for model, source in sorted(sources.items(), key=_writes)  # what cannot be read is refused before a model writes
        if (layers := _layers_of(model, selected)) or regmean.measured_of(model) or model in counted or model in to_refine
    }
    calibrations = {model: planned[model] for model in sources if model in planned}
    vocabulary = plan_vocabulary(config, merge, sources, calibrations)
    refinement, unrefined = plan_refinement(config, merge, calibrations)
    refined = [layer.linear for layer in refinement.layers.values()] if refinement else []
    compared = leave_unchanged(config, merge, selected, sources)
    layers_used = {
        model: layers
        for model in calibrations
        if (layers := _layers_of(model, compared.weights) + regmean.measured_of(model) + refined * (model in to_refine))
    }
    tasks = {
        model: calibration.task(_layers_of(model, compared.weights), merge.runtime) for model, calibration in calibrations.items()
    }
    weights, never_called = leave_never_called(compared.weights, tasks)

    chains = {
        number: make_chain(config, merge.tensors[number], of_tensor, calibrations)
        for number, of_tensor in _by_tensor(weights).items()
    }
    decompositions = each_once([task for chain in chains.values() for task in chain.decompositions])
    of_heads = [model for heads in vocabulary.heads.values() for model in heads.folders]
    needed = dict.fromkeys([*(task.model for task in decompositions), *regmean.measured, *of_heads])
    warnings = [
        *merge.warnings,
        *sample_warnings({model: calibrations[model] for model in layers_used}, layers_used),
        *precision_warnings([calibrations[model] for model in needed]),
        *unchanged_warnings(selected, compared.weights),
        *base_is_merged(merge, compared.weights),
        *idle_block(bool(measurable) or merge.is_regmean or emr is not None),
    ]
    used = {*layers_used, *of_heads, *(model for rows in vocabulary.rows.values() for model in rows.counts)}
    header = header_of(config, merge, calibrations, used, _joined(reasons, compared.reasons, never_called))
    header["warnings"] = warnings
    by_data = {merge.tensors[number].name for number in (*vocabulary.rows, *vocabulary.heads)}
    if merge.is_regmean:
        others = {name: reason for name, reason in regmean.reasons.items() if name not in by_data}
        header["regmean"] = {"as_task_arithmetic": others}
    if vocabulary.report:
        header["vocabulary"] = vocabulary.report
    if refinement:
        left = {name: reason for name, reason in unrefined.items() if name not in by_data}
        header["refined"] = {"settings": refinement.settings.model_dump(by_alias=True), "left": left}
    return Plan(
        weights=[weight for chain in chains.values() for weight in chain.weights],
        gathers={number: chain.gather for number, chain in chains.items()},
        calibrations=_with_decompositions(_once_a_folder(tasks[model] for model in needed), decompositions),
        decompositions=decompositions,
        stats=[task for chain in chains.values() for task in chain.stats],
        header=header,
        refinement=refinement,
        closed_forms=closed_forms(config, regmean, calibrations),
        rows=vocabulary.rows,
        heads=vocabulary.heads,
        emr=emr,
        warnings=warnings,
        compared=compared.is_complete,
        to_write={str(model): calibrations[model].to_write for model in used if calibrations[model].to_write},
        samples={str(model): calibration.samples_key for model, calibration in calibrations.items()},
        left={str(model): calibration.left for model, calibration in calibrations.items()},
        remember=[calibration.remember for calibration in calibrations.values() if calibration.remember],
    )


def _writes(pair: tuple[ModelReference, Source]) -> bool:
    """Whether a model writes its own samples."""
    return pair[1].entry.is_generated


def _layers_of(model: ModelReference, weights: list[PlannedWeight]) -> list[Linear]:
    """The layers of a model whose weights are to be purified."""
    return [weight.layer for weight in weights if weight.model == model]


def _by_tensor(weights: list[PlannedWeight]) -> dict[int, list[PlannedWeight]]:
    """The weights by the number of the output tensor that they are merged into."""
    tensors: dict[int, list[PlannedWeight]] = {}
    for weight in weights:
        tensors.setdefault(weight.number, []).append(weight)
    return tensors


def _once_a_folder(tasks: Iterable[CalibrateModel | GivenCovariance]) -> list[CalibrateModel | GivenCovariance]:
    """Two names of one model share what is measured."""
    folders: dict[Any, CalibrateModel | GivenCovariance] = {}
    for task in tasks:
        if not isinstance(task, CalibrateModel):  # given covariances are checked for each of their models
            folders[task] = task
        elif before := folders.get(task.folder):
            keep = before.job.keep or task.job.keep
            purified = tuple(dict.fromkeys((*before.purified, *task.purified)))
            folders[task.folder] = replace(before, job=replace(before.job, keep=keep), purified=purified)
        else:
            folders[task.folder] = task
    return list(folders.values())


def _with_decompositions(
    tasks: list[CalibrateModel | GivenCovariance], decompositions: list[DecomposeWeight]
) -> list[CalibrateModel | GivenCovariance]:
    """The calibrations, each with the weights that are to be decomposed while it runs."""
    by_folder: dict[str, list[DecomposeWeight]] = {}
    for task in decompositions:
        by_folder.setdefault(task.covariances, []).append(task)
    return [
        replace(task, decompositions=tuple(by_folder.get(task.folder, ()))) if isinstance(task, CalibrateModel) else task
        for task in tasks
    ]


def _joined(*parts: Reasons) -> Reasons:
    reasons: Reasons = {}
    for part in parts:
        for model, of_model in part.items():
            reasons.setdefault(model, {}).update(of_model)
    return reasons
