"""The parts of mergekit that this package relies on. They are checked before anything is wrapped or planned.

A patch release of mergekit may change any of them. Where one is missing, a `pave:` block and our merge methods are refused with
its name, and `mergekit-pave doctor` names it, too. All other merges are left alone.
"""

from __future__ import annotations

import importlib
import inspect
from importlib.metadata import version
from typing import Any

from mergekit_pave import versions
from mergekit_pave.errors import PaveError

# By module, or module:class: the names in it that are used. Those of a class are fields, methods or attributes of instances.
PARTS = {
    "mergekit.architecture": "ModelArchitecture WeightInfo arch_info_for_config auto get_architecture_info",
    "mergekit.architecture:ModelArchitecture": "modules",
    "mergekit.architecture:WeightInfo": "name vocabulary_axis optional aliases force_dtype tied_names",
    "mergekit.architecture.auto": "RE_LAYER_INDEX can_convert_checkpoint_keys",
    "mergekit.architecture.base": "ModuleDefinition _prefix_weight",
    "mergekit.architecture.base:ModuleDefinition": "architecture weight_prefix",
    "mergekit.architecture.base:ConfiguredModelArchitecture": "all_weights",
    "mergekit.architecture.conversion": "_expanded_target_keys can_convert_checkpoint_keys convert_checkpoint_tensors",
    "mergekit.architecture.json_definitions": "JsonModuleArchDef JsonModuleArchitecture",
    "mergekit.architecture.json_definitions:JsonModuleArchitecture": "definition",
    "mergekit.architecture.json_definitions:JsonModuleArchDef": "pre_weights layer_templates post_weights",
    "mergekit.architecture.json_definitions:JsonLayerTemplates": "weights",
    "mergekit.card": "generate_card is_hf",
    "mergekit.common": "ImmutableMap ModelPath ModelReference dtype_from_name parse_kmb",
    "mergekit.common:ModelPath": "path revision _unique_id",
    "mergekit.common:ModelReference": "model lora config merged",
    "mergekit.config": "ConditionalParameter ConfigReader MergeConfiguration ParameterSetting evaluate_setting",
    "mergekit.config:ConditionalParameter": "filter value",
    "mergekit.config:ConfigReader": "t",
    "mergekit.config:MergeConfiguration": (
        "merge_method models slices modules base_model parameters referenced_models dtype out_dtype chat_template tokenizer "
        "tokenizer_source"
    ),
    "mergekit.config:InputModelDefinition": "model parameters",
    "mergekit.config:InputSliceDefinition": "model parameters",
    "mergekit.config:OutputModuleDefinition": "models slices parameters",
    "mergekit.config:OutputSliceDefinition": "sources base_model parameters",
    "mergekit.graph": "Executor Task",
    "mergekit.graph:Executor": "_run schedule math_device",
    "mergekit.graph:Task": "arguments execute group_label priority uses_accelerator main_thread_only",
    "mergekit.io.lazy_tensor_loader": "LazyTensorLoader ShardedTensorIndex",
    "mergekit.io.lazy_tensor_loader:LazyTensorLoader": "index",
    "mergekit.io.lazy_tensor_loader:ShardedTensorIndex": "base_path tensor_paths is_safetensors",
    "mergekit.io.tasks": "FinalizeModel GatherTensors LoadTensor LoaderCache",
    "mergekit.io.tasks:FinalizeModel": "writer_task",
    "mergekit.io.tasks:GatherTensors": "weight_info dtype device",
    "mergekit.io.tasks:LoadTensor": "model tensor",
    "mergekit.io.tasks:LoaderCache": "loaders hf_cache_dir",
    "mergekit.io.tensor_writer": "TensorWriter",
    "mergekit.io.tensor_writer:TensorWriter": "finalize out_path override_basename weight_map shards_written",
    "mergekit.merge": "_set_chat_template run_merge",
    "mergekit.merge_methods": "get register registered_methods",
    "mergekit.merge_methods.base": (
        "BasePolicy GroupMergeMethod InputContract MergeMethodSpec ParameterScope ParameterSpec TensorEntry TensorGroup"
    ),
    "mergekit.merge_methods.base:MergeMethodSpec": "name parameters contract",
    "mergekit.merge_methods.base:ParameterSpec": "name default required scope validate",
    "mergekit.merge_methods.base:TensorGroup": "entries metadata base non_base",
    "mergekit.merge_methods.task_adapter": "ExecuteMergeMethodTask",
    "mergekit.merge_methods.task_adapter:ExecuteMergeMethodTask": (
        "method_name gather_tensors model_order base_model output_weight parameters input_parameters out_dtype"
    ),
    "mergekit.multigpu_executor": "MultiGPUExecutor",
    "mergekit.multigpu_executor:MultiGPUExecutor": "_device_worker task_completion_queue done_event serial_schedule",
    "mergekit.options": "MergeOptions OPTION_HELP PrettyPrintHelp add_merge_options",
    "mergekit.options:MergeOptions": (
        "device trust_remote_code quiet transformers_cache lora_merge_cache low_cpu_memory multi_gpu write_model_card "
        "apply_global_options random_seed lora_merge_dtype unsafe_truncate_embeddings safe_serialization out_shard_size"
    ),
    "mergekit.plan": "MergePlanner",
    "mergekit.plan:MergePlanner": (
        "config arch_info options _method _tensors _tokenizer_task _model_arch _plan plan_tensor plan_to_disk"
    ),
    "mergekit.tokenizer": "BuildTokenizer PermutedVocabulary TokenizerInfo",
    "mergekit.tokenizer:PermutedVocabulary": "gather_tensors vocabulary_axis tokens pad_to_multiple_of execute",
    "mergekit.tokenizer:TokenizerInfo": "tokenizer permutations",
}

# What is wrapped or called, and the arguments that we know. It has to take all of them, and may not need any other.
CALLS = {
    "mergekit.architecture:arch_info_for_config": "config",
    "mergekit.architecture:get_architecture_info": "config options",
    "mergekit.architecture.conversion:_expanded_target_keys": "renamed_key target_patterns",
    "mergekit.architecture.conversion:can_convert_checkpoint_keys": "model_type source_keys target_key",
    "mergekit.architecture.conversion:convert_checkpoint_tensors": "model_type source_tensors target_key",
    "mergekit.card:generate_card": "config config_yaml name",
    "mergekit.common:ModelReference.config": "self trust_remote_code",
    "mergekit.common:ModelReference.local_path": "self cache_dir",
    "mergekit.common:ModelReference.merged": "self cache_dir trust_remote_code",
    "mergekit.common:ModelReference.serialize": "self",
    "mergekit.common:dtype_from_name": "name",
    "mergekit.config:evaluate_setting": "tensor_name setting t validate",
    "mergekit.graph:Executor": "targets math_device storage_device",
    "mergekit.graph:Executor.run": "self quiet",
    "mergekit.io.lazy_tensor_loader:LazyTensorLoader": "index lazy_unpickle",
    "mergekit.io.lazy_tensor_loader:LazyTensorLoader.get_tensor": "self key",
    "mergekit.io.lazy_tensor_loader:ShardedTensorIndex.from_disk": "base_path",
    "mergekit.io.tasks:GatherTensors": "weight_info dtype device",
    "mergekit.io.tasks:LoadTensor": "model tensor dtype device optional aliases tied_names",
    "mergekit.io.tasks:LoaderCache.get": "self model",
    "mergekit.io.tasks:LoaderCache.setup": "self options",
    "mergekit.io.tensor_writer:TensorWriter": "out_path max_shard_size",
    "mergekit.io.tensor_writer:TensorWriter.finalize": "self",
    "mergekit.io.tensor_writer:TensorWriter.save_tensor": "self name tensor",
    "mergekit.merge:run_merge": "merge_config out_path options config_source",
    "mergekit.merge_methods:get": "name",
    "mergekit.merge_methods:register": "method",
    "mergekit.merge_methods.task_adapter:ExecuteMergeMethodTask.execute": "self tensors",
    "mergekit.multigpu_executor:MultiGPUExecutor": "targets storage_device",
    "mergekit.multigpu_executor:MultiGPUExecutor._device_worker": "self task_list cached_values device quiet",
    "mergekit.multigpu_executor:MultiGPUExecutor.run": "self quiet",
    "mergekit.plan:MergePlanner": "config arch_info options out_model_config",
    "mergekit.plan:MergePlanner._model_arch": "self model",
    "mergekit.plan:MergePlanner._plan": "self",
    "mergekit.plan:MergePlanner.plan_tensor": "self weight weights_in models cfg_reader",
    "mergekit.plan:MergePlanner.plan_to_disk": "self out_path",
}


def register() -> None:
    """Let mergekit honour the `pave:` block. Idempotent; validating a config with a block calls it.

    Raises:
        PaveError: mergekit has changed where this package needs it as it was.
    """
    if reason := problem():
        raise PaveError(reason)
    from mergekit_pave.plugin.wrap import wrap  # it imports what `missing` has found to be there

    wrap()


def problem() -> str | None:
    """Why a `pave:` block cannot be honoured with this mergekit, in a line."""
    if reason := versions.problem():
        return reason
    if not (faults := missing()):
        return None
    more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
    return (
        f"mergekit-pave {version('mergekit-pave')} cannot work with mergekit {version('mergekit')}, whose inside has changed: "
        f"{'; '.join(faults[:3])}{more}. Install another version (pip install 'mergekit==0.1.5', or a later mergekit-pave); "
        "merges without a `pave:` block are not affected"
    )


def missing() -> list[str]:
    """What mergekit lacks, each fault in a few words."""
    faults = []
    for path, names in PARTS.items():
        holder = _find(path)
        if holder is None:
            faults.append(f"{_shown(path)} is missing")
        else:
            faults += [f"{_shown(path)}.{name} is missing" for name in names.split() if not _has(holder, name)]
    for path, names in CALLS.items():
        call = _find(path)
        if call is None:
            faults.append(f"{_shown(path)} is missing")
        elif fault := _fault_of_call(call, set(names.split())):
            faults.append(f"{_shown(path)} {fault}")
    return list(dict.fromkeys(faults))


def _find(path: str) -> Any:
    """The module, or the object in it, or None."""
    module, _, names = path.partition(":")
    try:
        value = importlib.import_module(module)
    except Exception:  # also a module that is there and cannot be imported
        return None
    for name in filter(None, names.split(".")):
        value = getattr(value, name, None)
    return value


def _has(holder: Any, name: str) -> bool:
    """Whether a module has a name, or a class or its instances have it."""
    if hasattr(holder, name) or not isinstance(holder, type):
        return hasattr(holder, name)
    of_instances = getattr(holder, "model_fields", None) or (*_annotated(holder), *_set_at_start(holder))
    return name in of_instances


def _annotated(holder: type) -> list[str]:
    return [name for cls in holder.__mro__ for name in inspect.get_annotations(cls)]


def _set_at_start(holder: type) -> tuple[str, ...]:
    code = getattr(inspect.unwrap(holder.__init__), "__code__", None)
    return code.co_names if code else ()


def _fault_of_call(call: Any, arguments: set[str]) -> str | None:
    """Why something cannot be called with these arguments."""
    if not callable(call):
        return "cannot be called"
    parameters = inspect.signature(call).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if gone := sorted(arguments - parameters.keys()) if not takes_any else []:
        return f"takes no argument {gone[0]}"
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = {name for name, each in parameters.items() if each.default is each.empty and each.kind not in variable}
    if new := sorted(required - arguments):
        return f"needs an argument {new[0]}"
    return None


def _shown(path: str) -> str:
    return path.replace(":", ".")
