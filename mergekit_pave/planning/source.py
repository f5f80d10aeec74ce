"""One model of a merge: its architecture, its samples, and the keys of what the cache has of it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import huggingface_hub
import transformers
from mergekit.common import ModelReference

from mergekit_pave import cache, versions
from mergekit_pave.cache.comparison import Comparison
from mergekit_pave.calibration.architecture import Architecture, describe
from mergekit_pave.calibration.batches import encode
from mergekit_pave.calibration.data import Sample, load_samples
from mergekit_pave.calibration.job import Job, covariance_key
from mergekit_pave.calibration.models import inference_dtype
from mergekit_pave.config import PaveConfig
from mergekit_pave.core.linear import Linear
from mergekit_pave.errors import PaveError, in_a_line
from mergekit_pave.files import looks_local
from mergekit_pave.planning.checks import check_unquantised
from mergekit_pave.planning.merge import Environment
from mergekit_pave.settings import Data, RelativeRegularization
from mergekit_pave.tasks.calibrate import CalibrateModel, GivenCovariance


class Source:
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
            layers=tuple(dict.fromkeys(layers)),
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
        try:
            manifest = cache.Artefact(folder).read_manifest()
        except cache.DamagedError as error:
            raise PaveError(f"{where}: {folder} has no covariances that can be used: {error}") from error
        if "layers" not in manifest:
            raise PaveError(f"{where}: {folder} has no covariances, but something else of a cache")
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
