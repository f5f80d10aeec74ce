"""The tables of `--scored`, from whatever the journals hold."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Sequence

import torch
from arms import Row
from choice import COUNTS, Chooser, Field, by_accuracy, by_bits, by_distance, mean_and_error, quality
from likeness import TOP, Rows
from merging import Laboratory, MissingResult
from scored import Scorer

from mergekit_pave.core import score

LABELS = {"encoder": by_accuracy, "decoder": by_bits}
DISTANCES = {
    "encoder": {
        "KL of the head on each token": "product",
        "KL of the head on their mean, as it is used": "kl",
        "cosine, without a head": "cosine",
    },
    "decoder": {"KL": "product", "KL of all tokens": "kl"},
}


def scored_table(laboratories: dict[Laboratory, list[Row]]) -> str:
    """Markdown: for each family, how well merges are chosen."""
    return "\n".join([_ABOUT, *(line for laboratory, rows in laboratories.items() for line in _family(laboratory, rows))])


_ABOUT = """How well a merge is chosen by a few rows of each model's data that are in no C. Without labels: by the share
kept, mean over the models. With labels: by accuracy on the same rows (encoder) or bits per byte (decoder). Regret is by how much
the test score of the merge that is picked is below that of the best one: among all merges, or among the settings of one method
(mean over methods). Each row stands in one draw: 64 rows make eight draws of 8, or one of 64, for each seed. Errors are standard
errors over draws.
"""


def fields_of(laboratory: Laboratory, rows: list[Row]) -> list[Field]:
    """One for each seed. Seeds for which something is missing are left out."""
    fields = []
    for seed in laboratory.seeds:
        scorer = Scorer(laboratory, seed)
        with contextlib.suppress(MissingResult):
            tests = [statistics.mean(scorer.test(row.arm).values()) for row in rows]
            measured = [scorer.rows(row.arm) for row in rows]
            fields.append(Field(seed, [row.section for row in rows], tests, measured, scorer.rows(None)))
    return fields


def _family(laboratory: Laboratory, rows: list[Row]) -> list[str]:
    family = laboratory.family
    fields = fields_of(laboratory, rows)
    if not fields:
        return []
    kind = "encoder" if family.name == "encoder" else "decoder"
    names = DISTANCES[kind]
    choosers = {f"share kept: {what}": by_distance(name) for what, name in names.items()} | {"labels": LABELS[kind]}
    best, worst, middle = (statistics.mean(pick(field.test) for field in fields) for pick in (max, min, statistics.mean))
    within = statistics.mean(field.regret_within([0] * len(field.test)) for field in fields)
    return [
        f"#### The {family.name}: {len(rows)} merges of {len(list(family.tasks))} models, {family.unit}",
        "",
        f"Seeds: {', '.join(str(field.seed) for field in fields)}. "
        f"Test scores go from {worst:.1f} to {best:.1f}; picking at random has a regret of {best - middle:.1f}, and "
        f"{within:.1f} among the settings of one method.",
        "",
        *_choices(fields, choosers),
        *_noise(fields, names),
        *(_cut(fields) if kind == "decoder" else []),
        *_time(laboratory, rows[0]),
    ]


def _choices(fields: Sequence[Field], choosers: dict[str, Chooser]) -> list[str]:
    found = {what: {count: quality(fields, chooser, count) for count in COUNTS} for what, chooser in choosers.items()}
    lines = []
    for title, key in (
        ("Rank correlation with the test score", "correlation"),
        ("Regret, among all merges", "regret"),
        ("Regret, among the settings of one method", "within"),
    ):
        lines += [
            f"**{title}**",
            "",
            f"| chosen by | {' | '.join(f'{count} rows' for count in COUNTS)} | against labels, 32 rows |",
            f"|---{'|---' * len(COUNTS)}|---|",
        ]
        for what, by_count in found.items():
            shown = [_shown(getattr(by_count[count], key)) for count in COUNTS]
            more = [one - other for one, other in zip(getattr(by_count[32], key), getattr(found["labels"][32], key))]
            against = "" if what == "labels" else _shown(more, "+")
            lines.append(f"| {what} | {' | '.join(shown)} | {against} |")
        lines.append("")
    return lines


def _shown(values: Sequence[float], sign: str = "") -> str:
    mean, error = mean_and_error(values)
    return f"{mean:{sign}.2f}" if math.isnan(error) else f"{mean:{sign}.2f} ± {error:.2f}"


def _noise(fields: Sequence[Field], names: dict[str, str]) -> list[str]:
    """Whether the standard error that is told is how much the share kept differs between draws."""
    lines = [
        "**The share kept, in percent: its standard error as told, and its standard deviation over draws of one seed** "
        "(root mean squares over merges)",
        "",
        f"| | {' | '.join(f'{count} rows' for count in COUNTS[:2])} |",
        f"|---{'|---' * 2}|",
    ]
    for what, name in names.items():
        cells = []
        for count in COUNTS[:2]:
            told, spread = [], []
            for field in fields:
                for rows in field.rows:
                    drawn = [_mean_kept(rows, field.base, name, part) for part in field.draws(count)]
                    told += [estimate.error**2 for estimate in drawn]
                    spread.append(statistics.variance(estimate.value for estimate in drawn))
            cells.append(f"{100 * statistics.mean(told) ** 0.5:.1f}, {100 * statistics.mean(spread) ** 0.5:.1f}")
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return [*lines, ""]


def _mean_kept(rows: Rows, base: Rows, name: str, part: slice) -> score.Estimate:
    return score.mean(
        [
            score.kept(score.Distances(*(torch.tensor(of[task][name][part], dtype=torch.float64) for of in (rows, base))))
            for task in rows
        ]
    )


def _cut(fields: Sequence[Field]) -> list[str]:
    """What it costs to keep only some of the tokens that an expert predicts."""
    lines = [
        "**Keeping some tokens a place: the KL that is left, and by how much the share kept changes** (percent, of 64 rows)",
        "",
        "| | KL | share kept, mean | largest |",
        "|---|---|---|---|",
    ]
    kinds = {f"the {k} likeliest, all others as one": f"kl@{k}" for k in TOP}
    for what, name in (kinds | {"224, and 32 drawn from the others, as it is": "product"}).items():
        left, changes = [], []
        for field in fields:
            for rows in field.rows:
                cut, whole = (_mean_kept(rows, field.base, key, slice(None)).value for key in (name, "kl"))
                changes.append(100 * abs(cut - whole))
                left.append(sum(sum(of[name]) for of in rows.values()) / sum(sum(of["kl"]) for of in rows.values()))
        lines.append(f"| {what} | {100 * statistics.mean(left):.1f} | {statistics.mean(changes):.2f} | {max(changes):.2f} |")
    return [*lines, ""]


def _time(laboratory: Laboratory, row: Row) -> list[str]:
    try:
        seconds = Scorer(laboratory, laboratory.seeds[0]).seconds(row.arm)
    except MissingResult:
        return []
    found = {name: statistics.median(values) for name, values in seconds.items()}
    return [
        "**Time of scoring one merge when what the experts predict is in the cache**, processor seconds, medians: "
        f"{found['score, opened']:.1f}, where transformers alone runs over the same batches in {found['run']:.1f} "
        f"({found['score, opened'] / found['run']:.2f} x); with opening, loading and planning {found['score']:.1f} against "
        f"{found['load'] + found['run']:.1f} ({found['score'] / (found['load'] + found['run']):.2f} x).",
        "",
    ]
