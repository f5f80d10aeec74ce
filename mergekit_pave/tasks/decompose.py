"""The tails of weights: decomposed into the cache, and read from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import torch
from mergekit.graph import Task
from mergekit.io.tasks import LoadTensor
from torch import Tensor

from mergekit_pave.cache import Artefact, DamagedError
from mergekit_pave.calibration.stored import stored_covariances
from mergekit_pave.core.failures import advising
from mergekit_pave.core.linear import Linear
from mergekit_pave.core.purification import decompose_weight, leave_slices
from mergekit_pave.errors import PaveError
from mergekit_pave.settings import RelativeRegularization
from mergekit_pave.tasks.base import TensorTask

_TENSORS = ("directions", "coefficients", "values")
_NO_EXPERT = ""  # the key of an ordinary layer in a manifest, where that of an expert is its number


class LoadTail(TensorTask):
    """The tails of the matrices of one weight, read from the cache. Value: see `decompose_weight`.

    Attributes:
        folder: of the cache entry.
        count: components that a tail has at least.
        min_tokens: tokens that an expert must have seen to have a tail.
        unchanged: the experts whose tails are left out, because they equal the base model's.
    """

    folder: str
    count: int
    min_tokens: int
    unchanged: tuple[int, ...] = ()

    def arguments(self) -> dict[str, Task]:
        return {}

    def execute(self) -> dict[str, Any]:
        # If another process puts a wider tail in its place just now, the second attempt finds that one.
        tail = self._read() or self._read()
        if tail is None:
            raise PaveError(f"the cache entry {self.folder} was removed or damaged during the run; run again")
        return tail

    def _read(self) -> Optional[dict[str, Any]]:
        artefact = Artefact(Path(self.folder))
        manifest = _tail_manifest(artefact.folder, self.count, self.min_tokens)
        if manifest is None:
            return None
        try:
            tensors = artefact.read(*manifest["files"], manifest)
        except DamagedError as error:
            if artefact.manifest() != manifest:
                return None
            raise artefact.discard_damaged(manifest, error) from error.__cause__
        tensors["values"] = tensors["values"].numpy()  # see `decompose_weight`
        without_tail = {None if expert == _NO_EXPERT else int(expert): tokens for expert, tokens in manifest["left"].items()}
        return leave_slices(
            {**tensors, "slices": manifest["slices"], "without_tail": without_tail}, self.min_tokens, self.unchanged
        )


class DecomposeWeight(TensorTask):
    """Puts the tails of one weight into the cache. The covariances have to be there.

    Attributes:
        covariances: the folder of the model's covariances.
        tail: what will read the result.
    """

    weight: LoadTensor
    covariances: str
    layer: Linear
    regularization: float | RelativeRegularization
    tail: LoadTail

    def arguments(self) -> dict[str, Task]:
        return {"weight": self.weight}

    @property
    def folder(self) -> str:
        return self.tail.folder

    @property
    def cache(self) -> int:
        """Bytes of cache that it takes at most."""
        return 4 * len(self.layer.layers) * sum(self.layer.shape) * self.tail.count

    def execute(self, weight: Tensor) -> None:
        artefact, count, min_tokens = Artefact(Path(self.folder)), self.tail.count, self.tail.min_tokens
        with artefact.lock():
            if has_tail(artefact.folder, count, min_tokens):
                return  # another process has just made it
            # Another merge may need what is there, so a tail is only ever replaced by a wider one.
            if before := artefact.manifest():
                count, min_tokens = max(count, before["count"]), min(min_tokens, before["min_tokens"])
            covariances, where = stored_covariances(self.covariances), (str(self.model), self.tensor)
            with advising(f"{self.model}: decomposing {self.tensor}", weight.device):
                tail = decompose_weight(weight, self.layer, covariances, self.regularization, count, min_tokens, where)
            tail["values"] = torch.from_numpy(tail["values"])
            # The name differs from that of the file before, which another process may be reading.
            name = f"tail-{count}-{min_tokens}.safetensors"
            entry = artefact.write(name, {key: tail.pop(key) for key in _TENSORS})
            about = {"model": str(self.model), "tensor": self.tensor, "count": count, "min_tokens": min_tokens}
            left = {_NO_EXPERT if expert is None else str(expert): tokens for expert, tokens in tail["without_tail"].items()}
            artefact.complete({"files": {name: entry}, "slices": tail["slices"], "left": left, **about})
            artefact.remove_others()


def has_tail(folder: Path, count: int, min_tokens: int) -> bool:
    """Whether the cache has tails of at least `count` components, for every expert that saw `min_tokens` tokens."""
    return _tail_manifest(folder, count, min_tokens) is not None


def _tail_manifest(folder: Path, count: int, min_tokens: int) -> Optional[dict[str, Any]]:
    """The manifest of such tails, or None where the cache has none."""
    artefact = Artefact(folder)
    manifest = artefact.manifest()
    if manifest is None or manifest["count"] < count:
        return None
    # Experts without a tail have to be such as saw too few tokens for this merge, too.
    lacking = [tokens for tokens in manifest["left"].values() if tokens >= max(1, min_tokens)]
    return manifest if not lacking and artefact.has_files(manifest) else None
