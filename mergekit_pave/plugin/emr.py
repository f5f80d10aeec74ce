"""`merge_method: emr` among mergekit's tasks: what models share with the base, and what each has for itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mergekit.architecture import ModelArchitecture, WeightInfo, arch_info_for_config
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import GatherTensors, LoadTensor
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner

from mergekit_pave.errors import PaveError
from mergekit_pave.names import EMR
from mergekit_pave.planning.names import all_names
from mergekit_pave.plugin.checkpoints import checkpoint_of, has, missing_from
from mergekit_pave.plugin.planner import architecture_of
from mergekit_pave.tasks.emr import Masks, MergeByEmr
from mergekit_pave.tasks.purify import GatherPurified


def architecture_for(
    config: MergeConfiguration, options: MergeOptions, get: Callable[[MergeConfiguration, MergeOptions], ModelArchitecture]
) -> ModelArchitecture:
    """The architecture of a merge: that of the base model for `emr`, whose models may have heads of other kinds.

    Args:
        get: mergekit's function.

    Raises:
        PaveError: `emr` has no base model.
    """
    if config.merge_method != EMR:
        return get(config, options)
    if config.base_model is None:
        raise PaveError("emr: base_model is missing; set it to the model that the others were fine-tuned from")
    of_base = config.base_model.config(trust_remote_code=options.trust_remote_code)
    configs = {model: model.config(trust_remote_code=options.trust_remote_code) for model in config.referenced_models()}
    for model, other in configs.items():
        if other.model_type != of_base.model_type:
            raise PaveError(
                f"emr: {model} is of the type {other.model_type}, and its base model of the type {of_base.model_type}; only "
                "fine-tunes of the base model can be restored from it"
            )
    return arch_info_for_config(of_base) if all(map(arch_info_for_config, configs.values())) else get(config, options)


def check_emr(planner: MergePlanner) -> None:
    """Refuse what would keep models from being restored.

    Raises:
        PaveError: naming the key of the config.
    """
    config = planner.config
    if config.slices or any(len(module.slices or ()) > 1 for module in (config.modules or {}).values()):
        raise PaveError("emr: layers of a model are restored in their own place, so it takes whole models; use `models:`")
    tokenizer = config.tokenizer
    source = tokenizer.source if tokenizer else config.tokenizer_source
    if source not in (None, "base", config.base_model) or (tokenizer and (tokenizer.tokens or tokenizer.pad_to_multiple_of)):
        raise PaveError(
            "emr: models are restored from the base model's own vocabulary, which this `tokenizer` section changes; use "
            "`tokenizer: {source: base}` alone"
        )
    if not planner.options.safe_serialization:
        raise PaveError("emr: models are restored from safetensors files; leave --no-safe-serialization out")


def restrict(planner: MergePlanner, bound: dict[str, Any]) -> bool:
    """Let mergekit plan an output tensor for the base alone where a model does not have it, or has it in another shape.

    Args:
        bound: the arguments of `plan_tensor`.

    Returns:
        Whether it is to be planned at all: without the base's tensor each model keeps its own.
    """
    base, weight = bound["cfg_reader"].base_model, bound["weight"]
    inputs: dict[ModelReference, WeightInfo] = dict(zip(bound["models"], bound["weights_in"]))
    if not _is_there(planner, base, inputs[base]):
        return False
    resized = weight.vocabulary_axis is not None and (planner._tokenizer_task or planner.options.unsafe_truncate_embeddings)
    shape = None if resized else _shape(base, inputs[base])
    for model, info in inputs.items():
        if model != base and (reason := _why_not_shared(planner, model, info, shape)):
            planner.__dict__.setdefault("_pave_base_only", {})[weight.name] = reason
            bound["models"], bound["weights_in"] = [base], [inputs[base]]
            break
    return True


def _why_not_shared(planner: MergePlanner, model: ModelReference, info: WeightInfo, shape: tuple[int, ...] | None) -> str | None:
    """
    Args:
        shape: of the base's tensor; None where mergekit brings all shapes in line, or nobody knows it.
    """
    if not _is_there(planner, model, info):
        return f"not in {model}"
    if shape is not None and (own := _shape(model, info)) is not None and own != shape:
        return f"of another shape in {model}"
    architecture = architecture_of(planner, model)
    if not architecture.cls.can_generate() and not any(map(architecture.is_of_backbone, all_names(info))):
        return "heads, of which each model keeps its own"  # even if tasks have as many classes, these are others
    return None


def _is_there(planner: MergePlanner, model: ModelReference, info: WeightInfo) -> bool:
    return has(planner, model, info) if info.optional else missing_from(planner, model, info) is None


def _shape(model: ModelReference, info: WeightInfo) -> tuple[int, ...] | None:
    stored = checkpoint_of(model).first_stored(all_names(info))
    return stored and stored.shape


def by_emr(planner: MergePlanner) -> Masks:
    """Put tasks that keep masks in the place of mergekit's.

    Raises:
        PaveError: the base would be merged as it is not.
    """
    config = planner.config
    dtype, out_dtype = dtype_from_name(config.dtype), dtype_from_name(config.out_dtype)
    if dtype and out_dtype and dtype != out_dtype and dtype.itemsize < 4:
        raise PaveError(
            f"emr: with `dtype: {config.dtype}` the base model would be rounded before it is written in {config.out_dtype}, but "
            "models are restored from it as it is; set `dtype: float32`, or leave out_dtype out"
        )
    models = dict.fromkeys(model for _, task in planner._tensors for model in task.model_order if model != task.base_model)
    masks = Masks(list(models))
    for number, (weight, task) in enumerate(planner._tensors):
        if task.model_order != (task.base_model,):
            planner._tensors[number] = weight, _by_emr(planner, task, masks, number)
    return masks


def _by_emr(planner: MergePlanner, task: ExecuteMergeMethodTask, masks: Masks, number: int) -> MergeByEmr:
    gather, info = task.gather_tensors, task.output_weight
    fields = {name: getattr(task, name) for name in type(task).model_fields}
    fields["out_dtype"] = info.force_dtype or planner.config.out_dtype
    if isinstance(gather, GatherPurified):
        fields["originals"] = GatherTensors(weight_info=gather.weight_info, dtype=gather.dtype, device=gather.device)
    if type(gather) not in (GatherTensors, GatherPurified):
        base = gather.gather_tensors.weight_info[task.base_model]
        fields["stored_base"] = LoadTensor(
            model=task.base_model,
            tensor=base.name,
            dtype=base.force_dtype or planner.config.dtype,
            optional=base.optional,
            aliases=base.aliases,
            tied_names=base.tied_names,
        )
    return MergeByEmr(**fields, masks=masks, number=number)
