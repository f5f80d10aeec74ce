"""What a merge would find out only after calibration, or never: checked on names, shapes and headers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from mergekit.common import ModelReference

from mergekit_pave.cache.checkpoint import Checkpoint
from mergekit_pave.calibration.architecture import Architecture
from mergekit_pave.errors import PaveError


def names_of(info: Any) -> tuple[str, ...]:
    """All names that mergekit reads the tensor of a `WeightInfo` by, its own first."""
    return (info.name, *(info.aliases or ()), *(info.tied_names or ()))


def check_present(inputs: Iterable[tuple[ModelReference, Any]], problem: Callable[[ModelReference, Any], str | None]) -> None:
    """Refuse a merge that needs what a checkpoint does not have.

    Args:
        inputs: each model with a `WeightInfo` that is read of it.
        problem: says why mergekit would not find that; None where it would, or can do without.
    """
    missing: dict[tuple[ModelReference, str], list[str]] = {}
    for model, info in inputs:
        if why := problem(model, info):
            missing.setdefault((model, why), []).append(info.name)
    for (model, why), names in missing.items():
        one = len(names) == 1
        shown = names[0] if one else f"{len(names)} tensors (such as {', '.join(names[:3])})"
        raise PaveError(f"{model}: the merge needs {shown}, {why.format('it is' if one else 'they are')}")


def check_sizes(tensors: list[Any], checkpoint: Callable[[ModelReference], Checkpoint]) -> None:
    """Refuse inputs of different sizes, which mergekit does only once it has read them.

    Sizes are those in safetensors files; of other files, and of tensors that mergekit converts, they are left to mergekit.

    Args:
        tensors: see `planning.PlannedTensor`.
    """
    for planned in tensors:
        shapes: dict[ModelReference, tuple[int, ...]] = {}
        axis = None
        for model, info in planned.gather.weight_info.items() if planned.gather else ():
            names = names_of(info)
            stored = checkpoint(model).stored
            if found := [stored[name].shape for name in names if name in stored]:
                shapes[model] = found[0]
            axis = info.vocabulary_axis
        if len(set(shapes.values())) > 1:
            told = ", ".join(f"{' x '.join(map(str, shape))} in {model}" for model, shape in shapes.items())
            advice = "mergekit can only merge tensors of the same size"
            if axis is not None and len({(*shape[:axis], *shape[axis + 1 :]) for shape in shapes.values()}) == 1:
                advice = (
                    "the models have different vocabularies; add `tokenizer: {source: base}` to the config to bring them in line"
                )
            raise PaveError(f"{planned.name} is {told}; {advice}")


_WIDE = {"F64", "F32", "F16", "BF16"}


def check_unquantised(model: ModelReference, checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Refuse a model whose configuration speaks of quantisation, unless its weights are what they would be without.

    Merging QLoRA into a model leaves the mention of it behind. Then every linear layer has a weight of at least 16 bits under
    its own name, and nothing else that only a quantised layer has, such as a scale.
    """
    stored = checkpoint.stored
    parameters = {name: architecture.loaded_as(name) for name in stored}
    weights = {name: parameter for name, parameter in parameters.items() if parameter in architecture.linears}
    lacking = (architecture.linears.keys() & architecture.tensors).difference(weights.values())
    found = [f"{name} is {stored[name].dtype}" for name in weights if stored[name].dtype not in _WIDE]
    layers = tuple(name.removesuffix("weight") for name in weights)
    found += [f"it has {name}" for name, known in parameters.items() if known is None and name.startswith(layers)]
    found += [f"no safetensors file has {name}" for name in sorted(lacking)]
    if found:
        raise PaveError(
            f"pave.models: {model} is quantised ({found[0]}), which cannot be calibrated; give it `purify: false`, or use a copy "
            "with weights of 16 bits. If these are what it has, remove quantization_config from its config.json"
        )


def check_complete(
    files: dict[ModelReference, Iterable[str]],
    reads: Callable[[ModelReference], list[list[str]]],
    loaded_as: Callable[[ModelReference, str], str | None],
) -> None:
    """Refuse a merge that goes without tensors that every input has.

    mergekit leaves out what it knows no name for, and what only some layers have unless it is stored under the very name
    that it looks for. Names are compared by what transformers makes of them, so what it ignores, and the second name of a
    tied weight, are not missed. What the config takes of the inputs plays no part: to merge some layers or modules is a choice.

    Args:
        files: the names of the tensors in each input's checkpoint.
        reads: the tensors that a merge of whole models would read of one, each with all names that it may have.
        loaded_as: what transformers makes of a tensor of this name.
    """
    has: dict[ModelReference, dict[str, str]] = {}
    known: dict[ModelReference, set[str | None]] = {}
    for model, stored in files.items():
        has[model] = {tensor: name for name in sorted(stored) if (tensor := loaded_as(model, name))}
        known[model] = {loaded_as(model, name) for names in reads(model) for name in names}
    common = set.intersection(*map(set, has.values()))
    for model, own in has.items():
        lost = sorted(common - known[model])
        if not lost:
            continue
        names = [own[tensor] for tensor in lost]
        if any(name != tensor for name, tensor in zip(names, lost)):
            advice = (
                "Load each model of the merge with transformers, save it with `save_pretrained(folder, "
                "save_original_format=False)`, and merge these"
            )
        else:
            advice = "mergekit knows no such tensors in this architecture; merge without a pave block if you can do without them"
        raise PaveError(
            f"{model}: mergekit would leave {len(lost)} tensors that every input has out of the merged model, with or without a "
            f"pave block (such as {', '.join(names[:3])}). {advice}"
        )
