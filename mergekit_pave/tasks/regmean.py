"""Merging one output tensor by `regmean`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Optional

from mergekit.common import ImmutableMap, ModelReference
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from torch import Tensor

from mergekit_pave.calibration.stored import stored_covariances
from mergekit_pave.core.covariance import Covariance
from mergekit_pave.core.exact import float64_device
from mergekit_pave.core.linear import Linear
from mergekit_pave.core.reasons import FEW_TOKENS, NEVER_CALLED
from mergekit_pave.core.regmean import alignment
from mergekit_pave.errors import PaveError
from mergekit_pave.methods.regmean import Layer, data_share


@dataclasses.dataclass(frozen=True)
class MeasuredLayer:
    """A model whose covariances are part of the metric.

    Attributes:
        folder: of its covariances.
        layer: the layer in this model. In a frankenmerge it may have another name than in the others.
        min_tokens: tokens that an expert must have seen.
    """

    model: ModelReference
    folder: str
    layer: Linear
    min_tokens: int


@dataclasses.dataclass(frozen=True)
class ClosedForm:
    """How regmean merges the weight of a linear layer.

    Attributes:
        layer: the layer, in any of the models.
        measured: the models whose covariances are part of the metric.
        alignments: where there is a report, the merge fills in what `core.regmean.alignment` says of each model.
    """

    layer: Linear
    measured: tuple[MeasuredLayer, ...] = ()
    alignments: Optional[dict[str, Optional[float]]] = dataclasses.field(default=None, compare=False)


class MergeByRegMean(ExecuteMergeMethodTask):
    """mergekit's task for an output tensor, which also gives `regmean` the layer that the tensor is the weight of.

    Attributes:
        form: None for a tensor that is merged as task_arithmetic does.
    """

    form: Optional[ClosedForm]

    def __hash__(self) -> int:
        return hash((MergeByRegMean, self.output_weight.name))

    def execute(self, tensors: dict[ModelReference, Tensor]) -> Optional[Tensor]:
        parameters = {**dict(self.parameters.items()), "layer": self.form and self._layer(tensors)}
        complete = self.model_copy(update={"parameters": ImmutableMap(data=parameters)})
        merged = ExecuteMergeMethodTask.execute(complete, tensors)
        if self.form and self.form.alignments is not None and self.base_model in tensors:
            for model, tensor in tensors.items():
                if model != self.base_model:
                    self.form.alignments[str(model)] = alignment(merged, tensor, tensors[self.base_model])
        return merged

    def _layer(self, tensors: dict[ModelReference, Tensor]) -> Layer:
        """
        Raises:
            PaveError: a tensor is not that of the layer.
        """
        layer = self.form.layer
        for model, tensor in tensors.items():
            if tensor.shape != layer.stored_shape:
                raise PaveError(
                    f"{model}: {self.output_weight.name} is a tensor of shape {tuple(tensor.shape)}, but the layer "
                    f"{layer.module} of the architecture has one of {layer.stored_shape}; regmean cannot merge it"
                )
        stored = {of.model: (stored_covariances(of.folder), of.layer.layers) for of in self.form.measured}

        device = float64_device(next(iter(tensors.values())).device)

        def covariance(model: ModelReference, i: int) -> Covariance:
            covariances, names = stored[model]
            return covariances.load(names[i], device)

        measured = tuple(reason is None for reason in self._reasons()) if stored else None
        return Layer(layer.transposed, measured, covariance)

    def _reasons(self) -> list[Optional[str]]:
        """For each matrix, why it cannot be merged with covariances: a model lacks one. None where all models have one."""
        reasons: list[Optional[str]] = [None] * len(self.form.layer.layers)
        for of in self.form.measured:
            stored = stored_covariances(of.folder)
            for i, names in enumerate(of.layer.layers):
                tokens = stored.tokens(names)
                if tokens < max(1, of.min_tokens) and reasons[i] is None:
                    has_experts = bool(of.layer.experts)
                    reasons[i] = f"{FEW_TOKENS} ({tokens}, {of.model})" if has_experts else f"{NEVER_CALLED} ({of.model})"
        return reasons

    def report(self) -> tuple[Optional[dict[str, Any]], dict[str, str], list[tuple[Optional[str], int]]]:
        """What the report says once the tensor is merged.

        Returns:
            The tensor's row, None where no matrix is merged in closed form; the matrices that are merged as task_arithmetic
            does, with the reason; and of each matrix the reason, if there is one, and its size.
        """
        name, layer, reasons = self.output_weight.name, self.form.layer, self._reasons()
        row = {
            "tensor": name,
            "covariance": data_share(self.parameters["covariance"], self.base_model is not None),
            "lambda": self.parameters["lambda"],
            "reduce_off_diagonal": self.parameters["reduce_off_diagonal"],
            "alignment": dict(self.form.alignments or {}),
        }
        matrices = [f"{name}[{expert}]" for expert in layer.experts] if layer.stacked else [name]
        others = {matrix: reason for matrix, reason in zip(matrices, reasons) if reason}
        return row if None in reasons else None, others, [(reason, math.prod(layer.shape)) for reason in reasons]
