"""`mergekit-pave tune`: which setting keeps most."""

from __future__ import annotations

import json
from pathlib import Path

import click
import yaml
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from mergekit_pave.cli.config import read_config
from mergekit_pave.cli.score import base_option, rows_option
from mergekit_pave.errors import PaveError
from mergekit_pave.hook import host
from mergekit_pave.report.page.labels import label_settings
from mergekit_pave.report.page.picture import require_matplotlib
from mergekit_pave.report.rewritten import rewrite
from mergekit_pave.report.tuned import as_text, tuned

if not host.missing():
    from mergekit_pave.planning.variants import Variant, combinations, default_combinations, make_variants, parse_choice
    from mergekit_pave.planning.weights import weights_of
    from mergekit_pave.plugin.scoring import plan_scoring
    from mergekit_pave.plugin.tune import Tuner, tune_weights


@click.command(cls=PrettyPrintHelp)
@click.argument("config_file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--set",
    "choices",
    metavar="KEY=V1,V2",
    multiple=True,
    help="A key with dots, as in parameters.lambda or models.0.parameters.weight, and the values to try, as YAML. Repeat it for "
    "other keys: every combination is tried. Default: see above.",
)
@click.option("--by", type=click.Choice(["mean", "worst"]), default="mean", show_default=True, help="What counts as best.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="A new file for the best config. The comments in CONFIG_FILE stay."
)
@click.option(
    "--weights",
    is_flag=True,
    help="Go on from the best setting: try each model's own weight larger and smaller, by 1.4 and then by 1.2, and keep what is "
    "better. Up to four merges a model.",
)
@click.option(
    "--report",
    "page",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="Write a page with a plot (needs mergekit-pave[report]).",
)
@rows_option
@base_option
@click.option("--json", "as_json", is_flag=True, help="Everything, with the distances of each row, for scripts.")
@add_merge_options
def tune(
    config_file: Path,
    choices: tuple[str, ...],
    by: str,
    output: Path | None,
    weights: bool,
    page: Path | None,
    rows: int,
    base: str | None,
    as_json: bool,
    merge_options: MergeOptions,
) -> None:
    """Merge CONFIG_FILE with every combination of settings, and show how much of each model each of them keeps.

    A merge is made in the cache, scored as by `mergekit-pave score`, and removed. What has been scored is not merged again, so a
    run that was stopped goes on where it was.

    Without --set these are tried: lambda at 0.6, 0.8, 1 and 1.2 times its value, each without purification and at rank_ratio
    0.984, and refining with a lambda of 1, 1.2 and 1.4; as far as merge method and data allow.
    """
    merge_options.apply_global_options()
    _check_output(config_file, output)
    if page:
        require_matplotlib()
        from mergekit_pave.report.page import document
        from mergekit_pave.report.page.tuned import write_tuned

        document.check(page)
    config = read_config(str(config_file))
    text = config_file.read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    chosen = combinations(map(parse_choice, choices))
    scorer = plan_scoring(config, merge_options, rows, base)
    variants = make_variants(content, chosen if choices else default_combinations(config, content))
    tuner = Tuner(config, merge_options, scorer, lambda line: merge_options.quiet or click.echo(line, err=True))
    variants = [variant for variant in variants if _can_be_tried(tuner, variant, is_asked_for=bool(choices))]
    if weights:
        for variant in variants:  # any of them may be the best
            weights_of(variant.config)
    click.echo(f"{len(variants)} settings to try, on {rows} held-out rows of each model", err=True)
    tried = list(zip(variants, tuner.score(variants)))
    if weights:
        tried += tune_weights(tuner, content, tried, by)
    result = tuned([(variant.changes, score) for variant, score in tried], by)
    table = as_text(result, label_settings([variant.changes for variant, _ in tried], text))
    best = tried[result["best"]][0]
    if best.taken_out:
        table += f"\nTaken out of it, as {best.config.merge_method} has no such parameters: {', '.join(best.taken_out)}."
    click.echo(json.dumps(result, indent=1) if as_json else table)
    if output:
        output.write_text(rewrite(text, best.content, table), encoding="utf-8")
        click.echo(f"written to {output}", err=True)
    if page:
        click.echo(f"written to {write_tuned(page, config_file.stem, result, text)}", err=True)


def _check_output(config_file: Path, output: Path | None) -> None:
    """
    Raises:
        PaveError: something is there already, or it cannot be written there.
    """
    if output is None:
        return
    if output.exists():
        what = "the config itself" if output.samefile(config_file) else "there already"
        raise PaveError(f"-o {output} is {what}, and nothing is overwritten; name a new file, or remove that one")
    if not output.parent.is_dir():
        raise PaveError(f"-o {output}: there is no folder {output.parent}; make it first")


def _can_be_tried(tuner: Tuner, variant: Variant, is_asked_for: bool) -> bool:
    """Whether a setting fits. What nobody has asked for is left out if it does not, and the user is told why."""
    try:
        tuner.check(variant)
        return True
    except PaveError as error:
        if is_asked_for or not variant.changes:
            raise
        click.echo(f"left out: {error}", err=True)
        return False
