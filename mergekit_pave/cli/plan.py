"""`mergekit-pave plan`, `calibrate` and `report`: what a merge will do, what it needs, and what it did."""

from __future__ import annotations

import json
from pathlib import Path

import click
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from mergekit_pave.calibration import distributed
from mergekit_pave.cli.config import is_first_process, read_config
from mergekit_pave.hook import host
from mergekit_pave.report.page.picture import require_matplotlib
from mergekit_pave.report.stored import read_either

if not host.missing():  # otherwise the command is not run, and `main` says why
    from mergekit_pave.planning.measured import measure
    from mergekit_pave.planning.preview import as_text, preview
    from mergekit_pave.plugin.phases import fill_caches, plan_merge, sample_removal


@click.command(cls=PrettyPrintHelp)
@click.argument("config_file", type=click.Path(exists=True, dir_okay=False))
@add_merge_options
def calibrate(config_file: str, merge_options: MergeOptions) -> None:
    """Fill the caches for CONFIG_FILE (a mergekit YAML with a `pave:` block) and merge nothing."""
    merge_options.apply_global_options()
    distributed.start()
    config = distributed.first_alone(lambda: read_config(config_file))
    plan = fill_caches(config, merge_options)
    num_new, num_weights = len(plan.decompositions), plan.decomposed
    if is_first_process():
        num_forms = sum(bool(form.measured) for form in plan.closed_forms.values())
        if num_weights or not num_forms:
            click.echo(f"{num_weights} weights ready: {num_new} decomposed now, {num_weights - num_new} were in the cache.")
        if num_forms:
            click.echo(f"Covariances for {num_forms} tensors that regmean merges are in the cache.")


@click.command(cls=PrettyPrintHelp)
@click.argument("config_file", type=click.Path(exists=True, dir_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Every tensor, for scripts.")
@add_merge_options
def plan(config_file: str, as_json: bool, merge_options: MergeOptions) -> None:
    """Show what merging CONFIG_FILE would purify or refine, what not and why, and what that would cost.

    No weights are read, except a few of each model once its caches are full: they show how large the removed part is. An adapter
    (`model+lora`) is merged into its model, which is kept in --lora-merge-cache.
    """
    merge_options.apply_global_options()
    planned = plan_merge(read_config(config_file), merge_options, compares=False, generates=False)
    samples = sample_removal(planned, merge_options)
    shown = preview(planned, merge_options.device, samples)
    click.echo(json.dumps(shown, indent=1) if as_json else as_text(shown))


@click.command("report", cls=PrettyPrintHelp)
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

    For OUT, the folder of a finished merge, the page is drawn from its pave_report.json alone, anywhere and in seconds: ranks,
    energy, the removed part beside the change, what regmean merged in closed form and how it is aligned with each model, and how
    well refined layers fit. If OUT was scored (`mergekit-pave score CONFIG OUT`), the page shows how much it keeps of each model,
    whether it has a block or not.

    For CONFIG (such as OUT/mergekit_config.yml) the page also shows spectra, covariances, and the interference between task
    vectors before and after. It reads weights as a merge does, but merges and measures nothing: the caches must be full, as they
    are after the merge or `mergekit-pave calibrate CONFIG`.
    """
    merge_options.apply_global_options()
    require_matplotlib()
    from mergekit_pave.report.page import document, render

    folder = output or (source if source.is_dir() else source.parent) / "pave_report"
    document.check(folder)
    if source.is_dir():
        (report, score), measured, config = read_either(str(source)), None, source / "mergekit_config.yml"
    else:
        report, measured = measure(plan_merge(read_config(str(source)), merge_options, generates=False), merge_options)
        score, config = None, source
    name = (source if source.is_dir() else source.with_suffix("")).resolve().name
    text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else None
    click.echo(f"written to {render.write(folder, name, report, measured, text, score)}")
