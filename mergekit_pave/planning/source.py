"""One model of a merge: its files and its architecture."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass

import transformers
from mergekit.common import ModelReference

from mergekit_pave import cache
from mergekit_pave.cache.checkpoint import Checkpoint
from mergekit_pave.calibration.architecture import Architecture, describe
from mergekit_pave.config import PaveConfig, PaveModel
from mergekit_pave.errors import PaveError
from mergekit_pave.planning.checks import check_unquantised
from mergekit_pave.planning.merge import Reading


@dataclass(frozen=True)
class Source:
    """A model that is to be purified, or whose covariances regmean needs.

    Attributes:
        model: its name in the config.
        entry: its entry under `pave.models`.
        data_key: where its `data` stands in the YAML, for messages.
        config: its configuration, as of a model that is not quantised.
    """

    model: ModelReference
    entry: PaveModel
    checkpoint: Checkpoint
    config: transformers.PretrainedConfig
    architecture: Architecture
    data_key: str

    @property
    def num_weights(self) -> int:
        """The number of weights in all of its linear layers."""
        return sum(linear.num_weights for linear in self.architecture.linears.values())

    @functools.cached_property
    def fingerprint(self) -> str:
        """A key of the weights, wherever they are."""
        return cache.weights_fingerprint(self.checkpoint.folder, list(self.checkpoint.files.values()))

    @functools.cached_property
    def identity(self) -> str:
        """A key that differs between checkpoints."""
        return cache.weights_identity(self.checkpoint.folder, list(self.checkpoint.files.values()), self.fingerprint)


def weights_identity(checkpoint: Checkpoint) -> str:
    return cache.weights_identity(checkpoint.folder, list(checkpoint.files.values()))


def open_sources(config: PaveConfig, models: Iterable[ModelReference], reading: Reading) -> dict[ModelReference, Source]:
    """Look at models, and at whether the `data` of each suits it.

    Raises:
        PaveError: a model is quantised, or the samples are not of the kind that it reads.
    """
    described: dict[str, Architecture] = {}
    sources = {}
    for model in models:
        checkpoint, model_config, architecture = open_model(model, reading, described)
        source = Source(model, config.listed(model), checkpoint, model_config, architecture, config.data_key(model))
        _check_kind_of_samples(source)
        sources[model] = source
    return sources


def open_model(
    model: ModelReference, reading: Reading, described: dict[str, Architecture] | None = None
) -> tuple[Checkpoint, transformers.PretrainedConfig, Architecture]:
    """A model's files, its configuration as of a model that is not quantised, and its architecture.

    Args:
        described: gets the architecture. It is looked up there first, as most models of a merge have the same configuration.

    Raises:
        PaveError: the model is quantised.
    """
    checkpoint, trust = reading.checkpoint(model), reading.runtime.trust_remote_code
    model_config = model.config(trust_remote_code=trust)
    parts = (model_config, model_config.get_text_config(decoder=True))
    # With this entry transformers would quantise the model as it loads it.
    quantised = [part for part in parts if part.__dict__.pop("quantization_config", None)]
    described, key = {} if described is None else described, _settings(model_config, model)
    if key not in described:
        described[key] = describe(model_config, model.model.path, trust, model.model.revision)
    architecture = described[key]
    if quantised:
        check_unquantised(model, checkpoint, architecture)
    return checkpoint, model_config, architecture


def _settings(config: transformers.PretrainedConfig, model: ModelReference) -> str:
    """A configuration as a string, with the model's name only where code may come with the model."""
    settings = json.loads(config.to_json_string(use_diff=False))
    settings["_name_or_path"] = str(model) if "auto_map" in settings else ""
    return json.dumps([type(config).__qualname__, settings], sort_keys=True)


def _check_kind_of_samples(source: Source) -> None:
    """Refuse images for a model that reads none, and so on."""
    architecture, key = source.architecture, source.data_key
    if source.entry.is_generated:
        _check_writes(source)
    for data in source.entry.sources if source.entry.data else ():
        if data.image is not None and "pixel_values" not in architecture.inputs:
            raise PaveError(f"{key}.image: the model takes no images")
        if data.image is not None and data.text is None and "input_ids" in architecture.inputs:
            raise PaveError(f"{key}.text: missing. The model reads an image together with a text")
        if architecture.shift is None and data.target is not None:
            raise PaveError(f"{key}.target: only an encoder-decoder model takes one; put it into `text`")
        if architecture.shift is not None and data.target is None:
            raise PaveError(
                f"{key}.target: missing. The model is an encoder-decoder model, and its decoder has to be shown the answer; name "
                "the column of the answer, or give a template over columns"
            )


def _check_writes(source: Source) -> None:
    """Refuse `data: generated` for a model that writes no text on its own."""
    architecture = source.architecture
    if architecture.shift is not None:
        kind = "an encoder-decoder model, which needs questions to answer"
    elif "pixel_values" in architecture.inputs:
        kind = "a model that sees images, which it cannot write"
    elif not architecture.cls.can_generate() or architecture.vocabulary is None:
        kind = f"a {architecture.cls.__name__}, which writes no text"
    else:
        return
    raise PaveError(
        f"{source.data_key}: only a causal language model can write its own text (`generated`). {source.model} is {kind}; name a "
        "data set"
    )
