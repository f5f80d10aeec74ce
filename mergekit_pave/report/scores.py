"""What `mergekit-pave score` measured, for people: the columns and figures that all tables of it show, and the text table."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from mergekit_pave.core.score import Distances, Estimate, mean_more, worst_more
from mergekit_pave.report.places import short_models

Score = dict[str, Any]  # of one merge, as pave_scores.json has it

_RATIOS = {
    "kl": "1 - KL(model‖merged) / KL(model‖base) of predictions",
    "cosine": "1 - d(model, merged) / d(model, base), where d is 1 - the cosine of features,",
}
LIMITS = (
    "The share kept tells how like its models a merge is on their own kind of data. It tells nothing of skill, safety or style."
)
NOTHING_TO_KEEP = (
    "A dash for the share kept: on these rows the base model gives what the model gives, so there is nothing to keep."
)
RESTORED = "Of a merge by emr each model is compared with what it is restored to."
_WIDTH = 120  # of the lines below the table in the terminal


class Column(NamedTuple):
    """A figure of each model: its key in a score, its heading, and what it is."""

    key: str
    heading: str
    meaning: str


def columns(scores: Sequence[Score]) -> list[Column]:
    """The columns that at least one of the scores has a figure for; the share kept comes first and is always there."""
    models = [model for score in scores for model in score["models"].values()]
    ratio = " or ".join(_RATIOS[measure] for measure in dict.fromkeys(model["measure"] for model in models))
    rows = " to ".join(str(rows) for rows in dict.fromkeys(limit(model["rows"] for model in models) for limit in (min, max)))
    kinds = list(dict.fromkeys(model["place"] for model in models))
    places, place = (" or ".join(kind + ending for kind in kinds) for ending in ("s", ""))
    every = [
        Column(
            "kept",
            "share kept",
            f"100 % is the model, 0 % the base model, below 0 further away than that: {ratio} on {rows} rows a model that "
            "calibration did not use; "
            "± is one standard error",
        ),
        Column("agreement", "top-1 agreement", f"{places} where the model's first choice is the merge's, too"),
        Column(
            "bits_per_byte",
            "bits per byte",
            "loss on the text of these rows, without special tokens; in brackets that of the model and of the base model",
        ),
        Column(
            "drift", "drift", f"how far it is from the base model on the other models' rows: KL(base‖merged) in bits a {place}"
        ),
    ]
    return every[:1] + [column for column in every[1:] if any(model[column.key] is not None for model in models)]


def figure(model: dict[str, Any], key: str) -> str:
    """A figure of a model of a score, as a text."""
    value = model[key]
    if value is None:
        return "-"
    if key == "kept":
        return share(model)
    if key == "agreement":
        return f"{100 * value:.1f} %"
    if key == "bits_per_byte":
        return f"{bits_shown(value['merged'])} ({bits_shown(value['expert'])}, {bits_shown(value['base'])})"
    return bits_shown(value)


def share(estimate: dict[str, Any] | None) -> str:
    """A share kept with its standard error, in per cent."""
    if estimate is None or estimate["kept"] is None:
        return "-"
    return with_error(estimate["kept"], estimate["error"])


def with_error(value: float, error: float | None, sign: str = "") -> str:
    """A share and its standard error in per cent. The error of a single row is unknown: None or infinite.

    Args:
        sign: "+" if it is a difference.
    """
    text = _per_cent(value, sign)
    return f"{text} %" if error is None or not math.isfinite(error) else f"{text} ± {_per_cent(error)} %"


def _per_cent(share: float, sign: str = "") -> str:
    return f"{100 * share:{sign}.1f}" if abs(share) < 1000 else f"{100 * share:{sign}.2g}"  # of a merge that has come to nothing


def table(score: Score) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """A line for each model, then the mean and the worst, which have less columns."""
    shown, names = columns([score]), short_models(score["models"])
    rows = [(names[model], *(figure(of_model, column.key) for column in shown)) for model, of_model in score["models"].items()]
    if len(rows) > 1:
        rows.append(("mean", share(score["mean"])))
        rows.append((f"worst {_worst_model(score, names)}".strip(), share(score["worst"])))
    return ("model", *(column.heading for column in shown)), rows


def as_text(scores: dict[str, Score]) -> str:
    """Scores for the terminal: a line for each model, and below the table a line about each column.

    Args:
        scores: by the folder of the merge. Of several, each gets a column, and the first is compared with each.
    """
    first = next(iter(scores.values()))
    if len(scores) == 1:
        head, rows = table(first)
        lines = aligned([head, *rows])
    else:
        lines = _side_by_side(scores)
    meanings = {column.heading: column.meaning for column in columns(list(scores.values()))}
    if len(scores) > 1:
        name = next(iter(short_models(scores).values()))
        meanings[f"more than {name}"] = "the difference of the shares kept, on the same rows; ± is the error of the difference"
    width = max(map(len, meanings))
    below = [f"{heading:{width}}  {meaning}." for heading, meaning in meanings.items()]
    lines += ["", *(textwrap.fill(line, _WIDTH, subsequent_indent=" " * (width + 2)) for line in below), ""]
    found = [f"Warning: {warning}." for warning in misfits(list(scores.values()))] + notes(list(scores.values()))
    return "\n".join([*lines, *(textwrap.fill(note, _WIDTH) for note in found)])


def misfits(scores: Sequence[Score]) -> list[str]:
    """A sentence about each model whose rows the base model predicts better than it does."""
    found = []
    for name, model in (pair for score in scores for pair in score["models"].items()):
        bits = model["bits_per_byte"]
        if bits and bits["expert"] > bits["base"]:
            own, base = (bits_shown(bits[of]) for of in ("expert", "base"))
            found.append(
                f"{name} predicts its own held-out rows worse than the base model does ({own} and {base} bits per byte): its "
                "`data` is not what it was tuned for, or that of another model. So the share kept means little"
            )
    return list(dict.fromkeys(found))


def mean_bits(score: Score) -> float | None:
    """The mean of the merge's bits per byte over the models; None if one of them has none."""
    bits = [model["bits_per_byte"] for model in score["models"].values()]
    return sum(of["merged"] for of in bits) / len(bits) if all(bits) else None


def notes(scores: Sequence[Score]) -> list[str]:
    """What a reader should know besides the meaning of each column."""
    empty = any(model["kept"] is None for score in scores for model in score["models"].values())
    restored = any(score.get("restored") for score in scores)
    return [RESTORED] * restored + [NOTHING_TO_KEEP] * empty + [LIMITS]


def _side_by_side(scores: dict[str, Score]) -> list[str]:
    """A table with a block of lines for each figure, and a column for each merge."""
    merges, every = short_models(scores), list(scores.values())
    models = list(dict.fromkeys(model for score in every for model in score["models"]))
    names, lines = short_models(models), []
    for column in columns(every):
        lines.append([column.heading, *merges.values()] if not lines else [column.heading])
        for model in models:
            lines.append(
                [f"  {names[model]}", *(figure(s["models"][model], column.key) if model in s["models"] else "-" for s in every)]
            )
        if column.key == "kept" and len(models) > 1:
            lines.append(["  mean", *(share(score["mean"]) for score in every)])
            lines.append(["  worst", *(f"{_worst_model(score, names)} {share(score['worst'])}".strip() for score in every)])
        if column.key == "kept":
            lines += _differences(next(iter(merges.values())), every, alone=len(models) == 1)
    return aligned(lines)


def _differences(first: str, scores: list[Score], alone: bool) -> list[list[str]]:
    """By how much each merge keeps more than the first.

    Args:
        alone: whether there is one model only, so that the mean is the worst.
    """
    kinds = {"": mean_more} if alone else {"mean, ": mean_more, "worst, ": worst_more}
    return [
        [f"  {kind}more than {first}", "-", *(_difference(more(*_paired(score, scores[0]))) for score in scores[1:])]
        for kind, more in kinds.items()
    ]


def _difference(estimate: Estimate | None) -> str:
    return "-" if estimate is None else with_error(*estimate, sign="+")


def _paired(one: Score, other: Score) -> tuple[list[Distances], list[Distances]]:
    """The distances of each row, by model, of the models that both have."""
    both = [model for model in one["models"] if model in other["models"]]
    return distances(one, both), distances(other, both)


def distances(score: Score, models: Iterable[str] | None = None) -> list[Distances]:
    """The distances of each row, by model.

    Args:
        models: only these, in this order.
    """
    rows = [score["models"][model]["by_row"] for model in (score["models"] if models is None else models)]
    return [Distances(*(torch.tensor(of_model[key], dtype=torch.float64) for key in ("merged", "base"))) for of_model in rows]


def _worst_model(score: Score, names: dict[str, str]) -> str:
    return f"({names[score['worst']['model']]})" if score["worst"] else ""


def bits_shown(number: float) -> str:
    """Bits, or another figure without a unit."""
    return f"{number:.3f}" if abs(number) < 1000 else f"{number:.3g}"


def aligned(lines: Iterable[Sequence[str]]) -> list[str]:
    """Lines of cells as a table: the first column to the left, the others to the right."""
    lines = list(lines)
    widths = [max((len(line[i]) for line in lines if i < len(line)), default=0) for i in range(max(map(len, lines)))]
    return [
        "  ".join(f"{cell:{'>' if i else '<'}{width}}" for i, (cell, width) in enumerate(zip(line, widths))).rstrip()
        for line in lines
    ]
