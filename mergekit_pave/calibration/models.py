"""transformers' models: made without weights, loaded whole, and divided into backbone and blocks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Container
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.initialization import no_init_weights

from mergekit_pave.core.failures import is_out_of_memory
from mergekit_pave.errors import PaveError, in_a_line


def model_class(config: transformers.PretrainedConfig, path: str, trust_remote_code: bool, revision: str | None = None) -> Any:
    """The model's own architecture class.

    Args:
        path: the model's folder or its name on the Hub, which may have remote code.

    Raises:
        PaveError: transformers does not have it, and remote code is absent, not trusted or cannot be loaded.
    """
    name = (config.architectures or ["(none in config.json)"])[0]
    if hasattr(transformers, name):
        return getattr(transformers, name)
    remote = next((ref for ref in getattr(config, "auto_map", {}).values() if str(ref).endswith(f".{name}")), None)
    if remote is None:
        raise PaveError(f"{path}: transformers {transformers.__version__} has no architecture {name}, so it cannot be run")
    if not trust_remote_code:
        raise PaveError(f"{path}: {name} is remote code, which has to be run; pass --trust-remote-code")
    try:
        return get_class_from_dynamic_module(remote, path, revision=revision)
    except (OSError, ImportError, AttributeError, SyntaxError) as error:
        reason = in_a_line(error)
        raise PaveError(f"{path}: the code of {name} ({remote}) cannot be loaded, and it has to be run: {reason}") from error


def empty_model(cls: Any, config: transformers.PretrainedConfig, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model with real buffers, and with its parameters on the meta device."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    hook = register_module_parameter_registration_hook(_on_meta)
    try:
        with no_init_weights(), _LargeOnMeta():
            return cls(config)
    finally:
        hook.remove()
        torch.set_default_dtype(default)


def _on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    """The parameter that a module registers in the place of one with values; None keeps the one that was given."""
    if parameter is None or parameter.is_meta:  # a parameter that another module has already registered stays one object
        return None
    return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)


class _LargeOnMeta(TorchFunctionMode):
    """Makes tensors that are too large for buffers on the meta device from the start.

    Other parameters are made with real memory and moved. This costs nothing, as nobody writes to that memory. But a system may
    refuse the memory for all experts of a layer of a large mixture.
    """

    LIMIT = 1 << 30  # bytes

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.empty, torch.zeros) and kwargs.get("device") is None:
            empty = func(*args, **kwargs | {"device": "meta"})
            if empty.nbytes > self.LIMIT:
                return empty
        return func(*args, **kwargs)


def backbone(model: transformers.PreTrainedModel) -> nn.Module:
    """The model without its heads."""
    base = model.base_model
    # DINOv3 declares its encoder as the base model, which cannot be run on images.
    return base if model.main_input_name in inspect.signature(base.forward).parameters else model


def renaming(model: nn.Module) -> Callable[[str], str]:
    """Gives the name in transformers of a tensor of a checkpoint. They differ where transformers has moved modules since."""
    renamings = [change for change in get_model_conversion_mapping(model) if isinstance(change, WeightRenaming)]

    @functools.cache
    def renamed(name: str) -> str:
        for change in renamings:
            name = change.rename_source_key(name)[0]
        return name

    return renamed


def find_name(stored: str, names: Container[str], renamed: Callable[[str], str], prefix: str) -> str | None:
    """The one of some names in transformers that a tensor with this name in a checkpoint has.

    Args:
        renamed: see `renaming`.
        prefix: the start of each name, with its dot, that a checkpoint of the bare backbone leaves out.
    """
    for name in (stored, renamed(stored)):
        for candidate in (name, prefix + name, name.removeprefix(prefix)):
            if candidate in names:
                return candidate
    return None


def find_blocks(model: nn.Module) -> dict[nn.Module, str]:
    """The children of a model's outermost `ModuleList`s, with their paths."""
    blocks: dict[nn.Module, str] = {}
    lists: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(path.startswith(f"{outer}.") for outer in lists):
            lists.append(path)
            blocks.update({block: f"{path}.{name}" for name, block in module.named_children()})
    return blocks


def inference_dtype(config: transformers.PretrainedConfig, device: str) -> torch.dtype:
    """The precision to run a model in: its own, but float32 on a CPU, which is both faster there and more exact.

    On other devices bfloat16 replaces float16, whose range ends at 65504. Models that were trained in bfloat16 exceed it.
    """
    stored = getattr(config, "dtype", None)
    if isinstance(stored, str):  # as mergekit sets it for what it writes
        stored = getattr(torch, stored)
    if torch.device(device).type == "cpu" or stored is None:
        return torch.float32
    return torch.bfloat16 if stored == torch.float16 else stored


def load_model(cls: Any, config: transformers.PretrainedConfig, folder: str, device: str, with_head: bool = False) -> nn.Module:
    """The whole model of a checkpoint, ready for inference.

    Args:
        with_head: the head is needed, too.

    Raises:
        PaveError: the checkpoint lacks weights of the backbone, or of the head, which would be filled with random numbers.
    """
    return _load(cls, config, device, folder, "the checkpoint", with_head)


def load_tensors(
    cls: Any,
    config: transformers.PretrainedConfig,
    tensors: dict[str, Tensor],
    device: str,
    source: str = "the merge",
    with_head: bool = False,
    dtype: torch.dtype | str | None = None,
) -> nn.Module:
    """The whole model with these tensors, which have the names that a checkpoint would have.

    Args:
        source: where they are from, for messages.
        with_head: the head is needed, too.
        dtype: as `from_pretrained` takes it; see `inference_dtype` for the default.

    Raises:
        PaveError: weights of the backbone, or of the head, are missing.
    """
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # or it would tell that heads are missing, and advise to train them
    try:
        return _load(cls, config, device, None, source, with_head, dtype, state_dict=tensors)
    finally:
        transformers.utils.logging.set_verbosity(before)


def _load(
    cls: Any,
    config: transformers.PretrainedConfig,
    device: str,
    folder: str | None,
    source: str,
    with_head: bool = False,
    dtype: torch.dtype | str | None = None,
    **more: Any,
) -> nn.Module:
    dtype = inference_dtype(config, device) if dtype is None else dtype
    try:
        model, info = cls.from_pretrained(folder, config=config, dtype=dtype, output_loading_info=True, **more)
    except (RuntimeError, OSError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise PaveError(f"{folder or source}: transformers cannot load it as {cls.__name__}: {error}") from error
    inside = {id(parameter) for parameter in (model if with_head else backbone(model)).parameters()}
    if backbone(model) is model and getattr(model, "pooler", None) is not None:
        # Nothing that is measured comes out of a bare encoder's pooler, and embedding models are often stored without it.
        inside -= {id(parameter) for parameter in model.pooler.parameters()}
    missing = [name for name in sorted(info["missing_keys"]) if id(model.get_parameter(name)) in inside]
    if missing:
        raise PaveError(
            f"{folder or source}: {len(missing)} weights of {cls.__name__} are not in {source} (the first: {missing[0]}), "
            "so it cannot be run"
        )
    return model.eval().requires_grad_(False).to(device)
