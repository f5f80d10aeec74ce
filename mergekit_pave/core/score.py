"""How much of an expert a merged model keeps, and how sure that is.

Each row of an expert's held-out data has a distance between what the expert gives and what another model gives: the KL divergence
of its predictions, added up over its tokens, or 1 - cosine of its features. With d_r that of the merged model and b_r that of the
base model, the share kept is

    1 - sum d_r / sum b_r:    0 is the base model, 1 the expert, and below 0 the merged model is further away than the base.

It is a ratio of sums, so its standard error is that of the mean of (d_r - (1 - kept) b_r) n / sum b, over n rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Estimate(NamedTuple):
    """A number and its standard error."""

    value: float
    error: float


class Distances(NamedTuple):
    """Distances of each row of one expert's data, float64 (rows,).

    Attributes:
        merged: between the expert and the merged model.
        base: between the expert and the base model.
    """

    merged: Tensor
    base: Tensor


def kept(distances: Distances) -> Estimate | None:
    """The share kept, and its standard error over the rows; None if the base model is the expert on all rows."""
    influence = _influence(distances)
    if influence is None:
        return None
    return Estimate(1 - (distances.merged.sum() / distances.base.sum()).item(), _error_of_mean(influence))


def kept_more(one: Distances, other: Distances) -> Estimate | None:
    """By how much the share kept of one merge exceeds that of another on the same rows, and the standard error of that."""
    influences = _influence(one), _influence(other)
    if influences[0] is None or influences[1] is None:
        return None
    value = ((other.merged.sum() - one.merged.sum()) / one.base.sum()).item()
    return Estimate(value, _error_of_mean(influences[0] - influences[1]))


def mean(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of independent estimates, one for each expert."""
    values, errors = zip(*estimates)
    return Estimate(sum(values) / len(values), math.sqrt(sum(error**2 for error in errors)) / len(errors))


def mean_more(ones: Sequence[Distances], others: Sequence[Distances]) -> Estimate | None:
    """`kept_more`, as a mean over the experts; None if it is None for each."""
    found = [estimate for pair in zip(ones, others) if (estimate := kept_more(*pair))]
    return mean(found) if found else None


def worst_more(ones: Sequence[Distances], others: Sequence[Distances]) -> Estimate | None:
    """By how much the smallest share kept of one merge exceeds that of another; None if there is none."""
    shares = [[(estimate, i) for i, of_expert in enumerate(all_of) if (estimate := kept(of_expert))] for all_of in (ones, others)]
    if not all(shares):
        return None
    (one, i), (other, j) = (min(found) for found in shares)
    if i == j:  # on the same rows much of the error is the same
        return kept_more(ones[i], others[i])
    return Estimate(one.value - other.value, math.hypot(one.error, other.error))


def _influence(distances: Distances) -> Tensor | None:
    """What each row adds to the share's error, (rows,); None if the base model is the expert."""
    merged, base = distances
    total = base.sum()
    if not total > 0:
        return None
    return (merged - merged.sum() / total * base) * (len(base) / total)


def _error_of_mean(values: Tensor) -> float:
    """Of a single row nobody knows: infinite."""
    return (values.std() / len(values) ** 0.5).item() if len(values) > 1 else math.inf
