"""Which weights of a model are known to equal the base model's; see `core.equality`.

There are such weights after LoRA on a few layers, after training with frozen layers, and in the untouched tower or experts of a
larger model. They are found when a merge is planned. A changed weight usually differs in its first row, so the comparison costs
almost nothing. An equal weight is read as a whole, once, and the cache remembers the result.
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
    """Which weights of one model equal those of one base model, as far as they have been compared.

    Args:
        root: of the cache.
        identities: of the weights of the two models.
        names: of the two models, for messages.
    """

    def __init__(self, root: Path, identities: tuple[str, str], names: tuple[str, str]):
        self._artefact = Artefact(root / "comparison" / key("comparison", *identities))
        self._names = names
        manifest = self._artefact.manifest()
        self._equal: dict[str, list[int]] = manifest["equal"] if manifest else {}  # of a changed stack the list is empty

    def equal_to_base(self, tensor: str) -> tuple[int, ...]:
        """The matrices of a weight that are known to equal the base model's."""
        return tuple(self._equal.get(tensor, ()))

    def compare(self, pairs: dict[str, Callable[[], Sequence[Tensor | None]]], quiet: bool, keep_all: bool) -> None:
        """Compare weights that have not been compared yet, and remember which are equal.

        Args:
            pairs: by the weight's name, a function that reads it and the base model's; either may be None.
            keep_all: remember the weights that differ as well, because no part of one can be read alone.
        """
        missing = {tensor: read for tensor, read in pairs.items() if tensor not in self._equal}
        results = {}
        with bar(len(missing), f"Comparing {self._names[0]} with {self._names[1]}", "weights", quiet, _DELAY) as progress:
            for tensor, read in missing.items():
                weight, of_base = read()
                equal = equal_matrices(weight, of_base)
                # A stack may be made of many tensors, all of which are read for it. So the result for a stack is kept, too.
                if equal or keep_all or (weight is not None and weight.dim() == 3):
                    results[tensor] = list(equal)
                progress.update()
        if results:
            self._equal |= results
            model, base = self._names
            try:
                with self._artefact.lock():
                    self._artefact.complete({"files": {}, "model": model, "base": base, "equal": self._equal})
            except PaveError as error:  # a read-only cache is good for everything else
                LOG.info("which weights of %s equal those of %s is not kept: %s", model, base, error)
