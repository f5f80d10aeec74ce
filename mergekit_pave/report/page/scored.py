"""What a merge keeps of each model: a section of its page, or a page of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergekit_pave.report.page import document, shares
from mergekit_pave.report.page.document import Section
from mergekit_pave.report.places import short_models
from mergekit_pave.report.scores import columns, misfits, notes, share, table


def write(folder: Path, name: str, score: dict[str, Any], config: str | None) -> Path:
    """Write a page with the score of a merge, and nothing else.

    Args:
        name: the heading of the page.
        config: the YAML of the merge, if it is known.

    Returns:
        The path of the page.

    Raises:
        PaveError: a file of somebody else is in the way, or the folder cannot be written.
    """
    return document.write(
        folder,
        "scores.html",
        [section(score)],
        name=name,
        lead=f"How much this merge keeps of the models that it was made of. {scale(score)}",
        tiles=tiles(score),
        warnings=[],
        notes=[],
        settings=settings(score),
        versions=score["versions"],
        config=config,
    )


def section(score: dict[str, Any]) -> Section:
    meanings = [f"{column.heading}: {column.meaning}." for column in columns([score])]
    plots = [shares.plot_score(score)]
    text = " ".join([*(f"{warning}." for warning in misfits([score])), *notes([score])])
    return Section("keeps", "What it keeps", text, plots, tables=[table(score)], notes=meanings)


def scale(score: dict[str, Any]) -> str:
    """What the ends of the scale are, and who measured."""
    ours = score["versions"]["mergekit-pave"]
    return f"0 % is the base model, {score['base']}; 100 % is the model itself. Measured by mergekit-pave {ours}."


def tiles(score: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures that matter most."""
    if not score["mean"]:
        return []
    found = [tile(score["mean"], "of each model kept, mean")]
    if len(score["models"]) > 1 and score["worst"]:
        worst = short_models(score["models"])[score["worst"]["model"]]
        found.append(tile(score["worst"], f"of {worst} kept, the worst"))
    return found


def tile(estimate: dict[str, Any], label: str) -> tuple[str, str]:
    """A share kept, and below it the label with its error."""
    number, _, error = share(estimate).partition(" ± ")
    return (f"{number} %", f"{label} (± {error})") if error else (number, label)


def settings(score: dict[str, Any]) -> document.Table:
    """What was measured on."""
    return ("model", "rows", "measured at"), [
        (name, model["rows"], f"{model['places']:,} {model['place']}s") for name, model in score["models"].items()
    ]
