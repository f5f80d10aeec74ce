"""The PAVE section of mergekit's model card."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard

from mergekit_pave.report import REPORT_NAME, by_model, regmean_reasons

PAPER = "https://arxiv.org/abs/2510.14697"


def with_section(text: str, report: dict) -> str:
    """A model card with the section and its metadata added."""
    card = ModelCard(text)
    card.data.tags = [*(card.data.tags or []), "pave"]
    hub = sorted({data["path"] for data in _data(report) if not _is_local(data["path"])})
    if hub:
        card.data.datasets = hub
    card.text = card.text.rstrip() + "\n\n" + section(report)
    return str(card)


def section(report: dict) -> str:
    """The section's Markdown."""
    if not report["purified"]:
        return "\n".join(["### PAVE", "", *_regmean(report)]) + "\n"
    settings = report["settings"]
    outputs = len({row["output"] for row in report["purified"]})
    lines = [
        "### PAVE",
        "",
        f"Before the merge the task vectors were purified with [PAVE]({PAPER}) by mergekit-pave "
        f"{report['versions']['mergekit-pave']}: in {outputs} of {report['tensors']} tensors, the directions that matter "
        "least to the model's own task, as seen on a few calibration samples, were removed. "
        f"Every figure per tensor is in `{REPORT_NAME}`.",
        "",
        "| setting | value |",
        "|---|---|",
        f"| `rank_ratio` (ρ) | {_value(settings['rank_ratio'])} |",
        f"| `allocation` | {settings['allocation']} |",
        f"| `regularization` (λ) | {_value(settings['regularization'])} |",
        f"| `target` | {settings['target']} |",
        *(f"| `{key}` | {', '.join(settings[key])} |" for key in ("include", "exclude") if settings[key]),
        "",
        *_overrides(report),
        "| model | calibration data | samples | tokens | tensors purified | mean rank kept | removed part / change |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, sums in by_model(report).items():
        source = report["models"][model]
        ratio = f"{sums['removed_norm'] / sums['change_norm']:.3g}" if sums["change_norm"] else "-"
        cells = (
            _escape(model),
            _escape(", ".join(map(_describe, source["data"]))),
            source["samples"],
            source["tokens"],
            sums["tensors"],
            f"{sums['mean_rank']:.1f} ({100 * sums['mean_kept']:.1f} %)",
            ratio,
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    if "regmean" in report:
        lines += ["", *_regmean(report)]
    return "\n".join(lines) + "\n"


def _regmean(report: dict) -> list[str]:
    """What `merge_method: regmean` did, and on which data where no table of purified tensors tells it."""
    done = report["regmean"]
    lines = [
        f"The weights of {len(done['closed_form'])} of {report['tensors']} tensors were merged in closed form (`regmean` of "
        f"mergekit-pave {report['versions']['mergekit-pave']}). `{REPORT_NAME}` lists them.",
        "",
        "| parameter | value |",
        "|---|---|",
    ]
    for key, symbol in (("covariance", " (α)"), ("lambda", " (λ)"), ("reduce_off_diagonal", "")):
        values = sorted({row[key] for row in done["closed_form"]})
        told = " to ".join(f"{value:g}" for value in dict.fromkeys((values[0], values[-1]))) if values else "-"
        lines.append(f"| `{key}`{symbol} | {told} |")
    if reasons := regmean_reasons(done):
        lines += ["", f"Merged as `task_arithmetic` does, by reason: {reasons}."]
    measured = {model: source for model, source in report["models"].items() if model not in by_model(report)}
    if measured:
        lines += ["", "| model | calibration data | samples | tokens |", "|---|---|---|---|"]
    for model, source in measured.items():
        data = _escape(", ".join(map(_describe, source["data"])))
        lines.append(f"| {_escape(model)} | {data} | {source['samples']} | {source['tokens']} |")
    return lines


def _overrides(report: dict) -> list[str]:
    """A line for each model whose settings differ from the block's."""
    lines = []
    for model, source in report["models"].items():
        own = {key: value for key, value in source["settings"].items() if value != report["settings"][key]}
        if own:
            told = "; ".join(f"`{key}` {_value(value)}" for key, value in own.items())
            lines += [f"For {_escape(model)}: {told}.", ""]
    return lines


def _data(report: dict) -> list[dict]:
    return [data for source in report["models"].values() for data in source["data"]]


def _describe(data: dict) -> str:
    parts = [data["path"], data.get("name"), data["split"]]
    if _is_local(data["path"]):
        parts[0] = Path(data["path"]).name
    return " / ".join(part for part in parts if part)


def _is_local(path: str) -> bool:
    if path in ("json", "csv", "parquet", "text", "imagefolder"):  # a loader, with data_files
        return True
    return Path(path).expanduser().exists() or path.startswith((".", "/", "~")) or path.count("/") > 1


def _value(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {number}" for key, number in value.items())
    return f"`{value}`" if isinstance(value, list) else str(value)


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
