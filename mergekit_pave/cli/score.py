"""`mergekit-pave score`: how much of each expert a merge keeps."""

from __future__ import annotations

import json
from pathlib import Path

import click
import yaml
from mergekit.common import ModelReference
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from mergekit_pave.cli.config import read_config
from mergekit_pave.errors import PaveError
from mergekit_pave.hook import host
from mergekit_pave.report.outputs import CARD, SCORES_NAME
from mergekit_pave.report.score_card import add_to_card, check_card
from mergekit_pave.report.scores import as_text
from mergekit_pave.report.stored import write_scores

if not host.missing():
    from mergekit_pave.planning.variants import make_variants
    from mergekit_pave.plugin.inputs import check_merged
    from mergekit_pave.plugin.scoring import plan_scoring
    from mergekit_pave.plugin.tune import Tuner

rows_option = click.option(
    "--rows", type=click.IntRange(min=2), default=32, show_default=True, help="Held-out rows of each model."
)
base_option = click.option("--base", metavar="MODEL", help="The model that counts as 0 %. Default: the config's base_model.")
json_option = click.option("--json", "as_json", is_flag=True, help="Everything, with the distances of each row, for scripts.")


@click.command(cls=PrettyPrintHelp)
@click.argument("config_file", type=click.Path(exists=True, dir_okay=False))
@click.argument("merged", nargs=-1, type=click.Path(exists=True, file_okay=False, path_type=Path))
@rows_option
@base_option
@click.option("--card", is_flag=True, help="Add the scores to the model card of each of MERGED.")
@json_option
@add_merge_options
def score(
    config_file: str,
    merged: tuple[Path, ...],
    rows: int,
    base: str | None,
    card: bool,
    as_json: bool,
    merge_options: MergeOptions,
) -> None:
    """Show how much of each model of CONFIG_FILE the MERGED models keep: 0 % is the base model, 100 % the model itself.

    No labels are needed: it compares what the models predict, on rows of their data that calibration has not seen. The scores are
    also written to pave_scores.json in each of MERGED, from which `mergekit-pave report` shows them. Without MERGED the merge is
    made in the cache, scored, and removed.
    """
    merge_options.apply_global_options()
    if card and not merged:
        raise PaveError("--card adds to the model cards of finished merges; name their folders")
    for folder in merged:
        check_merged(ModelReference.parse(str(folder)), merge_options.trust_remote_code)
        if card:
            check_card(str(folder))
    config = read_config(config_file)
    scorer = plan_scoring(config, merge_options, rows, base)
    if not merged:
        (as_it_is,) = make_variants(yaml.safe_load(Path(config_file).read_text(encoding="utf-8")), [])
        tuner = Tuner(config, merge_options, scorer, lambda line: None)
        tuner.check(as_it_is)
        ((_, of_config),) = tuner.score([as_it_is])
        scores = {config_file: of_config}
        click.echo(json.dumps(scores, indent=1) if as_json else as_text(scores))
        return
    opened = {str(folder): scorer.open(folder) for folder in merged}
    scores = {folder: scorer.scoring.score(model) for folder, model in opened.items()}
    click.echo(json.dumps(scores, indent=1) if as_json else as_text(scores))
    for folder, of_merge in scores.items():
        write_scores(folder, of_merge)
        if card:
            add_to_card(folder, of_merge)
        written = f"{SCORES_NAME}{f' and {CARD}' if card else ''}"
        click.echo(f"written to {written} in {folder}; as a page: mergekit-pave report {folder}", err=True)
