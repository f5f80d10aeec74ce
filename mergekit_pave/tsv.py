"""`merge_method: tsv`: Task Singular Vectors (TSV-Merge; Gargiulo et al., arXiv 2412.00081).

Of the change D_i = W_i - W_base of each of M models only the largest 1/M of its singular triplets are kept, so that all of
them together fill the space once. Side by side the vectors of different tasks still overlap; they are replaced by the
nearest orthonormal ones before the triplets are summed:

    D_i ~ U_i S_i V_i^T,   W = W_base + lambda [U_1 .. U_M]' diag(S_1 .. S_M) [V_1 .. V_M]'^T,   X' = P Q^T for X = P S Q^T

Matrices are treated so, and experts that lie in one tensor each on its own. Of all other tensors (norms, biases,
convolutions; and vocabularies, of which the paper merges none) the changes are averaged, as in the paper. A model's `weight`
multiplies its change, and one of weight 0 takes no part. It is float64 throughout: where two tasks are much alike, the
nearest orthonormal vectors magnify rounding by the inverse of the angle between them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
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

from mergekit_pave import _methods
from mergekit_pave.errors import PaveError
from mergekit_pave.exact import in_float64
from mergekit_pave.failures import advising
from mergekit_pave.regmean import looks_like_matrices, task_arithmetic

_EPS = torch.finfo(torch.float64).eps


def merge_changes(changes: Iterable[Tensor], models: int) -> Tensor:
    """The merged change of one matrix, (d_out, d_in) float64.

    Args:
        changes: of each model, (d_out, d_in) float64. Each is let go before the next is taken: what is kept of all models
            together is no more than one decomposition, however many there are.
        models: M, how many there are.
    """
    lefts, values, rights = zip(*map(functools.partial(_leading, models=models), changes))
    return (_orthonormal(torch.cat(lefts, dim=1)) * torch.cat(values)) @ _orthonormal(torch.cat(rights, dim=1)).mT


def _leading(change: Tensor, models: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest 1/M of the singular triplets of a (d_out, d_in) matrix: (d_out, k), (k,), (d_in, k)."""
    left, value, right = torch.linalg.svd(change, full_matrices=False)
    # Vectors of a value that is zero are arbitrary, and would push aside those of other tasks.
    count = min(max(1, min(change.shape) // models), _rank(value, change))
    # Copies: a view would keep all of the vectors.
    return left[:, :count].clone(), value[:count], right[:count].mT.clone()


def _orthonormal(vectors: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns; where columns depend on each other, the one on the space that they span."""
    left, value, right = torch.linalg.svd(vectors, full_matrices=False)
    count = _rank(value, vectors)
    return left[:, :count] @ right[:count]


def _rank(values: Tensor, matrix: Tensor) -> int:
    """How many singular values of a matrix are more than rounding."""
    return int((values > values.max() * max(matrix.shape) * _EPS).sum()) if len(values) else 0


class Tsv(GroupMergeMethod):
    """The method as mergekit knows it."""

    spec = MergeMethodSpec(
        name="tsv",
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
                found = weight * (in_float64(model.tensor[at]) - start)
                if not found.isfinite().all():
                    raise PaveError(f"tsv: {group.metadata.name} of {model.id}, or of the base, is not finite")
                return found

            merged = start + scale * merge_changes(map(change, taking_part), len(taking_part))
            result[at] = merged.to(result.dtype)
        return result


def _holds_matrices(group: TensorGroup) -> bool:
    """Whether a tensor is a matrix, or a stack of those of experts: a kernel of a convolution has three dimensions, too."""
    name = group.metadata.name or ""
    return looks_like_matrices(group, 2) or (looks_like_matrices(group, 3) and ("expert" in name or "moe" in name))


_methods.add()  # where this module was imported before mergekit
