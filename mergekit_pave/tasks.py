"""The graph tasks that join calibration, decomposition and allocation to a merge.

For each output tensor and each model that is purified in it:

    CalibrateModel --> DecomposeWeight --+--> AllocateRanks --> PurifyTensor --> PurifiedTensor --> GatherPurified
    LoadTensor --------^  (or LoadTail) -+    (all models)          |
                                                                    +--> PurificationStats --> WriteReport

mergekit's executor runs them like its own: it streams, moves tensors to the accelerator and frees them. Values that
travel between tasks are therefore plain dicts of tensors and numbers. A covariance is no such value: it is read where
it is used, so that only one at a time is in memory, however many models there are.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Optional

from mergekit.common import ImmutableMap, ModelReference, dtype_from_name
from mergekit.graph import Task
from mergekit.io.tasks import GatherTensors, LoadTensor
from torch import Tensor

from mergekit_pave.allocation import allocate_ranks
from mergekit_pave.cache import Artefact
from mergekit_pave.calibration.run import calibrate, load_covariance
from mergekit_pave.config import RelativeRegularization
from mergekit_pave.errors import PaveError
from mergekit_pave.report import REPORT_NAME, summary, warnings
from mergekit_pave.subspace import drop_components, tail_components

LOG = logging.getLogger(__name__)

_TAIL_FILE = "tail.safetensors"


class _CovarianceTask(Task[str]):
    """A task that sees to the covariances of one model. Value: their folder."""

    folder: str

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
        return self.folder


class GivenCovariance(_CovarianceTask):
    """Make sure that covariances which somebody else has made are intact."""

    def execute(self) -> str:
        if not Artefact(Path(self.folder)).is_intact():
            raise PaveError(
                f"the covariances at {self.folder} are damaged: a file is not what their manifest says; fetch them again"
            )
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
    layer: str
    shape: tuple[int, int]
    transposed: bool
    regularization: float | RelativeRegularization
    count: int
    folder: str

    def arguments(self) -> dict[str, Task]:
        return {"weight": self.weight, "covariances": self.calibration}

    def execute(self, weight: Tensor, covariances: str) -> dict[str, Any]:
        weight = weight.mT if self.transposed else weight
        if weight.shape != self.shape or not weight.is_floating_point():
            raise PaveError(
                f"{self.model}: {self.tensor} is a {weight.dtype} tensor of shape {tuple(weight.shape)}, but the layer "
                f"{self.layer} of the architecture has a float weight of shape {self.shape}; it cannot be purified"
            )
        if not weight.isfinite().all():
            raise PaveError(f"{self.model}: {self.tensor} has values that are not finite")
        covariance = load_covariance(Artefact(Path(covariances)), self.layer).to(weight.device)
        shift = self.regularization
        if isinstance(shift, RelativeRegularization):
            shift = shift.relative * covariance.mean_diagonal()
        if not shift > 0:
            raise PaveError(
                f"{self.model}: all calibration inputs of {self.layer} are zero, so a relative regularization is zero too; "
                "set an absolute pave.regularization or exclude the layer"
            )
        tail = tail_components(weight, covariance, shift, self.count)
        # float32 adds an error of about 1e-7 of ||W||, which is what storing W' in float32 costs, too.
        directions = tail.directions.float()
        known = {"largest": tail.largest, "energy": tail.energy, "tokens": covariance.tokens}
        artefact = Artefact(Path(self.folder))
        entry = artefact.write(_TAIL_FILE, {"directions": directions, "values": tail.values})
        about = {"model": str(self.model), "tensor": self.tensor, "count": self.count}
        artefact.complete({"files": {_TAIL_FILE: entry}, **about, **known})
        return {"directions": directions, "values": tail.values, **known}


class LoadTail(_TensorTask):
    """The tail of one weight from the cache.

    Value: {directions: (d_out, at least count), values: ascending, largest, energy, tokens}.
    """

    folder: str
    count: int

    def arguments(self) -> dict[str, Task]:
        return {}

    def execute(self) -> dict[str, Any]:
        if not has_tail(Path(self.folder), self.count):
            raise PaveError(f"the cache entry {self.folder} was removed or replaced during the run; run again")
        artefact = Artefact(Path(self.folder))
        manifest = artefact.manifest()
        return {**artefact.read(_TAIL_FILE), **{key: manifest[key] for key in ("largest", "energy", "tokens")}}


def has_tail(folder: Path, count: int) -> bool:
    """Whether the cache has an intact tail of at least `count` components."""
    artefact = Artefact(folder)
    manifest = artefact.manifest()
    return manifest is not None and manifest["count"] >= count and artefact.is_intact()


class AllocateRanks(Task[list]):
    """How many components each model drops of one output tensor. Value: a list in the order of `tails`."""

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

    def execute(self, **tails: dict[str, Any]) -> list[int]:
        spectra = []
        for i in range(len(self.tails)):
            largest = tails[str(i)]["largest"]
            spectra.append((tails[str(i)]["values"] / (largest or 1.0)).tolist())
        return allocate_ranks(spectra, self.shares, self.caps)


class PurifyTensor(_TensorTask):
    """W' of one weight. Value: {tensor, stats}; see `PurificationStats`."""

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

    def execute(self, weight: Tensor, tail: dict, allocation: list[int], base: Optional[Tensor] = None) -> dict[str, Any]:
        dtype = dtype_from_name(self.dtype) or weight.dtype
        if self.transposed:
            weight, base = weight.mT, None if base is None else base.mT
        if self.target == "task_vector" and base is None:
            raise PaveError(f"{self.model}: {self.tensor} is not in the base model; put it under pave.exclude")
        drop = allocation[self.position]
        directions = tail["directions"][:, :drop]
        purified, removed, change = drop_components(weight, directions, base, target=self.target, dtype=dtype)
        components = min(weight.shape)
        stats = {
            "tensor": self.tensor,
            "output": self.allocation.output,
            "model": str(self.model),
            "components": components,
            "kept": components - drop,
            "energy_dropped": tail["values"][:drop].square().sum().item() / (tail["energy"] or 1.0),
            "removed_norm": removed,
            "change_norm": change,
            "tokens": tail["tokens"],
        }
        return {"tensor": (purified.mT if self.transposed else purified).contiguous(), "stats": stats}


class PurifiedTensor(_TensorTask):
    """W' alone."""

    purify: PurifyTensor

    def arguments(self) -> dict[str, Task]:
        return {"purified": self.purify}

    def execute(self, purified: dict[str, Any]) -> Tensor:
        return purified["tensor"]


class PurificationStats(_TensorTask):
    """What purification did to one weight: a row of the report."""

    purify: PurifyTensor

    def arguments(self) -> dict[str, Task]:
        return {"purified": self.purify}

    def priority(self) -> int:
        # At once, so that the tensor beside it is not kept for it.
        return 100

    def uses_accelerator(self) -> bool:
        return False

    def execute(self, purified: dict[str, Any]) -> dict[str, Any]:
        return purified["stats"]


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


class WriteReport(Task[None]):
    """Write pave_report.json beside the merged model, and say in one line what was purified."""

    out_path: str
    header: str
    stats: tuple[PurificationStats, ...]

    def __hash__(self) -> int:
        return hash((WriteReport, self.out_path))

    def arguments(self) -> dict[str, Task]:
        return {str(i): task for i, task in enumerate(self.stats)}

    def main_thread_only(self) -> bool:
        return True

    def execute(self, **stats: dict[str, Any]) -> None:
        report = json.loads(self.header) | {"purified": [stats[str(i)] for i in range(len(self.stats))]}
        folder = Path(self.out_path)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / REPORT_NAME).write_text(json.dumps(report, indent=1) + "\n")
        LOG.info(summary(report))
        for warning in warnings(report):
            LOG.warning(warning)
