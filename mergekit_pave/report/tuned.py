"""What `mergekit-pave tune` has found: the settings with their scores, as JSON, as a table, and as a comment in a YAML."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import yaml

from mergekit_pave.core.score import Distances, Estimate, mean_more, worst_more
from mergekit_pave.report.places import short_models
from mergekit_pave.report.scores import aligned, share, with_error

FORMAT = 1
AS_IT_IS = "the config as it is"
_MORE = {"mean": mean_more, "worst": worst_more}


def shown(changes: dict[str, Any]) -> str:
    """Changes of a config as `--set` takes them."""
    return " ".join(f"{key}={as_yaml(value)}" for key, value in changes.items()) or AS_IT_IS


def as_yaml(value: Any) -> str:
    """A value in one line of YAML."""
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("\n").removesuffix("\n...")


def tuned(settings: Sequence[tuple[dict[str, Any], dict[str, Any]]], by: str) -> dict[str, Any]:
    """The settings that were tried, compared on the same rows.

    Args:
        settings: the changes and the score of each, the config as it is first.
        by: what they are ordered by, `mean` or `worst`.
    """
    best = max(range(len(settings)), key=lambda number: kept(settings[number][1], by))
    distances = [_distances(score) for _, score in settings]
    more = _MORE[by]
    return {
        "format": FORMAT,
        "by": by,
        "settings": [
            {
                "set": changes,
                "score": score,
                "better_than_plain": _as_json(more(of_setting, distances[0])),
                "behind_best": _as_json(more(distances[best], of_setting)),
            }
            for (changes, score), of_setting in zip(settings, distances)
        ],
        "best": best,
    }


def kept(score: dict[str, Any], by: str) -> float:
    """What settings are ordered by; -inf where the base model equals the experts."""
    return score[by]["kept"] if score[by] else -math.inf


def _distances(score: dict[str, Any]) -> list[Distances]:
    rows = [model["by_row"] for model in score["models"].values()]
    return [Distances(*(torch.tensor(of_model[key], dtype=torch.float64) for key in ("merged", "base"))) for of_model in rows]


def _as_json(estimate: Estimate | None) -> dict[str, float | None] | None:
    """JSON knows no infinity, which is the error where nobody knows it."""
    if estimate is None:
        return None
    return {"value": estimate.value, "error": estimate.error if math.isfinite(estimate.error) else None}


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
    head = ["setting", "mean", "worst", "behind the best", *names.values()]
    rows = [[label, *_cells(setting, names, setting is best)] for setting, label in (first, *others)]
    counts = [model["rows"] for model in first_score["models"].values()]
    about = (
        f"Share kept of each model: 0 % is {first_score['base']}, 100 % the model, on "
        f"{' to '.join(map(str, dict.fromkeys((min(counts), max(counts)))))} held-out rows of each."
    )
    return "\n".join([about, "", *aligned([head, *rows]), "", _verdict(result, labels[result["best"]])])


def _cells(setting: dict[str, Any], names: Iterable[str], is_best: bool) -> list[str]:
    score, behind = setting["score"], setting["behind_best"]
    difference = "best" if is_best else with_error(behind["value"], behind["error"]) if behind else "-"
    difference += " *" if not is_best and is_within_noise(setting) else "  "
    return [share(score["mean"]), share(score["worst"]), difference, *(share(score["models"][name]) for name in names)]


def is_within_noise(setting: dict[str, Any]) -> bool:
    """Whether a setting is as good as the best, as far as the rows can tell: two standard errors of the difference."""
    behind = setting["behind_best"]
    return behind is None or behind["error"] is None or behind["value"] <= 2 * behind["error"]


def _verdict(result: dict[str, Any], label: str) -> str:
    settings, by = result["settings"], result["by"]
    best = settings[result["best"]]
    if settings[0]["score"][by] is None:
        return "The base model equals the experts on these rows, so nothing can be told apart."
    alike = [setting for setting in settings if setting is not best and is_within_noise(setting)]
    noise = "\n* as good as the best, as far as these rows can tell: at most two standard errors behind." if alike else ""
    if result["best"] == 0:
        return f"Nothing that was tried is better than the config as it is, by the {by}.{noise}"
    gain = best["better_than_plain"]
    more = with_error(gain["value"], gain["error"]).removesuffix(" %")
    return f"Best by the {by}: {label}, {more} points above the config as it is.{noise}"
