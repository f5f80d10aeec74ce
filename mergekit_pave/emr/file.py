"""A task's file: what turns a merge by `merge_method: emr` into one of its models again.

OUT/emr/NAME.safetensors is an ordinary safetensors file. Its metadata are `_Metadata`, below. Its tensors are

    mask.T   bytes, (⌈n / 8⌉,): where the model agrees with the merge, for OUT's tensor T of n entries; see `core.emr.pack`
    own.T    a tensor that only this model has, or has in another shape than the base model
    file.F   bytes of the file F of the model's tokenizer, where it has other tokens than the merge's
    sha256   bytes, (1 + other tensors, 32): the hash of the metadata, as JSON with sorted keys; then of each other tensor's
             bytes, in the order of their names

Tensors of wide types come first, so that each is aligned where the file is mapped to memory. NAME is the model's short name with
a `-` for all but letters, digits, `.`, `_` and `-`. It begins neither with a dot nor with a `-`. Where capitals do not count it
differs from every other NAME, too.

Such files are published, so they may come from anybody. `TaskFile.read` checks everything that the file alone can tell, and
`emr.restore` the rest. A tensor's hash is checked when it is read. Further metadata are ignored, further tensors are refused.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from mergekit.common import ModelReference
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mergekit_pave.cache.checkpoint import Stored, is_pointer
from mergekit_pave.emr import hashes
from mergekit_pave.errors import PaveError, unknown
from mergekit_pave.report.outputs import EMR_FOLDER as FOLDER
from mergekit_pave.report.outputs import EMR_FORMAT as FORMAT
from mergekit_pave.report.places import short_models

MASK, OWN, FILE = "mask.", "own.", "file."

_SUFFIX = ".safetensors"
_TOKENIZER = re.compile("(tokenizer|special_tokens|added_tokens|vocab|merges|spiece|sentencepiece|source|target)[A-Za-z0-9._-]*")
_DEEPEST = 30  # levels of a config
_LONGEST = 100  # characters of a NAME; file systems allow 255
TYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool},
}


def is_of_tokenizer(name: str) -> bool:
    """Whether a file of this name is a part of a tokenizer."""
    return _TOKENIZER.fullmatch(name) is not None


def file_names(models: Iterable[str]) -> dict[str, str]:
    """The NAME of each model's file. It is not what the config calls another model."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    short_names = short_models(models)
    for model, short in short_names.items():
        others = {other.lower() for other in short_names if other != model}
        stem = re.sub(r"[^A-Za-z0-9._-]", "-", short).lstrip(".-")[:_LONGEST] or "model"
        name, number = stem, 2
        while name.lower() in taken | others:
            name, number = f"{stem}-{number}", number + 1
        taken.add(name.lower())
        names[model] = name
    return names


class _Metadata(BaseModel):
    """What the metadata say, once what is JSON is read.

    Attributes:
        name: NAME.
        model: the expert, as the config of the merge names it.
        scale: λ.
        base: the base model, as the config names it.
        base_weights: `cache.weights_fingerprint` of the base model; with an adapter in it, of the merged one.
        merged_weights: the same of OUT.
        names: by OUT's tensor its name in the base model, where the two differ.
        copied: OUT's tensors that the model shares as they are.
        config: the expert's config.json.
        generation_config: the expert's generation_config.json, if it has one.
        chat_template: of the expert's tokenizer, if it has one.
    """

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())

    name: str
    model: Annotated[str, Field(min_length=1)]
    scale: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    base: Annotated[str, Field(min_length=1)]
    base_weights: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    merged_weights: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    names: dict[str, Annotated[str, Field(min_length=1)]]
    copied: list[str]
    config: dict[str, Any]
    generation_config: dict[str, Any] | None = None
    chat_template: str | None = None

    @field_validator("config", "generation_config")
    @classmethod
    def _is_sound(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        """What transformers and we go through by recursion is not nested deeply."""
        level: list[Any] = [value]
        for _ in range(_DEEPEST):
            mappings = [inner for of in level if isinstance(of, dict) for inner in of.values()]
            level = mappings + [inner for of in level if isinstance(of, list) for inner in of]
        if level:
            raise ValueError("it is nested too deeply")
        if value and not isinstance(value.get("auto_map", {}), dict):
            raise ValueError("its auto_map is no mapping")
        return value

    @field_validator("model", "base")
    @classmethod
    def _is_a_model(cls, name: str) -> str:
        try:
            ModelReference.parse(name)
        except RuntimeError as error:  # mergekit's own
            raise ValueError(f"{name!r:.200} is no name of a model") from error
        return name


_JSON = ("names", "copied", "config", "generation_config")


@dataclass(frozen=True, eq=False)
class TaskFile:
    """A task's file that has been checked. It stays open, and its tensors are views of it.

    Attributes:
        name: NAME.
        masks: by OUT's tensor the number of bytes of its mask.
        files: names of the files of its own tokenizer; none where that of the merge has the same tokens.
        own: by name the type and the shape of each tensor that only this model has.
        (others): see `_Metadata`.
    """

    path: Path
    name: str
    model: str
    scale: float
    base: str
    base_weights: str
    merged_weights: str
    names: dict[str, str]
    copied: list[str]
    config: dict[str, Any]
    generation_config: dict[str, Any] | None
    chat_template: str | None
    masks: dict[str, int]
    own: dict[str, Stored]
    files: list[str]
    _hashes: dict[str, bytes] = field(repr=False)
    _file: Any = field(repr=False)

    @classmethod
    def read(cls, path: Path) -> TaskFile:
        """
        Raises:
            PaveError: the file cannot be read, is damaged, or was never sound.
        """
        try:
            file = safe_open(path, "pt")
            metadata = _parse(file.metadata() or {})
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            stored = {name: Stored(found.get_dtype(), tuple(found.get_shape())) for name, found in slices.items()}
            of_tensors = hashes.taken_from(stored, file)
            if of_tensors.pop("") != hashes.of_metadata(file.metadata()):
                raise ValueError("its metadata are not what was written")
            if metadata.name != path.name.removesuffix(_SUFFIX):  # somebody would get another model than they ask for
                raise ValueError(f"it holds {metadata.model:.200}, and its name was {metadata.name:.100}{_SUFFIX}")
            masks, own, files = _sort(stored, metadata)
        except (OSError, SafetensorError, ValueError) as error:
            if is_pointer(path):
                raise PaveError(f"{path} is a pointer of Git LFS, not the file itself; run `git lfs pull` there") from error
            raise PaveError(f"{path} cannot be used: {error}. Fetch it again, or merge again") from error
        about = dict(metadata) | {"masks": masks, "own": own, "files": files}
        return cls(path, **about, _hashes=of_tensors, _file=file)

    def mask(self, tensor: str) -> Tensor:
        """The packed mask of one of OUT's tensors, bytes.

        Raises:
            PaveError: it is damaged.
        """
        return self._read(MASK + tensor)

    def own_tensor(self, name: str) -> Tensor:
        """
        Raises:
            PaveError: it is damaged.
        """
        return self._read(OWN + name)

    def content(self, name: str) -> bytes:
        """Of one of `files`.

        Raises:
            PaveError: it is damaged.
        """
        return hashes.bytes_of(self._read(FILE + name)).tobytes()

    def _read(self, key: str) -> Tensor:
        tensor = self._file.get_tensor(key)
        if hashes.of_tensor(tensor) != self._hashes[key]:
            raise PaveError(f"{self.path} is damaged: {key} is not what was written. Fetch it again, or merge again")
        return tensor


def _parse(metadata: dict[str, str]) -> _Metadata:
    """
    Raises:
        ValueError: something is missing, or is not what it should be.
    """
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"its format is {metadata.get('format', 'not named')!r:.100}, and this mergekit-pave reads {FORMAT}; another "
            "version may read it"
        )
    try:
        values: dict[str, Any] = {key: json.loads(text) if key in _JSON else text for key, text in metadata.items()}
        values["scale"] = float(metadata.get("scale", "nan"))
        return _Metadata.model_validate(values)
    except RecursionError:
        raise ValueError("its metadata are nested too deeply") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))[:100]}: {first['msg']}") from None


def _sort(stored: dict[str, Stored], metadata: _Metadata) -> tuple[dict[str, int], dict[str, Stored], list[str]]:
    """Masks and own tensors, by the names of the model's tensors, and names of files.

    Raises:
        ValueError: a tensor is neither, or a name stands for several things.
    """
    masks, own, files = {}, {}, []
    for name, found in stored.items():
        if name.startswith(MASK) and name != MASK:
            if found.dtype != "U8" or len(found.shape) != 1:
                raise ValueError(f"{name!r:.200} is {found.dtype} of shape {found.shape}, where a mask is bytes in a row")
            masks[name.removeprefix(MASK)] = found.shape[0]
        elif name.startswith(OWN) and name != OWN and found.dtype in TYPES:
            own[name.removeprefix(OWN)] = found
        elif name.startswith(FILE) and is_of_tokenizer(name.removeprefix(FILE)) and (found.dtype, len(found.shape)) == ("U8", 1):
            files.append(name.removeprefix(FILE))
        else:
            raise ValueError(f"{name!r:.200} ({found.dtype}) is no tensor that such a file has")
    counts = Counter([*masks, *own, *metadata.copied])
    if twice := next((name for name, count in counts.items() if count > 1), None):
        raise ValueError(f"{twice!r:.200} is given twice")
    if other := next((name for name in metadata.names if name not in masks), None):
        raise ValueError(f"names: {other!r:.200} has no mask")
    return masks, own, files


def tasks_of(folder: Path) -> list[TaskFile]:
    """All tasks of a merge, by name; none where the folder is no merge by `emr`.

    Raises:
        PaveError: a file is damaged.
    """
    return [TaskFile.read(path) for path in _paths(folder).values()]


def find(folder: Path, task: str) -> TaskFile:
    """One task of a merge.

    Args:
        task: its NAME, or its model as the config of the merge names it.

    Raises:
        PaveError: there is no such task, or its file is damaged.
    """
    paths = _paths(folder)
    if task in paths:
        return TaskFile.read(paths[task])
    if not paths:
        raise PaveError(f"{folder} has no tasks in a folder {FOLDER}; only a merge by `merge_method: emr` has such")
    for found in tasks_of(folder):
        if found.model == task:
            return found
    raise PaveError(f"{folder}: {unknown('task', task, paths)}")


def _paths(folder: Path) -> dict[str, Path]:
    """The files of all tasks by NAME."""
    paths = sorted((folder / FOLDER).glob(f"[!.]*{_SUFFIX}"), key=lambda path: path.name)
    return {path.name.removesuffix(_SUFFIX): path for path in paths}
