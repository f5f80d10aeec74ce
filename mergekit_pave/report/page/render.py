"""The page itself: `pave_report.json`, what was measured beside it, and the plots of both, as one HTML file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup, escape

from mergekit_pave.errors import PaveError
from mergekit_pave.files import replacing
from mergekit_pave.report import card
from mergekit_pave.report.outputs import GENERATOR, PAGE_NAME, is_page
from mergekit_pave.report.page import curves, heatmaps, overlaps
from mergekit_pave.report.page.drawing import Plot, png, svg
from mergekit_pave.report.page.measure import Interference, Measurements, Overlap
from mergekit_pave.report.places import grids, short_models
from mergekit_pave.report.summary import by_model, left_experts, left_weights

_TOP = 8  # rows of the table of what changed most

_NUMBER = re.compile(r"-|[\d.,]+(e[-+]?\d+)?( %| of \d+)?")

Table = tuple[Sequence[str], list[Sequence[Any]]]  # head, rows


@dataclass(frozen=True)
class _Section:
    key: str
    heading: str
    text: str
    plots: list[Plot] = field(default_factory=list)
    table: Table | None = None


def write(folder: Path, name: str, report: dict[str, Any], measured: Measurements | None, config: str | None) -> Path:
    """Write the page, and a PNG of each plot beside it. Each file is complete or not there.

    Args:
        name: what the page is called.
        measured: what the models and caches tell, if they were asked.
        config: the YAML of the merge, if it is known.

    Returns:
        The path of the page.

    Raises:
        PaveError: nothing was purified, there is a file in the way that is none of ours, or the folder cannot be written.
    """
    if not report["purified"]:
        raise PaveError(f"{name}: nothing was purified in this merge, so there is nothing to draw")
    sections = _sections(report, measured)
    files = {f"{plot.name}.png": png(plot) for section in sections for plot in section.plots}
    files[PAGE_NAME] = _html(name, report, measured, config, sections).encode()
    check(folder, files)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            with replacing(folder / file) as temporary:
                temporary.write_bytes(content)
    except OSError as error:
        raise PaveError(f"the report cannot be written to {folder}: {error}") from error
    return folder / PAGE_NAME


def check(folder: Path, files: Sequence[str] = (PAGE_NAME,)) -> None:
    """Refuse to overwrite what no earlier report has written.

    Raises:
        PaveError: it would.
    """
    if folder.exists() and not folder.is_dir():
        raise PaveError(f"{folder} is a file; name a folder for the report with -o")
    if is_page(folder / PAGE_NAME):
        return
    if taken := [file for file in files if (folder / file).exists()]:
        raise PaveError(f"{folder / taken[0]} is not from an earlier report; name another folder with -o")


def _sections(report: dict[str, Any], measured: Measurements | None) -> list[_Section]:
    rows, models = report["purified"], list(report["models"])

    def every(draw, number) -> list[Plot]:
        found = grids(rows, number)
        return [draw(grid, len(found) > 1) for grid in found]

    sections = [
        _Section(
            "kept",
            "Kept rank",
            _allocation(report),
            every(heatmaps.ranks, lambda row: row["kept"] / row["components"]),
        ),
        _Section("energy", "Energy dropped", "", every(heatmaps.energies, lambda row: row["energy_dropped"])),
    ]
    if any(row["change_norm"] for row in rows):
        sections.append(
            _Section("removed", "Removed part beside the change", "", every(heatmaps.removed, _ratio), _most_removed(rows))
        )
    if measured is None:
        return sections
    if measured.overlaps:
        sections.append(
            _Section("interference", "Interference", _interference(measured.overlaps), overlaps.overlaps(measured.overlaps))
        )
    if measured.spectra:
        kept = {(row["model"], row["output"], row.get("expert")): row["kept"] for row in rows}
        drawn = curves.spectra(measured.spectra, kept, models)
        sections.append(_Section("spectra", "Spectra", drawn[0].caption, drawn))
    if measured.inputs:
        text = "" if all("expert" not in row for row in rows) else "Of experts, the one that saw most tokens is shown."
        sections.append(_Section("covariances", "Covariances", text, curves.covariances(measured.inputs, models)))
    return sections


def _interference(found: list[Overlap]) -> str:
    cosines = [overlaps.mean(found, when, Interference.cosines) for when in ("before", "after")]
    conflicts = [100 * overlaps.mean(found, when, Interference.sign_conflicts) for when in ("before", "after")]
    return (
        "Over all purified weights, the mean cosine between the task vectors of two models goes from {:.3f} to {:.3f}, and the "
        "share of elements with opposite signs from {:.1f} % to {:.1f} %.".format(*cosines, *conflicts)
    )


def _allocation(report: dict[str, Any]) -> str:
    if len(report["models"]) == 1:
        return "The model drops the smallest components of each weight, by its share."
    if report["settings"]["allocation"] == "uniform":
        return "Each model drops the same share of components."
    return (
        "The components with the smallest singular values, each over its model's largest, are dropped over all models together, "
        "so models differ; none loses more than 1.5 times its fair share."
    )


def _power(share: float) -> str:
    return f"{share:.1e}".replace("e-0", "e-")


def _ratio(row: dict[str, Any]) -> float | None:
    return row["removed_norm"] / row["change_norm"] if row["change_norm"] else None


def _most_removed(rows: list[dict[str, Any]]) -> Table:
    """The weights from which most was removed, beside their change."""
    most = sorted((row for row in rows if row["change_norm"]), key=_ratio, reverse=True)[:_TOP]
    names = short_models(row["model"] for row in rows)
    head = ("most removed", "model", "kept", "energy dropped", "removed / change")
    return head, [
        (
            row["tensor"] + (f" [{row['expert']}]" if "expert" in row else ""),
            names[row["model"]],
            f"{row['kept']} of {row['components']}",
            _power(row["energy_dropped"]),
            f"{_ratio(row):.2g}",
        )
        for row in most
    ]


def _html(name: str, report: dict[str, Any], measured: Measurements | None, config: str | None, sections: list[_Section]) -> str:
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.render(
        generator=GENERATOR,
        paper=card.PAPER,
        name=name,
        method=yaml.safe_load(config).get("merge_method") if config else None,
        report=report,
        targets=sorted({source["settings"]["target"] for source in report["models"].values()}, reverse=True),
        tiles=_tiles(report),
        warnings=report["warnings"],
        notes=left_experts(report) + left_weights(report) + _missing(measured),
        models=_models(report),
        not_purified=report["not_purified"],
        sections=sections,
        settings=_settings(report),
        calibration=_calibration(report),
        left=_left(report),
        config=config,
        commands=card.commands(report),
        table=_table,
        svg=svg,
    )


def _missing(measured: Measurements | None) -> list[str]:
    if measured is None:
        return [
            "Made from pave_report.json alone. With the config in the place of the folder, mergekit-pave report reads models "
            "and caches, too, and adds interference, spectra and covariances."
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
            "Covariances are not shown: they are no longer in the cache, and of spectra only the cached tails are known."
        )
    return notes


def _tiles(report: dict[str, Any]) -> list[tuple[str, str]]:
    rows, sums = report["purified"], by_model(report)
    kept = sum(row["kept"] for row in rows) / sum(row["components"] for row in rows)
    tiles = [
        (f"{len({row['output'] for row in rows})} of {report['tensors']}", "tensors purified"),
        (f"{100 * kept:.2f} %", "of rank kept"),
        (_power(sum(row["energy_dropped"] for row in rows) / len(rows)), "of energy dropped, mean"),
    ]
    if ratios := [one["removed_norm"] / one["change_norm"] for one in sums.values() if one["change_norm"]]:
        tiles.append((f"{max(ratios):.2g} x", "removed / change of a model, at most"))
    return tiles


def _models(report: dict[str, Any]) -> Table:
    head = ("model", "calibration data", "samples", "tokens", "tensors", "rank kept", "energy dropped", "removed / change")
    rows = []
    for model, sums in by_model(report).items():
        source = report["models"][model]
        ratio = f"{sums['removed_norm'] / sums['change_norm']:.3g}" if sums["change_norm"] else "-"
        rows.append(
            (
                model,
                card.data_of(source),
                f"{source['samples']:,}",
                f"{source['tokens']:,}",
                sums["tensors"],
                f"{100 * sums['mean_kept']:.2f} %",
                _power(sums["mean_energy"]),
                ratio,
            )
        )
    return head, rows


def _settings(report: dict[str, Any]) -> Table:
    settings, names = report["settings"], short_models(report["models"])
    rows = [(key, card.told(value)) for key, value in settings.items() if value != []]
    for model, source in report["models"].items():
        own = {key: value for key, value in source["settings"].items() if value != settings[key]}
        rows += [(f"{key} of {names[model]}", card.told(value)) for key, value in own.items()]
    return ("setting", "value"), rows


def _calibration(report: dict[str, Any]) -> Table:
    """The settings; none of a model whose covariances were given."""
    known = {model: source["calibration"] for model, source in report["models"].items() if source["calibration"]}
    keys = list(dict.fromkeys(key for settings in known.values() for key in settings))
    names = short_models(report["models"])
    rows = [(names[model], *(settings[key] for key in keys)) for model, settings in known.items()]
    rows += [(names[model], "given covariances") for model in names if model not in known]
    return ("model", *keys), rows


def _left(report: dict[str, Any]) -> Table:
    rows, names = [], short_models(report["models"])
    for model, source in report["models"].items():
        for reason, count in Counter(reason.split(" (")[0] for reason in source["left_as_they_are"].values()).most_common():
            rows.append((names[model], reason, count))
    return ("model", "why", "tensors"), rows


def _table(table: Table) -> Markup:
    head, rows = table
    texts = [not all(_NUMBER.fullmatch(str(row[i])) for row in rows if i < len(row)) for i in range(len(head))]

    def line(tag: str, cells: Sequence[Any]) -> str:
        classes = (" class=text" if text else "" for text in texts)
        return "<tr>" + "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(classes, cells)) + "</tr>"

    body = "".join(line("td", row) for row in rows)
    return Markup(f'<div class="scroll" tabindex="0"><table><thead>{line("th", head)}</thead><tbody>{body}</tbody></table></div>')
