"""Which weights are what they were in the base model, as far as it is known; see `core.equality`.

LoRA on a few layers, frozen layers, and the untouched tower or experts of a larger model all leave such weights. They are found
when a merge is planned. A changed weight differs in its first row, so it costs next to nothing; one that did not change is read
whole, once, and the cache remembers it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from mergekit_pave.cache.artefact import Artefact
from mergekit_pave.cache.keys import key
from mergekit_pave.core.equality import equal_matrices
from mergekit_pave.errors import PaveError
from mergekit_pave.progress import bar

LOG = logging.getLogger(__name__)

_DELAY = 3  # seconds: a comparison that takes less shows no bar


class Comparison:
    """What is known of the weights of one model beside those of one base model.

    Args:
        root: of the cache.
        identities: of the two models' weights.
        names: of the two models, for people.
    """

    def __init__(self, root: Path, identities: tuple[str, str], names: tuple[str, str]):
        self._artefact = Artefact(root / "comparison" / key("comparison", *identities))
        self._names = names
        manifest = self._artefact.manifest()
        self._equal: dict[str, list[int]] = manifest["equal"] if manifest else {}  # of a changed stack the list is empty

    def known(self, tensor: str) -> tuple[int, ...]:
        """The matrices of a weight that are known to equal the base model's."""
        return tuple(self._equal.get(tensor, ()))

    def compare(self, pairs: dict[str, Callable[[], Sequence[Tensor | None]]], quiet: bool, keep_all: bool) -> None:
        """Compare weights that are not known yet, and remember which of them are equal.

        Args:
            pairs: by the weight's name, what reads it and the base model's, where there are such.
            keep_all: remember the weights that differ as well, as a part of one cannot be read alone.
        """
        unknown = {tensor: read for tensor, read in pairs.items() if tensor not in self._equal}
        found = {}
        with bar(len(unknown), f"Comparing {self._names[0]} with {self._names[1]}", "weights", quiet, _DELAY) as progress:
            for tensor, read in unknown.items():
                both = read()
                equal = equal_matrices(*both)
                # A stack may be made of many tensors, all of which are read for it, so what is known of one is kept, too.
                if equal or keep_all or (both[0] is not None and both[0].dim() == 3):
                    found[tensor] = list(equal)
                progress.update()
        if found:
            self._equal |= found
            model, base = self._names
            try:
                with self._artefact.lock():
                    self._artefact.complete({"files": {}, "model": model, "base": base, "equal": self._equal})
            except PaveError as error:  # a cache that is read-only does for all else
                LOG.info("which weights of %s equal those of %s is not kept: %s", model, base, error)
