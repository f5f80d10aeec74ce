"""A tensor of the vocabulary, of which the rows that calibration data shows are merged by token counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from mergekit.common import ModelReference
from mergekit.graph import Task
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from pydantic import InstanceOf
from torch import Tensor

from mergekit_pave.core.failures import advising
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
