"""`mergekit-pave restore`: one model of a merge by EMR-Merging again."""

from __future__ import annotations

from pathlib import Path

import click
from mergekit.common import parse_kmb
from mergekit.options import OPTION_HELP, MergeOptions, PrettyPrintHelp

from mergekit_pave.hook import host

if not host.missing():
    from mergekit_pave.emr.restore import open_task, write
    from mergekit_pave.emr.weights import Search


@click.command(cls=PrettyPrintHelp)
@click.argument("merged", metavar="OUT")
@click.argument("name")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for the model. Default: ./NAME.")
@click.option("--base", metavar="MODEL", help="The base model, where it is not where the config of the merge says.")
@click.option("--lora-merge-cache", help=OPTION_HELP["lora_merge_cache"])
@click.option("--transformers-cache", help=OPTION_HELP["transformers_cache"])
@click.option(
    "--out-shard-size",
    type=parse_kmb,
    metavar="SIZE",
    default=MergeOptions.model_fields["out_shard_size"].default,
    help=OPTION_HELP["out_shard_size"],
)
@click.option("--trust-remote-code/--no-trust-remote-code", help=OPTION_HELP["trust_remote_code"])
@click.option("--quiet/--no-quiet", help=OPTION_HELP["quiet"])
def restore(
    merged: str,
    name: str,
    output: Path | None,
    base: str | None,
    lora_merge_cache: str | None,
    transformers_cache: str | None,
    out_shard_size: int,
    trust_remote_code: bool,
    quiet: bool,
) -> None:
    """Write the model NAME of OUT, a merge by `merge_method: emr`, as an ordinary checkpoint.

    OUT is a folder, or a repository on the Hub: of the tasks' files there only the one of NAME is fetched.
    NAME is that of a file OUT/emr/NAME.safetensors, or the model as the config of the merge names it. The base model of the merge
    is needed, too, with the same weights.
    """
    restored = open_task(merged, name, Search(base, transformers_cache, lora_merge_cache, trust_remote_code))
    folder = output or Path(restored.task.name)
    write(restored, folder, out_shard_size, quiet)
    click.echo(f"written to {folder}")
