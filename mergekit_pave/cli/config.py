"""The config file that a command is given."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

import click
import yaml
from mergekit.config import MergeConfiguration
from pydantic import ValidationError

from mergekit_pave.cli.doctor import switched_off
from mergekit_pave.errors import PaveError
from mergekit_pave.hook.refusals import tool_of


def read_config(path: str) -> MergeConfiguration:
    if (warning := switched_off()) and is_first_process():
        click.echo(f"Warning: {warning}", err=True)
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise PaveError(f"{path} is not a mergekit config: it holds no mapping")
        if tool := tool_of(content):
            raise PaveError(
                f"{path} is a config for {tool.command}, which does not honour a `pave:` block; this takes one for "
                f"mergekit-yaml. To purify, {tool.advice}"
            )
        keys = {str(key).lower(): key for key in content}
        if "pave" not in content and (close := difflib.get_close_matches("pave", keys, n=1)):
            raise PaveError(f"{path}: unknown key {keys[close[0]]!r}; did you mean 'pave'?")
        return MergeConfiguration.model_validate(content)
    except yaml.composer.ComposerError as error:
        raise PaveError(f"{path} holds several merges, as for mergekit-multi; this takes one, in a file of its own") from error
    except (yaml.YAMLError, ValidationError, UnicodeDecodeError) as error:
        raise PaveError(f"{path} is not a mergekit config: {error}") from error


def is_first_process() -> bool:
    """Whether this process is the one of several that writes to the terminal."""
    return os.environ.get("RANK", "0") == "0"
