"""A model of a merge by EMR-Merging in memory, and a model in memory that becomes another one of the same merge."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from mergekit.common import ModelReference
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, apply_converters

from mergekit_pave.calibration.models import find_name, load_tensors, model_class, renaming
from mergekit_pave.emr.restore import Restored, open_task
from mergekit_pave.emr.weights import Search
from mergekit_pave.errors import PaveError, in_a_line

# Settings that may differ, and are taken over; settings that may differ because nothing is computed with them.
_TAKEN_OVER = ("id2label", "label2id", "problem_type", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache")
_OF_NOTHING = {"_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "num_labels"}
_DROPOUT = ("dropout", "drop_rate", "pdrop")  # parts of names of settings for training


def load_task(
    out: str | Path,
    name: str,
    *,
    into: transformers.PreTrainedModel | None = None,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
) -> transformers.PreTrainedModel:
    """One model of a merge by `merge_method: emr`, in memory.

    Args:
        out: the folder of the merge, or its repository on the Hub.
        name: of the model: that of its file `emr/NAME.safetensors`, or as the config of the merge has it.
        into: a model that this function gave for the same merge, or `from_pretrained` for a restored folder. It becomes the one
            named `name`, in place, on its device, and in its precision. A head of another shape is replaced by a new parameter.
            Nothing is changed if it is refused. If a file cannot be read on the way, it is neither the one nor the other.
        base: where the base model is, if it is not where the config of the merge says.
        trust_remote_code: the model's class may be code that comes with the model.

    Returns:
        The model, in the precision of the merge and ready for inference; or `into`.

    Raises:
        PaveError: something is missing or damaged, or belongs to another merge; or `into` cannot become this model.
    """
    search = Search(base=None if base is None else str(base), trust_remote_code=trust_remote_code)
    restored = open_task(out, name, search)
    config = _config(restored, trust_remote_code)
    if into is None:
        return _load(restored, config, trust_remote_code)
    _switch(restored, config, into)
    return into


def _config(restored: Restored, trust_remote_code: bool) -> transformers.PretrainedConfig:
    """
    Raises:
        PaveError: transformers cannot use it.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(restored.config), encoding="utf-8")
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # of transformers or remote code
        raise PaveError(f"{restored.task.path}: its config cannot be used: {in_a_line(error)}") from error
    if not isinstance(config.architectures, list) or not all(isinstance(name, str) for name in config.architectures):
        raise PaveError(f"{restored.task.path}: `architectures` in its config is not a list of classes")
    return config


def _load(restored: Restored, config: transformers.PretrainedConfig, trust_remote_code: bool) -> transformers.PreTrainedModel:
    expert = ModelReference.parse(restored.task.model).model
    cls = model_class(config, expert.path, trust_remote_code, expert.revision)
    source = f"{restored.folder} and {restored.task.path.name}"
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise PaveError(f"{restored.task.path}: {config.architectures[0]} in its config is no class of models")
    tensors = dict(restored.tensors())
    try:
        model = load_tensors(cls, config, tensors, "cpu", source, with_head=True, dtype="auto")
    except (TypeError, KeyError, AttributeError, IndexError, ZeroDivisionError) as error:  # of a config that fits no model
        raise PaveError(
            f"{restored.task.path}: transformers cannot make a {cls.__name__} of its config: {in_a_line(error)}"
        ) from error
    _set_others(restored, model)
    return model.requires_grad_(True)


def _set_others(restored: Restored, model: transformers.PreTrainedModel) -> None:
    """What a model has beside weights and the settings of its config.json."""
    model.name_or_path = model.config.name_or_path = restored.task.model
    if restored.task.generation_config is not None and model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_dict(restored.task.generation_config)


def _switch(restored: Restored, config: transformers.PretrainedConfig, model: transformers.PreTrainedModel) -> None:
    """Let a model become another one of the same merge. First everything is checked."""
    _check_model(restored, config, model)
    targets = _targets(restored, model)
    _check_shared(restored, targets)
    for name, (path, tensor) in targets.items():
        shape = restored.stored[name].shape
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            if tensor.shape != shape:
                tensor = _replace(model, path, tensor, shape)
            restored.tensor(name, tensor.detach())
    for name in _TAKEN_OVER:
        if hasattr(config, name):
            setattr(model.config, name, getattr(config, name))
    if hasattr(model, "num_labels"):
        model.num_labels = config.num_labels
    _set_others(restored, model)


def _refusal(restored: Restored, reason: str) -> PaveError:
    return PaveError(f"the model cannot become {restored.task.name} in place: {reason}. Load it anew, without `into`")


def _check_model(restored: Restored, config: transformers.PretrainedConfig, model: transformers.PreTrainedModel) -> None:
    """
    Raises:
        PaveError: the model is of another class, computes something else, or is not in memory as it is.
    """
    wanted = (config.architectures or ["(none in its config)"])[0]
    if type(model).__name__ != wanted:
        raise _refusal(restored, f"it is a {type(model).__name__}, and {restored.task.name} a {wanted}")
    if any(hasattr(module, "base_layer") for module in model.modules()) or getattr(model, "is_quantized", False):
        raise _refusal(restored, "it has adapters, or is quantised")
    if any(tensor.is_meta for tensor in model.state_dict(keep_vars=True).values()):
        raise _refusal(restored, "some of its weights are not in memory (offloaded)")
    setting = _difference(model.config.to_dict(), config.to_dict())
    if setting is None and model.config.pad_token_id != config.pad_token_id and _counts_from_padding(model):
        setting = "pad_token_id"
    if setting:
        raise _refusal(restored, f"{setting} in its config differs")


def _counts_from_padding(model: nn.Module) -> bool:
    """Whether positions are counted from the padding's index, as RoBERTa's are."""
    embeddings = (module for path, module in model.named_modules() if path.endswith("position_embeddings"))
    return any(getattr(module, "padding_idx", None) is not None for module in embeddings)


def _difference(now: dict[str, Any], then: dict[str, Any]) -> str | None:
    """A setting that matters and differs."""
    for name in sorted({*now, *then} - _OF_NOTHING - {*_TAKEN_OVER}):
        a, b = now.get(name), then.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            if inner := _difference(a, b):
                return f"{name}.{inner}"
        elif a != b and not any(part in name for part in _DROPOUT):
            return name
    return None


def _targets(restored: Restored, model: transformers.PreTrainedModel) -> dict[str, tuple[str, Tensor]]:
    """By name of a tensor that is to be restored the name in the model, and the model's tensor.

    Raises:
        PaveError: a tensor is no tensor of the model as it is, or the other way round.
    """
    tensors = model.state_dict(keep_vars=True)
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    renamed = renaming(model)
    converters = [of for of in get_model_conversion_mapping(model, add_legacy=False) if isinstance(of, WeightConverter)]
    targets = {}
    for name, stored in restored.stored.items():
        if apply_converters(renamed(name), converters)[1] is not None:
            raise _refusal(restored, f"transformers stores {name} in another form in memory")
        path = find_name(name, tensors, renamed, prefix)
        if path is None:  # as in loading anew, what the class has no place for is left out
            continue
        if tensors[path].shape != stored.shape and not _is_head(model, path, stored.shape):
            raise _refusal(restored, f"{path} has the shape {tuple(tensors[path].shape)}, and would get {stored.shape}")
        targets[name] = path, tensors[path]
    covered = {id(tensor) for _, tensor in targets.values()}
    if lacking := next((path for path, parameter in model.named_parameters() if id(parameter) not in covered), None):
        raise _refusal(restored, f"{lacking} is not among the tensors of {restored.task.name}")
    return targets


def _check_shared(restored: Restored, targets: dict[str, tuple[str, Tensor]]) -> None:
    """
    Raises:
        PaveError: a tensor of the model would get two different values.
    """
    first: dict[int, str] = {}
    for name, (path, tensor) in targets.items():
        other = first.setdefault(id(tensor), name)
        if other != name and not torch.equal(restored.tensor(other), restored.tensor(name)):
            raise _refusal(restored, f"{path} is shared by {other} and {name}, which differ")


def _owner(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    module, _, leaf = path.rpartition(".")
    return model.get_submodule(module), leaf


def _is_head(model: nn.Module, path: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is of a linear layer that may get another number of outputs."""
    module, leaf = _owner(model, path)
    tensor = getattr(module, leaf)
    return isinstance(module, nn.Linear) and len(shape) == tensor.dim() and shape[1:] == tensor.shape[1:]


def _replace(model: nn.Module, path: str, old: Tensor, shape: tuple[int, ...]) -> Tensor:
    module, leaf = _owner(model, path)
    new = nn.Parameter(torch.empty(shape, dtype=old.dtype, device=old.device), old.requires_grad)
    setattr(module, leaf, new)
    module.out_features = shape[0]
    return new
