"""Merging one output tensor by `regmean`."""

from __future__ import annotations

import dataclasses
from typing import Any, Optional

from mergekit.common import ImmutableMap, ModelReference
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from torch import Tensor

from mergekit_pave.calibration.stored import stored_covariances
from mergekit_pave.core.covariance import Covariance
from mergekit_pave.core.linear import Linear
from mergekit_pave.core.reasons import FEW_TOKENS, NEVER_CALLED
from mergekit_pave.errors import PaveError
from mergekit_pave.methods.regmean import Layer, data_share


@dataclasses.dataclass(frozen=True)
class ClosedForm:
    """How regmean merges the weight of a linear layer.

    Attributes:
        layer: the layer, in any of the models.
        covariances: of each model whose covariances are part of the metric, the folder where they are, its own name of the layer,
            and the tokens that an expert must have seen.
    """

    layer: Linear
    covariances: tuple[tuple[ModelReference, str, Linear, int], ...] = ()


class MergeByRegMean(ExecuteMergeMethodTask):
    """mergekit's task for an output tensor, which also tells `regmean` what layer the tensor is the weight of.

    Attributes:
        form: None of a tensor that is merged as task_arithmetic does.
    """

    form: Optional[ClosedForm]

    def __hash__(self) -> int:
        return hash((MergeByRegMean, self.output_weight.name))

    def execute(self, tensors: dict[ModelReference, Tensor]) -> Optional[Tensor]:
        parameters = {**dict(self.parameters.items()), "layer": self.form and self._layer(tensors)}
        complete = self.model_copy(update={"parameters": ImmutableMap(data=parameters)})
        return ExecuteMergeMethodTask.execute(complete, tensors)

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
        stored = {model: (stored_covariances(folder), own.layers) for model, folder, own, _ in self.form.covariances}

        def covariance(model: ModelReference, i: int) -> Covariance:
            covariances, names = stored[model]
            return covariances.load(names[i])

        measured = tuple(reason is None for reason in self._reasons()) if stored else None
        return Layer(layer.transposed, measured, covariance)

    def _reasons(self) -> list[Optional[str]]:
        """Of each matrix, why it cannot be merged with covariances, if so: all models need one."""
        reasons: list[Optional[str]] = [None] * len(self.form.layer.layers)
        for model, folder, own, min_tokens in self.form.covariances:
            stored = stored_covariances(folder)
            for i, names in enumerate(own.layers):
                tokens = stored.tokens(names)
                if tokens < max(1, min_tokens) and reasons[i] is None:
                    reasons[i] = f"{FEW_TOKENS} ({tokens}, {model})" if own.experts else f"{NEVER_CALLED} ({model})"
        return reasons

    def as_task_arithmetic(self) -> dict[str, str]:
        """The matrices that are merged as task_arithmetic does, though their layer has a form, and why.

        Calibration has to be done.
        """
        name, layer = self.output_weight.name, self.form.layer
        reasons = enumerate(self._reasons())
        return {f"{name}[{layer.experts[i]}]" if layer.stacked else name: reason for i, reason in reasons if reason}

    def row(self) -> Optional[dict[str, Any]]:
        """What the report says of the tensor; None where no matrix of it is merged in closed form."""
        if None not in self._reasons():
            return None
        return {
            "tensor": self.output_weight.name,
            "covariance": data_share(self.parameters["covariance"], self.base_model is not None),
            "lambda": self.parameters["lambda"],
            "reduce_off_diagonal": self.parameters["reduce_off_diagonal"],
        }
