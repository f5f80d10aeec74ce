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
from mergekit_pave.planning.checks import names_of
from mergekit_pave.plugin.checkpoints import checkpoint_of
from mergekit_pave.plugin.conversion import Conversions
from mergekit_pave.plugin.planner import is_regmean


def with_stored_names(planner: MergePlanner) -> ModelArchitecture:
    """The planner's architecture, with tensors under the names that the checkpoints have for them.

    An architecture that mergekit has inferred has the names of transformers' modules, and what checkpoints have under others
    (modules that were renamed since, experts stored one by one) it leaves out, unless it can convert them. Some of its own
    definitions have names with the prefix of a whole model, which a checkpoint of the bare backbone lacks. transformers knows
    what becomes of each.
    """
    architecture, config = planner.arch_info, planner.config
    modules = {key: m for key, m in architecture.modules.items() if isinstance(m.architecture, JsonModuleArchitecture)}
    definitions = {key: _with_prefix(module) for key, module in modules.items()}
    infos = [info for d in definitions.values() for info in (*d.pre_weights, *d.layer_templates.weights, *d.post_weights)]
    known = {name for info in infos for name in names_of(info)}
    # Of all layers the first, as a checkpoint may have one more for predicting several tokens, which transformers leaves out.
    names = {name for model in config.referenced_models() for name in checkpoint_of(model).files}
    names = sorted(names, key=lambda name: (int(_layer(name) or 0), name), reverse=True)
    stored = {name if name in known else _template(name): name for name in names}
    models = sorted(config.referenced_models(), key=str)
    one = models[0] if is_regmean(planner) else next(filter(config.pave.entry, models), None)
    if one is None or not infos or stored.keys() <= known:
        return architecture

    trust = planner.options.trust_remote_code
    own_config = one.config(trust_remote_code=trust)
    described = describe(own_config, one.model.path, trust, one.model.revision)
    # A tensor outside of all layers may have a number in its name that is no layer's.
    numbered = {described.loaded_as(name) for name in known if RE_LAYER_INDEX.search(name)}

    def general(name: str, target: str | None) -> str:
        """A tensor's name in all layers."""
        return name if name in known or target in numbered else _template(name)

    stored = {general(name, described.loaded_as(name) if numbered else None): name for name in names}
    other: dict[str, list[str]] = {}  # names of the same tensor
    parts: dict[str, list[str]] = {}  # names of tensors that make it up
    for template in sorted(stored.keys() - known):
        name = stored[template]
        target = described.loaded_as(name)
        if target and _layer(target) == _layer(name):
            (other if described.weight_name([name]) else parts).setdefault(general(target, target), []).append(template)

    @functools.cache
    def conversions() -> Conversions:
        return Conversions(own_config.model_type, checkpoint_of(one).files.keys())

    def named(info: WeightInfo) -> list[WeightInfo]:
        first_layers = info.name.replace("${layer_index}", "0")
        target = described.loaded_as(first_layers)
        names = other.get(general(target, target) if target else info.name, [])
        if info.name not in stored and not info.optional and (not names or conversions().can_make(first_layers)):
            return [info]  # mergekit converts it, and writes it under the new name
        if names:
            # It is read under each of these names, as it would be with `aliases`, which mergekit refuses for an optional tensor.
            first, *rest = [info.name, *names] if info.name in stored else names
            return [info.model_copy(update={"name": first, "tied_names": (*(info.tied_names or ()), *rest) or None})]
        if info.name in stored:
            return [info]
        return [info.model_copy(update={"name": name}) for name in parts.get(info.name, [])] or [info]

    def all_named(infos: list[WeightInfo]) -> list[WeightInfo]:
        return [renamed for info in infos for renamed in named(info)]

    changed = dict(architecture.modules)
    for key, old in definitions.items():
        renamed = modules[key].architecture.model_copy(update={"definition": _with_infos(old, all_named)})
        changed[key] = modules[key].model_copy(update={"architecture": renamed, "weight_prefix": None})
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
    found = RE_LAYER_INDEX.search(name)
    return found and found.group(1)


def _template(name: str) -> str:
    """mergekit's name for a tensor in all layers."""
    return RE_LAYER_INDEX.sub(".${layer_index}.", name, count=1)
