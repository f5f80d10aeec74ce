"""What the page shows beyond `pave_report.json`, measured on the models of a planned merge and their covariances.

mergekit's executor streams the weights, as in a merge. Nothing is calibrated or decomposed: the caches must be full.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

from mergekit.graph import Executor, Task
from mergekit.io.tasks import LoadTensor
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_pave.cache import Artefact
from mergekit_pave.calibration.run import has_covariances
from mergekit_pave.calibration.stored import StoredCovariances, stored_covariances
from mergekit_pave.core.linear import Linear
from mergekit_pave.core.projection import matrices
from mergekit_pave.core.purification import shift_of
from mergekit_pave.errors import PaveError
from mergekit_pave.planning.plan import Plan, PlannedWeight
from mergekit_pave.progress import bar
from mergekit_pave.report.page.measure import (
    Inputs,
    Measurements,
    Overlap,
    Spectrum,
    condition,
    effective_rank,
    interference,
    spectrum,
)
from mergekit_pave.report.places import place, spread
from mergekit_pave.report.summary import complete
from mergekit_pave.settings import RelativeRegularization
from mergekit_pave.tasks.purify import GatherPurified, load_stored, tensors_of

# Layers of a stack that are measured: few enough to be read, and no more than a machine measures in minutes.
SPECTRA, COVARIANCES = 3, 16
_OPERATIONS = 2e13


def measure(plan: Plan, options: MergeOptions) -> tuple[dict[str, Any], Measurements]:
    """The report that a merge would write, and what else the page shows. Reads every weight that is purified once.

    Raises:
        PaveError: the caches lack something.
    """
    if plan.decompositions:
        raise PaveError(
            f"{len(plan.decompositions)} of {plan.decomposed} decompositions are not in the cache, and a report measures none. "
            "Fill it with `mergekit-pave calibrate` or a merge, or give the folder of a finished merge"
        )
    if plan.to_write:
        raise PaveError(
            f"{next(iter(plan.to_write))} has not yet written the text that it is calibrated with, and a report generates none. "
            "Fill the cache with `mergekit-pave calibrate` or a merge, or give the folder of a finished merge"
        )
    tasks = [*plan.stats, *_spectra(plan), *_overlaps(plan)]
    executor = Executor(tasks, math_device=options.device, storage_device=options.device if options.low_cpu_memory else "cpu")
    values = dict(executor.run(quiet=options.quiet, desc="Measuring"))
    stats = [(str(task.model), values[task]) for task in plan.stats]
    measured = [values[task] for task in tasks[len(plan.stats) :]]
    measurements = Measurements(
        spectra=[value for value in measured if isinstance(value, Spectrum)],
        inputs=_inputs(plan, options.quiet),
        overlaps=[value for value in measured if isinstance(value, Overlap)],
        left_out=[
            *(("Spectra", stack) for stack in _unaffordable(plan.weights, SPECTRA, _cost_of_spectrum)),
            *(("Covariances", stack) for stack in _unaffordable(plan.weights, COVARIANCES, _cost_of_covariance)),
        ],
    )
    return complete(plan.header, stats), measurements


class _MeasureSpectrum(Task[Optional[Spectrum]]):
    """The spectrum of one matrix; from the cached tail where there is no covariance."""

    weight: LoadTensor
    tail: Task
    output: str
    layer: Linear
    covariances: Optional[str]
    regularization: float | RelativeRegularization

    def __hash__(self) -> int:
        return hash((_MeasureSpectrum, str(self.weight.model), self.output))

    def arguments(self) -> dict[str, Task]:
        return {"weight": self.weight, "tail": self.tail}

    def group_label(self) -> Optional[str]:
        return self.weight.group_label()

    def uses_accelerator(self) -> bool:
        return True

    def execute(self, weight: Tensor, tail: dict[str, Any]) -> Optional[Spectrum]:
        slices = tail["slices"]
        if not slices:  # no expert saw enough tokens
            return None
        busiest = max(range(len(slices)), key=lambda i: slices[i]["tokens"])
        expert, largest = slices[busiest]["expert"], slices[busiest]["largest"] or 1.0
        if self.covariances:
            number = 0 if expert is None else self.layer.experts.index(expert)
            covariance = stored_covariances(self.covariances).load(self.layer.layers[number])
            matrix = matrices(weight, self.layer.transposed)[number]
            values = spectrum(matrix, covariance.to(weight.device), shift_of(covariance, self.regularization))
        else:
            values = tail["values"][busiest][::-1]
        return Spectrum(str(self.weight.model), self.output, expert, values / largest, min(self.layer.shape))


class _MeasureOverlap(Task[Optional[Overlap]]):
    """The interference in one merged tensor."""

    output: str
    base: LoadTensor
    gather: GatherPurified

    def __hash__(self) -> int:
        return hash((_MeasureOverlap, self.output))

    def arguments(self) -> dict[str, Task]:
        tasks, purified = {"base": self.base}, dict(self.gather.purified.items())
        for model in self.gather.weight_info:
            if model != self.base.model:
                tasks[f"before {model}"] = stored = load_stored(self.gather, model)
                tasks[f"after {model}"] = purified.get(model, stored)
        return tasks

    def group_label(self) -> Optional[str]:
        return self.base.group_label()

    def uses_accelerator(self) -> bool:
        return True

    def execute(self, base: Tensor, **inputs: Any) -> Optional[Overlap]:
        weights = tensors_of(inputs)
        models = [
            key.removeprefix("before ") for key, weight in weights.items() if key.startswith("before") and weight is not None
        ]
        if len(models) < 2:
            return None
        before, after = (
            interference([weights[f"{when} {model}"].float() - base.float() for model in models]) for when in ("before", "after")
        )
        return Overlap(self.output, models, before, after)


def _overlaps(plan: Plan) -> list[_MeasureOverlap]:
    tasks = []
    for gather in plan.gathers.values():
        purify = next(iter(gather.purified.values()))
        if purify.base is not None:
            tasks.append(_MeasureOverlap(output=purify.allocation.output, base=purify.base, gather=gather))
    return tasks


def _spectra(plan: Plan) -> list[_MeasureSpectrum]:
    """Of the first, the middle and the last layer of each stack, or of fewer where they would take too long."""
    purify = {(task.model, task.purify.allocation.output): task.purify for task in plan.stats}
    tasks = []
    for weight in _chosen(plan.weights, SPECTRA, _cost_of_spectrum):
        task = purify[weight.model, weight.output]
        tasks.append(
            _MeasureSpectrum(
                weight=task.weight,
                tail=task.tail,
                output=weight.output,
                layer=weight.layer,
                covariances=weight.covariances if has_covariances(Artefact(Path(weight.covariances)), kept=True) else None,
                regularization=weight.regularization,
            )
        )
    return tasks


def _cost_of_spectrum(weight: PlannedWeight) -> float:
    smaller, d_in = min(weight.layer.shape), weight.layer.shape[1]
    return 2 * smaller * d_in**2 + 4 * smaller**3


def _cost_of_covariance(weight: PlannedWeight) -> float:
    return float(weight.layer.shape[1]) ** 3


def _inputs(plan: Plan, quiet: bool) -> list[Inputs]:
    """The covariances of some layers. Of experts, the one that saw most tokens is measured."""
    shared: dict[tuple[str, str, tuple[str, ...]], list[PlannedWeight]] = defaultdict(list)  # by model, folder and files
    stored: dict[str, StoredCovariances] = {}  # by folder
    for weight in _chosen(plan.weights, COVARIANCES, _cost_of_covariance):
        folder = weight.covariances
        if folder not in stored:
            if not has_covariances(Artefact(Path(folder)), kept=True):
                continue
            stored[folder] = stored_covariances(folder)
        layer = max(weight.layer.layers, key=stored[folder].tokens)
        if stored[folder].tokens(layer):
            shared[str(weight.model), folder, stored[folder].files(layer)].append(weight)
    inputs = []
    with bar(len(shared), "Measuring", "covariances", hidden=quiet) as progress:
        for (model, folder, _), weights in shared.items():
            layer = max(weights[0].layer.layers, key=stored[folder].tokens)
            covariance = stored[folder].load(layer)
            inputs.append(
                Inputs(
                    model=model,
                    outputs=[weight.output for weight in weights],
                    tokens=covariance.tokens,
                    width=covariance.dim,
                    effective_rank=effective_rank(covariance),
                    condition=condition(covariance, shift_of(covariance, weights[0].regularization)),
                )
            )
            progress.update()
    return inputs


def _chosen(weights: list[PlannedWeight], most: int, cost: Callable[[PlannedWeight], float]) -> list[PlannedWeight]:
    """The weights in a few layers of each stack."""
    costs: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for weight in weights:
        where = place(weight.output)
        costs[where.stack][where.layer] += cost(weight)
    layers = {stack: spread(of_stack, most, _OPERATIONS) for stack, of_stack in costs.items()}
    return [weight for weight in weights if (where := place(weight.output)).layer in layers[where.stack]]


def _unaffordable(weights: list[PlannedWeight], most: int, cost: Callable[[PlannedWeight], float]) -> list[str]:
    """The stacks of which `_chosen` takes no layer."""
    chosen = {place(weight.output).stack for weight in _chosen(weights, most, cost)}
    return sorted({place(weight.output).stack for weight in weights} - chosen)
