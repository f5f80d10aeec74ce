"""The sections of the page: what they say, plot and list."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from mergekit_pave.report import emr, tables
from mergekit_pave.report.page import alignments, curves, distances, fits, heatmaps, overlaps
from mergekit_pave.report.page.document import Section, Table
from mergekit_pave.report.page.drawing import Plot
from mergekit_pave.report.page.measure import Interference, Measurements, Overlap
from mergekit_pave.report.places import grids, short_models
from mergekit_pave.report.summary import kind, removed_over_change

_TOP = 8  # rows of the table of the weights that lost most


def sections_of(report: dict[str, Any], measured: Measurements | None) -> list[Section]:
    sections = []
    if "emr" in report:
        sections.append(_emr(report))
    if "closed_form" in report.get("regmean", {}):
        sections.append(_closed_form(report))
    if "vocabulary" in report:
        sections.append(_vocabulary(report))
    if "layers" in report.get("refined", {}):
        sections.append(_refined(report))
    if report["purified"]:
        sections += _purified(report)
    if report["purified"] and measured is not None:
        sections += _measured(report, measured)
    return sections


def _emr(report: dict[str, Any]) -> Section:
    """What `merge_method: emr` keeps of each model."""
    kept = report["emr"]
    of_base = tables.count_reasons(kept["base_only"])
    others = [(("as in the base model, because it is", "tensors"), of_base)] if of_base else []
    name = next(iter(emr.restore_names(kept).values()))
    text = (
        "The merged checkpoint holds the change that all models share, and is no model to use by itself. Each model is restored "
        f"from it, the base model and the model's own file: mergekit-pave restore OUT {name}, or "
        f'mergekit_pave.load_task("OUT", "{name}"), with OUT the folder of this merge.'
    )
    formulas = [f"{formula}: {words}." for formula, words in emr.FORMULAS.items()]
    plots = [distances.plot_distances(kept["models"])]
    notes = [emr.meaning(report), "τᵢ = Wᵢ - W_base: the task vector of model i.", *formulas]
    return Section("restored", "What is restored", text, plots, [emr.restored_table(kept), *others], notes)


def _closed_form(report: dict[str, Any]) -> Section:
    """What `merge_method: regmean` did."""
    regmean = report["regmean"]
    kinds = defaultdict(list)
    for row in regmean["closed_form"]:
        kinds[kind(row["tensor"])].append(row)
    rows = [(name, len(members), *tables.regmean_parameters(members).values()) for name, members in kinds.items()]
    merged = [(("tensor", "tensors", "covariance (α)", "lambda (λ)", "reduce_off_diagonal"), rows)] if rows else []
    reasons = tables.count_reasons(regmean["as_task_arithmetic"])
    others = [(("merged as task_arithmetic does, because it is", "tensors"), reasons)] if reasons else []
    text = (
        f"regmean merged {len(regmean['closed_form'])} of {report['tensors']} tensors in closed form. A star stands for the "
        "number of a layer or an expert."
    )
    plots = alignments.plot_alignments(regmean["closed_form"])
    if counts := regmean.get("weights"):
        plots = [alignments.plot_weights(counts), *plots]
    return Section("closed-form", "Closed form", text, plots, tables=merged + others)


def _vocabulary(report: dict[str, Any]) -> Section:
    """How the vocabulary was merged."""
    merged = tables.vocabulary_table(report)
    reasons = tables.count_reasons(report["vocabulary"]["left"])
    others = [(("left to the merge method, because it is", "tensors"), reasons)] if reasons else []
    text = (
        "Rows are merged by how often each model's samples have their token, or so that the head predicts what each model "
        "predicts on its own samples. Rows that no sample shows are as the merge method gives them."
    )
    return Section("vocabulary", "Vocabulary", text, tables=([merged] if merged[1] else []) + others)


def _refined(report: dict[str, Any]) -> Section:
    """How well the refined layers fit, before and after."""
    refined = report["refined"]
    reasons = tables.count_reasons(refined["left"])
    others = [(("as the merge method gives it, because it is", "tensors"), reasons)] if reasons else []
    text = (
        f"{len(refined['layers'])} of {report['tensors']} tensors were refined: block by block, each linear layer was fitted so "
        "that in the merged model it has the outputs that it has in the model whose samples run through it."
    )
    return Section("refined", "Refined", text, fits.plot_errors(refined["layers"]), tables=others)


def _purified(report: dict[str, Any]) -> list[Section]:
    rows = report["purified"]

    def plot_stacks(draw, number) -> list[Plot]:
        stacks = grids(rows, number)
        return [draw(grid, len(stacks) > 1) for grid in stacks]

    ranks = plot_stacks(heatmaps.ranks, lambda row: row["kept"] / row["components"])
    energies = plot_stacks(heatmaps.energies, lambda row: row["energy_dropped"])
    sections = [Section("kept", "Kept rank", _allocation(report), ranks), Section("energy", "Energy dropped", "", energies)]
    if any(row["change_norm"] for row in rows):
        removed = plot_stacks(heatmaps.removed, _ratio)
        sections.append(Section("removed", "Removed part beside the change", "", removed, [_most_removed(rows)]))
    return sections


def _measured(report: dict[str, Any], measured: Measurements) -> list[Section]:
    rows, models, sections = report["purified"], list(report["models"]), []
    if measured.overlaps:
        plots = overlaps.plot_overlaps(measured.overlaps)
        sections.append(Section("interference", "Interference", _interference(measured.overlaps), plots))
    if measured.spectra:
        kept = {(row["model"], row["output"], row.get("expert")): row["kept"] for row in rows}
        plots = curves.plot_spectra(measured.spectra, kept, models)
        sections.append(Section("spectra", "Spectra", plots[0].caption, plots))
    if measured.inputs:
        text = "Of experts, the one that saw most tokens is shown." if any("expert" in row for row in rows) else ""
        plots = curves.plot_covariances(measured.inputs, models)
        sections.append(Section("covariances", "Covariances", text, plots))
    return sections


def _interference(measured: list[Overlap]) -> str:
    cosines = [overlaps.mean(measured, when, Interference.cosines) for when in ("before", "after")]
    conflicts = [100 * overlaps.mean(measured, when, Interference.sign_conflicts) for when in ("before", "after")]
    return (
        "Over all purified weights, the mean cosine between the task vectors of two models goes from {:.3f} to {:.3f}, and the "
        "share of elements with opposite signs from {:.1f} % to {:.1f} %.".format(*cosines, *conflicts)
    )


def _allocation(report: dict[str, Any]) -> str:
    if len(report["models"]) == 1:
        return "The smallest components of each weight are dropped, as many as the rank ratio says."
    if report["settings"]["allocation"] == "uniform":
        return "Each model drops the same share of components."
    return (
        "The components with the smallest singular values, each divided by its model's largest, are dropped over all models "
        "together, so models differ. No model loses more than 1.5 times its fair share."
    )


def scientific(share: float) -> str:
    """A small share, such as 3.2e-5."""
    return f"{share:.1e}".replace("e-0", "e-")


def _ratio(row: dict[str, Any]) -> float | None:
    return removed_over_change(row["removed_norm"], row["change_norm"])


def _most_removed(rows: list[dict[str, Any]]) -> Table:
    """The weights that lost most, compared with their change."""
    most = sorted((row for row in rows if row["change_norm"]), key=_ratio, reverse=True)[:_TOP]
    names = short_models(row["model"] for row in rows)
    head = ("most removed", "model", "kept", "energy dropped", "removed / change")
    return head, [
        (
            row["tensor"] + (f" [{row['expert']}]" if "expert" in row else ""),
            names[row["model"]],
            f"{row['kept']} of {row['components']}",
            scientific(row["energy_dropped"]),
            f"{_ratio(row):.2g}",
        )
        for row in most
    ]
