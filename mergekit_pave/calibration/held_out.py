"""Rows that a model was not calibrated with, and the numbering of what models give on them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mergekit_pave.calibration.batches import Batch, Encoded, make_batches
from mergekit_pave.calibration.forms import Form, Places


@dataclass(frozen=True)
class Rows:
    """Held-out rows of one model.

    Places are numbered through all rows, so that what two models give at a place can be compared however they were batched.

    Attributes:
        encoded: the rows, of which all positions count, the shortest first: `make_batches` keeps that order.
        batch_size: how many of them run at a time.
        bytes: the length of each row's text after its first token, in UTF-8, without special tokens; 0 where it is not known.
        special: ids of special tokens, whose loss does not count.
        padding: the id that the model takes for padding, if there is one.
    """

    encoded: list[Encoded]
    batch_size: int
    form: Form
    bytes: list[int]
    special: frozenset[int] = frozenset()
    padding: int | None = None

    @cached_property
    def counts(self) -> list[int]:
        """The number of places in each row."""
        if self.form.places is not Places.TOKENS:
            return [self.form.labels] * len(self.encoded)
        return [len(sample.counted_target or sample.counted) for sample in self.encoded]

    @cached_property
    def row_of(self) -> Tensor:
        """The row of each place, int64 (places,)."""
        return torch.arange(len(self.encoded)).repeat_interleave(torch.tensor(self.counts))

    @cached_property
    def following(self) -> Tensor:
        """The token that comes next at each place, int64 (places,); -1 where none does, or a special one."""
        if not self.form.is_generative:
            return torch.full((len(self.row_of),), -1)
        inputs = [sample.inputs.get("decoder_input_ids", sample.inputs["input_ids"]) for sample in self.encoded]
        following = itertools.chain.from_iterable([*ids[1:], -1] for ids in inputs)
        return torch.tensor([-1 if token in self.special else token for token in following])

    def batches(self, one_by_one: bool, device: str) -> list[tuple[Batch, int]]:
        """Batches, each with the number of its first place."""
        # Decoders that classify take the score at the last token, which they find by the id of what follows it.
        finds_end = self.form.places is Places.ROWS and "input_ids" in self.encoded[0].inputs
        alone = one_by_one or (finds_end and self.padding is None) or any(sample.is_pictured for sample in self.encoded)
        size = 1 if alone else self.batch_size
        batches = make_batches(self.encoded, size)
        for batch in batches if finds_end and not alone else ():
            batch.inputs["input_ids"].masked_fill_(batch.inputs["attention_mask"] == 0, self.padding)
        counts = [sum(self.counts[i : i + size]) for i in range(0, len(self.encoded), size)]
        starts = itertools.accumulate(counts, initial=0)
        return [(batch.to(device), start) for batch, start in zip(batches, starts)]

    def by_row(self, values: Tensor) -> Tensor:
        """The sums of what is at the places of each row, float64 (rows,)."""
        return torch.zeros(len(self.encoded), dtype=torch.float64).index_add_(0, self.row_of, values.double())


def rows_of(encoded: list[Encoded], bytes_of: list[int], batch_size: int, form: Form, **more: Any) -> Rows:
    """
    Args:
        encoded: in any order, with the length in bytes of each.
        more: see `Rows`.
    """
    order = sorted(range(len(encoded)), key=lambda i: encoded[i].length)
    return Rows([encoded[i] for i in order], batch_size, form, [bytes_of[i] for i in order], **more)
