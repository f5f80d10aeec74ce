"""The config file that a command is given."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

import click
import yaml
from mergekit.config import MergeConfiguration
from pydantic import ValidationError

from mergekit_pave.cli.doctor import switched_off
from mergekit_pave.errors import PaveError
from mergekit_pave.hook.refusals import tool_of
from mergekit_pave.settings import wrong_keys


def read_config(path: str) -> MergeConfiguration:
    if (warning := switched_off()) and is_first_process():
        click.echo(f"Warning: {warning}", err=True)
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _EachKeyOnce)
    except yaml.composer.ComposerError as error:
        if "single document" in str(error):
            raise PaveError(
                f"{path} holds several merges, as for mergekit-multi; this takes one, in a file of its own"
            ) from error
        raise PaveError(_not_yaml(path, error)) from error
    except yaml.MarkedYAMLError as error:
        raise PaveError(_not_yaml(path, error)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PaveError(f"{path} is not a text in UTF-8: {error}; save it as one") from error
    if not isinstance(content, dict):
        what = "it is empty" if content is None else f"it holds a {type(content).__name__}, no mapping"
        raise PaveError(f"{path} is not a mergekit config: {what}. Begin it with `merge_method: ...` and `models:`")
    if tool := tool_of(content):
        raise PaveError(
            f"{path} is a config for {tool.command}, which does not honour a `pave:` block; this takes one for "
            f"mergekit-yaml. To purify, {tool.advice}"
        )
    _check_names(path, content)
    try:
        return MergeConfiguration.model_validate(content)
    except ValidationError as error:
        raise PaveError(f"{path} is not a mergekit config:\n" + "\n".join(wrong_keys(content, error, root=""))) from None
    except RuntimeError as error:  # of mergekit's own checks
        raise PaveError(f"{path} is not a mergekit config: {error}") from error


class _EachKeyOnce(yaml.SafeLoader):
    """YAML whose mappings have each key once. Of several PyYAML takes the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) and key.value != "<<" else None
            if name in seen:
                raise yaml.constructor.ConstructorError(problem=f"the key {name!r} is there twice", problem_mark=key.start_mark)
            seen |= {name} - {None}
        return super().construct_mapping(node, deep)


def _not_yaml(path: str, error: yaml.MarkedYAMLError) -> str:
    """Where a file is no YAML, and why."""
    mark, problem = error.problem_mark or error.context_mark, error.problem or error.context
    if "'\\t'" in problem:
        problem = "there is a tab, and YAML is indented with spaces alone"
    elif "twice" not in problem:
        problem += ". Entries of one list or mapping begin in the same column, and a key is followed by a colon and a space"
    return f"{path}, line {mark.line + 1}, column {mark.column + 1}: {problem}"


def _check_names(path: str, content: dict[str, Any]) -> None:
    """Refuse a misspelt `pave`, which mergekit would ignore, and warn of other keys that it ignores.

    Raises:
        PaveError: naming the key.
    """
    known = MergeConfiguration.model_fields
    for key in content.keys() - known.keys():
        if close := difflib.get_close_matches(str(key).lower(), known.keys() - content.keys(), n=1):
            told = f"{path}: unknown key {key!r}; did you mean {close[0]!r}?"
            if close[0] == "pave":
                raise PaveError(told)
            if is_first_process():
                click.echo(f"Warning: {told} mergekit ignores it", err=True)


def is_first_process() -> bool:
    """Whether this process is the one of several that writes to the terminal."""
    return os.environ.get("RANK", "0") == "0"
