"""`mergekit-pave tune` on tiny real models: it tells what real merges score, does nothing twice, and leaves nothing behind."""

import dataclasses
import json
import re
import shutil
import time
from types import SimpleNamespace
from unittest.mock import ANY

import filelock
import pytest
import torch
import yaml
from click.testing import CliRunner
from commands import start
from merging import forget_checkpoints, merge, write_config
from models import Family, make_family, read_rows, write_rows
from safetensors.torch import load_file, save_file
from test_score import score, scored_config, with_more_rows

from mergekit_pave.cli import main
from mergekit_pave.planning import samples
from mergekit_pave.planning.variants import make_variants
from mergekit_pave.plugin import tune as tuning
from mergekit_pave.plugin.scratch import remove_abandoned, scratch_folder

ROWS = 10


@pytest.fixture(scope="module")
def llamas(tmp_path_factory) -> Family:
    return with_more_rows(make_family("llama", tmp_path_factory.mktemp("tuned")))


@pytest.fixture(scope="module")
def half_llamas(llamas, tmp_path_factory) -> Family:
    """The same in bfloat16."""
    folder = tmp_path_factory.mktemp("tuned") / "half"
    shutil.copytree(llamas.base.parent, folder)
    for path in folder.rglob("*.safetensors"):
        save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    return dataclasses.replace(llamas, base=folder / llamas.base.name, tuned=tuple(folder / tuned.name for tuned in llamas.tuned))


@pytest.fixture
def merges(monkeypatch) -> list:
    """The configs that are really merged."""
    merged = []
    run_merge = tuning.run_merge

    def noting(config, *args):
        merged.append(config)
        return run_merge(config, *args)

    monkeypatch.setattr(tuning, "run_merge", noting)
    return merged


def tune(config: dict, folder, *options: str):
    """`mergekit-pave tune` in process."""
    forget_checkpoints()
    path = write_config(config, folder / "config.yml")
    return CliRunner().invoke(main, ["tune", str(path), "--rows", str(ROWS), "--quiet", *options])


def tuned(config: dict, folder, *options: str) -> dict:
    """What it tells scripts."""
    result = tune(config, folder, "--json", *options)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def settings(result: dict) -> list[dict]:
    return [setting["set"] for setting in result["settings"]]


def really(config: dict, folder, **changes) -> dict:
    """The score of a real merge."""
    merge(config | changes, folder)
    return score(config, folder, rows=ROWS)[0]


def assert_alike(one: dict, other: dict, tolerance: float) -> None:
    for name, model in one["models"].items():
        assert model["kept"] == pytest.approx(other["models"][name]["kept"], abs=tolerance)
        assert model["by_row"]["base"] == other["models"][name]["by_row"]["base"]


def scratch(cache) -> list:
    return list((cache / "scratch").iterdir()) if (cache / "scratch").exists() else []


def test_each_setting_has_the_score_of_its_merge(llamas, tmp_path, merges):
    config = scored_config(llamas, tmp_path / "cache")
    result = tuned(config, tmp_path, "--set", "merge_method=ties,regmean", "--set", "pave.refine=false,true")
    assert settings(result)[1:3] == [
        {"merge_method": "ties", "pave.refine": False},
        {"merge_method": "ties", "pave.refine": True},
    ]
    assert len(merges) == len(result["settings"]) == 5
    ties = {"merge_method": "ties"}
    refined = {"pave": config["pave"] | {"refine": True}}
    expected = [{}, ties, ties | refined, {"merge_method": "regmean"}, {"merge_method": "regmean"} | refined]
    for i, changes in enumerate(expected):
        assert_alike(result["settings"][i]["score"], really(config, tmp_path / f"out{i}", **changes), 1e-9)
    shares = [setting["score"]["mean"]["kept"] for setting in result["settings"]]
    assert result["best"] == shares.index(max(shares))
    assert not scratch(tmp_path / "cache")


def test_parameters_that_the_best_method_does_not_have_are_told(llamas, tmp_path):
    config = scored_config(llamas, tmp_path / "cache") | {"merge_method": "ties"}
    for entry in config["models"]:
        entry["parameters"] |= {"density": 0.1, "weight": 0.01}
    result = tune(config, tmp_path, "--set", "merge_method=regmean", "-o", str(tmp_path / "best.yml"))
    assert result.exit_code == 0, result.output
    told = "Taken out of it, as regmean has no such parameters: density."
    assert told in result.stdout and f"# {told}" in (tmp_path / "best.yml").read_text()
    merge(yaml.safe_load((tmp_path / "best.yml").read_text()), tmp_path / "best")


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "tsv"])
def test_one_merge_serves_every_lambda_that_only_scales(llamas, tmp_path, merges, method):
    config = scored_config(llamas, tmp_path / "cache") | {"merge_method": method}
    result = tuned(config, tmp_path, "--set", "parameters.lambda=0.5,1.5")
    assert len(merges) == 1
    for i, factor in enumerate((1, 0.5, 1.5)):
        merged = really(config, tmp_path / f"out{i}", parameters={"lambda": factor})
        assert_alike(result["settings"][i]["score"], merged, 1e-5)


def test_every_lambda_is_merged_in_16_bits(half_llamas, tmp_path, merges):
    config = scored_config(half_llamas, tmp_path / "cache") | {"dtype": "bfloat16"}
    result = tuned(config, tmp_path, "--set", "parameters.lambda=0.5")
    assert len(merges) == 2
    assert_alike(result["settings"][1]["score"], really(config, tmp_path / "out", parameters={"lambda": 0.5}), 1e-9)


def test_what_is_drawn_at_random_is_drawn_alike_with_the_seed_that_is_told(llamas, tmp_path):
    config = scored_config(llamas, tmp_path / "cache") | {"merge_method": "dare_linear", "parameters": {"density": 0.5}}
    result = tune(config, tmp_path, "--set", "parameters.density=0.9", "-o", str(tmp_path / "best.yml"), "--json")
    assert result.exit_code == 0, result.output
    told = "# dare_linear draws at random: merge it with --random-seed 0, as it was here."
    assert told in (tmp_path / "best.yml").read_text()
    found = json.loads(result.stdout)
    merge(yaml.safe_load((tmp_path / "best.yml").read_text()), tmp_path / "best", random_seed=0)
    assert_alike(found["settings"][found["best"]]["score"], score(config, tmp_path / "best", rows=ROWS)[0], 1e-9)


def test_a_setting_that_fails_does_not_end_the_run(llamas, tmp_path, monkeypatch):
    config = scored_config(llamas, tmp_path / "cache")
    run_merge = tuning.run_merge

    def failing(config, *args):
        if config.models[0].parameters["weight"] == 0.3:
            raise RuntimeError("no such\nluck")
        return run_merge(config, *args)

    monkeypatch.setattr(tuning, "run_merge", failing)
    choices = ("--set", "models.0.parameters.weight=0.3,0.4", "-o", str(tmp_path / "best.yml"))
    result = tune(config, tmp_path, *choices)
    assert result.exit_code == 1 and "1 of 3 settings failed" in result.stderr and "weight of" in result.stdout
    told = "models.0.parameters.weight=0.3: failed: no such luck"
    assert told in result.stdout and f"# {told}" in (tmp_path / "best.yml").read_text()
    monkeypatch.setattr(tuning, "run_merge", run_merge)
    (tmp_path / "best.yml").unlink()
    assert tune(config, tmp_path, *choices).exit_code == 0


def test_a_setting_that_cannot_be_written_is_told_before_anything_is_run(llamas, tmp_path, merges):
    config = scored_config(llamas, tmp_path / "cache")
    config["models"][1]["parameters"] = config["models"][0]["parameters"]  # which PyYAML writes as an alias
    result = tune(config, tmp_path, "--set", "models.0.parameters.weight=0.3", "-o", str(tmp_path / "best.yml"))
    assert result.exit_code == 1 and "cannot be changed in place" in " ".join(result.output.split())
    assert not merges and not (tmp_path / "cache" / "predictions").exists()


def test_of_a_stream_samples_cannot_be_tuned(llamas, tmp_path):
    config = scored_config(llamas, tmp_path / "cache")
    config["pave"]["models"][0]["data"] |= {"streaming": True}
    result = tune(config, tmp_path, "--set", "pave.calibration.samples=2")
    assert result.exit_code == 1 and "cannot be tuned with streaming" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("more", "block"),
    [
        ({"merge_method": "regmean"}, {}),
        ({}, {"vocabulary": "counts"}),
        ({}, {"refine": True}),
        ({"tokenizer": {"source": "base"}}, {}),
        ({"dtype": "bfloat16"}, {}),  # of models in float32, which such a merge rounds before it merges
    ],
)
def test_every_lambda_is_merged_where_it_does_more(llamas, tmp_path, merges, more, block):
    config = scored_config(llamas, tmp_path / "cache", **block) | more
    result = tuned(config, tmp_path, "--set", "parameters.lambda=0.5")
    assert len(merges) == 2
    assert_alike(result["settings"][1]["score"], really(config, tmp_path / "out", parameters={"lambda": 0.5}), 1e-9)


def test_nothing_is_merged_or_scored_twice(llamas, tmp_path, merges):
    config = scored_config(llamas, tmp_path / "cache")
    first = tuned(config, tmp_path, "--set", "models.0.parameters.weight=0.3,0.4")
    assert len(merges) == 3
    again = tuned(config, tmp_path, "--set", "models.0.parameters.weight=0.3,0.4,0.6")
    assert len(merges) == 4
    assert again["settings"][:3] == [setting | {"behind_best": ANY} for setting in first["settings"]]
    (tmp_path / "cache" / "scratch" / "left").mkdir()
    (tmp_path / "cache" / "scratch" / ".left.lock").touch()
    assert tuned(config, tmp_path, "--set", "models.0.parameters.weight=0.3,0.4,0.6") == again
    assert len(merges) == 4 and not scratch(tmp_path / "cache"), "what a killed run left is removed also where nothing is merged"


def test_a_run_that_was_interrupted_goes_on_where_it_was(llamas, tmp_path, merges, monkeypatch):
    config = scored_config(llamas, tmp_path / "cache")
    choices = ("--set", "models.0.parameters.weight=0.3,0.4,0.6")
    noting = tuning.run_merge

    def interrupted(config, out_path, *args):
        noting(config, out_path, *args)
        if len(merges) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "run_merge", interrupted)
    assert tune(config, tmp_path, *choices).exit_code != 0
    assert not scratch(tmp_path / "cache")
    tuned(config, tmp_path, *choices)
    weights = [config.models[0].parameters["weight"] if config.models else None for config in merges]
    assert len(weights) == 5, "the one that was interrupted, and the one that had not begun"


def test_what_a_killed_run_left_is_removed_and_what_another_uses_is_not(tmp_path):
    for name in ("left", "used"):
        (tmp_path / "scratch" / name).mkdir(parents=True)
        (tmp_path / "scratch" / name / "model.safetensors").write_bytes(b"weights")
        (tmp_path / "scratch" / f".{name}.lock").touch()
    with filelock.FileLock(tmp_path / "scratch" / ".used.lock"), scratch_folder(tmp_path) as folder:
        folders = {path.name for path in (tmp_path / "scratch").iterdir() if path.is_dir()}
        assert folders == {"used", folder.name}
    with scratch_folder(tmp_path):
        assert not (tmp_path / "scratch" / "used").exists()
    assert not scratch(tmp_path)


def test_a_folder_that_cannot_be_removed_is_found_again(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        with scratch_folder(tmp_path) as folder:
            pass
    assert folder.exists()
    remove_abandoned(tmp_path)
    assert not scratch(tmp_path)


def test_weights_that_were_tried_are_not_tried_again():
    """The search comes back from the best setting to the weights of the config."""
    content = {"merge_method": "task_arithmetic", "base_model": "base", "models": [{"model": "a"}, {"model": "b"}]}
    for entry in content["models"]:
        entry["parameters"] = {"weight": 0.5}
    scored = []

    def score(variants):
        scored.extend(variants)
        return [(variant, {"mean": {"kept": 0.1}}) for variant in variants]

    tried = list(zip(make_variants(content, [{"models.0.parameters.weight": 0.7}]), [{"mean": {"kept": x}} for x in (0.2, 0.3)]))
    tuner = SimpleNamespace(check=lambda variant: None, score=score, failed=[])
    further = tuning.tune_weights(tuner, content, tried, "mean")
    assert [variant for variant, _ in further] == scored
    assert all(variant.changes for variant in scored) and len(scored) == 2 * 2 * 2 - 1


def test_a_run_that_was_killed_is_cleaned_up_after(llamas, tmp_path):
    config = scored_config(llamas, tmp_path / "cache")
    choices = ("--set", "models.0.parameters.weight=0.3,0.4,0.6,0.7")
    path = write_config(config, tmp_path / "config.yml")
    process = start("mergekit-pave", "tune", path, "--rows", ROWS, *choices)
    while not any(each.is_dir() for each in scratch(tmp_path / "cache")):
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert any(each.is_dir() for each in scratch(tmp_path / "cache"))
    assert len(tuned(config, tmp_path, *choices)["settings"]) == 5
    assert not scratch(tmp_path / "cache")


def test_a_changed_model_or_other_samples_are_merged_anew(llamas, tmp_path, merges):
    folder = tmp_path / "models"
    shutil.copytree(llamas.base.parent, folder)
    base = folder / llamas.base.name
    data = tuple(write_rows(folder / f"rows{i}.jsonl", read_rows(path)) for i, path in enumerate(llamas.data))
    family = dataclasses.replace(llamas, base=base, tuned=tuple(folder / path.name for path in llamas.tuned), data=data)
    config = scored_config(family, tmp_path / "cache") | {"merge_method": "regmean"}
    before = tuned(config, tmp_path)["settings"][0]["score"]
    merges.clear()
    assert tuned(config, tmp_path, "--set", "parameters.lambda=1")["settings"][0]["score"] == before
    assert not merges
    path = family.tuned[0] / "model.safetensors"
    save_file({name: 1.01 * tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    assert tuned(config, tmp_path, "--set", "parameters.lambda=1")["settings"][0]["score"] != before
    assert len(merges) == 1
    rows = read_rows(data[0])
    write_rows(data[0], [row | {"text": f"also {row['text']}"} for row in rows])
    tuned(config, tmp_path, "--set", "parameters.lambda=1")
    assert len(merges) == 2
    tuned(config, tmp_path, "--set", "parameters.lambda=1", "--random-seed", "3")
    assert len(merges) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--set", "parameters.lamda=1"), "did you mean 'lambda'"),
        (("--set", "parameters.lambda=1,fast"), "parameters.lambda=fast: "),
        (("--set", "models.0.parameters.weight=0.3", "--set", "pave.include=[no_such]"), "'no_such' is part of no"),
        (("--set", "pave.calibration.seed=1"), "data and seed cannot be tuned"),
        (("--set", "pave.calibration.samples=2,8"), "samples=8: .*only downwards"),
        (("--set", "models.1.model=./other"), "is not part of this merge"),
        (("-o", "nowhere/best.yml"), "there is no folder nowhere"),
    ],
)
def test_mistakes_are_told_before_anything_is_run(llamas, tmp_path, merges, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    config = scored_config(llamas, tmp_path / "cache", purify=True, rank_ratio=0.9)
    for entry in config["pave"]["models"]:
        entry.pop("purify", None)
    result = tune(config, tmp_path, *options)
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert re.search(message, " ".join(result.output.split())), result.output
    assert not merges and not (tmp_path / "cache").exists()


def test_the_best_config_is_written_with_the_comments_of_the_old_one_and_can_be_tuned_again(llamas, tmp_path, merges):
    config = scored_config(llamas, tmp_path / "cache")
    for entry in config["models"]:
        entry["parameters"]["weight"] = 0.005
    text = yaml.safe_dump(config).replace("merge_method: task_arithmetic", "merge_method: task_arithmetic   # mine")
    path, best = tmp_path / "mine.yml", tmp_path / "best.yml"
    path.write_text(text)
    arguments = ["tune", str(path), "--rows", str(ROWS), "--quiet", "--set", "parameters.lambda=2,100", "-o", str(best)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    written = best.read_text()
    assert "merge_method: task_arithmetic   # mine\nparameters: {lambda: 100}\n" in written
    assert yaml.safe_load(written) == config | {"parameters": {"lambda": 100}}
    assert all(f"# {line}".rstrip() in written for line in result.stdout.splitlines()), "the table stands above it"
    merges.clear()
    arguments[1], arguments[-1] = str(best), str(tmp_path / "better.yml")
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert not merges
    assert (tmp_path / "better.yml").read_text().count("Share kept") == 1


@pytest.mark.parametrize(("name", "message"), [("mine.yml", "is the config itself"), ("old.yml", "is there already")])
def test_no_file_is_overwritten(llamas, tmp_path, name, message):
    config = scored_config(llamas, tmp_path / "cache")
    (tmp_path / "old.yml").write_text("precious")
    path = write_config(config, tmp_path / "mine.yml")
    before = (tmp_path / name).read_text()
    result = CliRunner().invoke(main, ["tune", str(path), "-o", str(tmp_path / name)])
    assert result.exit_code == 1 and message in " ".join(result.output.split())
    assert (tmp_path / name).read_text() == before


def test_what_is_tried_by_default(llamas, tmp_path, merges):
    config = scored_config(llamas, tmp_path / "cache", purify=True, rank_ratio=0.9)
    for entry in config["pave"]["models"]:
        entry.pop("purify", None)
    result = tuned(config, tmp_path, "--by", "worst")
    scales = [{"parameters.lambda": factor, "pave.rank_ratio": ratio} for factor in (0.6, 0.8, 1, 1.2) for ratio in (1, 0.984)]
    assert settings(result) == [{}, *scales, *({"pave.refine": {"lambda": factor}} for factor in (1, 1.2, 1.4))]
    assert len(merges) == 1 + 2 + 3
    shares = [setting["score"]["worst"]["kept"] for setting in result["settings"]]
    assert result["best"] == shares.index(max(shares))


def test_a_rank_ratio_of_one_purifies_nothing(llamas, tmp_path):
    config = scored_config(llamas, tmp_path / "cache", purify=True, rank_ratio=1)
    merged = merge(config, tmp_path / "one")
    plain = merge({key: value for key, value in config.items() if key != "pave"}, tmp_path / "plain")
    assert all(torch.equal(tensor, plain[name]) for name, tensor in merged.items())


def test_what_does_not_fit_is_left_out_of_what_nobody_asked_for(llamas, tmp_path):
    config = scored_config(llamas, tmp_path / "cache")
    config["models"][0]["parameters"]["weight"] = -0.5
    result = tune(config, tmp_path)
    assert result.exit_code == 0, result.output
    assert "left out: pave.refine={lambda: 1}" in result.stderr and "pave.refine" not in result.stdout


def test_weights_go_on_from_the_best_setting(llamas, tmp_path, merges):
    config = scored_config(llamas, tmp_path / "cache")
    plain = tuned(config, tmp_path, "--set", "parameters.lambda=1.3")
    merges.clear()
    result = tuned(config, tmp_path, "--set", "parameters.lambda=1.3", "--weights")
    assert result["settings"][:2] == [setting | {"behind_best": ANY} for setting in plain["settings"]]
    further = result["settings"][2:]
    assert len(further) == len(merges) <= 8
    assert all(any(key.startswith("models.") for key in setting["set"]) for setting in further)
    assert ("parameters.lambda" in further[0]["set"]) == (plain["best"] == 1)
    shares = [setting["score"]["mean"]["kept"] for setting in result["settings"]]
    assert result["best"] == shares.index(max(shares))
    best = result["settings"][result["best"]]["set"]
    changed = {key: value for key, value in best.items() if key.startswith("models.")}
    for key, weight in changed.items():
        config["models"][int(key.split(".")[1])]["parameters"]["weight"] = weight
    merged = really(config, tmp_path / "out", parameters={"lambda": best.get("parameters.lambda", 1)})
    assert_alike(result["settings"][result["best"]]["score"], merged, 1e-5)


def test_weights_are_refused_where_the_method_has_none(llamas, tmp_path, merges):
    config = scored_config(llamas, tmp_path / "cache") | {"merge_method": "model_stock"}
    result = tune(config, tmp_path, "--weights")
    assert result.exit_code == 1 and "model_stock does not give each model a weight" in result.output
    assert not merges


def test_the_page_is_written_where_it_is_asked_for(llamas, tmp_path, undrawn):
    config = scored_config(llamas, tmp_path / "cache")
    result = tune(config, tmp_path, "--set", "parameters.lambda=0.5", "--report", str(tmp_path / "page"))
    assert result.exit_code == 0, result.output
    assert "lambda 0.5" in (tmp_path / "page" / "index.html").read_text()


def test_samples_are_read_once_for_all_settings(llamas, tmp_path, monkeypatch):
    read = []
    draw_samples = samples.draw_samples
    monkeypatch.setattr(samples, "draw_samples", lambda *args: read.append(args) or draw_samples(*args))
    counts = []
    monkeypatch.setattr(tuning.Tuner, "score", lambda self, variants: counts.append((len(variants), len(read))) or 1 / 0)
    config = scored_config(llamas, tmp_path / "cache", refine=True)
    for commands in (1, 2):
        tune(config, tmp_path, "--set", "pave.refine.lambda=1,2,3")
        assert counts[-1] == (4, 2 * commands), "once a model"


def test_a_config_that_cannot_be_merged_ends_the_run(llamas, tmp_path):
    folder = tmp_path / "models"
    shutil.copytree(llamas.base.parent, folder)
    path = folder / llamas.base.name / "model.safetensors"
    tensors = load_file(path)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            tensors[name] = torch.cat([tensors[name], tensors[name][:1]])
    save_file(tensors, path, metadata={"format": "pt"})
    about = json.loads((path.parent / "config.json").read_text())
    (path.parent / "config.json").write_text(json.dumps(about | {"vocab_size": about["vocab_size"] + 1}))
    family = dataclasses.replace(llamas, base=path.parent, tuned=tuple(folder / tuned.name for tuned in llamas.tuned))
    result = tune(scored_config(family, tmp_path / "cache"), tmp_path, "--set", "parameters.lambda=0.5")
    told = "the config as it is cannot be merged and scored: Tensor size mismatch"
    assert result.exit_code == 1 and told in " ".join(result.output.split())


def test_a_config_is_scored_without_a_merge_that_is_there(llamas, tmp_path):
    config = scored_config(llamas, tmp_path / "cache")
    path = write_config(config, tmp_path / "config.yml")
    result = CliRunner().invoke(main, ["score", str(path), "--rows", str(ROWS), "--quiet", "--json"])
    assert result.exit_code == 0, result.output
    assert_alike(json.loads(result.stdout)[str(path)], really(config, tmp_path / "out"), 1e-9)
    assert not scratch(tmp_path / "cache")
    assert CliRunner().invoke(main, ["score", str(path), "--card"]).exit_code == 1


def test_a_disk_without_room_for_a_merge_is_told_before_any_work(llamas, tmp_path, merges, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    result = tune(scored_config(llamas, tmp_path / "cache"), tmp_path, "--set", "parameters.lambda=2")
    assert result.exit_code == 1 and "only 1 bytes are free" in " ".join(result.output.split())
    assert not merges and not (tmp_path / "cache").exists(), "no model was run"
