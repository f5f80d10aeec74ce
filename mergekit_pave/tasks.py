"""The graph tasks that join calibration, decomposition and allocation to a merge.

Two phases come before the merge and fill the caches with what they lack: `CalibrateModel` for each model, then for each
weight

    LoadTensor --> DecomposeWeight

The merge only reads. For each output tensor and each model that is purified in it:

    LoadTail ----+--> AllocateRanks --> PurifyTensor --> GatherPurified
                 |    (all models)          ^   |
    LoadTensor --|--------------------------+   +--> PurificationStats --> WriteReport

A merge by `regmean` has its own task in the place of mergekit's, which reads the covariances, too:

    GatherTensors (or GatherPurified) --> MergeByRegMean --> RegMeanStats --> WriteReport

mergekit's executor runs them like its own: it streams, moves tensors to the accelerator and frees them. Values that
travel between tasks are therefore plain dicts of tensors and numbers. A covariance is no such value: it is read where
it is used, so that only one at a time is in memory, however many models there are.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Any, Optional

import torch
import tqdm
from mergekit.common import ImmutableMap, ModelReference, dtype_from_name
from mergekit.graph import Task
from mergekit.io.tasks import FinalizeModel, GatherTensors, LoadTensor
from mergekit.io.tensor_writer import TensorWriter
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from pydantic import BaseModel
from torch import Tensor

from mergekit_pave._outputs import REPORT_NAME
from mergekit_pave.allocation import allocate_ranks
from mergekit_pave.cache import Artefact
from mergekit_pave.calibration import distributed
from mergekit_pave.calibration.layers import Linear
from mergekit_pave.calibration.run import StoredCovariances, calibrate, stored_covariances
from mergekit_pave.config import RelativeRegularization
from mergekit_pave.errors import PaveError
from mergekit_pave.failures import advising
from mergekit_pave.files import replacing
from mergekit_pave.purification import decompose_weight, leave_slices, missed_layers, purify_weight
from mergekit_pave.regmean import Layer, data_share
from mergekit_pave.report import (
    FEW_TOKENS,
    NEVER_CALLED,
    complete,
    left_experts,
    left_weights,
    regmean_summary,
    regmean_warnings,
    summary,
    warnings,
    written_weights,
)

LOG = logging.getLogger(__name__)

_TENSORS = ("directions", "coefficients", "values")


class _Calibration(BaseModel, frozen=True):
    """What sees to the covariances of one model. It is executed before any graph, so it is no task of one.

    Attributes:
        model: the model's name, for messages.
        wanted: the layers that are to be purified, or whose covariances `regmean` needs.
        purified: the layers among them that are to be purified.
        size: the number of weights in all of the model's linear layers.
    """

    folder: str
    model: str
    wanted: tuple[Linear, ...]
    purified: tuple[Linear, ...]
    size: int

    @property
    def is_done(self) -> bool:
        """Whether the cache has the covariances; they may still turn out to be damaged."""
        return Artefact(Path(self.folder)).manifest() is not None

    def never_called(self) -> list[Linear]:
        """See `missed_layers`. What is measured for `regmean` alone may be missed: it falls back, and says so."""
        if not self.purified:
            return []
        return missed_layers(self.model, self.purified, self.size, stored_covariances(self.folder))


class CalibrateModel(_Calibration):
    """Make sure that a model's covariances are in the cache."""

    # A Job and a Runtime; they have come from us, so pydantic need not look into them.
    job: Any
    runtime: Any

    # The folder's name is a hash of everything that determines the result.
    def __hash__(self) -> int:
        return hash(self.folder)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CalibrateModel) and self.folder == other.folder

    def execute(self) -> None:
        calibrate(self.job, Artefact(Path(self.folder)), self.runtime)
        if distributed.rank() == 0:  # the others need not wait until it has written all
            self.never_called()


class GivenCovariance(_Calibration):
    """Make sure that covariances which somebody else has made are intact."""

    def execute(self) -> None:
        if not Artefact(Path(self.folder)).is_intact():
            raise PaveError(
                f"the covariances at {self.folder} are damaged: a file is not what their manifest says; fetch them again"
            )
        self.never_called()


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
    """The tail of one weight, computed and put into the cache, where `LoadTail` finds it. The covariances are there."""

    weight: LoadTensor
    calibration: CalibrateModel | GivenCovariance
    layer: Linear
    regularization: float | RelativeRegularization
    count: int
    min_tokens: int
    folder: str

    def arguments(self) -> dict[str, Task]:
        return {"weight": self.weight}

    @property
    def cache(self) -> int:
        """Bytes of cache that it takes at most."""
        return 4 * len(self.layer.layers) * sum(self.layer.shape) * self.count

    def execute(self, weight: Tensor) -> None:
        artefact = Artefact(Path(self.folder))
        with artefact.lock():
            if has_tail(artefact.folder, self.count, self.min_tokens):
                return  # another process has just made it
            # What another merge needs of it has to stay: a tail is only ever replaced by a wider one.
            before = artefact.manifest() or {"count": 0, "min_tokens": self.min_tokens}
            count, min_tokens = max(self.count, before["count"]), min(self.min_tokens, before["min_tokens"])
            known, where = stored_covariances(self.calibration.folder), (str(self.model), self.tensor)
            with advising(f"{self.model}: decomposing {self.tensor}", weight.device):
                tail = decompose_weight(weight, self.layer, known, self.regularization, count, min_tokens, where)
            tail["values"] = torch.from_numpy(tail["values"])
            # The name differs from that of the file before, which somebody may just be reading.
            name = f"tail-{count}-{min_tokens}.safetensors"
            entry = artefact.write(name, {key: tail.pop(key) for key in _TENSORS})
            about = {"model": str(self.model), "tensor": self.tensor, "count": count, "min_tokens": min_tokens}
            artefact.complete({"files": {name: entry}, **tail, **about})
            artefact.remove_others()


class LoadTail(_TensorTask):
    """The tails of the matrices of one weight from the cache. Value: see `decompose_weight`; they may have more than `count`
    components.

    Attributes:
        unchanged: the experts that have none, for they equal the base model's.
    """

    folder: str
    count: int
    min_tokens: int
    unchanged: tuple[int, ...] = ()

    def arguments(self) -> dict[str, Task]:
        return {}

    def execute(self) -> dict[str, Any]:
        # Another process may put a wider tail in its place just now; then that is there.
        tail = self._read() or self._read()
        if tail is None:
            raise PaveError(f"the cache entry {self.folder} was removed or damaged during the run; run again")
        return tail

    def _read(self) -> Optional[dict[str, Any]]:
        manifest = _tail_manifest(Path(self.folder), self.count, self.min_tokens)
        if manifest is None:
            return None
        try:
            tensors = Artefact(Path(self.folder)).read(*manifest["files"])
        except PaveError:
            return None
        tensors["values"] = tensors["values"].numpy()  # see `decompose_weight`
        return leave_slices({**tensors, "slices": manifest["slices"], "left": manifest["left"]}, self.min_tokens, self.unchanged)


def has_tail(folder: Path, count: int, min_tokens: int) -> bool:
    """Whether the cache has intact tails of at least `count` components, for every expert that saw `min_tokens` tokens."""
    return _tail_manifest(folder, count, min_tokens) is not None


def _tail_manifest(folder: Path, count: int, min_tokens: int) -> Optional[dict[str, Any]]:
    """The manifest of such tails, or None where the cache has none."""
    artefact = Artefact(folder)
    manifest = artefact.manifest()
    if manifest is None or manifest["count"] < count:
        return None
    missing = [tokens for tokens in manifest["left"].values() if tokens >= max(1, min_tokens)]
    return manifest if not missing and artefact.has_files(manifest) else None


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
    """W' of one weight. Value: see `purify_weight`."""

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
        with advising(f"{self.model}: purifying {self.tensor}", weight.device):
            return purify_weight(
                weight,
                base,
                tail,
                allocation[self.position],
                transposed=self.transposed,
                target=self.target,
                dtype=dtype_from_name(self.dtype) or weight.dtype,
                row={"tensor": self.tensor, "output": self.allocation.output, "model": str(self.model)},
            )


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

    purified: ImmutableMap[ModelReference, PurifyTensor]

    def arguments(self) -> dict[str, Task]:
        return {
            f"{model}:{info.name}": self.purified[model] if model in self.purified else load_stored(self, model)
            for model, info in self.weight_info.items()
        }

    def execute(self, **kwargs) -> dict[ModelReference, Tensor]:
        tensors = super().execute(**tensors_of(kwargs))
        for model, tensor in tensors.items():
            dtype = self.weight_info[model].force_dtype or self.dtype
            tensors[model] = tensor.to(dtype_from_name(dtype)) if dtype else tensor
        return tensors


def tensors_of(inputs: dict[str, Any]) -> dict[str, Optional[Tensor]]:
    """The tensors alone, of inputs some of which `PurifyTensor` has made, with what is told of them."""
    return {key: value["tensor"] if isinstance(value, dict) else value for key, value in inputs.items()}


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

    def execute(self, tensors: dict[ModelReference, Tensor]) -> Optional[Tensor]:
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
        return {one.model: stored_covariances(one.calibration.folder) for one in self.measured}

    def _lacking(self, known: dict[ModelReference, StoredCovariances]) -> list[Optional[str]]:
        """Of each matrix, why it cannot be merged with covariances: all models need one."""
        reasons: list[Optional[str]] = [None] * len(self.layer.layers)
        for one in self.measured:
            for i, names in enumerate(one.layer.layers):
                tokens = known[one.model].tokens(names)
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
    """Write pave_report.json beside the merged model, and say in one line what was purified.

    It waits until the weights are complete, as it says what they are, and as the report of an earlier merge goes only then.
    """

    out_path: str
    finalize: FinalizeModel
    header: str
    stats: tuple[PurificationStats, ...]
    closed_forms: tuple[RegMeanStats, ...]

    def __hash__(self) -> int:
        return hash((WriteReport, self.out_path))

    def arguments(self) -> dict[str, Task]:
        closed = {f"closed{i}": task for i, task in enumerate(self.closed_forms)}
        weights = {"finalized": self.finalize, "writer": self.finalize.writer_task}
        return {str(i): task for i, task in enumerate(self.stats)} | closed | weights

    def main_thread_only(self) -> bool:
        return True

    def execute(self, finalized: None, writer: TensorWriter, **stats: dict[str, Any]) -> None:
        done = ((str(task.model), stats[str(i)]) for i, task in enumerate(self.stats))
        report = complete(json.loads(self.header), done)
        if "regmean" in report:
            merged = [stats[f"closed{i}"] for i in range(len(self.closed_forms))]
            report["regmean"]["closed_form"] = [one["row"] for one in merged if one["row"]]
            for one in merged:
                report["regmean"]["as_task_arithmetic"] |= one["left"]
            report["warnings"] += regmean_warnings(report["regmean"])
        folder = Path(self.out_path)
        told = report | {"weights": written_weights(folder, _files_of(writer))}
        with replacing(folder / REPORT_NAME) as temporary:
            temporary.write_text(json.dumps(told, indent=1) + "\n")
        with tqdm.tqdm.external_write_mode(sys.stderr):  # mergekit's bar is on that line
            if report["purified"]:
                LOG.info(summary(report))
            if "regmean" in report:
                LOG.info(regmean_summary(report["regmean"]))
            for line in left_experts(report) + left_weights(report):
                LOG.info(line)
            for warning in warnings(report) + (regmean_warnings(report["regmean"]) if "regmean" in report else []):
                LOG.warning(warning)


def _files_of(writer: TensorWriter) -> set[str]:
    """The files that a writer has written."""
    files = set(writer.weight_map.values())
    # A single file gets its last name after it is noted.
    return {file.replace("-1.", ".") for file in files} if writer.shards_written == 1 else files
