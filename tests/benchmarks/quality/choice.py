"""How well a merge is chosen by a few rows of each model's data: without labels, by what it keeps of its experts, and with them.

A draw is one seed and some rows of each task. A chooser gives each merge a number on these rows, and picks the merge with the
largest; of several, any. Regret is by how much the test score of what it picks is below that of the best merge.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from likeness import Rows

COUNTS = (8, 16, 32, 64)

Chooser = Callable[[Rows, Rows, slice], float]  # of a merge's rows and the base model's, and which of them


def by_distance(name: str) -> Chooser:
    """The share kept, as in `mergekit_pave.core.score`, mean over the tasks."""

    def share(merged: Rows, base: Rows, part: slice) -> float:
        return statistics.mean(1 - sum(rows[name][part]) / sum(base[task][name][part]) for task, rows in merged.items())

    return share


def by_accuracy(merged: Rows, base: Rows, part: slice) -> float:
    return statistics.mean(statistics.mean(rows["right"][part]) for rows in merged.values())


def by_bits(merged: Rows, base: Rows, part: slice) -> float:
    """Bits per byte, less is better."""
    return -statistics.mean(sum(rows["bits"][part]) / sum(rows["bytes"][part]) for rows in merged.values())


@dataclass(frozen=True)
class Field:
    """The merges of one seed.

    Attributes:
        groups: what kind of merge each is.
        test: their scores on the test parts, means over the tasks.
        rows: what was measured of each on rows.
        base: the same of the base model.
    """

    seed: int
    groups: list[str]
    test: list[float]
    rows: list[Rows]
    base: Rows

    def __len__(self) -> int:
        """Rows of each task."""
        return min(len(values) for rows in self.base.values() for values in rows.values())

    def draws(self, count: int) -> Iterator[slice]:
        """So many rows at once, each row once."""
        for start in range(0, len(self) - count + 1, count):
            yield slice(start, start + count)

    def values(self, chooser: Chooser, part: slice) -> list[float]:
        return [chooser(rows, self.base, part) for rows in self.rows]

    def regret(self, values: Sequence[float], among: Sequence[int] | None = None) -> float:
        """Of choosing by the values, among all merges or some."""
        among = range(len(self.test)) if among is None else among
        best = max(values[i] for i in among)
        picked = [self.test[i] for i in among if values[i] == best]
        return max(self.test[i] for i in among) - statistics.mean(picked)

    def regret_within(self, values: Sequence[float]) -> float:
        """Of choosing a setting of each kind of merge, mean over those with more than two."""
        kinds = [[i for i, group in enumerate(self.groups) if group == kind] for kind in dict.fromkeys(self.groups)]
        return statistics.mean(self.regret(values, kind) for kind in kinds if len(kind) > 2)


class Quality(NamedTuple):
    """Of a chooser, by draw."""

    correlation: list[float]
    regret: list[float]
    within: list[float]


def quality(fields: Sequence[Field], chooser: Chooser, count: int) -> Quality:
    found = Quality([], [], [])
    for field in fields:
        for part in field.draws(count):
            values = field.values(chooser, part)
            found.correlation.append(rank_correlation(values, field.test))
            found.regret.append(field.regret(values))
            found.within.append(field.regret_within(values))
    return found


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean over draws, and its standard error."""
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's: equal values share their mean rank."""
    return torch.corrcoef(torch.stack([_ranks(one), _ranks(other)]))[0, 1].item()


def _ranks(values: Sequence[float]) -> torch.Tensor:
    numbers = torch.tensor(values, dtype=torch.float64)
    below, equal = (numbers[None] < numbers[:, None]).sum(1), (numbers[None] == numbers[:, None]).sum(1)
    return below + (equal - 1) / 2
