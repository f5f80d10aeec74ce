"""The PAVE section of mergekit's model card, and its metadata."""

from __future__ import annotations

from huggingface_hub import ModelCard

from mergekit_pave.report.emr import FORMULAS, meaning, restore_command, restore_names, restored_table
from mergekit_pave.report.emr import PAPER as EMR_PAPER
from mergekit_pave.report.markdown import escape, table
from mergekit_pave.report.outputs import REPORT_NAME
from mergekit_pave.report.places import projections, short_models
from mergekit_pave.report.summary import by_model, num_purified, reasons_in_a_line
from mergekit_pave.report.tables import (
    calibration_data,
    common_settings,
    count_reasons,
    is_local,
    is_repository,
    model_settings,
    refined_settings,
    refined_table,
    regmean_parameters,
    vocabulary_table,
)

PAPER = "https://arxiv.org/abs/2510.14697"
_SYMBOLS = {"rank_ratio": " (ρ)", "regularization": " (λ)", "covariance": " (α)", "lambda": " (λ)"}


def with_section(text: str, report: dict, *, licence: dict[str, str] | None = None, picture: str | None = None) -> str:
    """A model card with the section and its metadata added.

    Args:
        text: mergekit's card.
        licence: metadata of the licence that all inputs have, if it is known.
        picture: the file beside the card that shows the ranks, if there is one.
    """
    card = ModelCard(text)
    card.data.tags = [*(card.data.tags or []), "pave"]
    # mergekit lists a model once for each adapter on it, and takes paths that do not exist for names on the Hub.
    bases = [name for name in dict.fromkeys(card.data.base_model or ()) if is_repository(name)]
    card.data.base_model = bases or None
    if bases:
        card.data.base_model_relation = "merge"
    paths = {data["path"] for source in report["models"].values() for data in source["data"] if "path" in data}
    if datasets := sorted(path for path in paths if not is_local(path)):
        card.data.datasets = datasets
    for key, value in (licence or {}).items():
        card.data[key] = value
    card.text = card.text.rstrip() + "\n\n" + section(report, picture)
    return str(card)


def section(report: dict, picture: str | None = None) -> str:
    """The section's Markdown."""
    lines = ["### PAVE", ""]
    if report["purified"]:
        lines += _method(report)
        lines += [f"![Share of rank kept, by model, layer and projection]({picture})", ""] if picture else []
    if "emr" in report:
        lines += _emr(report)
    if "regmean" in report:
        lines += _regmean(report)
    if "vocabulary" in report:
        lines += _vocabulary(report)
    if "refined" in report:
        lines += _refined(report)
    lines += [line for warning in report["warnings"] for line in (f"> {escape(warning)}.", "")]
    lines += _calibration(report)
    if report["purified"]:
        lines += [*_effect(report), *_ranks(report), *_settings(report), *_left_as_they_are(report)]
    lines += [
        "#### To reproduce",
        "",
        "Save the configuration above as `config.yml` in the folder where this merge was run, since relative paths in it start "
        "there. Then run there",
        "",
        *("```sh", commands(report), "```"),
    ]
    return "\n".join(lines) + "\n"


def _method(report: dict) -> list[str]:
    """What purification is, and how many tensors were purified."""
    formulas = {
        "weights": "`W' = W - U_t U_tᵀ W`, and the task vector is `W' - W_base`",
        "task_vector": "`W' = W - U_t U_tᵀ (W - W_base)`, so that only what fine-tuning changed is touched",
    }
    targets = dict.fromkeys(report["models"][model]["settings"]["target"] for model in by_model(report))
    return [
        f"Before the merge, mergekit-pave {report['versions']['mergekit-pave']} purified the task vectors with [PAVE]({PAPER}) "
        f"in {num_purified(report)} of {report['tensors']} tensors. For each weight W of a linear layer, the second moment C of "
        "the layer's inputs was measured on samples of the model's own task. The directions that matter least to it were then "
        "removed: with `U_t` the left singular vectors of `W (C + λI)` with the smallest singular values, "
        f"{'; or '.join(formulas[target] for target in targets)}. "
        f"All other tensors keep their plain task vector. The figures of every tensor are in `{REPORT_NAME}`.",
        "",
    ]


def _emr(report: dict) -> list[str]:
    """What `merge_method: emr` did, and how to get a model back."""
    emr, ours = report["emr"], report["versions"]["mergekit-pave"]
    name = next(iter(restore_names(emr).values()))
    lines = [
        f"`emr` of mergekit-pave {ours} merged {emr['tensors']} of {report['tensors']} tensors by [EMR-Merging]({EMR_PAPER}). "
        f"With {'purified ' * bool(report['purified'])}task vectors `τᵢ = Wᵢ - W_base`:",
        "",
        *(f"- `{formula}`: {words}" for formula, words in FORMULAS.items()),
        "",
        "**This checkpoint is `W_base + τ`, which all models share. It is no model to use by itself.** Each model is restored "
        "from it, the base model and the model's own file:",
        "",
        *("```sh", restore_command(".", name), "```", ""),
        *("```python", "import mergekit_pave", "", f'model = mergekit_pave.load_task(".", "{name}")', "```", ""),
        *table(*restored_table(emr)),
        "",
        meaning(report),
        "",
    ]
    if reasons := reasons_in_a_line(emr["base_only"]):
        lines += [f"Tensors of this checkpoint that are the base model's own, by reason: {escape(reasons)}.", ""]
    return lines


def _regmean(report: dict) -> list[str]:
    """What `merge_method: regmean` did."""
    regmean = report["regmean"]
    parameters = regmean_parameters(regmean["closed_form"])
    lines = [
        f"`regmean` of mergekit-pave {report['versions']['mergekit-pave']} merged {len(regmean['closed_form'])} of "
        f"{report['tensors']} tensors in closed form. `{REPORT_NAME}` lists them.",
        "",
        *table(("parameter", "value"), [(f"`{key}`{_SYMBOLS.get(key, '')}", value) for key, value in parameters.items()]),
        "",
    ]
    if reasons := reasons_in_a_line(regmean["as_task_arithmetic"]):
        lines += [f"Merged as `task_arithmetic` does, by reason: {escape(reasons)}.", ""]
    return lines


def _vocabulary(report: dict) -> list[str]:
    """How the vocabulary was merged."""
    head, rows = vocabulary_table(report)
    lines = []
    if rows:
        lines += [
            f"mergekit-pave {report['versions']['mergekit-pave']} merged the vocabulary by the samples of the models. "
            "By token counts: `W[v] = W_base[v] + λ Σ wᵢ sᵢ(v) Δᵢ[v] / Σ wᵢ sᵢ(v)`, with sᵢ(v) the share of the token v in the "
            "samples of model i. By what the models predict: the head that is closest to all models' predictions on their own "
            "samples, to second order. Rows that no sample shows are as the merge method gives them.",
            "",
            *table(head, rows),
            "",
        ]
    if reasons := reasons_in_a_line(report["vocabulary"]["left"]):
        lines += [f"Vocabulary left to the merge method, by reason: {escape(reasons)}.", ""]
    return lines


def _refined(report: dict) -> list[str]:
    """What `pave.refine` did."""
    refined = report["refined"]
    settings = [(f"`{key}`{_SYMBOLS.get(key, '')}", value) for key, value in refined_settings(report).items()]
    lines = [
        f"mergekit-pave {report['versions']['mergekit-pave']} refined {len(refined['layers'])} of {report['tensors']} "
        "tensors of the merged model, block by block in the order in which the model calls them. The weight of each linear layer "
        "was fitted in closed form to all models: on the inputs X that the merged model gives the layer for samples of model i, "
        "its outputs are to be those that the layer of model i has on its own inputs Xᵢ. Layers that come later saw the new "
        "outputs.",
        "",
        *table(("setting", "value"), settings),
        "",
    ]
    if refined["layers"]:
        lines += [
            "Relative error: `‖W X - Wᵢ Xᵢ‖ / ‖Wᵢ Xᵢ‖`, over all models. Before: with the weight that the merge gave, when all "
            "layers before it had been refined. Each figure is the mean over the layers, with the smallest and the largest.",
            "",
            *table(*refined_table(report)),
            "",
        ]
    if reasons := reasons_in_a_line(refined["left"]):
        lines += [f"As the merge method gives them, by reason: {escape(reasons)}.", ""]
    return lines


def commands(report: dict) -> str:
    """What to type to make the merge again, with the versions that it was made with."""
    packages = (f"{package}=={version.split('+')[0]}" for package, version in report["versions"].items())
    return f"pip install {' '.join(packages)}\nmergekit-yaml config.yml ./merged"


def _calibration(report: dict) -> list[str]:
    if not report["models"]:
        return []
    rows = [(model, calibration_data(source), source["samples"], source["tokens"]) for model, source in report["models"].items()]
    rows += [(model, "not purified", "-", "-") for model in report["not_purified"] if model not in report["models"]]
    return ["#### Calibration", "", *table(("model", "data", "samples", "tokens"), rows), ""]


def _effect(report: dict) -> list[str]:
    names = short_models(report["models"])
    rows = [
        (
            names[model],
            sums["tensors"],
            f"{sums['mean_rank']:.1f} ({100 * sums['mean_kept']:.1f} %)",
            f"{sums['mean_energy']:.2g}",
            f"{sums['removed_over_change']:.3g}" if sums["change_norm"] else "-",
            sums["exceeding"] if sums["change_norm"] else "-",
        )
        for model, sums in by_model(report).items()
    ]
    head = ("model", "tensors purified", "mean rank kept", "mean energy dropped", "removed part / change", "tensors above 1")
    return [
        "#### What it did",
        "",
        *table(head, rows),
        "",
        "Energy is the dropped share of `‖W (C + λI)‖²`. The removed part over the change is `‖W' - W‖ / ‖W - W_base‖`, over all "
        "tensors; above 1, more was removed than fine-tuning had changed. The last column counts the tensors where it is.",
        "",
    ]


def _ranks(report: dict) -> list[str]:
    """Mean rank kept by projection and model, over the layers."""
    names = short_models(report["models"])
    labels = projections(row["output"] for row in report["purified"])
    groups: dict[tuple, dict[str, list[int]]] = {}
    for row in report["purified"]:
        key = labels[row["output"]], row["components"]
        groups.setdefault(key, {}).setdefault(row["model"], []).append(row["kept"])
    rows = [(label, components, *(_range(kept.get(model)) for model in names)) for (label, components), kept in groups.items()]
    head = ("projection", "components", *names.values())
    text = "Rank kept: mean over the layers, with the smallest and the largest."
    return ["#### Ranks", "", text, "", *table(head, rows), ""]


def _range(kept: list[int] | None) -> str:
    if not kept:
        return "all"
    least, most = min(kept), max(kept)
    return str(least) if least == most else f"{sum(kept) / len(kept):.1f} ({least} to {most})"


def _settings(report: dict) -> list[str]:
    rows = [(f"`{key}`{_SYMBOLS.get(key, '')}", value) for key, value in common_settings(report).items()]
    lines = ["#### Settings", "", *table(("setting", "value"), rows), ""]
    for model, settings in model_settings(report).items():
        if settings:
            values = "; ".join(f"`{key}` {escape(value)}" for key, value in settings.items())
            lines += [f"For {escape(model)}: {values}.", ""]
    return lines


def _left_as_they_are(report: dict) -> list[str]:
    """Why the other tensors were not purified."""
    models: dict[str, list[str]] = {}  # by the reasons that they share
    for model, source in report["models"].items():
        counts = count_reasons(source["left_as_they_are"])
        models.setdefault("; ".join(f"{count} {reason}" for reason, count in counts), []).append(model)
    lines = []
    for reasons, names in models.items():
        who = "each model" if len(names) == len(report["models"]) > 1 else ", ".join(map(escape, names))
        lines += [f"Left as they are in {who}: {escape(reasons)}.", ""] if reasons else []
    return lines
