"""Batches from the inputs that a user's own code gives to a model."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping

import torch
import transformers
from torch import Tensor, nn

from mergekit_pave.calibration.batches import Batch
from mergekit_pave.calibration.models import backbone

Tensors = Mapping[str, Tensor]


def as_batches(model: transformers.PreTrainedModel, given: Tensors | Iterable[Tensors]) -> list[Batch]:
    batches = [as_batch(model, inputs) for inputs in ([given] if isinstance(given, Mapping) else given)]
    if not batches:
        raise ValueError("there are no batches to calibrate with")
    return batches


def as_batch(model: transformers.PreTrainedModel, inputs: Tensors) -> Batch:
    if not isinstance(inputs, Mapping) or not all(isinstance(values, Tensor) for values in inputs.values()):
        raise ValueError("a batch must be a dict of tensors, as a tokenizer makes it with return_tensors='pt'")
    inputs = dict(inputs)
    if model.main_input_name not in inputs:
        raise ValueError(f"a batch for {type(model).__name__} must have {model.main_input_name}; it has {', '.join(inputs)}")
    origins = [f"sample {i} of its batch" for i in range(len(inputs[model.main_input_name]))]
    if "input_ids" not in inputs:
        return Batch(inputs, (), origins)
    if "pixel_values" in inputs and len(origins) > 1:
        raise ValueError("images with texts must come one sample a batch")
    counted = [_mask(inputs, "")]
    if "decoder_input_ids" in inspect.signature(backbone(model).forward).parameters:
        if "decoder_input_ids" not in inputs:
            raise ValueError("a batch for an encoder-decoder model must have decoder_input_ids, the input of its decoder")
        mask = _mask(inputs, "decoder_")
        if mask.shape == counted[0].shape:  # the two must differ in length: see `make_batches`
            mask = nn.functional.pad(mask, (0, 1))
            inputs["decoder_input_ids"] = nn.functional.pad(inputs["decoder_input_ids"], (0, 1))
            inputs["decoder_attention_mask"] = mask.long()
        counted.append(mask)
    return Batch(inputs, tuple(counted), origins)


def _mask(inputs: Tensors, side: str) -> Tensor:
    """Which tokens are not padding, bool (samples, length)."""
    tokens, mask = inputs[f"{side}input_ids"], inputs.get(f"{side}attention_mask")
    if mask is None and len(tokens) > 1:
        raise ValueError(f"a batch of several samples must have {side}attention_mask: padding must not count")
    if mask is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    if mask.shape != tokens.shape:
        raise ValueError(f"{side}attention_mask must be of the shape {tuple(tokens.shape)} of the ids, not {tuple(mask.shape)}")
    return mask.bool()


def one_by_one(batch: Batch) -> Iterator[Tensors]:
    """The samples of a batch, each without padding."""
    for i in range(len(batch.origins)):
        single = {name: values[i : i + 1] if len(batch.origins) > 1 else values for name, values in batch.inputs.items()}
        for side, counted in zip(("", "decoder_"), batch.counted):
            for name, values in single.items():
                if name.startswith("decoder_") == bool(side) and batch.inputs[name].shape == counted.shape:
                    single[name] = values[:, counted[i]]
        yield single
