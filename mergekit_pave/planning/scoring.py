"""What merges are scored with: held-out rows of each expert's data, and the model that counts as 0 %."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import transformers
from mergekit.common import ModelReference

from mergekit_pave import cache
from mergekit_pave.calibration.architecture import Architecture
from mergekit_pave.calibration.batches import Encoded, encode
from mergekit_pave.calibration.forms import Places, form_of
from mergekit_pave.calibration.held_out import rows_of
from mergekit_pave.calibration.job import seen
from mergekit_pave.calibration.models import inference_dtype
from mergekit_pave.calibration.recorded import DRAWN, KEPT
from mergekit_pave.calibration.subjects import Stored
from mergekit_pave.config import PaveConfig
from mergekit_pave.emr.file import tasks_of
from mergekit_pave.emr.restore import open_task
from mergekit_pave.emr.subject import RestoredWeights
from mergekit_pave.emr.weights import Search, Weights
from mergekit_pave.errors import PaveError
from mergekit_pave.planning.merge import Reading
from mergekit_pave.planning.samples import as_reported, read_held_out, read_samples
from mergekit_pave.planning.source import Source, open_model, open_sources, weights_identity
from mergekit_pave.planning.tokenizers import check_token_ids, find_conflict, load_tokenizer, token_ids
from mergekit_pave.report.stored import read_report
from mergekit_pave.tasks.scoring import Expert, Model, Scoring

LOG = logging.getLogger(__name__)

FEWEST = 8  # rows that a score may be made of, unless fewer are asked for
_CENTRED = 3  # features are centred over the rows, so of fewer rows nothing is left
_TOKENIZER_FILES = ("tokenizer", "vocab", "spiece", "sentencepiece")


def plan_scoring(config: PaveConfig, base: ModelReference, reading: Reading, rows: int) -> Scoring:
    """
    Args:
        base: the model that counts as 0 %.
        rows: how many held-out rows a model is to have.

    Raises:
        PaveError: a model has no data or too few rows, or the models cannot be compared.
    """
    entries = [entry for entry in config.models if entry.model != base]
    for entry in entries:
        if not entry.data:
            raise PaveError(
                f"pave.models[{entry.model}]: a score needs `data`, of which rows are held out. Give it some in a `pave:` block, "
                "which with `purify: false` changes nothing of the merge"
            )
    if not entries:
        raise PaveError(f"pave.models: no model but {base}, which counts as 0 %; name another one with --base")
    with_data = [entry.model for entry in config.models if entry.data]  # also the base model, which may be merged itself
    every = open_sources(config, with_data, reading)
    sources = [every[entry.model] for entry in entries]
    used: set[int] = set()
    for source in sorted(every.values(), key=lambda source: source.entry.is_generated):  # see `make._writes`
        used |= {sample.content for sample in read_samples(config, source, reading).samples if sample.problem is None}
    opened = open_model(base, reading)
    # Each row is held out for one expert only, or the errors of experts with the same data would not be independent.
    experts = [_expert(config, source, reading, rows, used, (base, opened[2])) for source in sources]
    forms = {expert.rows.form.is_language_model: expert.name for expert in experts}
    if len(forms) > 1:
        raise PaveError(f"pave.models: {forms[True]} is a language model, and {forms[False]} is not; score them one by one")
    checkpoint, base_config, architecture = opened
    if experts[0].rows.form.is_language_model:
        _check_class(str(base), architecture.cls, experts)
    model = Model(str(base), architecture.cls, base_config, Stored(checkpoint.folder), weights_identity(checkpoint))
    return Scoring(model, experts, cache.cache_root(config.cache_dir), reading.runtime)


def _expert(
    config: PaveConfig,
    source: Source,
    reading: Reading,
    rows: int,
    used: set[int],
    base: tuple[ModelReference, Architecture],
) -> Expert:
    """
    Args:
        used: contents that are passed over. Those of this expert's rows are added.
    """
    name, settings, architecture = str(source.model), config.calibration_of(source.model), source.architecture
    samples, processor = read_held_out(config, source, reading, rows, used)
    used |= {sample.content for sample in samples}
    form = form_of(architecture, source.config)
    fewest = min(rows, FEWEST) if form.places is not Places.NOWHERE else max(_CENTRED, min(rows, FEWEST))
    encoded: list[Encoded] = []
    if samples:
        seen_whole = settings.model_copy(update={"max_tokens": None})
        encoded = encode(samples, processor, seen_whole, architecture.positions, source.data_key, architecture.shift)
    if len(encoded) < fewest and source.entry.is_generated:
        raise PaveError(
            f"{source.data_key}: of {2 * rows} further texts that the model wrote {len(encoded)} are new, and a score needs "
            f"{fewest}; raise calibration.max_length, or name a data set"
        )
    if len(encoded) < fewest:
        calibrated = len(read_samples(config, source, reading).samples)
        at_most = min(settings.samples, calibrated) + len(encoded) - max(rows, fewest)
        advice = f"set calibration.samples to {at_most} at most and merge again, as merges that are there have seen these rows"
        raise PaveError(
            f"{source.data_key}: {len(encoded)} rows with new content are left beside those for calibration, and a score "
            f"needs {fewest}. Add rows{f'; or {advice}' if at_most > 0 else ''}"
        )
    if form.places is Places.NOWHERE and architecture.heads:
        LOG.info("%s: the scores of its head are no probabilities of classes, so it is compared by its features", name)
    if len(encoded) < rows:
        LOG.warning("%s: only %d held-out rows, not %d", name, len(encoded), rows)
    tokenizer = getattr(processor, "tokenizer", processor)
    check_token_ids(source, encoded)
    _check_ids(name, encoded, base[1], tokenizer, base[0], reading)
    lengths = [_bytes_of(sample, tokenizer) if form.is_generative else 0 for sample in encoded]
    dtype = str(inference_dtype(source.config, reading.runtime.device))
    key = cache.key("predictions", source.identity, architecture.computation, dtype, KEPT, DRAWN, form.labels, *seen(encoded))
    return Expert(
        name=name,
        folder=source.checkpoint.folder,
        config=source.config,
        architecture=architecture,
        tokenizer=tokenizer,
        rows=rows_of(
            encoded,
            lengths,
            settings.batch_size,
            form,
            special=frozenset(tokenizer.all_special_ids) if form.is_generative else frozenset(),
            padding=getattr(source.config.get_text_config(), "pad_token_id", None),
        ),
        key=key,
        drawn={
            "data": [{"generated": True}] if source.entry.is_generated else as_reported(source.entry.sources),
            "samples": settings.samples,
            "seed": settings.seed,
        },
    )


def _bytes_of(sample: Encoded, tokenizer: Any) -> int:
    """The length of the text that follows the first token."""
    ids = sample.inputs.get("decoder_input_ids", sample.inputs["input_ids"])[1:]
    return len(tokenizer.decode(ids, skip_special_tokens=True).encode())


def _check_ids(
    name: str, encoded: list[Encoded], architecture: Architecture, tokenizer: Any, model: ModelReference, reading: Reading
) -> None:
    """Refuse token ids that another model does not know, or that mean something else there.

    Args:
        name: of the model whose rows these are.
        tokenizer: of that model.
        model: the other model, whose architecture it is.
    """
    ids = token_ids(encoded)
    if not ids:
        return
    advice = "score with `text` that both know alike, or with another --base"
    if architecture.vocabulary and max(ids) >= architecture.vocabulary:
        raise PaveError(
            f"pave.models[{name}].data: its rows have the token id {max(ids)}, but {model} knows only {architecture.vocabulary} "
            f"tokens; {advice}"
        )
    theirs = _tokenizer_of(model, reading)
    if theirs is None:  # then it is shown the ids that it knows
        return
    if conflict := find_conflict(ids, tokenizer, theirs):
        raise PaveError(
            f"pave.models[{name}].data: the token id {conflict.token} is {conflict.ours!r} there, but {conflict.theirs!r} for "
            f"{model}; {advice}"
        )


def open_merged(scoring: Scoring, folder: Path, reading: Reading) -> Model:
    """A finished merge.

    Raises:
        PaveError: it is none, or none of models like these.
    """
    reference = ModelReference.parse(str(folder))
    checkpoint, config, architecture = open_model(reference, reading)
    _check_unseen(folder, scoring.experts)
    if task_files := tasks_of(folder):
        prints = [cache.weights_fingerprint(str(task.path.parent), [task.path.name]) for task in task_files]
        identity = cache.digest("emr", weights_identity(checkpoint), *prints)
        # The base that scores count from is the merge's, but where another one is named.
        of_base = Weights(Path(scoring.base.weights.folder), scoring.base.name)
        same = all(task.base_weights == of_base.fingerprint for task in task_files)
        search = Search(of_base.checkpoint.folder if same else None, reading.transformers_cache)
        restored = {expert.name: _restored(folder, expert, search) for expert in scoring.experts}
        return Model(str(folder), architecture.cls, config, Stored(checkpoint.folder), identity, restored)
    first = scoring.experts[0]
    if first.rows.form.is_language_model:
        _check_class(str(folder), architecture.cls, scoring.experts)
    for expert in scoring.experts:
        _check_ids(expert.name, expert.rows.encoded, architecture, expert.tokenizer, reference, reading)
    return Model(str(folder), architecture.cls, config, Stored(checkpoint.folder), weights_identity(checkpoint))


def _restored(folder: Path, expert: Expert, search: Search) -> Model:
    """What an expert's model is restored to from a merge by `emr`."""
    found = open_task(folder, expert.name, search)
    config = type(expert.config).from_dict(found.config)
    return Model(f"{found.task.name} of {folder}", expert.architecture.cls, config, RestoredWeights(found), "")


def _check_unseen(folder: Path, experts: list[Expert]) -> None:
    """Refuse a merge that was measured on rows that it is to be scored with: its report says how they were drawn."""
    try:
        models = read_report(str(folder))["models"]
    except PaveError:  # it was merged without a block, or elsewhere
        return
    for expert in experts:
        source = models.get(expert.name) or {}
        then, now = source.get("calibration") or {}, expert.drawn
        same_data = [data.get("path") for data in source.get("data", ())] == [data.get("path") for data in now["data"]]
        if not then or not same_data:
            continue
        other_seed = then["seed"] != now["seed"]
        if other_seed and "generated" in now["data"][0]:  # the texts of another seed are other texts
            continue
        if other_seed or then["samples"] > now["samples"]:
            raise PaveError(
                f"{folder} was merged with {then['samples']} calibration samples of {expert.name}, drawn with the seed "
                f"{then['seed']}, and the config says {now['samples']} and {now['seed']}: rows that it was measured on would be "
                f"scored. Score with the config that it was made with ({folder}/mergekit_config.yml)"
            )


def _tokenizer_of(model: ModelReference, reading: Reading) -> Any:
    """A model's tokenizer, or None. Of a folder that has none transformers would make one that knows no token."""
    folder = Path(model.model.path)
    if folder.is_dir() and not any(file.name.startswith(_TOKENIZER_FILES) for file in folder.iterdir()):
        return None
    try:
        return load_tokenizer(model, reading, "scoring compares tokens")
    except PaveError:
        return None


def _check_class(name: str, cls: type[transformers.PreTrainedModel], experts: list[Expert]) -> None:
    for expert in experts:
        if cls is not expert.architecture.cls:
            raise PaveError(
                f"{name} is a {cls.__name__}, but {expert.name} a {expert.architecture.cls.__name__}: they cannot be compared"
            )
