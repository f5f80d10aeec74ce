"""What a merge needs before anything can be planned: a device, and models that can be read. Checked before mergekit asks."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from mergekit_pave.cache.checkpoint import is_pointer, stored_in
from mergekit_pave.errors import PaveError, in_a_line
from mergekit_pave.files import looks_local

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")


def check_inputs(config: MergeConfiguration, options: MergeOptions) -> None:
    """Refuse what mergekit, PyTorch or transformers would trip over.

    Of models on the Hub only the configuration is looked at.

    Raises:
        PaveError: the device cannot be used, or a model cannot be read.
    """
    _check_device(options)
    LoaderCache().setup(options=options)
    for model in sorted(config.referenced_models(), key=str):
        folder = Path(model.model.path)
        for what, part in (("model", model.model), ("adapter", model.lora)):
            if part and looks_local(part.path) and not Path(part.path).exists():
                raise PaveError(f"there is no {what} at {part.path} (looked in {Path.cwd()})")
        if folder.exists():
            _check_folder(model, folder, "config.json", _WEIGHTS)
        if model.lora and Path(model.lora.path).exists():
            _check_folder(model, Path(model.lora.path), "adapter_config.json", _ADAPTERS)
        is_run = config.pave is None or config.pave.listed(model) is not None
        _check_config(model, options.trust_remote_code, is_run)
        if folder.exists():
            _check_weights(model)


def check_name(device: str) -> None:
    """
    Raises:
        PaveError: PyTorch knows no device of this name.
    """
    with _of_device(device):
        torch.device(device)


def _check_device(options: MergeOptions) -> None:
    with _of_device(options.device):
        torch.ones(1, device=options.device).item()
    backend = torch.accelerator if hasattr(torch, "accelerator") else torch.cuda  # before torch 2.6
    if options.multi_gpu and not backend.is_available():
        raise PaveError("--multi-gpu needs an accelerator, and PyTorch sees none here; leave it out")


@contextlib.contextmanager
def _of_device(device: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each kind of device has errors of its own
        raise PaveError(
            f"the device {device!r} cannot be used here ({in_short(error)}); name another one, such as --device cuda:1, or "
            "leave --device and --cuda out to use the CPU"
        ) from error


def _check_folder(model: ModelReference, folder: Path, settings: str, weights: tuple[str, ...]) -> None:
    if not folder.is_dir():
        raise PaveError(f"{model}: {folder} is a file; name the folder that it is in")
    if not (folder / settings).is_file():
        raise PaveError(f"{model}: there is no {settings} in {folder}; name the folder of a model as save_pretrained writes it")
    _read_mapping(model, folder / settings)
    found = [path for name in weights for path in (folder / f"{name}.index.json", folder / name) if path.exists()]
    if not found:
        raise PaveError(f"{model}: there are no weights in {folder} ({', '.join(weights)}, or an index of several such files)")
    if found[0].suffix != ".json":
        _check_file(model, found[0])
        if found[0].suffix == ".safetensors":
            stored_in(found[0])
        return
    files = _read_mapping(model, found[0]).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise PaveError(f"{model}: {found[0]} has no weight_map, which says which file each tensor is in; fetch it again")
    for file in sorted(set(files.values())):
        _check_file(model, folder / file)


def _check_file(model: ModelReference, path: Path) -> None:
    if not path.is_file():
        raise PaveError(f"{model}: {path} is not there, although its index names it; fetch it")
    if is_pointer(path):
        raise PaveError(f"{model}: {path} is a pointer of Git LFS, not the file itself; run `git lfs pull` in its folder")


def _read_mapping(model: ModelReference, path: Path) -> dict[str, Any]:
    _check_file(model, path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PaveError(f"{model}: {path} is no JSON ({in_short(error)}); mend it, or fetch it again") from error
    if not isinstance(content, dict):
        raise PaveError(f"{model}: {path} holds no mapping; mend it, or fetch it again")
    return content


def _check_config(model: ModelReference, trust_remote_code: bool, is_run: bool) -> None:
    try:
        config = model.config(trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever transformers, the Hub or remote code trips over
        raise PaveError(f"{model}: its config.json cannot be used: {in_short(error)}") from error
    named = config.architectures
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str):
        told = "names no class" if not named else f"does not name one class but {named!r}"
        raise PaveError(
            f"{model}: `architectures` in its config.json {told}; put the one there that its weights are of, such as "
            '["LlamaForCausalLM"], or give it an override_architecture'
        )

    needed = getattr(getattr(transformers, named[0], None), "config_class", None)
    if is_run and model.override_architecture and needed and not isinstance(config, needed):
        raise PaveError(
            f"{model}: override_architecture is {named[0]}, which needs a {needed.__name__}, but its config.json makes a "
            f"{type(config).__name__}; leave the override out, or name a class of that kind"
        )


def _check_weights(model: ModelReference) -> None:
    try:
        LoaderCache().get(ModelReference(model=model.model) if model.lora else model)
    except Exception as error:  # safetensors and PyTorch have errors of their own
        told = f"the weights in {model.model.path} cannot be read ({in_short(error)})"
        raise PaveError(f"{model}: {told}; fetch them again") from error


def in_short(error: Exception) -> str:
    """What an error says, without what PyTorch adds for those who look for bugs in it."""
    text = in_a_line(error)
    return text if len(text) < 400 else str(error).strip().splitlines()[0]


@contextlib.contextmanager
def told_in_a_line() -> Iterator[None]:
    """What mergekit has against a merge is for people, too."""
    try:
        yield
    except Exception as error:
        raise PaveError(f"mergekit cannot plan this merge: {in_short(error)}") from error
