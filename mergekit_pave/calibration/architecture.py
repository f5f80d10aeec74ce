"""What a model's configuration alone tells about it, found on a model without weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightTransform, apply_converters

from mergekit_pave.calibration.computation import computation
from mergekit_pave.calibration.experts import part_of_experts
from mergekit_pave.calibration.linears import backbone_prefix, find_linears
from mergekit_pave.calibration.models import backbone, empty_model, find_blocks, find_name, model_class, renaming
from mergekit_pave.calibration.token_rows import find_token_rows
from mergekit_pave.core.failures import is_out_of_memory
from mergekit_pave.core.linear import Linear
from mergekit_pave.errors import PaveError, in_a_line

NO_BLOCK = ""  # in the place of a block's path

# What changes scores behind the head. Without it a softmax of them is not what the model predicts.
_OF_SCORES = (
    *("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"),
    *("logits_scaling", "logit_scale", "lm_head_multiplier"),
)

_OF_TEXTS = {"input_ids", "attention_mask", "token_type_ids", "decoder_input_ids", "decoder_attention_mask"}


@dataclass(frozen=True)
class Architecture:
    """What a model's configuration alone tells about it.

    Attributes:
        cls: the model's class.
        computation: a digest of what the backbone computes, apart from weights.
        linears: the linear layers of the backbone, by the name of their weight.
        heads: names of the weights of linear layers outside the backbone, and of weights that something else uses, too.
        head: the path of a language model's head, which makes scores of tokens from last hidden states; None for other models.
        routers: names of the weights that choose among experts.
        token_rows: see `find_token_rows`.
        weights: the shape of every parameter, by its name.
        tensors: the names in a complete checkpoint: every parameter under the first of its names, and persistent buffers.
        prefix: the start of each name, with its dot, that a checkpoint of the bare backbone leaves out.
        renamed: gives the name in transformers of a tensor with this name in a checkpoint.
        vocabulary: the number of token ids, or None.
        positions: the longest sequence that the model can take, or None; of an image model the number of patches.
        hidden_size: width of the hidden states between blocks.
        scored_heads: the number of heads whose scores of all pairs of tokens are in memory at once; 0 for most models.
        is_windowed: attention is limited to a window, so that it needs a mask even without padding.
        experts_a_token: the largest number of experts that a token is routed to.
        blocks: the number of weights of each block by its path, and of all that is in no block by `NO_BLOCK`.
        conversions: how transformers makes parameters of the tensors of a checkpoint that has them in another form.
        inputs: the names of the backbone's arguments.
        shift: gives the input of an encoder-decoder model's decoder for the token ids of its target; None for other models.
    """

    cls: Any
    computation: str
    linears: dict[str, Linear]
    heads: frozenset[str]
    head: str | None
    routers: frozenset[str]
    token_rows: dict[str, tuple[str, ...]]
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
        """The path of the block that a module is part of, or `NO_BLOCK`."""
        return next((path for path in self.blocks if path and f"{module}.".startswith(f"{path}.")), NO_BLOCK)

    def weight_name(self, names: list[str]) -> str | None:
        """The parameter that has one of these names in a checkpoint."""
        return next(filter(None, (self._find(name, self.weights) for name in names)), None)

    def loaded_as(self, stored: str) -> str | None:
        """The first of `tensors` that transformers makes of a tensor with this name in a checkpoint."""
        converters = [change for change in self.conversions if isinstance(change, WeightConverter)]
        return self._find(stored, self.tensors) or self._find(apply_converters(self.renamed(stored), converters)[0], self.tensors)

    def is_of_backbone(self, stored: str) -> bool:
        """Whether a tensor with this name in a checkpoint is the backbone's. Models without a head are all backbone."""
        is_bare = not any(weight.startswith(self.prefix) for weight in self.weights)  # their names have no prefix
        return is_bare or (self.loaded_as(stored) or "").startswith(self.prefix)

    def _find(self, stored: str, names: Container[str]) -> str | None:
        return find_name(stored, names, self.renamed, self.prefix)

    def linear(self, names: list[str]) -> Linear | None:
        """The linear layer whose weight has one of these names in a checkpoint. The weight may be that of a single expert."""
        if name := self.weight_name(names):
            return self.linears.get(name)
        for name in names:
            part = part_of_experts(self.conversions, name)
            experts = self.linears.get(self.weight_name([part.parameter]) or "") if part else None
            if experts and part.dim == (2 if experts.transposed else 1) and part.expert in experts.experts:
                d_out, d_in = experts.shape
                return replace(experts, shape=(d_out // part.parts, d_in), experts=(part.expert,), stacked=False)
        return None


def describe(
    config: transformers.PretrainedConfig, path: str, trust_remote_code: bool, revision: str | None = None
) -> Architecture:
    """Describe a model without reading its weights.

    Args, Raises:
        See `model_class`.
    """
    cls = model_class(config, path, trust_remote_code, revision)
    try:
        model = empty_model(cls, config)
    except Exception as error:  # a class may fail in any way on a configuration that was made for another
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
    shift = _target_shift(model, path)
    head = _head(model)
    num_experts = max((len(linear.experts) for linear in linears.values()), default=0)
    return Architecture(
        cls=cls,
        computation=computation(backbone(model), config),
        linears=linears,
        heads=heads,
        head=head,
        routers=routers,
        token_rows=find_token_rows(model, has_decoder=shift is not None),
        weights=weights,
        tensors=frozenset(dict(model.named_parameters())) | (model.state_dict().keys() - weights.keys()),
        prefix=f"{model.base_model_prefix}." if model.base_model_prefix else "",
        renamed=renaming(model),
        vocabulary=getattr(model.get_input_embeddings(), "num_embeddings", None),
        positions=_longest_sequence(model),
        hidden_size=getattr(config.get_text_config(), "hidden_size", 0),
        scored_heads=_scored_heads(model),
        is_windowed=getattr(config.get_text_config(), "sliding_window", None) is not None,
        experts_a_token=getattr(config.get_text_config(), "num_experts_per_tok", None) or num_experts,
        blocks=_num_weights(model),
        conversions=get_model_conversion_mapping(model, add_legacy=False),
        inputs=frozenset(inspect.signature(backbone(model).forward).parameters),
        shift=shift,
    )


def _head(model: nn.Module) -> str | None:
    """See `Architecture.head`. Left alone are heads whose scores are changed afterwards, and those of models that see images."""
    head = model.get_output_embeddings()
    inputs, of_backbone = (set(inspect.signature(part.forward).parameters) for part in (model, backbone(model)))
    if not isinstance(head, nn.Linear) or not model.can_generate() or model.main_input_name != "input_ids":
        return None
    if "pixel_values" in of_backbone or of_backbone & _OF_TEXTS - inputs:
        return None
    changed = (getattr(model.config.get_text_config(), name, None) not in (None, 1) for name in _OF_SCORES)
    if any(changed) or hasattr(model, "final_logits_bias"):  # BART's and Marian's
        return None
    return next(path for path, module in model.named_modules() if module is head)


def _scored_heads(model: nn.Module) -> int:
    """The number of heads of a model that computes attention itself, or that adds biases by distance, as T5 does."""
    config = model.config.get_text_config()
    biased = any(path.endswith("relative_attention_bias") for path, _ in model.named_modules())
    eager = getattr(config, "_attn_implementation", None) == "eager"
    return getattr(config, "num_attention_heads", 0) if eager or biased else 0


def _num_weights(model: nn.Module) -> dict[str, int]:
    base, prefix = backbone(model), backbone_prefix(model)
    blocks = {prefix + path: sum(p.numel() for p in block.parameters()) for block, path in find_blocks(base).items()}
    return blocks | {NO_BLOCK: sum(p.numel() for p in base.parameters()) - sum(blocks.values())}


def _target_shift(model: nn.Module, path: str) -> Callable[[list[int]], list[int]] | None:
    """The shift to the right that the model itself applies to labels.

    Raises:
        PaveError: the encoder reads no text, or the configuration does not say how a decoder's input starts.
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
        # RoBERTa counts positions from its padding index.
        if path.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions = module.num_embeddings - module.padding_idx - 1
    return positions
