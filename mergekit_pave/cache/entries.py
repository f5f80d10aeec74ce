"""All entries of a cache, and copies of artefacts."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from mergekit_pave.cache.artefact import Artefact, writable
from mergekit_pave.errors import PaveError

KINDS = ("covariance", "subspace", "comparison", "predictions", "score", "generated", "samples")


@dataclass(frozen=True)
class Entry:
    """One cache entry.

    It has the covariances of a model, the subspaces of its weights, or which of its weights equal a base model's; what a model
    gives on held-out rows, or how what a merge gives compares with that; what a model has written to be calibrated with; or the
    samples of a model as it takes them.

    Attributes:
        kind: one of `KINDS`.
        artefacts: for subspaces one for each weight, for texts one for each batch, otherwise a single one.
    """

    kind: str
    folder: Path
    artefacts: list[Artefact]

    @property
    def key(self) -> str:
        return self.folder.name

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())

    @property
    def changed(self) -> float:
        """When the last of its files was written, in seconds since the epoch."""
        return max(path.stat().st_mtime for path in (self.folder, *self.folder.rglob("*")))


def entries(root: Path) -> list[Entry]:
    """All entries of a cache."""
    result = []
    for kind in KINDS:
        for folder in sorted((root / kind).glob("[!.]*")):
            parts = sorted(folder.glob("[!.]*")) if kind in ("subspace", "generated") else [folder]
            result.append(Entry(kind, folder, [Artefact(part) for part in parts]))
    return result


def copy(source: Path, target: Path) -> None:
    """Copy a complete artefact, its manifest last.

    Raises:
        DamagedError: the source is incomplete or damaged.
        PaveError: the target exists and is not empty.
    """
    manifest = Artefact(source).validate()
    if target.exists() and any(target.iterdir()):
        raise PaveError(f"{target} is there already and not empty; choose another folder, or remove it first")
    with writable(target):
        target.mkdir(parents=True, exist_ok=True)
        for name in manifest["files"]:
            shutil.copyfile(source / name, target / name)
    Artefact(target).complete(manifest)
