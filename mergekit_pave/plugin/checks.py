"""What a merge as mergekit has planned it would trip over."""

from __future__ import annotations

from collections.abc import Iterator

from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.plan import MergePlanner

from mergekit_pave.errors import PaveError
from mergekit_pave.planning.checks import names_of
from mergekit_pave.plugin.checkpoints import checkpoint_of, known_of


def check_layers(planner: MergePlanner) -> None:
    """Refuse slices that take no layer, or more than there are."""
    config, modules = planner.config, planner.arch_info.modules
    slices = [(next(iter(modules)), part) for part in config.slices or ()]
    slices += [(name, part) for name, module in (config.modules or {}).items() for part in module.slices or ()]
    for name, part in slices:
        for source in part.sources if name in modules else ():
            count = planner._model_arch(source.model).get_module(name).num_layers()
            start, end = source.layer_range
            if not 0 <= start < end <= count:
                raise PaveError(
                    f"slices: layer_range [{start}, {end}] of {source.model} does not fit. The model has {count} layers: a range "
                    f"starts at 0 or later, ends at {count} or earlier, and takes at least one layer"
                )


def inputs_of(planner: MergePlanner) -> Iterator[tuple[ModelReference, WeightInfo]]:
    """Each model with each tensor that is read of it."""
    for _, task in planner._tensors:
        gather = getattr(task.gather_tensors, "gather_tensors", task.gather_tensors)
        yield from gather.weight_info.items()


def missing_from(planner: MergePlanner, model: ModelReference, info: WeightInfo) -> str | None:
    """See `check_present`; what mergekit looks for, and where."""
    known, checkpoint = known_of(planner, model), checkpoint_of(model)
    names = names_of(info)
    if found := next((name for name in names if name in known.stored), None):
        file = checkpoint.files[found]
        if file.endswith(".safetensors") and found not in checkpoint.stored:
            return f"which its index places in {file}, where {{}} not; fetch the checkpoint again"
        return None
    if info.optional or any(map(known.conversions.can_make, (info.name, *(info.aliases or ())))):
        return None
    return (
        "but its checkpoint has none of such a name. Fetch it again if it is incomplete. If a complete "
        f"{_class_name(planner, model)} has none either, mergekit cannot merge it, with or without a `pave:` block"
    )


def _class_name(planner: MergePlanner, model: ModelReference) -> str:
    return (planner._model_arch(model).config.architectures or ["its class"])[0]


def parameters_of(config: MergeConfiguration) -> Iterator[str]:
    """The names of all parameters that a config sets, wherever that is."""
    for part in (config, *(config.modules or {}).values()):
        outputs = part.slices or ()
        inputs = [*(part.models or ()), *(source for output in outputs for source in output.sources)]
        for holder in (part, *outputs, *inputs):
            yield from holder.parameters or ()
