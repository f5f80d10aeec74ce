"""What a merge needs before it can be planned: a device, models that can be read, and layers that they have."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from mergekit.card import is_hf
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner

from mergekit_pave.cache.checkpoint import WEIGHTS, find_weights, is_pointer, stored_in
from mergekit_pave.errors import PaveError, in_a_line
from mergekit_pave.files import looks_local
from mergekit_pave.plugin.parameters import check_method
from mergekit_pave.report.tables import is_repository

_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")


def check_inputs(config: MergeConfiguration, options: MergeOptions) -> None:
    """Refuse what mergekit, PyTorch or transformers would fail with.

    Of models on the Hub it reads only the configuration.

    Raises:
        PaveError: the merge method lacks something, the device cannot be used, or a model cannot be read.
    """
    check_method(config)
    _check_device(options)
    LoaderCache().setup(options=options)
    for model in sorted(config.referenced_models(), key=str):
        folder = Path(model.model.path)
        for kind, part in (("model", model.model), ("adapter", model.lora)):
            if part and looks_local(part.path) and not Path(part.path).exists():
                raise PaveError(f"there is no {kind} at {part.path} (looked in {Path.cwd()})")
        if folder.exists():
            _check_folder(model, folder, "config.json", WEIGHTS)
        if model.lora and Path(model.lora.path).exists():
            _check_folder(model, Path(model.lora.path), "adapter_config.json", _ADAPTERS)
        is_run = config.pave is None or config.pave.listed(model) is not None
        _check_config(model, options.trust_remote_code, is_run)
        if folder.exists():
            _check_weights(model)


def check_card(config: MergeConfiguration, options: MergeOptions) -> None:
    """Refuse names of local models that mergekit's card, which it writes after the merge, asks the Hub for in vain.

    mergekit asks the Hub whether it has a model of that name, unless the name can only be a path. If the Hub cannot be reached,
    it stops there, before it has written a tokenizer.

    Raises:
        PaveError: the Hub cannot be asked.
    """
    if not options.write_model_card:
        return
    paths = sorted({part.path for model in config.referenced_models() for part in (model.model, model.lora) if part})
    bare = [path for path in paths if is_repository(path) and not looks_local(path) and Path(path).exists()]
    try:
        for path in bare[:1]:  # if the Hub answers once, it can be reached
            is_hf(path)
    except Exception as error:  # of the Hub's client, or of the network
        raise PaveError(
            f"{', '.join(bare)}: mergekit's model card looks for such names on the Hub, though the models are here, and the Hub "
            f"cannot be asked ({in_short(error)}). Write ./{bare[0]} in the config, also under `pave`, or use "
            "--no-write-model-card"
        ) from error


def check_merged(model: ModelReference, trust_remote_code: bool) -> None:
    """Refuse a folder that has no model.

    Raises:
        PaveError: what is missing or cannot be read.
    """
    _check_folder(model, Path(model.model.path), "config.json", WEIGHTS)
    _check_config(model, trust_remote_code, is_run=True)
    _check_weights(model)


def check_layers(planner: MergePlanner) -> None:
    """Refuse slices that take no layer, or more than there are.

    Raises:
        PaveError: naming the range. Modules without layers, such as what lies around two towers, have the range [0, 0].
    """
    config, modules = planner.config, planner.arch_info.modules
    slices = [(next(iter(modules)), part) for part in config.slices or ()]
    slices += [(name, part) for name, module in (config.modules or {}).items() for part in module.slices or ()]
    for name, part in slices:
        for source in part.sources if name in modules else ():
            num_layers = planner._model_arch(source.model).get_module(name).num_layers()
            start, end = source.layer_range
            if not (0 <= start < end <= num_layers or start == end == num_layers == 0):
                raise PaveError(
                    f"slices: layer_range [{start}, {end}] of {source.model} does not fit. The model has {num_layers} layers: a "
                    f"range starts at 0 or later, ends at {num_layers} or earlier, and takes at least one layer"
                )


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
            f"the device {device!r} cannot be used here ({in_short(error)}); name one that is "
            "there, such as --device cuda:0, or leave --device and --cuda out to use the CPU"
        ) from error


def _check_folder(model: ModelReference, folder: Path, settings: str, weights: tuple[str, ...]) -> None:
    if not folder.is_dir():
        raise PaveError(f"{model}: {folder} is a file; name the folder that it is in")
    if not (folder / settings).is_file():
        raise PaveError(f"{model}: there is no {settings} in {folder}; name the folder of a model as save_pretrained writes it")
    _read_mapping(model, folder / settings)
    path = find_weights(folder, weights, index_first=True)
    if path is None:
        raise PaveError(f"{model}: there are no weights in {folder} ({', '.join(weights)}, or an index of several such files)")
    if path.suffix != ".json":
        _check_file(model, path)
        if path.suffix == ".safetensors":
            stored_in(path)
        return
    files = _read_mapping(model, path).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise PaveError(f"{model}: {path} has no weight_map, which says which file each tensor is in; fetch it again")
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
        raise PaveError(f"{model}: {path} is not valid JSON ({in_short(error)}); correct it, or fetch it again") from error
    if not isinstance(content, dict):
        raise PaveError(f"{model}: {path} does not contain a JSON object; correct it, or fetch it again")
    return content


def _check_config(model: ModelReference, trust_remote_code: bool, is_run: bool) -> None:
    try:
        config = model.config(trust_remote_code=trust_remote_code)
    except Exception as error:  # of transformers, the Hub or remote code
        raise PaveError(f"{model}: its config.json cannot be used: {in_short(error)}") from error
    classes = config.architectures
    if not isinstance(classes, list) or len(classes) != 1 or not isinstance(classes[0], str):
        fault = "names no class" if not classes else f"does not name one class but {classes!r}"
        raise PaveError(
            f"{model}: `architectures` in its config.json {fault}; put the one there that its weights are of, such as "
            '["LlamaForCausalLM"], or give it an override_architecture'
        )

    config_class = getattr(getattr(transformers, classes[0], None), "config_class", None)
    if is_run and model.override_architecture and config_class and not isinstance(config, config_class):
        raise PaveError(
            f"{model}: override_architecture is {classes[0]}, which needs a {config_class.__name__}, but its config.json makes a "
            f"{type(config).__name__}; leave the override out, or name a class of that kind"
        )


def _check_weights(model: ModelReference) -> None:
    try:
        LoaderCache().get(ModelReference(model=model.model) if model.lora else model)
    except Exception as error:  # safetensors and PyTorch have errors of their own
        reason = in_short(error)
        raise PaveError(f"{model}: the weights in {model.model.path} cannot be read ({reason}); fetch them again") from error


def in_short(error: Exception) -> str:
    """An error's message in one line, without the traceback that PyTorch appends to some."""
    text = in_a_line(error)
    return text if len(text) < 400 else str(error).strip().splitlines()[0]


@contextlib.contextmanager
def planning_errors(*kinds: type[Exception], failed: str = "mergekit cannot plan this merge") -> Iterator[None]:
    """Turn errors of these kinds into messages for users. Our own messages pass unchanged.

    Args:
        failed: what it means.
    """
    try:
        yield
    except PaveError:
        raise
    except kinds as error:
        raise PaveError(f"{failed}: {in_short(error)}") from error
