"""The table and the plot, from whatever the journals hold."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from arms import METHODS_SECTION, PURIFIED_SECTION, Row
from matplotlib.axes import Axes
from merging import Arm, Laboratory, MissingResult, Outcome


def known(measure: Callable[..., Outcome], *arguments: Arm) -> Outcome | None:
    """None for what has not been run, or not with every seed."""
    try:
        return measure(*arguments)
    except MissingResult:
        return None


def table(laboratories: dict[Laboratory, list[Row]]) -> str:
    """Markdown: for each family and section a table."""
    return "\n".join([_ABOUT, *(line for laboratory, rows in laboratories.items() for line in _family(laboratory, rows))])


_ABOUT = """Scores on the test parts, means over tasks and seeds; the difference in these means, with its standard error over the
tasks; the length of what purification removed over that of what fine-tuning had changed; and the setting that did best on
the validation parts with the first seed, of those after the colon. Purified and measured with 128 samples of each model's
own task, where nothing else is said; another task's are those of the next model.
"""


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
        varied = (key for key in outcome.setting if any(other[key] != outcome.setting[key] for other in row.arm.settings))
        setting = ", ".join(
            f"{key} {outcome.setting[key]}: {', '.join(str(tried[key]) for tried in row.arm.settings)}" for key in varied
        )
        lines.append(f"| {row.label} | {outcome.mean:.1f} | {against} | {removed} | {setting} |")
    return [*lines, ""]


COLOURS = {"weights": "tab:red", "task_vector": "tab:blue"}


def plot(laboratories: dict[Laboratory, list[Row]], path: Path) -> None:
    """For each family, what purification does by how much of the rank is dropped, and where the methods stand."""
    figure, axes = plt.subplots(2, len(laboratories), figsize=(6 * len(laboratories), 8), squeeze=False)
    for (above, below), (laboratory, rows) in zip(axes.T, laboratories.items()):
        family = laboratory.family
        _plot_ratios(above, laboratory, rows)
        above.set_title(f"{family.name}: {len(list(family.tasks))} models at once")
        above.set_ylabel(f"purified against plain,\n{family.unit}")
        _plot_methods(below, laboratory, rows)
        below.set_xlabel(family.unit)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _plot_ratios(axis: Axes, laboratory: Laboratory, rows: list[Row]) -> None:
    lines = defaultdict(list)
    for row in rows:
        outcome = known(laboratory.outcome, row.arm) if row.ratio else None
        reference = known(laboratory.outcome, row.reference) if outcome else None
        if reference:
            change = outcome.against(reference)
            lines[row.arm.pave["target"]].append((100 * (1 - row.ratio), *change))
    for target, points in lines.items():
        axis.errorbar(*zip(*points), color=COLOURS[target], marker=".", capsize=3, label=f"target: {target}")
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_xticks(ticks := [0.2, 1.6, 3, 6.25, 12.5, 25], [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("components dropped, %")
    if lines:
        axis.legend(fontsize="small")


def _plot_methods(axis: Axes, laboratory: Laboratory, rows: list[Row]) -> None:
    """Scores, plain and purified. Bars are standard errors of the differences that stand in the table."""
    plain = [row for row in rows if row.section == METHODS_SECTION and known(laboratory.outcome, row.arm)]
    arms = [row.arm for row in plain]
    for row in rows:
        outcome = known(laboratory.outcome, row.arm)
        reference = known(laboratory.outcome, row.reference) if outcome and row.reference else None
        error = outcome.against(reference)[1] if reference else 0
        if outcome and row.section == METHODS_SECTION:
            axis.errorbar(outcome.mean, arms.index(row.arm), xerr=error, fmt="ko", capsize=3)
        elif outcome and row.section == PURIFIED_SECTION and row.reference in arms:
            target = row.arm.pave["target"]
            place = arms.index(row.reference) + (0.2 if target == "weights" else 0.4)
            axis.errorbar(outcome.mean, place, xerr=error, fmt=".", capsize=3, color=COLOURS[target])
    for name, outcome in (("base", known(laboratory.base)), ("fine-tunes", known(laboratory.tuned))):
        if outcome:
            axis.axvline(outcome.mean, color="grey", linestyle=":")
            axis.text(outcome.mean, -1.1, name, ha="center", va="bottom", fontsize="small", color="grey")
    axis.set_yticks(range(len(plain)), [row.label for row in plain])
    axis.set_ylim(len(plain), -1)
    axis.plot([], [], "ko", label="plain")
    for target, colour in COLOURS.items():
        axis.plot([], [], ".", color=colour, label=f"purified, target: {target}")
    axis.legend(fontsize="small")
