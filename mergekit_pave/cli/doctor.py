"""`mergekit-pave doctor`: does mergekit honour `pave:` blocks here?"""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import click

from mergekit_pave import versions

_PROBE = """
import sys
import mergekit.merge
from mergekit import config
live = "pave" in config.MergeConfiguration.model_fields
from mergekit_pave.hook import host, refusals
from mergekit_pave.methods import registry
from mergekit_pave.names import METHODS
if problem := host.problem():
    raise SystemExit(problem)
if not live:
    raise SystemExit(3)
host.register()
from mergekit import merge_methods
for tool in refusals.unguarded():
    print(f"{tool} would ignore a `pave:` block", file=sys.stderr)
print(", ".join(f"{name} (that of {registry.others[name]})" if name in registry.others else name for name in METHODS))
for name in METHODS:
    try:
        merge_methods.get(name)
    except Exception as error:
        print(f"`merge_method: {name}` cannot be used ({registry.problem or error}); install mergekit-pave anew", file=sys.stderr)
        raise SystemExit(4)
"""


@click.command()
def doctor() -> None:
    """Say whether mergekit honours a `pave:` block here and knows our merge methods, and show versions and the cache.

    It also names what is missing in mergekit, and merge methods of the same names that come from elsewhere.
    """
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    click.get_current_context().call_on_close(lambda: logging.disable(before))
    for package, version in versions.installed().items():
        click.echo(f"{package:14} {version}")
    # Only a fresh interpreter shows what `mergekit-yaml` will do, because this one has registered the plugin itself. It takes
    # seconds, in which the cache is looked at.
    probe = subprocess.Popen([sys.executable, "-c", _PROBE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    click.echo(f"{'cache':14} {_cache()}")
    out, err = probe.communicate()
    click.echo(f"{'pave: blocks':14} {'honoured' if probe.returncode in (0, 4) else 'NOT HONOURED'}")
    click.echo(f"{'methods':14} {out.strip() if probe.returncode == 0 else 'NOT USABLE'}")
    if probe.returncode == 0:
        for line in err.splitlines():
            if line.endswith("would ignore a `pave:` block"):
                click.echo(line, err=True)
        return
    if message := switched_off():
        click.echo(message, err=True)
    elif probe.returncode == 3:
        click.echo("PyTorch did not load the plugin; it needs torch >= 2.5 and mergekit-pave installed beside it.", err=True)
    else:
        click.echo(err.strip().splitlines()[-1], err=True)
    raise SystemExit(1)


def _cache() -> str:
    """Where it is, and its size."""
    from mergekit_pave import cache  # which imports torch
    from mergekit_pave.files import readable

    root = cache.cache_root(None)
    return f"{root} ({readable(sum(entry.size for entry in cache.entries(root)))})"


def switched_off() -> str | None:
    """A message if PyTorch is set to load no plugins, and so not this one either. Any value but 1 does that."""
    value = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1")
    if value == "1":
        return None
    return f"TORCH_DEVICE_BACKEND_AUTOLOAD={value} is set; unset it, or mergekit ignores every `pave:` block."
