"""Models in folders with any name: planned, calibrated, merged, and read back from what was written about them."""

import json
import shutil

import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from merging import config_for, forget_checkpoints, invoke, invoke_multi, merge, write_config
from reference import weights

from mergekit_pave.cli import main

FOLDERS = ["My Drive", """it's "the best\"""", "Überfluß 模型, 100% #1: a"]


@pytest.fixture
def named(llama, tmp_path, monkeypatch):
    """Makes a config of models in a folder of the current one."""
    monkeypatch.chdir(tmp_path)

    def make(folder: str, **block) -> dict:
        models = {str(llama.base): f"./{folder}/base", **{str(m): f"./{folder}/{m.name}" for m in llama.tuned}}
        for source, target in models.items():
            shutil.copytree(source, tmp_path / target)
        config = config_for(llama, block)
        config["base_model"] = models[config["base_model"]]
        for entry in (*config["models"], *config["pave"]["models"]):
            entry["model"] = models[entry["model"]]
        return config

    return make


@pytest.fixture(scope="module")
def expected(families, tmp_path_factory):
    """The same merge of models whose names are plain."""
    return merge(config_for(families["llama"], {}), tmp_path_factory.mktemp("expected") / "out")


def assert_same(written, expected):
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)


@pytest.mark.parametrize("folder", FOLDERS)
def test_plan_calibrate_merge_and_report(folder, named, expected, tmp_path, cache, undrawn):
    config = named(folder)
    path = str(write_config(config, tmp_path / folder / "config.yml"))
    models = [entry["model"] for entry in config["models"]]
    for command in (["plan", path], ["calibrate", path]):
        forget_checkpoints()
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output
    out = tmp_path / folder / "out"
    result = invoke(config, out)
    assert result.exit_code == 0, (result.output, result.exception)
    assert_same(weights(out), expected)
    assert list(json.loads((out / "pave_report.json").read_text())["models"]) == models
    assert "### PAVE" in (out / "README.md").read_text()
    forget_checkpoints()
    result = CliRunner().invoke(main, ["report", str(out / "mergekit_config.yml"), "-o", str(tmp_path / "page")])
    assert result.exit_code == 0, (result.output, result.exception)


def test_the_config_that_mergekit_writes_itself_is_the_same_config(named, tmp_path, cache):
    """Whoever calls `run_merge` need not give it the source of the config; mergekit then writes one for the card."""
    config = MergeConfiguration.model_validate(named("My Drive"))
    forget_checkpoints()
    run_merge(config, str(tmp_path / "out"), MergeOptions(quiet=True))
    written = yaml.safe_load((tmp_path / "out" / "mergekit_config.yml").read_text(encoding="utf-8"))
    again = MergeConfiguration.model_validate(written)
    assert set(again.referenced_models()) == set(config.referenced_models())
    assert again.pave.models == config.pave.models
    assert "### PAVE" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_steps_of_several_merges(named, expected, tmp_path, cache):
    """Both the names of steps and the folder that they are written to."""
    config = named("My Drive")
    last = {"merge_method": "linear", "dtype": "float32"}
    last["models"] = [{"model": m, "parameters": {"weight": 0.5}} for m in ("first step", "./My Drive/base")]
    result = invoke_multi([config | {"name": "first step"}, last], tmp_path / "all steps")
    assert result.exit_code == 0, (result.output, result.exception)
    assert_same(weights(tmp_path / "all steps" / "first step"), expected)
    last["models"][0]["model"] = str(tmp_path / "all steps" / "first step")
    assert_same(weights(tmp_path / "all steps" / "final"), merge(last, tmp_path / "last"))


def test_an_adapter(llama, tmp_path, monkeypatch, cache):
    peft = pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llama.base, "My Drive/the base")
    model = transformers.AutoModelForCausalLM.from_pretrained(llama.base)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained("My Drive/an adapter")
    config = config_for(llama, {}, models=1)
    reference = "./My Drive/the base+./My Drive/an adapter"
    config["models"][0]["model"] = config["pave"]["models"][0]["model"] = reference
    result = invoke(config, tmp_path / "out", "--lora-merge-cache", str(tmp_path / "merged ones"))
    assert result.exit_code == 0, (result.output, result.exception)
    purified = json.loads((tmp_path / "out" / "pave_report.json").read_text())["purified"]
    assert {row["model"] for row in purified} == {reference} and len(purified) == 3


def test_a_reference_with_an_architecture_or_an_adapter_is_written_whole():
    block = {"models": [{"model": {"model": "a b"}, "data": {"path": "x.jsonl"}}, {"model": "c", "purify": False}]}
    config = {
        "merge_method": "ties",
        "base_model": {"model": {"path": "the base", "revision": "v 1"}, "override_architecture": "LlamaForCausalLM"},
        "models": [{"model": {"model": "a b"}}, {"model": "c"}, {"model": "the model+the adapter@v2"}],
        "pave": block | {"models": [*block["models"], {"model": "the model+the adapter@v2", "purify": False}]},
    }
    config = MergeConfiguration.model_validate(config)
    assert MergeConfiguration.model_validate(yaml.safe_load(config.to_yaml())) == config
    assert MergeConfiguration.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize("spelling", ["./My Drive/tuned0/", "My Drive/tuned0", "./My Drive/../My Drive/tuned0"])
def test_two_spellings_of_one_folder(spelling, named, tmp_path):
    config = named("My Drive")
    config["pave"]["models"][0]["model"] = spelling
    result = invoke(config, tmp_path / "out")
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert f"{spelling} is not part of this merge" in result.output
    assert "it is called ./My Drive/tuned0 there, so call it the same here" in result.output
