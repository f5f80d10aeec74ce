"""What `mergekit-pave tune` has found: the settings with their scores, as JSON, as a table, and as a comment in a YAML."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from mergekit_pave.core.score import Estimate, mean_more, worst_more
from mergekit_pave.report.places import short_models
from mergekit_pave.report.score import as_json
from mergekit_pave.report.scores import aligned, bits_shown, distances, mean_bits, misfits, share, with_error

FORMAT = 1
AS_IT_IS = "the config as it is"
WITHIN_NOISE = "as good as the best, as far as these rows can tell: at most two standard errors behind."
_MORE = {"mean": mean_more, "worst": worst_more}


def shown(changes: dict[str, Any]) -> str:
    """Changes of a config as `--set` takes them."""
    return " ".join(f"{key}={as_yaml(value)}" for key, value in changes.items()) or AS_IT_IS


def as_yaml(value: Any) -> str:
    """A value in one line of YAML."""
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("\n").removesuffix("\n...")


def tuned(
    settings: Sequence[tuple[dict[str, Any], dict[str, Any]]], by: str, failed: Sequence[tuple[dict[str, Any], str]] = ()
) -> dict[str, Any]:
    """The settings that were tried, compared on the same rows.

    Args:
        settings: the changes and the score of each, the config as it is first.
        by: what they are ordered by, `mean` or `worst`.
        failed: the changes of settings that have no score, and why.
    """
    best = max(range(len(settings)), key=lambda number: kept(settings[number][1], by))
    rows = [distances(score) for _, score in settings]
    more = _MORE[by]
    return {
        "format": FORMAT,
        "by": by,
        "settings": [
            {
                "set": changes,
                "score": score,
                "bits_per_byte": mean_bits(score),
                "better_than_plain": _as_json(more(of_setting, rows[0])),
                "behind_best": _as_json(more(rows[best], of_setting)),
            }
            for (changes, score), of_setting in zip(settings, rows)
        ],
        "best": best,
        "failed": [{"set": changes, "reason": reason} for changes, reason in failed],
    }


def kept(score: dict[str, Any], by: str) -> float:
    """What settings are ordered by; -inf where the base model equals the models."""
    return score[by]["kept"] if score[by] else -math.inf


def _as_json(estimate: Estimate | None) -> dict[str, float | None] | None:
    return as_json(estimate, "value") if estimate else None


def as_text(result: dict[str, Any], labels: Sequence[str]) -> str:
    """The table for people: the config as it is first, then the best first.

    Args:
        labels: of the settings, in the order in which they were tried.
    """
    by = result["by"]
    first, *others = zip(result["settings"], labels)
    others.sort(key=lambda pair: -kept(pair[0]["score"], by))
    first_score = first[0]["score"]
    names = short_models(first_score["models"])
    best = result["settings"][result["best"]]
    has_bits = first[0]["bits_per_byte"] is not None
    head = ["setting", "mean", "worst", "behind the best", *["bits per byte"] * has_bits, *names.values()]
    rows = [[label, *_cells(setting, names, setting is best)] for setting, label in (first, *others)]
    counts = [model["rows"] for model in first_score["models"].values()]
    about = (
        f"Share kept of each model: 0 % is {first_score['base']}, 100 % the model, on "
        f"{' to '.join(map(str, dict.fromkeys((min(counts), max(counts)))))} held-out rows of each."
    )
    lines = [*aligned([head, *rows]), *failures(result)]
    below = [verdict(result, labels[result["best"]]), *remarks(result, labels)]
    below += [f"Warning: {warning}." for warning in misfits([first_score])]
    return "\n".join([about, "", *lines, "", *below])


def failures(result: dict[str, Any]) -> list[str]:
    """A line about each setting that has no score."""
    return [f"{shown(setting['set'])}: failed: {setting['reason']}" for setting in result["failed"]]


def _cells(setting: dict[str, Any], names: Iterable[str], is_best: bool) -> list[str]:
    score, behind = setting["score"], setting["behind_best"]
    difference = "best" if is_best else with_error(behind["value"], behind["error"]) if behind else "-"
    difference += " *" if not is_best and is_within_noise(setting) else "  "
    bits = [bits_shown(setting["bits_per_byte"])] if setting["bits_per_byte"] is not None else []
    return [share(score["mean"]), share(score["worst"]), difference, *bits, *(share(score["models"][name]) for name in names)]


def is_within_noise(setting: dict[str, Any]) -> bool:
    """Whether a setting is as good as the best, as far as the rows can tell: two standard errors of the difference."""
    behind = setting["behind_best"]
    return behind is None or behind["error"] is None or behind["value"] <= 2 * behind["error"]


def verdict(result: dict[str, Any], label: str) -> str:
    """Which setting is the best, and by how much.

    Args:
        label: of the best one.
    """
    settings, by = result["settings"], result["by"]
    if settings[0]["score"][by] is None:
        return "The base model gives what the models give on these rows, so nothing can be told apart."
    if result["best"] == 0:
        return f"Nothing that was tried is better than the config as it is, by the {by}."
    gain = settings[result["best"]]["better_than_plain"]
    more = with_error(gain["value"], gain["error"]).removesuffix(" %")
    return f"Best by the {by}: {label}, {more} points above the config as it is."


def remarks(result: dict[str, Any], labels: Sequence[str]) -> list[str]:
    """What the stars mean, and which of the settings with one has the lowest loss.

    Args:
        labels: of the settings, in the order in which they were tried.
    """
    settings = result["settings"]
    if not settings[0]["score"][result["by"]] or not as_good(result):
        return []
    found = [f"* {WITHIN_NOISE}"]
    alike = [i for i, setting in enumerate(settings) if i == result["best"] or is_within_noise(setting)]
    if all(settings[i]["bits_per_byte"] is not None for i in alike):
        lowest = min(alike, key=lambda i: settings[i]["bits_per_byte"])
        bits = bits_shown(settings[lowest]["bits_per_byte"])
        found.append(f"Of these and the best the lowest loss has {labels[lowest]}: {bits} bits per byte, the mean of the models.")
    return found


def as_good(result: dict[str, Any]) -> int:
    """How many other settings are as good as the best, as far as the rows can tell."""
    return sum(i != result["best"] and is_within_noise(setting) for i, setting in enumerate(result["settings"]))
