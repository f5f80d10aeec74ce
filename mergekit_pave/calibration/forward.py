"""The backbone of a model on a batch, and which rows of a layer's input are tokens that count."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mergekit_pave.calibration.batches import Batch
from mergekit_pave.calibration.models import backbone


class HeadReachedError(Exception):
    """A model has come to its head, and need not go on."""


class UnalignedInputError(Exception):
    """The rows of a layer's input are not the tokens of the batch, so padding among them cannot be recognised."""


def runner(
    model: nn.Module, unpadded: bool, with_head: bool = False, take: Callable[[Batch, Any], None] = lambda batch, output: None
) -> Callable[[Batch], None]:
    """A function that runs the model on a batch.

    Args:
        with_head: run the whole model, up to a `HeadReachedError`. Otherwise only the backbone is run.
        take: is given what the model returns.

    Raises:
        UnalignedInputError: the model takes no attention mask, so padding would be read as text.
    """
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    base = model if with_head else backbone(model)
    accepted = inspect.signature(base.forward).parameters
    if "input_ids" in accepted and "attention_mask" not in accepted and not unpadded:
        raise UnalignedInputError("a model without attention_mask")

    # Some parts of encoder-decoder models have a configuration of their own.
    options = {"use_cache": False} if "use_cache" in accepted else {}

    def run(batch: Batch) -> None:
        with contextlib.suppress(HeadReachedError):
            take(batch, base(**{name: values for name, values in batch.inputs.items() if name in accepted}, **options))

    return run


def counted_rows(batch: Batch, layer: str, x: Tensor, unpadded: bool) -> Tensor | None:
    """Which rows of x belong to counted tokens, bool (rows,); None if x is not aligned with the tokens and all rows count.

    The length of x shows which of an encoder-decoder model's two sequences it belongs to: in a batch their lengths differ.

    Args:
        layer: whose input x is.
        unpadded: batches have one sample each, so that all rows of an input that is not aligned with tokens count.

    Raises:
        UnalignedInputError: x is not aligned with the tokens, and the batch may have padding.
    """
    for counted in batch.counted:
        aligned = [n for n in x.shape[:-1] if n > 1] == [n for n in counted.shape if n > 1]
        if aligned or (x.dim() == 2 and x.shape[0] == counted.numel()):
            return counted.flatten().to(x.device)
    pooled = x.dim() == 2 and x.shape[0] == len(batch.origins)
    if batch.counted and not pooled and not unpadded:
        raise UnalignedInputError(layer)
    return None  # images, and inputs that are pooled to one row per sample


def version(x: Tensor) -> int:
    """How often a tensor has been written to. One from inference mode cannot be written to here, outside of that mode."""
    return 0 if x.is_inference() else x._version
