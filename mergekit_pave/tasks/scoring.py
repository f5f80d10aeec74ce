"""Scoring merges: experts and base model run once over held-out rows, each merge is run and compared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor

from mergekit_pave import cache
from mergekit_pave.calibration.architecture import Architecture
from mergekit_pave.calibration.forms import Places
from mergekit_pave.calibration.held_out import Rows
from mergekit_pave.calibration.job import Runtime
from mergekit_pave.calibration.models import inference_dtype
from mergekit_pave.calibration.recorded import Comparison, Record, Reference
from mergekit_pave.calibration.scoring import run_over
from mergekit_pave.calibration.subjects import Stored, Subject, Weights, WithHead
from mergekit_pave.core.score import Distances
from mergekit_pave.report.score import Scored, summarise

_FILE = "recorded.safetensors"


@dataclass(frozen=True)
class Model:
    """A merged model, or the base model.

    Attributes:
        name: for messages.
        identity: a key that differs between models.
        restored: of a merge by `emr` what each expert's model is restored to, by the expert's name.
    """

    name: str
    cls: Any
    config: transformers.PretrainedConfig
    weights: Weights
    identity: str
    restored: dict[str, Model] = field(default_factory=dict)


@dataclass(frozen=True)
class Expert:
    """An expert with held-out rows of its data.

    Attributes:
        name: the model's name.
        folder: of its checkpoint.
        tokenizer: that the rows were made with, or an image processor.
        key: of what it gives on the rows, in the cache.
        drawn: how the rows of its covariances are drawn, as reports have it: `data`, `samples` and `seed`.
    """

    name: str
    folder: str
    config: transformers.PretrainedConfig
    architecture: Architecture
    tokenizer: Any
    rows: Rows
    key: str
    drawn: dict[str, Any]

    @property
    def subject(self) -> Subject:
        return Subject(self.name, self.architecture.cls, self.config, Stored(self.folder))

    def subject_of(self, model: Model) -> Subject:
        """Another model, with this expert's head unless the head is merged, too."""
        if self.rows.form.is_language_model:
            return Subject(model.name, model.cls, model.config, model.weights)
        config, vocabulary = self.config, getattr(model.config.get_text_config(), "vocab_size", None)
        if vocabulary != getattr(config.get_text_config(), "vocab_size", None):
            config = copy.deepcopy(config)
            config.get_text_config().vocab_size = vocabulary
        weights = WithHead(model.weights, Stored(self.folder), self.architecture)
        return Subject(model.name, self.architecture.cls, config, weights)


@dataclass(frozen=True)
class Scoring:
    """What merges of some experts are scored with.

    Attributes:
        base: the model that counts as 0 %.
        experts: at least one, all of one form.
        folder: the cache.
    """

    base: Model
    experts: list[Expert]
    folder: Path
    runtime: Runtime

    def prepare(self) -> None:
        """Run the experts and the base model, unless the cache has what they give.

        Raises:
            PaveError: a model cannot be run.
        """
        for expert in self.experts:
            self._references(expert)

    def score(self, merged: Model) -> dict[str, Any]:
        """The score of a merge, as JSON: see `report.score`. What has been scored is not scored again.

        Raises:
            PaveError: a model cannot be run.
        """
        references = [self._references(expert) for expert in self.experts]
        rows = [expert.rows for expert in self.experts]

        def run() -> dict[str, Tensor]:
            records = [Record(of, Comparison(*pair), keeps=False) for of, pair in zip(rows, references)]
            if rows[0].form.is_language_model and not merged.restored:
                work = [(of, record.take) for of, record in zip(rows, records)]
                run_over(self.experts[0].subject_of(merged), work, self.runtime)
            else:
                for expert, record in zip(self.experts, records):
                    model = merged.restored.get(expert.name, merged)
                    run_over(expert.subject_of(model), [(expert.rows, record.take)], self.runtime)
            found = {f"{i}.{name}": values for i, record in enumerate(records) for name, values in record.by_row().items()}
            # Drift is what a model does on rows of others, and a restored one is for its own.
            return {name: values for name, values in found.items() if not merged.restored or not name.endswith(".drift")}

        tensors = self._recorded("score", self._score_key(merged.identity), merged.name, rows, run)
        return self._summarise(tensors, references) | ({"restored": True} if merged.restored else {})

    def stored(self, identity: str) -> dict[str, Any] | None:
        """The score of the model with this identity, if the cache has it."""
        artefact = cache.Artefact(self.folder / "score" / self._score_key(identity))
        tensors = _read(artefact)
        return tensors and self._summarise(tensors, [self._references(expert) for expert in self.experts])

    def _score_key(self, identity: str) -> str:
        return cache.key("score", identity, [(expert.key, self._base_key(expert)) for expert in self.experts])

    def _summarise(self, tensors: dict[str, Tensor], references: list[tuple[Reference, Reference]]) -> dict[str, Any]:
        scored = {}
        for i, (expert, (own, base)) in enumerate(zip(self.experts, references)):
            of_merged = {name.removeprefix(f"{i}."): v for name, v in tensors.items() if name.startswith(f"{i}.")}
            scored[expert.name] = _scored(expert.rows, of_merged, own.by_row, base.by_row)
        return summarise(self.base.name, scored)

    def _references(self, expert: Expert) -> tuple[Reference, Reference]:
        """What the expert and the base model give on the expert's rows."""
        own = self._reference(expert, expert.key, expert.subject)
        return own, self._reference(expert, self._base_key(expert), expert.subject_of(self.base), Comparison(own))

    def _base_key(self, expert: Expert) -> str:
        return cache.key("predictions", expert.key, self.base.identity)

    def _reference(self, expert: Expert, key: str, subject: Subject, compares: Comparison | None = None) -> Reference:
        def run() -> dict[str, Tensor]:
            record = Record(expert.rows, compares)
            run_over(subject, [(expert.rows, record.take)], self.runtime)
            return record.tensors

        tensors = self._recorded("predictions", key, subject.name, [expert.rows], run)
        record = Record(expert.rows, compares)
        record.tensors = tensors
        return Reference(tensors, record.by_row())

    def _recorded(
        self, kind: str, key: str, model: str, rows: list[Rows], run: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """What the cache has under a key, or what running a model gives, which is then in the cache."""
        artefact = cache.Artefact(self.folder / kind / key)
        if (tensors := _read(artefact)) is not None:
            return tensors
        with artefact.lock():
            if _read(artefact) is None:  # another process may have made it meanwhile
                with artefact.discarded_on_error():
                    files = {_FILE: artefact.write(_FILE, run())}
                    about = {
                        "model": model,
                        "rows": sum(len(of.encoded) for of in rows),
                        "places": sum(len(of.row_of) for of in rows),
                        "dtype": str(inference_dtype(self.experts[0].config, self.runtime.device)).removeprefix("torch."),
                    }
                    artefact.complete({"files": files, **about})
            return artefact.read(_FILE)


def _read(artefact: cache.Artefact) -> dict[str, Tensor] | None:
    """What has been recorded, or None if the cache does not have it, or it is damaged. Then it is made anew."""
    try:
        return artefact.read(_FILE)
    except cache.DamagedError:
        return None


def _scored(rows: Rows, merged: dict[str, Tensor], own: dict[str, Tensor], base: dict[str, Tensor]) -> Scored:
    has_loss = rows.form.is_generative and sum(rows.bytes) > 0
    places = rows.form.places
    return Scored(
        place="row" if places is Places.NOWHERE else "label" if rows.form.labels > 1 else places.value.removesuffix("s"),
        places=len(rows.row_of),
        distances=Distances(merged["divergence"], base["divergence"]),
        agreed=merged.get("agreed"),
        nats={"merged": merged["nats"], "expert": own["nats"], "base": base["nats"]} if has_loss else None,
        drift=merged.get("drift"),
        num_bytes=sum(rows.bytes),
    )
