"""Which weights of a model are linear layers of its backbone, found on a model without weights."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from typing import Any

import accelerate
import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, WeightTransform, apply_converters
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from mergekit_pave.calibration.computation import computation
from mergekit_pave.calibration.experts import find_experts, find_routers, part_of_experts, projections
from mergekit_pave.errors import PaveError, in_a_line
from mergekit_pave.failures import is_out_of_memory

# Heads that some architectures keep inside what they declare as their backbone.
_HEADS = {"lm_head", "classifier", "score", "qa_outputs"}


@dataclass(frozen=True)
class Linear:
    """A linear layer of the backbone, or the same projection of the experts of a mixture, each of which is a layer of its own.

    Attributes:
        module: its path in the model; of experts the path of their 3-D parameter.
        shape: (d_out, d_in) of one matrix.
        transposed: a stored matrix is (d_in, d_out), as in GPT-2's Conv1D.
        experts: the numbers of the experts whose matrices the weight holds; none for an ordinary layer.
        stacked: the matrices lie along a first dimension of the weight; otherwise it is one matrix.
        shared: the paths of other layers whose weight is the same parameter.
    """

    module: str
    shape: tuple[int, int]
    transposed: bool
    experts: tuple[int, ...] = ()
    stacked: bool = False
    shared: tuple[str, ...] = ()

    @property
    def layers(self) -> list[tuple[str, ...]]:
        """What the covariances of each matrix are named by: the module, or the expert, and those that share its weight."""
        modules = (self.module, *self.shared)
        return [tuple(f"{module}.{expert}" for module in modules) for expert in self.experts] or [modules]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        shape = self.shape[::-1] if self.transposed else self.shape
        return (len(self.experts), *shape) if self.stacked else shape

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape) * len(self.layers)


@dataclass(frozen=True)
class Architecture:
    """What is known of a model from its configuration alone.

    Attributes:
        cls: the model's class.
        computation: a digest of what the backbone computes, apart from weights.
        linears: backbone layers by the name of their weight.
        heads: names of the weights of linear layers outside the backbone, and of those that something else uses, too.
        routers: names of the weights that choose among experts.
        weights: the shape of every parameter by its name.
        tensors: what a complete checkpoint has: every parameter under the first of its names, and persistent buffers.
        prefix: what a checkpoint of the bare backbone leaves out of each name, with its dot.
        renamed: what transformers calls a tensor that goes by this name in a checkpoint.
        vocabulary: the number of token ids it knows, or None.
        positions: the longest sequence it can take, or None; of an image model the number of patches.
        hidden_size: width of the hidden states between blocks.
        scored_heads: how many heads' scores of all pairs of tokens are in memory at once, which for most models is none.
        is_windowed: attention is limited to a window, so that it needs a mask also where there is no padding.
        experts_a_token: how many experts a token is routed to, at most.
        blocks: number of parameters of each block by its path, and under "" of all that is in no block.
        conversions: how transformers makes parameters of the tensors of a checkpoint that has them in another form.
        inputs: the names of the backbone's arguments.
        shift: what an encoder-decoder model's decoder is given where these token ids are its target; None of other models.
    """

    cls: Any
    computation: str
    linears: dict[str, Linear]
    heads: frozenset[str]
    routers: frozenset[str]
    weights: dict[str, tuple[int, ...]]
    tensors: frozenset[str]
    prefix: str
    renamed: Callable[[str], str]
    vocabulary: int | None
    positions: int | None
    hidden_size: int
    scored_heads: int
    is_windowed: bool
    experts_a_token: int
    blocks: dict[str, int]
    conversions: list[WeightTransform]
    inputs: frozenset[str]
    shift: Callable[[list[int]], list[int]] | None

    def block_of(self, module: str) -> str:
        """The path of the block that a module is part of, or ""."""
        return next((path for path in self.blocks if path and f"{module}.".startswith(f"{path}.")), "")

    def weight_name(self, names: list[str]) -> str | None:
        """The parameter that goes by one of these names in a checkpoint."""
        return next(filter(None, (self._find(name, self.weights) for name in names)), None)

    def loaded_as(self, stored: str) -> str | None:
        """Which of `tensors` transformers makes of one in a checkpoint; of several the first."""
        converters = [change for change in self.conversions if isinstance(change, WeightConverter)]
        return self._find(stored, self.tensors) or self._find(apply_converters(self.renamed(stored), converters)[0], self.tensors)

    def _find(self, stored: str, known: Container[str]) -> str | None:
        for name in (stored, self.renamed(stored)):
            for candidate in (name, self.prefix + name, name.removeprefix(self.prefix)):
                if candidate in known:
                    return candidate
        return None

    def linear(self, names: list[str]) -> Linear | None:
        """The linear layer whose weight goes by one of these names in a checkpoint, be it one expert of a parameter of many."""
        if name := self.weight_name(names):
            return self.linears.get(name)
        for name in names:
            part = part_of_experts(self.conversions, name)
            experts = self.linears.get(self.weight_name([part.parameter]) or "") if part else None
            if experts and part.dim == (2 if experts.transposed else 1) and part.expert in experts.experts:
                d_out, d_in = experts.shape
                return replace(experts, shape=(d_out // part.parts, d_in), experts=(part.expert,), stacked=False)
        return None


def model_class(config: transformers.PretrainedConfig, path: str, trust_remote_code: bool, revision: str | None = None) -> Any:
    """The model's own architecture class.

    Args:
        path: the model's folder or its name on the Hub, where remote code is.

    Raises:
        PaveError: transformers does not have it, and remote code is absent, not trusted or cannot be loaded.
    """
    name = (config.architectures or ["(none in config.json)"])[0]
    if hasattr(transformers, name):
        return getattr(transformers, name)
    remote = next((ref for ref in getattr(config, "auto_map", {}).values() if str(ref).endswith(f".{name}")), None)
    if remote is None:
        raise PaveError(f"{path}: transformers {transformers.__version__} has no architecture {name}, so it cannot be calibrated")
    if not trust_remote_code:
        raise PaveError(f"{path}: {name} is remote code; calibration has to run it, so pass --trust-remote-code")
    try:
        return get_class_from_dynamic_module(remote, path, revision=revision)
    except (OSError, ImportError, AttributeError, SyntaxError) as error:
        reason = in_a_line(error)
        raise PaveError(
            f"{path}: the code of {name} ({remote}) cannot be loaded, and calibration has to run it: {reason}"
        ) from error


def empty_model(cls: Any, config: transformers.PretrainedConfig, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model with its buffers but without its parameters, which are on the meta device."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with accelerate.init_empty_weights(include_buffers=False), no_init_weights(), _LargeOnMeta():
            return cls(config)
    finally:
        torch.set_default_dtype(default)


class _LargeOnMeta(TorchFunctionMode):
    """Makes what is too large for a buffer on the meta device at once.

    Parameters get there only after they were made. That costs nothing while nobody writes to them, but a system need not even
    promise the memory for all experts of a layer of a large mixture.
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
    # What DINOv3 declares as such is its encoder, which cannot be run on images.
    return base if model.main_input_name in inspect.signature(base.forward).parameters else model


def describe(
    config: transformers.PretrainedConfig, path: str, trust_remote_code: bool, revision: str | None = None
) -> Architecture:
    """Find the linear layers of a model without reading its weights.

    Args, Raises:
        See `model_class`.
    """
    cls = model_class(config, path, trust_remote_code, revision)
    try:
        model = empty_model(cls, config)
    except Exception as error:  # whatever a class trips over in a configuration that is not meant for it
        if is_out_of_memory(error):
            raise
        reason = in_a_line(error)
        raise PaveError(
            f"{path}: transformers cannot make a {cls.__name__} of its config.json ({type(error).__name__}: {reason}); see "
            "whether `architectures` there, or override_architecture in the config of the merge, names the right class"
        ) from error
    model.tie_weights()
    linears, heads, routers = find_linears(model)
    weights = {name: tuple(value.shape) for name, value in model.named_parameters(remove_duplicate=False)}
    most = max((len(linear.experts) for linear in linears.values()), default=0)
    return Architecture(
        cls=cls,
        computation=computation(backbone(model), config),
        linears=linears,
        heads=heads,
        routers=routers,
        weights=weights,
        tensors=frozenset(dict(model.named_parameters())) | (model.state_dict().keys() - weights.keys()),
        prefix=f"{model.base_model_prefix}." if model.base_model_prefix else "",
        renamed=renaming(model),
        vocabulary=getattr(model.get_input_embeddings(), "num_embeddings", None),
        positions=_longest_sequence(model),
        hidden_size=getattr(config.get_text_config(), "hidden_size", 0),
        scored_heads=_scored_heads(model),
        is_windowed=getattr(config.get_text_config(), "sliding_window", None) is not None,
        experts_a_token=getattr(config.get_text_config(), "num_experts_per_tok", None) or most,
        blocks=_sizes(model),
        conversions=get_model_conversion_mapping(model, add_legacy=False),
        inputs=frozenset(inspect.signature(backbone(model).forward).parameters),
        shift=_target_shift(model, path),
    )


def _scored_heads(model: nn.Module) -> int:
    """The heads of a model that uses no attention of PyTorch's, or adds biases by distance, as T5 does."""
    config = model.config.get_text_config()
    biased = any(path.endswith("relative_attention_bias") for path, _ in model.named_modules())
    eager = getattr(config, "_attn_implementation", None) == "eager"
    return getattr(config, "num_attention_heads", 0) if eager or biased else 0


def find_linears(model: nn.Module) -> tuple[dict[str, Linear], frozenset[str], frozenset[str]]:
    """The `linears`, `heads` and `routers` of an `Architecture`."""
    base, start = backbone(model), _prefix(model)
    inside = {id(module) for module in base.modules()}
    output = model.get_output_embeddings()
    experts = find_experts(base)
    routers = {start + name for name in find_routers(base, experts)}
    linears, heads = {}, set()
    for path, module in model.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D)):
            continue
        if id(module) not in inside or module is output or path.split(".")[0] in _HEADS:
            heads.add(f"{path}.weight")
            continue
        if f"{path}.weight" in routers:
            continue
        transposed = isinstance(module, Conv1D)
        d_out, d_in = module.weight.T.shape if transposed else module.weight.shape
        linears[f"{path}.weight"] = Linear(path, (d_out, d_in), transposed)
    for path, module in experts.items():
        for leaf in projections(module):
            name = f"{start}{path}.{leaf}"
            count, *shape = getattr(module, leaf).shape
            shape = tuple(shape[::-1] if module.is_transposed else shape)
            linears[name] = Linear(name, shape, module.is_transposed, tuple(range(count)), stacked=True)
    for names in _shared_parameters(model):
        layers = {name: linears[name] for name in names if name in linears}
        for name, layer in layers.items():
            others = tuple(other.module for other in layers.values() if other is not layer)
            linears[name] = replace(layer, shared=others)
        if len(layers) < len(names):  # what an embedding or a head does with the weight is not measured
            heads.update(layers)
            linears = {name: layer for name, layer in linears.items() if name not in layers}
    return linears, frozenset(heads), frozenset(routers)


def _shared_parameters(model: nn.Module) -> list[list[str]]:
    """The names of each parameter that several modules have. (One module may go by several names, too.)"""
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            names.setdefault(id(parameter), []).append(f"{path}.{leaf}")
    return [same for same in names.values() if len(same) > 1]


def _prefix(model: nn.Module) -> str:
    """What the names of the backbone's parts begin with in the whole model."""
    return "" if backbone(model) is model else f"{model.base_model_prefix}."


def renaming(model: nn.Module) -> Callable[[str], str]:
    """What transformers calls a checkpoint's tensors once they are loaded: it has moved modules of some models since."""
    renamings = [change for change in get_model_conversion_mapping(model) if isinstance(change, WeightRenaming)]

    @functools.cache
    def renamed(name: str) -> str:
        for change in renamings:
            name = change.rename_source_key(name)[0]
        return name

    return renamed


def find_blocks(model: nn.Module) -> dict[nn.Module, str]:
    """The children of a model's outermost `ModuleList`s, with their paths."""
    blocks: dict[nn.Module, str] = {}
    lists: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(path.startswith(f"{outer}.") for outer in lists):
            lists.append(path)
            blocks.update({block: f"{path}.{name}" for name, block in module.named_children()})
    return blocks


def _sizes(model: nn.Module) -> dict[str, int]:
    base, prefix = backbone(model), _prefix(model)
    sizes = {prefix + path: sum(p.numel() for p in block.parameters()) for block, path in find_blocks(base).items()}
    return sizes | {"": sum(p.numel() for p in base.parameters()) - sum(sizes.values())}


def _target_shift(model: nn.Module, path: str) -> Callable[[list[int]], list[int]] | None:
    """The shift to the right that the model itself makes of labels.

    Raises:
        PaveError: the encoder reads no text, or the configuration does not say what a decoder's input starts with.
    """
    if "decoder_input_ids" not in inspect.signature(backbone(model).forward).parameters:
        return None
    if model.main_input_name != "input_ids":
        raise PaveError(
            f"{path}: an encoder that reads {model.main_input_name} cannot be calibrated, only one that reads text; give the "
            "model `purify: false`"
        )
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    start = getattr(model.config, "decoder_start_token_id", None)

    def shift(labels: list[int]) -> list[int]:
        return [start, *labels[:-1]] if prepare is None else prepare(torch.tensor([labels]))[0].tolist()

    try:
        torch.tensor(shift([0]))
    except (ValueError, TypeError, RuntimeError, AttributeError):
        raise PaveError(f"{path}: config.json has no decoder_start_token_id, so its decoder cannot be run") from None
    return shift


def _longest_sequence(model: nn.Module) -> int | None:
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None and getattr(config, "patch_size", None) and isinstance(config.image_size, int):
        positions = (config.image_size // config.patch_size) ** 2
    for path, module in model.named_modules():
        # RoBERTa counts positions from its padding index on.
        if path.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions = module.num_embeddings - module.padding_idx - 1
    return positions


def inference_dtype(config: transformers.PretrainedConfig, device: str) -> torch.dtype:
    """The precision to run a model in: its own, but float32 on a CPU, which is both faster there and more exact.

    Elsewhere bfloat16 stands for float16, whose range ends at 65504: models that were trained in bfloat16 exceed it.
    """
    own = getattr(config, "dtype", None)
    if torch.device(device).type == "cpu" or own is None:
        return torch.float32
    return torch.bfloat16 if own == torch.float16 else own


def load_model(cls: Any, config: transformers.PretrainedConfig, folder: str, device: str) -> nn.Module:
    """The whole model, ready for inference.

    Raises:
        PaveError: the checkpoint lacks weights of the backbone, which would be filled with random numbers.
    """
    dtype = inference_dtype(config, device)
    try:
        model, info = cls.from_pretrained(folder, config=config, dtype=dtype, output_loading_info=True)
    except (RuntimeError, OSError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise PaveError(f"{folder}: transformers cannot load it as {cls.__name__}: {error}") from error
    inside = {id(parameter) for parameter in backbone(model).parameters()}
    missing = [name for name in sorted(info["missing_keys"]) if id(model.get_parameter(name)) in inside]
    if missing:
        raise PaveError(
            f"{folder}: {len(missing)} weights of {cls.__name__} are not in the checkpoint (the first: {missing[0]}), "
            "so it cannot be run for calibration"
        )
    return model.eval().requires_grad_(False).to(device)
