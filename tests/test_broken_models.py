"""Devices and models that cannot be used: a line that says which, and what to do, before anything is planned or written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from merging import config_for, forget_checkpoints, invoke, write_config

from mergekit_pave.cli import main

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9085698\n"


def settings(**changes):
    def change(folder: Path) -> None:
        path = folder / "config.json"
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return change


def text(name: str, content: str):
    return lambda folder: (folder / name).write_text(content)


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def cut_in_the_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def sharded(index: str, shard: str | None = None):
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(index)
        if shard is not None:
            (folder / "model-00001-of-00001.safetensors").write_text(shard)

    return change


def emptied(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


INDEX = json.dumps({"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}})
MODELS = {
    "no architectures": (settings(architectures=None), "`architectures` in its config.json names no class"),
    "empty architectures": (settings(architectures=[]), "names no class"),
    "two architectures": (settings(architectures=["LlamaForCausalLM", "LlamaModel"]), "does not name one class"),
    "architectures is a string": (settings(architectures="LlamaForCausalLM"), "`architectures`"),
    "architecture of another kind": (settings(architectures=["GPT2LMHeadModel"]), "allow-crimes"),
    "unknown model type": (settings(model_type="no-such-type"), "no-such-type"),
    "no model type": (settings(model_type=None), "config.json"),
    "no config.json": (lambda folder: (folder / "config.json").unlink(), "there is no config.json in "),
    "broken config.json": (text("config.json", '{"model_type": '), "config.json is not valid JSON"),
    "a list for a config.json": (text("config.json", "[1]"), "config.json does not contain a JSON object"),
    "config.json a pointer": (text("config.json", POINTER), "config.json is a pointer of Git LFS"),
    "a size that is none": (settings(hidden_size="many"), "config.json"),
    "pointer": (text("model.safetensors", POINTER), "model.safetensors is a pointer of Git LFS, not the file itself"),
    "pointer of a shard": (sharded(INDEX, POINTER), "00001.safetensors is a pointer of Git LFS"),
    "pointer of .bin": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin").write_text(POINTER),
        "pytorch_model.bin is a pointer of Git LFS",
    ),
    "cut": (cut, "model.safetensors"),
    "cut in the header": (cut_in_the_header, "cannot be read"),
    "cut shard": (
        lambda folder: (sharded(INDEX)(folder), text("model-00001-of-00001.safetensors", "x" * 20)(folder)),
        "00001-of",
    ),
    "no weights file": (text("model.safetensors", ""), "cannot be read"),
    "garbage .bin": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin").write_text("garbage"),
        "cannot be read",
    ),
    "index no JSON": (sharded('{"weight_map":'), "index.json is not valid JSON"),
    "index without a map": (sharded("{}"), "index.json has no weight_map"),
    "index with another map": (sharded('{"weight_map": ["a"]}'), "index.json has no weight_map"),
    "index a list": (sharded("[]"), "index.json does not contain a JSON object"),
    "shard missing": (sharded(INDEX.replace("00001.", "00002.")), "00002.safetensors is not there"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "there are no weights in "),
    "empty": (emptied, "there is no config.json in "),
}


def assert_a_line(result, out: Path, *words: str) -> None:
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), (result.exception, result.output)
    message = result.output[result.output.index("Error: ") :].strip()
    assert "\n" not in message and "Traceback" not in result.output
    for word in words:
        assert word in message
    assert not out.exists()


def test_a_class_that_nobody_has(llama, tmp_path, cache):
    folder = shutil.copytree(llama.tuned[0], tmp_path / "broken")
    settings(architectures=["NoSuchForCausalLM"])(folder)
    config = json.loads(json.dumps(config_for(llama, {})).replace(str(llama.tuned[0]), str(folder)))
    assert_a_line(invoke(config, tmp_path / "out"), tmp_path / "out", str(folder), "no architecture NoSuchForCausalLM")


def test_a_file_for_a_folder(llama, tmp_path, cache):
    (tmp_path / "base").write_text("")
    config = config_for(llama, {}) | {"base_model": str(tmp_path / "base")}
    assert_a_line(invoke(config, tmp_path / "out"), tmp_path / "out", "base is a file; name the folder")


@pytest.mark.parametrize("which", ["base", "tuned"])
@pytest.mark.parametrize("spoil, told", MODELS.values(), ids=MODELS)
def test_models(spoil, told, which, llama, tmp_path, cache):
    folder = shutil.copytree(llama.base if which == "base" else llama.tuned[0], tmp_path / "broken")
    spoil(folder)
    config = config_for(llama, {})
    config_with = json.loads(json.dumps(config).replace(str(llama.base if which == "base" else llama.tuned[0]), str(folder)))
    path = str(write_config(config_with, tmp_path / "config.yml"))
    forget_checkpoints()
    assert_a_line(CliRunner().invoke(main, ["plan", path]), tmp_path / "out", told)
    assert_a_line(invoke(config_with, tmp_path / "out"), tmp_path / "out", told)
    assert not cache.exists()


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "MistralForCausalLM", "BertModel", "LlamaConfig", "NoSuchForCausalLM"])
def test_an_override_of_another_class(name, llama, tmp_path, cache):
    config = config_for(llama, {})
    for entry in (config["models"][0], config["pave"]["models"][0]):
        entry["model"] = {"model": {"path": entry["model"]}, "override_architecture": name}
    path = str(write_config(config, tmp_path / "config.yml"))
    for options in ([], ["--allow-crimes"]):
        forget_checkpoints()
        assert_a_line(CliRunner().invoke(main, ["plan", path, *options]), tmp_path / "out")
        assert_a_line(invoke(config, tmp_path / "out", *options), tmp_path / "out")


DEVICES = {
    "--device gpu": "the device 'gpu' cannot be used here",
    "--device cuda:77": "the device 'cuda:77' cannot be used here",
    "--device meta": "the device 'meta' cannot be used here",
    "--device cpu:x": "the device 'cpu:x' cannot be used here",
}
if not torch.cuda.is_available():
    DEVICES |= {"--cuda": "the device 'cuda' cannot be used here", "--gpu-rich": "the device 'cuda' cannot be used here"}
if not torch.accelerator.is_available():
    DEVICES |= {"--multi-gpu": "--multi-gpu needs an accelerator"}


@pytest.mark.parametrize("options, told", DEVICES.items())
def test_devices(options, told, llama, tmp_path, cache):
    path = str(write_config(config_for(llama, {}), tmp_path / "config.yml"))
    for command in (["plan", path], ["calibrate", path]):
        assert_a_line(CliRunner().invoke(main, [*command, *options.split()]), tmp_path / "out", told)
    assert_a_line(invoke(config_for(llama, {}), tmp_path / "out", *options.split()), tmp_path / "out", told)


@pytest.mark.parametrize(
    "files, told",
    [
        (None, "there is no adapter at "),
        ({}, "there is no adapter_config.json in "),
        ({"adapter_config.json": "{"}, "adapter_config.json is not valid JSON"),
        ({"adapter_config.json": "{}"}, "there are no weights in "),
        (
            {"adapter_config.json": "{}", "adapter_model.safetensors": POINTER},
            "adapter_model.safetensors is a pointer of Git LFS",
        ),
    ],
)
def test_adapters(files, told, llama, tmp_path, cache):
    if files is not None:
        (tmp_path / "adapter").mkdir()
    for name, content in (files or {}).items():
        (tmp_path / "adapter" / name).write_text(content)
    config = config_for(llama, {})
    reference = f"{llama.base}+{tmp_path / 'adapter'}"
    config["models"][0]["model"] = config["pave"]["models"][0]["model"] = reference
    result = invoke(config, tmp_path / "out", "--lora-merge-cache", str(tmp_path / "loras"))
    assert_a_line(result, tmp_path / "out", str(tmp_path / "adapter"), told)
    assert not (tmp_path / "loras").exists()


def test_without_a_block_mergekit_says_what_it_says(llama, tmp_path):
    """In a process that has seen a block, too."""
    folder = shutil.copytree(llama.tuned[0], tmp_path / "broken")
    settings(architectures=None)(folder)
    config = json.loads(json.dumps(config_for(llama)).replace(str(llama.tuned[0]), str(folder)))
    MergeConfiguration.model_validate(config_for(llama, {}))
    forget_checkpoints()
    with pytest.raises(TypeError):
        run_merge(MergeConfiguration.model_validate(config), str(tmp_path / "out"), MergeOptions(quiet=True))
    assert LoaderCache().loaders == {}
