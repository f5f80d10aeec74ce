"""Tensors of the vocabulary merged by data: rows by token counts, and heads of language models by what models predict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from mergekit.common import ModelReference
from mergekit.graph import Task
from mergekit.io.tasks import GatherTensors
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from pydantic import InstanceOf
from torch import Tensor

from mergekit_pave.calibration.stored import stored_covariances
from mergekit_pave.core.failures import advising
from mergekit_pave.core.head import Head, merge_heads
from mergekit_pave.core.vocabulary import merge_rows
from mergekit_pave.errors import PaveError


@dataclass(frozen=True, eq=False)
class Rows:
    """What rows are merged by.

    Attributes:
        base: the model that changes are measured from, if there is one.
        counts: of each model how often its samples have each row, int64 (V,).
        weights: of each model, from 0 on and not all 0.
        scale: λ.
    """

    base: Optional[ModelReference]
    counts: dict[ModelReference, Tensor]
    weights: dict[ModelReference, float]
    scale: float


class MergeRows(Task[Optional[Tensor]]):
    """The tensor that `merged` gives, with some rows merged by counts.

    Attributes:
        merged: mergekit's task, or that of `regmean`.
    """

    merged: ExecuteMergeMethodTask
    rows: InstanceOf[Rows]

    def __hash__(self) -> int:
        return hash((MergeRows, self.merged.output_weight.name))

    def arguments(self) -> dict[str, Task]:
        return {"merged": self.merged, "tensors": self.merged.gather_tensors}

    def group_label(self) -> Optional[str]:
        return self.merged.group_label()

    def uses_accelerator(self) -> bool:
        return True

    def execute(self, merged: Optional[Tensor], tensors: dict[ModelReference, Tensor]) -> Optional[Tensor]:
        """
        Raises:
            PaveError: a model's tensor is not that of the architecture, or memory runs out.
        """
        name, rows = self.merged.output_weight.name, self.rows
        for model, counts in rows.counts.items():
            if len(tensors[model]) != len(counts):
                raise PaveError(f"{model}: {name} has {len(tensors[model])} rows, but its config.json speaks of {len(counts)}")
        with advising(f"merging {name} by token counts", merged.device):
            result = merged.clone()  # it may be one of the inputs
            merge_rows(
                tensors[rows.base] if rows.base else None,
                [tensors[model] for model in rows.counts],
                list(rows.counts.values()),
                [rows.weights[model] for model in rows.counts],
                rows.scale,
                out=result,
            )
        return result


@dataclass(frozen=True, eq=False)
class Heads:
    """What a head is merged by.

    Attributes:
        base: the model that changes are measured from; None for the weighted mean of all.
        weights: of each model that takes part, above 0.
        folders: of each model's covariances.
        embedded: of each model the share of each token, float64 (V,); None for a head that is not the token embedding.
        scale: λ.
    """

    base: Optional[ModelReference]
    weights: dict[ModelReference, float]
    folders: dict[ModelReference, str]
    embedded: Optional[dict[ModelReference, Tensor]]
    scale: float


class MergeHeads(Task[Tensor]):
    """The head of a language model, in the place of mergekit's task that would merge it."""

    name: str
    gather: GatherTensors
    heads: InstanceOf[Heads]

    def __hash__(self) -> int:
        return hash((MergeHeads, self.name))

    def arguments(self) -> dict[str, Task]:
        return {"tensors": self.gather}

    def group_label(self) -> Optional[str]:
        return self.gather.group_label()

    def uses_accelerator(self) -> bool:
        return True

    def execute(self, tensors: dict[ModelReference, Tensor]) -> Tensor:
        """
        Raises:
            PaveError: a model's tensor is not that of the architecture, or memory runs out.
        """
        heads, parts = self.heads, []
        first = next(iter(tensors.values()))
        with advising(f"merging {self.name} by what the models predict", first.device):
            for model, weight in heads.weights.items():
                stored, tensor = stored_covariances(heads.folders[model]), tensors[model]
                if stored.head is None:
                    raise PaveError(
                        f"{model}: its samples do not show what it predicts, as its head was not reached or gave scores that are "
                        "not finite. Look at the samples, or set pave.vocabulary: counts"
                    )
                predicted, covariance = stored.predicted(), stored.load([stored.head])
                if tensor.shape != (len(predicted), covariance.dim):
                    raise PaveError(
                        f"{model}: {self.name} is a tensor of shape {tuple(tensor.shape)}, but its covariances are those of a "
                        f"head of shape {(len(predicted), covariance.dim)}"
                    )
                embedded = heads.embedded and heads.embedded[model]
                parts.append(Head(weight, tensor, covariance.unscaled(), predicted, embedded))
            total = sum(heads.weights.values())
            base = tensors[heads.base] if heads.base else sum(part.share / total * part.weight.float() for part in parts)
            merged = merge_heads(base, parts, heads.scale).to(first.dtype)
        if not merged.isfinite().all():
            raise PaveError(f"merging {self.name} gives values that are not finite. Look for NaN in the models' weights")
        return merged
