"""`mergekit-pave tune`: merges each variant of a config in a scratch folder, scores it, and removes it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from mergekit_pave import cache, versions
from mergekit_pave.calibration.scaled import Scaled
from mergekit_pave.calibration.subjects import Stored
from mergekit_pave.config import PaveConfig
from mergekit_pave.errors import PaveError
from mergekit_pave.planning.plan import Plan
from mergekit_pave.planning.scaling import alike, precision, scale
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


class Tuner:
    """Scores variants of a config, each of them once: what is in the cache is not merged again."""

    def __init__(self, config: MergeConfiguration, options: MergeOptions, scorer: Scorer, tell: Callable[[str], None]):
        """
        Args:
            config: as it is.
            tell: is given a line for each variant that is scored.
        """
        self._config, self._options, self._scorer, self._tell = config, options, scorer, tell
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

    def score(self, variants: list[Variant]) -> list[Score]:
        """The scores of variants that have been checked.

        Raises:
            PaveError: a merge or a score fails.
        """
        scoring = self._scorer.scoring
        scoring.prepare()
        found = {}
        for variant in variants:
            if score := scoring.stored(self._keys[id(variant)]):
                found[id(variant)] = score
                self._tell(f"{variant.name}: {_in_short(score)} (from the cache)")
        missing = [variant for variant in variants if id(variant) not in found]
        groups = alike(missing, checkpoint_of)
        self._check_space(groups)
        self._fill_caches(missing)
        for group in groups:
            for variant, score in self._merged_and_scored(group):
                found[id(variant)] = score
        return [found[id(variant)] for variant in variants]

    def _key(self, variant: Variant, plan: Plan) -> str:
        """Of everything that determines a merge."""
        models = {str(model): weights_identity(checkpoint_of(model)) for model in variant.config.referenced_models()}
        options = self._options.model_dump(include={"random_seed", "lora_merge_dtype", "unsafe_truncate_embeddings"})
        device = torch.device(self._options.device).type
        return cache.digest("tuned", *variant.meaning, models, plan.samples, options, device, versions.installed())

    def _check_space(self, groups: list[list[Variant]]) -> None:
        """
        Raises:
            PaveError: the disk has no room for a merge.
        """
        if not groups:
            return
        checkpoint = checkpoint_of(self._config.base_model or self._config.referenced_models()[0])
        size = sum(Path(checkpoint.folder, file).stat().st_size for file in set(checkpoint.files.values()))
        is_widened = any(len(group) > 1 and precision(group[0]) is not torch.float32 for group in groups)
        cache.require_space(cache.cache_root(self._config.pave.cache_dir), 2 * size if is_widened else size, "free some")

    def _fill_caches(self, variants: list[Variant]) -> None:
        """Calibrate and decompose what the merges need, with bars of its own. Most variants need what the first one needs."""
        log = logging.getLogger("mergekit_pave")
        level = log.level
        try:
            for variant in variants:
                if id(variant) in self._complete:
                    continue
                if self._filled:
                    log.setLevel(logging.ERROR)
                fill_caches(variant.config.model_copy(deep=True), self._options)
                self._filled = True
        finally:
            log.setLevel(level)

    def _merged_and_scored(self, group: list[Variant]) -> Iterator[tuple[Variant, Score]]:
        """
        Args:
            group: variants that one merge can serve, or a single one.
        """
        first, start = group[0], time.monotonic()
        if len(group) > 1:
            exact = dataclasses.replace(first, config=first.config.model_copy(update={"dtype": "float32", "out_dtype": None}))
            with self._merged(exact) as merged:
                models = self._scaled(group, merged)
                for variant, model in zip(group, models or ()):
                    yield variant, self._score(variant, model, start)
                    start = time.monotonic()
            if models:
                return
        for variant in group:
            with self._merged(variant) as merged:
                yield variant, self._score(variant, merged, start)
            start = time.monotonic()

    def _score(self, variant: Variant, model: Model, start: float) -> Score:
        score = self._scorer.scoring.score(dataclasses.replace(model, name=variant.name, identity=self._keys[id(variant)]))
        self._tell(f"{variant.name}: {_in_short(score)} ({time.monotonic() - start:.0f} s)")
        return score

    def _scaled(self, group: list[Variant], merged: Model) -> list[Model] | None:
        """A group from a merge of its first; None if the base model's tensors have other names than the merge's."""
        base = Stored(checkpoint_of(self._config.base_model).folder)
        names = set(merged.weights.tensors().names)
        if not names <= set(base.tensors().names):
            return None
        most = scale(group[0], checkpoint_of)
        dtype = precision(group[0])
        config = copy.deepcopy(merged.config)
        config.dtype = dtype or self._scorer.scoring.base.config.dtype  # it decides in what precision a model runs on a GPU
        return [
            dataclasses.replace(
                merged,
                config=config,
                weights=Scaled(base, merged.weights, scale(variant, checkpoint_of) / most if most else 1.0, dtype),
            )
            for variant in group
        ]

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
    further: list[Tried] = []

    def value_of(weights: dict[int, float]) -> float:
        changed = {i: weight for i, weight in weights.items() if weight != start[i]}
        (variant,) = make_variants(content, [best[0].changes | as_changes(changed)])[-1:]
        tuner.check(variant)
        (score,) = tuner.score([variant])
        further.append((variant, score))
        return kept(score, by)

    for _ in search(Found(start, kept(best[1], by)), value_of):
        pass
    return further


def _forget(folder: Path) -> None:
    """Let mergekit close the files of a folder, or the disk would keep them."""
    loaders = LoaderCache().loaders
    for model in [model for model in loaders if model.model.path == str(folder)]:
        loaders.pop(model).flush()


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


def _in_short(score: Score) -> str:
    return f"mean {share(score['mean'])}, worst {share(score['worst'])}"
