"""Short names of settings: only what differs between them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

from mergekit_pave.report.places import short_models
from mergekit_pave.report.tuned import AS_IT_IS, as_yaml

_OF_MODEL = re.compile(r"models\.(\d+)\.parameters\.(.+)")


def label_settings(settings: Sequence[dict[str, Any]], config: str | None) -> list[str]:
    """A label for each setting, such as `lambda 0.8, rank_ratio 1`.

    Keys are as short as `--set` takes them, and those that all settings set alike are left out. Parameters that several
    models have of their own stand together, in the order of the models: `weight 0.4 / 0.6`.

    Args:
        settings: what each sets, by key; {} for the config as it is.
        config: its YAML, which has the names of the models.
    """
    flat = [_flat(setting) for setting in settings]
    keys = list(dict.fromkeys(key for setting in flat for key in setting))
    values = {key: {as_yaml(setting[key]) if key in setting else None for setting in flat if setting} for key in keys}
    groups: dict[str, list[str]] = {}  # by name the keys whose values stand together
    for key, name in _names(keys, _models(config)).items():
        groups.setdefault(name, []).append(key)
    differing = {name: of_name for name, of_name in groups.items() if any(len(values[key]) > 1 for key in of_name)}
    return [_label(setting, differing) or _label(setting, groups) or AS_IT_IS for setting in flat]


def _label(setting: dict[str, Any], groups: dict[str, list[str]]) -> str:
    return ", ".join(
        f"{name} {' / '.join(_value(setting[key]) if key in setting else '·' for key in keys)}".strip()
        for name, keys in groups.items()
        if any(key in setting for key in keys)
    )


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else as_yaml(value)


def _flat(value: dict[str, Any], before: str = "") -> dict[str, Any]:
    """A setting with mappings taken apart: `pave.refine={lambda: 1.2}` as `pave.refine.lambda`."""
    found = {}
    for key, child in value.items():
        found |= _flat(child, f"{before}{key}.") if isinstance(child, dict) and child else {f"{before}{key}": child}
    return found


def _names(keys: Sequence[str], models: Sequence[str]) -> dict[str, str]:
    """For each key a short name. Those of one parameter of several models have the same."""
    of_models = {key: match for key in keys if (match := _OF_MODEL.fullmatch(key))}
    parameters = [match[2] for match in of_models.values()]
    names = {}
    for key in keys:
        if key in of_models:
            number, parameter = int(of_models[key][1]), of_models[key][2]
            model = models[number] if number < len(models) else f"models.{number}"
            names[key] = parameter if parameters.count(parameter) > 1 else f"{parameter} of {model}"
        elif key == "merge_method":
            names[key] = ""  # its value says enough
        elif key.startswith("parameters.") and key.removeprefix("parameters.") in parameters:
            names[key] = key  # of another `lambda` more is told
        else:
            names[key] = _as_set(key)
    return names


def _as_set(key: str) -> str:
    """A key as short as `--set` takes it: see `planning.settable.full_key`."""
    is_of_models = key.startswith("pave.models.")  # and `models` alone are those of the merge
    return key if is_of_models else key.removeprefix("parameters.").removeprefix("pave.")


def _models(config: str | None) -> list[str]:
    """The short names of the config's models; none if it cannot be read."""
    try:
        names = [str(entry["model"]) for entry in yaml.safe_load(config or "")["models"]]
    except (yaml.YAMLError, KeyError, TypeError):  # it has slices, or somebody changed the file
        return []
    short = short_models(names)
    return [short[name] for name in names]
