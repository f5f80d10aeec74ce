"""Artefacts on disk: content keys, atomic writes, and manifests that are written last.

An artefact is a folder of safetensors files and a `manifest.json` that names each with its size and SHA-256. The
manifest is written last, so its presence means that the rest is complete. The folder's name is a hash of
everything that determines the content, so nothing in it ever becomes stale.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import safetensors
import safetensors.torch
from torch import Tensor

from mergekit_pave.errors import PaveError

MANIFEST = "manifest.json"
# Part of every key: raise it when the same inputs would lead to other numbers or other files.
FORMAT = 1


def cache_root(configured: str | None) -> Path:
    """`pave.cache_dir`, else $MERGEKIT_PAVE_CACHE, else `mergekit-pave` in the Hugging Face cache home."""
    if configured or (configured := os.environ.get("MERGEKIT_PAVE_CACHE")):
        return Path(configured).expanduser().absolute()
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "mergekit-pave"


def digest(*parts: Any) -> str:
    """A 32-digit key of JSON-serialisable values and bytes."""
    sha = hashlib.sha256()
    for part in (FORMAT, *parts):
        data = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode()
        sha.update(len(data).to_bytes(8, "little") + data)
    return sha.hexdigest()[:32]


def weights_identity(folder: str, shards: list[str]) -> str:
    """Key of a checkpoint's content, from its files without reading them whole.

    A file in the Hub's cache is named by its hash already. Of any other file this takes size, modification time, header
    and small samples spread over it: two fine-tunes of one model differ nearly everywhere, even where
    an archive tool has levelled their times.
    """
    parts: list[Any] = []
    for shard in sorted(set(shards)):
        path = Path(folder, shard)
        blob = path.resolve().name
        if path.is_symlink() and len(blob) == 64:
            parts.append([shard, blob])
            continue
        stat = path.stat()
        parts.append([shard, stat.st_size, stat.st_mtime_ns])
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little") if shard.endswith(".safetensors") else 0
            parts.append(file.read(min(header, stat.st_size)))
            for i in range(256):
                file.seek(stat.st_size * i // 256)
                parts.append(file.read(4096))
    parts.append(Path(folder, "config.json").read_bytes())
    return digest(*parts)


class Artefact:
    """One folder of the cache. Reading needs a manifest; writing ends with one."""

    def __init__(self, folder: Path):
        self.folder = folder

    def manifest(self) -> dict[str, Any] | None:
        """The manifest's content, or None where there is no complete artefact."""
        try:
            return json.loads((self.folder / MANIFEST).read_text())
        except (OSError, ValueError):
            return None

    def is_intact(self) -> bool:
        """Whether every file still is what the manifest says, down to its hash."""
        manifest = self.manifest()
        if manifest is None:
            return False
        for name, known in manifest["files"].items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != known["size"] or _sha256(path) != known["sha256"]:
                return False
        return True

    def read(self, name: str) -> dict[str, Tensor]:
        """The tensors of one file.

        Raises:
            PaveError: the file is gone or cannot be parsed.
        """
        path = self.folder / name
        try:
            return safetensors.torch.load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise PaveError(f"the cache file {path} cannot be read ({error}); remove its folder and run again") from error

    def write(self, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Write one file atomically and return its entry for the manifest."""
        data = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
        path = self.folder / name
        with _replacing(path) as temporary:
            safetensors.torch.save_file(data, temporary)
            entry = {"size": temporary.stat().st_size, "sha256": _sha256(temporary)}
        return entry

    def remove(self, name: str) -> None:
        """Remove one file that no manifest names yet."""
        (self.folder / name).unlink()

    def complete(self, manifest: dict[str, Any]) -> None:
        """Write the manifest, which must name every file under `files`."""
        with _replacing(self.folder / MANIFEST) as temporary:
            temporary.write_text(json.dumps(manifest, indent=1))

    def require_space(self, size: int) -> None:
        """Fail early where the disk has no room for so many bytes.

        Raises:
            PaveError: there is not enough space.
        """
        free = shutil.disk_usage(next(folder for folder in self.folder.parents if folder.exists())).free
        if free < size:
            raise PaveError(
                f"the PAVE cache at {self.folder} may need {size / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free. Choose "
                "another place with pave.cache_dir or MERGEKIT_PAVE_CACHE, or lower pave.calibration.max_tokens"
            )

    @contextlib.contextmanager
    def discarded_on_error(self) -> Iterator[None]:
        """Start from an empty folder, and remove it again unless the block succeeds."""
        self.discard()
        try:
            yield
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Remove the artefact, its manifest first."""
        with _writable(self.folder):
            (self.folder / MANIFEST).unlink(missing_ok=True)
            if self.folder.exists():
                shutil.rmtree(self.folder)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from making the same artefact at the same time."""
        with _writable(self.folder):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.folder.parent / f".{self.folder.name}.lock")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


def _sha256(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            sha.update(block)
    return sha.hexdigest()


@contextlib.contextmanager
def _writable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        raise PaveError(
            f"the PAVE cache cannot be written at {path}: {error}. Free some space or choose another place with "
            "pave.cache_dir or MERGEKIT_PAVE_CACHE; what is complete there will be used when you run again"
        ) from error


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file that takes the place of `path` when the block succeeds, and is gone when it does not."""
    with _writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
