"""What mergekit finds in the checkpoints of a merge."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.io.tasks import LoaderCache
from mergekit.plan import MergePlanner

from mergekit_pave.cache.checkpoint import Checkpoint
from mergekit_pave.planning.checks import names_of
from mergekit_pave.plugin.conversion import Conversions


def reads(planner: MergePlanner, model: ModelReference) -> list[list[str]]:
    """See `Environment`."""
    infos = [info for info in known_of(planner, model).infos if not info.optional or has(planner, model, info)]
    return [list(names_of(info)) for info in infos]


def has(planner: MergePlanner, model: ModelReference, info: WeightInfo) -> bool:
    """Whether mergekit finds a tensor in a model's checkpoint once it looks for it."""
    known = known_of(planner, model)
    if info.name in known.stored:
        return True
    # The name of another tensor among the tied ones is no name of this one, which is not needed beside that.
    names = set(names_of(info)) - known.names
    return not names.isdisjoint(known.stored) or known.conversions.can_make(info.name)


@dataclass(frozen=True)
class _Known:
    """What is asked about a model for each of its tensors, and would take long to find out each time.

    Attributes:
        infos: all tensors of its architecture.
        names: their names.
        stored: the names of the tensors in its checkpoint.
    """

    infos: list[WeightInfo]
    names: frozenset[str]
    stored: frozenset[str]
    conversions: Conversions


def known_of(planner: MergePlanner, model: ModelReference) -> _Known:
    known = planner.__dict__.setdefault("_pave_known", {})
    if model not in known:
        architecture, stored = planner._model_arch(model), frozenset(checkpoint_of(model).files)
        infos = architecture.all_weights()
        conversions = Conversions(architecture.config.model_type, stored)
        known[model] = _Known(infos, frozenset(info.name for info in infos), stored, conversions)
    return known[model]


def checkpoint_of(model: ModelReference) -> Checkpoint:
    return _of_loader(LoaderCache().get(model))


@functools.lru_cache(maxsize=64)
def _of_loader(loader: LazyTensorLoader) -> Checkpoint:
    return Checkpoint(loader.index.base_path, loader.index.tensor_paths)
