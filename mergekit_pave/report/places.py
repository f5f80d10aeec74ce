"""Where in a model a tensor lies, read from its name: its stack of layers, its layer, its projection."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

_LAYER = re.compile(r"(?:^|\.)(\d{1,9})\.")
_EXPERT = re.compile(r"(experts?)\.\d+(?=\.)")


@dataclass(frozen=True)
class Place:
    """Where a tensor lies.

    Attributes:
        stack: the name before the layer's number, such as `model.layers` or `visual.blocks`; "" outside of all layers.
        layer: the number; 0 outside of all layers.
        projection: the rest of the name, without `.weight` and with a star for the number of an expert.
    """

    stack: str
    layer: int
    projection: str


def place(tensor: str) -> Place:
    """The place of a tensor."""
    name = tensor.removesuffix(".weight")
    match = _LAYER.search(name)
    if not match:
        return Place("", 0, name)
    return Place(name[: match.start()], int(match.group(1)), _EXPERT.sub(r"\1.*", name[match.end() :]))


def projections(tensors: Iterable[str]) -> dict[str, str]:
    """By tensor a short name of its projection, after that of its stack where there are several."""
    places = {tensor: place(tensor) for tensor in tensors}
    stacks = dict.fromkeys(where.stack for where in places.values())
    labels = {stack: short(where.projection for where in places.values() if where.stack == stack) for stack in stacks}
    return {
        tensor: f"{where.stack}: {label}" if len(stacks) > 1 and where.stack else label
        for tensor, where in places.items()
        for label in [labels[where.stack][where.projection]]
    }


def short(names: Iterable[str], separator: str = ".") -> dict[str, str]:
    """For each name as few of its last parts as are enough to distinguish all names."""
    names = list(dict.fromkeys(names))
    deepest = max((name.count(separator) for name in names), default=0) + 1
    for parts in range(1, deepest + 1):
        cut = {name: separator.join(name.split(separator)[-parts:]) for name in names}
        if len(set(cut.values())) == len(names):
            return cut
    return {name: name for name in names}


def short_models(names: Iterable[str]) -> dict[str, str]:
    """Names of models without the folders or the account before them, where they differ without."""
    names = list(dict.fromkeys(names))
    cut = short((name.rstrip("/") for name in names), "/")
    return {name: cut[name.rstrip("/")] for name in names} if len(cut) == len(names) else {name: name for name in names}


@dataclass(frozen=True)
class Grid:
    """One number for each projection, layer and model of one stack.

    Attributes:
        stack: the stack's name.
        projections: the rows.
        layers: the columns.
        values: by model (projections, layers), NaN where a model has none.
    """

    stack: str
    projections: list[str]
    layers: list[int]
    values: dict[str, np.ndarray]


def grids(rows: list[dict], number: Callable[[dict], float | None]) -> list[Grid]:
    """A number of every row of the report, as one grid for each stack; the stack with most rows first. Experts are averaged."""
    stacks: dict[str, list[tuple[Place, dict]]] = {}
    for row in rows:
        where = place(row["output"])
        stacks.setdefault(where.stack, []).append((where, row))
    grids_by_size = []
    for stack, members in sorted(stacks.items(), key=lambda item: -len(item[1])):
        projections = list(dict.fromkeys(where.projection for where, _ in members))
        layers = sorted({where.layer for where, _ in members})
        lines = {projection: i for i, projection in enumerate(projections)}
        columns = {layer: i for i, layer in enumerate(layers)}
        sums = {row["model"]: np.zeros((2, len(projections), len(layers))) for row in rows}
        for where, row in members:
            if (value := number(row)) is not None:
                sums[row["model"]][:, lines[where.projection], columns[where.layer]] += value, 1
        with np.errstate(invalid="ignore"):
            means = {model: total / count for model, (total, count) in sums.items()}
        grids_by_size.append(Grid(stack, projections, layers, means))
    return grids_by_size


def spread(costs: Mapping[int, float], most: int, budget: float) -> list[int]:
    """Layers spaced evenly from the first to the last: as many as the budget allows, at most `most`.

    Args:
        costs: of each layer, in the unit of the budget.
    """
    layers = sorted(costs)
    for count in range(min(most, len(layers)), 1, -1):
        chosen = [layers[i] for i in np.linspace(0, len(layers) - 1, count).round().astype(int)]
        if sum(costs[layer] for layer in chosen) <= budget:
            return chosen
    middle = layers[len(layers) // 2]
    return [middle] if costs[middle] <= budget else []
