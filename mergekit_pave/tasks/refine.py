"""Refining a merge block by block, before mergekit writes it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from mergekit.common import ModelReference
from mergekit.graph import Executor, Task
from mergekit.io.tasks import GatherTensors, LoaderCache
from torch import Tensor, nn

from mergekit_pave.calibration.architecture import Architecture
from mergekit_pave.calibration.forward import UnalignedInputError
from mergekit_pave.calibration.job import Job, Runtime
from mergekit_pave.calibration.lockstep import Loads, WholeModel
from mergekit_pave.calibration.models import find_blocks, inference_dtype, load_model, load_tensors
from mergekit_pave.calibration.refine_cost import RefineCost, refine_cost
from mergekit_pave.calibration.side_by_side import Expert, Reached, run_side_by_side
from mergekit_pave.calibration.weights import Checkpoint, StreamedModel, UnknownWeightError
from mergekit_pave.core import refine
from mergekit_pave.core.failures import advising
from mergekit_pave.core.linear import Linear
from mergekit_pave.core.reasons import NEVER_CALLED
from mergekit_pave.errors import PaveError
from mergekit_pave.progress import bar
from mergekit_pave.settings import Refine
from mergekit_pave.tasks.store import TensorStore

LOG = logging.getLogger(__name__)

REMEDY = "A smaller pave.calibration.batch_size needs less, and so do fewer `samples` or a smaller `max_length`"


@dataclass(frozen=True)
class RefinedLayer:
    """A layer that is to be fitted.

    Attributes:
        number: of the output tensor that is its weight.
        name: of that tensor.
        linear: the layer, the same in all models.
        gather: gives the weights of the base model and of the experts.
        shares: the weight of each expert in the merge.
    """

    number: int
    name: str
    linear: Linear
    gather: GatherTensors
    base: ModelReference
    shares: dict[ModelReference, float]


@dataclass(frozen=True)
class Refinement:
    """What is to be refined.

    Attributes:
        layers: by the layer's path.
        experts: what each expert is run on.
        config, architecture: of the merged model.
        resized: the number of its token embedding, where mergekit gives it another number of rows than the base model's.
        numbers: of the output tensors that make up the merged model's backbone.
        folder: where they are kept while the merge runs.
        size: how many bytes they have.
    """

    settings: Refine
    layers: dict[str, RefinedLayer]
    experts: dict[ModelReference, Job]
    config: transformers.PretrainedConfig
    architecture: Architecture
    resized: int | None
    numbers: tuple[int, ...]
    folder: Path
    size: int
    runtime: Runtime

    def estimate(self) -> RefineCost:
        """The cost of refining, apart from `size`."""
        return refine_cost(
            self.architecture,
            [job.run for job in self.experts.values()],
            [layer.linear for layer in self.layers.values()],
            max(job.batch_size for job in self.experts.values()),
            inference_dtype(self.config, self.runtime.device).itemsize,
            self.settings.covariance,
        )


@dataclass
class Refined:
    """What refining did: rows of the report, and by tensor why a layer keeps what the method gave it."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


class MergedTensors:
    """The output tensors of a merge as the weights of a model: each is merged once, and kept in a store."""

    def __init__(self, tasks: dict[int, Task], names: dict[str, int], store: TensorStore, run: Callable[[Task], Any]):
        """
        Args:
            tasks: those that merge them, by number.
            names: the number of a tensor by each of its names.
            run: executes a task.
        """
        self.names, self._tasks, self._store, self._run = names, tasks, store, run

    def find(self, names: list[str]) -> Tensor | None:
        number = next((self.names[name] for name in names if name in self.names), None)
        return None if number is None else self.get(number)

    def get(self, number: int) -> Tensor | None:
        if number not in self._store:
            self._store.put(number, self._run(self._tasks[number]))
        return self._store.get(number)

    def flush(self) -> None:
        LoaderCache().flush_all()


def refine_merge(planned: Refinement, tasks: dict[int, Task], names: dict[str, int], store: TensorStore, storage: str) -> Refined:
    """Fit the layers in the order in which the model calls them. Afterwards the store has all of `planned.numbers`.

    Args:
        tasks: mergekit's, by the output tensor's number.
        names: the numbers by the tensors' names.
        storage: where mergekit's executor keeps tensors between tasks.

    Raises:
        PaveError: the models cannot be run side by side, memory runs out, or something is not finite.
    """
    run = functools.partial(_value, device=planned.runtime.device, storage=storage)
    merged = MergedTensors(tasks, names, store, run)
    if planned.resized is not None:
        planned.config.get_text_config().vocab_size = len(merged.get(planned.resized))
    unpadded, open_model = False, _streamed
    while True:
        try:
            with advising("running the models side by side", planned.runtime.device, REMEDY):
                refined = _refine(planned, merged, open_model, unpadded, store, run)
            break
        except UnknownWeightError as error:
            LOG.info("refining cannot load the models block by block (%s), loading them whole", error)
            open_model = _whole
        except UnalignedInputError as error:
            LOG.info("refining runs samples one by one, because padding cannot be told from tokens in %s", error)
            unpadded = True
        store.clear()
    for number in planned.numbers:
        merged.get(number)
    for layer in planned.layers.values():
        if layer.name not in refined.left and all(row["tensor"] != layer.name for row in refined.rows):
            refined.left[layer.name] = NEVER_CALLED
    return refined


def _value(task: Task, device: str, storage: str) -> Any:
    return next(value for done, value in Executor([task], math_device=device, storage_device=storage).run(quiet=True))


def _streamed(planned: Refinement, merged: MergedTensors) -> tuple[Loads, list[Loads]]:
    device = planned.runtime.device
    opened = [
        StreamedModel(job.architecture.cls, job.config, Checkpoint(job.folder), inference_dtype(job.config, device), device)
        for job in planned.experts.values()
    ]
    dtype = inference_dtype(planned.config, device)
    return StreamedModel(planned.architecture.cls, planned.config, merged, dtype, device), opened


def _whole(planned: Refinement, merged: MergedTensors) -> tuple[Loads, list[Loads]]:
    device = planned.runtime.device
    opened = [load_model(job.architecture.cls, job.config, job.folder, device) for job in planned.experts.values()]
    numbers = {number: name for name, number in reversed(merged.names.items())}
    tensors = {numbers[number]: merged.get(number) for number in planned.numbers}
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    model = load_tensors(planned.architecture.cls, planned.config, present, device)
    return WholeModel(model), [WholeModel(model) for model in opened]


def _refine(
    planned: Refinement,
    merged: MergedTensors,
    open_model: Callable[[Refinement, MergedTensors], tuple[Loads, list[Loads]]],
    unpadded: bool,
    store: TensorStore,
    run: Callable[[Task], Any],
) -> Refined:
    device, result = planned.runtime.device, Refined()
    ours, theirs = open_model(planned, merged)
    experts = [Expert(job.name, model, job.run, job.batch_size) for job, model in zip(planned.experts.values(), theirs)]
    inputs: dict[ModelReference, refine.Inputs | None] = {}
    with (
        torch.inference_mode(False),  # in that mode tensors do not count how often they are written to
        torch.no_grad(),
        bar(len(find_blocks(ours.model)), "Refining", "blocks", planned.runtime.quiet) as progress,
    ):
        for reached in run_side_by_side(ours, experts, planned.layers, unpadded, device):
            if reached.pairs is None:
                inputs = {}
                progress.update()
                continue
            layer = planned.layers[reached.path]
            with advising(f"refining {layer.name}", device):
                if reached.is_new:
                    inputs = {}  # let go before new ones are made
                    inputs = {model: _summed(reached, i, job) for i, (model, job) in enumerate(planned.experts.items())}
                weight = _fit(layer, planned.settings, inputs, run(layer.gather), store.get(layer.number).to(device), result)
            if weight is not None:
                store.put(layer.number, weight)
                parameters = ours.model.get_submodule(reached.path)._parameters
                value = weight.to(parameters["weight"].device, parameters["weight"].dtype)
                parameters["weight"] = nn.Parameter(value, requires_grad=False)
            del reached  # and with it the layer's inputs
    return result


def _summed(reached: Reached, number: int, job: Job) -> refine.Inputs | None:
    """
    Raises:
        PaveError: an input is not finite.
    """
    pairs = reached.pairs(number)
    try:
        return refine.summed(pairs)
    except ValueError as error:
        at_fault = "the merged model" if all(own.isfinite().all() for _, own in pairs) else "it"
        raise PaveError(
            f"{job.name}: the inputs that its samples give {reached.path} in {at_fault} are not finite, or too large. "
            "Look for NaN or infinity in the weights of all models. If there are none, run in float32 (without --cuda), or leave "
            "`refine` out"
        ) from error


def _fit(
    layer: RefinedLayer,
    settings: Refine,
    inputs: dict[ModelReference, refine.Inputs | None],
    weights: dict[ModelReference, Tensor],
    anchor: Tensor,
    result: Refined,
) -> Tensor | None:
    """The refined weight as it is stored, or None where there is nothing to fit it to.

    Raises:
        PaveError: a weight is not finite.
    """
    for model, weight in weights.items():
        if not weight.isfinite().all():
            raise PaveError(
                f"{model}: its weight {layer.name} is not finite, it holds NaN or infinity. Fetch the checkpoint again, or leave "
                "the model out of the merge"
            )

    def matrix(weight: Tensor) -> Tensor:
        weight = weight.to(anchor.device)
        return weight.mT if layer.linear.transposed else weight

    experts = [refine.Expert(share, matrix(weights[model]), inputs[model]) for model, share in layer.shares.items()]
    tokens = sum(expert.inputs.tokens for expert in experts if expert.inputs)
    if not all(expert.inputs for expert in experts):
        result.left[layer.name] = NEVER_CALLED
        return None
    before = refine.relative_error(matrix(anchor), experts)
    fitted = refine.refine(matrix(anchor), matrix(weights[layer.base]), experts, settings.covariance, settings.lambda_)
    if not fitted.isfinite().all():
        raise PaveError(
            f"refine: the fit of {layer.name} is not finite, although all models' weights are. Look whether the merge without "
            "`refine` is; a smaller lambda may help"
        )
    weight = matrix(fitted.to(anchor.device, anchor.dtype)).contiguous()
    after = refine.relative_error(matrix(weight), experts)
    result.rows.append({"tensor": layer.name, "tokens": tokens, "error_before": before, "error_after": after})
    return weight
