"""`mergekit-pave tune`: merges each variant of a config in a scratch folder, scores it, and removes it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from mergekit_pave import cache, versions
from mergekit_pave.calibration.scaled import Scaled
from mergekit_pave.calibration.subjects import Stored
from mergekit_pave.config import PaveConfig
from mergekit_pave.errors import PaveError, in_a_line
from mergekit_pave.planning.plan import Plan
from mergekit_pave.planning.scaling import alike, scale
from mergekit_pave.planning.source import weights_identity
from mergekit_pave.planning.variants import Variant, make_variants
from mergekit_pave.planning.weights import Found, as_changes, search, weights_of
from mergekit_pave.plugin.checkpoints import checkpoint_of
from mergekit_pave.plugin.phases import fill_caches, plan_merge
from mergekit_pave.plugin.scoring import Scorer
from mergekit_pave.plugin.scratch import scratch_folder
from mergekit_pave.report.scores import Score, share
from mergekit_pave.report.tuned import kept
from mergekit_pave.tasks.scoring import Model

Tried = tuple[Variant, Score]

_SEED = 0  # unless the user gives one: methods that draw at random shall draw alike when the best one is merged


class Tuner:
    """Scores variants of a config, each of them once: what is in the cache is not merged again.

    Attributes:
        seed: of methods that draw at random.
        failed: the variants that could not be merged or scored, and why.
    """

    def __init__(self, config: MergeConfiguration, options: MergeOptions, scorer: Scorer, tell: Callable[[str], None]):
        """
        Args:
            config: as it is.
            tell: is given a line for each variant that is scored.
        """
        self.seed = _SEED if options.random_seed is None else options.random_seed
        self.failed: list[tuple[Variant, str]] = []
        self._options = options.model_copy(update={"random_seed": self.seed})
        self._config, self._scorer, self._tell = config, scorer, tell
        self._keys: dict[int, str] = {}  # by variant
        self._complete: set[int] = set()  # variants that need nothing that the cache lacks
        self._filled = False

    def check(self, variant: Variant) -> None:
        """Plan a variant. This reads no more than headers and samples.

        Raises:
            PaveError: it cannot be merged, or not be compared with the others.
        """
        try:
            _check_comparable(self._config, variant.config)
            plan = plan_merge(variant.config.model_copy(deep=True), self._options, compares=False)
        except PaveError as error:
            raise PaveError(f"{variant.name}: {error}" if variant.changes else str(error)) from error
        self._keys[id(variant)] = self._key(variant, plan)
        if not (plan.to_calibrate or plan.decompositions):
            self._complete.add(id(variant))

    def score(self, variants: list[Variant]) -> list[Tried]:
        """The variants that can be merged and scored, with their scores; what becomes of the others is in `failed`.

        Args:
            variants: that have been checked.

        Raises:
            PaveError: the disk has no room, an expert or the base model cannot be run, or the config as it is cannot be merged.
        """
        scoring = self._scorer.scoring
        found: dict[int, Score] = {}
        for variant in variants:
            if score := scoring.stored(self._keys[id(variant)]):
                found[id(variant)] = score
                self._tell(f"{variant.name}: {_in_short(score)} (from the cache)")
        missing = [variant for variant in variants if id(variant) not in found]
        self._check_space(missing)
        scoring.prepare()
        missing = self._with_full_caches(missing)
        for group in alike(missing):
            self._score_each(group, found)
        return [(variant, found[id(variant)]) for variant in variants if id(variant) in found]

    def fail(self, variant: Variant, error: Exception) -> None:
        """Note why a variant could not be scored, and go on without it.

        Raises:
            PaveError: it is the config as it is, without which there is nothing to compare with.
        """
        if not variant.changes:
            if isinstance(error, PaveError):
                raise error
            raise PaveError(f"the config as it is cannot be merged and scored: {in_a_line(error)}") from error
        self.failed.append((variant, in_a_line(error)))
        self._tell(f"{variant.name}: failed: {in_a_line(error)}")

    def _key(self, variant: Variant, plan: Plan) -> str:
        """Of everything that determines a merge."""
        models = {str(model): weights_identity(checkpoint_of(model)) for model in variant.config.referenced_models()}
        options = self._options.model_dump(include={"random_seed", "lora_merge_dtype", "unsafe_truncate_embeddings"})
        device = torch.device(self._options.device).type
        return cache.digest("tuned", *variant.meaning, models, plan.samples, options, device, versions.installed())

    def _check_space(self, variants: list[Variant]) -> None:
        """
        Raises:
            PaveError: the disk has no room for a merge.
        """
        size = max((_size(variant.config) for variant in variants), default=0)
        cache.require_space(cache.cache_root(self._config.pave.cache_dir), size, "free some")

    def _with_full_caches(self, variants: list[Variant]) -> list[Variant]:
        """Calibrate and decompose what the merges need, with bars of its own. Most variants need what the first one needs.

        Returns:
            Those for which this could be done.
        """
        log = logging.getLogger("mergekit_pave")
        level = log.level
        full = []
        try:
            for variant in variants:
                if id(variant) not in self._complete:
                    if self._filled:
                        log.setLevel(logging.ERROR)
                    config = variant.config.model_copy(deep=True)
                    if config.pave and config.pave.keep_covariances == "auto":  # the next variant may need them
                        config.pave = config.pave.model_copy(update={"keep_covariances": True})
                    try:
                        fill_caches(config, self._options)
                    except Exception as error:
                        self.fail(variant, error)
                        continue
                    self._filled = True
                full.append(variant)
        finally:
            log.setLevel(level)
        return full

    def _score_each(self, group: list[Variant], found: dict[int, Score]) -> None:
        """
        Args:
            group: variants that one merge can serve, or a single one.
            found: the scores by variant, to which theirs are added.
        """
        start, left = time.monotonic(), list(group)

        def score_next(model: Model) -> None:
            nonlocal start
            found[id(left[0])] = self._score(left[0], model, start)
            left.pop(0)
            start = time.monotonic()

        while left:  # what fails is taken out, and the others are merged anew
            try:
                with self._merged(left[0]) as merged:
                    models = self._scaled(left, merged) if len(left) > 1 else [merged]
                    for model in models or [merged]:
                        score_next(model)
            except Exception as error:  # the methods of mergekit raise all kinds
                self.fail(left.pop(0), error)

    def _score(self, variant: Variant, model: Model, start: float) -> Score:
        score = self._scorer.scoring.score(dataclasses.replace(model, name=variant.name, identity=self._keys[id(variant)]))
        self._tell(f"{variant.name}: {_in_short(score)} ({time.monotonic() - start:.0f} s)")
        return score

    def _scaled(self, group: list[Variant], merged: Model) -> list[Model] | None:
        """A group from a merge of its first; None if the base model's tensors have other names or shapes than the merge's."""
        base = checkpoint_of(self._config.base_model)
        shapes = {name: tensor.shape for name, tensor in base.stored.items()}
        stored = checkpoint_of(ModelReference.parse(merged.name)).stored
        if any(shapes.get(name) != tensor.shape for name, tensor in stored.items()):
            return None
        most = scale(group[0])
        ratios = [scale(variant) / most if most else 1.0 for variant in group]
        return [dataclasses.replace(merged, weights=Scaled(Stored(base.folder), merged.weights, ratio)) for ratio in ratios]

    @contextlib.contextmanager
    def _merged(self, variant: Variant) -> Iterator[Model]:
        """The merge of a variant, while the block runs."""
        log = logging.getLogger("mergekit_pave")
        level = log.level
        options = self._options.model_copy(update={"quiet": True, "write_model_card": False})
        with scratch_folder(cache.cache_root(self._config.pave.cache_dir)) as folder:
            try:
                log.setLevel(logging.ERROR)  # what a merge has to say can be read when the best one is made
                try:
                    run_merge(variant.config.model_copy(deep=True), str(folder), options)
                finally:
                    log.setLevel(level)
                yield self._scorer.open(folder)
            finally:
                _forget(folder)


def tune_weights(tuner: Tuner, content: dict[str, Any], tried: list[Tried], by: str) -> list[Tried]:
    """Go on from the best variant with a weight for each model: see `planning.weights`.

    Args:
        content: what the YAML of the config holds.
        tried: the variants so far.
        by: `mean` or `worst`.

    Returns:
        The further variants, in the order in which they were tried.

    Raises:
        PaveError: the best variant has no weights that could be tuned.
    """
    best = max(tried, key=lambda pair: kept(pair[1], by))
    start = weights_of(best[0].config)
    known = [(variant.meaning, kept(score, by)) for variant, score in tried]
    known += [(variant.meaning, -math.inf) for variant, _ in tuner.failed]
    further: list[Tried] = []

    def value_of(weights: dict[int, float]) -> float:
        changed = {i: weight for i, weight in weights.items() if weight != start[i]}
        variant = make_variants(content, [best[0].changes | as_changes(changed)])[-1]
        for meaning, value in known:  # the search may come back to what has been tried
            if meaning == variant.meaning:
                return value
        value = -math.inf
        try:
            tuner.check(variant)
        except PaveError as error:
            tuner.fail(variant, error)
        else:
            for pair in tuner.score([variant]):
                further.append(pair)
                value = kept(pair[1], by)
        known.append((variant.meaning, value))
        return value

    for _ in search(Found(start, kept(best[1], by)), value_of):
        pass
    return further


def _forget(folder: Path) -> None:
    """Let mergekit close the files of a folder, or the disk would keep them."""
    loaders = LoaderCache().loaders
    for model in [model for model in loaders if model.model.path == str(folder)]:
        loaders.pop(model).flush()


def _size(config: MergeConfiguration) -> int:
    """Of a merge on the disk, in bytes."""
    checkpoint = checkpoint_of(config.base_model or config.referenced_models()[0])
    dtype = dtype_from_name(config.out_dtype or config.dtype)
    if dtype and checkpoint.stored:
        return dtype.itemsize * sum(math.prod(tensor.shape) for tensor in checkpoint.stored.values())
    return sum(Path(checkpoint.folder, file).stat().st_size for file in set(checkpoint.files.values()))


def _check_comparable(config: MergeConfiguration, other: MergeConfiguration) -> None:
    """Refuse a variant that is not scored on the same rows, or was calibrated with some of them."""
    if set(other.referenced_models()) != set(config.referenced_models()) or other.base_model != config.base_model:
        raise PaveError("the models have to stay the same, or there would be nothing to compare")
    blocks: list[PaveConfig] = [config.pave, other.pave]
    for entry in config.pave.models:
        listed = [block.listed(entry.model) for block in blocks]
        ours, theirs = (block.calibration_of(entry.model) for block in blocks)
        if listed[0].data != listed[1].data or ours.seed != theirs.seed or theirs.samples > ours.samples:
            raise PaveError(
                f"{entry.model}: all settings are scored on the same rows, those after the calibration's in the config. So data "
                "and seed cannot be tuned, and calibration.samples only downwards; set it to the largest in the config"
            )
        if theirs.samples != ours.samples and any(data.streaming for data in entry.sources if data):
            raise PaveError(
                f"{entry.model}: calibration.samples cannot be tuned with streaming: it changes how a stream is shuffled, so "
                "fewer samples may be those that settings are scored on"
            )


def _in_short(score: Score) -> str:
    return f"mean {share(score['mean'])}, worst {share(score['worst'])}"
