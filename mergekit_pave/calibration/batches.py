"""Tokenised calibration batches, and which of their positions count."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from mergekit_pave.calibration.chats import in_form, render, takes_only_parts, tokenize
from mergekit_pave.calibration.data import Sample
from mergekit_pave.calibration.drawing import draw_positions, to_run
from mergekit_pave.errors import PaveError
from mergekit_pave.settings import Calibration

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoded:
    """One sample as a model takes it.

    Attributes:
        origin: the row that it comes from, for messages.
        inputs: the model's inputs by name: lists of the sample's length, or a tensor for an image. An encoder-decoder model has
            `decoder_input_ids`, too, which have a length of their own. An image with a text has a list of `input_ids`, and
            tensors of one sample.
        counted: ascending positions whose layer inputs enter C. Of an image all do. A sample without any is not run.
        counted_target: the same positions of `decoder_input_ids`.
    """

    origin: str
    inputs: dict[str, Any]
    counted: list[int]
    counted_target: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        """The number of tokens, or of patches of an image, that the model runs over."""
        if "input_ids" not in self.inputs:
            return len(self.counted)
        return len(self.inputs["input_ids"]) + len(self.inputs.get("decoder_input_ids", ()))

    @property
    def longest(self) -> int:
        """The number of tokens, or of patches, in the longest sequence that attention sees."""
        if "input_ids" not in self.inputs:
            return len(self.counted)
        return max(len(self.inputs["input_ids"]), len(self.inputs.get("decoder_input_ids", ())))

    @property
    def is_pictured(self) -> bool:
        """Whether it is an image with a text. Such samples run one by one, because every model batches them in its own way."""
        return "input_ids" in self.inputs and any(isinstance(values, Tensor) for values in self.inputs.values())

    @property
    def tokens(self) -> int:
        """The number of positions that enter a covariance."""
        return len(self.counted) + len(self.counted_target)


def encode(
    samples: list[Sample],
    processor: Any,
    calibration: Calibration,
    positions: int | None,
    where: str,
    shift: Callable[[list[int]], list[int]] | None = None,
    tell: Callable[[str], None] = LOG.warning,
) -> list[Encoded]:
    """Tokenise samples and draw the token positions that count. Rows that cannot be used are skipped, with a warning.

    Args:
        calibration: without `max_tokens` all tokens count.
        processor: the model's tokenizer, or its image processor, or for images with texts the processor that has both.
        positions: the longest sequence that the model can take, or None; of images the number of patches.
        where: the key of the data in the YAML, for messages.
        shift: gives a decoder's inputs for the token ids of its target. If it is given, samples have a target.
        tell: gets the warning.

    Raises:
        PaveError: most rows cannot be used, or the tokenizer lacks a chat template that is needed.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    chats = any(sample.messages is not None for sample in samples)
    if chats and tokenizer.chat_template is None:
        raise PaveError(
            f"{where}.messages: the model's tokenizer has no chat template; use `text` with a template over the columns"
        )
    parts = chats and takes_only_parts(tokenizer)
    longest = longest_sample(calibration, tokenizer, positions)
    encoded: list[tuple[str, dict[str, Any]]] = []
    problems: Counter[str] = Counter()
    for sample in samples:
        inputs, problem = {}, sample.problem
        if problem is None:
            try:
                pictured = sample.image is not None and sample.text is not None
                inputs = _prepare_pictured(sample, processor) if pictured else _prepare(sample, tokenizer, longest, parts)
                if inputs and shift is not None:
                    # One token fewer than the model can take: see `make_batches`.
                    limit = min(longest, positions - 1) if positions else longest
                    labels = _tokenised(processor, limit, text_target=sample.target)["input_ids"]
                    inputs["decoder_input_ids"] = shift(labels)
                problem = None if inputs else "empty"
                if pictured and len(inputs.get("input_ids", ())) > longest:
                    problem = f"longer with the image than the {longest} tokens that calibration.max_length or the model allows"
            except (TemplateError, TypeError, ValueError, KeyError) as error:
                problem = f"refused by the {'processor' if pictured else 'chat template'} ({error})"
        if problem is None:
            encoded.append((sample.origin, inputs))
        else:
            problems[problem] += 1
    if problems:
        counts = ", ".join(f"{count} {problem}" for problem, count in problems.most_common(3))
        if 2 * problems.total() > len(samples) and len(encoded) < calibration.samples:
            raise PaveError(
                f"{where}: {problems.total()} of {len(samples)} rows cannot be used: {counts}. Texts go under `text`, "
                "chats under `messages`, images under `image`"
            )
        tell(f"{where}: skipped {problems.total()} of {len(samples)} rows: {counts}")
    if "input_ids" not in encoded[0][1]:
        return [Encoded(origin, inputs, list(range(positions or 1))) for origin, inputs in encoded]

    lengths = {name: [len(inputs.get(name, ())) for _, inputs in encoded] for name in ("input_ids", "decoder_input_ids")}
    totals = [sum(both) for both in zip(*lengths.values())]
    most = calibration.max_tokens or sum(totals)
    run = to_run(totals, most, calibration.seed)
    positions_of = {
        name: draw_positions([length * is_run for length, is_run in zip(of_side, run)], most, calibration.seed)
        for name, of_side in lengths.items()
    }
    drawn = zip(encoded, *positions_of.values())
    return [Encoded(origin, inputs, counted, of_target) for (origin, inputs), counted, of_target in drawn]


def longest_sample(calibration: Calibration, tokenizer: Any, positions: int | None) -> int:
    """The most tokens that a sample may have."""
    limits = (calibration.max_length, getattr(tokenizer, "model_max_length", None), positions)
    return min(limit for limit in limits if limit)


def _prepare(sample: Sample, processor: Any, longest: int, parts: bool) -> dict[str, Any]:
    """The model's inputs by name; empty if there is no text."""
    if sample.tokens is not None:
        return {"input_ids": sample.tokens[:longest]}
    if sample.image is not None:
        return {name: values[0] for name, values in processor(images=sample.image, return_tensors="pt").items()}
    if sample.messages is None:
        inputs = _tokenised(processor, longest, text=sample.text, text_pair=sample.text_pair)
    else:
        inputs = tokenize(processor, in_form(sample.messages, parts), sample.tools, longest)
    return {name: ids for name, ids in inputs.items() if name in processor.model_input_names} if inputs["input_ids"] else {}


def _tokenised(tokenizer: Any, longest: int, **texts: str | None) -> dict[str, list[int]]:
    """Token ids and what goes with them. If the text itself begins or ends with a special token, no second one is added."""
    inputs = tokenizer(**texts, truncation=True, max_length=longest)
    special = set(tokenizer.all_special_ids)
    if not any(token == following and token in special for token, following in pairwise(inputs["input_ids"])):
        return inputs
    short, doubled_in_short = _find_doubled(tokenizer, truncation=True, max_length=longest, **texts)
    inputs, doubled = _find_doubled(tokenizer, truncation=True, max_length=longest + len(doubled_in_short), **texts)
    if len(inputs["input_ids"]) - len(doubled) > longest:  # in `short` the special token at the end of the text was cut off
        inputs, doubled = short, doubled_in_short
    return {name: [value for i, value in enumerate(values) if i not in doubled] for name, values in inputs.items()}


def _find_doubled(tokenizer: Any, **texts: Any) -> tuple[dict[str, list[int]], set[int]]:
    """The tokenizer's output for texts, and the positions at which it added a special token beside the same one in the text."""
    inputs = tokenizer(**texts, return_special_tokens_mask=True)
    pairs = list(zip(inputs["input_ids"], inputs["special_tokens_mask"]))
    neighbours = {(i, j) for i in range(len(pairs)) for j in (i - 1, i + 1) if 0 <= j < len(pairs)}
    return inputs, {i for i, j in neighbours if pairs[i] == (pairs[j][0], 1) and not pairs[j][1]}


def _prepare_pictured(sample: Sample, processor: Any) -> dict[str, Any]:
    """The model's inputs by name for an image with a text; empty if there is no text.

    A text with the processor's placeholder for an image is taken as it is. Any other text becomes a user's turn that begins with
    the image.
    """
    text, placeholder = sample.text, getattr(processor, "image_token", None)
    if not text:
        return {}
    as_chat = placeholder is None or placeholder not in text
    if as_chat and processor.chat_template is None:
        raise ValueError(f"the model has no chat template, so the text has to have {placeholder!r} in the place of the image")
    if as_chat:
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        text = render(processor, [turn])
    complete = as_chat or _find_doubled(getattr(processor, "tokenizer", processor), text=text)[1]
    inputs = dict(processor(text=[text], images=[sample.image], return_tensors="pt", add_special_tokens=not complete))
    return inputs | {"input_ids": inputs["input_ids"][0].tolist()}


@dataclass(frozen=True)
class Batch:
    """Samples of similar length, padded on the right, or images of one size.

    Attributes:
        inputs: keyword arguments of the model, each (samples, length) or (samples, channels, height, width). For an image with
            a text they are what the processor returns.
        counted: bool (samples, length), the positions that enter C; never padding. There is one tensor for each sequence that
            the model reads. An encoder-decoder model reads two, of different lengths. It is empty if all rows enter C.
        origins: the row that each sample comes from, for messages.
    """

    inputs: dict[str, Tensor]
    counted: tuple[Tensor, ...]
    origins: list[str]

    def to(self, device: str) -> Batch:
        """The same batch on another device."""
        inputs = {name: values.to(device) for name, values in self.inputs.items()}
        return Batch(inputs, tuple(counted.to(device) for counted in self.counted), self.origins)


def make_batches(encoded: list[Encoded], batch_size: int) -> list[Batch]:
    """Group samples by length, so that there is little padding, and pad them. Images with texts go one by one.

    The values at padded positions never matter: attention ignores them and they are not counted. If encoder and decoder would
    have the same length, decoder inputs get one more of them. So each layer's input shows which of the two it belongs to.
    """
    batches = []
    ordered = sorted(encoded, key=lambda sample: sample.length)
    for start in range(0, len(ordered), batch_size):
        group = ordered[start : start + batch_size]
        origins = [sample.origin for sample in group]
        if any(sample.is_pictured for sample in group):
            (sample,) = group
            inputs = sample.inputs | {"input_ids": torch.tensor([sample.inputs["input_ids"]])}
            batches.append(Batch(inputs, (_mask([sample.counted], sample.length),), origins))
            continue
        if "input_ids" not in group[0].inputs:
            images = {name: torch.stack([sample.inputs[name] for sample in group]) for name in group[0].inputs}
            batches.append(Batch(images, (), origins))
            continue
        padded = [sample.inputs | {"attention_mask": [1] * len(sample.inputs["input_ids"])} for sample in group]
        width = max(len(inputs["input_ids"]) for inputs in padded)
        counted, widths = [[sample.counted for sample in group]], [width]
        if "decoder_input_ids" in padded[0]:
            for inputs in padded:
                inputs["decoder_attention_mask"] = [1] * len(inputs["decoder_input_ids"])
            width = max(len(inputs["decoder_input_ids"]) for inputs in padded)
            counted.append([sample.counted_target for sample in group])
            widths.append(width + (width == widths[0]))
        inputs = {
            name: _stack([torch.tensor(inputs[name]) for inputs in padded], widths[name.startswith("decoder_")])
            for name in padded[0]
        }
        masks = tuple(_mask(positions, width) for positions, width in zip(counted, widths))
        batches.append(Batch(inputs, masks, origins))
    return batches


def _stack(rows: list[Tensor], width: int) -> Tensor:
    """Rows of different lengths as one (rows, width) tensor, zeros on the right."""
    stacked = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        stacked[i, : len(row)] = row
    return stacked


def _mask(positions: list[list[int]], width: int) -> Tensor:
    """bool (rows, width), true at the positions of each row."""
    mask = torch.zeros(len(positions), width, dtype=torch.bool)
    for i, of_row in enumerate(positions):
        mask[i, of_row] = True
    return mask
