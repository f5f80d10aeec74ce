"""The tails of weights: decomposed into the cache, and read from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import torch
from mergekit.graph import Task
from mergekit.io.tasks import LoaderCache, LoadTensor
from torch import Tensor

from mergekit_pave.cache import Artefact, DamagedError
from mergekit_pave.calibration.stored import stored_covariances
from mergekit_pave.calibration.use import Use
from mergekit_pave.core.covariance import Covariance, Covariances, Measurement
from mergekit_pave.core.failures import advising
from mergekit_pave.core.linear import Linear
from mergekit_pave.core.measured import MeasuredCovariances
from mergekit_pave.core.purification import decompose_weight, leave_slices
from mergekit_pave.errors import PaveError
from mergekit_pave.settings import RelativeRegularization
from mergekit_pave.tasks.base import TensorTask

_TENSORS = ("directions", "coefficients", "values")
_COPIES = 5  # of a matrix in float64: itself, its product with C, the factors of that, and what copies them on the way
_REMEMBERED = 12  # bytes of a covariance's sum and its inverse
_NO_EXPERT = ""  # the key of an ordinary layer in a manifest, where that of an expert is its number


class LoadTail(TensorTask):
    """The tails of the matrices of one weight, read from the cache. Value: see `decompose_weight`.

    Attributes:
        folder: of the cache entry.
        count: components that a tail has at least.
        min_tokens: tokens that an expert must have seen to have a tail.
        unchanged: the experts whose tails are left out, because they equal the base model's.
    """

    folder: str
    count: int
    min_tokens: int
    unchanged: tuple[int, ...] = ()

    def arguments(self) -> dict[str, Task]:
        return {}

    def execute(self) -> dict[str, Any]:
        # If another process puts a wider tail in its place just now, the second attempt finds that one.
        tail = self._read() or self._read()
        if tail is None:
            raise PaveError(f"the cache entry {self.folder} was removed or damaged during the run; run again")
        return tail

    def _read(self) -> Optional[dict[str, Any]]:
        artefact = Artefact(Path(self.folder))
        manifest = _tail_manifest(artefact.folder, self.count, self.min_tokens)
        if manifest is None:
            return None
        try:
            tensors = artefact.read(*manifest["files"], manifest)
        except DamagedError as error:
            if artefact.manifest() != manifest:
                return None
            raise artefact.discard_damaged(manifest, error) from error.__cause__
        tensors["values"] = tensors["values"].numpy()  # see `decompose_weight`
        without_tail = {None if expert == _NO_EXPERT else int(expert): tokens for expert, tokens in manifest["left"].items()}
        return leave_slices(
            {**tensors, "slices": manifest["slices"], "without_tail": without_tail}, self.min_tokens, self.unchanged
        )


class DecomposeWeight(TensorTask):
    """Puts the tails of one weight into the cache.

    Attributes:
        covariances: the folder of the model's covariances. They have to be there when the task is executed.
        tail: what will read the result.
    """

    weight: LoadTensor
    covariances: str
    layer: Linear
    regularization: float | RelativeRegularization
    tail: LoadTail

    def arguments(self) -> dict[str, Task]:
        return {"weight": self.weight}

    @property
    def folder(self) -> str:
        return self.tail.folder

    @property
    def is_done(self) -> bool:
        """Whether the cache has the tails."""
        return has_tail(Path(self.folder), self.tail.count, self.tail.min_tokens)

    @property
    def cache(self) -> int:
        """Bytes of cache that it takes at most."""
        return 4 * len(self.layer.layers) * sum(self.layer.shape) * self.tail.count

    @property
    def memory(self) -> int:
        """Bytes that it takes while it is at work."""
        return _COPIES * 8 * math.prod(self.layer.shape) + _REMEMBERED * self.layer.shape[1] ** 2

    def execute(self, weight: Tensor) -> None:
        artefact = Artefact(Path(self.folder))
        with artefact.lock():
            if self.is_done:
                return  # another process has just made it
            self._prepare(artefact, weight, stored_covariances(self.covariances))
            artefact.publish()

    @property
    def is_prepared(self) -> bool:
        """Whether a run has prepared the tails, and was stopped before it published them."""
        return _is_enough(Artefact(Path(self.folder)).prepared(), self.tail.count, self.tail.min_tokens)

    def prepare(self, weight: Tensor, covariances: Covariances) -> None:
        """Put the tails into the cache, where they do not count before `publish`.

        Args:
            covariances: of the layer, in memory.
        """
        artefact = Artefact(Path(self.folder))
        with artefact.lock():
            self._prepare(artefact, weight, covariances)

    def publish(self) -> None:
        """Let the tails that were prepared count."""
        artefact = Artefact(Path(self.folder))
        with artefact.lock():
            if not self.is_done:
                artefact.publish()

    def withdraw(self) -> None:
        """Forget the tails that were prepared."""
        artefact = Artefact(Path(self.folder))
        with artefact.lock():
            artefact.withdraw()

    def _prepare(self, artefact: Artefact, weight: Tensor, covariances: Covariances) -> None:
        count, min_tokens = self.tail.count, self.tail.min_tokens
        # Another merge may need what is there, so a tail is only ever replaced by a wider one.
        if before := artefact.manifest():
            count, min_tokens = max(count, before["count"]), min(min_tokens, before["min_tokens"])
        with advising(f"{self.model}: decomposing {self.tensor}", weight.device):
            where = (str(self.model), self.tensor)
            tail = decompose_weight(weight, self.layer, covariances, self.regularization, count, min_tokens, where)
        tail["values"] = torch.from_numpy(tail["values"])
        # The name differs from that of the file before, which another process may be reading.
        name = f"tail-{count}-{min_tokens}.safetensors"
        entry = artefact.write(name, {key: tail.pop(key) for key in _TENSORS})
        about = {"model": str(self.model), "tensor": self.tensor, "count": count, "min_tokens": min_tokens}
        left = {_NO_EXPERT if expert is None else str(expert): tokens for expert, tokens in tail["without_tail"].items()}
        artefact.prepare({"files": {name: entry}, "slices": tail["slices"], "left": left, **about})


class DecomposeOnTheWay(Use):
    """Decomposes the weights of a model while calibration has the covariances of their layers in memory.

    What it makes counts only when the whole model has been measured. Until then it may turn out that a layer is called again.

    Attributes:
        tasks: what is to be decomposed.
        device: where.
    """

    def __init__(self, tasks: Sequence[DecomposeWeight], device: str):
        self._tasks, self._device = tasks, device
        self._start()

    def _start(self) -> None:
        self._waiting = [task for task in self._tasks if not task.is_done]
        self._measured: dict[str, Covariance] = {}
        self._finished: list[str] = []

    @property
    def is_complete(self) -> bool:
        return all(task.is_done for task in self._tasks)

    def take(self, block: Optional[str], measurements: list[Measurement]) -> None:
        self._finished.append("" if block is None else f"{block}.")
        wanted = {layer for task in self._waiting for layer in _names(task)}
        for layers, covariance in measurements:
            self._measured.update(dict.fromkeys(wanted.intersection(layers), covariance))
        covariances, waiting = MeasuredCovariances(self._measured), []
        for task in self._waiting:
            if not all(name.startswith(tuple(self._finished)) for name in _names(task)):
                waiting.append(task)
            elif not task.is_prepared:
                task.prepare(task.weight.execute().to(self._device), covariances)
        for model in {task.weight.model for task in self._tasks}:
            LoaderCache().get(model).flush()  # open files are mapped to memory, which counts as ours
        self._waiting = waiting
        wanted = {layer for task in waiting for layer in _names(task)}
        self._measured = {layer: self._measured[layer] for layer in wanted.intersection(self._measured)}

    def start_again(self) -> None:
        for task in self._tasks:
            task.withdraw()
        self._start()

    def finish(self) -> None:
        for task in self._tasks:
            task.publish()


def _names(task: DecomposeWeight) -> list[str]:
    """The layers whose inputs the weight multiplies."""
    return [name for names in task.layer.layers for name in names]


def has_tail(folder: Path, count: int, min_tokens: int) -> bool:
    """Whether the cache has tails of at least `count` components, for every expert that saw `min_tokens` tokens."""
    return _tail_manifest(folder, count, min_tokens) is not None


def _tail_manifest(folder: Path, count: int, min_tokens: int) -> Optional[dict[str, Any]]:
    """The manifest of such tails, or None where the cache has none."""
    artefact = Artefact(folder)
    manifest = artefact.manifest()
    return manifest if _is_enough(manifest, count, min_tokens) and artefact.has_files(manifest) else None


def _is_enough(manifest: Optional[dict[str, Any]], count: int, min_tokens: int) -> bool:
    """Whether a manifest is that of tails of so many components, for every expert that saw so many tokens."""
    if manifest is None or manifest["count"] < count:
        return False
    # Experts without a tail have to be such as saw too few tokens for this merge, too.
    return not any(tokens >= max(1, min_tokens) for tokens in manifest["left"].values())
