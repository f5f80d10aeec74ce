"""Every config under `examples/`, unchanged, planned and merged on tiny models and data of the same names."""

import importlib.util
import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.scripts import multimerge, run_yaml
from merging import forget_checkpoints
from reference import weights
from standins import make_standin, make_standins

from mergekit_pave.cli import main

EXAMPLES = Path(__file__).parents[1] / "examples"
CONFIGS = sorted(EXAMPLES.glob("*.yml"))


def run(command, *arguments):
    forget_checkpoints()
    result = CliRunner().invoke(command, list(map(str, arguments)))
    assert result.exit_code == 0, (result.output[-2000:], result.exception)
    return result.stdout


def backbones(*arguments: str) -> None:
    """`examples/backbones.py`, in process."""
    spec = importlib.util.spec_from_file_location("backbones", EXAMPLES / "backbones.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(*arguments)


def prepare(path: Path) -> None:
    """Do what the comment at the top says has to be done once, on stand-ins for the models that it names."""
    comment = "".join(line[1:] for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    for written in re.findall(r"python examples/backbones\.py ((?:\\\n|.)*)", comment):
        cls, base, folder, *models = subprocess.check_output(["bash", "-c", f"echo {written}"], text=True).split()
        for name in (base, *models):
            make_standin(name)
        backbones(cls, base, folder, *models)


def test_there_are_examples():
    assert len(CONFIGS) >= 8


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_example(path, tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.repo_exists", lambda *args, **kwargs: True)  # mergekit asks for its card
    prepare(path)
    steps = list(yaml.safe_load_all(path.read_text()))
    options = re.findall(r"--lora-merge-cache \S+", path.read_text())
    options = ["--quiet", *(word for option in options for word in option.split())]
    for step in steps:
        make_standins(step)
    if len(steps) > 1:
        run(multimerge.main, path, "-I", "steps", "--out-path", "merged", *options)
        out = Path("steps", steps[0]["name"])
    else:
        planned = json.loads(run(main, "plan", path, "--json", *options))
        assert planned["models"].keys() == {entry["model"] for entry in steps[0]["pave"]["models"]}
        purifies = steps[0]["pave"].get("purify", True)
        assert all(bool(model["purified"]) == purifies and model["tokens"] for model in planned["models"].values())
        run(run_yaml.main, path, "merged", *options)
        out = Path("merged")
    report = json.loads((out / "pave_report.json").read_text())
    if "refine" in steps[0]["pave"]:
        assert report["refined"]["layers"]
    else:
        assert {row["model"] for row in report["purified"]} == {entry["model"] for entry in steps[0]["pave"]["models"]}
        assert any(row["kept"] < row["components"] for row in report["purified"])
    assert weights(Path("merged")) and all(tensor.isfinite().all() for tensor in weights(Path("merged")).values())
    assert "### PAVE" in (out / "README.md").read_text()


def test_backbones_under_the_head_of_the_base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["FacebookAI/roberta-base", "JeremiahZ/roberta-base-cola"]
    for name in names:
        make_standin(name)
    backbones("RobertaForMaskedLM", names[0], "glue", names[1])
    made, base, tuned = weights(Path("glue/roberta-base-cola")), weights(Path(names[0])), weights(Path(names[1]))
    assert made.keys() == base.keys()
    for name, tensor in made.items():
        assert torch.equal(tensor, base[name] if name.startswith("lm_head") else tuned[name]), name
    make_standin("meta-llama/Llama-2-7b-hf")
    with pytest.raises(SystemExit, match="Llama-2-7b-hf has no roberta"):
        backbones("RobertaForMaskedLM", names[0], "glue", "meta-llama/Llama-2-7b-hf")
