"""Merging one output tensor by `emr`, and writing what each model is restored with."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.graph import Task
from mergekit.io.tasks import FinalizeModel, GatherTensors, LoaderCache, LoadTensor
from mergekit.io.tensor_writer import TensorWriter
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from torch import Tensor

from mergekit_pave.cache import weights_fingerprint
from mergekit_pave.core.emr import Sums, packed_size, unify
from mergekit_pave.core.failures import advising
from mergekit_pave.emr.file import FILE, FOLDER, FORMAT, MASK, OWN
from mergekit_pave.emr.writing import Entry, write
from mergekit_pave.errors import PaveError
from mergekit_pave.tasks.base import files_of
from mergekit_pave.tasks.store import TensorStore


@dataclass(frozen=True)
class TaskFile:
    """What a model's file is to hold beside masks.

    Attributes:
        name: of the file, without its ending.
        metadata: all but what only the merge knows: the scale, the merged weights, and which tensors are copied.
        files: the content of the files of its own tokenizer.
        own: tensors that only this model has, or has in another shape, by the names of its checkpoint.
        size: bytes of the file, about.
    """

    model: ModelReference
    name: str
    metadata: dict[str, str]
    own: tuple[str, ...]
    files: dict[str, bytes]
    size: int


class Masks:
    """The masks of all models, in a file without a name, and their sums, until the weights are complete.

    Attributes:
        copied: the output tensors that are no floats, which all models have alike.
        vocabulary: rows of the vocabulary, where it is shared.
    """

    def __init__(self, models: list[ModelReference]):
        self._models = models
        self._store: TensorStore | None = None
        self._sums: dict[int, list[Sums]] = {}  # by the output tensor's number
        self._names: dict[int, str] = {}
        self._lock = threading.Lock()
        self.copied: list[str] = []
        self.vocabulary: int | None = None

    def open(self, folder: Path) -> None:
        """Be ready for a merge into a folder."""
        self._store = TensorStore(folder)

    def put(self, number: int, name: str, masks: dict[ModelReference, Tensor], sums: dict[ModelReference, Sums]) -> None:
        """
        Raises:
            PaveError: the merge is not written to a folder, or the disk is full.
        """
        if self._store is None:
            raise PaveError("emr: only a merge that is written to a folder has masks (mergekit-yaml, mergekit-multi, run_merge)")
        for i, model in enumerate(self._models):
            self._store.put(number * len(self._models) + i, masks[model])
        with self._lock:
            self._names[number], self._sums[number] = name, [sums[model] for model in self._models]

    def sums(self, model: ModelReference) -> Sums:
        """Over all tensors, in their order: several threads may have merged them in another."""
        i = self._models.index(model)
        return sum((self._sums[number][i] for number in sorted(self._sums)), Sums())

    def stored(self, model: ModelReference) -> Iterator[Entry]:
        """The tensors of a model's file, each of which is read when it is asked for."""
        i = self._models.index(model)
        for number in sorted(self._names):
            place, entries = number * len(self._models) + i, self._sums[number][i].entries
            yield MASK + self._names[number], torch.uint8, (packed_size(entries),), lambda place=place: self._store.get(place)

    def __len__(self) -> int:
        return len(self._names)

    def close(self) -> None:
        self._store.clear()


class MergeByEmr(ExecuteMergeMethodTask):
    """mergekit's task for an output tensor that all models share. It keeps each model's mask.

    Attributes:
        masks: a `Masks`.
        number: of the output tensor.
        originals: gathers the models as they were before purification, if any was purified.
        stored_base: reads the base's tensor, where mergekit may rearrange its rows.
    """

    masks: Any
    number: int
    originals: Optional[GatherTensors] = None
    stored_base: Optional[LoadTensor] = None

    def __hash__(self) -> int:
        return hash((MergeByEmr, self.output_weight.name))

    def arguments(self) -> dict[str, Task]:
        more = {"originals": self.originals, "stored_base": self.stored_base}
        return super().arguments() | {key: task for key, task in more.items() if task}

    def uses_accelerator(self) -> bool:
        return True

    def execute(
        self,
        tensors: dict[ModelReference, Tensor],
        originals: Optional[dict[ModelReference, Tensor]] = None,
        stored_base: Optional[Tensor] = None,
    ) -> Optional[Tensor]:
        name = self.output_weight.name
        if not all(tensor.is_floating_point() for tensor in tensors.values()):
            self.masks.copied.append(name)
            return super().execute(tensors)  # a buffer, which mergekit copies if all have the same
        models = [model for model in self.model_order if model != self.base_model]
        base = tensors[self.base_model]
        for model in (*models, self.base_model):
            if model not in tensors or tensors[model].shape != base.shape:
                shape = tuple(tensors[model].shape) if model in tensors else "missing"
                raise PaveError(f"emr: {name} is {shape} in {model}, and {tuple(base.shape)} in {self.base_model}")
            if not tensors[model].isfinite().all():
                raise PaveError(f"emr: {name} of {model} is not finite; look for NaN or infinity in its weights")
        if stored_base is not None and not _begins_with(stored_base, base):
            raise PaveError(
                f"emr: the `tokenizer` section gives {self.base_model} other rows of {name} than it has, so that models could "
                "not be restored from it; use `tokenizer: {source: base}`"
            )
        with advising(f"emr: merging {name}", base.device):
            whole = [originals[model] for model in models] if originals else None
            dtype = dtype_from_name(self.out_dtype) or base.dtype
            merged, masks, sums = unify(base, [tensors[model] for model in models], dtype, whole)
        if self.output_weight.vocabulary_axis is not None:
            self.masks.vocabulary = base.shape[self.output_weight.vocabulary_axis]
        self.masks.put(self.number, name, dict(zip(models, masks)), dict(zip(models, sums)))
        return merged


def _begins_with(stored: Tensor, tensor: Tensor) -> bool:
    rows = stored[: len(tensor)].to(tensor)
    return rows.shape == tensor.shape and torch.equal(rows, tensor)


class WriteTasks(Task[dict[str, Any]]):
    """Writes a file for each model beside the merged weights, once they are complete.

    Value: the section of the report.

    Attributes:
        files: a tuple of `TaskFile`.
        base_only: the output tensors that are the base's alone, with the reason.
        dtype: of the tensors that a model keeps for itself; None for the one in which it has them.
    """

    out_path: str
    finalize: FinalizeModel
    masks: Any
    files: tuple[Any, ...]
    base_only: dict[str, str]
    dtype: Optional[str]

    def __hash__(self) -> int:
        return hash((WriteTasks, self.out_path))

    def arguments(self) -> dict[str, Task]:
        return {"finalized": self.finalize, "writer": self.finalize.writer_task}

    def main_thread_only(self) -> bool:
        return True

    def execute(self, finalized: None, writer: TensorWriter) -> dict[str, Any]:
        folder = Path(self.out_path)
        weights = weights_fingerprint(str(folder), sorted(files_of(writer)))
        section: dict[str, Any] = {"tensors": len(self.masks), "base_only": self.base_only, "models": {}}
        for file in self.files:
            sums, path = self.masks.sums(file.model), folder / FOLDER / f"{file.name}.safetensors"
            known = {"name": file.name, "scale": repr(sums.scale), "merged_weights": weights}
            known["copied"] = json.dumps(sorted(self.masks.copied))
            config = _with_vocabulary(json.loads(file.metadata["config"]), self.masks.vocabulary)
            metadata = {"format": FORMAT} | known | file.metadata | {"config": json.dumps(config)}
            write(path, metadata, [*self.masks.stored(file.model), *self._own(file), *_files(file)])
            section["models"][str(file.model)] = {
                "file": path.relative_to(folder).as_posix(),
                "bytes": path.stat().st_size,
                "scale": sums.scale,
                "distance": sums.distance,
                "agreed": sums.agreed / sums.entries if sums.entries else 0.0,
                "own": list(file.own),
            }
        self.masks.close()
        return section

    def _own(self, file: TaskFile) -> Iterator[Entry]:
        loader = LoaderCache().get(file.model)
        for name in file.own:

            def read(name: str = name) -> Tensor:
                tensor = loader.get_tensor(name)
                return tensor.to(dtype_from_name(self.dtype)) if self.dtype and tensor.is_floating_point() else tensor

            tensor = read()
            yield OWN + name, tensor.dtype, tuple(tensor.shape), read


def _with_vocabulary(config: dict[str, Any], rows: int | None) -> dict[str, Any]:
    """A model's config.json with the number of rows that its vocabulary has in the merge."""
    for part in (config, config.get("text_config") or {}):
        if rows is not None and "vocab_size" in part:
            part["vocab_size"] = rows
    return config


def _files(file: TaskFile) -> Iterator[Entry]:
    for name, content in file.files.items():
        tensor = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        yield FILE + name, torch.uint8, tuple(tensor.shape), lambda tensor=tensor: tensor
