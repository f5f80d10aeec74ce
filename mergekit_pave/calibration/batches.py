"""Tokenised calibration batches, and which of their positions count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergekit_pave.calibration.data import Sample
from mergekit_pave.config import Calibration
from mergekit_pave.errors import PaveError


@dataclass(frozen=True)
class Encoded:
    """One sample as token ids.

    Attributes:
        row: its place among the samples, for messages.
        inputs: what the tokenizer made of it, by name, each of the sample's length.
        counted: ascending positions whose layer inputs enter C.
    """

    row: int
    inputs: dict[str, list[int]]
    counted: list[int]


def encode(samples: list[Sample], tokenizer: Any, calibration: Calibration, positions: int | None, model: str) -> list[Encoded]:
    """Tokenise samples and draw the token positions that count.

    Args:
        positions: the longest sequence that the model can take, or None.
        model: the model's name, for messages.

    Raises:
        PaveError: nothing is left to calibrate with, or the tokenizer lacks a chat template that is needed.
    """
    longest = min(x for x in (calibration.max_length, tokenizer.model_max_length, positions) if x)
    encoded = []
    for row, sample in enumerate(samples):
        options = {"truncation": True, "max_length": longest}
        if sample.messages is None:
            inputs = tokenizer(sample.text, sample.text_pair, **options) if sample.text or sample.text_pair else {}
        else:
            inputs = tokenizer(_render(sample.messages, tokenizer, model), add_special_tokens=False, **options)
        inputs = {name: values for name, values in inputs.items() if name in tokenizer.model_input_names}
        if inputs.get("input_ids"):
            encoded.append((row, inputs))
    if not encoded:
        raise PaveError(f"pave.models[{model}].data: none of the {len(samples)} samples has any text")
    lengths = [len(inputs["input_ids"]) for _, inputs in encoded]
    counted = draw_positions(lengths, calibration.max_tokens, calibration.seed)
    return [Encoded(row, inputs, places) for (row, inputs), places in zip(encoded, counted)]


def _render(messages: list[dict[str, Any]], tokenizer: Any, model: str) -> str:
    if tokenizer.chat_template is None:
        raise PaveError(
            f"pave.models[{model}].data.messages: the model's tokenizer has no chat template; "
            "use `text` with a template over the columns"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template is a program of the model's author and may raise anything
        raise PaveError(f"pave.models[{model}].data.messages: the chat template refuses a sample: {error}") from error


def draw_positions(lengths: list[int], budget: int, seed: int) -> list[list[int]]:
    """Which positions of each sample count, at most `budget` in all, drawn evenly over the samples.

    A sample shorter than an even share gives all of its tokens, and the rest is shared among the others.
    """
    quotas = [0] * len(lengths)
    left = budget
    for remaining, i in zip(range(len(lengths), 0, -1), sorted(range(len(lengths)), key=lengths.__getitem__)):
        quotas[i] = min(lengths[i], -(-left // remaining))
        left -= quotas[i]
    generator = torch.Generator().manual_seed(seed)
    return [
        list(range(length)) if quota == length else torch.randperm(length, generator=generator)[:quota].sort().values.tolist()
        for length, quota in zip(lengths, quotas)
    ]


@dataclass(frozen=True)
class Batch:
    """Samples of similar length, padded on the right.

    Attributes:
        inputs: keyword arguments of the model, each (samples, length).
        counted: bool (samples, length), the positions that enter C; never padding.
        rows: each sample's place in the data set, for messages.
    """

    inputs: dict[str, Tensor]
    counted: Tensor
    rows: list[int]

    def to(self, device: str) -> Batch:
        """The same batch on another device."""
        inputs = {name: values.to(device) for name, values in self.inputs.items()}
        return Batch(inputs, self.counted.to(device), self.rows)


def make_batches(encoded: list[Encoded], batch_size: int) -> list[Batch]:
    """Group samples by length, so that little is spent on padding, and pad them.

    What stands at a padded position never matters: attention ignores it and it is not counted.
    """
    batches = []
    ordered = sorted(encoded, key=lambda sample: len(sample.inputs["input_ids"]))
    for start in range(0, len(ordered), batch_size):
        group = ordered[start : start + batch_size]
        shape = (len(group), len(group[-1].inputs["input_ids"]))
        inputs = {name: torch.zeros(shape, dtype=torch.long) for name in group[0].inputs}
        inputs["attention_mask"] = torch.zeros(shape, dtype=torch.long)
        counted = torch.zeros(shape, dtype=torch.bool)
        for i, sample in enumerate(group):
            length = len(sample.inputs["input_ids"])
            for name, values in sample.inputs.items():
                inputs[name][i, :length] = torch.tensor(values)
            inputs["attention_mask"][i, :length] = 1
            counted[i, sample.counted] = True
        batches.append(Batch(inputs, counted, [sample.row for sample in group]))
    return batches
