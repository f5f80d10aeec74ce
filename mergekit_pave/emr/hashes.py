"""The hashes in a task's file, which show that nothing of it is damaged."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

from mergekit_pave.cache.checkpoint import Stored

NAME = "sha256"  # of the tensor that has them
SIZE = 32  # bytes of a hash


def bytes_of(tensor: Tensor) -> Any:
    """What a file holds of a tensor."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def of_tensor(tensor: Tensor) -> bytes:
    return hashlib.sha256(bytes_of(tensor)).digest()


def of_metadata(metadata: dict[str, str]) -> bytes:
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).digest()


def as_tensor(found: dict[str, bytes]) -> Tensor:
    """Hashes in the order of the names of what they are of, (names, SIZE)."""
    return torch.frombuffer(bytearray(b"".join(found[name] for name in sorted(found))), dtype=torch.uint8).view(-1, SIZE)


def taken_from(stored: dict[str, Stored], file: Any) -> dict[str, bytes]:
    """The hash of each tensor by its name, and that of the metadata by "".

    Args:
        stored: the tensors of the file. The one that has the hashes is taken out.

    Raises:
        ValueError: there are not as many as there are tensors.
    """
    if stored.pop(NAME, None) != ("U8", (1 + len(stored), SIZE)):
        raise ValueError(f"it lacks the hashes of its tensors ({NAME})")
    rows = file.get_tensor(NAME)
    return {name: row.numpy().tobytes() for name, row in zip(sorted(["", *stored]), rows)}
