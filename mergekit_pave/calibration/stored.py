"""Covariances in the cache."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from mergekit_pave import cache
from mergekit_pave.core.covariance import Covariance, Covariances
from mergekit_pave.core.exact import float64_device
from mergekit_pave.errors import PaveError

T = TypeVar("T")

_given: set[str] = set()  # folders that are named under `covariance:`


def never_remove(folder: str) -> None:
    """Note that a folder belongs to somebody else: a file of it that turns out to be damaged is told, and nothing is removed."""
    _given.add(folder)


def stored_covariances(folder: str) -> StoredCovariances:
    """The covariances in a folder. Its manifest is read once, because it may name every expert of a large model."""
    try:
        stat = Path(folder, cache.MANIFEST).stat()
    except OSError as error:
        raise cache.DamagedError(f"the covariances at {folder} were removed during the run; run again") from error
    return _stored_covariances(folder, stat.st_mtime_ns, stat.st_ino)


@functools.cache
def _stored_covariances(folder: str, *_: int) -> StoredCovariances:
    return StoredCovariances(cache.Artefact(Path(folder)))


class StoredCovariances(Covariances):
    """The covariances in a complete artefact. Each file is checked when it is read."""

    def __init__(self, artefact: cache.Artefact):
        self._artefact = artefact
        self._manifest = artefact.read_manifest()

    def files(self, layers: tuple[str, ...]) -> tuple[str, ...]:
        """The files of layers that share a weight. Layers with the same input have the same files."""
        return tuple(self._manifest["layers"][layer]["file"] for layer in layers if self._tokens(layer))

    def has(self, layers: Sequence[str]) -> bool:
        """Whether the covariances of layers were kept; those of layers that saw no token are not needed."""
        return all(self._manifest["layers"][layer]["file"] for layer in layers if self._tokens(layer))

    @property
    def head(self) -> str | None:
        """The path of the model's head, if it was measured."""
        return self._manifest.get("head", {}).get("layer")

    def predicted(self) -> Tensor:
        """The mean probability of each token, (tokens,) float64; only if the head was measured.

        Raises:
            DamagedError: it is none. What is damaged is removed, unless it is given.
        """
        return self._read(self._manifest["head"]["file"], _probabilities)

    def _tokens(self, layer: str) -> int:
        return self._manifest["layers"].get(layer, {"tokens": 0})["tokens"]

    def _load(self, layer: str, device: torch.device | str) -> Covariance:
        entry = self._manifest["layers"][layer]
        if entry["file"] is None:
            raise PaveError(f"the covariance of {layer} was not kept in {self._artefact.folder}; run again to measure it anew")
        device = float64_device(torch.device(device))

        def make(tensors: dict[str, Tensor]) -> Covariance:
            # A sum is moved as it is stored, half of the matrix, and unpacked there.
            moved = {name: tensor.to(device) for name, tensor in tensors.items()}
            return Covariance.from_tensors(moved, entry["tokens"], entry["dim"])

        return self._read(entry["file"], make)

    def _read(self, file: str, make: Callable[[dict[str, Tensor]], T]) -> T:
        """What a function makes of a file. It raises a ValueError if the tensors are not what they should be."""
        try:
            tensors = self._artefact.read(file, self._manifest)
            try:
                return make(tensors)
            except ValueError as error:
                raise cache.DamagedError(f"{self._artefact.folder / file} is damaged: {error}") from None
        except cache.DamagedError as error:
            if str(self._artefact.folder) in _given:
                raise cache.DamagedError(f"{error}; fetch these covariances again") from error.__cause__
            raise self._artefact.discard_damaged(self._manifest, error) from error.__cause__


def _probabilities(tensors: dict[str, Tensor]) -> Tensor:
    sums = tensors.get("predicted")
    if sums is None or sums.dim() != 1 or sums.dtype != torch.float64 or not (sums.isfinite() & (sums >= 0)).all():
        raise ValueError("it has no probabilities")
    if not sums.sum() > 0:
        raise ValueError("all probabilities are 0")
    return sums / sums.sum()
