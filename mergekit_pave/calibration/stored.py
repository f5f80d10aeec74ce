"""Covariances in the cache."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from mergekit_pave import cache
from mergekit_pave.core.covariance import Covariance, Covariances


def stored_covariances(folder: str) -> StoredCovariances:
    """The covariances in a folder. Its manifest is read once, because it may name every expert of a large model."""
    stat = Path(folder, cache.MANIFEST).stat()
    return _stored_covariances(folder, stat.st_mtime_ns, stat.st_ino)


@functools.cache
def _stored_covariances(folder: str, *_: int) -> StoredCovariances:
    return StoredCovariances(cache.Artefact(Path(folder)))


class StoredCovariances(Covariances):
    """The covariances in an intact artefact."""

    def __init__(self, artefact: cache.Artefact):
        self._artefact = artefact
        self._manifest = artefact.read_manifest()

    def files(self, layers: tuple[str, ...]) -> tuple[str, ...]:
        """The files of layers that share a weight. Layers with the same input have the same files."""
        return tuple(self._manifest["layers"][layer]["file"] for layer in layers if self._tokens(layer))

    @property
    def head(self) -> str | None:
        """The path of the model's head, if it was measured."""
        return self._manifest.get("head", {}).get("layer")

    def predicted(self) -> Tensor:
        """The mean probability of each token, (tokens,) float64; only if the head was measured.

        Raises:
            DamagedError: it is none.
        """
        file = self._manifest["head"]["file"]
        sums = self._artefact.read(file).get("predicted")
        if sums is None or sums.dim() != 1 or sums.dtype != torch.float64 or not (sums.isfinite() & (sums >= 0)).all():
            raise cache.DamagedError(f"{self._artefact.folder / file} is damaged: it has no probabilities")
        if not sums.sum() > 0:
            raise cache.DamagedError(f"{self._artefact.folder / file} is damaged: all probabilities are 0")
        return sums / sums.sum()

    def _tokens(self, layer: str) -> int:
        return self._manifest["layers"].get(layer, {"tokens": 0})["tokens"]

    def _load(self, layer: str) -> Covariance:
        entry = self._manifest["layers"][layer]
        tensors = self._artefact.read(entry["file"])
        try:
            return Covariance.from_tensors(tensors, entry["tokens"], entry["dim"])
        except ValueError as error:
            raise cache.DamagedError(f"{self._artefact.folder / entry['file']} is damaged: {error}") from None
