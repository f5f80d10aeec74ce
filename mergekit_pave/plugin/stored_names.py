"""mergekit's architecture, with tensors under the names that the checkpoints have for them."""

from __future__ import annotations

import functools
from collections.abc import Callable

from mergekit.architecture import ModelArchitecture, WeightInfo
from mergekit.architecture.auto import RE_LAYER_INDEX
from mergekit.architecture.base import ModuleDefinition, _prefix_weight
from mergekit.architecture.json_definitions import JsonModuleArchDef, JsonModuleArchitecture
from mergekit.plan import MergePlanner

from mergekit_pave.calibration.architecture import describe
from mergekit_pave.calibration.conversion import Conversions
from mergekit_pave.planning.names import all_names
from mergekit_pave.plugin.checkpoints import checkpoint_of
from mergekit_pave.plugin.planner import is_regmean


def with_stored_names(planner: MergePlanner) -> ModelArchitecture:
    """The planner's architecture, with tensors under the names that the checkpoints have for them.

    An architecture that mergekit has inferred has the names of transformers' modules. Tensors that checkpoints have under other
    names (modules that were renamed since, experts stored one by one) are left out, unless mergekit can convert them. Some of
    mergekit's own definitions have names with the prefix of a whole model, which a checkpoint of the bare backbone lacks.
    transformers knows which parameter each of these names stands for.
    """
    architecture, config = planner.arch_info, planner.config
    modules = {key: m for key, m in architecture.modules.items() if isinstance(m.architecture, JsonModuleArchitecture)}
    definitions = {key: _with_prefix(module) for key, module in modules.items()}
    infos = [info for d in definitions.values() for info in (*d.pre_weights, *d.layer_templates.weights, *d.post_weights)]
    templates = {name for info in infos for name in all_names(info)}
    # Of all layers the first, as a checkpoint may have one more for predicting several tokens, which transformers leaves out.
    names = {name for model in config.referenced_models() for name in checkpoint_of(model).files}
    names = sorted(names, key=lambda name: (int(_layer(name) or 0), name), reverse=True)
    stored = {name if name in templates else _template(name): name for name in names}  # by template, the name in one layer
    models = sorted(config.referenced_models(), key=str)
    model = models[0] if is_regmean(planner) else next(filter(config.pave.entry, models), models[0])
    if not infos or stored.keys() <= templates:
        return architecture

    trust = planner.options.trust_remote_code
    model_config = model.config(trust_remote_code=trust)
    described = describe(model_config, model.model.path, trust, model.model.revision)
    # A tensor outside of all layers may have a number in its name that is not that of a layer.
    numbered = {described.loaded_as(name) for name in templates if RE_LAYER_INDEX.search(name)}

    def template_of(name: str, parameter: str | None) -> str:
        return name if name in templates or parameter in numbered else _template(name)

    stored = {template_of(name, described.loaded_as(name) if numbered else None): name for name in names}
    renamed: dict[str, list[str]] = {}  # by template, other names of the same tensor
    parts: dict[str, list[str]] = {}  # by template, names of tensors that make up this one
    for template in sorted(stored.keys() - templates):
        name = stored[template]
        parameter = described.loaded_as(name)
        if parameter and _layer(parameter) == _layer(name):
            names_of = renamed if described.weight_name([name]) else parts
            names_of.setdefault(template_of(parameter, parameter), []).append(template)

    @functools.cache
    def conversions() -> Conversions:
        return Conversions(model_config.model_type, checkpoint_of(model).files.keys())

    def with_names(info: WeightInfo) -> list[WeightInfo]:
        in_first_layer = info.name.replace("${layer_index}", "0")
        parameter = described.loaded_as(in_first_layer)
        others = renamed.get(template_of(parameter, parameter) if parameter else info.name, [])
        if info.name not in stored and not info.optional and (not others or conversions().can_make(in_first_layer)):
            return [info]  # mergekit converts it, and writes it under the new name
        if others:
            # It is read under each of these names, as it would be with `aliases`, which mergekit refuses for an optional tensor.
            first, *rest = [info.name, *others] if info.name in stored else others
            return [info.model_copy(update={"name": first, "tied_names": (*(info.tied_names or ()), *rest) or None})]
        if info.name in stored:
            return [info]
        return [info.model_copy(update={"name": name}) for name in parts.get(info.name, [])] or [info]

    def all_with_names(infos: list[WeightInfo]) -> list[WeightInfo]:
        return [changed for info in infos for changed in with_names(info)]

    changed = dict(architecture.modules)
    for key, definition in definitions.items():
        with_stored = modules[key].architecture.model_copy(update={"definition": _with_infos(definition, all_with_names)})
        changed[key] = modules[key].model_copy(update={"architecture": with_stored, "weight_prefix": None})
    return architecture.model_copy(update={"modules": changed})


def _with_prefix(module: ModuleDefinition) -> JsonModuleArchDef:
    """A module's definition with the names that its tensors have in the whole model."""
    return _with_infos(module.architecture.definition, lambda infos: [_prefix_weight(i, module.weight_prefix) for i in infos])


def _with_infos(definition: JsonModuleArchDef, change: Callable[[list[WeightInfo]], list[WeightInfo]]) -> JsonModuleArchDef:
    layers = definition.layer_templates.model_copy(update={"weights": change(definition.layer_templates.weights)})
    loose = {"pre_weights": change(definition.pre_weights), "post_weights": change(definition.post_weights)}
    return definition.model_copy(update={"layer_templates": layers, **loose})


def _layer(name: str) -> str | None:
    """The number of the layer that a tensor belongs to, as mergekit sees it."""
    match = RE_LAYER_INDEX.search(name)
    return match and match.group(1)


def _template(name: str) -> str:
    """mergekit's name for a tensor in all layers."""
    return RE_LAYER_INDEX.sub(".${layer_index}.", name, count=1)
