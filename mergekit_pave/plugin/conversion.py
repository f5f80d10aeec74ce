"""Lets mergekit look at the names of each checkpoint once as it infers an architecture: see `calibration.conversion`."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

from mergekit.architecture import auto

from mergekit_pave.calibration.conversion import Conversions


@contextlib.contextmanager
def each_checkpoint_once() -> Iterator[None]:
    """Within this, mergekit goes through each checkpoint once to infer an architecture."""
    by_checkpoint: dict[tuple[str | None, int], tuple[Collection[str], Conversions]] = {}

    def can_make(model_type: str | None, stored: Collection[str], name: str) -> bool:
        key = model_type, id(stored)  # no other object gets this id while we hold the names
        if key not in by_checkpoint:
            by_checkpoint[key] = stored, Conversions(model_type, stored)
        return by_checkpoint[key][1].can_make(name)

    original = auto.can_convert_checkpoint_keys
    auto.can_convert_checkpoint_keys = can_make
    try:
        yield
    finally:
        auto.can_convert_checkpoint_keys = original
