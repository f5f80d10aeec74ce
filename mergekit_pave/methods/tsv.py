"""`merge_method: tsv`: TSV-Merge (see `core.tsv`) on mergekit's tensors.

Matrices are merged by TSV-Merge. Where one tensor holds several experts, each of them is a matrix. For all other tensors
(norms, biases, convolutions) the changes are averaged, as in the paper, and so they are for vocabularies, which the paper does
not merge. A model's `weight` multiplies its change, and a model of weight 0 takes no part.
"""

from __future__ import annotations

from typing import Any

import torch
from mergekit.merge_methods.base import (
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    TensorEntry,
    TensorGroup,
)
from torch import Tensor

from mergekit_pave.core.exact import in_float64
from mergekit_pave.core.failures import advising
from mergekit_pave.core.tsv import merge_changes
from mergekit_pave.errors import PaveError
from mergekit_pave.methods.regmean import looks_like_matrices, task_arithmetic
from mergekit_pave.names import TSV


class Tsv(GroupMergeMethod):
    """The method as mergekit knows it."""

    spec = MergeMethodSpec(
        name=TSV,
        pretty_name="TSV-Merge",
        reference_url="https://arxiv.org/abs/2412.00081",
        contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
        parameters=(
            ParameterSpec("weight", float, ParameterScope.NON_BASE, default=1.0),
            ParameterSpec("lambda", float, ParameterScope.SHARED, default=1.0),
        ),
    )

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        """Merge one tensor.

        Raises:
            PaveError: a value is not finite, or memory runs out.
        """
        with advising(f"tsv: merging {group.metadata.name}", group.base.tensor.device):
            return self._merge(group, parameters)

    def _merge(self, group: TensorGroup, parameters: dict[str, Any]) -> Tensor:
        base, scale = group.base.tensor, parameters["lambda"]
        weights = parameters["weight"].values_for(group.non_base)
        taking_part = [(model, weight) for model, weight in zip(group.non_base, weights) if weight]
        if not _holds_matrices(group) or not taking_part:
            return task_arithmetic(group, [weight / max(1, len(taking_part)) for weight in weights], scale)
        result = torch.empty_like(base)
        slices = [()] if base.dim() == 2 else [(i,) for i in range(len(base))]
        for at in slices:
            start = in_float64(base[at])

            def change(entry: tuple[TensorEntry, float], at: tuple = at, start: Tensor = start) -> Tensor:
                model, weight = entry
                weighted = weight * (in_float64(model.tensor[at]) - start)
                if not weighted.isfinite().all():
                    raise PaveError(f"tsv: {group.metadata.name} of {model.id}, or of the base, is not finite")
                return weighted

            merged = start + scale * merge_changes(map(change, taking_part), len(taking_part))
            result[at] = merged.to(result.dtype)
        return result


def _holds_matrices(group: TensorGroup) -> bool:
    """Whether a tensor is a matrix, or a stack of experts' matrices. A convolution's kernel has three dimensions, too."""
    name = group.metadata.name or ""
    return looks_like_matrices(group, 2) or (looks_like_matrices(group, 3) and ("expert" in name or "moe" in name))
