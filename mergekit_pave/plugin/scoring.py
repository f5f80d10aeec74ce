"""Scores of merges, from mergekit's configuration on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_pave import cache
from mergekit_pave.calibration.job import Runtime
from mergekit_pave.errors import PaveError
from mergekit_pave.planning.merge import Reading
from mergekit_pave.planning.scoring import open_merged
from mergekit_pave.planning.scoring import plan_scoring as plan_for
from mergekit_pave.plugin.checkpoints import checkpoint_of
from mergekit_pave.plugin.inputs import check_inputs, check_merged, planning_errors
from mergekit_pave.plugin.phases import merge_adapters
from mergekit_pave.plugin.scratch import remove_abandoned
from mergekit_pave.tasks.scoring import Model, Scoring


@dataclass(frozen=True)
class Scorer:
    """Scores merges of one config's models."""

    scoring: Scoring
    reading: Reading

    def open(self, folder: Path) -> Model:
        """A finished merge in a folder.

        Raises:
            PaveError: it is none, or none of models like these.
        """
        check_merged(ModelReference.parse(str(folder)), self.reading.runtime.trust_remote_code)
        with planning_errors(OSError, ValueError, RuntimeError, failed=f"{folder} cannot be scored"):
            return open_merged(self.scoring, folder, self.reading)

    def score(self, folder: Path) -> dict[str, Any]:
        """The score of a finished merge: see `report.score`.

        Raises:
            PaveError: it is none, or a model cannot be run.
        """
        return self.scoring.score(self.open(folder))


def check_block(config: MergeConfiguration, base: str | None) -> None:
    """
    Raises:
        PaveError: the config has no `pave:` block or no base model.
    """
    if config.pave is None:
        raise PaveError("the config has no `pave:` block, which says what data each model is scored with")
    if not (base or config.base_model):
        raise PaveError("the config has no base_model, and a score needs a model that counts as 0 %: name it with --base MODEL")


def plan_scoring(config: MergeConfiguration, options: MergeOptions, rows: int, base: str | None = None) -> Scorer:
    """Check everything that scores of merges of a config need. No model is run, unless it has yet to write its own rows.

    Merges that killed runs have left are removed.

    Args:
        rows: how many held-out rows a model is to have.
        base: the model that counts as 0 %, if that is not the config's base model.

    Raises:
        PaveError: the config has no `pave:` block or no base model, or its data or models do not fit.
    """
    check_block(config, base)
    if base:
        config = config.model_copy(update={"base_model": ModelReference.parse(base)})
    remove_abandoned(cache.cache_root(config.pave.cache_dir))
    check_inputs(config, options)
    merge_adapters(config, options)
    runtime = Runtime(options.device, options.trust_remote_code, options.quiet)
    reading = Reading(runtime, options.transformers_cache, checkpoint_of, generates=True)
    with planning_errors(OSError, ValueError, RuntimeError, failed="these models cannot be scored"):
        return Scorer(plan_for(config.pave, config.base_model, reading, rows), reading)
