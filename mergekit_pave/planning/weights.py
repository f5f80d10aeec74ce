"""The search for each model's own weight: one model after the other, by factors, as long as the score rises."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from mergekit.config import MergeConfiguration
from mergekit.merge_methods import get

from mergekit_pave.errors import PaveError

FACTORS = (1.4, 1.2)  # of the two rounds


class Found(NamedTuple):
    """Weights, by the model's number under `models`, and their value."""

    weights: dict[int, float]
    value: float


def weights_of(config: MergeConfiguration) -> dict[int, float]:
    """The weight of each fine-tuned model, by its number under `models`.

    Raises:
        PaveError: the method has none, or one of them is no plain number.
    """
    parameters = {parameter.name: parameter for parameter in get(config.merge_method).spec.parameters}
    if "weight" not in parameters or not config.models:
        raise PaveError(f"--weights: {config.merge_method} does not give each model a weight; leave it out")
    numbers = [i for i, entry in enumerate(config.models) if entry.model != config.base_model]
    if len(numbers) < 2:
        raise PaveError("--weights: there is only one model, whose weight is a lambda; tune parameters.lambda instead")
    default = None if parameters["weight"].required else parameters["weight"].default
    default = (config.parameters or {}).get("weight", 1 / len(numbers) if default is None else default)
    weights = {i: (config.models[i].parameters or {}).get("weight", default) for i in numbers}
    for i, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise PaveError(f"--weights: models.{i}.parameters.weight is {weight!r}; only plain numbers can be tuned")
    return weights


def search(start: Found, value_of: Callable[[dict[int, float]], float]) -> Iterator[Found]:
    """Better and better weights.

    Args:
        value_of: what is to be as large as possible.
    """
    best = start
    for factor in FACTORS:
        for i in start.weights:
            for change in (factor, 1 / factor):
                weights = best.weights | {i: rounded(best.weights[i] * change)}
                if weights == best.weights:
                    continue
                value = value_of(weights)
                if value > best.value:
                    best = Found(weights, value)
                    yield best
                    break


def as_changes(weights: dict[int, float]) -> dict[str, Any]:
    return {f"models.{i}.parameters.weight": weight for i, weight in weights.items()}


def rounded(number: float) -> float:
    """As a person would write it: three digits."""
    if not number or not math.isfinite(number):
        return number
    short = round(number, 2 - math.floor(math.log10(abs(number))))
    return int(short) if float(short).is_integer() else short
