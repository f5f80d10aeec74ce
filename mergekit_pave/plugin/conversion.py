"""Which tensors mergekit can make of those in a checkpoint.

The answer is mergekit's own. For each tensor mergekit goes through all names of a checkpoint, which takes hours where both are
tens of thousands. Here it gets only the names that matter for the tensor.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Collection, Iterator

from mergekit.architecture import auto
from mergekit.architecture.conversion import _expanded_target_keys, can_convert_checkpoint_keys
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming, WeightTransform


class Conversions:
    """What mergekit can make of the tensors of one checkpoint."""

    def __init__(self, model_type: str | None, stored: Collection[str]):
        self._model_type = model_type
        self._sources: dict[str, set[str]] = defaultdict(set)  # by what may be made of them
        transforms = get_checkpoint_conversion_mapping(model_type) if model_type else None
        for name in stored:
            for target in _targets(transforms or [], name):
                self._sources[target].add(name)

    def can_make(self, name: str) -> bool:
        """What `can_convert_checkpoint_keys` says, given the whole checkpoint."""
        sources = self._sources.get(name)
        return sources is not None and can_convert_checkpoint_keys(self._model_type, sources, name)


@contextlib.contextmanager
def each_checkpoint_once() -> Iterator[None]:
    """Within this, mergekit goes through each checkpoint once to infer an architecture."""
    by_checkpoint: dict[tuple[str | None, int], tuple[Collection[str], Conversions]] = {}

    def can_make(model_type: str | None, stored: Collection[str], name: str) -> bool:
        key = model_type, id(stored)  # no other object gets this id while we hold the names
        if key not in by_checkpoint:
            by_checkpoint[key] = stored, Conversions(model_type, stored)
        return by_checkpoint[key][1].can_make(name)

    original = auto.can_convert_checkpoint_keys
    auto.can_convert_checkpoint_keys = can_make
    try:
        yield
    finally:
        auto.can_convert_checkpoint_keys = original


def _targets(transforms: list[WeightTransform], name: str) -> Iterator[str]:
    """All names that a tensor may get, or may be made a part of."""
    names = [name]
    yield name
    for transform in transforms:
        for source in tuple(names):
            renamed, pattern = transform.rename_source_key(source)
            if pattern is None:
                continue
            if isinstance(transform, WeightRenaming):
                names.append(renamed)
                yield renamed
            else:
                yield from _expanded_target_keys(renamed, transform.target_patterns)
