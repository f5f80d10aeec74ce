"""What a `regmean` merge has to say of its closed form: its share of the weights, and how it is aligned with the models."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

CLOSED_FORM = "closed form"
BY_DATA = "vocabulary, merged by data"


def count_weights(report: dict[str, Any], matrices: Iterable[tuple[str | None, int]], sizes: Mapping[str, int]) -> dict[str, int]:
    """How many weights of the merged model were merged in closed form, and how many otherwise, by reason.

    Args:
        report: before the reasons of `matrices` are in it.
        matrices: of the layers that could be merged in closed form: why it was not (None if it was), and its size.
        sizes: of the tensors of the merged model.
    """
    found: Counter[str] = Counter()
    for reason, size in matrices:
        found[reason.split(" (")[0] if reason else CLOSED_FORM] += size
    for row in report.get("vocabulary", {"merged": []})["merged"]:
        found[BY_DATA] += sizes.get(row["tensor"], 0)
    for tensor, reason in report["regmean"]["as_task_arithmetic"].items():
        found[reason.split(" (")[0]] += sizes.get(tensor, 0)
    return {way: count for way, count in found.items() if count}


def share(regmean: dict[str, Any]) -> float | None:
    """The share of the merged model's weights that were merged in closed form; None where the report does not say it."""
    counts = regmean.get("weights")
    return counts.get(CLOSED_FORM, 0) / sum(counts.values()) if counts else None


def mean_alignments(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """By model the mean alignment of the tensors, where it is known."""
    known = defaultdict(list)
    for row in rows:
        for model, alignment in row.get("alignment", {}).items():
            if alignment is not None:
                known[model].append(alignment)
    return {model: sum(alignments) / len(alignments) for model, alignments in known.items()}
