"""Which weights of a model are those of linear layers of its backbone."""

from __future__ import annotations

from dataclasses import replace

from torch import nn
from transformers.pytorch_utils import Conv1D

from mergekit_pave.calibration.experts import find_experts, find_routers, projections
from mergekit_pave.calibration.models import backbone
from mergekit_pave.core.linear import Linear

# Heads that some architectures keep inside what they declare as their backbone.
_HEADS = {"lm_head", "classifier", "score", "qa_outputs"}


def find_linears(model: nn.Module) -> tuple[dict[str, Linear], frozenset[str], frozenset[str]]:
    """The `linears`, `heads` and `routers` of an `Architecture`."""
    base, start = backbone(model), backbone_prefix(model)
    inside = {id(module) for module in base.modules()}
    output = model.get_output_embeddings()
    experts = find_experts(base)
    routers = {start + name for name in find_routers(base, experts)}
    linears, heads = {}, set()
    for path, module in model.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D)):
            continue
        if id(module) not in inside or module is output or path.split(".")[0] in _HEADS:
            heads.add(f"{path}.weight")
            continue
        if f"{path}.weight" in routers:
            continue
        transposed = isinstance(module, Conv1D)
        d_out, d_in = module.weight.T.shape if transposed else module.weight.shape
        linears[f"{path}.weight"] = Linear(path, (d_out, d_in), transposed)
    for path, module in experts.items():
        for leaf in projections(module):
            name = f"{start}{path}.{leaf}"
            count, *shape = getattr(module, leaf).shape
            shape = tuple(shape[::-1] if module.is_transposed else shape)
            linears[name] = Linear(name, shape, module.is_transposed, tuple(range(count)), stacked=True)
    for names in _shared_parameters(model):
        layers = {name: linears[name] for name in names if name in linears}
        for name, layer in layers.items():
            others = tuple(other.module for other in layers.values() if other is not layer)
            linears[name] = replace(layer, shared=others)
        if len(layers) < len(names):  # an embedding or a head uses the weight, too, and its inputs are not measured
            heads.update(layers)
            linears = {name: layer for name, layer in linears.items() if name not in layers}
    return linears, frozenset(heads), frozenset(routers)


def _shared_parameters(model: nn.Module) -> list[list[str]]:
    """The names of each parameter that several modules share. (One module may have several names, too.)"""
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            names.setdefault(id(parameter), []).append(f"{path}.{leaf}")
    return [same for same in names.values() if len(same) > 1]


def backbone_prefix(model: nn.Module) -> str:
    """The start of the names of the backbone's parts in the whole model."""
    return "" if backbone(model) is model else f"{model.base_model_prefix}."
