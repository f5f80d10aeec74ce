"""What the model card and the page both show of a report: settings, data, and reasons, as texts for people."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id

from mergekit_pave.report.places import projections, short_models

WRITTEN_FROM = {
    "chat": "from its chat template on",
    "bos": "from its BOS token on",
    "eos": "from its EOS token on",
    "random": "each text from a random token on",
}
_LOADERS = ("json", "csv", "parquet", "text", "imagefolder")  # of `datasets`, which read data_files
_SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz", ".zst", ".bz2", ".xz")


def common_settings(report: dict[str, Any]) -> dict[str, str]:
    """The settings of the block, without lists that are empty."""
    return {key: _as_text(value) for key, value in report["settings"].items() if value != []}


def model_settings(report: dict[str, Any]) -> dict[str, dict[str, str]]:
    """For each model the settings in which it differs from the block."""
    common = report["settings"]
    return {
        model: {key: _as_text(value) for key, value in source["settings"].items() if value != common.get(key)}
        for model, source in report["models"].items()
    }


def _as_text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {number}" for key, number in value.items())
    if isinstance(value, list):
        return ", ".join(map(_as_text, value))
    return str(value)


def regmean_parameters(rows: list[dict[str, Any]]) -> dict[str, str]:
    """The parameters of tensors that regmean merged in closed form, as ranges over these tensors."""
    ranges = {}
    for parameter in ("covariance", "lambda", "reduce_off_diagonal"):
        values = [row[parameter] for row in rows]
        ends = dict.fromkeys((min(values), max(values))) if values else ()
        ranges[parameter] = " to ".join(f"{value:g}" for value in ends) or "-"
    return ranges


# What rows of the vocabulary are merged by.
MERGED_BY = {"counts": "token counts", "predictions": "what the models predict"}


def vocabulary_table(report: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple]]:
    """What of the vocabulary was merged by data, with the tokens of each model. There are no rows if nothing was."""
    merged = report.get("vocabulary", {"merged": []})["merged"]
    names = short_models(dict.fromkeys(model for row in merged for model in row["tokens"]))
    head = ("tensor", "rows", "merged by", "lambda (λ)", *(f"tokens of {name}" for name in names.values()))
    return head, [
        (
            row["tensor"],
            f"{row['shown']} of {row['rows']}",
            MERGED_BY[row["by"]],
            f"{row['lambda']:g}",
            *(row["tokens"].get(model, "-") for model in names),
        )
        for row in merged
    ]


def refined_settings(report: dict[str, Any]) -> dict[str, str]:
    """The settings of refining."""
    return {key: f"{value:g}" for key, value in report["refined"]["settings"].items()}


def refined_table(report: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple]]:
    """How well the refined layers fit, by projection: the mean over the layers, with the smallest and the largest."""
    rows = report["refined"]["layers"]
    labels = projections(row["tensor"] for row in rows)
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(labels[row["tensor"]], []).append(row)
    head = ("projection", "layers", "relative error before", "after")
    lines = []
    for label, of_label in groups.items():
        # An error is None where the models' outputs are zero.
        columns = [[row[key] for row in of_label if row[key] is not None] for key in ("error_before", "error_after")]
        digits = told_apart(*(sum(known) / len(known) if known else None for known in columns))
        lines.append((label, len(of_label), *(_errors(known, digits) for known in columns)))
    return head, lines


def told_apart(before: float | None, after: float | None) -> int:
    """With how many digits two numbers are shown, so that one sees whether they differ: 2, or what that takes, at most 5."""
    if before == after or None in (before, after):
        return 2
    return next((digits for digits in (2, 3, 4) if f"{before:.{digits}g}" != f"{after:.{digits}g}"), 5)


def _errors(errors: list[float], digits: int) -> str:
    """A mean with its range."""
    if not errors:
        return "-"
    mean, least, most = (f"{value:.{digits}g}" for value in (sum(errors) / len(errors), min(errors), max(errors)))
    return mean if least == most else f"{mean} ({least} to {most})"


def count_reasons(reasons: dict[str, str]) -> list[tuple[str, int]]:
    """Tensors by the reason why they stay as they are, most frequent reason first.

    Args:
        reasons: by tensor. Details of a reason stand in brackets at its end and are left out.
    """
    return Counter(reason.split(" (")[0] for reason in reasons.values()).most_common()


def calibration_data(source: dict[str, Any]) -> str:
    """The data that a model of the report was calibrated with, without the folders of this machine."""
    names = ", ".join(map(_data_name, source["data"]))
    covariance = source["covariance"]
    if not covariance:
        return names or "not needed"
    return f"{names} (covariances from {Path(covariance).name if is_local(covariance) else covariance})"


def _data_name(data: dict[str, Any]) -> str:
    if "generated" in data:
        return written(data)
    path, files = data["path"], data.get("data_files")
    if path in _LOADERS and files:
        groups = files.values() if isinstance(files, dict) else [files]
        paths = [path for group in groups for path in (group if isinstance(group, list) else [group])]
        path = ", ".join(Path(path).name for path in paths)
    elif is_local(path):
        path = Path(path).name
    return " / ".join(part for part in (path, data.get("name"), data.get("split")) if part)


def written(data: dict[str, Any]) -> str:
    """What a model has written itself, for people."""
    return "written by the model itself, " + WRITTEN_FROM[data["generated"]]


def is_local(path: str) -> bool:
    """Whether the path of a data set or of covariances means files on this machine."""
    if path in _LOADERS or path.endswith(_SUFFIXES):
        return True
    return os.path.exists(os.path.expanduser(path)) or not is_repository(path)


def is_repository(name: str) -> bool:
    """Whether the Hub could have a repository of this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
