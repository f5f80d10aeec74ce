"""The graph tasks that join calibration, decomposition and allocation to a merge.

For each output tensor and each model that is purified in it:

    CalibrateModel --> DecomposeWeight --+--> AllocateRanks --> PurifyTensor --> PurifiedTensor --> GatherPurified
    LoadTensor --------^  (or LoadTail) -+    (all models)          |
                                                                    +--> PurificationStats --> WriteReport

A merge by `regmean` has its own task in the place of mergekit's, which waits for the calibrations, too:

    CalibrateModel, GatherTensors (or GatherPurified) --> MergeByRegMean --> RegMeanStats --> WriteReport

mergekit's executor runs them like its own: it streams, moves tensors to the accelerator and frees them. Values that
travel between tasks are therefore plain dicts of tensors and numbers. A covariance is no such value: it is read where
it is used, so that only one at a time is in memory, however many models there are.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any, Optional

import torch
from mergekit.common import ImmutableMap, ModelReference, dtype_from_name
from mergekit.graph import Task
from mergekit.io.tasks import GatherTensors, LoadTensor
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from torch import Tensor

from mergekit_pave.allocation import allocate_ranks
from mergekit_pave.cache import Artefact
from mergekit_pave.calibration import distributed
from mergekit_pave.calibration.layers import Linear
from mergekit_pave.calibration.run import StoredCovariances, calibrate
from mergekit_pave.config import RelativeRegularization
from mergekit_pave.covariance import Covariance
from mergekit_pave.errors import PaveError
from mergekit_pave.regmean import Layer, data_share, matrices
from mergekit_pave.report import (
    FEW_TOKENS,
    NEVER_CALLED,
    REPORT_NAME,
    left_experts,
    never_called,
    regmean_summary,
    summary,
    warnings,
)
from mergekit_pave.subspace import Tail, coefficients, drop_components, tail_components

LOG = logging.getLogger(__name__)

_TAIL_FILE = "tail.safetensors"


class _CovarianceTask(Task[str]):
    """A task that sees to the covariances of one model. Value: their folder.

    Attributes:
        model: the model's name, for messages.
        wanted: the layers that are to be purified, or whose covariances `regmean` needs.
        size: the number of weights in all of the model's linear layers.
    """

    folder: str
    model: str
    wanted: tuple[Linear, ...]
    size: int

    @property
    def is_done(self) -> bool:
        """Whether the cache has the covariances; they may still turn out to be damaged."""
        return Artefact(Path(self.folder)).manifest() is not None

    def never_called(self) -> list[Linear]:
        """Layers that calibration has not reached, which are left as they are, but not most of a model.

        Of experts the tokens are counted instead.

        Raises:
            PaveError: they hold more than half of its weights in linear layers, or are all that was to be purified.
        """
        known = StoredCovariances(Artefact(Path(self.folder)))
        missed = [linear for linear in self.wanted if not linear.experts and not known.tokens(linear.module)]
        share = sum(linear.size for linear in missed) / self.size
        if share > 0.5 or len(missed) == len(self.wanted):
            raise PaveError(
                f"{self.model}: {len(missed)} of {len(self.wanted)} layers to be purified were never called during calibration "
                f"(such as {missed[0].module}); they hold {share:.0%} of the weights in the model's linear layers. Use data that "
                "reaches them, such as images for a vision tower, or put them under pave.exclude to merge them as they are"
            )
        return missed

    def arguments(self) -> dict[str, Task]:
        return {}

    def priority(self) -> int:
        # Before mergekit opens its output: what fails here leaves nothing behind.
        return 20000

    def main_thread_only(self) -> bool:
        # Before a multi-GPU executor splits the rest into islands.
        return True


class CalibrateModel(_CovarianceTask):
    """Make sure that a model's covariances are in the cache."""

    # A Job and a Runtime; they have come from us, so pydantic need not look into them.
    job: Any
    runtime: Any

    # The folder's name is a hash of everything that determines the result.
    def __hash__(self) -> int:
        return hash(self.folder)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CalibrateModel) and self.folder == other.folder

    def execute(self) -> str:
        calibrate(self.job, Artefact(Path(self.folder)), self.runtime)
        if distributed.rank() == 0:  # the others need not wait until it has written all
            self.never_called()
        return self.folder


class GivenCovariance(_CovarianceTask):
    """Make sure that covariances which somebody else has made are intact."""

    def execute(self) -> str:
        if not Artefact(Path(self.folder)).is_intact():
            raise PaveError(
                f"the covariances at {self.folder} are damaged: a file is not what their manifest says; fetch them again"
            )
        self.never_called()
        return self.folder


class _TensorTask(Task[Any]):
    """A task that belongs to one source tensor of one model and is scheduled beside mergekit's own for it."""

    model: ModelReference
    tensor: str

    # Tasks nest, and mergekit hashes them often: hashing all that is below each would take longer than the merge.
    def __hash__(self) -> int:
        return hash((type(self), self.model, self.tensor))

    def group_label(self) -> Optional[str]:
        return self.tensor

    def uses_accelerator(self) -> bool:
        return True


class DecomposeWeight(_TensorTask):
    """The tail of one weight, computed and put into the cache. Value: see `LoadTail`."""

    weight: LoadTensor
    calibration: CalibrateModel | GivenCovariance
    layer: Linear
    regularization: float | RelativeRegularization
    count: int
    min_tokens: int
    folder: str

    def arguments(self) -> dict[str, Task]:
        return {"weight": self.weight, "covariances": self.calibration}

    def execute(self, weight: Tensor, covariances: str) -> dict[str, Any]:
        if weight.shape != self.layer.stored_shape or not weight.is_floating_point():
            raise PaveError(
                f"{self.model}: {self.tensor} is a {weight.dtype} tensor of shape {tuple(weight.shape)}, but the layer "
                f"{self.layer.module} of the architecture has a float weight of shape {self.layer.stored_shape}; "
                "it cannot be purified"
            )
        if not weight.isfinite().all():
            raise PaveError(f"{self.model}: {self.tensor} has values that are not finite")
        known = StoredCovariances(Artefact(Path(covariances)))
        tails, removed, slices, left = [], [], [], {}
        experts = self.layer.experts or (None,)
        for matrix, layer, expert in zip(matrices(weight, self.layer.transposed), self.layer.layers, experts, strict=True):
            if known.tokens(layer) < max(1, self.min_tokens):
                left["" if expert is None else str(expert)] = known.tokens(layer)
                continue
            covariance = known.load(layer).to(weight.device)
            tail = self._tail(matrix, covariance, layer)
            # float32 adds an error of about 1e-7 of ||W||, which is what storing W' in float32 costs, too.
            tails.append(dataclasses.replace(tail, directions=tail.directions.float()))
            removed.append(coefficients(matrix, tails[-1].directions))
            slices.append({"expert": expert, "largest": tail.largest, "energy": tail.energy, "tokens": covariance.tokens})
        (d_out, d_in), like = self.layer.shape, {"device": weight.device}
        tensors = {
            "directions": torch.stack([tail.directions for tail in tails])
            if tails
            else torch.zeros(0, d_out, self.count, **like),
            "coefficients": torch.stack(removed) if removed else torch.zeros(0, self.count, d_in, **like),
            "values": torch.stack([tail.values for tail in tails]) if tails else torch.zeros(0, self.count, **like).double(),
        }
        artefact = Artefact(Path(self.folder))
        entry = artefact.write(_TAIL_FILE, tensors)
        about = {"model": str(self.model), "tensor": self.tensor, "count": self.count, "min_tokens": self.min_tokens}
        artefact.complete({"files": {_TAIL_FILE: entry}, "slices": slices, "left": left, **about})
        return {**tensors, "slices": slices, "left": left}

    def _tail(self, weight: Tensor, covariance: Covariance, layer: str) -> Tail:
        shift = self.regularization
        if isinstance(shift, RelativeRegularization):
            shift = shift.relative * covariance.mean_diagonal()
        if not shift > 0:
            raise PaveError(
                f"{self.model}: all calibration inputs of {layer} are zero, so a relative regularization is zero too; "
                "set an absolute pave.regularization or exclude the layer"
            )
        return tail_components(weight, covariance, shift, self.count)


class LoadTail(_TensorTask):
    """The tails of the matrices of one weight from the cache: of one matrix, or of all experts that saw enough tokens.

    Value: {directions: U_t, (tails, d_out, at least count), coefficients: U_t^T W, (tails, at least count, d_in), values:
    (tails, at least count), ascending, slices: what else is known of each: [{expert, largest, energy, tokens}], left:
    {expert, or "": the tokens it saw, which are too few}}.
    """

    folder: str
    count: int
    min_tokens: int

    def arguments(self) -> dict[str, Task]:
        return {}

    def execute(self) -> dict[str, Any]:
        if not has_tail(Path(self.folder), self.count, self.min_tokens):
            raise PaveError(f"the cache entry {self.folder} was removed or replaced during the run; run again")
        artefact = Artefact(Path(self.folder))
        manifest, tensors = artefact.manifest(), artefact.read(_TAIL_FILE)
        enough = [i for i, known in enumerate(manifest["slices"]) if known["tokens"] >= self.min_tokens]
        few = {str(known["expert"]): known["tokens"] for i, known in enumerate(manifest["slices"]) if i not in enough}
        if few:
            tensors = {name: tensor[enough] for name, tensor in tensors.items()}
        return {**tensors, "slices": [manifest["slices"][i] for i in enough], "left": manifest["left"] | few}


def has_tail(folder: Path, count: int, min_tokens: int) -> bool:
    """Whether the cache has intact tails of at least `count` components, for every expert that saw `min_tokens` tokens."""
    artefact = Artefact(folder)
    manifest = artefact.manifest()
    if manifest is None or manifest["count"] < count:
        return False
    missing = [tokens for tokens in manifest["left"].values() if tokens >= max(1, min_tokens)]
    return not missing and artefact.is_intact()


class AllocateRanks(Task[list]):
    """How many components each model drops of one output tensor.

    Value: per model, in the order of `tails`, one number for each of its slices. The same expert of several models is
    allocated together, over those models in which it has a tail.
    """

    output: str
    tails: tuple[Task, ...]
    shares: tuple[int, ...]
    caps: tuple[int, ...]

    def __hash__(self) -> int:
        return hash((AllocateRanks, self.output))

    def arguments(self) -> dict[str, Task]:
        return {str(i): tail for i, tail in enumerate(self.tails)}

    def group_label(self) -> Optional[str]:
        return self.tails[-1].group_label()

    def execute(self, **tails: dict[str, Any]) -> list[list[int]]:
        members: dict[Any, list[tuple[int, int]]] = {}  # by expert: (model, place among its slices)
        for model in range(len(self.tails)):
            for place, known in enumerate(tails[str(model)]["slices"]):
                members.setdefault(known["expert"], []).append((model, place))
        drops = [[0] * len(tails[str(model)]["slices"]) for model in range(len(self.tails))]
        for of_expert in members.values():
            spectra = []
            for model, place in of_expert:
                largest = tails[str(model)]["slices"][place]["largest"]
                spectra.append((tails[str(model)]["values"][place] / (largest or 1.0)).tolist())
            shares, caps = ([numbers[model] for model, _ in of_expert] for numbers in (self.shares, self.caps))
            for (model, place), drop in zip(of_expert, allocate_ranks(spectra, shares, caps)):
                drops[model][place] = drop
        return drops


class PurifyTensor(_TensorTask):
    """W' of one weight. Value: {tensor, stats, left}; see `PurificationStats`."""

    weight: LoadTensor
    base: Optional[LoadTensor]
    tail: Task
    allocation: AllocateRanks
    position: int
    transposed: bool
    target: str
    dtype: Optional[str]

    def arguments(self) -> dict[str, Task]:
        needed = {"weight": self.weight, "tail": self.tail, "allocation": self.allocation}
        return needed | ({"base": self.base} if self.base else {})

    def execute(self, weight: Tensor, tail: dict, allocation: list[list[int]], base: Optional[Tensor] = None) -> dict[str, Any]:
        if self.target == "task_vector" and base is None:
            raise PaveError(f"{self.model}: {self.tensor} is not in the base model; put it under pave.exclude")
        dtype = dtype_from_name(self.dtype) or weight.dtype
        own = matrices(weight, self.transposed)
        bases = None if base is None else matrices(base, self.transposed)
        # What has no tail stays as it is: an expert with too few tokens, a layer that was never called.
        every = len(tail["slices"]) == len(own)
        result = torch.empty_like(weight, dtype=dtype) if every else weight.to(dtype, copy=True)
        stats = []
        for place, (known, drop) in enumerate(zip(tail["slices"], allocation[self.position], strict=True)):
            i = known["expert"] if weight.dim() == 3 else 0
            directions, of_base = tail["directions"][place, :, :drop], None if bases is None else bases[i]
            known_along = tail["coefficients"][place, :drop]
            along = known_along if self.target == "weights" else coefficients(own[i], directions, of_base)
            out = matrices(result, self.transposed)[i]
            removed, change = drop_components(own[i], directions, along, of_base, out=out)
            components = min(own[i].shape)
            stats.append(
                {
                    "tensor": self.tensor,
                    **({} if known["expert"] is None else {"expert": known["expert"]}),
                    "output": self.allocation.output,
                    "model": str(self.model),
                    "components": components,
                    "kept": components - drop,
                    "energy_dropped": tail["values"][place, :drop].square().sum().item() / (known["energy"] or 1.0),
                    "removed_norm": removed,
                    "change_norm": change,
                    "tokens": known["tokens"],
                }
            )
        left = {}
        for expert, tokens in tail["left"].items():
            name = f"{self.tensor}[{expert}]" if weight.dim() == 3 else self.tensor
            left[name] = f"{FEW_TOKENS} ({tokens})" if expert else NEVER_CALLED
        return {"tensor": result, "stats": stats, "left": left}


class PurifiedTensor(_TensorTask):
    """W' alone."""

    purify: PurifyTensor

    def arguments(self) -> dict[str, Task]:
        return {"purified": self.purify}

    def execute(self, purified: dict[str, Any]) -> Tensor:
        return purified["tensor"]


class PurificationStats(_TensorTask):
    """What purification did to one weight.

    Value: {rows: those of the report, one a matrix, left: {a matrix that stays as it is: why}}.
    """

    purify: PurifyTensor

    def arguments(self) -> dict[str, Task]:
        return {"purified": self.purify}

    def priority(self) -> int:
        # At once, so that the tensor beside it is not kept for it.
        return 100

    def uses_accelerator(self) -> bool:
        return False

    def execute(self, purified: dict[str, Any]) -> dict[str, Any]:
        return {"rows": purified["stats"], "left": purified["left"]}


class GatherPurified(GatherTensors):
    """mergekit's gather, with some of its inputs purified. Inputs are read as stored and cast here."""

    purified: ImmutableMap[ModelReference, PurifiedTensor]

    def arguments(self) -> dict[str, Task]:
        return {
            f"{model}:{info.name}": self.purified[model] if model in self.purified else load_stored(self, model)
            for model, info in self.weight_info.items()
        }

    def execute(self, **kwargs) -> dict[ModelReference, Tensor]:
        tensors = super().execute(**kwargs)
        for model, tensor in tensors.items():
            dtype = self.weight_info[model].force_dtype or self.dtype
            tensors[model] = tensor.to(dtype_from_name(dtype)) if dtype else tensor
        return tensors


def load_stored(gather: GatherTensors, model: ModelReference) -> LoadTensor:
    """The task that reads one of a gather's tensors in the precision in which it is stored."""
    info = gather.weight_info[model]
    return LoadTensor(
        model=model,
        tensor=info.name,
        device=gather.device,
        optional=info.optional,
        aliases=info.aliases,
        tied_names=info.tied_names,
    )


@dataclasses.dataclass(frozen=True)
class Measured:
    """One model's side of a weight that is merged in closed form with covariances."""

    model: ModelReference
    layer: Linear
    calibration: CalibrateModel | GivenCovariance
    min_tokens: int


class MergeByRegMean(ExecuteMergeMethodTask):
    """mergekit's task for an output tensor, which also tells `regmean` what layer the tensor is the weight of.

    Attributes:
        layer: the layer, or None of a tensor that is merged as task_arithmetic does.
        measured: the models, where their covariances are part of the metric.
    """

    layer: Optional[Linear]
    measured: tuple[Measured, ...]

    def __hash__(self) -> int:
        return hash((MergeByRegMean, self.output_weight.name))

    def arguments(self) -> dict[str, Task]:
        return super().arguments() | {str(i): one.calibration for i, one in enumerate(self.measured)}

    def execute(self, tensors: dict[ModelReference, Tensor], **folders: str) -> Optional[Tensor]:
        for model, tensor in tensors.items() if self.layer else ():
            if tensor.shape != self.layer.stored_shape:
                raise PaveError(
                    f"{model}: {self.output_weight.name} is a tensor of shape {tuple(tensor.shape)}, but the layer "
                    f"{self.layer.module} of the architecture has one of {self.layer.stored_shape}; regmean cannot merge it"
                )
        known = self._known()
        layers = {one.model: one.layer.layers for one in self.measured}
        layer = self.layer and Layer(
            transposed=self.layer.transposed,
            measured=tuple(reason is None for reason in self._lacking(known)) if self.measured else None,
            covariance=lambda model, i: known[model].load(layers[model][i]),
        )
        told = ImmutableMap(data={**dict(self.parameters.items()), "layer": layer})
        return ExecuteMergeMethodTask.execute(self.model_copy(update={"parameters": told}), tensors)

    def _known(self) -> dict[ModelReference, StoredCovariances]:
        return {one.model: StoredCovariances(Artefact(Path(one.calibration.folder))) for one in self.measured}

    def _lacking(self, known: dict[ModelReference, StoredCovariances]) -> list[Optional[str]]:
        """Of each matrix, why it cannot be merged with covariances: all models need one."""
        reasons: list[Optional[str]] = [None] * len(self.layer.layers)
        for one in self.measured:
            for i, name in enumerate(one.layer.layers):
                tokens = known[one.model].tokens(name)
                if tokens < max(1, one.min_tokens) and reasons[i] is None:
                    reasons[i] = f"{FEW_TOKENS} ({tokens}, {one.model})" if one.layer.experts else f"{NEVER_CALLED} ({one.model})"
        return reasons

    def left(self) -> dict[str, str]:
        """The matrices of a linear layer that are merged as task_arithmetic does, and why; calibration has to be done."""
        name, stacked = self.output_weight.name, self.layer.stacked
        found = enumerate(self._lacking(self._known()))
        return {f"{name}[{self.layer.experts[i]}]" if stacked else name: reason for i, reason in found if reason}


class RegMeanStats(Task[dict]):
    """How one weight of a linear layer was merged. Value: {row: that of the report, or None, left: {matrix: why}}."""

    merge: MergeByRegMean

    def __hash__(self) -> int:
        return hash((RegMeanStats, self.merge))

    def arguments(self) -> dict[str, Task]:
        return {"merged": self.merge}

    def group_label(self) -> Optional[str]:
        return self.merge.group_label()

    def priority(self) -> int:
        # At once, so that the tensor is not kept for it.
        return 100

    def execute(self, merged: Optional[Tensor]) -> dict[str, Any]:
        parameters, left = self.merge.parameters, self.merge.left()
        row = {
            "tensor": self.merge.output_weight.name,
            "covariance": data_share(parameters["covariance"], self.merge.base_model is not None),
            "lambda": parameters["lambda"],
            "reduce_off_diagonal": parameters["reduce_off_diagonal"],
        }
        return {"row": row if len(left) < len(self.merge.layer.layers) else None, "left": left}


class WriteReport(Task[None]):
    """Write pave_report.json beside the merged model, and say in one line what was purified."""

    out_path: str
    header: str
    stats: tuple[PurificationStats, ...]
    closed_forms: tuple[RegMeanStats, ...]

    def __hash__(self) -> int:
        return hash((WriteReport, self.out_path))

    def arguments(self) -> dict[str, Task]:
        closed = {f"closed{i}": task for i, task in enumerate(self.closed_forms)}
        return {str(i): task for i, task in enumerate(self.stats)} | closed

    def main_thread_only(self) -> bool:
        return True

    def execute(self, **stats: dict[str, Any]) -> None:
        report = json.loads(self.header)
        report["purified"] = [row for i in range(len(self.stats)) for row in stats[str(i)]["rows"]]
        for i, task in enumerate(self.stats):
            report["models"][str(task.model)]["left_as_they_are"] |= stats[str(i)]["left"]
        if "regmean" in report:
            done = [stats[f"closed{i}"] for i in range(len(self.closed_forms))]
            report["regmean"]["closed_form"] = [one["row"] for one in done if one["row"]]
            for one in done:
                report["regmean"]["as_task_arithmetic"] |= one["left"]
        found = warnings(report)
        report["warnings"] += found
        folder = Path(self.out_path)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / REPORT_NAME).write_text(json.dumps(report, indent=1) + "\n")
        if report["purified"]:
            LOG.info(summary(report))
        if "regmean" in report:
            LOG.info(regmean_summary(report["regmean"]))
        for line in left_experts(report) + never_called(report):
            LOG.info(line)
        for warning in found:
            LOG.warning(warning)
