"""What to type once a merge is done."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions


def following(config: MergeConfiguration, out_path: str, options: MergeOptions) -> str:
    """The command that scores a merge, or draws its report if its models have no data to score it with."""
    scored = [entry for entry in config.pave.models if entry.model != config.base_model]
    if not scored or not all(entry.data for entry in scored):
        return shlex.join(["mergekit-pave", "report", out_path])
    more = [] if config.base_model else ["--base", "MODEL"]
    if options.lora_merge_cache:
        more += ["--lora-merge-cache", options.lora_merge_cache]
    if options.trust_remote_code:
        more += ["--trust-remote-code"]
    return shlex.join(["mergekit-pave", "score", _config_file(out_path, options), out_path, *more])


def _config_file(out_path: str, options: MergeOptions) -> str:
    """The config that `mergekit-yaml` was given; else the copy beside the merge, if mergekit will write one."""
    context = click.get_current_context(silent=True)
    script = sys.modules.get("mergekit.scripts.run_yaml")
    if context and script and context.command is getattr(script, "main", None):
        return context.params["config_file"]
    return str(Path(out_path, "mergekit_config.yml")) if options.write_model_card else "CONFIG"
