"""Tokenised samples that the cache remembers, so that a run that needs nothing else of them reads neither data nor tokenizer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_pave import cache
from mergekit_pave.calibration.batches import Encoded
from mergekit_pave.calibration.counts import TokenCounts

_FILE = "samples.safetensors"
_COUNTED, _TARGET, _CONTENTS, _COUNTS, _INPUTS = "counted", "counted_target", "contents", "counts.", "inputs."


class Remembered(NamedTuple):
    """What became of the samples of a model.

    Attributes:
        encoded: as the model takes them.
        counts: of their tokens, if these can be counted.
        contents: see `Sample.content`, of all that can be used.
        skipped: the warning about rows that cannot be used; empty if there are none.
        left: how many further rows the data sets have; None where that is not known.
    """

    encoded: list[Encoded]
    counts: TokenCounts | None
    contents: frozenset[int]
    skipped: str
    left: int | None


def remember(artefact: cache.Artefact, model: str, what: Remembered) -> None:
    """Put samples into the cache. Those with images are not kept, because they may be larger than the data.

    Raises:
        PaveError: the cache cannot be written.
    """
    names = list(what.encoded[0].inputs)
    if any(isinstance(values, Tensor) for sample in what.encoded for values in sample.inputs.values()):
        return
    if any(list(sample.inputs) != names for sample in what.encoded):
        return
    tensors = {_CONTENTS: torch.tensor(sorted(what.contents), dtype=torch.int64)}
    for name in names:
        tensors |= _packed(_INPUTS + name, [sample.inputs[name] for sample in what.encoded])
    tensors |= _packed(_COUNTED, [sample.counted for sample in what.encoded])
    tensors |= _packed(_TARGET, [sample.counted_target for sample in what.encoded])
    for name, counted in what.counts.to_tensors().items() if what.counts else ():
        tensors[_COUNTS + name] = counted
    with artefact.lock():
        artefact.complete(
            {
                "files": {_FILE: artefact.write(_FILE, tensors)},
                "model": model,
                "origins": [sample.origin for sample in what.encoded],
                "inputs": names,
                "tokens": sum(sample.tokens for sample in what.encoded),
                "skipped": what.skipped,
                "left": what.left,
            }
        )


def recall(artefact: cache.Artefact) -> Remembered | None:
    """The samples that the cache remembers, if it does. What is damaged counts as forgotten."""
    try:
        manifest = artefact.read_manifest()
        tensors = artefact.read(_FILE, manifest)
    except cache.DamagedError:
        return None
    inputs = {name: _unpacked(_INPUTS + name, tensors) for name in manifest["inputs"]}
    parts = zip(manifest["origins"], zip(*inputs.values()), _unpacked(_COUNTED, tensors), _unpacked(_TARGET, tensors))
    counts = {name.removeprefix(_COUNTS): tensor for name, tensor in tensors.items() if name.startswith(_COUNTS)}
    return Remembered(
        encoded=[Encoded(origin, dict(zip(inputs, values)), counted, target) for origin, values, counted, target in parts],
        counts=TokenCounts.from_tensors(counts) if counts else None,
        contents=frozenset(tensors[_CONTENTS].tolist()),
        skipped=manifest["skipped"],
        left=manifest.get("left"),
    )


def _packed(name: str, lists: list[list[int]]) -> dict[str, Tensor]:
    """Lists of different lengths as two tensors."""
    values = torch.tensor([value for values in lists for value in values], dtype=torch.int32)
    return {name: values, f"{name} lengths": torch.tensor([len(values) for values in lists])}


def _unpacked(name: str, tensors: dict[str, Tensor]) -> list[list[int]]:
    return [part.tolist() for part in tensors[name].split(tensors[f"{name} lengths"].tolist())]
