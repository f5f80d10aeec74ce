"""What one model's calibration needs, and the key of what it makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import transformers

from mergekit_pave import cache
from mergekit_pave.calibration.architecture import Architecture
from mergekit_pave.calibration.batches import Encoded
from mergekit_pave.calibration.estimate import Estimate, estimate
from mergekit_pave.calibration.models import inference_dtype


@dataclass(frozen=True)
class Job:
    """Everything that one model's calibration needs.

    Attributes:
        name: the model's name, for messages.
        folder: where its checkpoint lies.
        config: its configuration.
        architecture: its linear layers, all of which are watched.
        encoded: its tokenised samples.
        batch_size: samples in one forward pass.
        about: what the manifest says about the data, JSON-serialisable.
    """

    name: str
    folder: str
    config: transformers.PretrainedConfig
    architecture: Architecture
    encoded: list[Encoded]
    batch_size: int
    about: dict[str, Any]

    @property
    def layers(self) -> list[str]:
        """The modules to watch; experts are not among them."""
        return [linear.module for linear in self.architecture.linears.values() if not linear.experts]

    def estimate(self, device: str) -> Estimate:
        """What the calibration will cost on a device."""
        return estimate(self.architecture, self.encoded, self.batch_size, inference_dtype(self.config, device).itemsize)


@dataclass(frozen=True)
class Runtime:
    """Where and how calibration runs: mergekit's options of these names."""

    device: str
    trust_remote_code: bool
    quiet: bool


def covariance_key(model: str, encoded: list[Encoded]) -> str:
    """Key of the covariances: the model with all that it computes, and exactly the tokens that the model sees and that count.

    The tokens stand for the data set, its columns, the tokenizer, the chat template, the seed and all limits at once.
    """
    parts: list[Any] = []
    for sample in encoded:
        texts = {name: values for name, values in sample.inputs.items() if isinstance(values, list)}
        images = {name: values for name, values in sample.inputs.items() if name not in texts}
        parts += [
            [texts, sample.counted, sample.counted_target, list(images)],
            *(image.numpy().tobytes() for image in images.values()),
        ]
    return cache.key("covariance", model, *parts)
