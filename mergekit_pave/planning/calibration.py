"""What each model is calibrated with, and the cache entries that follow from that."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub

from mergekit_pave import cache, versions
from mergekit_pave.calibration import distributed
from mergekit_pave.calibration.counts import TokenCounts
from mergekit_pave.calibration.generation import Generation
from mergekit_pave.calibration.job import Job, Runtime, covariance_key, seen
from mergekit_pave.calibration.models import inference_dtype
from mergekit_pave.calibration.stored import StoredCovariances, never_remove
from mergekit_pave.config import PaveConfig
from mergekit_pave.core.linear import Linear
from mergekit_pave.errors import PaveError, in_a_line
from mergekit_pave.files import looks_local
from mergekit_pave.planning.merge import Merge
from mergekit_pave.planning.samples import settings_of, tokenised_samples
from mergekit_pave.planning.source import Source
from mergekit_pave.planning.tokenizers import check_meanings, check_token_ids, load_processor
from mergekit_pave.settings import Calibration, Data, RelativeRegularization, Written
from mergekit_pave.tasks.calibrate import CalibrateModel, GivenCovariance


@dataclass(frozen=True)
class PlannedCalibration:
    """What a model's covariances are measured with, and where the cache has them, or will have them.

    Attributes:
        folder: of the covariances.
        tails: the folder of the decompositions that are made with these covariances.
        data: the data sets, as the report shows them.
        samples: how many.
        tokens: how many of them count.
        dtype: the precision that the model runs in.
        settings: how the samples are read; None where the covariances are given.
        job: what the calibration needs; None where the covariances are given.
        counts: of the samples' tokens, where they may be needed and are known.
        contents: the samples' contents, to find samples that two models share.
        elsewhere: by precision, other covariances of the same samples that the cache has.
        to_write: how the model is to write its samples, which are not there yet; see `Samples`.
        remember: see `Tokenised`.
        left: how many further rows the data sets have; None where that is not known.
    """

    source: Source
    folder: Path
    tails: Path
    data: list[dict[str, Any]]
    samples: int
    tokens: int
    dtype: str
    settings: Calibration | None = None
    job: Job | None = None
    counts: TokenCounts | None = None
    contents: frozenset[Any] = frozenset()
    elsewhere: dict[str, Path] = field(default_factory=dict)
    to_write: Generation | None = None
    remember: Callable[[], None] | None = None
    left: int | None = None

    @property
    def samples_key(self) -> str:
        """Of the samples, or of the covariances that are given."""
        return cache.digest(*seen(self.job.encoded)) if self.job else self.tails.name

    def task(self, purified: Iterable[Linear], runtime: Runtime) -> CalibrateModel | GivenCovariance:
        """What makes sure that the covariances are there.

        Args:
            purified: the layers that are to be purified.
        """
        common = {
            "folder": str(self.folder),
            "model": str(self.source.model),
            "purified": tuple(dict.fromkeys(purified)),
            "num_weights": self.source.num_weights,
        }
        return CalibrateModel(**common, job=self.job, runtime=runtime) if self.job else GivenCovariance(**common)


def plan_calibration(
    config: PaveConfig, source: Source, purified: list[Linear], merged: list[Linear], merge: Merge
) -> PlannedCalibration:
    """Read and tokenise the samples of one model, which checks all of its `data` entry, or check the covariances it is given.

    Args:
        purified: the layers that may be purified.
        merged: the layers that `regmean` merges with their covariances, which therefore have to be stored.

    Raises:
        PaveError: the samples cannot be read, or do not fit the model; the covariances are not those of its weights; or they
            are needed and must not be kept.
    """
    if source.entry.covariance:
        return _given(config, source, [*purified, *merged])
    if merged and config.keep_covariances is False:
        raise PaveError(
            f"pave.keep_covariances: false, but {merge.method} merges with the covariances of {source.model}; remove this key"
        )
    keep = bool(merged) if config.keep_covariances == "auto" else config.keep_covariances
    keep = keep or distributed.world_size() > 1  # by way of the cache, several processes share out the decompositions
    return _of_data(config, source, merge, bool(purified or merged), keep)


def check_given(config: PaveConfig) -> None:
    """Refuse a `covariance:` that names a folder here that is not there. This needs no model, so it comes first.

    Raises:
        PaveError: naming the folder.
    """
    for entry in config.models:
        if entry.covariance and looks_local(entry.covariance) and not Path(entry.covariance).expanduser().exists():
            raise PaveError(f"{_yaml_key(entry.model)}: there is no folder {entry.covariance} (looked in {Path.cwd()})")


def _of_data(config: PaveConfig, source: Source, merge: Merge, measures_layers: bool, keep: bool) -> PlannedCalibration:
    """
    Args:
        measures_layers: otherwise the model's head is all that may be needed.
        keep: the covariances are stored.
    """
    model, architecture, checkpoint = source.model, source.architecture, source.checkpoint
    settings = settings_of(config, source)
    read = tokenised_samples(config, source, merge)
    encoded, counts = read.what.encoded, read.what.counts
    check_token_ids(source, encoded)
    if config.refinement:
        check_meanings(source, read.processor or load_processor(source, [], merge), encoded, merge)
    layers = sorted(linear.module for linear in architecture.linears.values())
    heads = [architecture.head] if architecture.head else []
    dtype, *others = (_precision(source, device) for device in (merge.runtime.device, "cpu", "cuda"))

    def key_for(dtype: str, watched: list[str]) -> str:
        # Another version of transformers may compute otherwise, or have other layers.
        return covariance_key(cache.digest(source.identity, architecture.computation, watched, dtype), encoded)

    entries = cache.cache_root(config.cache_dir) / "covariance"
    watched = layers + heads
    key = key_for(dtype, watched)
    if not measures_layers and cache.Artefact(entries / key).manifest() is None:
        watched = heads
        key = key_for(dtype, watched)
    elsewhere = {}
    if cache.Artefact(entries / key).manifest() is None:
        folders = {other: entries / key_for(other, watched) for other in others if other != dtype}
        elsewhere = {other: folder for other, folder in folders.items() if cache.Artefact(folder).is_complete()}
    about = {
        "key": key,
        "format": cache.FORMATS["covariance"],
        "model": str(model),
        "weights": source.fingerprint,
        "data": read.about,
        "samples": len(encoded),
        "tokens": sum(sample.tokens for sample in encoded),
        "dtype": dtype,
        "watched": watched,
        "versions": versions.installed(),
    }
    return PlannedCalibration(
        source=source,
        folder=entries / key,
        tails=_tails(config, source, key),
        data=about["data"],
        samples=about["samples"],
        tokens=about["tokens"],
        dtype=dtype,
        settings=settings,
        job=Job(
            name=str(model),
            folder=checkpoint.folder,
            config=source.config,
            architecture=architecture,
            encoded=encoded,
            batch_size=settings.batch_size,
            about=about,
            counts=counts,
            only_head=watched == heads,
            keep=keep,
        ),
        counts=counts,
        contents=read.what.contents,
        elsewhere=elsewhere,
        to_write=read.to_write,
        remember=read.remember,
        left=read.what.left,
    )


def _given(config: PaveConfig, source: Source, layers: Iterable[Linear]) -> PlannedCalibration:
    yaml_key = _yaml_key(source.model)
    folder = Path(source.entry.covariance).expanduser()
    if not folder.exists():
        folder = _download(source.entry.covariance, yaml_key)
    never_remove(str(folder))
    try:
        manifest = cache.Artefact(folder).read_manifest()
    except cache.DamagedError as error:
        raise PaveError(f"{yaml_key}: {folder} has no covariances that can be used: {error}") from error
    if "layers" not in manifest:
        raise PaveError(f"{yaml_key}: {folder} has no covariances, but something else of a cache")
    try:
        is_readable = manifest["format"] == cache.FORMATS["covariance"] and isinstance(manifest["dtype"], str)
        for data in manifest["data"]:
            (Written if "generated" in data else Data).model_validate(data)
    except (KeyError, TypeError, ValueError):
        is_readable = False
    if not is_readable:
        raise PaveError(f"{yaml_key}: these were measured by another version of mergekit-pave; use `data` instead")
    if manifest["weights"] != source.fingerprint:
        raise PaveError(f"{yaml_key}: these were measured on other weights, those of {manifest['model']}; use `data` instead")
    if missing := sorted({linear.module for linear in layers}.difference(manifest["watched"])):
        version = manifest["versions"].get("transformers", "of another version")
        raise PaveError(
            f"{yaml_key}: these were measured with transformers {version}, which has no layer {missing[0]}; use `data`"
        )
    stored = StoredCovariances(cache.Artefact(folder))
    if lacking := sorted({linear.module for linear in layers if not stored.has([n for names in linear.layers for n in names])}):
        raise PaveError(
            f"{yaml_key}: the covariance of {lacking[0]} was not kept when this was measured; measure again with "
            "`pave.keep_covariances: true`, or use `data` instead"
        )
    return PlannedCalibration(
        source=source,
        folder=folder,
        tails=_tails(config, source, cache.digest(manifest["files"], source.identity)),
        data=manifest["data"],
        samples=manifest["samples"],
        tokens=manifest["tokens"],
        dtype=manifest["dtype"],
        counts=_given_counts(folder, manifest, source),
    )


def _given_counts(folder: Path, manifest: dict[str, Any], source: Source) -> TokenCounts | None:
    """The token counts that were kept with covariances, if there are any."""
    name = manifest.get("counts")
    if name is None:
        return None
    try:
        counts = TokenCounts.from_tensors(cache.Artefact(folder).read(name, manifest))
    except (ValueError, cache.DamagedError) as error:
        raise PaveError(f"{_yaml_key(source.model)}: {folder / name} is damaged; fetch the covariances again") from error
    if source.architecture.vocabulary and max(map(len, counts.of_use.values())) > source.architecture.vocabulary:
        raise PaveError(f"{_yaml_key(source.model)}: {folder / name} counts tokens that the model does not know")
    return counts


def _tails(config: PaveConfig, source: Source, covariances: str) -> Path:
    """
    Args:
        covariances: their key.
    """
    regularization = config.setting(source.model, "regularization")
    lambda_ = regularization.model_dump() if isinstance(regularization, RelativeRegularization) else regularization
    return cache.cache_root(config.cache_dir) / "subspace" / cache.key("subspace", covariances, lambda_)


def _yaml_key(model: Any) -> str:
    return f"pave.models[{model}].covariance"


def _precision(source: Source, device: str) -> str:
    """The name of the precision that a model runs in on a device."""
    return str(inference_dtype(source.config, device)).removeprefix("torch.")


def _download(repository: str, yaml_key: str) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=["*.safetensors", cache.MANIFEST]))
    except Exception as error:  # the Hub's client raises a dozen kinds, all of them about this one entry
        reason = in_a_line(error)
        raise PaveError(f"{yaml_key}: {repository} is not a folder here, and the Hub does not have it: {reason}") from error
