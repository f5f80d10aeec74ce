"""`merge_method: regmean`: its parameters, and how mergekit's tensors come to the closed form in `core.regmean`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Optional

import torch
from mergekit import merge_methods
from mergekit.merge_methods.base import (
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    TensorGroup,
)
from pydantic import AfterValidator
from torch import Tensor

from mergekit_pave.core.covariance import Covariance
from mergekit_pave.core.exact import in_float64
from mergekit_pave.core.failures import advising
from mergekit_pave.core.projection import matrices
from mergekit_pave.core.regmean import merge_changes, metric
from mergekit_pave.errors import PaveError, unknown
from mergekit_pave.names import REGMEAN


@dataclass(frozen=True)
class Layer:
    """A linear layer, or a stack of experts, whose weight regmean merges.

    Attributes:
        transposed: matrices are stored as (d_in, d_out).
        measured: for each matrix whether all models have its covariance; None where none is needed.
        covariance: gives the covariance of one model for one matrix, by the model's id and the matrix's number, where the tensors
            are. Each call reads it anew, because its tensor is overwritten.
    """

    transposed: bool = False
    measured: tuple[bool, ...] | None = None
    covariance: Callable[[Hashable, int], Covariance] | None = None


def data_share(covariance: float | None, has_base: bool) -> float:
    """The share of C in the metric. By default it is a half with a base model, and 1 without."""
    return covariance if covariance is not None else (0.5 if has_base else 1.0)


def check_baseless(share: float, scale: float, has_base: bool) -> None:
    """Refuse what has no meaning without a base model.

    Raises:
        PaveError: there is no base model, but the metric or lambda is about changes from one.
    """
    if not has_base and share < 1:
        raise PaveError(
            f"regmean: `covariance: {share:g}` weighs by what fine-tuning has changed, for which it needs a base_model; give the "
            "merge one, or set `covariance: 1`"
        )
    if not has_base and scale != 1:
        raise PaveError(f"regmean: `lambda: {scale:g}` scales the change from a base_model; give the merge one, or leave it out")


def check_weights(weights: Sequence[float], has_base: bool, name: str) -> None:
    """Refuse weights that leave nothing to merge.

    Args:
        weights: of the models, in the tensor `name`.

    Raises:
        PaveError: they are all 0, and there is no base model.
    """
    if not has_base and not any(weights):
        raise PaveError(
            f"regmean: every model's weight is 0 for {name}, and there is no base_model; give one of them a weight above 0"
        )


def _within(name: str, what: str, fits: Callable[[float], bool]) -> AfterValidator:
    def check(value: float | None) -> float | None:
        if value is not None and not fits(value):
            raise PaveError(f"regmean: `{name}` must be {what}, not {value:g}")
        return value

    return AfterValidator(check)


_FINITE = float("inf")


class RegMean(GroupMergeMethod):
    """The method as mergekit knows it. Tensors that are not weights of linear layers are merged as task_arithmetic does."""

    spec = MergeMethodSpec(
        name=REGMEAN,
        pretty_name="RegMean",
        reference_url="https://arxiv.org/abs/2212.09849",
        contract=InputContract(base=BasePolicy.OPTIONAL, min_non_base=1),
        parameters=(
            ParameterSpec(
                "weight",
                Annotated[Optional[float], _within("weight", "a number from 0 on", lambda x: 0 <= x < _FINITE)],
                ParameterScope.NON_BASE,
                default=None,
            ),
            ParameterSpec(
                "lambda",
                Annotated[float, _within("lambda", "a finite number", lambda x: -_FINITE < x < _FINITE)],
                ParameterScope.SHARED,
                default=1.0,
            ),
            ParameterSpec(
                "covariance",
                Annotated[Optional[float], _within("covariance", "a share from 0 to 1", lambda x: 0 <= x <= 1)],
                ParameterScope.SHARED,
                default=None,
            ),
            ParameterSpec(
                "reduce_off_diagonal",
                Annotated[float, _within("reduce_off_diagonal", "a factor, 0 < x <= 1", lambda x: 0 < x <= 1)],
                ParameterScope.SHARED,
                default=1.0,
            ),
        ),
    )

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        """Merge one tensor.

        A planned merge adds the parameter `layer`: a `Layer` for the weight of a linear layer, and None for any other tensor.
        Where the parameter is missing (`merge_state_dicts`, `mergekit-pytorch`) there are no covariances, and every matrix is
        taken for the weight of an `nn.Linear`. A weight of GPT-2's `Conv1D` would have to be transposed first.

        Beside the tensors and a few float64 copies of one matrix, (d_out, d_in), it takes at most 2.5 d_in^2 float64 numbers: the
        sum of the metrics, and a covariance while it is read. Where rounding has made the sum indefinite, eigenvectors are
        needed, and with LAPACK's workspace for them it takes about 4 d_in^2.

        Raises:
            PaveError: covariances are needed where there are none, the tensors do not fit, or memory runs out.
        """
        with advising(f"regmean: merging {group.metadata.name}", group.entries[0].tensor.device):
            return self._merge(group, parameters)

    def _merge(self, group: TensorGroup, parameters: dict[str, Any]) -> Tensor:
        models = group.non_base
        # By default all other tensors become the mean of the models. A common factor makes no difference to the closed form.
        weights = [1 / len(models) if weight is None else weight for weight in parameters["weight"].values_for(models)]
        scale, has_base = parameters["lambda"], group.base is not None
        share = data_share(parameters["covariance"], has_base)
        check_weights(weights, has_base, group.metadata.name)
        tensor = models[0].tensor
        if "layer" in parameters:
            layer = parameters["layer"]
        elif share > 0:
            raise PaveError(
                "regmean: covariances are measured by a merge with a `pave:` block only (mergekit-yaml, run_merge); set "
                "`covariance: 0`, which needs none"
            )
        else:
            layer = Layer() if looks_like_matrices(group, 2) else None
        check_baseless(share if layer else 1.0, scale, has_base)
        if layer is None:
            return task_arithmetic(group, weights, scale)
        views = [matrices(model.tensor, layer.transposed) for model in models]
        base = matrices(group.base.tensor, layer.transposed) if has_base else None
        measured = (True,) * len(views[0]) if share == 0 else layer.measured
        result = torch.empty_like(tensor) if all(measured) else task_arithmetic(group, weights, scale).clone()
        for i, out in enumerate(matrices(result, layer.transposed)):
            if not measured[i]:
                continue
            # What changes are measured from, (d_out, d_in): the base model, or else the mean.
            exact = (w * in_float64(view[i]) for w, view in zip(weights, views))
            start = in_float64(base[i]) if has_base else sum(exact) / sum(weights)

            def term(number: int, i: int = i, start: Tensor = start) -> tuple[float, Tensor, Tensor]:
                model = models[number]
                change = in_float64(views[number][i]) - start
                if not change.isfinite().all():
                    raise PaveError(f"regmean: {group.metadata.name} of {model.id}, or of the base, is not finite")
                covariance = layer.covariance(model.id, i) if share > 0 else None
                of_model = metric(change, covariance, share, parameters["reduce_off_diagonal"], overwrite=True)
                return weights[number], change, of_model

            merged = start + scale * merge_changes(map(term, range(len(models))))
            out.copy_(merged.to(out.dtype))
        return result


def check_names(method: MergeMethodSpec, given: Iterable[str]) -> None:
    """Refuse parameters that a method does not have, which mergekit would ignore.

    Raises:
        PaveError: naming the first, and the one that was probably meant.
    """
    names = [parameter.name for parameter in method.parameters]
    for name in given:
        if not names:
            raise PaveError(f"{method.name} has no parameters; remove {name!r}")
        if name not in names:
            raise PaveError(f"{method.name}: {unknown('parameter', name, names)}")


def looks_like_matrices(group: TensorGroup, dims: int) -> bool:
    """Whether a tensor has so many dimensions and holds matrices, as far as one can tell without the model."""
    name = group.metadata.name or ""
    tensor = group.entries[0].tensor
    return tensor.dim() == dims and group.metadata.vocabulary_axis is None and not name.endswith("bias")


def task_arithmetic(group: TensorGroup, weights: list[float], scale: float) -> Tensor:
    """What mergekit's own task_arithmetic makes of a tensor, or its `linear` where there is no base model."""
    shares = {model.id: weight for model, weight in zip(group.non_base, weights)}
    if group.base is None:
        return merge_methods.get("linear")((group,), parameters={"weight": shares})[0]
    return merge_methods.get("task_arithmetic")((group,), parameters={"weight": shares, "lambda": scale})[0]
