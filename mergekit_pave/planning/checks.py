"""What a merge would find out only after calibration, or never: checked on names, shapes and headers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from mergekit.common import ModelReference

from mergekit_pave.cache.checkpoint import Checkpoint
from mergekit_pave.calibration.architecture import Architecture
from mergekit_pave.errors import PaveError
from mergekit_pave.planning.merge import Merge
from mergekit_pave.planning.names import all_names


def check_present(inputs: Iterable[tuple[ModelReference, Any]], problem: Callable[[ModelReference, Any], str | None]) -> None:
    """Refuse a merge that needs tensors that a checkpoint does not have.

    Args:
        inputs: each model with a `WeightInfo` that is read of it.
        problem: says why mergekit would not find that tensor; None where it would, or can do without.
    """
    missing: dict[tuple[ModelReference, str], list[str]] = {}
    for model, info in inputs:
        if reason := problem(model, info):
            missing.setdefault((model, reason), []).append(info.name)
    for (model, reason), names in missing.items():
        is_one = len(names) == 1
        shown = names[0] if is_one else f"{len(names)} tensors (such as {', '.join(names[:3])})"
        raise PaveError(f"{model}: the merge needs {shown}, {reason.format('it is' if is_one else 'they are')}")


def check_sizes(merge: Merge) -> None:
    """Refuse inputs of different sizes, which mergekit does only once it has read them.

    Sizes are those in safetensors files. Sizes in other files, and of tensors that mergekit converts, are left to mergekit.
    """
    for planned in merge.tensors:
        shapes: dict[ModelReference, tuple[int, ...]] = {}
        axis = None
        for model, info in planned.gather.weight_info.items() if planned.gather else ():
            if stored := merge.checkpoint(model).first_stored(all_names(info)):
                shapes[model] = stored.shape
            axis = info.vocabulary_axis
        if len(set(shapes.values())) > 1:
            sizes = ", ".join(f"{' x '.join(map(str, shape))} in {model}" for model, shape in shapes.items())
            advice = "mergekit can only merge tensors of the same size"
            if axis is not None and len({(*shape[:axis], *shape[axis + 1 :]) for shape in shapes.values()}) == 1:
                advice = (
                    "the models have different vocabularies; add `tokenizer: {source: base}` to the config to bring them in line"
                )
            raise PaveError(f"{planned.name} is {sizes}; {advice}")


_WIDE = {"F64", "F32", "F16", "BF16"}


def check_unquantised(model: ModelReference, checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Refuse a model whose configuration speaks of quantisation, unless its weights are what they would be without.

    Merging QLoRA into a model leaves the mention of it behind. Then every linear layer has a weight of at least 16 bits under
    its own name, and nothing else that only a quantised layer has, such as a scale.
    """
    stored = checkpoint.stored
    parameters = {name: architecture.loaded_as(name) for name in stored}
    weights = {name: parameter for name, parameter in parameters.items() if parameter in architecture.linears}
    missing = (architecture.linears.keys() & architecture.tensors).difference(weights.values())
    signs = [f"{name} is {stored[name].dtype}" for name in weights if stored[name].dtype not in _WIDE]
    layers = tuple(name.removesuffix("weight") for name in weights)
    signs += [f"it has {name}" for name, parameter in parameters.items() if parameter is None and name.startswith(layers)]
    signs += [f"no safetensors file has {name}" for name in sorted(missing)]
    if signs:
        raise PaveError(
            f"pave.models: {model} is quantised ({signs[0]}), which cannot be calibrated; give it `purify: false`, or use a copy "
            "with weights of 16 bits. If its weights have 16 bits already, remove quantization_config from its config.json"
        )


def check_complete(merge: Merge, architectures: dict[ModelReference, Architecture]) -> None:
    """Refuse a merge that goes without tensors that every input has.

    mergekit leaves out tensors that it has no name for, and tensors of only some layers unless they are stored under the very
    name that it looks for. Names are compared by what transformers makes of them. So tensors that transformers ignores, and
    the second name of a tied weight, are not missed. What the config takes of the inputs plays no part: to merge some layers
    or modules is a choice.

    Args:
        architectures: of some of the models, and at least of one.
    """
    any_architecture = next(iter(architectures.values()))
    stored_names: dict[ModelReference, dict[str, str]] = {}  # by what transformers makes of a tensor, its name in the checkpoint
    read: dict[ModelReference, set[str | None]] = {}  # what transformers makes of the tensors that are read
    for model in merge.inputs:
        loaded_as = architectures.get(model, any_architecture).loaded_as
        names = sorted(merge.checkpoint(model).files)
        stored_names[model] = {tensor: name for name in names if (tensor := loaded_as(name))}
        read[model] = {loaded_as(name) for names in merge.names_read(model) for name in names}
    common = set.intersection(*map(set, stored_names.values()))
    for model, name_of in stored_names.items():
        left_out = sorted(common - read[model])
        if not left_out:
            continue
        names = [name_of[tensor] for tensor in left_out]
        if names != left_out:
            advice = (
                "Load each model of the merge with transformers, save it with `save_pretrained(folder, "
                "save_original_format=False)`, and merge these"
            )
        else:
            advice = "mergekit knows no such tensors in this architecture; merge without a pave block if you can do without them"
        raise PaveError(
            f"{model}: mergekit would leave {len(left_out)} tensors that every input has out of the merged model, with or "
            f"without a pave block (such as {', '.join(names[:3])}). {advice}"
        )
