"""A model made of a merge by EMR-Merging again, tensor by tensor.

It has exactly: each tensor that its file has a mask for, each that is its own, and each that it shares with the merge as it is.
The file, the merge and the base model may come from three places. So everything is compared before anything is made.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference
from mergekit.io.tensor_writer import TensorWriter
from torch import Tensor

from mergekit_pave.cache.checkpoint import Stored
from mergekit_pave.core import emr
from mergekit_pave.emr.file import TaskFile, find, is_of_tokenizer
from mergekit_pave.emr.weights import Search, Weights, find_base, find_merge
from mergekit_pave.emr.writing import writable
from mergekit_pave.errors import PaveError
from mergekit_pave.progress import bar

_FLOATS = ("F64", "F32", "F16", "BF16")
_DTYPE = ("dtype", "torch_dtype")  # the same setting, by its name now and before
_OTHERS = ("preprocessor_config", "processor_config", "video_preprocessor_config", "chat_template")  # that are copied


@dataclass(frozen=True, eq=False)
class Restored:
    """A model that can be restored: everything that it takes has been found and compared.

    Attributes:
        task: its file.
        folder: of the merge.
        config: its config.json.
        stored: the type and the shape of each of its tensors, in the order in which they are best read.
    """

    task: TaskFile
    folder: Path
    config: dict[str, Any]
    stored: dict[str, Stored]
    _merged: Weights
    _base: Weights

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Its tensors, each in memory of its own. They are made one after the other.

        Raises:
            PaveError: a tensor cannot be read.
        """
        for name in self.stored:
            yield name, self.tensor(name)

    def tensor(self, name: str, out: Tensor | None = None) -> Tensor:
        """One of its tensors.

        Args:
            out: is overwritten. It is of the same shape, and may be of another type and on any device.

        Raises:
            PaveError: the tensor cannot be read.
        """
        if name not in self.task.masks:
            found = self.task.own_tensor(name) if name in self.task.own else self._merged.read(name)
            return found.clone() if out is None else out.copy_(found)
        merged, base = self._merged.read(name), self._base.read(self.task.names.get(name, name))
        _check_shape(self, name, base.shape)
        parts = [base[: len(merged)] if base.shape != merged.shape else base, merged, self.task.mask(name)]
        if out is not None:
            parts = [part.to(out.device) for part in parts]
            if out.dtype != merged.dtype or not out.is_contiguous():
                return out.copy_(emr.restore(*parts, self.task.scale))
        return emr.restore(*parts, self.task.scale, out)


def open_task(out: str | Path, task: str, search: Search = Search()) -> Restored:  # noqa: B008
    """Find and compare everything that a model is restored from. No weights are read but samples.

    Args:
        out: the folder of a merge by `merge_method: emr`, or its repository on the Hub.
        task: its NAME, or its model as the config of the merge names it.

    Raises:
        PaveError: something is missing or damaged, or belongs to another merge.
    """
    folder = find_merge(out, task, search.cache_dir)
    found = find(folder, task)
    merged = Weights(folder, str(folder))
    if not merged.is_safetensors:
        raise PaveError(f"{folder} has its weights in .bin files, of which nothing is restored; merge with --safe-serialization")
    if merged.fingerprint != found.merged_weights:
        raise PaveError(f"{folder}: its weights are not those that {found.path} belongs to; merge again")
    base = find_base(found.base, search)
    if base.fingerprint != found.base_weights:
        raise PaveError(
            f"{base.name} is not the one that {folder} was merged with: it is another model or revision, or has the same weights "
            "in other files. Name the right one with --base MODEL (base= in Python)"
        )
    restored = Restored(found, folder, _config(found, folder), _stored(found, merged, base), merged, base)
    for name in found.masks:
        in_base = base.checkpoint.stored.get(found.names.get(name, name))
        if in_base is not None:  # otherwise the shape is seen once it is read
            _check_shape(restored, name, in_base.shape)
    return restored


def _stored(task: TaskFile, merged: Weights, base: Weights) -> dict[str, Stored]:
    """See `Restored`.

    Raises:
        PaveError: a tensor is missing, or does not fit its mask.
    """
    stored = merged.checkpoint.stored
    for name in (*task.masks, *task.copied):
        if name not in stored:
            raise PaveError(f"{task.path}: {name!r:.200} is not in {merged.name}; merge again")
    for name, num_bytes in task.masks.items():
        dtype, shape = stored[name]
        if dtype not in _FLOATS or num_bytes != emr.packed_size(math.prod(shape)):
            raise PaveError(
                f"{task.path}: the mask of {name!r:.200} has {num_bytes} bytes, which does not fit a tensor of {dtype} and shape "
                f"{shape}; merge again"
            )
        in_base = task.names.get(name, name)
        if not base.has(in_base):
            raise PaveError(f"{base.name} has no tensor {in_base!r:.200}, which {task.path} needs")
    files = base.checkpoint.files
    order = sorted((files.get(task.names.get(name, name), ""), merged.checkpoint.files[name], name) for name in task.masks)
    return task.own | {name: stored[name] for name in (*task.copied, *(name for *_, name in order))}


def _check_shape(restored: Restored, name: str, in_base: tuple[int, ...]) -> None:
    """The base model's tensor has the merge's shape, or more rows, where the merge has left some out."""
    shape = restored.stored[name].shape
    if len(in_base) != len(shape) or in_base[1:] != shape[1:] or in_base[:1] < shape[:1]:
        raise PaveError(
            f"{restored.task.path}: {name} has the shape {tuple(in_base)} in the base model, which does not fit {shape} in "
            f"{restored.folder}; merge again"
        )


def _config(task: TaskFile, folder: Path) -> dict[str, Any]:
    """The config.json of the model, with the precision of the merge.

    Raises:
        PaveError: the config.json of the merge cannot be read.
    """
    path = folder / "config.json"
    try:
        merged = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(merged, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise PaveError(f"{path} cannot be read: {error}; fetch it again, or merge again") from error
    config = json.loads(json.dumps(task.config))
    config.pop("quantization_config", None)  # it would be quantised as it is loaded
    _take(config, merged)
    # Code that comes with the expert is still there.
    home = ModelReference.parse(task.model).model.path
    places = config.get("auto_map", {})
    for name, place in places.items():
        if isinstance(place, str) and "--" not in place:
            places[name] = f"{home}--{place}"
    return config


def _take(config: dict[str, Any], merged: dict[str, Any]) -> None:
    for name in _DTYPE:
        config.pop(name, None)
    config |= {name: merged[name] for name in _DTYPE if name in merged}
    for name, part in config.items():
        if isinstance(part, dict) and isinstance(merged.get(name), dict) and name.endswith("_config"):
            _take(part, merged[name])


def write(restored: Restored, target: Path, max_shard_size: int, quiet: bool = False) -> None:
    """Write the model as an ordinary checkpoint, with the merge's tokenizer: all of it or nothing.

    Args:
        target: a folder that is not there yet, or empty.
        max_shard_size: bytes of weights in a file. About as much memory is needed.

    Raises:
        PaveError: the folder is not empty, the disk is full, or a tensor cannot be read.
    """
    target = target.resolve()
    with writable(target):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise PaveError(f"{target} is there already and not empty; choose another folder, or remove it first")
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        temporary.mkdir(parents=True)
    try:
        writer = TensorWriter(str(temporary), max_shard_size)
        with bar(len(restored.stored), f"Restoring {restored.task.name}", "tensors", quiet, delay=1) as progress:
            for name, tensor in restored.tensors():
                with writable(target):
                    writer.save_tensor(name, tensor)
                progress.update()
        with writable(target):
            writer.finalize()
            _write_others(restored, temporary)
            if target.exists():  # perhaps as somebody's current folder
                for path in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):
                    path.rename(target / path.name)
            else:
                temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_others(restored: Restored, target: Path) -> None:
    """The files beside the weights: those of the merge, and over them the model's."""
    for path in sorted(restored.folder.iterdir()):
        needed = is_of_tokenizer(path.name) and not restored.task.files
        if (needed or path.name.startswith(_OTHERS)) and path.is_file():
            _check_link(path, restored.folder)
            shutil.copyfile(path, target / path.name)
    for name in restored.task.files:
        (target / name).write_bytes(restored.task.content(name))
    _write_json(restored.config, target / "config.json")
    if restored.task.generation_config is not None:
        _write_json(restored.task.generation_config, target / "generation_config.json")
    if restored.task.chat_template is not None:
        (target / "chat_template.json").unlink(missing_ok=True)
        (target / "chat_template.jinja").write_text(restored.task.chat_template, encoding="utf-8")


def _check_link(path: Path, folder: Path) -> None:
    """
    Raises:
        PaveError: a file is a link that leaves the folder. The Hub's cache keeps files in a folder `blobs` two levels above.
    """
    file, inside = path.resolve(), folder.resolve()
    if not file.is_relative_to(inside) and not file.is_relative_to(inside.parent.parent / "blobs"):
        raise PaveError(f"{path} is a link to {file}, out of the merge's folder; put the file itself there")


def _write_json(content: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
