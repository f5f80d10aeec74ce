"""The inputs of one model's calibration, and the key of its result."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import transformers

from mergekit_pave import cache
from mergekit_pave.calibration.architecture import Architecture
from mergekit_pave.calibration.batches import Encoded
from mergekit_pave.calibration.counts import TokenCounts
from mergekit_pave.calibration.drawing import RUN, draw_positions
from mergekit_pave.calibration.estimate import Estimate, estimate
from mergekit_pave.calibration.models import inference_dtype
from mergekit_pave.calibration.parking import room_on


@dataclass(frozen=True)
class Job:
    """The inputs of one model's calibration.

    Attributes:
        name: the model's name, for messages.
        folder: of its checkpoint.
        config: its configuration.
        architecture: its linear layers, all of which are watched.
        encoded: its tokenised samples.
        batch_size: samples in one forward pass.
        about: the part of the manifest that describes model and data, JSON-serialisable.
        counts: of the samples' tokens, to be kept with the covariances.
        only_head: nothing but the head of a language model is measured.
        keep: the covariances are stored, and not only used while they are in memory.
    """

    name: str
    folder: str
    config: transformers.PretrainedConfig
    architecture: Architecture
    encoded: list[Encoded]
    batch_size: int
    about: dict[str, Any]
    counts: TokenCounts | None = None
    only_head: bool = False
    keep: bool = True

    @property
    def layers(self) -> list[str]:
        """The modules to watch, without experts and heads."""
        if self.only_head:
            return []
        return [linear.module for linear in self.architecture.linears.values() if not linear.experts]

    @property
    def run(self) -> list[Encoded]:
        """The samples that the model is run on: those of which a token counts."""
        return [sample for sample in self.encoded if sample.tokens]

    def with_more_counted(self, seed: int) -> Job:
        """The same with more tokens that count, up to what it is run on for them anyway: for where they are not stored."""
        run = self.run
        if "input_ids" not in run[0].inputs:
            return self

        def drawn(name: str, counted: Iterable[list[int]]) -> list[list[int]]:
            return draw_positions([len(sample.inputs.get(name, ())) for sample in run], RUN * sum(map(len, counted)), seed)

        ours = drawn("input_ids", (sample.counted for sample in run))
        theirs = drawn("decoder_input_ids", (sample.counted_target for sample in run))
        encoded = [replace(sample, counted=one, counted_target=other) for sample, one, other in zip(run, ours, theirs)]
        about = self.about | {"tokens": sum(sample.tokens for sample in encoded)}
        return replace(self, encoded=encoded, about=about)

    def estimate(self, device: str) -> Estimate:
        """The cost of the calibration on a device."""
        itemsize = inference_dtype(self.config, device).itemsize
        cost = estimate(self.architecture, self.run, self.batch_size, itemsize, only_head=self.only_head, keep=self.keep)
        return replace(cost, hidden=int(min(cost.hidden, room_on(device))))


@dataclass(frozen=True)
class Runtime:
    """Where and how calibration runs. These are options of mergekit."""

    device: str
    trust_remote_code: bool
    quiet: bool


def covariance_key(model: str, encoded: list[Encoded]) -> str:
    """Key of the covariances: the model, with what it computes, and exactly the tokens that it sees and that count."""
    return cache.key("covariance", model, *seen(encoded))


def seen(encoded: list[Encoded]) -> list[Any]:
    """What a model sees, as parts of a key.

    They stand for the data set, its columns, the tokenizer, the chat template, the seed and all limits.
    """
    parts: list[Any] = []
    for sample in encoded:
        texts = {name: values for name, values in sample.inputs.items() if isinstance(values, list)}
        images = {name: values for name, values in sample.inputs.items() if name not in texts}
        parts += [
            [texts, sample.counted, sample.counted_target, list(images)],
            *(image.numpy().tobytes() for image in images.values()),
        ]
    return parts
