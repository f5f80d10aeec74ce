"""What mergekit makes of the tensors of a checkpoint that has them in another form, such as a mixture's experts one by one.

The answer is mergekit's own. For each tensor mergekit goes through all names of a checkpoint, which takes hours where both are
tens of thousands. Here it gets only the names that matter for the tensor.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator

from mergekit.architecture.conversion import _expanded_target_keys, can_convert_checkpoint_keys, convert_checkpoint_tensors
from torch import Tensor
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

    def make(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """What `convert_checkpoint_tensors` makes, given the whole checkpoint, of a tensor that it can make.

        Args:
            read: gives a tensor of the checkpoint.
        """
        sources = {source: functools.partial(read, source) for source in self._sources.get(name, ())}
        return convert_checkpoint_tensors(self._model_type, sources, name)


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
