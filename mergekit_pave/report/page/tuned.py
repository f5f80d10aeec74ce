"""The page of `mergekit-pave tune`: which setting keeps how much of each model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergekit_pave.report.page import document, scored, shares
from mergekit_pave.report.page.document import Section, Table
from mergekit_pave.report.page.labels import label_settings
from mergekit_pave.report.places import short_models
from mergekit_pave.report.scores import bits_shown, columns, misfits, notes, share, with_error
from mergekit_pave.report.tuned import as_good, failures, is_within_noise, kept, remarks, shown, verdict

Setting = dict[str, Any]


def write_tuned(folder: Path, name: str, tuned: dict[str, Any], config: str | None) -> Path:
    """Write the page, and a PNG of its picture beside it.

    Args:
        name: of the config.
        tuned: the settings with their scores, as `mergekit-pave tune --json` gives them.
        config: the YAML of the config as it is, if it is known.

    Returns:
        The path of the page.

    Raises:
        PaveError: a file of somebody else is in the way, or the folder cannot be written.
    """
    settings, by = tuned["settings"], tuned["by"]
    best = settings[tuned["best"]]
    labels = label_settings([setting["set"] for setting in settings], config)
    first, *others = range(len(settings))
    order = [first, *sorted(others, key=lambda i: -kept(settings[i]["score"], by))]
    plot = shares.plot_settings([labels[i] for i in order], [settings[i]["score"] for i in order], by)
    table = _table([(labels[i], settings[i]) for i in order], best, by)
    score = best["score"]
    return document.write(
        folder,
        "tuned.html",
        [
            Section(
                "settings", "Share kept by setting", verdict(tuned, labels[tuned["best"]]), [plot], [table], _notes(tuned, labels)
            )
        ],
        option="--report",
        name=name,
        lead=f"{len(settings)} settings of this config, each merged and scored. {scored.scale(score)}",
        tiles=_tiles(tuned),
        warnings=[*failures(tuned), *misfits([score])],
        notes=notes([setting["score"] for setting in settings]),
        settings=scored.settings(score),
        best=shown(best["set"]),
        versions=score["versions"],
        config=config,
    )


def _table(settings: list[tuple[str, Setting]], best: Setting, by: str) -> Table:
    """A line for each setting.

    Args:
        settings: each with its label.
    """
    models = settings[0][1]["score"]["models"]
    names = short_models(models)
    rows = []
    for label, setting in settings:
        score = setting["score"]
        more = _difference(setting["better_than_plain"], "+") if setting is not settings[0][1] else "-"
        behind = "best" if setting is best else _difference(setting["behind_best"])
        if setting is not best and setting["behind_best"] and is_within_noise(setting):
            behind += " *"
        bits = [bits_shown(setting["bits_per_byte"])] if setting["bits_per_byte"] is not None else []
        each = (share(score["models"][model]) for model in models)
        rows.append((label, share(score["mean"]), share(score["worst"]), more, behind, *bits, *each))
    has_bits = settings[0][1]["bits_per_byte"] is not None
    head = ("setting", "mean", "worst", f"{by}, above as it is", f"{by}, behind the best", *["bits per byte"] * has_bits)
    return (*head, *names.values()), rows


def _difference(estimate: dict[str, float | None] | None, sign: str = "") -> str:
    return with_error(estimate["value"], estimate["error"], sign) if estimate else "-"


def _notes(tuned: dict[str, Any], labels: list[str]) -> list[str]:
    share_kept, *_ = columns([setting["score"] for setting in tuned["settings"]])
    found = [
        f"mean, worst, and each model: {share_kept.meaning}.",
        "above as it is, behind the best: on the same rows, so the error is that of the difference.",
    ]
    if tuned["settings"][0]["bits_per_byte"] is not None:
        found.append("bits per byte: the merge's loss on the text of these rows, as the mean of the models.")
    return found + remarks(tuned, labels)


def _tiles(tuned: dict[str, Any]) -> list[tuple[str, str]]:
    settings, by = tuned["settings"], tuned["by"]
    best = settings[tuned["best"]]
    tiles = [(str(len(settings)), "settings")]
    if not best["score"][by]:
        return tiles
    tiles.append(scored.tile(best["score"][by], f"kept by the best, {by} of the models"))
    if tuned["best"] and best["better_than_plain"]:
        tiles.append((_difference(best["better_than_plain"], "+"), "above the config as it is"))
    return [*tiles, (str(as_good(tuned)), "others within noise of the best")]
