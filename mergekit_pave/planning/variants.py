"""Variants of a config: every combination of the values that some of its keys may have.

A key is written with dots, as `models.0.parameters.weight`; entries of a list have numbers. The first variant is the config as it
is, and none means the same as another: a parameter with its default value is the same as none.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import registered_methods
from mergekit.merge_methods.base import MergeMethodSpec
from pydantic import ValidationError

from mergekit_pave.errors import PaveError, unknown
from mergekit_pave.planning.settable import check_key, full_key, own_parameters, parameter_in, parts_of
from mergekit_pave.report.tuned import shown
from mergekit_pave.settings import wrong_keys

_RANDOM = {"dare_linear", "dare_ties", "della", "della_linear", "arcee_fusion"}


class Choice(NamedTuple):
    """A key, and the values to try."""

    key: str
    values: list[Any]


@dataclass(frozen=True)
class Variant:
    """One config to try.

    Attributes:
        changes: what it sets, by key; nothing in the config as it is.
        content: what its YAML holds.
        taken_out: parameters of the config that its merge method does not have.
        config: the same, as mergekit reads it.
        meaning: the merge and the block, with defaults. It is the same where the difference is only whether a default is written.
    """

    changes: dict[str, Any]
    content: dict[str, Any]
    taken_out: list[str]
    config: MergeConfiguration
    meaning: tuple[dict[str, Any], dict[str, Any]]

    @property
    def name(self) -> str:
        return shown(self.changes)

    @property
    def is_random(self) -> bool:
        """Whether its merge method draws at random."""
        return self.config.merge_method in _RANDOM


def parse_choice(text: str) -> Choice:
    """Read `KEY=V1,V2`, where values are YAML and split at commas outside of brackets and quotes.

    Raises:
        PaveError: it is not of this form.
    """
    key, equals, values = text.partition("=")
    if not equals or not all(key.split(".")):
        raise PaveError(f"--set {text}: write KEY=VALUE,VALUE, such as parameters.lambda=0.6,0.8,1")
    try:
        parsed = yaml.safe_load(f"[{values}]")
    except yaml.YAMLError as error:
        raise PaveError(
            f"--set {text}: {values!r} is not a list of YAML values; put texts with special signs in quotes"
        ) from error
    if not isinstance(parsed, list) or not parsed:
        raise PaveError(f"--set {text}: there is no value after the equals sign")
    return Choice(key, parsed)


def in_full(choices: Iterable[Choice], content: dict[str, Any]) -> list[Choice]:
    """Choices, with keys that may lack the `parameters.` or `pave.` before them.

    Args:
        content: what the user's YAML holds.

    Raises:
        PaveError: it is not clear which key is meant.
    """
    choices = list(choices)
    methods = [content.get("merge_method"), *(v for choice in choices if choice.key == "merge_method" for v in choice.values)]
    known = {name for method in methods for name in _parameters_of(method)}
    return [choice._replace(key=full_key(choice.key, known)) for choice in choices]


def combinations(choices: Iterable[Choice]) -> list[dict[str, Any]]:
    """Every combination of the choices' values, the last choice changing fastest.

    Raises:
        PaveError: a key is chosen twice.
    """
    choices = list(choices)
    keys = [choice.key for choice in choices]
    for key in keys:
        if keys.count(key) > 1:
            raise PaveError(f"--set {key} is given twice; give all values at once: {key}=V1,V2")
    return [dict(zip(keys, values)) for values in itertools.product(*(choice.values for choice in choices))]


def make_variants(content: dict[str, Any], combinations: Iterable[dict[str, Any]]) -> list[Variant]:
    """The config as it is, and with each combination of changes.

    What has no meaning in one combination is left out of it: a parameter that its merge method does not have, and what stands
    under a key that it sets to false. Where a combination has another merge method than the config, parameters of the config
    that only the old method has are taken away.

    Args:
        content: what the user's YAML holds.

    Raises:
        PaveError: a key that nobody would read, a value that does not fit, or something else in the place of a key.
    """
    combinations = list(combinations)
    methods = {changes.get("merge_method", content.get("merge_method")) for changes in combinations}
    known = {name for method in methods for name in _parameters_of(method)}
    chosen = [choice for changes in combinations for choice in changes.items()]
    for key in dict.fromkeys(part for choice in chosen for part in parts_of(*choice)):
        check_key(key, content, known)
    variants, seen = [], []
    for changes in ({}, *combinations):
        changed, changes, taken_out = _changed(content, changes)
        config = _validated(changed, changes)
        meaning = _meaning(config)
        if meaning not in seen:
            seen.append(meaning)
            variants.append(Variant(changes, changed, taken_out, config, meaning))
    return variants


def default_combinations(config: MergeConfiguration, content: dict[str, Any]) -> list[dict[str, Any]]:
    """What is tried if nobody says what.

    λ of the merge method, if it has one that is a plain number, at 0.6, 0.8, 1 and 1.2 times its value; each of them without
    purification and at the default rank ratio, if the block purifies; all without refining. Then refining with three of its own
    λ, if there is a base model and data for each model. The method's λ hardly matters to it, so the two are not crossed. What
    each model has of its own is left as it is.

    Args:
        content: what the YAML of the config holds.
    """
    spec = _spec(config.merge_method)
    default = next((parameter.default for parameter in spec.parameters if parameter.name == "lambda"), None)
    present = (config.parameters or {}).get("lambda", default)
    choices = []
    is_number = isinstance(present, (int, float)) and not isinstance(present, bool)
    if is_number and config.base_model and not own_parameters(content, "lambda"):
        choices.append(Choice("parameters.lambda", [_rounded(factor * present) for factor in (0.6, 0.8, 1, 1.2)]))
    if any(config.pave.entry(entry.model) and entry.rank_ratio is None for entry in config.pave.models):
        choices.append(Choice("pave.rank_ratio", [1, 0.984]))
    plain = combinations(choices)
    if config.pave.refine:
        plain = [changes | {"pave.refine": False} for changes in plain]
    has_data = all(entry.data for entry in config.pave.models if entry.model != config.base_model)
    if not config.base_model or not has_data:
        return plain
    given = content["pave"].get("refine")
    settings = given if isinstance(given, dict) else {}
    return plain + [{"pave.refine": settings | {"lambda": factor}} for factor in (1, 1.2, 1.4)]


def _rounded(number: float) -> float:
    """As a person would write it."""
    rounded = float(f"{number:.4g}")
    return int(rounded) if rounded.is_integer() else rounded


def _spec(method: str) -> MergeMethodSpec:
    """
    Raises:
        PaveError: mergekit has no such method.
    """
    specs = {each.spec.name: each.spec for each in registered_methods()}
    if method not in specs:
        raise PaveError(unknown("merge_method", method, specs))
    return specs[method]


def _parameters_of(method: str) -> list[str]:
    return [parameter.name for parameter in _spec(method).parameters]


def _changed(content: dict[str, Any], changes: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """The content with the changes, those of the changes that have a meaning, and the names of parameters that are taken out."""
    changed = _apart(content)
    method = changes.get("merge_method", content["merge_method"])
    taken_out: list[str] = []
    if method != content["merge_method"]:
        others = set(_parameters_of(content["merge_method"])) - set(_parameters_of(method))
        taken_out += dict.fromkeys(_take_parameters(changed, others))
    known = _parameters_of(method)
    off = tuple(f"{key}." for key, value in changes.items() if value is False or value is None)
    changes = {
        key: value
        for key, value in changes.items()
        if not key.startswith(off) and ((name := parameter_in(key)) is None or name in known)
    }
    for key in sorted(changes, key=lambda key: key.count(".")):  # the whole before its parts
        _set(changed, key, changes[key])
    return changed, changes, taken_out


def _apart(value: Any) -> Any:
    """A copy in which no part stands for several, as aliases of YAML do."""
    if isinstance(value, dict):
        return {key: _apart(child) for key, child in value.items()}
    return [_apart(child) for child in value] if isinstance(value, list) else value


def _take_parameters(value: Any, names: set[str]) -> list[str]:
    """Remove parameters, wherever they are, and return their names. The block has none of its own."""
    found = []
    for key, child in list(value.items()) if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if key == "parameters" and isinstance(child, dict):
            found += (taken := sorted(names & child.keys()))
            for name in taken:
                del child[name]
            if not child:
                del value[key]
        elif key != "pave":
            found += _take_parameters(child, names)
    return found


def _set(content: dict[str, Any], key: str, value: Any) -> None:
    parts = key.split(".")
    at: Any = content
    for depth, part in enumerate(parts):
        place = ".".join(parts[:depth]) or "the config"
        if isinstance(at, list):
            if not part.isdecimal() or int(part) >= len(at):
                raise PaveError(f"--set {key}: {place} is a list; its entries have the numbers 0 to {len(at) - 1}")
            part = int(part)
        elif not isinstance(at, dict):
            raise PaveError(f"--set {key}: {place} is {at!r} in the config, which has no keys")
        if depth + 1 == len(parts):
            at[part] = _apart(value)
            return
        child = at[part] if isinstance(at, list) else at.get(part)
        if child is None or (child is True and parts[: depth + 1] == ["pave", "refine"]):
            child = at[part] = {}
        at = child


def _validated(content: dict[str, Any], changes: dict[str, Any]) -> MergeConfiguration:
    place = f"{shown(changes)}: " if changes else ""
    try:
        _spec(content["merge_method"])
        return MergeConfiguration.model_validate(content)
    except PaveError as error:
        raise PaveError(f"{place}{error}") from error
    except ValidationError as error:
        raise PaveError(f"{place}{'; '.join(wrong_keys(content, error, root=''))}") from error
    except RuntimeError as error:  # of mergekit's own checks
        raise PaveError(f"{place}not a mergekit config: {error}") from error


def _meaning(config: MergeConfiguration) -> tuple[dict[str, Any], dict[str, Any]]:
    merge = config.model_dump(mode="json", exclude={"pave"})
    defaults = {p.name: p.default for p in _spec(config.merge_method).parameters if not p.required}
    merge["parameters"] = defaults | (merge["parameters"] or {})
    block = config.pave.model_copy(update={"refine": config.pave.refinement or False}) if config.pave else None
    return merge, block.model_dump(mode="json", exclude={"cache_dir", "keep_covariances"}) if block else {}
