"""The names by which mergekit finds a tensor in a checkpoint."""

from __future__ import annotations

from typing import Any


def own_names(info: Any) -> tuple[str, ...]:
    """The names of a `WeightInfo`'s tensor. Only by these does mergekit convert what a checkpoint stores in another form."""
    return (info.name, *(info.aliases or ()))


def all_names(info: Any) -> tuple[str, ...]:
    """All names that mergekit looks for, its own first. The last are those of tensors that are tied with it."""
    return (*own_names(info), *(info.tied_names or ()))
