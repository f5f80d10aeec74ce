"""The two checkpoints that a model is restored from: the merge, and the base model, which has to be found."""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from mergekit.common import ModelPath, ModelReference
from mergekit.io.lazy_tensor_loader import LazyTensorLoader, ShardedTensorIndex
from torch import Tensor

from mergekit_pave import cache
from mergekit_pave.cache.checkpoint import Checkpoint, find_weights
from mergekit_pave.calibration.conversion import Conversions
from mergekit_pave.emr.file import FOLDER
from mergekit_pave.errors import PaveError, in_a_line
from mergekit_pave.files import looks_local


@dataclass(frozen=True)
class Search:
    """Where and how the base model is looked for.

    Attributes:
        base: a model in the place of the one that the task's file names.
        cache_dir: the Hub's cache, where it is not the usual one.
        lora_cache: where mergekit keeps models with an adapter merged into them.
        trust_remote_code: for a base model with an adapter, which has to be loaded.
    """

    base: str | None = None
    cache_dir: str | None = None
    lora_cache: str | None = None
    trust_remote_code: bool = False


class Weights:
    """A checkpoint that is read tensor by tensor, as mergekit reads it.

    Attributes:
        name: for messages.
        fingerprint: see `cache.weights_fingerprint`.
    """

    def __init__(self, folder: Path, name: str):
        """
        Raises:
            PaveError: it cannot be read.
        """
        self.name = name
        with _reading(name):
            index = ShardedTensorIndex.from_disk(str(folder))
            files = list(index.tensor_paths.values())
            if outside := next((file for file in files if Path(file).name != file), None):
                raise ValueError(f"its index names the file {outside!r:.200}, which is not in the folder")
            self.fingerprint = cache.weights_fingerprint(str(folder), files)
        self.is_safetensors = index.is_safetensors
        self.checkpoint = Checkpoint(str(folder), index.tensor_paths)
        self._loader = LazyTensorLoader(index, lazy_unpickle=False)

    @functools.cached_property
    def _conversions(self) -> Conversions:
        """What mergekit makes of the tensors, such as all experts of those of single ones.

        Raises:
            PaveError: config.json cannot be read.
        """
        with _reading(self.name):
            config = json.loads(Path(self.checkpoint.folder, "config.json").read_text(encoding="utf-8"))
            return Conversions(config.get("model_type"), self.checkpoint.files)

    def has(self, tensor: str) -> bool:
        """Whether a tensor can be read."""
        return tensor in self.checkpoint.files or self._conversions.can_make(tensor)

    def read(self, tensor: str) -> Tensor:
        """One tensor, which may be a view of a file.

        Raises:
            PaveError: it cannot be read.
        """
        if tensor not in self.checkpoint.files:
            conversions = self._conversions
            with _reading(self.name):
                return conversions.make(tensor, self._loader.get_tensor)
        with _reading(self.name):
            return self._loader.get_tensor(tensor)


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turns failures to read into errors that say what to do."""
    try:
        yield
    except Exception as error:  # safetensors, pickle and PyTorch have errors of their own
        raise PaveError(f"the weights of {name} cannot be read ({in_a_line(error)}); fetch them again") from error


def find_merge(out: str | Path, task: str, cache_dir: str | None) -> Path:
    """The folder of a merge: on this machine, or of a repository on the Hub, of which other tasks' files are left there.

    Args:
        out: a folder, or the name of a repository, with `@revision` behind it for one that is not the newest.
        task: the NAME of the task, or its model.

    Raises:
        PaveError: there is no such folder, and no such repository that can be fetched.
    """
    if Path(out).is_dir():
        return Path(out)
    try:
        if looks_local(str(out)):
            raise ValueError("no such folder")
        repository = ModelPath.model_validate(str(out))
        fetch = functools.partial(snapshot_download, repository.path, cache_dir=cache_dir)
        folder = Path(fetch(revision=repository.revision, ignore_patterns=f"{FOLDER}/*"))
        files = f"{task if re.fullmatch('[A-Za-z0-9._-]+', task) else '*'}.safetensors"  # the model may have another NAME
        fetch(revision=folder.name, allow_patterns=f"{FOLDER}/{files}")
        return folder
    except Exception as error:  # of the Hub, or of the network
        raise PaveError(
            f"there is no merge at {out} (looked in {Path.cwd()}), and none of that name can be fetched from the Hub: "
            f"{in_a_line(error)}"
        ) from error


def find_base(named: str, search: Search) -> Weights:
    """The base model of a merge.

    Args:
        named: as the config of the merge has it.

    Raises:
        PaveError: it cannot be found or read.
    """
    model = search.base or named
    elsewhere = "Name the model that it is with --base MODEL (base= in Python)"
    try:
        reference = ModelReference.parse(model)
    except (RuntimeError, ValueError) as error:
        raise PaveError(f"the base model {model!r:.200} is no name of a model; {elsewhere}") from error
    for part in filter(None, (reference.model, reference.lora)):
        if looks_local(part.path) and not Path(part.path).exists():
            raise PaveError(f"there is no base model at {part.path} (looked in {Path.cwd()}). {elsewhere}")
    if reference.lora and not search.lora_cache:
        raise PaveError(
            f"the base model {model} has an adapter, which has to be merged into it first; say where the result is kept with "
            "--lora-merge-cache, or name it with --base FOLDER (base= in Python)"
        )
    try:
        folder = _cached(reference, search) or reference.merged(search.lora_cache, search.trust_remote_code).local_path(
            search.cache_dir
        )
    except Exception as error:  # of the Hub, of transformers or of PEFT
        raise PaveError(
            f"the base model {model} is neither in {Path.cwd()} nor in the Hub's cache, and cannot be fetched "
            f"({in_a_line(error)}). {elsewhere}"
        ) from error
    return Weights(Path(folder), f"the base model {model}")


def _cached(reference: ModelReference, search: Search) -> str | None:
    """The folder of a model that the Hub's cache has, for which the Hub need not be asked."""
    if reference.lora or Path(reference.model.path).exists():
        return None
    path, revision = reference.model.path, reference.model.revision
    try:
        folder = snapshot_download(path, revision=revision, cache_dir=search.cache_dir, local_files_only=True)
    except LocalEntryNotFoundError:
        return None
    return folder if find_weights(Path(folder), index_first=True) else None
