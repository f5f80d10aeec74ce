"""The table and the plot, from whatever the journals hold."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from arms import Row
from merging import Arm, Laboratory, MissingResult, Outcome


def known(measure: Callable[..., Outcome], *arguments: Arm) -> Outcome | None:
    """None for what has not been run, or not with every seed."""
    try:
        return measure(*arguments)
    except MissingResult:
        return None


def table(laboratories: dict[Laboratory, list[Row]]) -> str:
    """Markdown: for each family and section a table."""
    return "\n".join(line for laboratory, rows in laboratories.items() for line in _family(laboratory, rows))


def _family(laboratory: Laboratory, rows: list[Row]) -> list[str]:
    family = laboratory.family
    lines = [f"### The {family.name}, {len(list(family.tasks))} tasks, {family.unit}", ""]
    for name, outcome in (("base model", known(laboratory.base)), ("fine-tunes, each on its own task", known(laboratory.tuned))):
        if outcome:
            by_task = defaultdict(list)
            for (_, task), score in outcome.scores.items():
                by_task[task].append(score)
            shown = ", ".join(f"{task} {statistics.mean(scores):.1f}" for task, scores in by_task.items())
            lines.append(f"- {name}: {outcome.mean:.1f} ({shown})")
    section = None
    for row in rows:
        outcome = known(laboratory.outcome, row.arm)
        if not outcome:
            continue
        if row.section != section:
            section = row.section
            lines += [
                "",
                f"**{section}**",
                "",
                "| | score | difference | removed / change | best setting |",
                "|---|---|---|---|---|",
            ]
        reference = known(laboratory.outcome, row.reference) if row.reference else None
        against = "{:+.2f} ± {:.2f}".format(*outcome.against(reference)) if reference else ""
        removed = "" if outcome.removed is None else f"{outcome.removed:.2g}"
        setting = ", ".join(f"{key} {value}" for key, value in outcome.setting.items())
        lines.append(f"| {row.label} | {outcome.mean:.1f} | {against} | {removed} | {setting} |")
    return [*lines, ""]


def plot(laboratories: dict[Laboratory, list[Row]], path: Path) -> None:
    """What purification does to each method, by how much of the rank is dropped."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(laboratories), figsize=(5.5 * len(laboratories), 4), squeeze=False)
    for axis, (laboratory, rows) in zip(axes[0], laboratories.items()):
        lines: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
        for row in rows:
            outcome = known(laboratory.outcome, row.arm) if row.ratio else None
            if outcome:
                point = (100 * (1 - row.ratio), *outcome.against(laboratory.outcome(row.reference)))
                lines.setdefault((row.arm.method, row.arm.pave["target"]), []).append(point)
        for (method, target), points in sorted(lines.items()):
            style = {"color": {"task_arithmetic": "C0", "ties": "C1"}[method], "linestyle": "-" if target == "weights" else "--"}
            axis.errorbar(*zip(*points), marker="o", capsize=3, label=f"{method}, target: {target}", **style)
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_xlabel("share of components dropped, % (1 - rank_ratio)")
        axis.set_ylabel(f"purified - plain, {laboratory.family.unit}")
        axis.set_title(f"{laboratory.family.name}, {len(list(laboratory.family.tasks))} models at once")
        axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
