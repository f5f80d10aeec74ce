"""Files that are written as a whole or not at all, sizes for people, and which names are paths."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that replaces `path` when the block succeeds, and is removed when it does not.

    So a killed process leaves the old file or the new one, never a part. The system decides when the file gets to the disk,
    because the cache has one for each weight. If a power cut damages it there, its hash shows that.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def readable(size: float) -> str:
    """A number of bytes, for people."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 999.5:  # anything larger would be rounded to 1e+03
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def looks_local(path: str) -> bool:
    """Whether a name can only be a path, and not a name on the Hub. The path need not exist."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1
