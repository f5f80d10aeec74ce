"""The command `mergekit-pave`."""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import yaml
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options
from pydantic import ValidationError

from mergekit_pave import cache as caches
from mergekit_pave import versions
from mergekit_pave.calibration import distributed
from mergekit_pave.errors import PaveError
from mergekit_pave.files import readable
from mergekit_pave.hook import host
from mergekit_pave.hook.refusals import tool_of
from mergekit_pave.report.page.picture import require_matplotlib
from mergekit_pave.report.stored import read_report

if not host.missing():  # else `doctor` and `cache` still work, and all others say why they do not
    from mergekit_pave.planning.measured import measure
    from mergekit_pave.planning.preview import as_text, preview
    from mergekit_pave.plugin.phases import fill_caches, plan_merge, sample_removal

_PROBE = """
import sys
import mergekit.merge
from mergekit import config
live = "pave" in config.MergeConfiguration.model_fields
from mergekit_pave.hook import host, refusals
from mergekit_pave.methods import registry
from mergekit_pave.settings import METHODS
if told := host.problem():
    raise SystemExit(told)
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


@click.group()
@click.version_option(package_name="mergekit-pave")
@click.pass_context
def main(context: click.Context) -> None:
    """PAVE for mergekit: purify task vectors before they are merged."""
    if context.invoked_subcommand not in ("doctor", "cache"):
        host.register()


@main.command(cls=PrettyPrintHelp)
@click.argument("config_file", type=click.Path(exists=True, dir_okay=False))
@add_merge_options
def calibrate(config_file: str, merge_options: MergeOptions) -> None:
    """Fill the caches for CONFIG_FILE (a mergekit YAML with a `pave:` block) and merge nothing."""
    merge_options.apply_global_options()
    distributed.start()
    config = distributed.first_alone(lambda: _read_config(config_file))
    plan = fill_caches(config, merge_options)
    done, weights = len(plan.decompositions), plan.decomposed
    if _speaks():
        click.echo(f"{weights} weights ready: {done} decomposed now, {weights - done} were in the cache.")
        if measured := sum(bool(form.measured) for form in plan.closed_forms.values()):
            click.echo(f"Covariances for {measured} tensors that regmean merges are in the cache.")


@main.command(cls=PrettyPrintHelp)
@click.argument("config_file", type=click.Path(exists=True, dir_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Every tensor, for scripts.")
@add_merge_options
def plan(config_file: str, as_json: bool, merge_options: MergeOptions) -> None:
    """Tell what merging CONFIG_FILE would purify, what not and why, and what that would cost.

    No weights are read, but for a few of each model where everything is in the cache, to tell how large the removed part is.
    Adapters (`model+lora`) are merged into their models and written to --lora-merge-cache, unless they are there.
    """
    merge_options.apply_global_options()
    planned = plan_merge(_read_config(config_file), merge_options, compares=False)
    samples = sample_removal(planned, merge_options)
    found = preview(planned, merge_options.device, samples)
    click.echo(json.dumps(found, indent=1) if as_json else as_text(found))


@main.command("report", cls=PrettyPrintHelp)
@click.argument("source", metavar="OUT_OR_CONFIG", type=click.Path(exists=True, path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder for index.html and its pictures. Default: pave_report, in OUT or beside CONFIG.",
)
@add_merge_options
def write_report(source: Path, output: Path | None, merge_options: MergeOptions) -> None:
    """Show what purification did, or would do, as a page with plots (needs mergekit-pave[report]).

    For OUT, the folder of a finished merge, the page is drawn from its pave_report.json alone, anywhere and in seconds:
    ranks, energy, and the removed part beside the change.

    For CONFIG (such as OUT/mergekit_config.yml) the page shows interference between the task vectors before and after, spectra
    and covariances, too. Weights are read as in a merge, but nothing is merged, and nothing is measured anew: the caches must
    be full, after the merge or `mergekit-pave calibrate CONFIG`.
    """
    merge_options.apply_global_options()
    require_matplotlib()
    from mergekit_pave.report.page import render

    folder = output or (source if source.is_dir() else source.parent) / "pave_report"
    render.check(folder)
    if source.is_dir():
        report, measured, config = read_report(str(source)), None, source / "mergekit_config.yml"
    else:
        report, measured = measure(plan_merge(_read_config(str(source)), merge_options), merge_options)
        config = source
    name = (source if source.is_dir() else source.with_suffix("")).resolve().name
    text = config.read_text(encoding="utf-8") if config.is_file() else None
    click.echo(f"written to {render.write(folder, name, report, measured, text)}")


def _read_config(path: str) -> MergeConfiguration:
    if (told := _switched_off()) and _speaks():
        click.echo(f"Warning: {told}", err=True)
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


@main.group()
def cache() -> None:
    """Look after the cache: covariances, subspaces, and which weights equal a base model's."""


_cache_dir = click.option("--cache-dir", help="The cache, where a config sets pave.cache_dir.")
_keys = click.argument("keys", nargs=-1, required=True)


@cache.command("list")
@_cache_dir
def list_cache(cache_dir: str | None) -> None:
    """List what is in the cache, with sizes."""
    entries = caches.entries(caches.cache_root(cache_dir))
    for entry in entries:
        manifests = [manifest for artefact in entry.artefacts if (manifest := artefact.manifest())]
        model = manifests[0]["model"] if manifests else "(incomplete)"
        if entry.kind == "covariance":
            content = "-"
            if manifests:
                known = manifests[0]
                content = f"{len(known['layers'])} layers, {known['tokens']} tokens, {known.get('dtype', 'format 1')}"
        elif entry.kind == "comparison":
            content = f"{sum(map(bool, manifests[0]['equal'].values()))} equal weights" if manifests else "-"
        else:
            content = f"{len(manifests)} weights"
        click.echo(f"{entry.key[:12]}  {entry.kind:10}  {readable(entry.size):>8}  {content:38}  {model}")
    click.echo(f"{readable(sum(entry.size for entry in entries))} in {caches.cache_root(cache_dir)}")


@cache.command()
@_cache_dir
def verify(cache_dir: str | None) -> None:
    """Compare every file with the hash in its manifest. Exits with 1 where one differs."""
    damaged = 0
    for entry in caches.entries(caches.cache_root(cache_dir)):
        for artefact in entry.artefacts:
            if not artefact.is_intact():
                damaged += 1
                state = "incomplete" if artefact.manifest() is None else "DAMAGED"
                click.echo(f"{entry.key[:12]}  {entry.kind:10}  {state}  {artefact.folder}")
    click.echo("Everything is intact." if not damaged else f"{damaged} not intact; the next run that needs them makes them anew.")
    raise SystemExit(1 if damaged else 0)


@cache.command()
@_cache_dir
@_keys
def remove(keys: tuple[str, ...], cache_dir: str | None) -> None:
    """Remove entries, named by the first digits of their KEYS."""
    for entry in [_find(key, cache_dir) for key in keys]:
        size = entry.size
        caches.Artefact(entry.folder).discard()
        click.echo(f"removed {entry.kind} {entry.key[:12]} ({readable(size)})")


@cache.command()
@_cache_dir
@click.argument("key")
@click.argument("folder", type=click.Path(path_type=Path))
def export(key: str, folder: Path, cache_dir: str | None) -> None:
    """Copy the covariances under KEY to FOLDER, ready to be published and named as `covariance:` in a config."""
    entry = _find(key, cache_dir)
    if entry.kind != "covariance":
        raise PaveError(f"{entry.key[:12]} is a {entry.kind}, which belongs to one machine; export covariances")
    caches.copy(entry.folder, folder)
    click.echo(f"exported to {folder}")


@cache.command("import")
@_cache_dir
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
def import_folder(folder: Path, cache_dir: str | None) -> None:
    """Copy exported covariances from FOLDER into the cache, where a model from the Hub finds them for the same data.

    It has to run in the precision that they were measured in, which on a CPU is float32 and on a GPU the model's own.
    For a local model, whose files have times of their own here, name FOLDER as `covariance:` in the config instead.
    """
    manifest = caches.Artefact(folder).manifest()
    if manifest is None or not re.fullmatch("[0-9a-f]{32}", str(manifest.get("key"))):
        raise PaveError(f"{folder} has no exported covariances")
    target = caches.cache_root(cache_dir) / "covariance" / manifest["key"]
    if caches.Artefact(target).is_intact():
        click.echo(f"{manifest['key'][:12]}, covariances of {manifest['model']}, is in the cache already")
        return
    caches.copy(folder, target)
    measured = f", measured in {manifest['dtype']}" if "dtype" in manifest else ""
    click.echo(f"imported as {manifest['key'][:12]}, covariances of {manifest['model']}{measured}")


def _speaks() -> bool:
    """Of several processes one does."""
    return os.environ.get("RANK", "0") == "0"


def _switched_off() -> str | None:
    """What to say where PyTorch has been told to load no plugins, and so not this one either: by anything but a 1."""
    value = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1")
    if value == "1":
        return None
    return f"TORCH_DEVICE_BACKEND_AUTOLOAD={value} is set; unset it, or mergekit ignores every `pave:` block."


def _find(key: str, cache_dir: str | None) -> caches.Entry:
    root = caches.cache_root(cache_dir)
    found = [entry for entry in caches.entries(root) if key and entry.key.startswith(key)]
    if len(found) != 1:
        count = "more than one entry" if found else "no entry"
        raise PaveError(f"{count} in {root} begins with {key!r}; see `cache list`, and --cache-dir for a cache elsewhere")
    return found[0]


@main.command()
def doctor() -> None:
    """Say whether mergekit will honour a `pave:` block and knows our merge methods here, with which versions and caches.

    Where something of mergekit's inside is missing that this package needs, or a merge method comes from elsewhere, it names it.
    """
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    click.get_current_context().call_on_close(lambda: logging.disable(before))
    for package, version in versions.installed().items():
        click.echo(f"{package:14} {version}")
    root = caches.cache_root(None)
    click.echo(f"{'cache':14} {root} ({readable(sum(entry.size for entry in caches.entries(root)))})")
    # Only a fresh interpreter shows what `mergekit-yaml` will do: this one has registered the plugin itself.
    live = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True)
    click.echo(f"{'pave: blocks':14} {'honoured' if live.returncode in (0, 4) else 'NOT HONOURED'}")
    click.echo(f"{'methods':14} {live.stdout.strip() if live.returncode == 0 else 'NOT USABLE'}")
    if live.returncode == 0:
        for line in live.stderr.splitlines():
            if line.endswith("would ignore a `pave:` block"):
                click.echo(line, err=True)
        return
    if told := _switched_off():
        click.echo(told, err=True)
    elif live.returncode == 3:
        click.echo("PyTorch did not load the plugin; it needs torch >= 2.5 and mergekit-pave installed beside it.", err=True)
    else:
        click.echo(live.stderr.strip().splitlines()[-1], err=True)
    raise SystemExit(1)
