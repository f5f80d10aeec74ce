"""`pave_report.json`: what was done to each tensor of each model, and the lines and warnings that sum it up."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from mergekit_pave.core.reasons import FEW_TOKENS, NEVER_CALLED, UNCHANGED
from mergekit_pave.report.tables import MERGED_BY, count_reasons


def complete(header: dict[str, Any], stats: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """The report.

    Args:
        header: the report without its rows.
        stats: for each purified weight the model and what was done to it (see `PurificationStats`).
    """
    report = copy.deepcopy(header)
    report["purified"] = []
    for model, of_weight in stats:
        report["purified"] += of_weight["rows"]
        report["models"][model]["left_as_they_are"] |= of_weight["left_as_they_are"]
    for model, sums in by_model(report).items():
        report["models"][model]["removed_more_than_changed"] = sums["exceeding"]
    report["warnings"] += warnings(report)
    return report


def kind(tensor: str) -> str:
    """A tensor's name with a star for each number between dots: the same in all layers, and of all experts."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", tensor)


def removed_over_change(removed_norm: float, change_norm: float | None) -> float | None:
    """The norm of the removed part over the norm of the change; None where nothing changed or there is no base model."""
    return removed_norm / change_norm if change_norm else None


def num_purified(report: dict[str, Any]) -> int:
    """Purified tensors of the merged model."""
    return len({row["output"] for row in report["purified"]})


def by_model(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Per model: tensors purified, mean shares of rank and energy, tokens seen, and the removed part beside the change.

    `exceeding` counts the tensors whose removed part is larger than their change.
    """
    rows_of = defaultdict(list)
    for row in report["purified"]:
        rows_of[row["model"]].append(row)
    sums = {}
    for model, rows in rows_of.items():
        changes = [row["change_norm"] for row in rows]
        removed_norm = sum(row["removed_norm"] ** 2 for row in rows) ** 0.5
        change_norm = None if None in changes else sum(change**2 for change in changes) ** 0.5
        squares: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])  # of the two norms, by tensor
        for row in rows if change_norm is not None else ():
            squares[row["output"]][0] += row["removed_norm"] ** 2
            squares[row["output"]][1] += row["change_norm"] ** 2
        sums[model] = {
            "tensors": len({row["output"] for row in rows}),
            "mean_kept": sum(row["kept"] / row["components"] for row in rows) / len(rows),
            "mean_energy": sum(row["energy_dropped"] for row in rows) / len(rows),
            "mean_rank": sum(row["kept"] for row in rows) / len(rows),
            "tokens": max(row["tokens"] for row in rows),
            "removed_norm": removed_norm,
            "change_norm": change_norm,
            "removed_over_change": removed_over_change(removed_norm, change_norm),
            "exceeding": sum(removed > changed for removed, changed in squares.values()),
        }
    return sums


def summary(report: dict[str, Any]) -> str:
    """One line for the log."""
    parts = []
    for model, sums in by_model(report).items():
        part = f"{model} kept {100 * sums['mean_kept']:.1f} % of its rank"
        if (ratio := sums["removed_over_change"]) is not None:
            part += f", removed {ratio:.2g} x its change"
            if sums["exceeding"]:
                part += f" (more than it in {sums['exceeding']} of {sums['tensors']} tensors)"
        parts.append(part)
    return f"PAVE purified {num_purified(report)} of {report['tensors']} tensors: {'; '.join(parts)}"


def reasons_in_a_line(reasons: dict[str, str]) -> str:
    """How many tensors, or experts, have each reason; see `count_reasons`."""
    return ", ".join(f"{count} {reason}" for reason, count in count_reasons(reasons))


def vocabulary_lines(vocabulary: dict[str, Any]) -> list[str]:
    """A line for each tensor of the vocabulary that was merged by data, and one for the others."""
    lines = []
    for row in vocabulary["merged"]:
        if "tokens" not in row:
            by = MERGED_BY[row["by"]]
            lines.append(f"Rows of {row['tensor']} will be merged by {by}, those of tokens that the models write")
            continue
        tokens = ", ".join(f"{count} tokens of {model}" for model, count in row["tokens"].items())
        lines.append(f"{row['shown']} of {row['rows']} rows of {row['tensor']} are merged by {MERGED_BY[row['by']]} ({tokens})")
    if reasons := reasons_in_a_line(vocabulary["left"]):
        lines.append(f"Vocabulary left to the merge method: {reasons}")
    return lines


def mean_errors(refined: dict[str, Any]) -> tuple[float, float] | None:
    """The mean relative error of the refined layers' outputs, before and after; None where none could be measured."""
    errors = [(row["error_before"], row["error_after"]) for row in refined["layers"]]
    known = [pair for pair in errors if None not in pair]
    return tuple(sum(column) / len(known) for column in zip(*known)) if known else None


def regmean_warnings(regmean: dict[str, Any]) -> list[str]:
    """A warning where calibration did not reach most of the weights that could have been merged in closed form."""
    num_missed = sum(reason.startswith(NEVER_CALLED) for reason in regmean["as_task_arithmetic"].values())
    if num_missed <= len(regmean["closed_form"]):
        return []
    return [
        f"regmean: {num_missed} of {num_missed + len(regmean['closed_form'])} weights of linear layers are merged as "
        "task_arithmetic does, because they were never called during the calibration of some model. Use data that reaches them, "
        "such as images for a vision tower, or `covariance: 0` for them"
    ]


def left_experts(report: dict[str, Any]) -> list[str]:
    """A line for each model with experts that stay as they are."""
    return [
        f"{model}: {num_left} of {total} expert weights stay as they are, because they saw fewer calibration tokens than "
        "pave.calibration.min_tokens; more samples reach more of them"
        for model, num_left, total in _experts(report)
        if num_left
    ]


def _experts(report: dict[str, Any]) -> Iterator[tuple[str, int, int]]:
    """Per model the number of expert weights that stay as they are, and of all its expert weights."""
    for model, source in report["models"].items():
        num_left = sum(reason.startswith(FEW_TOKENS) for reason in source["left_as_they_are"].values())
        yield model, num_left, num_left + sum("expert" in row and row["model"] == model for row in report["purified"])


def left_weights(report: dict[str, Any]) -> list[str]:
    """A line for each model and reason with weights that could have been purified; a star stands for any number."""
    lines = []
    for model, source in report["models"].items():
        for reason in (NEVER_CALLED, UNCHANGED):
            tensors = [tensor for tensor, of_tensor in source["left_as_they_are"].items() if of_tensor == reason]
            if tensors:
                kinds = dict.fromkeys(map(kind, tensors))
                lines.append(f"{model}: {len(tensors)} weights stay as they are, {reason}: {', '.join(kinds)}")
    return lines


def _times(ratio: float) -> str:
    rounded = f"{ratio:.2g}"
    return "about as large as" if rounded == "1" else f"{rounded} times as large as"


def warnings(report: dict[str, Any]) -> list[str]:
    """What a user should look at: most experts left as they are, or more removed than fine-tuning changed."""
    messages = [
        f"{model}: most of its experts were not purified ({num_left} of {total} weights), for want of calibration tokens"
        for model, num_left, total in _experts(report)
        if 2 * num_left > total
    ]
    for model, sums in by_model(report).items():
        ratio = sums["removed_over_change"]
        if ratio is not None and ratio > 1:
            messages.append(
                f"{model}: the removed part is {_times(ratio)} what "
                f"fine-tuning changed ({sums['exceeding']} of {sums['tensors']} tensors lost more than their change), so it is "
                "mostly weight of the base model. Look at the quality of the merge; a larger "
                "rank_ratio removes less, and `target: task_vector` only from the change"
            )
    return messages
