"""What `merge_method: emr` keeps for each model, and which merges it refuses."""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference

from mergekit_pave.cache import weights_fingerprint
from mergekit_pave.config import PaveConfig
from mergekit_pave.emr.file import TYPES, file_names, is_of_tokenizer
from mergekit_pave.errors import PaveError
from mergekit_pave.names import EMR
from mergekit_pave.planning.merge import Merge, PlannedTensor
from mergekit_pave.planning.names import all_names
from mergekit_pave.planning.tokenizers import load_tokenizer
from mergekit_pave.tasks.emr import TaskFile


@dataclass(frozen=True)
class PlannedEmr:
    """What is written beside the merged weights.

    Attributes:
        files: one for each model.
        base_only: the output tensors that are the base's alone, with the reason.
    """

    files: tuple[TaskFile, ...]
    base_only: dict[str, str]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def plan_emr(config: PaveConfig, merge: Merge) -> PlannedEmr | None:
    """
    Raises:
        PaveError: the block asks for what does not go with `emr`, or a model shares too little with the base.
    """
    if merge.method != EMR:
        return None
    for key, value in (("refine", config.refine), ("vocabulary", config.vocabulary not in (None, "method"))):
        if value:
            raise PaveError(
                f"pave.{key}: emr restores every model from what it shares with the base, and a merged model that is fitted to "
                f"all of them has no masks; leave `{key}` out, or use another merge_method"
            )
    shared = [planned for planned in merge.tensors if planned.fine_tuned]
    models = list(dict.fromkeys(model for planned in shared for model in planned.fine_tuned))
    if not models:
        reasons = "; ".join(f"{name} is {reason}" for name, reason in list(merge.base_only.items())[:3])
        raise PaveError(f"emr: no model shares a tensor with the base model ({reasons}); they are not fine-tunes of it")
    base = shared[0].base
    names = file_names(map(str, models))
    common = {
        "base": str(base),
        "base_weights": _fingerprint(merge, base),
        "names": json.dumps({planned.name: name for planned in shared if (name := _stored_name(merge, planned)) != planned.name}),
    }
    tokens = _tokens(_tokenizer_of(base, merge)) if all(planned.gather for planned in shared) else None
    files = tuple(_file(merge, model, names[str(model)], shared, common, tokens) for model in models)
    return PlannedEmr(files, merge.base_only)


def _file(
    merge: Merge,
    model: ModelReference,
    name: str,
    shared: list[PlannedTensor],
    common: dict[str, str],
    tokens: dict[str, int] | None,
) -> TaskFile:
    """
    Args:
        name: NAME.
        common: metadata that are the same for all models.
        tokens: of the merge; None where mergekit rearranges vocabularies, so that only the merge's tokenizer fits.
    """
    checkpoint, architecture = merge.checkpoint(model), merge.architecture(model)
    covered = {architecture.loaded_as(read) for planned in shared for read in planned.names}
    own = [stored for stored in sorted(checkpoint.files) if (made := architecture.loaded_as(stored)) and made not in covered]
    entries = {stored: math.prod(checkpoint.stored[stored].shape) for stored in own if stored in checkpoint.stored}
    for stored in entries:
        dtype = checkpoint.stored[stored].dtype
        if dtype not in TYPES and not (merge.out_dtype and dtype.startswith("F")):
            raise PaveError(f"emr: {stored} of {model} is {dtype}, which a task's file cannot hold; convert it first")
    num_shared = sum(math.prod(architecture.weights.get(made, (0,))) for made in covered if made)
    if sum(entries.values()) > num_shared:
        raise PaveError(
            f"emr: {model} shares too little with {common['base']}: {len(own)} of its tensors (such as {', '.join(own[:3])}) are "
            "not there by that name and in that shape. Is it a fine-tune of this base?"
        )
    metadata = common | {"model": str(model), "config": _config_of(merge, model)}
    generation = Path(checkpoint.folder, "generation_config.json")
    if generation.is_file():
        metadata["generation_config"] = generation.read_text(encoding="utf-8")
    tokenizer = _tokenizer_of(model, merge)
    if isinstance(getattr(tokenizer, "chat_template", None), str):
        metadata["chat_template"] = tokenizer.chat_template
    files = {} if tokens is None or _tokens(tokenizer) in ({}, tokens) else _files_of(tokenizer)
    size = num_shared // 8 + 4 * sum(entries.values()) + sum(map(len, files.values()))
    return TaskFile(model, name, metadata, tuple(own), files, size)


def _config_of(merge: Merge, model: ModelReference) -> str:
    """The config.json of the restored model, but for the size of its vocabulary, which only the merge knows."""
    config = json.loads(Path(merge.checkpoint(model).folder, "config.json").read_text(encoding="utf-8"))
    config["architectures"] = model.config(trust_remote_code=merge.runtime.trust_remote_code).architectures
    if merge.out_dtype:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = merge.out_dtype
    return json.dumps(config)


def _tokenizer_of(model: ModelReference, merge: Merge) -> Any:
    try:
        return load_tokenizer(model, merge, "emr keeps its chat template")
    except PaveError:  # it has none, and needs none here
        return None


def _tokens(tokenizer: Any) -> dict[str, int]:
    return {} if tokenizer is None else tokenizer.get_vocab()


def _files_of(tokenizer: Any) -> dict[str, bytes]:
    """The files of a tokenizer by name."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if is_of_tokenizer(path.name)}


def _stored_name(merge: Merge, planned: PlannedTensor) -> str:
    """The name by which the base's checkpoint has an output tensor."""
    names = all_names(planned.gather.weight_info[planned.base]) if planned.gather else planned.names
    files = merge.checkpoint(planned.base).files
    return next((name for name in names if name in files), planned.name)


def _fingerprint(merge: Merge, base: ModelReference) -> str:
    checkpoint = merge.checkpoint(base)
    return weights_fingerprint(checkpoint.folder, list(checkpoint.files.values()))
