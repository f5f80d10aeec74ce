"""Files that are there whole or not at all, whenever a process is killed; sizes for people; and what is a path at all."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that takes the place of `path` when the block succeeds, and is gone when it does not.

    It is left to the system when to write it to the disk, as there is one for each weight. What a power cut leaves of a file
    in the cache is told by its hash.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def readable(size: float) -> str:
    """Bytes for people."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 999.5:  # or it would be rounded to 1e+03
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def looks_local(path: str) -> bool:
    """Whether a path can be nothing on the Hub, be it there or not."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1
