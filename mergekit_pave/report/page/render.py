"""The page itself: `pave_report.json`, what was measured beside it, and the plots of both, as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mergekit_pave.errors import PaveError
from mergekit_pave.names import EMR
from mergekit_pave.report import card, closed_form, emr, tables
from mergekit_pave.report.page import document, scored
from mergekit_pave.report.page.document import Table
from mergekit_pave.report.page.measure import Measurements
from mergekit_pave.report.page.sections import scientific, sections_of
from mergekit_pave.report.places import short_models
from mergekit_pave.report.summary import by_model, left_experts, left_weights, mean_errors, num_purified


def write(
    folder: Path,
    name: str,
    report: dict[str, Any] | None,
    measured: Measurements | None,
    config: str | None,
    score: dict[str, Any] | None = None,
) -> Path:
    """Write the page, and a PNG of each plot beside it. Each file is written whole or not at all.

    Args:
        name: the heading of the page.
        report: of the merge; None if it has none, but was scored.
        measured: what was measured on models and caches, if they were read.
        config: the YAML of the merge, if it is known.
        score: of the merge, if it was scored.

    Returns:
        The path of the page.

    Raises:
        PaveError: there is nothing to show, a file of somebody else is in the way, or the folder cannot be written.
    """
    if not report or not (report["purified"] or "emr" in report or _merged(report) or _only_vocabulary(report)):
        if score:
            return scored.write(folder, name, score, config)
        raise PaveError(f"{name}: {_nothing(report, config)}")
    notes = left_experts(report) + left_weights(report)
    return document.write(
        folder,
        "page.html",
        ([scored.section(score)] if score else []) + sections_of(report, measured),
        paper=card.PAPER,
        emr_paper=emr.PAPER,
        name=name,
        method=_merge_method(config),
        report=report,
        targets=sorted({source["settings"]["target"] for source in report["models"].values()}, reverse=True),
        tiles=(scored.tiles(score) if score else []) + _tiles(report),
        warnings=report["warnings"],
        notes=notes + _missing(measured) if report["purified"] else notes,
        models=_models(report),
        settings=_settings(report),
        calibration=_calibration(report),
        left=_left_as_they_are(report),
        versions=report["versions"],
        config=config,
        commands=card.commands(report),
    )


def _merged(report: dict[str, Any]) -> bool:
    """Whether the report is of a finished merge that tells of `regmean` or of refining."""
    return "closed_form" in report.get("regmean", {}) or "layers" in report.get("refined", {})


def _only_vocabulary(report: dict[str, Any]) -> bool:
    """Whether the vocabulary was merged by token counts, and nothing else was done."""
    return not report["purified"] and "vocabulary" in report and not report.keys() & {"regmean", "refined", "emr"}


def _nothing(report: dict[str, Any], config: str | None) -> str:
    if _merge_method(config) == EMR:
        return "this config purifies nothing. To see what emr keeps of each model, give the folder of the finished merge"
    if "refined" in report:
        return "this config purifies nothing. To see what was refined, give the folder of the finished merge"
    if "regmean" in report:
        return "this config purifies nothing. To see what regmean merged, give the folder of the finished merge"
    return "nothing was purified in this merge, so there is nothing to draw"


def _merge_method(config: str | None) -> str | None:
    try:
        return yaml.safe_load(config or "").get("merge_method")
    except (yaml.YAMLError, AttributeError):  # somebody changed the file
        return None


def _missing(measured: Measurements | None) -> list[str]:
    """Notes on what the page does not show."""
    if measured is None:
        return [
            "Made from pave_report.json alone. If mergekit-pave report is given the config instead of the folder, it reads "
            "models and caches, too, and adds interference, spectra and covariances."
        ]
    notes = []
    if not measured.overlaps:
        notes.append("Interference is not shown: it needs a base model and at least two models that are merged with it.")
    notes += [
        f"{what} of {stack or 'weights outside of layers'} are not shown: the weights are so large that one layer takes too long."
        for what, stack in measured.left_out
    ]
    if not measured.inputs and all(what != "Covariances" for what, _ in measured.left_out):
        notes.append(
            "Covariances are not shown: they were not kept (pave.keep_covariances), or are no longer in the cache. "
            "Of spectra only the cached tails are shown, too."
        )
    return notes


def _tiles(report: dict[str, Any]) -> list[tuple[str, str]]:
    tiles, rows = [], report["purified"]
    if "closed_form" in report.get("regmean", {}):
        tiles.append((f"{len(report['regmean']['closed_form'])} of {report['tensors']}", "tensors merged in closed form"))
        if (of_weights := closed_form.share(report["regmean"])) is not None:
            tiles.append((f"{100 * of_weights:.0f} %", "of all weights merged in closed form"))
    if "emr" in report:
        tiles += _emr_tiles(report)
    if rows:
        kept = sum(row["kept"] for row in rows) / sum(row["components"] for row in rows)
        tiles += [
            (f"{num_purified(report)} of {report['tensors']}", "tensors purified"),
            (f"{100 * kept:.2f} %", "of rank kept"),
            (scientific(sum(row["energy_dropped"] for row in rows) / len(rows)), "of energy dropped, mean"),
        ]
    for row in report.get("vocabulary", {"merged": []})["merged"]:
        tiles.append((f"{row['shown']} of {row['rows']}", f"rows of {row['tensor']} merged by {tables.MERGED_BY[row['by']]}"))
    if "layers" in report.get("refined", {}):
        tiles.append((f"{len(report['refined']['layers'])} of {report['tensors']}", "tensors refined"))
        if errors := mean_errors(report["refined"]):
            before, after = (f"{error:.{tables.told_apart(*errors)}g}" for error in errors)
            shown = f"{before} → {after}" if before != after else f"{after}, no change"
            tiles.append((shown, "relative error of their outputs, mean"))
    ratios = [sums["removed_over_change"] for sums in by_model(report).values() if sums["change_norm"]]
    if ratios:
        tiles.append((f"{max(ratios):.2g} x", "removed / change of a model, at most"))
    return tiles


def _emr_tiles(report: dict[str, Any]) -> list[tuple[str, str]]:
    kept = report["emr"]
    tiles = [
        (f"{kept['tensors']} of {report['tensors']}", "tensors shared through masks"),
        (emr.size(kept), "in the models' files"),
    ]
    known = [of_model["distance"] for of_model in kept["models"].values() if of_model["distance"] is not None]
    if known:
        tiles.append((f"{max(known):.2g}", "distance of a restored model, at most; the base model's is 1"))
    return tiles


def _models(report: dict[str, Any]) -> Table:
    sums = by_model(report)
    head = ["model", "calibration data", "samples", "tokens"]
    if sums:
        head += ["tensors", "rank kept", "energy dropped", "removed / change"]
    rows = []
    for model, source in report["models"].items():
        row = [model, tables.calibration_data(source), f"{source['samples']:,}", f"{source['tokens']:,}"]
        if model in sums:
            of_model = sums[model]
            ratio = f"{of_model['removed_over_change']:.3g}" if of_model["change_norm"] else "-"
            row += [of_model["tensors"], f"{100 * of_model['mean_kept']:.2f} %", scientific(of_model["mean_energy"]), ratio]
        rows.append(row + ["-"] * (len(head) - len(row)))
    return head, rows


def _settings(report: dict[str, Any]) -> Table:
    """The settings of purification, or of `regmean` if nothing was purified, and those of refining."""
    ways = (
        dict.fromkeys(tables.MERGED_BY[row["by"]] for row in report["vocabulary"]["merged"]) if _only_vocabulary(report) else ()
    )
    rows = [("vocabulary", ", ".join(ways))] if ways else []
    if report["purified"]:
        names = short_models(report["models"])
        rows += tables.common_settings(report).items()
        for model, settings in tables.model_settings(report).items():
            rows += [(f"{key} of {names[model]}", value) for key, value in settings.items()]
    elif "closed_form" in report.get("regmean", {}):
        rows += tables.regmean_parameters(report["regmean"]["closed_form"]).items()
    if "refined" in report:
        rows += [(f"{key} of refining", value) for key, value in tables.refined_settings(report).items()]
    return ("setting", "value"), rows


def _calibration(report: dict[str, Any]) -> Table:
    """The settings of calibration, for models that were calibrated with data."""
    settings_of = {model: source["calibration"] for model, source in report["models"].items()}
    keys = list(dict.fromkeys(key for settings in settings_of.values() for key in settings or ()))
    names = short_models(report["models"])
    rows = [(names[model], *(settings.get(key, "-") for key in keys)) for model, settings in settings_of.items() if settings]
    return ("model", *keys), rows


def _left_as_they_are(report: dict[str, Any]) -> Table:
    names = short_models(report["models"])
    counts = ((model, tables.count_reasons(source["left_as_they_are"])) for model, source in report["models"].items())
    return ("model", "why", "tensors"), [(names[model], *counted) for model, of_model in counts for counted in of_model]
