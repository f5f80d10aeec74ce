"""The samples of one model: those of its data sets, or those that it writes itself."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import re
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from mergekit.common import ModelReference

from mergekit_pave import cache, versions
from mergekit_pave.calibration.batches import encode, longest_sample
from mergekit_pave.calibration.counts import count_tokens
from mergekit_pave.calibration.data import Sample, draw_samples, load_held_out
from mergekit_pave.calibration.drawing import RULES, default_tokens
from mergekit_pave.calibration.generation import Generation
from mergekit_pave.calibration.models import inference_dtype
from mergekit_pave.calibration.remembered import Remembered, recall, remember
from mergekit_pave.calibration.starts import find_start
from mergekit_pave.config import PaveConfig
from mergekit_pave.errors import PaveError
from mergekit_pave.planning.merge import Reading
from mergekit_pave.planning.source import Source
from mergekit_pave.planning.tokenizers import load_processor
from mergekit_pave.settings import Calibration, Data

LOG = logging.getLogger(__name__)

_kept: dict[tuple[str, ...], tuple[list[Sample], int | None]] | None = None  # see `each_read_once`


@dataclass(frozen=True)
class Samples:
    """What a model is calibrated with.

    Attributes:
        samples: if they are to be written, as many as there will be, each as long as it can get.
        processor: makes model inputs of them.
        about: the data sets, as a report shows them.
        to_write: how the model is to write them; None where they are there.
        left: how many further rows the data sets have; None where that is not known.
    """

    samples: list[Sample]
    processor: Any
    about: list[dict[str, Any]]
    to_write: Generation | None = None
    left: int | None = None


@contextlib.contextmanager
def each_read_once() -> Iterator[None]:
    """While the block runs, samples that are read once are not read again: many plans of one config need the same."""
    global _kept
    _kept = {}
    try:
        yield
    finally:
        _kept = None


def _draw(sources: list[Data], settings: Calibration, data_key: str) -> tuple[list[Sample], int | None]:
    if _kept is None:
        return draw_samples(sources, settings, data_key)
    key = (data_key, *(block.model_dump_json() for block in (*sources, settings)))
    if key not in _kept:
        _kept[key] = draw_samples(sources, settings, data_key)
    samples, left = _kept[key]
    return list(samples), left


def read_samples(config: PaveConfig, source: Source, reading: Reading) -> Samples:
    """The samples that a model is calibrated with. What it has to write itself it writes now, if the command allows that.

    Raises:
        PaveError: they cannot be read or written.
    """
    settings = config.calibration_of(source.model)
    if not source.entry.is_generated:
        samples, left = _draw(source.entry.sources, settings, source.data_key)
        return Samples(samples, load_processor(source, samples, reading), as_reported(source.entry.sources), left=left)
    tokenizer = load_processor(source, [], reading)
    generation = _generation(config, source, tokenizer, reading)
    about = [{"generated": generation.start.kind}]
    if not reading.generates and generation.missing(0, settings.samples):
        token = (generation.start.tokens or generation.start.drawn)[0]
        longest = Sample("a text that is still to be written", tokens=[token] * generation.longest)
        return Samples([longest] * settings.samples, tokenizer, about, generation)
    return Samples(generation.samples(0, settings.samples), tokenizer, about)


@dataclass(frozen=True)
class Tokenised:
    """What a model is calibrated with, as it takes it.

    Attributes:
        what: the samples.
        about, to_write: see `Samples`.
        processor: what makes model inputs of samples; None where it has not been loaded.
        remember: has the cache remember the samples; None where it does already, or cannot.
    """

    what: Remembered
    about: list[dict[str, Any]]
    to_write: Generation | None = None
    processor: Any = None
    remember: Callable[[], None] | None = None


def settings_of(config: PaveConfig, source: Source) -> Calibration:
    """How a model's samples are read, with every setting."""
    settings = config.calibration_of(source.model)
    if settings.max_tokens is None:
        settings = settings.model_copy(update={"max_tokens": default_tokens(source.architecture)})
    return settings


def tokenised_samples(config: PaveConfig, source: Source, reading: Reading) -> Tokenised:
    """The samples that a model is calibrated with, from the cache if it remembers them.

    Raises:
        PaveError: they cannot be read or written, or do not fit the model.
    """
    key = _memory_key(config, source, reading)
    artefact = cache.Artefact(cache.cache_root(config.cache_dir) / "samples" / key) if key else None
    if artefact and (what := recall(artefact)):
        if what.skipped:
            LOG.warning(what.skipped)
        return Tokenised(what, as_reported(source.entry.sources))
    read, skipped = read_samples(config, source, reading), []
    settings, architecture = settings_of(config, source), source.architecture
    positions, shift, where = architecture.positions, architecture.shift, source.data_key
    encoded = encode(read.samples, read.processor, settings, positions, where, shift, tell=skipped.append)
    for warning in skipped:
        LOG.warning(warning)
    what = Remembered(
        encoded=encoded,
        counts=count_tokens(encoded, getattr(read.processor, "tokenizer", read.processor)),
        contents=frozenset(sample.content for sample in read.samples if sample.problem is None and not read.to_write),
        skipped="".join(skipped),
        left=read.left,
    )

    def keep() -> None:
        try:
            remember(artefact, str(source.model), what)
        except PaveError as error:  # a read-only cache is good for everything else
            LOG.info("the samples of %s are not remembered: %s", source.model, error)

    is_same = artefact is not None and _memory_key(config, source, reading) == key  # a file may have changed meanwhile
    return Tokenised(what, read.about, read.to_write, read.processor, keep if is_same else None)


def _memory_key(config: PaveConfig, source: Source, reading: Reading) -> str | None:
    """Key of everything that determines the samples of a model; None where nobody can tell whether that has changed.

    That is so of data sets from elsewhere without a commit, of folders that may name files elsewhere, and of code that comes
    with a model.
    """
    model, sources = source.model, source.entry.sources
    if source.entry.is_generated or reading.runtime.trust_remote_code:
        return None
    here: list[Path] = []
    for data in sources:
        path = Path(data.path).expanduser()
        if data.data_files is not None or "://" in data.path:
            return None
        if path.exists():
            if path.is_dir() and any(inner.suffix in (".md", ".yaml", ".py") for inner in path.iterdir()):
                return None
            here.append(path)
        elif not re.fullmatch("[0-9a-f]{40}", data.revision or ""):
            return None
    # An adapter may bring a tokenizer of its own.
    folders = [Path(part.path) for part in (model.lora, model.model)] if model.lora else [Path(source.checkpoint.folder)]
    if not all(folder.is_dir() for folder in folders) or not (files := cache.files_identity([*here, *folders])):
        return None
    return cache.key(
        "samples",
        files,
        source.identity,  # and with it config.json
        source.architecture.computation,
        source.data_key,
        RULES,
        [block.model_dump(mode="json") for block in (*sources, settings_of(config, source))],
        versions.installed() | {package: importlib.metadata.version(package) for package in ("tokenizers", "jinja2")},
    )


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
        seed=cache.digest(source.fingerprint, sizes),
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
