"""What mergekit finds in the checkpoints of a merge, and by which names."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.io.tasks import LoaderCache
from mergekit.plan import MergePlanner

from mergekit_pave.cache.checkpoint import Checkpoint
from mergekit_pave.calibration.conversion import Conversions
from mergekit_pave.planning.names import all_names, own_names


def checkpoint_of(model: ModelReference) -> Checkpoint:
    return _of_loader(LoaderCache().get(model))


@functools.lru_cache(maxsize=64)
def _of_loader(loader: LazyTensorLoader) -> Checkpoint:
    return Checkpoint(loader.index.base_path, loader.index.tensor_paths)


def without_aliases(info: WeightInfo) -> WeightInfo:
    """The aliases of an optional weight, which mergekit trips over, among the other names that it is read by."""
    if not info.optional or not info.aliases:
        return info
    return info.model_copy(update={"aliases": None, "tied_names": (*info.aliases, *(info.tied_names or ()))})


def names_read(planner: MergePlanner, model: ModelReference) -> list[list[str]]:
    """See `Merge`."""
    tensors = _tensors_of(planner, model).infos
    return [list(all_names(info)) for info in tensors if not info.optional or has(planner, model, info)]


def has(planner: MergePlanner, model: ModelReference, info: WeightInfo) -> bool:
    """Whether mergekit finds an optional tensor in a model's checkpoint once it looks for it."""
    tensors, files = _tensors_of(planner, model), checkpoint_of(model).files
    if info.name in files:
        return True
    # A name that is also another tensor's in the architecture is stored for that one. Then this one is not needed.
    names = set(all_names(info)) - tensors.names
    return any(name in files for name in names) or _can_make(tensors, info)


def missing_from(planner: MergePlanner, model: ModelReference, info: WeightInfo) -> str | None:
    """Why mergekit would not find a tensor that it needs; see `check_present`."""
    checkpoint = checkpoint_of(model)
    if name := next((name for name in all_names(info) if name in checkpoint.files), None):
        file = checkpoint.files[name]
        if file.endswith(".safetensors") and name not in checkpoint.stored:
            return f"which its index places in {file}, where {{}} not; fetch the checkpoint again"
        return None
    if info.optional or _can_make(_tensors_of(planner, model), info):
        return None
    class_name = (planner._model_arch(model).config.architectures or ["its class"])[0]
    return (
        "but its checkpoint has none of such a name. Fetch it again if it is incomplete. If a complete "
        f"{class_name} has none either, mergekit cannot merge it, with or without a `pave:` block"
    )


@dataclass(frozen=True)
class _Tensors:
    """The tensors of a model's architecture: looked up for each tensor, and slow to find.

    Attributes:
        names: of `infos`.
        conversions: what mergekit can make of the tensors in the checkpoint.
    """

    infos: list[WeightInfo]
    names: frozenset[str]
    conversions: Conversions


def _tensors_of(planner: MergePlanner, model: ModelReference) -> _Tensors:
    models = planner.__dict__.setdefault("_pave_tensors", {})
    if model not in models:
        architecture = planner._model_arch(model)
        infos = [without_aliases(info) for info in architecture.all_weights()]
        conversions = Conversions(architecture.config.model_type, checkpoint_of(model).files)
        models[model] = _Tensors(infos, frozenset(info.name for info in infos), conversions)
    return models[model]


def _can_make(tensors: _Tensors, info: WeightInfo) -> bool:
    return any(map(tensors.conversions.can_make, own_names(info)))
