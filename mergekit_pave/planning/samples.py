"""The samples of one model: those of its data sets, or those that it writes itself."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any

import transformers
from mergekit.common import ModelReference

from mergekit_pave import cache
from mergekit_pave.calibration.batches import longest_sample
from mergekit_pave.calibration.data import Sample, load_held_out, load_samples
from mergekit_pave.calibration.generation import Generation
from mergekit_pave.calibration.models import inference_dtype
from mergekit_pave.calibration.starts import find_start
from mergekit_pave.config import PaveConfig
from mergekit_pave.errors import PaveError
from mergekit_pave.planning.merge import Reading
from mergekit_pave.planning.source import Source
from mergekit_pave.planning.tokenizers import load_processor
from mergekit_pave.settings import Calibration, Data

_kept: dict[tuple[str, ...], list[Sample]] | None = None  # see `each_read_once`


@dataclass(frozen=True)
class Samples:
    """What a model is calibrated with.

    Attributes:
        samples: if they are to be written, as many as there will be, each as long as it can get.
        processor: makes model inputs of them.
        about: the data sets, as a report shows them.
        to_write: how the model is to write them; None where they are there.
    """

    samples: list[Sample]
    processor: Any
    about: list[dict[str, Any]]
    to_write: Generation | None = None


@contextlib.contextmanager
def each_read_once() -> Iterator[None]:
    """While the block runs, samples that are read once are not read again: many plans of one config need the same."""
    global _kept
    _kept = {}
    try:
        yield
    finally:
        _kept = None


def _load(sources: list[Data], settings: Calibration, data_key: str) -> list[Sample]:
    if _kept is None:
        return load_samples(sources, settings, data_key)
    key = (data_key, *(block.model_dump_json() for block in (*sources, settings)))
    if key not in _kept:
        _kept[key] = load_samples(sources, settings, data_key)
    return list(_kept[key])


def read_samples(config: PaveConfig, source: Source, reading: Reading) -> Samples:
    """The samples that a model is calibrated with. What it has to write itself it writes now, if the command allows that.

    Raises:
        PaveError: they cannot be read or written.
    """
    settings = config.calibration_of(source.model)
    if not source.entry.is_generated:
        samples = _load(source.entry.sources, settings, source.data_key)
        return Samples(samples, load_processor(source, samples, reading), as_reported(source.entry.sources))
    tokenizer = load_processor(source, [], reading)
    generation = _generation(config, source, tokenizer, reading)
    about = [{"generated": generation.start.kind}]
    if not reading.generates and generation.missing(0, settings.samples):
        token = (generation.start.tokens or generation.start.drawn)[0]
        longest = Sample("a text that is still to be written", tokens=[token] * generation.longest)
        return Samples([longest] * settings.samples, tokenizer, about, generation)
    return Samples(generation.samples(0, settings.samples), tokenizer, about)


def as_reported(sources: list[Data]) -> list[dict[str, Any]]:
    """Data sets, as a report shows them."""
    return [data.model_dump(mode="json", exclude_defaults=True) | {"split": data.split} for data in sources]


def read_held_out(
    config: PaveConfig, source: Source, reading: Reading, rows: int, used: Container[int]
) -> tuple[list[Sample], Any]:
    """Further samples, and what makes model inputs of them; None if there are none.

    Args:
        rows: how many are wanted. There may be fewer.
        used: contents that are passed over.
    """
    settings = config.calibration_of(source.model)
    if not source.entry.is_generated:
        samples = load_held_out(source.entry.sources, settings, source.data_key, rows, used)
        return samples, load_processor(source, samples, reading) if samples else None
    tokenizer = load_processor(source, [], reading)
    generation, fresh = _generation(config, source, tokenizer, reading), {}
    first, last = settings.samples, settings.samples + 2 * rows
    while missing := min(rows - len(fresh), last - first):  # some texts are empty
        written = generation.samples(first, missing)
        fresh |= {text.content: text for text in written if text.problem is None and text.content not in used}
        first += missing
    return list(fresh.values()), tokenizer


def _generation(config: PaveConfig, source: Source, tokenizer: Any, reading: Reading) -> Generation:
    name, settings, architecture = str(source.model), config.calibration_of(source.model), source.architecture
    start = find_start(tokenizer, architecture.vocabulary, _stops(source.model, reading), name)
    longest = longest_sample(settings, tokenizer, architecture.positions)
    if len(start.tokens) + len(start.reply) >= longest:
        raise PaveError(
            f"{source.data_key}: a text may have {longest} tokens, but its chat template alone has "
            f"{len(start.tokens) + len(start.reply)}; raise calibration.max_length"
        )
    text = source.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", 0)
    all_heads = getattr(text, "num_attention_heads", None) or 1
    checkpoint, sizes = source.checkpoint, [longest, settings.batch_size, settings.seed]
    key = cache.key(
        "generated",
        source.identity,
        architecture.computation,
        str(inference_dtype(source.config, reading.runtime.device)),
        [start.kind, start.tokens, start.drawn, start.reply, start.stops, start.unknown],
        sizes,
    )
    return Generation(
        name=name,
        folder=checkpoint.folder,
        cls=architecture.cls,
        config=source.config,
        start=start,
        longest=longest,
        batch_size=settings.batch_size,
        entry=cache.cache_root(config.cache_dir) / "generated" / key,
        # Unlike the key it does not depend on when the files were written here.
        seed=cache.digest(cache.weights_fingerprint(checkpoint.folder, list(checkpoint.files.values())), sizes),
        num_weights=sum(architecture.blocks.values()) + architecture.vocabulary * architecture.hidden_size,
        kept=2 * (len(architecture.blocks) - 1) * architecture.hidden_size * heads // all_heads,
        runtime=reading.runtime,
    )


def _stops(model: ModelReference, reading: Reading) -> list[int]:
    """The tokens that end a text by the settings that come with a model."""
    path = model.model
    try:
        settings = transformers.GenerationConfig.from_pretrained(
            path.path, revision=path.revision, cache_dir=reading.transformers_cache
        )
    except (OSError, ValueError):  # there are none
        return []
    stops = settings.eos_token_id
    return [] if stops is None else stops if isinstance(stops, list) else [stops]
