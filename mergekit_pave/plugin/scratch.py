"""Folders for merges that are measured and not kept."""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import filelock

from mergekit_pave.cache import writable


@contextlib.contextmanager
def scratch_folder(root: Path) -> Iterator[Path]:
    """A new folder, which is removed however the block ends.

    Folders that killed processes have left are removed, too. A lock beside each folder shows whether its process is still there,
    and tells where a folder is that could not be removed.

    Args:
        root: of the cache. The folder is on its disk.

    Raises:
        PaveError: the disk is full, or cannot be written to.
    """
    remove_abandoned(root)
    scratch = root / "scratch"
    folder = scratch / uuid.uuid4().hex
    with writable(scratch):
        scratch.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(_lock_of(folder))
        lock.acquire()
    try:
        with writable(folder):
            folder.mkdir()
        yield folder
    finally:
        _remove(folder, lock)


def remove_abandoned(root: Path) -> None:
    """Remove the folders that killed processes have left.

    Args:
        root: of the cache, which need not be there.
    """
    scratch = root / "scratch"
    for path in scratch.glob(".*.lock"):
        lock = filelock.FileLock(path)
        with contextlib.suppress(filelock.Timeout, OSError):  # somebody works there, or removes it
            lock.acquire(timeout=0)
            _remove(scratch / path.name[1 : -len(".lock")], lock)


def _remove(folder: Path, lock: filelock.BaseFileLock) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():  # without its lock nobody would find the folder again
        Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


def _lock_of(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.lock"
