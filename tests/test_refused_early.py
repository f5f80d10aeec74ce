"""What mergekit finds out only while it merges is refused before calibration, by `plan` and by the merge alike."""

import dataclasses
import json
import logging
import re
import shutil

import pytest
import torch
import transformers
from click.testing import CliRunner
from mergekit.tokenizer import PermutedVocabulary
from merging import config_for, forget_checkpoints, invoke, merge, write_config
from reference import weights
from safetensors.torch import load_file, save_file

from mergekit_pave.cli import main

LAST = "model.layers.2.mlp.up_proj.weight"


def refused(config: dict, folder, cache) -> str:
    """The one line that `plan`, `calibrate` and a merge say, before anything is done."""
    path, out = write_config(config, folder / "config.yml"), folder / "out"
    told = set()
    for command in ("plan", "calibrate"):
        forget_checkpoints()
        done = CliRunner().invoke(main, [command, str(path)])
        assert done.exit_code == 1, done.output
        told.add(done.stderr.splitlines()[-1])
    done = invoke(config, out)
    assert done.exit_code == 1, done.output
    told.add(done.stderr.splitlines()[-1])
    assert not out.exists() and not list(cache.rglob("manifest.json"))
    (line,) = told
    assert line.startswith("Error: ")
    return line


def changed(family, folder, change):
    """The family with another first fine-tune; `change` is given its folder."""
    copy = folder / "changed"
    shutil.copytree(family.tuned[0], copy)
    change(copy)
    return dataclasses.replace(family, tuned=(copy, *family.tuned[1:]))


def test_data_that_are_not_there_are_refused_before_a_model_writes(llama, tmp_path, cache):
    config = config_for(llama, {"calibration": {"samples": 2, "max_length": 16}})
    config["pave"]["models"][0]["data"], config["pave"]["models"][1]["data"] = "generated", {"path": "./missing.jsonl"}
    assert "missing.jsonl" in refused(config, tmp_path, cache)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("tune", "--set", "lamda=1"), "--set lamda: unknown key"),
        (("score", "empty"), "there is no config.json in empty"),
        (("score", "--card", "merged"), "has no README.md to put the scores into"),
    ],
)
def test_mistakes_of_the_command_line_are_told_before_data_are_read(llama, tmp_path, cache, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    shutil.copytree(llama.base, tmp_path / "merged")
    config = config_for(llama, {})
    config["pave"]["models"][0]["data"] = {"path": "./missing.jsonl"}
    done = CliRunner().invoke(main, [words[0], str(write_config(config, tmp_path / "config.yml")), *words[1:]])
    assert done.exit_code == 1 and told in " ".join(done.stderr.split()), done.output


def test_a_tensor_that_is_not_there(llama, tmp_path, cache):
    def remove(folder):
        tensors = {name: tensor for name, tensor in weights(folder).items() if name != LAST}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    family = changed(llama, tmp_path, remove)
    told = refused(config_for(family, {}), tmp_path, cache)
    assert f"{family.tuned[0]}: the merge needs {LAST}, but its checkpoint has none of such a name." in told
    assert "LlamaForCausalLM" in told


def test_a_tensor_that_an_index_promises(llama, tmp_path, cache):
    def break_shard(folder):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="80KB")
        file = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][LAST]
        tensors = load_file(file)
        del tensors[LAST]
        save_file(tensors, file, {"format": "pt"})

    told = refused(config_for(changed(llama, tmp_path, break_shard), {}), tmp_path, cache)
    assert f"the merge needs {LAST}, which its index places in model-0" in told
    assert ".safetensors, where it is not; fetch the checkpoint again" in told


@pytest.mark.parametrize(("start", "end"), [(1, 4), (2, 2), (2, 1)])
def test_layers_that_are_not_there(llama, tmp_path, cache, start, end):
    config = config_for(llama, {})
    sources = [{"model": entry["model"], "layer_range": [start, end]} for entry in config.pop("models")]
    config["slices"] = [{"sources": sources}]
    config["parameters"] = {"weight": 0.5}
    told = refused(config, tmp_path, cache)
    assert f"slices: layer_range [{start}, {end}] of {llama.tuned[0]} does not fit. The model has 3 layers" in told


def tokens_from(model: str, token: str) -> dict:
    return {"source": "union", "tokens": {"<new>": {"source": {"kind": "model_token", "model": model, "token": token}}}}


SETTINGS = {
    "dtype": ({"dtype": "bfloat"}, "dtype: 'bfloat' is not a precision to merge in; use bfloat16"),
    "integers": ({"dtype": "int64"}, "dtype: 'int64' is not a precision to merge in"),
    "out_dtype": ({"out_dtype": "half"}, "out_dtype: 'half' is not a precision to merge in"),
    "epsilon": (
        {"merge_method": "della", "parameters": {"density": 0.05, "epsilon": 0.5}},
        "della: mergekit cannot merge .* with the parameters of the config",
    ),
    "tokenizer": ({"tokenizer": {"source": "./nowhere"}}, r"tokenizer: mergekit cannot make the output's tokenizer .*nowhere"),
    "tokenizer_source": ({"tokenizer_source": "./nowhere"}, r"tokenizer: mergekit cannot make .*nowhere"),
    "a token's model": ({"tokenizer": tokens_from("./nowhere", "<s>")}, "tokenizer: mergekit cannot make .*nowhere"),
    "a model's token": ({"tokenizer": tokens_from("base", "<nothing>")}, "tokenizer: mergekit cannot make .*<nothing>"),
    "chat_template": (
        {"chat_template": "chatmll"},
        "chat_template: 'chatmll' is neither a Jinja template nor the name of one that mergekit has",
    ),
    "a weight": ({"parameters": {"lambda": float("nan")}}, "task_arithmetic: mergekit cannot merge .*the result is not finite"),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_that_are_looked_at_late(llama, tmp_path, cache, setting):
    more, words = SETTINGS[setting]
    config = config_for(llama, {}) | more
    if setting == "a model's token":
        config["tokenizer"]["tokens"]["<new>"]["source"]["model"] = str(llama.base)
    if setting == "epsilon":
        for entry in config["models"]:
            entry["parameters"] = {"weight": 0.5}
    assert re.search(words, refused(config, tmp_path, cache))


@pytest.mark.parametrize("method", ["dare_ties", "della"])
def test_a_seed_means_what_it_did(llama, tmp_path, cache, method):
    """Trying out a method that draws random numbers leaves those of the merge alone."""
    config = config_for(llama, {"exclude": ["mlp"]}, merge_method=method)
    config["parameters"] = {"density": 0.5} | ({"epsilon": 0.1} if method == "della" else {})
    plain = {key: value for key, value in config.items() if key != "pave"}
    before = merge(plain, tmp_path / "plain", random_seed=7)
    other = merge(plain, tmp_path / "other", random_seed=8)
    written = merge(config, tmp_path / "out", random_seed=7)
    left = [name for name in before if "mlp" in name]
    assert not any(torch.equal(before[name], other[name]) for name in left), "or the seed means nothing"
    assert all(torch.equal(before[name], written[name]) for name in left)


def test_trying_the_tokenizer_logs_nothing_and_takes_each_vocabulary_once(llama, tmp_path, cache, monkeypatch, caplog):
    """mergekit logs by the root logger, too. Embedding and head have the same vocabulary."""
    execute, calls = PermutedVocabulary.execute, []

    def logging_execute(self, **inputs):
        calls.append(inputs)
        logging.warning("said by the root logger")
        return execute(self, **inputs)

    monkeypatch.setattr(PermutedVocabulary, "execute", logging_execute)
    config = config_for(llama, {}) | {"tokenizer": {"source": "union", "pad_to_multiple_of": 7}}  # else nothing changes
    forget_checkpoints()
    planned = CliRunner().invoke(main, ["plan", str(write_config(config, tmp_path / "config.yml"))])
    assert planned.exit_code == 0, planned.output
    assert len(calls) == 1 and "said by the root logger" not in caplog.text
    merge(config, tmp_path / "out")
    assert len(calls) == 1 + 1 + 2 and caplog.text.count("said by the root logger") == 2
