"""The table and the plot of `--tokens`, from whatever the journals hold."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from arms import CLOSED, CONTROL_RATIO, Row
from matplotlib.axes import Axes
from merging import Laboratory, MissingResult, Outcome
from tokens import FITTED, WIDTHS, Draws

# A Llama with 8 billion parameters: what its linear layers see, and how often.
LAYERS, SEEN = 32, {4096: 3, 14336: 1}
PARAMETERS, CHECKPOINT = 8e9, 16e9
WIDTH = 4096
RATES = {"GPU": 300e12, "16 CPU cores": 1e12}  # operations a second, assumed
RUN = 4  # tokens that a model is run on for each that counts
CHOSEN = 2048
PURIFIED = f"purified, rank_ratio {CONTROL_RATIO}"


class Point(NamedTuple):
    """What was measured of a row.

    Attributes:
        setting: the one that was best.
        seeds: for which it is there.
        draws: mean score of each draw of each seed.
        outcome: its scores are means over both draws.
        apart: by input width, the distance between the merges from two draws over the length of their change.
        removed: the same of what was removed.
    """

    setting: float
    seeds: list[int]
    draws: list[float]
    outcome: Outcome
    apart: dict[str, float]
    removed: dict[str, float]


Points = dict[str, list[tuple[Row, Point]]]  # by method, what has been measured


def point(laboratory: Laboratory, row: Row) -> Point | None:
    draws, scores, each, squares = Draws(laboratory), {}, [], []
    try:
        best = draws.best(row.arm)
    except MissingResult:
        return None
    for seed in draws.seeds:
        try:
            drawn = draws.scores(row.arm, seed)
            if row.arm.pave is not None:
                squares.append(draws.apart(row.arm, seed))
        except MissingResult:
            continue
        each += [statistics.mean(of_draw.values()) for of_draw in drawn]
        scores |= {(seed, task): statistics.mean(of[task] for of in drawn) for task in drawn[0]}
    if not scores:
        return None
    apart, removed = (
        {
            width: (sum(of[width]["apart"] for of in squares) / sum(of[width][beside] for of in squares)) ** 0.5
            for width in (squares[0] if squares else ())
            if beside in squares[0][width]
        }
        for beside in ("change", "removed")
    )
    seeds = sorted({seed for seed, _ in scores})
    return Point(best, seeds, each, Outcome({"lambda": best}, scores, None), apart, removed)


def against(one: Outcome, other: Outcome) -> tuple[float, float]:
    """Of the seeds that both have."""
    shared = one.scores.keys() & other.scores.keys()
    return Outcome({}, {key: one.scores[key] for key in shared}, None).against(other)


def points_of(laboratory: Laboratory, rows: list[Row]) -> Points:
    """By method, what has been measured, by number of tokens."""
    found: Points = {}
    for row in sorted(rows, key=lambda row: (row.section != "", row.ratio is None, row.ratio or 0)):
        if measured := point(laboratory, row):
            found.setdefault(row.section, []).append((row, measured))
    return found


def sweep(points: list[tuple[Row, Point]]) -> list[tuple[float, Point]]:
    """Those whose tokens are drawn from all samples."""
    return [(row.ratio, measured) for row, measured in points if row.ratio and row.label.startswith("some")]


def tokens_table(laboratories: dict[Laboratory, list[Row]]) -> str:
    """Markdown: for each family and method a table."""
    return "\n".join([_ABOUT, *(line for laboratory, rows in laboratories.items() for line in _family(laboratory, rows))])


_ABOUT = """Every arm is merged from tokens of either half of the calibration rows (320 each). Scores are means over the test
parts of both merges, and by how much these two differ; the difference is to the same method with the most tokens, with its
standard error over the tasks. Apart: how far the two merges are from each other, over the length of their change, by the width of
the layers' inputs; and the same of what purification removed. N/d is of the narrower width. Lambda is the best on validation.
"""


def _family(laboratory: Laboratory, rows: list[Row]) -> list[str]:
    family = laboratory.family
    lines = [f"#### The {family.name}, inputs {WIDTHS[family.name]} wide and wider, {family.unit}", ""]
    for method, points in points_of(laboratory, rows).items():
        if not method:
            for row, measured in points:
                of_seeds = (f"{score:.1f} (seed {seed})" for seed, score in zip(measured.seeds, measured.draws))
                lines.append(f"- {row.label}, without data: {', '.join(of_seeds)}")
            continue
        most = max(sweep(points), default=(0, None))[1]
        lines += [
            "",
            f"**{method}**",
            "",
            "| tokens | N/d | of what | score | two draws | difference | apart | removed, apart | lambda | seeds |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [_line(row, measured, most, WIDTHS[family.name]) for row, measured in points]
    return [*lines, ""]


def _line(row: Row, measured: Point, most: Point | None, width: int) -> str:
    calibration = row.arm.pave["calibration"]
    tokens, share = (round(row.ratio * width), f"{row.ratio:g}") if row.ratio else ("", "")
    of_what = f"{row.label}, {calibration['samples']} samples"
    if "max_length" in calibration:
        of_what += f" of at most {calibration['max_length']}"
    spread = statistics.mean(abs(a - b) for a, b in zip(measured.draws[::2], measured.draws[1::2]))
    difference = "" if most in (None, measured) else "{:+.2f} ± {:.2f}".format(*against(measured.outcome, most.outcome))
    apart, removed = (
        ", ".join(f"{width}: {value:.2f}" for width, value in sorted(of.items(), key=lambda item: int(item[0])))
        for of in (measured.apart, measured.removed)
    )
    cells = (
        tokens,
        share,
        of_what,
        f"{measured.outcome.mean:.1f}",
        f"{spread:.1f}",
        difference,
        apart,
        removed,
        measured.setting,
        ", ".join(map(str, measured.seeds)),
    )
    return f"| {' | '.join(map(str, cells))} |"


COLOURS = ("tab:blue", "tab:green", "tab:red", "tab:orange")


def tokens_plot(laboratories: dict[Laboratory, list[Row]], path: Path) -> None:
    """Quality by N/d for each family, how far two draws are apart, and what as many tokens cost for 8 billion parameters."""
    figure, axes = plt.subplots(2, 2, figsize=(12, 8.5))
    colours: dict[str, str] = {}
    for axis, (laboratory, rows) in zip(axes[0], laboratories.items()):
        _plot_quality(axis, laboratory, points_of(laboratory, rows), colours)
    _plot_apart(axes[1, 0], {laboratory.family.name: points_of(laboratory, rows) for laboratory, rows in laboratories.items()})
    _plot_cost(axes[1, 1])
    for axis in axes.flat:
        axis.set_xscale("log", base=2)
        axis.set_xlabel("N/d: tokens in C for each of the width of the hidden states")
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}" if x >= 1 else f"1/{1 / x:g}")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _plot_quality(
    axis: Axes, laboratory: Laboratory, points: dict[str, list[tuple[Row, Point]]], colours: dict[str, str]
) -> None:
    for method in filter(None, points):
        measured = sweep(points[method])
        colour = colours.setdefault(method, COLOURS[len(colours) % len(COLOURS)])
        most = max(measured)[1].outcome
        changes = [(0.0, 0.0) if of.outcome is most else against(of.outcome, most) for _, of in measured]
        values, errors = zip(*changes)
        shares = [share for share, _ in measured]
        axis.errorbar(shares, values, errors, color=colour, marker=".", capsize=3, label=f"{method}: {most.mean:.1f}")
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_title(f"{laboratory.family.name}, d = {WIDTHS[laboratory.family.name]}")
    axis.set_ylabel(f"against the most tokens,\n{laboratory.family.unit}")
    axis.legend(fontsize="small", title="at the most tokens", title_fontsize="small")


def _plot_apart(axis: Axes, families: dict[str, Points]) -> None:
    """Of the layers that see hidden states."""
    for (family, methods), colour in zip(families.items(), COLOURS):
        closed = max((CLOSED, FITTED), key=lambda method: len(methods.get(method, ())))  # the layers are the same
        for method, name, style in ((closed, CLOSED, "-"), (PURIFIED, f"what is removed, {PURIFIED}", ":")):
            width = str(WIDTHS[family])
            measured = sweep(methods.get(method, []))
            values = [(share, (of.removed or of.apart)[width]) for share, of in measured]
            if values:
                axis.plot(*zip(*values), style, color=colour, marker=".", label=f"{family}: {name}")
    axis.set_ylim(0, 1.4)
    axis.set_ylabel("distance of two merges, over their length")
    axis.set_title("how far merges from other tokens are apart, layers d wide")
    axis.legend(fontsize="small")


def cache_bytes(tokens: float) -> float:
    """Of covariances that are kept: rows of two bytes a number, or float64 triangles where they are smaller."""
    return LAYERS * sum(count * min(2 * tokens * width, 4 * width * (width + 1)) for width, count in SEEN.items())


def _plot_cost(axis: Axes) -> None:
    shares = [2.0**power for power in range(-5, 5)]
    axis.plot(shares, [cache_bytes(share * WIDTH) / 1e9 for share in shares], color="tab:purple", label="cache, if kept, GB")
    for (machine, rate), style in zip(RATES.items(), ("--", ":")):
        seconds = [2 * PARAMETERS * RUN * share * WIDTH / rate for share in shares]
        axis.plot(
            shares,
            seconds,
            style,
            color="tab:brown",
            label=f"running {RUN} N tokens at {rate / 1e12:g} TFLOP/s, {machine}, s",
        )
    axis.axhline(CHECKPOINT / 4e9, color="grey", linewidth=0.8)
    axis.text(shares[0], CHECKPOINT / 4e9, " a quarter of the checkpoint", fontsize="small", color="grey", va="bottom")
    axis.axvline(CHOSEN / WIDTH, color="grey", linestyle="--", linewidth=0.8)
    axis.set_yscale("log")
    axis.set_ylim(top=1e6)  # below the legend
    axis.text(CHOSEN / WIDTH, axis.get_ylim()[0], f" {CHOSEN} tokens", fontsize="small", color="grey", va="bottom")
    axis.set_title(f"what a model of 8 billion parameters costs, d = {WIDTH}")
    axis.legend(fontsize="small")
