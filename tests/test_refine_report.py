"""What is told of a refined merge: before it by `plan` and in the log, after it by the report, the card and the page."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from merging import config_for, entries, forget_checkpoints, merge, write_config
from models import KINDS, Family, make_model, make_rows, make_tokenizer, model_config, save_family, write_rows
from test_calibration_memory import Tracking

from mergekit_pave.cli import main
from mergekit_pave.errors import PaveError
from mergekit_pave.plugin import wrap
from mergekit_pave.plugin.phases import plan_merge
from mergekit_pave.report import card
from mergekit_pave.report.account import account
from mergekit_pave.report.page import fits, render
from mergekit_pave.report.stored import read_report
from mergekit_pave.report.summary import mean_errors
from mergekit_pave.settings import Refine
from mergekit_pave.tasks.refine import refine_merge

LAYERS = 21  # linear layers of the tiny Llama, seven in each of its three blocks


def refined(family, models: int = 2, **more) -> dict:
    """A config that refines and does not purify. What is given replaces settings of the block, or of the config."""
    block = {"purify": False, "refine": True, "models": entries(family, models)}
    return config_for(family, block | more.pop("pave", {}), models=models, **more)


def invoke(*arguments) -> str:
    forget_checkpoints()
    done = CliRunner().invoke(main, [*map(str, arguments), "--quiet"])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


def section_of(folder: Path) -> str:
    return (folder / "README.md").read_text().split("### PAVE")[1]


def page_of(folder: Path) -> str:
    invoke("report", folder)
    return (folder / "pave_report" / "index.html").read_text()


def layer(tensor: str, before: float | None, after: float | None) -> dict:
    return {"tensor": tensor, "tokens": 100, "error_before": before, "error_after": after}


def report_of(layers: list[dict], left: dict[str, str]) -> dict:
    """A report of a merge that was refined, and nothing else."""
    return {
        "versions": {"mergekit-pave": "0.1.0"},
        "models": {},
        "not_purified": [],
        "warnings": [],
        "tensors": 30,
        "purified": [],
        "refined": {"settings": {"covariance": 0.5, "lambda": 1.25}, "layers": layers, "left": left},
    }


LEFT = {"norm.weight": "not the weight of a linear layer", "lm_head.weight": "vocabulary", "embed.weight": "vocabulary"}


def test_a_refined_merge_is_told_of(llama, tmp_path, cache, caplog):
    merge(refined(llama), tmp_path / "out")
    report = read_report(str(tmp_path / "out"))
    rows = report["refined"]["layers"]
    assert len(rows) == LAYERS and report["purified"] == []
    before, after = mean_errors(report["refined"])
    assert f"{before:.2g}" != f"{after:.2g}"
    words = (
        f"  refined     {LAYERS} of 30 tensors, whose outputs now differ from the models' by {after:.2g}, before by {before:.2g} "
    )
    assert words in caplog.text

    told = section_of(tmp_path / "out")
    assert f"refined {LAYERS} of 30 tensors of the merged model" in told and "purified the task vectors" not in told
    of_q = [row for row in rows if "q_proj" in row["tensor"]]
    columns = [[row[key] for row in of_q] for key in ("error_before", "error_after")]
    digits = next(n for n in range(2, 6) if len({f"{sum(errors) / 3:.{n}g}" for errors in columns}) == 2)
    shown = ["{:.{d}g} ({:.{d}g} to {:.{d}g})".format(sum(e) / 3, min(e), max(e), d=digits) for e in columns]
    assert f"| q_proj | 3 | {shown[0]} | {shown[1]} |" in told
    for setting, value in Refine().model_dump(by_alias=True).items():
        assert re.search(rf"\| `{setting}` \(.\) \| {value:g} \|", told)
    for model in llama.tuned[:2]:
        source = report["models"][str(model)]
        assert source["tokens"] > 0 and f"| {source['samples']} | {source['tokens']} |" in told
    assert "| not purified |" not in told

    page = page_of(tmp_path / "out")
    assert f"{LAYERS} of 30" in page and "tensors refined" in page and "refined block by block by mergekit-pave" in page
    assert "No model was purified" in page and page.count("<figure>") == 1
    assert (tmp_path / "out" / "pave_report" / "errors.png").is_file()
    for text in ("before", "after", "q_proj", "down_proj", "covariance of refining"):
        assert text in page

    path = write_config(refined(llama), tmp_path / "config.yml")
    forget_checkpoints()
    of_config = CliRunner().invoke(main, ["report", str(path), "-o", str(tmp_path / "page"), "--quiet"])
    assert of_config.exit_code == 1 and "give the folder of the finished merge" in of_config.output


@pytest.mark.parametrize("kind", ["purified", "regmean"])
def test_what_was_done_before_is_told_beside_it(kind, llama, tmp_path, cache, undrawn):
    more = {"pave": {"purify": True}} if kind == "purified" else {"merge_method": "regmean"}
    merge(refined(llama, **more), tmp_path / "out")
    told, page = section_of(tmp_path / "out"), page_of(tmp_path / "out")
    assert f"refined {LAYERS} of 30 tensors" in told and "tensors refined" in page
    if kind == "purified":
        assert "purified the task vectors" in told and "#### Ranks" in told and "Kept rank" in page
        assert "The merged model was then refined" in page
    else:
        assert "merged 21 of 30 tensors in closed form" in told and "tensors merged in closed form" in page
        assert "mergekit-pave" in page and ", refined block by block. No model was purified" in page
    assert "relative error of their outputs, mean" in page


def test_the_line_of_the_log():
    layers = [layer("layers.0.a.weight", 0.5, 0.25), layer("layers.0.b.weight", 0.3, 0.15), layer("c.weight", None, None)]
    merged = {"purified": [], "models": {}, "tensors": 6, "warnings": []}
    told = account(merged | {"refined": {"layers": layers, "left": LEFT}}, "./merged", "next")
    assert (
        "  refined     3 of 6 tensors, whose outputs now differ from the models' by 0.2, before by 0.4 (relative, mean); as "
        "merged: 2 vocabulary, 1 not the weight of a linear layer\n"
    ) in told
    told = account(merged | {"refined": {"layers": layers[2:], "left": {}}}, "./merged", "next")
    assert "  refined     1 of 6 tensors\n" in told


@pytest.mark.parametrize(
    ("before", "after", "tile", "cells"),
    [
        (0.3, 0.2, "0.3 → 0.2", "0.3 | 0.2"),
        (0.1941, 0.1932, "0.194 → 0.193", "0.194 | 0.193"),
        (0.19412, 0.19408, "0.19412 → 0.19408", "0.19412 | 0.19408"),
        (0.19, 0.19, "0.19, no change", "0.19 | 0.19"),
        (0.1900001, 0.19, "0.19, no change", "0.19 | 0.19"),
    ],
)
def test_a_small_change_can_be_seen(tmp_path, before, after, tile, cells, undrawn):
    """Nothing goes from 0.19 to 0.19."""
    report = report_of([layer("layers.0.q_proj.weight", before, after)], {})
    assert f">{tile}<" in render.write(tmp_path / "page", "name", report, None, None).read_text()
    assert f"| {cells} |" in card.section(report)
    was, now = cells.split(" | ")
    assert f"now differ from the models' by {now}, before by {was} " in account(report, "./merged", "next")


def test_errors_are_shown_by_projection():
    layers = [layer(f"model.layers.{i}.q_proj.weight", 0.1 * (i + 1), 0.05 * (i + 1)) for i in range(3)]
    layers += [layer("model.layers.0.o_proj.weight", 0.4, 0.4), layer("model.layers.1.o_proj.weight", None, None)]
    told = card.section(report_of(layers, LEFT))
    assert "| q_proj | 3 | 0.2 (0.1 to 0.3) | 0.1 (0.05 to 0.15) |" in told
    assert "| o_proj | 2 | 0.4 | 0.4 |" in told
    assert "| `lambda` (λ) | 1.25 |" in told
    assert "As the merge method gives them, by reason: 2 vocabulary, 1 not the weight of a linear layer." in told


def test_the_figure_shows_each_layer_before_and_after():
    """A layer whose error is not known is a gap, and each stack has a figure of its own."""
    layers = [layer(f"model.layers.{i}.q_proj.weight", 0.5 - 0.1 * i, 0.2 - 0.1 * i) for i in (1, 0)]
    layers += [layer("model.layers.0.o_proj.weight", None, 1e149), layer("visual.blocks.0.fc.weight", 0.5, 0.25)]
    plots = fits.plot_errors(layers)
    assert [plot.name for plot in plots] == ["errors-model-layers", "errors-visual-blocks"]
    panels = {panel.get_title("left"): panel.get_lines() for panel in plots[0].figure.axes}
    before, after = panels["q_proj"]
    assert (before.get_linestyle(), after.get_linestyle()) == ("--", "-")
    assert [list(line.get_xdata()) for line in (before, after)] == [[0, 1]] * 2
    assert list(before.get_ydata()) == [0.5, 0.4] and list(after.get_ydata()) == [0.2, 0.1]
    largest = max(panel.get_ylim()[1] for panel in plots[0].figure.axes)
    assert all(panel.get_ylim() == (0, largest) for panel in plots[0].figure.axes[:2]) and largest > 1e149
    assert str(panels["o_proj"][0].get_ydata()[0]) == "nan"


def test_a_merge_of_which_no_layer_was_reached(tmp_path):
    report = report_of([], {"layers.0.q.weight": "never called during calibration"})
    assert "refined 0 of 30 tensors" in card.section(report) and "| projection |" not in card.section(report)
    page = render.write(tmp_path / "page", "name", report, None, None).read_text()
    assert "0 of 30" in page and "<figure>" not in page and "never called during calibration" in page


# --- Before the merge ------------------------------------------------------------------------------------------------


def test_plan_tells_what_will_be_refined_and_what_it_costs(llama, tmp_path, cache):
    path = write_config(refined(llama, pave={"refine": {"covariance": 0.25}}), tmp_path / "plan.yml")
    found = json.loads(invoke("plan", path, "--json"))["refined"]
    told = invoke("plan", path)
    assert not cache.exists()
    merge(refined(llama, pave={"refine": {"covariance": 0.25}}), tmp_path / "out")
    done = read_report(str(tmp_path / "out"))["refined"]
    assert sorted(found["layers"]) == sorted(row["tensor"] for row in done["layers"])
    assert found["left"] == done["left"] and found["settings"] == done["settings"]
    assert found["seconds"] > 0 and found["memory"] > 0
    assert re.search(
        r"^Refining takes about \d+ s on cpu, [\d.]+ MB of memory, and while the merge runs [\d.]+ KB of disk; as the "
        r"merge method gives them: 7 not the weight of a linear layer\.$",
        told,
        re.MULTILINE,
    )
    assert told.startswith(f"{LAYERS} of 30 tensors will be refined.\n")
    assert "refined" not in json.loads(invoke("plan", write_config(config_for(llama, {}), path), "--json"))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_the_estimate_is_what_refining_takes(kind, tmp_path, cache, monkeypatch):
    """Of memory what torch takes, and of the disk the size of the file that is gone afterwards."""
    family, told = family_of(kind, tmp_path), {}

    def tracked(planned, tasks, names, store, storage):
        with Tracking() as tracking:
            result = refine_merge(planned, tasks, names, store, storage)
        told.update(memory=planned.estimate().peak / tracking.peak, disk=planned.size / store._file.seek(0, 2))
        return result

    monkeypatch.setattr(wrap, "refine_merge", tracked)
    merge(refined(family), tmp_path / "out")
    assert 1 / 1.3 < told["memory"] < 1.3
    assert 0.9 < told["disk"] <= 1  # each tensor has a header
    assert not [path for path in cache.iterdir() if path.is_file()]


def family_of(kind: str, folder: Path) -> Family:
    """Models whose layers are wide enough, and samples that are many enough, to outweigh what is there anyway."""
    tokenizer = make_tokenizer(kind)
    config = model_config(kind, len(tokenizer))
    config.update({"n_embd": 96} if kind == "gpt2" else {"hidden_size": 96, "intermediate_size": 288})
    data = tuple(
        write_rows(folder / f"{i}.jsonl", make_rows("one two three", count, seed=i)) for i, count in enumerate((160, 60))
    )
    return save_family(kind, make_model(KINDS[kind].model, config), tokenizer, data, folder)


def test_more_of_everything_costs_more(llama, tmp_path, cache):
    def cost(models: int = 2, **calibration):
        config = refined(llama, models, pave={"calibration": calibration})
        forget_checkpoints()
        return plan_merge(MergeConfiguration.model_validate(config), MergeOptions(quiet=True)).refinement.estimate()

    two, three, fewer = cost(), cost(3), cost(samples=10)
    assert three.weights == two.weights * 4 / 3 and three.hidden > two.hidden and three.fits > two.fits
    assert fewer.hidden < two.hidden and fewer.within < two.within and fewer.sums < two.sums and fewer.weights == two.weights


def test_a_merge_says_what_refining_takes(llama, tmp_path, cache, caplog):
    merge(refined(llama), tmp_path / "out")
    tokens = sum(source["tokens"] for source in read_report(str(tmp_path / "out"))["models"].values())
    assert re.search(
        rf"{LAYERS} layers to be refined with {tokens} tokens of 2 models; takes [\d.]+ KB of disk while the merge runs, and "
        r"about [\d.]+ MB of memory",
        caplog.text,
    )


@pytest.mark.parametrize("purify", [True, False])
def test_a_disk_without_room_for_the_merged_model(purify, llama, tmp_path, cache, monkeypatch):
    """It is told before anything is calibrated. `calibrate`, which refines nothing, needs no such room."""
    config = refined(llama, pave={"purify": purify})
    forget_checkpoints()
    plan = plan_merge(MergeConfiguration.model_validate(config), MergeOptions(quiet=True))
    size = plan.refinement.size + plan.missing
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=size - 1))
    with pytest.raises(PaveError, match=r"only .* are free.*or leave `refine` out"):
        merge(config, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not cache.exists()
    invoke("calibrate", write_config(config, tmp_path / "config.yml"))


def test_readme_names_the_defaults():
    settings = Refine().model_dump(by_alias=True)
    told = "{" + ", ".join(f"{key}: {value}" for key, value in settings.items()) + "}"
    root = Path(__file__).parents[1]
    assert told in (root / "README.md").read_text() and told in (root / "examples/README.md").read_text()
