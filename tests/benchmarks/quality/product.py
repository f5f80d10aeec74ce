"""Held-out rows scored with `mergekit_pave.plugin.scoring`, as `mergekit-pave score` does it."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from decoder import Decoder
from encoder import Encoder
from likeness import Rows, held_out
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from merging import Family
from transformers import AutoConfig, AutoTokenizer, BertForTokenClassification, PreTrainedModel

from mergekit_pave.plugin.scoring import plan_scoring


def product(family: Family, seed: int, drawn: int, rows: int) -> Product:
    """What scores merges of one seed's fine-tunes.

    Args:
        drawn: rows of each model that are in C.
        rows: so many others are scored with.
    """
    folder = family.base.parent / "scored"
    if isinstance(family, Decoder):
        models = {task: family.tuned(seed, task) for task in family.tasks}
    else:
        models = with_heads(family, seed, folder / "heads")
    return Product(family, seed, folder / "cache" / f"seed{seed}", models, drawn, rows)


class Product:
    """Gives distances by task and row, under the name "product"."""

    def __init__(self, family: Family, seed: int, cache: Path, models: dict[str, Path], drawn: int, rows: int):
        """
        Args:
            models: by task, and the base model where it is not the family's.
        """
        self._models = models
        self._tokenizer = AutoTokenizer.from_pretrained(family.base)
        config = {
            "merge_method": "task_arithmetic",
            "base_model": str(models.get("base", family.base)),
            "models": [{"model": str(models[task])} for task in family.tasks],
            "dtype": "float32",
            "pave": {
                "cache_dir": str(cache),
                "calibration": {"samples": drawn, "max_length": family.max_length, "seed": seed},
                "models": [
                    {"model": str(models[task]), "data": {"path": str(family.calibration(task)), "text": "text"}}
                    for task in family.tasks
                ],
            },
        }
        self.scorer = plan_scoring(MergeConfiguration.model_validate(config), MergeOptions(quiet=True), rows)
        self._orders = {}
        for task, expert in zip(family.tasks, self.scorer.scoring.experts):
            numbers = [int(re.match(r"row (\d+) ", sample.origin)[1]) for sample in expert.rows.encoded]
            self._orders[task] = [numbers.index(number) for number in held_out(family, seed, task, drawn, rows)]

    def __call__(self, merged: Path) -> Rows:
        self._make_ready(merged)
        models = self.scorer.score(merged)["models"]
        found = {}
        for task, order in self._orders.items():
            distances = models[str(self._models[task])]["by_row"]["merged"]
            found[task] = {"product": [distances[i] for i in order]}
        return found

    def _make_ready(self, merged: Path) -> None:
        LoaderCache().loaders.clear()  # it may have opened another merge that was in this folder
        if not (merged / "tokenizer.json").exists():  # mergekit would have copied it
            self._tokenizer.save_pretrained(merged)

    def seconds(self, merged: Path, rounds: int) -> dict[str, list[float]]:
        """Processor seconds of scoring a merge when the experts' predictions are there, and of what transformers alone takes.

        In turn: scored with everything around it; scored once it is opened; loaded; and run over the same batches.
        """
        self._make_ready(merged)
        scoring = self.scorer.scoring
        scoring.prepare()
        found = {"score": [], "score, opened": [], "load": [], "run": []}
        for _ in range(rounds):
            for what in ("score", "score, opened"):
                shutil.rmtree(scoring.folder / "score", ignore_errors=True)
                model = self.scorer.open(merged)
                with timed(found[what]):
                    self.scorer.score(merged) if what == "score" else scoring.score(model)
            with timed(found["load"]):
                loaded = type_of(merged).from_pretrained(merged, dtype=torch.float32).eval()
            batches = [batch for expert in scoring.experts for batch, _ in expert.rows.batches(False, "cpu")]
            with timed(found["run"]), torch.inference_mode():
                for batch in batches:
                    loaded(**batch.inputs)
        return found


def type_of(folder: Path) -> type[PreTrainedModel]:
    return getattr(transformers, AutoConfig.from_pretrained(folder).architectures[0])


@contextmanager
def timed(found: list[float]) -> Iterator[None]:
    start = time.process_time()
    yield
    found.append(time.process_time() - start)


def with_heads(family: Encoder, seed: int, folder: Path) -> dict[str, Path]:
    """Copies of the fine-tunes whose token classifier is their own head, and of the base model, by task.

    All have as many classes; those that a task does not have are never predicted.
    """
    most = max(task.classes for task in family.tasks.values())
    copies = {}
    for name in ("base", *family.tasks):
        source = family.base if name == "base" else family.tuned(seed, name)
        copies[name] = folder / f"seed{seed}" / name
        if (copies[name] / "model.safetensors").exists():
            continue
        model = BertForTokenClassification.from_pretrained(source, num_labels=most, ignore_mismatched_sizes=True)
        with torch.no_grad():
            model.classifier.weight.zero_()
            model.classifier.bias.fill_(-1e4)
            if name != "base":
                head = torch.load(source / "head.pt")
                model.classifier.weight[: len(head["weight"])] = head["weight"]
                model.classifier.bias[: len(head["bias"])] = head["bias"]
        AutoTokenizer.from_pretrained(source).save_pretrained(copies[name])
        model.save_pretrained(copies[name])
    return copies
