"""Arms of the experiment, and how one is run: a config, mergekit's own `run_merge`, and the scores of what it writes."""

from __future__ import annotations

import collections
import hashlib
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from rotation import rotate

from mergekit_pave import cache
from mergekit_pave.emr.restore import open_task, write
from mergekit_pave.plugin.phases import fill_caches
from mergekit_pave.report.stored import read_report
from mergekit_pave.report.summary import by_model

HALVES = ("first half", "second half")

Scores = dict[str, float]  # by task, higher is better


class Family(Protocol):
    """A base model and its fine-tunes, with data to calibrate and to judge them.

    Attributes:
        general: a kind of text for calibration that no fine-tune is about; None where there is none.
    """

    name: str
    unit: str
    max_length: int
    base: Path
    general: str | None

    @property
    def tasks(self) -> Iterable[str]: ...

    def prepare(self) -> None: ...

    def fine_tune(self, seed: int, task: str) -> None: ...

    def tuned(self, seed: int, task: str) -> Path: ...

    def calibration(self, task: str) -> Path: ...

    def score(self, model: Path, seed: int, part: str, tasks: list[str]) -> Scores: ...


@dataclass(frozen=True)
class Arm:
    """One way to merge. Of its settings the one that is best on validation is judged.

    Attributes:
        method: of mergekit.
        settings: parameters of the method, each of which is tried; `refine` among them is refining's lambda.
        pave: the `pave:` block, without models and data; None for a merge without one. Its `calibration` adds to what is usual.
        purify: false where the block is there only for its covariances.
        data: what the block is given: samples of each model's own task, of either half of its rows, of the next task, or for all
            models of `Family.general`; `generated`; or covariances whose eigenvectors are replaced by random ones.
        samples: calibration samples for each model.
        models: how many are merged at once; the tasks are cut into groups of so many.
    """

    method: str
    settings: tuple[dict[str, Any], ...]
    pave: dict[str, Any] | None = None
    purify: bool = True
    data: Literal["own", "first half", "second half", "other", "general", "generated", "rotated"] = "own"
    samples: int = 128
    models: int = 8


class MissingResult(Exception):
    """Something has not been run yet, and nothing is to be run."""


@dataclass(frozen=True)
class Outcome:
    """What an arm reaches.

    Attributes:
        setting: the one that was best on validation.
        scores: on the test parts, by seed and task.
        removed: how large the removed part is beside the change, mean over models; None for a merge without a block.
    """

    setting: dict[str, Any]
    scores: dict[tuple[int, str], float]
    removed: float | None

    @property
    def mean(self) -> float:
        return statistics.mean(self.scores.values())

    def against(self, other: Outcome) -> tuple[float, float]:
        """Mean of what this is better by, and its standard error over the tasks: seeds of one task repeat what it favours."""
        by_task = collections.defaultdict(list)
        for (seed, task), score in self.scores.items():
            by_task[task].append(score - other.scores[seed, task])
        differences = [statistics.mean(of_task) for of_task in by_task.values()]
        return statistics.mean(differences), statistics.stdev(differences) / len(differences) ** 0.5


class Laboratory:
    """Runs arms on one family and keeps every result in a journal, so that nothing is run twice.

    Attributes:
        family: whose models are merged.
        seeds: of the fine-tunes.
    """

    def __init__(self, family: Family, folder: Path, seeds: Sequence[int], *, run: bool = True):
        """Keep everything under `folder`; `run=False` only reads what is there."""
        self.family = family
        self.seeds = seeds
        self._folder = folder
        self._run = run
        self._journal = folder / "results.jsonl"
        lines = self._journal.read_text().splitlines() if self._journal.exists() else []
        self._results = {entry["key"]: entry for entry in map(json.loads, lines)}

    def base(self) -> Outcome:
        """The base model, on the test parts."""

        def measure(seed: int) -> Scores:
            return self.family.score(self.family.base, seed, "test", list(self.family.tasks))

        return self._unmerged("base", measure)

    def tuned(self) -> Outcome:
        """Each fine-tune, on the test part of its own task."""

        def measure(seed: int) -> Scores:
            scores = {}
            for task in self.family.tasks:
                scores |= self.family.score(self.family.tuned(seed, task), seed, "test", [task])
            return scores

        return self._unmerged("tuned", measure)

    def _unmerged(self, what: str, measure: Callable[[int], Scores]) -> Outcome:
        entries = {
            seed: self._once({"model": what, "seed": seed}, lambda seed=seed: {"scores": measure(seed)}) for seed in self.seeds
        }
        return Outcome({}, _by_pair(entries), None)

    def outcome(self, arm: Arm) -> Outcome:
        """Try the arm's settings on the validation parts with the first seed, and judge the best on the test parts with all.

        Raises:
            MissingResult: something is not in the journal, and nothing is to be run.
        """
        tried = [sum(self._measure(arm, setting, self.seeds[0], "validation")["scores"].values()) for setting in arm.settings]
        best = arm.settings[tried.index(max(tried))]
        entries = {seed: self._measure(arm, best, seed, "test") for seed in self.seeds}
        removed = [entry["removed"] for entry in entries.values() if entry["removed"] is not None]
        return Outcome(best, _by_pair(entries), statistics.mean(removed) if removed else None)

    def _measure(self, arm: Arm, setting: dict[str, Any], seed: int, part: str) -> dict[str, Any]:
        what = asdict(arm) | {"settings": setting, "seed": seed, "part": part}

        def measure() -> dict[str, Any]:
            tasks = list(self.family.tasks)
            scores, removed = {}, []
            for start in range(0, len(tasks), arm.models):
                group = tasks[start : start + arm.models]
                out = self._merge(arm, setting, seed, group)
                if arm.method == "emr":
                    scores |= self._restored(out, seed, part, group)
                else:
                    scores |= self.family.score(out, seed, part, group)
                if arm.pave is not None and arm.purify:
                    removed += [sums["removed_over_change"] for sums in by_model(read_report(str(out))).values()]
            return {"scores": scores, "removed": sum(removed) / len(removed) if removed else None}

        return self._once(what, measure)

    def _restored(self, merged: Path, seed: int, part: str, tasks: list[str]) -> Scores:
        """Each task's model is restored, and judged on its own task."""
        scores = {}
        for task in tasks:
            out = merged.with_name(f"{merged.name}-restored")
            shutil.rmtree(out, ignore_errors=True)
            write(open_task(merged, str(self.family.tuned(seed, task))), out, 5 * 10**9, quiet=True)
            scores |= self.family.score(out, seed, part, [task])
        return scores

    def inspected(self, arm: Arm | None, seed: int, inspect: dict[str, Callable[[Path], dict[str, Any]]]) -> dict[str, Any]:
        """What functions find in the merge of all models with the arm's first setting, or in the base model if there is no arm.

        Args:
            inspect: by the name under which it is kept in the journal.

        Raises:
            MissingResult: see `outcome`.
        """
        made: list[Path] = []

        def look(name: str) -> dict[str, Any]:
            if not made:
                merged = self._merge(arm, arm.settings[0], seed, list(self.family.tasks)) if arm else self.family.base
                made.append(merged)
            return {"found": inspect[name](made[0])}

        whats = {name: {"arm": asdict(arm) if arm else "base", "seed": seed, "inspected": name} for name in inspect}
        return {name: self._once(what, lambda name=name: look(name))["found"] for name, what in whats.items()}

    def _once(self, what: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        key = hashlib.sha256(json.dumps([self.family.name, what], sort_keys=True).encode()).hexdigest()[:16]
        if key not in self._results:
            if not self._run:
                raise MissingResult
            start = time.monotonic()
            measured = measure()
            entry = {"key": key, "family": self.family.name, **what, **measured, "seconds": round(time.monotonic() - start, 2)}
            with self._journal.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            self._results[key] = entry
        return self._results[key]

    def _merge(self, arm: Arm, setting: dict[str, Any], seed: int, tasks: list[str]) -> Path:
        config = {
            "merge_method": arm.method,
            "base_model": str(self.family.base),
            "models": [{"model": str(self.family.tuned(seed, task))} for task in tasks],
            "parameters": {key: value for key, value in setting.items() if key != "refine"},
            "dtype": "float32",
        }
        if "refine" in setting:
            arm = replace(arm, pave=arm.pave | {"refine": {"lambda": setting["refine"]}})
        if arm.pave is not None:
            if arm.data == "rotated":
                self._rotate(config | {"pave": self._block(arm, seed, tasks, "own")}, seed)
            config["pave"] = self._block(arm, seed, tasks, arm.data)
        out = self._folder / self.family.name / f"merged-{os.getpid()}"
        shutil.rmtree(out, ignore_errors=True)
        run_config(config, out, seed)
        return out

    def _block(self, arm: Arm, seed: int, tasks: list[str], data: str) -> dict[str, Any]:
        calibration = {"samples": arm.samples, "max_length": self.family.max_length, "seed": seed}
        common = arm.pave | {"cache_dir": str(self._cache(seed)), "calibration": calibration | arm.pave.get("calibration", {})}
        if data in ("general", "generated"):
            whole = {"path": str(self.family.calibration(self.family.general)), "text": "text"} if data == "general" else data
            return common | {"data": whole, **({} if arm.purify else {"purify": False})}
        names = list(self.family.tasks)
        entries = []
        for task in tasks:
            source = names[(names.index(task) + 1) % len(names)] if data == "other" else task
            given = {"covariance": str(self._rotated(seed, task))}
            if data != "rotated":
                given = {"data": {"path": str(self._rows(source, data)), "text": "text"}}
            entries.append({"model": str(self.family.tuned(seed, task)), **given, **({} if arm.purify else {"purify": False})})
        return common | {"models": entries}

    def _rows(self, task: str, data: str) -> Path:
        """Calibration texts of a task, all of them or every other one."""
        path = self.family.calibration(task)
        if data not in HALVES:
            return path
        half = self._folder / self.family.name / data.replace(" ", "-") / path.name
        if not half.exists():
            half.parent.mkdir(exist_ok=True)
            half.write_text("".join(path.read_text().splitlines(keepends=True)[HALVES.index(data) :: 2]))
        return half

    def _cache(self, seed: int) -> Path:
        return self._folder / self.family.name / "cache" / f"seed{seed}"

    def _rotated(self, seed: int, task: str) -> Path:
        return self._folder / self.family.name / "rotated" / f"seed{seed}" / task

    def _rotate(self, config: dict[str, Any], seed: int) -> None:
        """Make the folders of rotated covariances from those of the models' own data."""
        missing = {str(self.family.tuned(seed, task)): self._rotated(seed, task) for task in self.family.tasks}
        if all((folder / cache.MANIFEST).exists() for folder in missing.values()):
            return
        fill_caches(MergeConfiguration.model_validate(config), MergeOptions(quiet=True))
        own = {
            entry["model"]: (entry["data"]["path"], config["pave"]["calibration"]["samples"])
            for entry in config["pave"]["models"]
        }
        for entry in cache.entries(self._cache(seed)):
            manifest = entry.artefacts[0].manifest() if entry.kind == "covariance" else None
            if manifest and (manifest["data"][0]["path"], manifest["samples"]) == own.get(manifest["model"]):
                rotate(entry.artefacts[0], cache.Artefact(missing[manifest["model"]]), seed)


def _by_pair(entries: dict[int, dict[str, Any]]) -> dict[tuple[int, str], float]:
    return {(seed, task): score for seed, entry in entries.items() for task, score in entry["scores"].items()}


def run_config(config: dict[str, Any], out: Path, seed: int) -> None:
    """Merge as a user would from Python."""
    options = MergeOptions(quiet=True, copy_tokenizer=False, random_seed=seed)
    run_merge(MergeConfiguration.model_validate(config), str(out), options, config_source=yaml.safe_dump(config))
