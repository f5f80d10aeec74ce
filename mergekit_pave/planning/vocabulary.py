"""How tensors of the vocabulary are merged, and why each other one is left to the merge method."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Optional

from mergekit.common import ModelReference

from mergekit_pave.calibration.counts import TokenCounts, conflict
from mergekit_pave.calibration.stored import stored_covariances
from mergekit_pave.calibration.token_rows import PREDICTED
from mergekit_pave.config import PaveConfig
from mergekit_pave.core.vocabulary import seen, shares
from mergekit_pave.errors import PaveError
from mergekit_pave.planning.calibration import PlannedCalibration
from mergekit_pave.planning.merge import Merge, PlannedTensor
from mergekit_pave.planning.names import own_names
from mergekit_pave.planning.source import Source
from mergekit_pave.planning.warnings import BETWEEN_TWO
from mergekit_pave.tasks.vocabulary import Heads, Rows


@dataclass(frozen=True)
class Vocabulary:
    """What is merged by data.

    Attributes:
        rows: what is merged by token counts, by the output tensor's number.
        heads: likewise what is merged by predictions.
        report: its part of the report; None where counts are not wanted.
    """

    rows: dict[int, Rows]
    heads: dict[int, Heads]
    report: Optional[dict[str, Any]]


def models_to_count(config: PaveConfig, merge: Merge) -> list[ModelReference]:
    """The models whose tokens are to be counted, whether they are purified or not."""
    wanted = [tensor for tensor in merge.tensors if _is_wanted(config, tensor)]
    models = dict.fromkeys(model for tensor in wanted for model in tensor.fine_tuned)
    return [model for model in models if (entry := config.listed(model)) and (entry.data or entry.covariance)]


def plan_vocabulary(
    config: PaveConfig,
    merge: Merge,
    sources: dict[ModelReference, Source],
    calibrations: dict[ModelReference, PlannedCalibration],
) -> Vocabulary:
    """
    Raises:
        PaveError: counts are asked for, but no tensor can be merged by them.
    """
    if not any(_is_wanted(config, tensor) for tensor in merge.tensors):
        return Vocabulary({}, {}, None)
    counts = {model: calibration.counts for model, calibration in calibrations.items() if calibration.counts}
    tensors = [_Tensor(planned, _parameters(planned, sources), sources) for planned in merge.tensors]
    rows: dict[int, Rows] = {}
    heads: dict[int, Heads] = {}
    report: dict[str, Any] = {"merged": [], "left": {}}
    for number, tensor in enumerate(tensors):
        if not _is_wanted(config, tensor.planned) or not tensor.has_vocabulary:
            continue
        reason = _reason(tensor, tensors, merge.method) or _missing_counts(tensor.planned, counts)
        if reason:
            report["left"][tensor.planned.name] = reason
            continue
        made = _rows_of(config, tensor, counts)
        fits = config.merges_vocabulary(tensor.planned.data_share) == "fit" and tensor.is_output
        if fits and all(_measures_head(calibrations[model]) for model in made.counts):
            heads[number] = _heads_of(tensor, made, calibrations)
        else:
            rows[number] = made
        report["merged"].append(_row_of_report(tensor.planned.name, made, number in heads))
    if config.vocabulary in ("fit", "counts") and not rows and not heads:
        why = "; ".join(f"{name} is left to {merge.method} ({reason})" for name, reason in report["left"].items())
        raise PaveError(f"pave.vocabulary: nothing can be merged by data: {why or 'no tensor has rows for tokens'}")
    return Vocabulary(rows, heads, report if report["merged"] or report["left"] else None)


@dataclass(frozen=True)
class _Tensor:
    """An output tensor.

    Attributes:
        parameters: by model, the name of its parameter in transformers. Models without a source have none.
    """

    planned: PlannedTensor
    parameters: dict[ModelReference, str]
    sources: dict[ModelReference, Source]

    @property
    def uses(self) -> tuple[str, ...]:
        """See `find_token_rows`; empty if it has no rows for tokens."""
        return next((self.uses_in(model) for model in self.parameters), ())

    @property
    def is_head(self) -> bool:
        return any(name in self.sources[model].architecture.heads for model, name in self.parameters.items())

    @property
    def is_output(self) -> bool:
        """Whether it is the head of a language model, or tied with it, in all models."""
        heads = {model: self.sources[model].architecture.head for model in self.parameters}
        rows = {model: self.sources[model].architecture.token_rows for model in self.parameters}
        return all(head and rows[model].get(f"{head}.weight") == self.uses_in(model) for model, head in heads.items())

    @property
    def has_vocabulary(self) -> bool:
        gather = self.planned.gather
        return bool(self.uses) or gather is None or any(info.vocabulary_axis is not None for info in gather.weight_info.values())

    def uses_in(self, model: ModelReference) -> tuple[str, ...]:
        return self.sources[model].architecture.token_rows.get(self.parameters[model], ())

    def num_rows(self, model: ModelReference) -> int:
        return self.sources[model].architecture.weights[self.parameters[model]][0]


def _is_wanted(config: PaveConfig, planned: PlannedTensor) -> bool:
    return config.merges_vocabulary(planned.data_share) != "method"


def _parameters(planned: PlannedTensor, sources: dict[ModelReference, Source]) -> dict[ModelReference, str]:
    names = {}
    for model in planned.fine_tuned:
        own = list(own_names(planned.gather.weight_info[model])) if planned.gather else [planned.name]
        if model in sources and (name := sources[model].architecture.weight_name(own)):
            names[model] = name
    return names


def _reason(tensor: _Tensor, others: list[_Tensor], method: str) -> Optional[str]:
    """Why a vocabulary tensor is not merged by counts, as far as that is not for want of them."""
    planned, uses = tensor.planned, tensor.uses
    if not uses:
        return "neither a token embedding nor the head of a language model"
    if any(other.uses == uses and other.is_head != tensor.is_head for other in others):
        return "stored twice, as an embedding and as a head that is tied with it"
    if planned.gather is None:
        return "rearranged by mergekit to fit another vocabulary"
    if any(info.optional or info.vocabulary_axis for info in planned.gather.weight_info.values()):
        return "not stored in every model with a row for each token"
    if len({tensor.num_rows(model) for model in tensor.parameters}) > 1:
        return "of different sizes in the models"
    if method in BETWEEN_TWO:
        return f"the base model is one of the two that {method} merges"
    if not planned.has_base and planned.data_share is None:
        return "there is no base model"
    if lowest := next((model for model, weight in planned.weights.items() if not weight >= 0), None):
        return f"a weight is below 0 ({lowest})"
    if not any(planned.weights.values()):
        return "every weight is 0"
    return None


def _missing_counts(planned: PlannedTensor, counts: dict[ModelReference, TokenCounts]) -> Optional[str]:
    for model in planned.fine_tuned:
        if model not in counts:
            return f"no tokens were counted for one of the models ({model})"
    for one, other in itertools.combinations(planned.fine_tuned, 2):
        token = conflict(counts[one], counts[other])
        if token is not None:
            return f"a token id stands for different tokens ({token} in {one} and {other})"
    return None


def _rows_of(config: PaveConfig, tensor: _Tensor, counts: dict[ModelReference, TokenCounts]) -> Rows:
    planned = tensor.planned
    of_models = {model: counts[model].of(tensor.uses_in(model), tensor.num_rows(model)) for model in planned.fine_tuned}
    if not planned.has_base:
        return Rows(None, of_models, planned.weights, 1.0)
    return Rows(planned.base, of_models, planned.weights, config.refinement.lambda_ if config.refinement else planned.scale)


def _measures_head(calibration: PlannedCalibration) -> bool:
    if calibration.job:
        return calibration.job.architecture.head is not None
    return stored_covariances(str(calibration.folder)).head is not None


def _heads_of(tensor: _Tensor, rows: Rows, calibrations: dict[ModelReference, PlannedCalibration]) -> Heads:
    return Heads(
        base=rows.base,
        weights={model: weight for model, weight in rows.weights.items() if weight > 0},
        folders={model: str(calibrations[model].folder) for model in rows.counts},
        embedded=None if PREDICTED in tensor.uses else {model: shares(counts) for model, counts in rows.counts.items()},
        scale=rows.scale,
    )


def _row_of_report(name: str, rows: Rows, is_fitted: bool) -> dict[str, Any]:
    shown = seen(list(rows.counts.values()), [rows.weights[model] for model in rows.counts])
    return {
        "tensor": name,
        "rows": len(shown),
        "shown": len(shown) if is_fitted else int(shown.sum()),
        "tokens": {str(model): int(of_model.sum()) for model, of_model in rows.counts.items()},
        "lambda": rows.scale,
        "by": "predictions" if is_fitted else "counts",
    }
