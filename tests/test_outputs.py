"""What people look at: the model card, pave_report.json, the log line, and the command mergekit-pave."""

import json
import os
import re
import shutil
from pathlib import Path

import datasets
import pytest
import yaml
from click.testing import CliRunner
from commands import command, finish, fresh
from huggingface_hub import ModelCard
from merging import config_for, entries, merge, write_config
from reference import purify

from mergekit_pave import cli

PAPER = "arxiv.org/abs/2510.14697"


@pytest.fixture(scope="module")
def purified(families, tmp_path_factory):
    """A merge with three models that differ in everything the report tells: (its config, its folder, the reference)."""
    family = families["llama"]
    models = entries(family, 3)
    models[1] |= {"exclude": ["k_proj"], "target": "task_vector"}
    models[2] = {"model": str(family.tuned[2]), "purify": False}
    config = config_for(family, {"models": models, "regularization": 0.1, "rank_ratio": 0.9}, models=3)
    out = tmp_path_factory.mktemp("outputs") / "out"
    merge(config, out)

    def ratio(i, tensor):
        return None if i == 2 or (i == 1 and "k_proj" in tensor) else 0.9

    expected = purify(
        "llama",
        family.base,
        family.tuned,
        [(data, "text", "text") for data in family.data],
        ratio,
        regularization=0.1,
        target=["weights", "task_vector", "weights"],
    )
    return config, out, expected


def test_report_agrees_with_the_reference(llama, purified):
    _, out, expected = purified
    report = json.loads((out / "pave_report.json").read_text())
    rows = {(row["model"], row["tensor"]): row for row in report["purified"]}
    wanted = {(str(llama.tuned[i]), name): row for i, of_model in enumerate(expected) for name, row in of_model.items()}
    assert rows.keys() == wanted.keys()
    assert len(rows) == len(report["purified"])
    for key, row in rows.items():
        want = wanted[key]
        assert row["components"] == want.components
        assert row["kept"] == want.kept
        assert row["tokens"] == want.tokens
        assert row["energy_dropped"] == pytest.approx(want.energy_dropped, rel=1e-3)
        assert row["removed_norm"] == pytest.approx(want.removed_norm, rel=1e-3)
        assert row["change_norm"] == pytest.approx(want.change_norm, rel=1e-4)
        assert row["output"] == row["tensor"]


def test_report_says_how_it_was_made(llama, purified):
    _, out, _ = purified
    report = json.loads((out / "pave_report.json").read_text())
    assert report["settings"]["rank_ratio"] == 0.9
    assert report["settings"]["regularization"] == 0.1
    assert report["settings"]["allocation"] == "spectral"
    assert report["versions"]["mergekit"].startswith("0.1.")
    assert report["models"].keys() == {str(model) for model in llama.tuned[:2]}
    assert str(llama.data[0]) in json.dumps(report["models"][str(llama.tuned[0])])


def test_card_is_a_valid_card_with_a_section(llama, purified):
    _, out, expected = purified
    text = (out / "README.md").read_text()
    card = ModelCard.load(out / "README.md")
    assert {"pave", "mergekit", "merge"} <= set(card.data.tags)
    assert card.data.library_name == "transformers"
    # Paths on this machine are no data sets of the Hub.
    assert "datasets" not in card.data.to_dict()
    section = text.split("### PAVE")[1]
    purified_tensors = len(expected[0])
    for words in (PAPER, "0.9", "spectral", "0.1", f"{purified_tensors} of ", str(llama.tuned[0]), llama.data[0].name):
        assert words in section, words
    kept = [row.kept for row in expected[0].values()]
    assert f"{sum(kept) / len(kept):.1f}" in section
    # mergekit's own part is all there.
    assert "### Merge Method" in text
    assert "```yaml" in text


def test_card_keeps_mergekits_part(llama, purified, tmp_path):
    """The section is appended; what mergekit wrote stays, and so does the config."""
    config, out, _ = purified
    plain = {k: v for k, v in config.items() if k != "pave"}
    merge(plain, tmp_path / "out")
    own = ModelCard.load(tmp_path / "out" / "README.md").text.split("### Configuration")[0]
    both = ModelCard.load(out / "README.md").text
    assert sorted(own.split("\n")) == sorted(both.split("### Configuration")[0].split("\n"))
    assert yaml.safe_load((out / "mergekit_config.yml").read_text()) == config


def test_no_card_when_none_is_wanted(llama, tmp_path):
    merge(config_for(llama, {}), tmp_path / "out", write_model_card=False)
    assert not (tmp_path / "out" / "README.md").exists()
    assert (tmp_path / "out" / "pave_report.json").is_file()


def test_limits_on_samples_and_tokens_show_in_the_report(llama, tmp_path):
    config = config_for(llama, {"calibration": {"samples": 7, "max_tokens": 33}})
    merge(config, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "pave_report.json").read_text())
    first, second = (report["models"][str(model)] for model in llama.tuned[:2])
    assert (first["samples"], first["tokens"]) == (7, 33)
    assert (second["samples"], second["tokens"]) == (3, 33)
    assert {row["tokens"] for row in report["purified"]} == {33}


def test_hub_data_sets_are_named_in_the_metadata(llama, tmp_path):
    """A data set of the Hub, here from the cache of `datasets` as the Hub is out of reach."""
    cached = datasets.load_dataset("json", data_files=str(llama.data[0]), split="train")
    made = Path(cached.cache_files[0]["filename"]).parent
    target = Path(datasets.config.HF_DATASETS_CACHE) / "someone___texts" / "default" / "0.0.0" / ("0" * 40)
    shutil.copytree(made, target)
    for file in target.glob("json-*"):
        file.rename(file.with_name(file.name.replace("json-", "texts-")))
    config = config_for(llama, {"models": entries(llama, 2, path="someone/texts")})
    merge(config, tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.datasets == ["someone/texts"]
    assert "someone/texts" in card.text.split("### PAVE")[1]


def test_a_block_at_default_verbosity_and_calibrate_fills_the_caches_only(llama, tmp_path, cache):
    """`mergekit-pave calibrate`, then the merge: one measures, the other has nothing to measure."""
    path = write_config(config_for(llama, {}), tmp_path / "work" / "config.yml")
    done = CliRunner().invoke(cli.main, ["calibrate", str(path), "--quiet"])
    assert done.exit_code == 0, done.output
    assert "42" in done.output  # 21 weights of each of two models
    assert [p.name for p in (tmp_path / "work").iterdir()] == ["config.yml"]
    filled = {p: p.stat().st_mtime_ns for p in cache.rglob("*.safetensors")}
    assert filled

    merged = command("mergekit-yaml", path, tmp_path / "out")
    assert merged.returncode == 0, merged.stderr
    told = merged.stderr.partition(f"PAVE: {tmp_path / 'out'} is merged\n")[2].splitlines()
    assert told[0] == "  purified    21 of 30 tensors"
    assert [line.split()[0] for line in told[1:3]] == [llama.tuned[0].name, llama.tuned[1].name]
    assert f"  next        mergekit-pave score {path} {tmp_path / 'out'}" in told and merged.stderr.count("is merged") == 1
    assert "Calibrating" not in merged.stderr
    assert {p: p.stat().st_mtime_ns for p in cache.rglob("*.safetensors")} == filled


def test_calibrate_wants_a_block(llama, tmp_path):
    path = write_config(config_for(llama), tmp_path / "config.yml")
    done = CliRunner().invoke(cli.main, ["calibrate", str(path)])
    assert isinstance(done.exception, SystemExit)
    assert done.exit_code != 0
    assert "`pave:` block" in done.output


def test_doctor(llama, tmp_path, cache, monkeypatch):
    merge(config_for(llama, {}), tmp_path / "out")
    live = command("mergekit-pave", "doctor")
    assert live.returncode == 0, live.stderr
    for words in ("mergekit-pave", "mergekit", "torch", "transformers", str(cache), " honoured", "regmean, tsv"):
        assert words in live.stdout
    assert "NOT HONOURED" not in live.stdout
    size = re.search(r"\(([\d.]+) ([KMG]?B|bytes)", live.stdout)
    assert size and float(size[1]) > 0, live.stdout

    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    off = CliRunner().invoke(cli.main, ["doctor"])
    assert off.exit_code != 0
    assert "NOT HONOURED" in off.output
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD" in off.output


def test_doctor_speaks_before_anything_large_is_imported():
    """torch, transformers and mergekit take seconds."""
    code = "import sys; from mergekit_pave.cli import main; from mergekit_pave.cli.doctor import doctor; print(*sys.modules)"
    done = finish(fresh("python", "-c", code))
    assert done.returncode == 0 and not {"torch", "transformers", "mergekit"} & set(done.stdout.split()), done.stderr
    done = command("python", "-c", "from mergekit_pave.cli import main; main(['doctor'])")
    lines = [line.split()[0] for line in done.stdout.splitlines()]
    assert lines == ["mergekit-pave", "mergekit", "torch", "transformers", "datasets", "cache", "pave:", "methods"]


def test_every_command_is_there():
    told = CliRunner().invoke(cli.main, ["--help"]).output
    for name in ("cache", "calibrate", "doctor", "plan", "report", "restore", "score", "tune"):
        assert re.search(rf"^  {name} +\w", told, re.MULTILINE) and CliRunner().invoke(cli.main, [name, "--help"]).exit_code == 0
    assert "No such command 'plann'" in CliRunner().invoke(cli.main, ["plann"]).output


def test_doctor_on_merge_methods_that_cannot_be_loaded(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['mergekit_pave.methods.tsv'] = None\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH")))))
    told = CliRunner().invoke(cli.main, ["doctor"])
    assert told.exit_code == 1
    assert re.search(r"pave: blocks +honoured", told.output) and re.search(r"methods +NOT USABLE", told.output)
    assert "`merge_method: regmean` cannot be used (" in told.output and "mergekit_pave.methods.tsv" in told.output
