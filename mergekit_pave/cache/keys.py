"""Keys: hashes of everything that determines what is kept under them, so that nothing in the cache ever becomes stale."""

from __future__ import annotations

import hashlib
import json
from typing import Any

# Part of every key of a kind: raise it when the same inputs would lead to other numbers or other files.
FORMATS = {"covariance": 3, "subspace": 1, "comparison": 1, "predictions": 1, "score": 1, "generated": 1, "samples": 1}


def digest(*parts: Any) -> str:
    """32 hexadecimal digits that differ for different JSON-serialisable values and bytes."""
    sha = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode()
        sha.update(len(data).to_bytes(8, "little") + data)
    return sha.hexdigest()[:32]


def key(kind: str, *parts: Any) -> str:
    """The key of an artefact of a kind: everything that determines its content."""
    return digest(kind, FORMATS[kind], *parts)
