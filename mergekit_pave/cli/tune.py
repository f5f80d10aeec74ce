"""`mergekit-pave tune`: which setting keeps most."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import yaml
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from mergekit_pave.cli.config import read_config
from mergekit_pave.cli.score import base_option, json_option, rows_option
from mergekit_pave.errors import PaveError
from mergekit_pave.hook import host
from mergekit_pave.report.page.labels import label_settings
from mergekit_pave.report.page.picture import require_matplotlib
from mergekit_pave.report.rewritten import rewrite
from mergekit_pave.report.tuned import as_text, tuned

if not host.missing():
    from mergekit_pave.planning.samples import each_read_once
    from mergekit_pave.planning.variants import Variant, combinations, default_combinations, in_full, make_variants, parse_choice
    from mergekit_pave.planning.weights import as_changes, weights_of
    from mergekit_pave.plugin.scoring import check_block, plan_scoring
    from mergekit_pave.plugin.tune import Tuner, tune_weights


@click.command(cls=PrettyPrintHelp)
@click.argument("config_file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--set",
    "choices",
    metavar="KEY=V1,V2",
    multiple=True,
    help="A key with dots, as in models.0.parameters.weight, and the values to try, as YAML. Parameters and keys of the block "
    "may be as short as the table shows them: lambda, rank_ratio, refine.lambda. Repeat it for other keys: every combination is "
    "tried. Default: see above.",
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
@json_option
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

    A setting that fails is told, and the others are tried. Methods that draw at random get --random-seed 0 if none is given.

    Without --set these are tried: lambda at 0.6, 0.8, 1 and 1.2 times its value, each without purification and at rank_ratio
    0.984, and refining with a lambda of 1, 1.2 and 1.4; as far as merge method and data allow.
    """
    merge_options.apply_global_options()
    _check_output(config_file, output)
    if page:
        require_matplotlib()
        from mergekit_pave.report.page import document
        from mergekit_pave.report.page.tuned import write_tuned

        document.check(page, option="--report")
    config = read_config(str(config_file))
    text = config_file.read_bytes().decode("utf-8")  # with the ends of lines that it has
    content = yaml.safe_load(text)
    check_block(config, base)
    chosen = combinations(in_full(map(parse_choice, choices), content)) if choices else default_combinations(config, content)
    variants = make_variants(content, chosen)
    of_weights = [weights_of(variant.config) for variant in variants] if weights else []  # any of them may be the best
    if output:
        _check_rewriting(text, content, variants, of_weights)
    with each_read_once():
        scorer = plan_scoring(config, merge_options, rows, base)
        tuner = Tuner(config, merge_options, scorer, lambda line: merge_options.quiet or click.echo(line, err=True))
        variants = [variant for variant in variants if _can_be_tried(tuner, variant, is_asked_for=bool(choices))]
    click.echo(f"{len(variants)} settings to try, on {rows} held-out rows of each model", err=True)
    tried = tuner.score(variants)
    if weights:
        tried += tune_weights(tuner, content, tried, by)
    failed = [(variant.changes, reason) for variant, reason in tuner.failed]
    result = tuned([(variant.changes, score) for variant, score in tried], by, failed)
    table = as_text(result, label_settings([variant.changes for variant, _ in tried], text))
    best = tried[result["best"]][0]
    if best.taken_out:
        table += f"\nTaken out of it, as {best.config.merge_method} has no such parameters: {', '.join(best.taken_out)}."
    if best.is_random:
        table += f"\n{best.config.merge_method} draws at random: merge it with --random-seed {tuner.seed}, as it was here."
    click.echo(json.dumps(result, indent=1) if as_json else table)
    if page:
        click.echo(f"written to {write_tuned(page, config_file.stem, result, text)}", err=True)
    if output:
        _write_new(output, rewrite(text, best.content, table))
        click.echo(f"written to {output}", err=True)
    elif result["best"] > 0:
        click.echo("To have it as a config, repeat this with -o best.yml: nothing is merged again.", err=True)
    if failed:
        raise PaveError(f"{len(failed)} of {len(failed) + len(tried)} settings failed; see above")


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


def _check_rewriting(text: str, content: dict[str, Any], variants: list[Variant], of_weights: list[dict[int, float]]) -> None:
    """
    Args:
        text, content: of the config.
        of_weights: weights that are to be tuned.

    Raises:
        PaveError: a variant could not be written, however good it is.
    """
    changed = [as_changes({i: weight + 1 for i, weight in each.items()}) for each in of_weights[:1]]
    for variant in [*variants, *make_variants(content, changed)[1:]]:
        try:
            rewrite(text, variant.content, "")
        except PaveError as error:
            raise PaveError(f"-o: {variant.name}: {error}") from error


def _write_new(path: Path, text: str) -> None:
    """
    Raises:
        PaveError: there is something by now, or it cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8", newline="") as file:
            file.write(text)
    except OSError as error:
        raise PaveError(f"-o {path} cannot be written: {error}; what was scored is in the cache, so name another file") from error


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
