"""The PAVE section of mergekit's model card, and the metadata that go with it."""

from __future__ import annotations

import html
import itertools
import re
from collections import Counter
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.utils import HFValidationError, validate_repo_id

from mergekit_pave.report.outputs import REPORT_NAME
from mergekit_pave.report.places import place, short, short_models
from mergekit_pave.report.summary import by_model, regmean_reasons

PAPER = "https://arxiv.org/abs/2510.14697"
_LOADERS = ("json", "csv", "parquet", "text", "imagefolder")  # of `datasets`, which read data_files
_SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz", ".zst", ".bz2", ".xz")


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
    bases = [name for name in dict.fromkeys(card.data.base_model or ()) if _is_repository(name)]
    card.data.base_model = bases or None
    if bases:
        card.data.base_model_relation = "merge"
    if hub := sorted({data["path"] for data in _data(report) if not _is_local(data["path"])}):
        card.data.datasets = hub
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
    if "regmean" in report:
        lines += _regmean(report)
    lines += [line for warning in report["warnings"] for line in (f"> {_escape(warning)}.", "")]
    lines += _calibration(report)
    if report["purified"]:
        lines += [*_effect(report), *_ranks(report), *_settings(report), *_left(report)]
    lines += ["#### To reproduce", "", "Save the configuration above as `config.yml`, and run", ""]
    return "\n".join([*lines, "```sh", commands(report), "```"]) + "\n"


def _method(report: dict) -> list[str]:
    """What purification is, and of how many tensors."""
    outputs = len({row["output"] for row in report["purified"]})
    what = {
        "weights": "`W' = W - U_t U_tᵀ W`, and the task vector is `W' - W_base`",
        "task_vector": "`W' = W - U_t U_tᵀ (W - W_base)`, so that only what fine-tuning changed is touched",
    }
    targets = dict.fromkeys(report["models"][model]["settings"]["target"] for model in by_model(report))
    return [
        f"Before the merge the task vectors were purified with [PAVE]({PAPER}) by mergekit-pave "
        f"{report['versions']['mergekit-pave']}, in {outputs} of {report['tensors']} tensors. For each weight W of a linear "
        "layer, the second moment C of the layer's inputs was measured on samples of the model's own task, and the directions "
        "that matter least to it were removed: with `U_t` the left singular vectors of `W (C + λI)` with the smallest singular "
        f"values, {'; or '.join(what[target] for target in targets)}. "
        f"All other tensors keep their plain task vector. Every figure per tensor is in `{REPORT_NAME}`.",
        "",
    ]


def _regmean(report: dict) -> list[str]:
    """What `merge_method: regmean` did."""
    done = report["regmean"]
    rows = []
    for key, symbol in (("covariance", " (α)"), ("lambda", " (λ)"), ("reduce_off_diagonal", "")):
        values = sorted({row[key] for row in done["closed_form"]})
        shown = " to ".join(f"{value:g}" for value in dict.fromkeys((values[0], values[-1]))) if values else "-"
        rows.append((f"`{key}`{symbol}", shown))
    lines = [
        f"The weights of {len(done['closed_form'])} of {report['tensors']} tensors were merged in closed form (`regmean` of "
        f"mergekit-pave {report['versions']['mergekit-pave']}). `{REPORT_NAME}` lists them.",
        "",
        *_table(("parameter", "value"), rows),
        "",
    ]
    if reasons := regmean_reasons(done):
        lines += [f"Merged as `task_arithmetic` does, by reason: {_escape(reasons)}.", ""]
    return lines


def commands(report: dict) -> str:
    """What to type to make the merge again, with the versions that it was made with."""
    packages = (f"{package}=={version.split('+')[0]}" for package, version in report["versions"].items())
    return f"pip install {' '.join(packages)}\nmergekit-yaml config.yml ./merged"


def data_of(source: dict[str, Any]) -> str:
    """What a model of the report was calibrated with, without the folders of the machine."""
    data = ", ".join(map(_describe, source["data"]))
    if source["covariance"]:
        where = source["covariance"]
        data += f" (covariances from {Path(where).name if _is_local(where) else where})"
    return data or "not needed"


def told(value: Any) -> str:
    """A setting's value."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {number}" for key, number in value.items())
    if isinstance(value, list):
        return ", ".join(str(told(item)) for item in value)
    return str(value)


def _calibration(report: dict) -> list[str]:
    rows = [(model, data_of(source), source["samples"], source["tokens"]) for model, source in report["models"].items()]
    rows += [(model, "not purified", "-", "-") for model in report["not_purified"] if model not in report["models"]]
    return ["#### Calibration", "", *_table(("model", "data", "samples", "tokens"), rows), ""]


def _effect(report: dict) -> list[str]:
    names = short_models(report["models"])
    rows = [
        (
            names[model],
            sums["tensors"],
            f"{sums['mean_rank']:.1f} ({100 * sums['mean_kept']:.1f} %)",
            f"{sums['mean_energy']:.2g}",
            f"{sums['removed_norm'] / sums['change_norm']:.3g}" if sums["change_norm"] else "-",
            sums["exceeding"] if sums["change_norm"] else "-",
        )
        for model, sums in by_model(report).items()
    ]
    head = ("model", "tensors purified", "mean rank kept", "mean energy dropped", "removed part / change", "tensors above 1")
    lines = ["#### What it did", "", *_table(head, rows), ""]
    lines += [
        "Energy is the dropped share of `‖W (C + λI)‖²`. The removed part over the change is `‖W' - W‖ / ‖W - W_base‖`, over all "
        "tensors; above 1, more was removed than fine-tuning had changed. The last column counts the tensors where it is.",
        "",
    ]
    return lines


def _ranks(report: dict) -> list[str]:
    """Mean rank kept by projection and model, over the layers."""
    names = short_models(report["models"])
    places = {row["output"]: place(row["output"]) for row in report["purified"]}
    stacks = dict.fromkeys(where.stack for where in places.values())
    labels = {stack: short(where.projection for where in places.values() if where.stack == stack) for stack in stacks}
    groups: dict[tuple, dict[str, list[int]]] = {}
    for row in report["purified"]:
        where = places[row["output"]]
        key = (where.stack, where.projection, row["components"])
        groups.setdefault(key, {}).setdefault(row["model"], []).append(row["kept"])
    rows = []
    for (stack, projection, components), kept in groups.items():
        label = labels[stack][projection]
        label = f"{stack}: {label}" if len(stacks) > 1 and stack else label
        rows.append((label, components, *(_range(kept.get(model)) for model in names)))
    head = ("projection", "components", *names.values())
    text = "Rank kept: mean over the layers, with the smallest and the largest."
    return ["#### Ranks", "", text, "", *_table(head, rows), ""]


def _range(kept: list[int] | None) -> str:
    if not kept:
        return "all"
    least, most = min(kept), max(kept)
    return str(least) if least == most else f"{sum(kept) / len(kept):.1f} ({least} to {most})"


def _settings(report: dict) -> list[str]:
    settings = report["settings"]
    symbols = {"rank_ratio": " (ρ)", "regularization": " (λ)"}
    shown = {key: value for key, value in settings.items() if value != []}
    rows = [(f"`{key}`{symbols.get(key, '')}", told(value)) for key, value in shown.items()]
    lines = ["#### Settings", "", *_table(("setting", "value"), rows), ""]
    for model, source in report["models"].items():
        own = {key: value for key, value in source["settings"].items() if value != settings[key]}
        if own:
            shown = "; ".join(f"`{key}` {_escape(told(value))}" for key, value in own.items())
            lines += [f"For {_escape(model)}: {shown}.", ""]
    return lines


def _left(report: dict) -> list[str]:
    """Why the other tensors are as they were."""
    models: dict[str, list[str]] = {}
    for model, source in report["models"].items():
        counts = Counter(reason.split(" (")[0] for reason in source["left_as_they_are"].values())
        models.setdefault("; ".join(f"{count} {reason}" for reason, count in counts.most_common()), []).append(model)
    lines = []
    for reasons, names in models.items():
        who = "each model" if len(names) == len(report["models"]) > 1 else ", ".join(map(_escape, names))
        lines += [f"Left as they are in {who}: {_escape(reasons)}.", ""] if reasons else []
    return lines


def _table(head: tuple, rows: list[tuple]) -> list[str]:
    """A table of Markdown, with numbers to the right."""
    numbers = [all(str(row[i])[:1].isdigit() or row[i] in ("-", "all") for row in rows) for i in range(len(head))]
    lines = [head, ["---:" if number else "---" for number in numbers], *rows]
    return [f"| {' | '.join(_escape(str(cell)) for cell in line)} |" for line in lines]


def _data(report: dict) -> list[dict]:
    return [data for source in report["models"].values() for data in source["data"]]


def _describe(data: dict) -> str:
    parts = [data["path"], data.get("name"), data["split"]]
    if data["path"] in _LOADERS and data.get("data_files"):
        files = data["data_files"]
        files = files.values() if isinstance(files, dict) else [files]
        parts[0] = ", ".join(Path(name).name for group in files for name in (group if isinstance(group, list) else [group]))
    elif _is_local(data["path"]):
        parts[0] = Path(data["path"]).name
    return " / ".join(part for part in parts if part)


def _is_local(path: str) -> bool:
    if path in _LOADERS or path.endswith(_SUFFIXES):
        return True
    return Path(path).expanduser().exists() or not _is_repository(path)


def _is_repository(name: str) -> bool:
    """Whether the Hub could have it."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _escape(text: str) -> str:
    """Text as Markdown that shows it as it is, whatever is in a name or a path. A `key` or `key: value` of ours stays code."""
    pieces = re.split(r"((?<!`)`\w+(?:: [\w.]+)?`(?!`))", " ".join(text.split()))
    return "".join(piece if code else _literal(piece) for piece, code in zip(pieces, itertools.cycle((False, True))))


def _literal(text: str) -> str:
    # An underscore within a word is one, and tensors have many.
    text = re.sub(r"[\\`*\[\]|~$#]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)
    return html.escape(text, quote=False)
