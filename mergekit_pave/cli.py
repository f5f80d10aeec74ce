"""The command `mergekit-pave`."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import click
import yaml
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from mergekit_pave import plugin, versions
from mergekit_pave.cache import cache_root

_PROBE = (
    "import mergekit.merge; from mergekit.config import MergeConfiguration as C;"
    "raise SystemExit(0 if 'pave' in C.model_fields else 3)"
)


@click.group()
def main() -> None:
    """PAVE for mergekit: purify task vectors before they are merged."""
    plugin.register()


@main.command(cls=PrettyPrintHelp)
@click.argument("config_file", type=click.Path(exists=True, dir_okay=False))
@add_merge_options
def calibrate(config_file: str, merge_options: MergeOptions) -> None:
    """Fill the caches for CONFIG_FILE (a mergekit YAML with a `pave:` block) and merge nothing."""
    merge_options.apply_global_options()
    config = MergeConfiguration.model_validate(yaml.safe_load(Path(config_file).read_text(encoding="utf-8")))
    plan = plugin.fill_caches(config, merge_options)
    done = len(plan.decompositions)
    click.echo(f"{len(plan.stats)} weights ready: {done} decomposed now, {len(plan.stats) - done} were in the cache.")


@main.command()
def doctor() -> None:
    """Say whether mergekit will honour a `pave:` block here, with which versions and caches."""
    logging.disable(logging.INFO)
    for package, version in versions.installed().items():
        click.echo(f"{package:14} {version}")
    root = cache_root(None)
    size = sum(file.stat().st_size for file in root.rglob("*") if file.is_file())
    click.echo(f"{'cache':14} {root} ({size / 1e6:.1f} MB)")
    # Only a fresh interpreter shows what `mergekit-yaml` will do: this one has registered the plugin itself.
    live = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True)
    click.echo(f"{'hook':14} {'live' if live.returncode == 0 else 'NOT LIVE'}")
    if live.returncode == 0:
        return
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "0":
        click.echo("TORCH_DEVICE_BACKEND_AUTOLOAD=0 is set; unset it, or mergekit ignores every `pave:` block.", err=True)
    elif live.returncode == 3:
        click.echo("PyTorch did not load the plugin; it needs torch >= 2.5 and mergekit-pave installed beside it.", err=True)
    else:
        click.echo(live.stderr.strip().splitlines()[-1], err=True)
    raise SystemExit(1)
