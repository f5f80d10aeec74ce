"""`pave_report.json`: what was done to which tensor of which model, and the lines that sum it up."""

from __future__ import annotations

import copy
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from mergekit_pave.core.reasons import FEW_TOKENS, NEVER_CALLED, UNCHANGED


def complete(header: dict[str, Any], stats: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """The report, from its header and, per purified weight, the model and what was done (see `PurificationStats`)."""
    report = copy.deepcopy(header)
    report["purified"] = []
    for model, done in stats:
        report["purified"] += done["rows"]
        report["models"][model]["left_as_they_are"] |= done["left"]
    for model, sums in by_model(report).items():
        report["models"][model]["removed_more_than_changed"] = sums["exceeding"]
    report["warnings"] += warnings(report)
    return report


def kind(tensor: str) -> str:
    """A tensor's name with a star for each number between dots: the same in all layers, and of all experts."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", tensor)


def by_model(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Per model: tensors purified, mean shares of rank and energy, tokens seen, and the removed part beside the change.

    `exceeding` counts the tensors whose removed part is larger than their change.
    """
    rows = defaultdict(list)
    for row in report["purified"]:
        rows[row["model"]].append(row)
    result = {}
    for model, of_model in rows.items():
        changes = [row["change_norm"] for row in of_model]
        removed = sum(row["removed_norm"] ** 2 for row in of_model) ** 0.5
        changed = None if None in changes else sum(change**2 for change in changes) ** 0.5
        tensors: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for row in of_model if changed is not None else ():
            tensors[row["output"]][0] += row["removed_norm"] ** 2
            tensors[row["output"]][1] += row["change_norm"] ** 2
        result[model] = {
            "tensors": len({row["output"] for row in of_model}),
            "mean_kept": sum(row["kept"] / row["components"] for row in of_model) / len(of_model),
            "mean_energy": sum(row["energy_dropped"] for row in of_model) / len(of_model),
            "mean_rank": sum(row["kept"] for row in of_model) / len(of_model),
            "tokens": max(row["tokens"] for row in of_model),
            "removed_norm": removed,
            "change_norm": changed,
            "exceeding": sum(removed > changed for removed, changed in tensors.values()),
        }
    return result


def summary(report: dict[str, Any]) -> str:
    """One line for the log."""
    models = by_model(report)
    outputs = len({row["output"] for row in report["purified"]})
    parts = []
    for model, sums in models.items():
        part = f"{model} kept {100 * sums['mean_kept']:.1f} % of its rank"
        if sums["change_norm"]:
            part += f", removed {sums['removed_norm'] / sums['change_norm']:.2g} x its change"
            if sums["exceeding"]:
                part += f" (more than it in {sums['exceeding']} of {sums['tensors']} tensors)"
        parts.append(part)
    return f"PAVE purified {outputs} of {report['tensors']} tensors: {'; '.join(parts)}"


def regmean_reasons(done: dict[str, Any]) -> str:
    """How many tensors, or experts, regmean has merged as task_arithmetic does, by reason."""
    counts = Counter(re.sub(r" \(.*", "", reason) for reason in done["as_task_arithmetic"].values())
    return ", ".join(f"{count} {reason}" for reason, count in counts.items())


def regmean_summary(done: dict[str, Any]) -> str:
    """One line for the log."""
    told = f"regmean merged {len(done['closed_form'])} tensors in closed form"
    others = regmean_reasons(done)
    return f"{told}; as task_arithmetic does: {others}" if others else told


def regmean_warnings(done: dict[str, Any]) -> list[str]:
    """That calibration did not reach most of what could have been merged in closed form, if so."""
    missed = sum(reason.startswith(NEVER_CALLED) for reason in done["as_task_arithmetic"].values())
    if missed <= len(done["closed_form"]):
        return []
    return [
        f"regmean: {missed} of {missed + len(done['closed_form'])} weights of linear layers are merged as task_arithmetic does, "
        "because they were never called during the calibration of some model. Use data that reaches them, such as images for a "
        "vision tower, or `covariance: 0` for them"
    ]


def left_experts(report: dict[str, Any]) -> list[str]:
    """A line for each model with experts that stay as they are."""
    return [
        f"{model}: {left} of {total} expert weights stay as they are, because they saw fewer calibration tokens than "
        "pave.calibration.min_tokens; more samples reach more of them"
        for model, left, total in _experts(report)
        if left
    ]


def _experts(report: dict[str, Any]) -> Iterator[tuple[str, int, int]]:
    """Per model how many weights of experts stay as they are, and how many it has."""
    for model, source in report["models"].items():
        left = sum(reason.startswith(FEW_TOKENS) for reason in source["left_as_they_are"].values())
        yield model, left, left + sum("expert" in row and row["model"] == model for row in report["purified"])


def left_weights(report: dict[str, Any]) -> list[str]:
    """A line for each model with weights that could have been purified, and why not; a star stands for any number."""
    lines = []
    for model, source in report["models"].items():
        for why in (NEVER_CALLED, UNCHANGED):
            left = [tensor for tensor, reason in source["left_as_they_are"].items() if reason == why]
            if left:
                kinds = dict.fromkeys(map(kind, left))
                lines.append(f"{model}: {len(left)} weights stay as they are, {why}: {', '.join(kinds)}")
    return lines


def _times(ratio: float) -> str:
    shown = f"{ratio:.2g}"
    return "about as large as" if shown == "1" else f"{shown} times as large as"


def warnings(report: dict[str, Any]) -> list[str]:
    """What should make a user look twice: a model from which more went than fine-tuning had changed, or hardly anything."""
    found = [
        f"{model}: most of its experts were not purified ({left} of {total} weights), for want of calibration tokens"
        for model, left, total in _experts(report)
        if 2 * left > total
    ]
    for model, sums in by_model(report).items():
        if sums["change_norm"] and sums["removed_norm"] > sums["change_norm"]:
            found.append(
                f"{model}: the removed part is {_times(sums['removed_norm'] / sums['change_norm'])} what "
                f"fine-tuning changed ({sums['exceeding']} of {sums['tensors']} tensors lost more than their change), so it is "
                "mostly weight of the base model. Look at the quality of the merge; a larger "
                "rank_ratio removes less, and `target: task_vector` only from the change"
            )
    return found
