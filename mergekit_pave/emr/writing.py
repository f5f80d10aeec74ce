"""Writing a task's file: see `emr.file` for what is in it."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from mergekit_pave.emr import hashes
from mergekit_pave.emr.file import TYPES
from mergekit_pave.errors import PaveError
from mergekit_pave.files import replacing

_ALIGNED = 8  # bytes that the header is a multiple of
_TYPE_NAMES = {dtype: name for name, dtype in TYPES.items()}

# Name, type and shape of a tensor, and a function that makes it.
Entry = tuple[str, torch.dtype, tuple[int, ...], Callable[[], Tensor]]


@contextlib.contextmanager
def writable(path: Path) -> Iterator[None]:
    """Turns failures to write into errors that say what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise PaveError(f"{path} cannot be written: {error}. Free some space, or choose another folder") from error


def write(path: Path, metadata: dict[str, str], tensors: Iterable[Entry]) -> None:
    """Write a task's file, as a whole or not at all. One tensor at a time is in memory.

    Args:
        path: OUT/emr/NAME.safetensors. The folder is made if it is not there.
        metadata: as `_Metadata` has them, in text.
        tensors: by their names in the file. They are made one after the other, those of wide types first.

    Raises:
        PaveError: the disk is full, or cannot be written to.
        ValueError: a tensor has another type or shape than announced.
    """
    entries = sorted(tensors, key=lambda entry: -entry[1].itemsize)
    found = {"": hashes.of_metadata(metadata)}
    entries.append((hashes.NAME, torch.uint8, (1 + len(entries), hashes.SIZE), lambda: hashes.as_tensor(found)))
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, dtype, shape, _ in entries:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _TYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNED)
    with writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        with writable(path):
            file = temporary.open("wb")
        try:
            _put(file, len(text).to_bytes(8, "little") + text, path)
            for name, dtype, shape, make in entries:
                tensor = make()
                if tensor.dtype != dtype or tensor.shape != shape:
                    raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {tuple(shape)}")
                found[name] = hashes.of_tensor(tensor)
                _put(file, hashes.bytes_of(tensor), path)
        finally:
            with writable(path):
                file.close()


def _put(file: Any, content: Any, path: Path) -> None:
    with writable(path):
        file.write(content)
