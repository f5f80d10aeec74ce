"""What of mergekit's inside this package relies on, checked before anything is wrapped or planned.

A patch release of mergekit may change any of it. Where something is missing, a `pave:` block is refused by its name, and so
are our merge methods; `mergekit-pave doctor` tells it, too. Merges with neither are left alone.
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
    "mergekit.architecture": "ModelArchitecture WeightInfo auto get_architecture_info",
    "mergekit.architecture:ModelArchitecture": "modules",
    "mergekit.architecture:WeightInfo": "name vocabulary_axis optional aliases force_dtype tied_names",
    "mergekit.architecture.auto": "RE_LAYER_INDEX can_convert_checkpoint_keys",
    "mergekit.architecture.base": "ModuleDefinition _prefix_weight",
    "mergekit.architecture.base:ModuleDefinition": "architecture weight_prefix",
    "mergekit.architecture.base:ConfiguredModelArchitecture": "all_weights",
    "mergekit.architecture.conversion": "_expanded_target_keys can_convert_checkpoint_keys",
    "mergekit.architecture.json_definitions": "JsonModuleArchDef JsonModuleArchitecture",
    "mergekit.architecture.json_definitions:JsonModuleArchitecture": "definition",
    "mergekit.architecture.json_definitions:JsonModuleArchDef": "pre_weights layer_templates post_weights",
    "mergekit.architecture.json_definitions:JsonLayerTemplates": "weights",
    "mergekit.card": "generate_card",
    "mergekit.common": "ImmutableMap ModelPath ModelReference dtype_from_name",
    "mergekit.common:ModelPath": "path revision _unique_id",
    "mergekit.common:ModelReference": "model lora config merged",
    "mergekit.config": "ConditionalParameter ConfigReader MergeConfiguration ParameterSetting evaluate_setting",
    "mergekit.config:ConditionalParameter": "filter value",
    "mergekit.config:ConfigReader": "t",
    "mergekit.config:MergeConfiguration": (
        "merge_method models slices modules base_model parameters referenced_models dtype out_dtype chat_template"
    ),
    "mergekit.config:InputModelDefinition": "model parameters",
    "mergekit.config:InputSliceDefinition": "model parameters",
    "mergekit.config:OutputModuleDefinition": "models slices parameters",
    "mergekit.config:OutputSliceDefinition": "sources base_model parameters",
    "mergekit.graph": "Executor Task",
    "mergekit.graph:Executor": "_run schedule math_device",
    "mergekit.graph:Task": "arguments execute group_label priority uses_accelerator main_thread_only",
    "mergekit.io.lazy_tensor_loader": "LazyTensorLoader",
    "mergekit.io.lazy_tensor_loader:LazyTensorLoader": "index",
    "mergekit.io.lazy_tensor_loader:ShardedTensorIndex": "base_path tensor_paths is_safetensors",
    "mergekit.io.tasks": "FinalizeModel GatherTensors LoadTensor LoaderCache",
    "mergekit.io.tasks:FinalizeModel": "writer_task",
    "mergekit.io.tasks:GatherTensors": "weight_info dtype device",
    "mergekit.io.tasks:LoadTensor": "model tensor",
    "mergekit.io.tasks:LoaderCache": "loaders hf_cache_dir",
    "mergekit.io.tensor_writer": "TensorWriter",
    "mergekit.io.tensor_writer:TensorWriter": "finalize out_path override_basename weight_map shards_written",
    "mergekit.merge": "_set_chat_template",
    "mergekit.merge_methods": "get register registered_methods",
    "mergekit.merge_methods.base": (
        "BasePolicy GroupMergeMethod InputContract MergeMethodSpec ParameterScope ParameterSpec TensorEntry TensorGroup"
    ),
    "mergekit.merge_methods.base:MergeMethodSpec": "name",
    "mergekit.merge_methods.base:TensorGroup": "entries metadata base non_base",
    "mergekit.merge_methods.task_adapter": "ExecuteMergeMethodTask",
    "mergekit.merge_methods.task_adapter:ExecuteMergeMethodTask": (
        "method_name gather_tensors model_order base_model output_weight parameters input_parameters"
    ),
    "mergekit.multigpu_executor": "MultiGPUExecutor",
    "mergekit.options": "MergeOptions PrettyPrintHelp add_merge_options",
    "mergekit.options:MergeOptions": (
        "device trust_remote_code quiet transformers_cache lora_merge_cache low_cpu_memory multi_gpu apply_global_options"
    ),
    "mergekit.plan": "MergePlanner",
    "mergekit.plan:MergePlanner": (
        "config arch_info options _method _tensors _tokenizer_task _model_arch _plan plan_tensor plan_to_disk"
    ),
    "mergekit.tokenizer": "BuildTokenizer PermutedVocabulary",
    "mergekit.tokenizer:PermutedVocabulary": "gather_tensors vocabulary_axis execute",
}

# What is wrapped or called: the arguments that are known to us. It has to take all of them and to need no others.
CALLS = {
    "mergekit.architecture:get_architecture_info": "config options",
    "mergekit.architecture.conversion:_expanded_target_keys": "renamed_key target_patterns",
    "mergekit.architecture.conversion:can_convert_checkpoint_keys": "model_type source_keys target_key",
    "mergekit.card:generate_card": "config config_yaml name",
    "mergekit.common:ModelReference.config": "self trust_remote_code",
    "mergekit.common:ModelReference.serialize": "self",
    "mergekit.common:dtype_from_name": "name",
    "mergekit.config:evaluate_setting": "tensor_name setting t validate",
    "mergekit.graph:Executor": "targets math_device storage_device",
    "mergekit.graph:Executor.run": "self quiet",
    "mergekit.io.tasks:GatherTensors": "weight_info dtype device",
    "mergekit.io.tasks:LoadTensor": "model tensor dtype device optional aliases tied_names",
    "mergekit.io.tasks:LoaderCache.get": "self model",
    "mergekit.io.tasks:LoaderCache.setup": "self options",
    "mergekit.io.tensor_writer:TensorWriter.finalize": "self",
    "mergekit.merge_methods:get": "name",
    "mergekit.merge_methods:register": "method",
    "mergekit.merge_methods.task_adapter:ExecuteMergeMethodTask.execute": "self tensors",
    "mergekit.multigpu_executor:MultiGPUExecutor": "targets storage_device",
    "mergekit.multigpu_executor:MultiGPUExecutor.run": "self quiet",
    "mergekit.plan:MergePlanner": "config arch_info options out_model_config",
    "mergekit.plan:MergePlanner._model_arch": "self model",
    "mergekit.plan:MergePlanner._plan": "self",
    "mergekit.plan:MergePlanner.plan_tensor": "self weight weights_in models cfg_reader",
    "mergekit.plan:MergePlanner.plan_to_disk": "self out_path",
}


def register() -> None:
    """Teach mergekit about the `pave:` block. Idempotent; validating a config with a block calls it.

    Raises:
        PaveError: mergekit has changed where this package needs it as it was.
    """
    if told := problem():
        raise PaveError(told)
    from mergekit_pave.plugin.wrap import wrap  # it imports what has been looked for

    wrap()


def problem() -> str | None:
    """Why a `pave:` block cannot be honoured with this mergekit, in a line."""
    if told := versions.problem():
        return told
    if not (lacking := missing()):
        return None
    more = f" (and {len(lacking) - 3} more)" if len(lacking) > 3 else ""
    return (
        f"mergekit-pave {version('mergekit-pave')} cannot work with mergekit {version('mergekit')}, whose inside has changed: "
        f"{'; '.join(lacking[:3])}{more}. Install another version (pip install 'mergekit==0.1.5', or a later mergekit-pave); "
        "merges without a `pave:` block work as ever"
    )


def missing() -> list[str]:
    """What mergekit lacks of what is relied on, each in a few words."""
    found = []
    for place, names in PARTS.items():
        holder = _find(place)
        if holder is None:
            found.append(f"{_shown(place)} is missing")
        else:
            found += [f"{_shown(place)}.{name} is missing" for name in names.split() if not _has(holder, name)]
    for place, names in CALLS.items():
        call = _find(place)
        if call is None:
            found.append(f"{_shown(place)} is missing")
        elif told := _lacks(call, set(names.split())):
            found.append(f"{_shown(place)} {told}")
    return list(dict.fromkeys(found))


def _find(place: str) -> Any:
    """The module, or what is in it, or None."""
    module, _, path = place.partition(":")
    try:
        found = importlib.import_module(module)
    except Exception:  # also one that is there and cannot be imported
        return None
    for name in filter(None, path.split(".")):
        found = getattr(found, name, None)
    return found


def _has(holder: Any, name: str) -> bool:
    """Whether a module has a name, or a class has it or gives it to its instances."""
    if hasattr(holder, name) or not isinstance(holder, type):
        return hasattr(holder, name)
    of_instances = getattr(holder, "model_fields", None) or (*_annotated(holder), *_set_at_start(holder))
    return name in of_instances


def _annotated(holder: type) -> list[str]:
    return [name for one in holder.__mro__ for name in inspect.get_annotations(one)]


def _set_at_start(holder: type) -> tuple[str, ...]:
    code = getattr(inspect.unwrap(holder.__init__), "__code__", None)
    return code.co_names if code else ()


def _lacks(call: Any, known: set[str]) -> str | None:
    """What keeps us from calling something with the arguments that we know."""
    if not callable(call):
        return "cannot be called"
    taken = inspect.signature(call).parameters
    variable = any(one.kind is one.VAR_KEYWORD for one in taken.values())
    if gone := sorted(known - taken.keys()) if not variable else []:
        return f"takes no argument {gone[0]}"
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = {name for name, one in taken.items() if one.default is one.empty and one.kind not in kinds}
    if new := sorted(needed - known):
        return f"needs an argument {new[0]}"
    return None


def _shown(place: str) -> str:
    return place.replace(":", ".")
