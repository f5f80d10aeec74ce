"""`mergekit-pave cache`: list, check, remove, export and import what is in the cache."""

from __future__ import annotations

import re
import shlex
import time
from pathlib import Path
from typing import Any

import click

from mergekit_pave import cache as caches
from mergekit_pave.calibration.run import has_covariances
from mergekit_pave.errors import PaveError
from mergekit_pave.files import readable


@click.group()
def cache() -> None:
    """Look after the cache: covariances, subspaces, which weights equal a base model's, predictions, scores, texts, samples."""


_cache_dir = click.option("--cache-dir", help="The cache, where a config sets pave.cache_dir.")
_INCOMPLETE = "(incomplete)"
_keys = click.argument("keys", nargs=-1, required=True)


@cache.command("list")
@_cache_dir
def list_cache(cache_dir: str | None) -> None:
    """List what is in the cache, with sizes and dates."""
    root = caches.cache_root(cache_dir)
    entries = caches.entries(root)
    incomplete = []
    if entries:
        click.echo(_line("key", "kind", "size", "date", "content", "model"))
    for entry in entries:
        manifests = [manifest for artefact in entry.artefacts if (manifest := artefact.manifest())]
        if not manifests:
            incomplete.append(entry)
        model = manifests[0]["model"] if manifests else _INCOMPLETE
        date = time.strftime("%Y-%m-%d", time.localtime(entry.changed))
        click.echo(_line(entry.key, entry.kind, readable(entry.size), date, _content(entry.kind, manifests), model))
    click.echo(f"{readable(sum(entry.size for entry in entries))} in {root}")
    if incomplete:
        place = ["--cache-dir", cache_dir] if cache_dir else []
        command = shlex.join(["mergekit-pave", "cache", "remove", *(entry.key[:12] for entry in incomplete), *place])
        click.echo(
            f"{_INCOMPLETE}: a run is making it, or was stopped on the way. The next run that needs it makes it anew. "
            f"If none is at work, this removes it: {command}"
        )


def _line(key: str, kind: str, size: str, date: str, content: str, model: str) -> str:
    return f"{key[:12]:12}  {kind:11}  {size:>8}  {date:10}  {content:38}  {model}"


def _content(kind: str, manifests: list[dict[str, Any]]) -> str:
    if kind == "subspace":
        return f"{len(manifests)} weights"
    if not manifests:
        return "-"
    if kind == "generated":
        rows, tokens = (sum(manifest[name] for manifest in manifests) for name in ("rows", "tokens"))
        return f"{rows} texts, {tokens} tokens"
    (manifest,) = manifests
    if kind == "samples":
        return f"{len(manifest['origins'])} samples, {manifest['tokens']} tokens"
    if kind == "comparison":
        return f"{sum(map(bool, manifest['equal'].values()))} equal weights"
    if "places" in manifest:
        return f"{manifest['rows']} rows, {manifest['places']} places, {manifest['dtype']}"
    kept = "" if all(layer["file"] for layer in manifest["layers"].values()) else ", not kept"
    return f"{len(manifest['layers'])} layers, {manifest['tokens']} tokens, {manifest.get('dtype', 'format 1')}{kept}"


@cache.command()
@_cache_dir
def verify(cache_dir: str | None) -> None:
    """Compare every file with the hash in its manifest, and say how many entries were checked. Exits with 1 if one differs."""
    num_damaged = 0
    entries = caches.entries(caches.cache_root(cache_dir))
    for entry in entries:
        for artefact in entry.artefacts:
            if not artefact.is_intact():
                num_damaged += 1
                state = "incomplete" if artefact.manifest() is None else "DAMAGED"
                click.echo(f"{entry.key[:12]}  {entry.kind:11}  {state}  {artefact.folder}")
    checked = f"{len(entries)} entries checked ({readable(sum(entry.size for entry in entries))})"
    if num_damaged:
        click.echo(f"{checked}: {num_damaged} artefacts are not intact; the next run that needs them makes them again.")
        raise SystemExit(1)
    click.echo(f"{checked}: all are intact.")


@cache.command()
@_cache_dir
@_keys
def remove(keys: tuple[str, ...], cache_dir: str | None) -> None:
    """Remove entries, named by the first digits of their KEYS."""
    for entry in [_find(key, cache_dir) for key in keys]:
        num_bytes = entry.size
        caches.Artefact(entry.folder).discard()
        click.echo(f"removed {entry.kind} {entry.key[:12]} ({readable(num_bytes)})")


@cache.command()
@_cache_dir
@click.argument("key")
@click.argument("folder", type=click.Path(path_type=Path))
def export(key: str, folder: Path, cache_dir: str | None) -> None:
    """Copy the covariances under KEY to FOLDER, ready to be published and named as `covariance:` in a config."""
    entry = _find(key, cache_dir)
    if entry.kind != "covariance":
        raise PaveError(f"{entry.key[:12]} is of the kind {entry.kind}, which belongs to one machine; export covariances")
    manifest = caches.Artefact(entry.folder).validate()
    if not all(layer["file"] for layer in manifest["layers"].values()):
        raise PaveError(
            f"{entry.key[:12]}: the covariances were not kept when the model was measured, as the merge did not need them; set "
            "pave.keep_covariances: true in its config, run `mergekit-pave calibrate` with it, and export then"
        )
    caches.copy(entry.folder, folder)
    click.echo(f"exported to {folder}")


@cache.command("import")
@_cache_dir
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
def import_folder(folder: Path, cache_dir: str | None) -> None:
    """Copy exported covariances from FOLDER into the cache, where the same model from the Hub with the same data finds them.

    The model has to run in the precision that they were measured in: float32 on a CPU, its own on a GPU. For a local model, name
    FOLDER as `covariance:` in the config instead: the cache knows local models by the times of their files, which differ here.
    """
    manifest = caches.Artefact(folder).manifest()
    if manifest is None or not re.fullmatch("[0-9a-f]{32}", str(manifest.get("key"))):
        raise PaveError(f"{folder} has no exported covariances")
    number, ours = manifest.get("format", 1), caches.FORMATS["covariance"]
    if number != ours:
        older = "measure them again with `mergekit-pave calibrate`, from a config that has the model's data"
        raise PaveError(
            f"{folder} has covariances in format {number}, and this mergekit-pave only uses format {ours}; "
            + (older if number in range(ours) else "pip install --upgrade mergekit-pave")
        )
    target = caches.cache_root(cache_dir) / "covariance" / manifest["key"]
    there = caches.Artefact(target)
    if there.is_intact() and has_covariances(there, kept=True):
        click.echo(f"{manifest['key'][:12]}, covariances of {manifest['model']}, is in the cache already")
        return
    caches.Artefact(folder).validate()
    with there.lock():
        there.discard()  # it was measured here, but its covariances were not kept
        caches.copy(folder, target)
    click.echo(f"imported as {manifest['key'][:12]}, covariances of {manifest['model']}, measured in {manifest['dtype']}")


def _find(key: str, cache_dir: str | None) -> caches.Entry:
    root = caches.cache_root(cache_dir)
    entries = [entry for entry in caches.entries(root) if key and entry.key.startswith(key)]
    if len(entries) != 1:
        count = "more than one entry" if entries else "no entry"
        raise PaveError(f"{count} in {root} begins with {key!r}; see `cache list`, and --cache-dir for a cache elsewhere")
    return entries[0]
