"""Keys of the weights of a checkpoint, and of other files, without reading all of them."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergekit_pave.cache.keys import digest


def weights_fingerprint(folder: str, shards: list[str]) -> str:
    """Key of a checkpoint's content, from samples of every tensor. It does not depend on where the files are.

    The samples are three blocks of each tensor, or 256 of a file that is not safetensors. A fine-tune that leaves all of these
    unchanged has changed almost nothing.
    """
    parts: list[Any] = []
    for shard in sorted(set(shards)):
        path = Path(folder, shard)
        size = path.stat().st_size
        parts.append([shard, size])
        with path.open("rb") as file:
            if shard.endswith(".safetensors"):
                start = 8 + int.from_bytes(file.read(8), "little")
                header = file.read(start - 8)
                parts.append(header)
                ranges = [entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"]
                offsets = [start + low + (high - low) * i // 3 for low, high in ranges for i in range(3)]
            else:
                offsets = [size * i // 256 for i in range(256)]
            for offset in offsets:
                file.seek(offset)
                parts.append(file.read(1024))
    return digest(*parts)


def weights_identity(folder: str, shards: list[str], fingerprint: str | None = None) -> str:
    """Key that also differs for checkpoints with the same samples: of the fingerprint, the configuration, and each file.

    A file in the Hub's cache stands in the key by its name, which is a hash, and any other by the time of its last change.

    Args:
        fingerprint: see `weights_fingerprint`, if it is known.
    """
    parts: list[Any] = [fingerprint or weights_fingerprint(folder, shards), Path(folder, "config.json").read_bytes()]
    for shard in sorted(set(shards)):
        path = Path(folder, shard)
        blob = path.resolve().name
        parts.append(blob if path.is_symlink() and len(blob) == 64 else path.stat().st_mtime_ns)
    return digest(*parts)


_YOUNG = 2.0  # seconds: a file may change again within the time that its file system tells apart
_MANY = 10_000  # files, more than anybody wants to be looked at


def files_identity(paths: Sequence[Path]) -> str | None:
    """A key of files, and of all files in folders: where they are, their sizes, and the times of their last changes.

    None where these do not tell whether a file has changed: one is gone, has just been written, or is behind a link to a folder.
    """
    parts: list[Any] = []
    try:
        for path in paths:
            found = sorted(path.rglob("*")) if path.is_dir() else [path]
            if any(inner.is_symlink() and inner.is_dir() for inner in found) or len(parts) + len(found) > _MANY:
                return None
            stats = [(str(inner.resolve()), inner.stat()) for inner in found if not inner.is_dir()]
            parts += [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    except OSError:
        return None
    if any(abs(time.time() - changed / 1e9) < _YOUNG for *_, changed in parts):
        return None
    return digest(*parts)
