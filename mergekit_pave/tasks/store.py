"""Tensors on the disk that nobody else sees, and mergekit's task that reads one of them."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from typing import Any, Optional

import safetensors.torch
from mergekit.graph import Task
from torch import Tensor

from mergekit_pave.cache import writable
from mergekit_pave.errors import PaveError


class TensorStore:
    """Tensors by number, in a file without a name: the system removes it when the process ends, however it ends."""

    def __init__(self, folder: Path):
        """
        Args:
            folder: on a disk with room for them. It is made when the first tensor comes.
        """
        self._folder = folder
        self._file: Any = None
        self._places: dict[int, tuple[int, int] | None] = {}  # the start and the size of each
        self._lock = threading.Lock()

    def __contains__(self, number: int) -> bool:
        return number in self._places

    def put(self, number: int, tensor: Tensor | None) -> None:
        """Keep a tensor in place of an earlier one with this number; None stands for one that the merge leaves out.

        Raises:
            PaveError: the disk is full, or cannot be written to.
        """
        if tensor is None:
            self._places[number] = None
            return
        content = safetensors.torch.save({"tensor": tensor.contiguous().cpu()})
        with self._lock, writable(self._folder):
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
            place = self._places.get(number)
            if place is None or place[1] != len(content):
                place = self._file.seek(0, 2), len(content)
            self._file.seek(place[0])
            self._file.write(content)
            self._file.flush()
            self._places[number] = place

    def get(self, number: int) -> Tensor | None:
        """The tensor with this number."""
        place = self._places[number]
        if place is None:
            return None
        with self._lock:
            self._file.seek(place[0])
            content = self._file.read(place[1])
        return safetensors.torch.load(content)["tensor"]

    def clear(self) -> None:
        """Forget all tensors, and give back their room on the disk."""
        self._places.clear()
        if self._file is not None:
            self._file.close()
            self._file = None


class ReadTensor(Task[Optional[Tensor]]):
    """Reads an output tensor that was merged before. It stands in the place of mergekit's task that merges it."""

    store: Any
    number: int

    def __hash__(self) -> int:
        return hash((ReadTensor, self.number))

    def arguments(self) -> dict[str, Task]:
        return {}

    def execute(self) -> Optional[Tensor]:
        if self.number not in self.store:
            raise PaveError("pave.refine: only a merge that is written to a folder is refined (run_merge, plan_to_disk)")
        return self.store.get(self.number)
