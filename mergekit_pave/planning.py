"""Which tensors of a planned merge are purified, and the tasks that do it.

Works on what mergekit has planned (`PlannedTensor`) and returns what has to take the place of its inputs. Reads
configurations, tokenizers, samples and the headers of weights, but no weights, so that every mistake in the `pave:` block
shows before any work.
"""

from __future__ import annotations

import collections
import functools
import itertools
import json
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Optional

import huggingface_hub
import transformers
from mergekit.common import ModelReference
from mergekit.config import evaluate_setting
from mergekit.io.tasks import GatherTensors
from torch import Tensor

from mergekit_pave import cache, versions
from mergekit_pave.allocation import fair_share, most_dropped
from mergekit_pave.calibration.batches import encode
from mergekit_pave.calibration.data import Sample, load_samples
from mergekit_pave.calibration.layers import Architecture, Linear, describe, inference_dtype
from mergekit_pave.calibration.run import Job, Runtime, covariance_key
from mergekit_pave.checkpoint import Checkpoint
from mergekit_pave.checks import check_complete, check_sizes, check_unquantised
from mergekit_pave.comparison import Comparison
from mergekit_pave.config import Data, PaveConfig, PaveModel, RelativeRegularization, looks_local
from mergekit_pave.errors import PaveError, in_a_line
from mergekit_pave.files import readable
from mergekit_pave.report import FORMAT, NEVER_CALLED, UNCHANGED
from mergekit_pave.tasks import (
    AllocateRanks,
    CalibrateModel,
    DecomposeWeight,
    GatherPurified,
    GivenCovariance,
    LoadTail,
    Measured,
    PurificationStats,
    PurifyTensor,
    has_tail,
    load_stored,
)

LOG = logging.getLogger(__name__)

_NOT_LINEAR = "not the weight of a linear layer"
# Merge methods whose base model is one of two fine-tunes, as good as the other.
_BETWEEN_TWO = {"slerp", "nearswap", "arcee_fusion"}


@dataclass(frozen=True)
class PlannedTensor:
    """One output tensor as mergekit has planned it.

    Attributes:
        name: its name in the output.
        gather: the task that gathers its inputs, or None where mergekit does more than gather (vocabularies).
        models: the models in the order of the config.
        base: the base model of this tensor.
        t: its place in its slice, for gradients.
        data_share: how much of regmean's metric is to be C, if that is the merge method.
    """

    name: str
    gather: Optional[GatherTensors]
    models: tuple[ModelReference, ...]
    base: Optional[ModelReference]
    t: float
    data_share: Optional[float] = None


@dataclass(frozen=True)
class Environment:
    """What a run has to offer: options of the command, and checkpoints.

    Attributes:
        reads: the tensors that a merge of whole models would read of one, each with all names that it may have.
        compares: weights may be read, to find those that equal the base model's.
        merge_method: the name of the method.
    """

    runtime: Runtime
    transformers_cache: Optional[str]
    checkpoint: Callable[[ModelReference], Checkpoint]
    reads: Callable[[ModelReference], list[list[str]]]
    compares: bool
    merge_method: str


@dataclass(frozen=True)
class PlannedWeight:
    """One weight of one model that is to be purified.

    Attributes:
        output: the name of the tensor that it is merged into.
        drop: components that each of its matrices would lose on its own; allocation moves them between models.
        cached: its decomposition is in the cache.
        covariances: the folder of the model's covariances, where they are in the cache.
        regularization: λ.
    """

    model: ModelReference
    tensor: str
    output: str
    layer: Linear
    drop: int
    cached: bool
    covariances: str
    regularization: float | RelativeRegularization


@dataclass
class Plan:
    """What purification adds to a merge.

    Attributes:
        weights: what is to be purified.
        gathers: the new gather task by the output tensor's place in the list of planned tensors.
        calibrations: the tasks that fill the cache of covariances, one a model that something is to be decomposed of.
        decompositions: the tasks that fill the cache of subspaces.
        stats: the tasks that make the rows of the report.
        header: the report without its rows.
        closed_forms: what regmean merges in closed form, by place.
        warnings: what should make a user look twice before any work is done.
        compared: it is known which weights equal the base model's; otherwise only what the cache says of it.
    """

    compared: bool
    weights: list[PlannedWeight] = field(default_factory=list)
    gathers: dict[int, GatherPurified] = field(default_factory=dict)
    calibrations: list[CalibrateModel | GivenCovariance] = field(default_factory=list)
    decompositions: list[DecomposeWeight] = field(default_factory=list)
    stats: list[PurificationStats] = field(default_factory=list)
    header: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    closed_forms: dict[int, ClosedForm] = field(default_factory=dict)

    @property
    def decomposed(self) -> int:
        """How many different weights are decomposed, now or before; in a frankenmerge one may go to several places."""
        return len({(weight.model, weight.tensor) for weight in self.weights})

    @property
    def to_calibrate(self) -> list[CalibrateModel]:
        """The calibrations that the cache lacks."""
        return [task for task in self.calibrations if isinstance(task, CalibrateModel) and not task.is_done]


@dataclass(frozen=True)
class ClosedForm:
    """How regmean merges one weight of a linear layer: see `MergeByRegMean`."""

    layer: Linear
    measured: tuple[Measured, ...]


@dataclass(frozen=True)
class _Choice:
    """One weight of one model that is purified: its layer, the components it would drop on its own, and the experts that stay as
    they are, for they equal the base model's."""

    model: ModelReference
    tensor: str
    linear: Linear
    share: int
    unchanged: tuple[int, ...] = ()


def make_plan(config: PaveConfig, tensors: list[PlannedTensor], environment: Environment) -> Plan:
    """Plan the purification of a merge.

    Raises:
        PaveError: anything in the block that does not fit the models or the data.
    """
    models = {model: None for planned in tensors for model in planned.models if config.entry(model)}
    regmean = any(planned.data_share is not None for planned in tensors)
    if missed := [entry.model for entry in config.models if entry.purify and entry.model not in models]:
        raise PaveError(f"pave.models: mergekit takes no tensor of {missed[0]}, so it cannot be purified; remove its entry")
    if not models and not regmean:
        raise PaveError("pave.models: every model has `purify: false`, so nothing would be purified; remove the block instead")
    sources = {model: _Source(config, model, environment) for model in dict.fromkeys([*models, *_with_data(config, tensors)])}
    if sources:
        any_source, *_ = sources.values()
        inputs = dict.fromkeys(model for planned in tensors for model in (*planned.models, planned.base) if model)
        check_sizes(tensors, environment.checkpoint)
        check_complete(
            {model: environment.checkpoint(model).files for model in inputs},
            environment.reads,
            lambda model, name: sources.get(model, any_source).architecture.loaded_as(name),
        )
    chosen, reasons = _select(config, tensors, {model: sources[model] for model in models})
    purified = {choice.model for choices in chosen.values() for choice in choices}
    idle = [model for model in models if model not in purified]
    if idle and not regmean:
        told = "; ".join(f"{count} {reason}" for reason, count in collections.Counter(reasons[idle[0]].values()).items())
        raise PaveError(
            f"pave: no tensor of {idle[0]} would be purified ({told}). Widen rank_ratio, include or exclude, "
            "or give the model `purify: false`"
        )
    layers, left = _closed_form_layers(tensors, sources, environment)
    needed = _needed(tensors, layers, sources)
    for model, source in list(sources.items()):
        own = [choice.linear for choices in chosen.values() for choice in choices if choice.model == model]
        wanted = [*own, *needed.get(model, {}).values()]
        if not wanted:  # nothing of it is purified, and no covariance of it is asked for
            del sources[model]
            continue
        source.prepare(tuple(dict.fromkeys(wanted)))
    compared = _leave_unchanged(chosen, tensors, sources, reasons, environment)
    for model, source in sources.items():
        own = [choice.linear for choices in chosen.values() for choice in choices if choice.model == model]
        source.settle((*own, *needed.get(model, {}).values()), own)
        _leave_never_called(model, source.calibration, chosen, reasons.setdefault(model, {}))

    plan = Plan(compared=compared, warnings=[*_warnings(sources), *_base_is_merged(tensors, purified, environment)])
    for place, choices in chosen.items():
        if choices:
            _add_tensor(plan, config, tensors[place], place, choices, sources)
    plan.decompositions = _each_once(plan.decompositions)
    plan.calibrations = [decomposition.calibration for decomposition in plan.decompositions]
    plan.calibrations += [sources[model].calibration for model in needed]
    plan.calibrations = list(dict.fromkeys(plan.calibrations))
    for place, layer in layers.items():
        measured = (
            Measured(model, of[place], sources[model].calibration, config.least_tokens(model, of[place].experts))
            for model, of in needed.items()
            if place in of
        )
        plan.closed_forms[place] = ClosedForm(layer, tuple(measured))
    plan.header = _header(config, tensors, sources, reasons) | {"warnings": plan.warnings}
    if regmean:
        plan.header["regmean"] = {"as_task_arithmetic": left}
    return plan


def _each_once(decompositions: list[DecomposeWeight]) -> list[DecomposeWeight]:
    """Of a weight that goes to several places, as in a frankenmerge, the decomposition that has enough for all of them."""
    largest: dict[str, DecomposeWeight] = {}
    for task in decompositions:
        if task.folder not in largest or largest[task.folder].count < task.count:
            largest[task.folder] = task
    return list(largest.values())


def plan_without_data(tensors: list[PlannedTensor], environment: Environment) -> dict[int, ClosedForm]:
    """What regmean merges in closed form where there is no `pave:` block.

    Raises:
        PaveError: it needs covariances.
    """
    layers, left = _closed_form_layers(tensors, {}, environment)
    _needed(tensors, layers, {})
    LOG.info("regmean: %d tensors are merged in closed form, %d as task_arithmetic does", len(layers), len(left))
    return {place: ClosedForm(layer, ()) for place, layer in layers.items()}


def _with_data(config: PaveConfig, tensors: list[PlannedTensor]) -> list[ModelReference]:
    """The models whose covariances regmean may need, whether they are purified or not."""
    merged = (model for planned in tensors if planned.data_share for model in planned.models if model != planned.base)
    entries = ((model, config.listed(model)) for model in dict.fromkeys(merged))
    return [model for model, entry in entries if entry and (entry.data or entry.covariance)]


def _closed_form_layers(
    tensors: list[PlannedTensor], sources: dict[ModelReference, _Source], environment: Environment
) -> tuple[dict[int, Linear], dict[str, str]]:
    """The layers whose weights regmean merges in closed form, by place, and why it does not merge the other tensors so."""
    layers, left = {}, {}
    known = {model: source.architecture for model, source in sources.items()}
    for place, planned in enumerate(tensors):
        if planned.data_share is None:
            continue
        model = next(model for model in planned.models if model != planned.base)
        if model not in known:
            trust = environment.runtime.trust_remote_code
            known[model] = describe(model.config(trust_remote_code=trust), model.model.path, trust, model.model.revision)
        layer, reason = _linear(known[model], planned.gather.weight_info[model] if planned.gather else None)
        if layer:
            layers[place] = layer
        else:
            left[planned.name] = reason
    return layers, left


def _needed(
    tensors: list[PlannedTensor], layers: dict[int, Linear], sources: dict[ModelReference, _Source]
) -> dict[ModelReference, dict[int, Linear]]:
    """The layers of each model whose covariances are part of regmean's metric, by place.

    Raises:
        PaveError: nothing says what to measure a model with.
    """
    needed: dict[ModelReference, dict[int, Linear]] = {}
    for place in layers:
        planned = tensors[place]
        for model in planned.models if planned.data_share else ():
            if model == planned.base:
                continue
            if model not in sources:
                raise PaveError(
                    f"regmean: {planned.name} is merged with `covariance: {planned.data_share:g}`, so what its layer sees in "
                    f"{model} has to be measured. Add a `pave:` block with `data` (or a `covariance`) for it, and beside that "
                    "`purify: false` if it shall not be purified; or set `covariance: 0` under parameters, which needs no data"
                )
            linear, _ = _linear(sources[model].architecture, planned.gather.weight_info[model])
            if linear is None or linear.stored_shape != layers[place].stored_shape:
                raise PaveError(f"regmean: {planned.name} is not the weight of the same linear layer in {model} as in the others")
            needed.setdefault(model, {})[place] = linear
    return needed


def _warnings(sources: dict[ModelReference, _Source]) -> list[str]:
    """What the samples alone give away: that they are few, or the same for two models."""
    found = []
    for model, source in sources.items():
        widest = max((linear.shape[1] for linear in source.calibration.wanted), default=0)
        if source.tokens < widest:
            found.append(
                f"{model}: {source.tokens} calibration tokens for layers that are up to {widest} wide; directions that no token "
                f"shows are told apart by the weights alone. Several times {widest} tokens make the result steadier: raise "
                "calibration.samples or max_tokens"
            )
        for dtype, folder in source.elsewhere.items():
            found.append(
                f"{model}: it will be measured in {source.dtype}, though with these samples it has been in {dtype}, on another "
                f"kind of device. To use that, merge with the options of that run, or give the model `covariance: {folder}` "
                "instead of data"
            )
    for (model, source), (other, beside) in itertools.combinations(sources.items(), 2):
        shared, smaller = len(source.contents & beside.contents), min(len(source.contents), len(beside.contents))
        if 2 * shared > smaller:
            found.append(
                f"{model} and {other}: {shared} of {smaller} calibration samples are the same, so what one model's task needs "
                "cannot be told from what the other's does; give each model samples of its own task"
            )
    return found


def _base_is_merged(tensors: list[PlannedTensor], purified: set[ModelReference], environment: Environment) -> list[str]:
    """What purification and its figures mean where the base model is one of two fine-tunes that are merged."""
    if environment.merge_method not in _BETWEEN_TWO or not purified:
        return []
    bases = dict.fromkeys(str(planned.base) for planned in tensors if planned.base)
    return [
        f"{environment.merge_method} merges {' and '.join(bases)}, which the config names as the base model, as one of two ends. "
        "It is merged as it is, and what is called the change of the other model is its distance from it, not from the model "
        "that both come from"
    ]


def _leave_unchanged(
    chosen: dict[int, list[_Choice]],
    tensors: list[PlannedTensor],
    sources: dict[ModelReference, _Source],
    reasons: dict[ModelReference, dict[str, str]],
    environment: Environment,
) -> bool:
    """Take out what equals the base model's. Returns whether all of it is known."""
    pairs: dict[tuple[ModelReference, ModelReference], dict[str, Callable]] = {}
    bases: dict[int, ModelReference] = {
        place: tensors[place].base for place in chosen if tensors[place].base in tensors[place].gather.weight_info
    }
    for place, base in bases.items():
        gather = tensors[place].gather
        for choice in chosen[place]:
            read = functools.partial(_read_both, gather, choice.model, base)
            pairs.setdefault((choice.model, base), {})[_pair_name(choice, gather, base)] = read
    comparisons, identities = {}, {}
    for (model, base), of_models in pairs.items():
        if base not in identities:
            checkpoint = environment.checkpoint(base)
            identities[base] = cache.weights_identity(checkpoint.folder, list(checkpoint.files.values()))
        comparison = sources[model].comparison(identities[base], str(base))
        if environment.compares:
            files = [*environment.checkpoint(model).files.values(), *checkpoint.files.values()]
            keep_all = not all(file.endswith(".safetensors") for file in files)
            comparison.compare(of_models, environment.runtime.quiet, keep_all)
        comparisons[model, base] = comparison
    for place, base in bases.items():
        for choice in list(chosen[place]):
            equal = comparisons[choice.model, base].known(_pair_name(choice, tensors[place].gather, base))
            if len(equal) == len(choice.linear.layers):
                chosen[place].remove(choice)
                reasons[choice.model][choice.tensor] = UNCHANGED
            elif equal:
                experts = tuple(choice.linear.experts[i] for i in equal)
                chosen[place][chosen[place].index(choice)] = replace(choice, unchanged=experts)
    return environment.compares or not pairs


def _read_both(gather: GatherTensors, *models: ModelReference) -> list[Optional[Tensor]]:
    tasks = [load_stored(gather, model).model_copy(update={"device": None}) for model in models]
    return [task.execute() for task in tasks]


def _pair_name(choice: _Choice, gather: GatherTensors, base: ModelReference) -> str:
    """In a frankenmerge a weight may be merged with that of another layer of the base model."""
    other = gather.weight_info[base].name
    return choice.tensor if other == choice.tensor else f"{choice.tensor} / {other}"


def _leave_never_called(
    model: ModelReference,
    calibration: CalibrateModel | GivenCovariance,
    chosen: dict[int, list[_Choice]],
    reasons: dict[str, str],
) -> None:
    """What calibration does not reach is known beforehand where the covariances are in the cache."""
    if calibration.is_done:
        missed = set(calibration.never_called())
        for choices in chosen.values():
            for choice in [choice for choice in choices if choice.model == model and choice.linear in missed]:
                choices.remove(choice)
                reasons[choice.tensor] = NEVER_CALLED


def announce(plan: Plan) -> None:
    """Say what the samples give away, what is in the cache, and what the calibrations that are still to be done will cost.

    Raises:
        PaveError: the disk has no room for that.
    """
    for warning in plan.warnings:
        LOG.warning(warning)
    if plan.stats:
        LOG.info("PAVE: %d of %d weights are in the cache", plan.decomposed - len(plan.decompositions), plan.decomposed)
    for task in plan.to_calibrate:
        cost = task.job.estimate(task.runtime.device)
        LOG.info(
            "%s: to be calibrated with %d tokens in %s; takes at most %s of cache and about %s of memory",
            task.job.name,
            task.job.about["tokens"],
            task.job.about["dtype"],
            readable(cost.cache),
            readable(cost.peak),
        )
    size = sum(task.job.estimate(task.runtime.device).cache for task in plan.to_calibrate)
    if size := size + sum(task.cache for task in plan.decompositions):
        folders = [task.folder for task in (*plan.to_calibrate, *plan.decompositions)]
        cache.require_space(Path(folders[0]), size)


class _Source:
    """One model that is to be purified: its architecture, its samples and the keys of its artefacts."""

    def __init__(self, config: PaveConfig, model: ModelReference, environment: Environment):
        self._pave = config
        self._environment = environment
        self.model = model
        self.entry = config.listed(model)
        self.elsewhere: dict[str, Path] = {}
        checkpoint = environment.checkpoint(model)
        self.folder, self._shards = checkpoint.folder, list(checkpoint.files.values())
        trust = environment.runtime.trust_remote_code
        self._config = model.config(trust_remote_code=trust)
        parts = (self._config, self._config.get_text_config(decoder=True))
        # With it transformers would quantise the model as it loads it.
        quantised = [part for part in parts if part.__dict__.pop("quantization_config", None)]
        self.architecture: Architecture = describe(self._config, model.model.path, trust, model.model.revision)
        if quantised:
            check_unquantised(model, checkpoint, self.architecture)
        for data in self.entry.sources if self.entry.data else ():
            if data.image is not None and "pixel_values" not in self.architecture.inputs:
                raise PaveError(f"pave.models[{model}].data.image: the model takes no images")
            if data.image is not None and data.text is None and "input_ids" in self.architecture.inputs:
                raise PaveError(f"pave.models[{model}].data.text: missing. The model reads an image together with a text")
            if self.architecture.shift is None and data.target is not None:
                raise PaveError(f"pave.models[{model}].data.target: only an encoder-decoder model takes one; put it into `text`")
            if self.architecture.shift is not None and data.target is None:
                raise PaveError(
                    f"pave.models[{model}].data.target: missing. The model is an encoder-decoder model, whose decoder has to "
                    "be shown what it shall answer; name its column, or give a template over columns"
                )

    def prepare(self, layers: tuple[Linear, ...]) -> None:
        """Read and tokenise the samples, which checks all of the `data` entry, and name the artefacts.

        Args:
            layers: those whose covariances may be needed.
        """
        self._root = cache.cache_root(self._pave.cache_dir)
        key = self._use_given(layers) if self.entry.covariance else self._use_data()
        regularization = self._pave.setting(self.model, "regularization")
        described = regularization.model_dump() if isinstance(regularization, RelativeRegularization) else regularization
        self._tails = self._root / "subspace" / cache.key("subspace", key, described)

    def settle(self, layers: Iterable[Linear], purified: Iterable[Linear]) -> None:
        """Name the task that sees to the covariances.

        Args:
            layers: those whose covariances are needed.
            purified: those among them that are to be purified.
        """
        self.calibration = self._calibrate(
            model=str(self.model),
            wanted=tuple(dict.fromkeys(layers)),
            purified=tuple(dict.fromkeys(purified)),
            size=sum(linear.size for linear in self.architecture.linears.values()),
        )

    def comparison(self, base_identity: str, base: str) -> Comparison:
        """What is known of the weights beside those of a base model."""
        return Comparison(self._root, (self._identity, base_identity), (str(self.model), base))

    @functools.cached_property
    def _identity(self) -> str:
        return cache.weights_identity(self.folder, self._shards)

    def _use_data(self) -> str:
        settings = self._pave.calibration_of(self.model)
        samples = load_samples(self.entry.sources, settings, str(self.model))
        positions, shift = self.architecture.positions, self.architecture.shift
        encoded = encode(samples, self._processor(samples), settings, positions, str(self.model), shift)
        ids = (sample.inputs.get(side, ()) for sample in encoded for side in ("input_ids", "decoder_input_ids"))
        largest = max(itertools.chain.from_iterable(ids), default=0)
        if self.architecture.vocabulary and largest >= self.architecture.vocabulary:
            raise PaveError(
                f"{self.model}: its tokenizer gives the token id {largest}, but the model knows only "
                f"{self.architecture.vocabulary}; the tokenizer beside it belongs to another model"
            )
        self.samples = len(encoded)
        self.contents = {sample.content for sample in samples if sample.problem is None}
        self.tokens = sum(sample.tokens for sample in encoded)
        self.data = [data.model_dump(mode="json", exclude_defaults=True) | {"split": data.split} for data in self.entry.sources]
        watched = sorted(linear.module for linear in self.architecture.linears.values())

        def key_for(precision: str) -> str:
            # Another version of transformers may compute otherwise, or have other layers.
            return covariance_key(cache.digest(self._identity, self.architecture.computation, watched, precision), encoded)

        device = self._environment.runtime.device
        self.dtype, *others = (_precision(self._config, kind) for kind in (device, "cpu", "cuda"))
        key = key_for(self.dtype)
        about = {
            "key": key,
            "format": cache.FORMATS["covariance"],
            "model": str(self.model),
            "weights": cache.weights_fingerprint(self.folder, self._shards),
            "data": self.data,
            "samples": self.samples,
            "tokens": self.tokens,
            "dtype": self.dtype,
            "watched": watched,
            "versions": versions.installed(),
        }
        job = Job(
            name=str(self.model),
            folder=self.folder,
            config=self._config,
            architecture=self.architecture,
            encoded=encoded,
            batch_size=settings.batch_size,
            about=about,
        )
        folder = str(self._root / "covariance" / key)
        if cache.Artefact(Path(folder)).manifest() is None:
            folders = {other: self._root / "covariance" / key_for(other) for other in others if other != self.dtype}
            self.elsewhere = {other: found for other, found in folders.items() if cache.Artefact(found).manifest()}
        self._calibrate = functools.partial(CalibrateModel, folder=folder, job=job, runtime=self._environment.runtime)
        return key

    def _use_given(self, layers: tuple[Linear, ...]) -> str:
        where = f"pave.models[{self.model}].covariance"
        folder = Path(self.entry.covariance).expanduser()
        if not folder.exists():
            if looks_local(self.entry.covariance):
                raise PaveError(f"{where}: there is no folder {self.entry.covariance} (looked in {Path.cwd()})")
            folder = _download(self.entry.covariance, where)
        manifest = cache.Artefact(folder).manifest()
        if manifest is None or "weights" not in manifest:
            raise PaveError(f"{where}: {folder} has no covariances (there is no complete {cache.MANIFEST} in it)")
        try:
            known = manifest["format"] == cache.FORMATS["covariance"] and isinstance(manifest["dtype"], str)
            for data in manifest["data"]:
                Data.model_validate(data)
        except (KeyError, TypeError, ValueError):
            known = False
        if not known:
            raise PaveError(f"{where}: these were measured by another version of mergekit-pave; use `data` instead")
        if manifest["weights"] != cache.weights_fingerprint(self.folder, self._shards):
            raise PaveError(f"{where}: these were measured on other weights, those of {manifest['model']}; use `data` instead")
        if unknown := sorted({linear.module for linear in layers}.difference(manifest["watched"])):
            raise PaveError(
                f"{where}: these were measured with transformers {manifest['versions']['transformers']}, which has no layer "
                f"{unknown[0]}; use `data` instead"
            )
        self.samples, self.tokens, self.data = manifest["samples"], manifest["tokens"], manifest["data"]
        self.dtype = manifest["dtype"]
        self.contents = set()  # nobody knows
        self._calibrate = functools.partial(GivenCovariance, folder=str(folder))
        return cache.digest(manifest["files"], self._identity)

    def tail_folder(self, tensor: str) -> Path:
        return self._tails / tensor.replace("/", "_")

    def _processor(self, samples: list[Sample]) -> Any:
        what, loader = "tokenizer", transformers.AutoTokenizer
        if any(sample.image is not None for sample in samples):
            texts = any(sample.text is not None for sample in samples)
            what = "processor" if texts else "image processor"
            loader = transformers.AutoProcessor if texts else transformers.AutoImageProcessor
        # An adapter may bring a tokenizer of its own.
        places = [path for path in (self.model.lora, self.model.model) if path]
        for path in places:
            try:
                return loader.from_pretrained(
                    path.path,
                    revision=path.revision,
                    cache_dir=self._environment.transformers_cache,
                    trust_remote_code=self._environment.runtime.trust_remote_code,
                )
            except (OSError, ValueError, KeyError, ImportError) as error:
                failure = error
        reason = in_a_line(failure)
        raise PaveError(f"{self.model}: its {what} cannot be loaded, and calibration needs it: {reason}") from failure


def _precision(config: transformers.PretrainedConfig, device: str) -> str:
    """The name of the precision that a model runs in."""
    return str(inference_dtype(config, device)).removeprefix("torch.")


def _download(repository: str, where: str) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=["*.safetensors", cache.MANIFEST]))
    except Exception as error:  # the Hub's client raises a dozen kinds, all of them about this one entry
        reason = in_a_line(error)
        raise PaveError(f"{where}: {repository} is no folder here, and the Hub does not give it either: {reason}") from error


def _select(
    config: PaveConfig, tensors: list[PlannedTensor], sources: dict[ModelReference, _Source]
) -> tuple[dict[int, list[_Choice]], dict[ModelReference, dict[str, str]]]:
    """The weights to purify by output tensor, and per model why each other tensor is left as it is."""
    chosen: dict[int, list[_Choice]] = {}
    reasons: dict[ModelReference, dict[str, str]] = {model: {} for model in sources}
    _check_patterns(config, tensors, sources)
    for place, planned in enumerate(tensors):
        for model in planned.models:
            if model not in sources or model == planned.base:
                continue
            info = planned.gather.weight_info[model] if planned.gather else None
            tensor = info.name if info else planned.name
            linear, reason = _linear(sources[model].architecture, info)
            include, exclude = config.setting(model, "include"), config.setting(model, "exclude")
            if include and not any(pattern in tensor for pattern in include):
                reason = reason or "not under include"
            elif any(pattern in tensor for pattern in exclude):
                reason = "under exclude"
            if not reason:
                share = fair_share(min(linear.shape), _rank_ratio(config, model, tensor, planned.t))
                if share:
                    chosen.setdefault(place, []).append(_Choice(model, tensor, linear, share))
                    continue
                reason = "rank_ratio keeps every component"
            reasons[model][tensor] = reason
    for model, source in sources.items():
        _check_coverage(model, source.architecture, reasons[model])
    return chosen, reasons


def _check_patterns(config: PaveConfig, tensors: list[PlannedTensor], sources: dict[ModelReference, _Source]) -> None:
    """Every pattern has to match something: an `include` or a filter a linear weight, an `exclude` any tensor."""
    matchable: dict[str, set[str]] = {"include": set(), "exclude": set()}
    for planned in tensors:
        for model in sources.keys() & set(planned.models) if planned.gather else ():
            info = planned.gather.weight_info[model]
            matchable["exclude"].add(info.name)
            if _linear(sources[model].architecture, info)[0]:
                matchable["include"].add(info.name)
    for key, names in matchable.items():
        for pattern in sorted({pattern for model in sources for pattern in config.setting(model, key)}):
            if not any(pattern in name for name in names):
                what = "linear weight" if key == "include" else "tensor"
                raise PaveError(f"pave.{key}: {pattern!r} is part of no {what}'s name, so it selects nothing")
    settings = [config.rank_ratio, *(config.entry(model).rank_ratio for model in sources)]
    conditions = [condition for setting in settings for condition in (setting if isinstance(setting, list) else [setting])]
    for condition in conditions:
        pattern = getattr(condition, "filter", None)
        if pattern not in (None, "*") and not any(pattern in name for name in matchable["include"]):
            raise PaveError(f"pave.rank_ratio: the filter {pattern!r} is part of no linear weight's name")


def _check_coverage(model: ModelReference, architecture: Architecture, reasons: dict[str, str]) -> None:
    """Refuse a model most of whose matrices would silently keep their plain task vector: experts of an unknown kind, say."""
    missed = {}
    for tensor, reason in reasons.items():
        shape = architecture.weights.get(architecture.weight_name([tensor]) or "", ())
        if reason == _NOT_LINEAR and len(shape) > 1:
            missed[tensor] = math.prod(shape)
    linear = sum(layer.size for layer in architecture.linears.values())
    if sum(missed.values()) > linear:
        largest = max(missed, key=missed.get)
        raise PaveError(
            f"pave: {model} has more weights in {len(missed)} tensors that cannot be purified (such as {largest}) than in its "
            "linear layers; put them under pave.exclude to merge them as they are"
        )


def _linear(architecture: Architecture, info: Any) -> tuple[Optional[Linear], Optional[str]]:
    """The layer that a tensor is the weight of, or why it is none that can be purified."""
    if info is None or info.vocabulary_axis is not None:
        return None, "vocabulary"
    names = [info.name, *(info.aliases or ())]
    if linear := architecture.linear(names):
        return linear, None
    name = architecture.weight_name(names)
    if name is None:
        return None, "unknown to the architecture"
    if name in architecture.routers:
        return None, "router"
    if name in architecture.heads:
        return None, "head"
    return None, _NOT_LINEAR


def _rank_ratio(config: PaveConfig, model: ModelReference, tensor: str, t: float) -> float:
    """mergekit's resolution of a parameter: the first scope with a value for this tensor, else the default."""
    for setting in (config.entry(model).rank_ratio, config.rank_ratio):
        if setting is not None:
            value = evaluate_setting(tensor, setting, t, validate=float)
            if value is not None:
                return value
    return PaveConfig.model_fields["rank_ratio"].default


def _add_tensor(
    plan: Plan,
    config: PaveConfig,
    planned: PlannedTensor,
    place: int,
    choices: list[_Choice],
    sources: dict[ModelReference, _Source],
) -> None:
    """Add the tasks that purify one output tensor's inputs."""
    gather = planned.gather
    shares = [choice.share for choice in choices]
    # Uniform allocation is spectral allocation in which no model may lose more than its fair share.
    caps = shares
    if config.allocation == "spectral" and len(choices) > 1:
        caps = [most_dropped(min(choice.linear.shape), choice.share) for choice in choices]

    tails = []
    for choice, cap in zip(choices, caps):
        source = sources[choice.model]
        folder = source.tail_folder(choice.tensor)
        min_tokens = config.least_tokens(choice.model, choice.linear.experts)
        needed = {"folder": str(folder), "count": cap, "min_tokens": min_tokens}
        cached = has_tail(folder, cap, min_tokens)
        regularization = config.setting(choice.model, "regularization")
        plan.weights.append(
            PlannedWeight(
                model=choice.model,
                tensor=choice.tensor,
                output=planned.name,
                layer=choice.linear,
                drop=choice.share,
                cached=cached,
                covariances=source.calibration.folder,
                regularization=regularization,
            )
        )
        tails.append(LoadTail(model=choice.model, tensor=choice.tensor, unchanged=choice.unchanged, **needed))
        if not cached:
            decomposition = DecomposeWeight(
                model=choice.model,
                tensor=choice.tensor,
                weight=load_stored(gather, choice.model),
                calibration=source.calibration,
                layer=choice.linear,
                regularization=regularization,
                **needed,
            )
            plan.decompositions.append(decomposition)

    allocation = AllocateRanks(output=planned.name, tails=tuple(tails), shares=tuple(shares), caps=tuple(caps))
    has_base = planned.base is not None and planned.base in gather.weight_info
    for choice in choices:
        if not has_base and config.setting(choice.model, "target") == "task_vector":
            raise PaveError(
                f"pave.target: task_vector needs a base model, and {planned.name} of {choice.model} is merged without one; "
                "give the merge a base_model, or use target: weights"
            )
    purified = {}
    for position, choice in enumerate(choices):
        purify = purified[choice.model] = PurifyTensor(
            model=choice.model,
            tensor=choice.tensor,
            weight=load_stored(gather, choice.model),
            base=load_stored(gather, planned.base) if has_base else None,
            tail=tails[position],
            allocation=allocation,
            position=position,
            transposed=choice.linear.transposed,
            target=config.setting(choice.model, "target"),
            dtype=gather.weight_info[choice.model].force_dtype or gather.dtype,
        )
        plan.stats.append(PurificationStats(model=choice.model, tensor=choice.tensor, purify=purify))
    plan.gathers[place] = GatherPurified(
        weight_info=gather.weight_info, dtype=gather.dtype, device=gather.device, purified=purified
    )


def _header(
    config: PaveConfig,
    tensors: list[PlannedTensor],
    sources: dict[ModelReference, _Source],
    reasons: dict[ModelReference, dict[str, str]],
) -> dict[str, Any]:
    block = json.loads(config.model_dump_json(exclude={"models", "cache_dir", "calibration"}))
    return {
        "format": FORMAT,
        "versions": versions.installed(),
        "settings": block,
        "models": {
            str(model): {
                "data": source.data,
                "covariance": source.entry.covariance,
                "settings": _resolved(source.entry, block),
                "calibration": config.calibration_of(model).model_dump() if source.entry.data else None,
                "dtype": source.dtype,
                "samples": source.samples,
                "tokens": source.tokens,
                "left_as_they_are": reasons[model],
            }
            for model, source in sources.items()
        },
        "not_purified": [str(entry.model) for entry in config.models if not entry.purify],
        "tensors": len(tensors),
    }


def _resolved(entry: PaveModel, block: dict[str, Any]) -> dict[str, Any]:
    """The settings that hold for one model: its own where it has one."""
    own = json.loads(entry.model_dump_json())
    return {key: value if own.get(key) is None else own[key] for key, value in block.items()}
