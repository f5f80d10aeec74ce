"""Tools of mergekit that read a YAML and would ignore a `pave:` block: they refuse it, and work as ever without one."""

import pytest
import yaml
from click.testing import CliRunner
from commands import command, python
from mergekit.config import MergeConfiguration
from mergekit.evo.config import EvolMergeConfiguration
from mergekit.moe.config import MoEMergeConfig
from mergekit.scripts import bakllama, merge_raw_pytorch
from mergekit.scripts.bakllama import BakllamaConfig
from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig
from merging import config_for, entries, write_config
from reference import weights

from mergekit_pave.cli import main
from mergekit_pave.errors import PaveError

BLOCK = {"models": [{"model": "./a", "data": {"path": "a.jsonl"}}]}
MOE = {"base_model": "./a", "gate_mode": "random", "experts": [{"source_model": "./a"}, {"source_model": "./b"}]}
RAW = {"merge_method": "linear", "models": [{"model": "./a.safetensors"}, {"model": "./b.bin"}]}
SLICES = {"layer_slices": [{"model": "./a", "start": 0, "end": 2}]}
GENOME = {"models": ["./a", "./b"], "merge_method": "linear"}
EVOLVE = {"genome": GENOME, "tasks": [{"name": "arc"}]}

CONFIGS = {
    "mergekit-moe": (MoEMergeConfig, MOE),
    "mergekit-pytorch": (RawPyTorchMergeConfig, RAW),
    "bakllama": (BakllamaConfig, SLICES),
    "mergekit-evolve": (EvolMergeConfiguration, EVOLVE),
}


@pytest.mark.parametrize("tool", CONFIGS)
def test_a_block_is_refused(tool):
    model, config = CONFIGS[tool]
    with pytest.raises(PaveError) as told:
        model.model_validate(config | {"pave": BLOCK})
    message = told.value.message
    assert message.startswith(f"{tool} does not honour a `pave:` block, only mergekit-yaml, mergekit-multi and run_merge do")
    assert "\n" not in message
    plain = model.model_validate(config)
    assert plain == model.model_validate(config | {"pave": None})
    assert "pave" not in repr(plain) and "pave" not in plain.model_dump() and "pave" not in plain.model_dump_json()


def test_a_block_in_the_genome_is_refused_too():
    with pytest.raises(PaveError, match="mergekit-evolve does not honour"):
        EvolMergeConfiguration.model_validate(EVOLVE | {"genome": GENOME | {"pave": BLOCK}})


@pytest.mark.parametrize(("tool", "script"), [("mergekit-pytorch", merge_raw_pytorch), ("bakllama", bakllama)])
def test_the_command_fails_in_a_line_and_writes_nothing(tool, script, tmp_path):
    path = write_config(CONFIGS[tool][1] | {"pave": BLOCK}, tmp_path / "config.yml")
    done = CliRunner().invoke(script.main, [str(path), str(tmp_path / "out")])
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit)
    assert done.output.startswith(f"Error: {tool} does not honour") and len(done.output.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_real_mergekit_moe(tmp_path):
    path = write_config(MOE | {"pave": BLOCK}, tmp_path / "config.yml")
    done = command("mergekit-moe", path, tmp_path / "out")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "Error: mergekit-moe does not honour a `pave:` block" in done.stderr
    assert not (tmp_path / "out").exists()


def test_mergekit_pytorch_still_merges(llama, tmp_path):
    one, two = (weights(model) for model in llama.tuned[:2])
    models = [{"model": str(model / "model.safetensors"), "parameters": {"weight": 0.5}} for model in llama.tuned[:2]]
    path = write_config({"merge_method": "linear", "models": models}, tmp_path / "config.yml")
    done = CliRunner().invoke(merge_raw_pytorch.main, [str(path), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    written = weights(tmp_path / "out")
    assert written.keys() == one.keys()
    assert all((tensor - (one[name] + two[name]) / 2).norm() <= 1e-5 * tensor.norm() for name, tensor in written.items())


@pytest.mark.parametrize("target", ["moe.config", "scripts.merge_raw_pytorch", "scripts.bakllama", "evo.genome", "evo.config"])
def test_the_refusal_is_there_whatever_is_imported_first(target):
    name = {
        "moe.config": "MoEMergeConfig",
        "scripts.merge_raw_pytorch": "RawPyTorchMergeConfig",
        "scripts.bakllama": "BakllamaConfig",
        "evo.genome": "ModelGenomeDefinition",
        "evo.config": "EvolMergeConfiguration",
    }[target]
    done = python(f"from mergekit.{target} import {name} as C; print('pave' in C.model_fields)")
    assert done.stdout.strip() == "True", done.stderr


def test_a_module_can_still_be_run_by_its_name():
    done = command(
        "python", "-c", "import torch, runpy; runpy.run_module('mergekit.scripts.bakllama', run_name='x'); print('ran')"
    )
    assert done.stdout.strip() == "ran", done.stderr


@pytest.mark.parametrize("subcommand", ["plan", "calibrate", "report"])
@pytest.mark.parametrize("tool", CONFIGS)
def test_plan_says_what_kind_of_file_it_is(tool, subcommand, tmp_path):
    path = write_config(CONFIGS[tool][1] | {"pave": BLOCK}, tmp_path / "config.yml")
    done = CliRunner().invoke(main, [subcommand, str(path)])
    assert done.exit_code == 1
    line = done.output.splitlines()[-1]
    assert line.startswith(f"Error: {path} is a config for {tool}, which does not honour a `pave:` block")
    assert "mergekit-yaml" in line and "To purify, " in line


def test_files_named_like_weights_may_be_folders_of_models(llama, tmp_path):
    """A model's folder may end as a file of weights does."""
    folder = tmp_path / "model.pt"
    folder.symlink_to(llama.tuned[0])
    config = config_for(llama, {"models": [*entries(llama, 1), {"model": str(folder), "data": {"path": str(llama.data[1])}}]})
    config["models"][1]["model"] = str(folder)
    path = write_config(config, tmp_path / "config.yml")
    done = CliRunner().invoke(main, ["plan", str(path)])
    assert done.exit_code == 0, done.output
    assert MergeConfiguration.model_validate(yaml.safe_load(path.read_text())).pave is not None
