"""What the rest of this package gets from mergekit's planner."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference
from mergekit.io.tasks import GatherTensors
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.plan import MergePlanner

from mergekit_pave.calibration.architecture import Architecture, describe
from mergekit_pave.calibration.job import Runtime
from mergekit_pave.methods.emr import Emr
from mergekit_pave.methods.regmean import RegMean, data_share
from mergekit_pave.planning.merge import Merge, PlannedTensor
from mergekit_pave.planning.names import all_names
from mergekit_pave.plugin.checkpoints import checkpoint_of, names_read
from mergekit_pave.plugin.parameters import unread_parameters


def is_ours(planner: MergePlanner) -> bool:
    """Whether we plan a part of the merge."""
    return planner.config.pave is not None or is_regmean(planner)


def is_regmean(planner: MergePlanner) -> bool:
    return isinstance(planner._method, RegMean)


def is_emr(planner: MergePlanner) -> bool:
    return isinstance(planner._method, Emr)


def merge_of(planner: MergePlanner) -> Merge:
    """The merge that mergekit has planned."""
    options = planner.options
    return Merge(
        method=planner.config.merge_method,
        config=planner.out_model_config,
        tokenizer=_tokenizer_of(planner),
        tensors=[
            PlannedTensor(
                name=weight.name,
                # Tensors with a vocabulary axis may be gathered by a task that also permutes or truncates them.
                gather=task.gather_tensors if type(task.gather_tensors) is GatherTensors else None,
                models=task.model_order,
                base=task.base_model,
                t=t,
                names=all_names(weight),
                data_share=data_share_of(task) if is_regmean(planner) else None,
                weights=_weights_of(task),
                scale=task.parameters["lambda"] if is_regmean(planner) else 1.0,
            )
            for (weight, task), t in zip(planner._tensors, planner._pave_positions, strict=True)
        ],
        runtime=Runtime(options.device, options.trust_remote_code, options.quiet),
        transformers_cache=options.transformers_cache,
        checkpoint=checkpoint_of,
        names_read=functools.partial(names_read, planner),
        architecture=functools.partial(architecture_of, planner),
        out_dtype=planner.config.out_dtype or planner.config.dtype,
        base_only=planner.__dict__.get("_pave_base_only", {}),
        compares=planner.__dict__.get("_pave_compares", True),
        generates=planner.__dict__.get("_pave_generates", True),
        warnings=unread_parameters(planner),
    )


def architecture_of(planner: MergePlanner, model: ModelReference) -> Architecture:
    """A model's architecture. It takes a while to find, and is found once."""
    known, trust = planner.__dict__.setdefault("_pave_architectures", {}), planner.options.trust_remote_code
    if model not in known:
        known[model] = describe(model.config(trust_remote_code=trust), model.model.path, trust, model.model.revision)
    return known[model]


def _tokenizer_of(planner: MergePlanner) -> ModelReference | None:
    """See `Merge.tokenizer`."""
    source = planner._tokenizer_task.tokenizer_source if planner._tokenizer_task else "base"
    if source == "base":
        return planner.config.base_model or planner.config.referenced_models()[0]
    return source if isinstance(source, ModelReference) else None


def data_share_of(task: ExecuteMergeMethodTask) -> float:
    """How much of regmean's metric is to be C in one output tensor."""
    return data_share(task.parameters["covariance"], task.base_model is not None)


def _weights_of(task: ExecuteMergeMethodTask) -> dict[ModelReference, float]:
    """Only their ratios matter. So one that is not given is that of a mean, as in `regmean`."""
    models = [model for model in task.model_order if model != task.base_model]
    given = {model: dict(task.input_parameters[model].items()).get("weight") for model in models}
    return {model: 1 / len(models) if weight is None else weight for model, weight in given.items()}


def inputs_of(planner: MergePlanner) -> Iterator[tuple[ModelReference, WeightInfo]]:
    """Each model with each tensor that is read of it."""
    for _, task in planner._tensors:
        gather = getattr(task.gather_tensors, "gather_tensors", task.gather_tensors)
        yield from gather.weight_info.items()
