"""Artefacts on disk: content keys, atomic writes, and manifests that are written last.

An artefact is a folder of safetensors files and a `manifest.json`, which names each file with its size and SHA-256, and ends
with a hash of itself. The manifest is written last, so if it is there, everything has been written. The folder's name is a key
(see `cache.keys`).

A power cut or a bad disk may damage a file later. Its hash shows that, to whoever reads the file: what nobody reads nobody
hashes. Sizes, which cost nothing, are compared wherever it is asked whether an artefact is there.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import safetensors
import safetensors.torch
from torch import Tensor

from mergekit_pave.cache.manifest import MAX_BYTES, DamagedError, parse, sealed
from mergekit_pave.errors import PaveError
from mergekit_pave.files import readable, replacing

MANIFEST = "manifest.json"
_PREPARED = "prepared.json"  # a manifest that does not count yet


def cache_root(configured: str | None) -> Path:
    """`pave.cache_dir`, else $MERGEKIT_PAVE_CACHE, else `mergekit-pave` in the Hugging Face cache home."""
    if configured or (configured := os.environ.get("MERGEKIT_PAVE_CACHE")):
        return Path(configured).expanduser().absolute()
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "mergekit-pave"


class Artefact:
    """One folder of the cache. Its manifest is checked before it is used, and written last."""

    def __init__(self, folder: Path):
        self.folder = folder

    def validate(self) -> dict[str, Any]:
        """The manifest, when all of the artefact is what it says.

        Raises:
            DamagedError: the artefact is incomplete or damaged, or its manifest is not sound.
        """
        manifest = self.read_manifest()
        for name in manifest["files"]:
            self._check(name, manifest)
        return manifest

    def is_intact(self) -> bool:
        """Whether `validate` finds nothing wrong."""
        with contextlib.suppress(DamagedError):
            self.validate()
            return True
        return False

    def is_complete(self) -> bool:
        """Whether the artefact is there, as far as the sizes of its files tell; see `read`."""
        manifest = self.manifest()
        return manifest is not None and self.has_files(manifest)

    def read_manifest(self) -> dict[str, Any]:
        """The manifest. The files may still turn out to be damaged.

        Raises:
            DamagedError: there is none, or it is not sound.
        """
        path = self.folder / MANIFEST
        try:
            with path.open("rb") as file:
                return parse(file.read(MAX_BYTES + 1))
        except OSError:
            raise DamagedError(f"there is no complete {MANIFEST} in {self.folder}") from None
        except ValueError as error:
            raise DamagedError(f"{path} is damaged: {error}") from None

    def manifest(self) -> dict[str, Any] | None:
        """The manifest, or None where `read_manifest` raises."""
        with contextlib.suppress(DamagedError):
            return self.read_manifest()
        return None

    def has_files(self, manifest: dict[str, Any]) -> bool:
        """Whether every file is there and has the size that a sound manifest says."""
        return all(_has_size(self.folder / name, expected["size"]) for name, expected in manifest["files"].items())

    def read(self, name: str, manifest: dict[str, Any] | None = None) -> dict[str, Tensor]:
        """The tensors of one file, which is compared with its hash first.

        They are mapped from the disk's cache, where hashing has put them, so the file is neither read nor held twice.

        Args:
            manifest: the artefact's, if it has been read before.

        Raises:
            DamagedError: the file is not what the manifest says, or cannot be parsed.
        """
        path = self.folder / name
        self._check(name, manifest or self.read_manifest())
        try:
            return safetensors.torch.load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise DamagedError(f"{path} is damaged: {error}") from error

    def _check(self, name: str, manifest: dict[str, Any]) -> None:
        path, expected = self.folder / name, manifest["files"].get(name)
        try:
            is_sound = expected and _has_size(path, expected["size"]) and _sha256(path) == expected["sha256"]
        except OSError as error:
            raise DamagedError(f"{path} cannot be read ({error})") from error
        if not is_sound:
            raise DamagedError(f"{path} is damaged: it is not the file that its {MANIFEST} describes")

    def write(self, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Write one file atomically and return its entry for the manifest."""
        data = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
        path = self.folder / name
        with _replacing(path) as temporary:
            safetensors.torch.save_file(data, temporary)
            entry = {"size": temporary.stat().st_size, "sha256": _sha256(temporary)}
        return entry

    def prepare(self, manifest: dict[str, Any]) -> None:
        """Write a manifest that does not count before `publish`."""
        with _replacing(self.folder / _PREPARED) as temporary:
            temporary.write_text(sealed(manifest))

    def prepared(self) -> dict[str, Any] | None:
        """The manifest that waits for `publish`, if it is sound and its files are there."""
        with contextlib.suppress(OSError, ValueError):
            manifest = parse((self.folder / _PREPARED).read_bytes())
            return manifest if self.has_files(manifest) else None
        return None

    def publish(self) -> None:
        """Let the manifest that was prepared count, in the place of one that is there, and remove what only that one names."""
        with writable(self.folder):
            os.replace(self.folder / _PREPARED, self.folder / MANIFEST)
            self.remove_others()

    def withdraw(self) -> None:
        """Forget a manifest that was prepared, and its files."""
        with writable(self.folder):
            (self.folder / _PREPARED).unlink(missing_ok=True)
            self.remove_others()

    def remove_others(self) -> None:
        """Remove the tensor files that no manifest names."""
        files = {name for manifest in (self.manifest(), self.prepared()) if manifest for name in manifest["files"]}
        for path in self.folder.glob("*.safetensors"):
            if path.name not in files:
                path.unlink(missing_ok=True)

    def complete(self, manifest: dict[str, Any]) -> None:
        """Write the manifest, which must name every file under `files`."""
        with _replacing(self.folder / MANIFEST) as temporary:
            temporary.write_text(sealed(manifest))

    @contextlib.contextmanager
    def discarded_on_error(self) -> Iterator[None]:
        """Start with no folder, and remove what the block has written unless it succeeds."""
        self.discard()
        try:
            yield
        except BaseException:
            self.discard()
            raise

    @contextlib.contextmanager
    def kept_on_error(self) -> Iterator[None]:
        """Keep what is there until the block replaces its manifest, and remove what else the block has written if it fails.

        Files have to get other names than those that are there, because others may be reading them.
        """
        try:
            yield
        except BaseException:
            self.remove_others()
            raise

    def discard(self) -> None:
        """Remove the artefact, its manifest first."""
        with writable(self.folder):
            (self.folder / MANIFEST).unlink(missing_ok=True)
            if self.folder.exists():
                shutil.rmtree(self.folder)

    def discard_damaged(self, manifest: dict[str, Any], error: DamagedError) -> DamagedError:
        """Remove an artefact of which a file turned out to be damaged, unless another process replaces it, or has replaced it.

        Args:
            manifest: what was read of it.
            error: what is wrong with the file.

        Returns:
            The error that tells both.
        """
        try:
            with self.lock(timeout=0):
                if self.manifest() == manifest:
                    self.discard()
        except filelock.Timeout:
            return DamagedError(f"{error}. Another process is at work on this entry of the cache; run again when it is done")
        except PaveError as reason:
            return DamagedError(f"{error}. This entry of the cache could not be removed: {reason}")
        return DamagedError(f"{error}. This entry was removed from the cache; run again, and it is made anew")

    @contextlib.contextmanager
    def lock(self, timeout: float = -1) -> Iterator[None]:
        """Keep other processes from making the same artefact meanwhile.

        Args:
            timeout: seconds to wait for another process; for ever if negative.

        Raises:
            filelock.Timeout: another process still has the lock.
        """
        with writable(self.folder):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.folder.parent / f".{self.folder.name}.lock")
            lock.acquire(timeout)
        try:
            yield
        finally:
            lock.release()


def require_space(folder: Path, size: int, instead: str = "lower pave.calibration.max_tokens") -> None:
    """Fail early if the disk has no room for so many bytes.

    Args:
        instead: what else would help, for the message.

    Raises:
        PaveError: there is not enough space.
    """
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    if free < size:
        raise PaveError(
            f"the PAVE cache at {folder} may need {readable(size)}, but only {readable(free)} are free. Choose "
            f"another place with pave.cache_dir or MERGEKIT_PAVE_CACHE, or {instead}"
        )


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _sha256(path: Path) -> str:
    """A file's hash. It is computed once, unless the file changes."""
    stat = path.stat()
    return _hash_of(path, stat.st_ino, stat.st_mtime_ns, stat.st_size)


@functools.cache
def _hash_of(path: Path, *_: int) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            sha.update(block)
    return sha.hexdigest()


@contextlib.contextmanager
def writable(path: Path) -> Iterator[None]:
    """Turns failures to write into errors that say what to do."""
    try:
        yield
    except filelock.Timeout:
        raise
    except (OSError, safetensors.SafetensorError) as error:
        raise PaveError(
            f"the PAVE cache cannot be written at {path}: {error}. Free some space or choose another place with "
            "pave.cache_dir or MERGEKIT_PAVE_CACHE; what is complete there will be used when you run again"
        ) from error


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """See `replacing`. The folder is made if it does not exist."""
    with writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            yield temporary
