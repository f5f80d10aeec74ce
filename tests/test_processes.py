"""`calibrate` in several processes where what comes before the calibration is not theirs to share: adapters, and errors."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner
from commands import in_two
from merging import config_for, forget_checkpoints, write_config

from mergekit_pave.cli import main

# Process 1 comes late, and finds what process 0 has begun to write.
_SLOW = """
import os, time
import peft
from mergekit_pave.plugin import phases
from mergekit_pave.cli import main
load, plan = peft.PeftModel.from_pretrained, phases.plan_merge
rank = int(os.environ["RANK"])

def slow_load(*args, **kwargs):
    time.sleep(3)
    return load(*args, **kwargs)

def late_plan(*args, **kwargs):
    time.sleep(rank)
    return plan(*args, **kwargs)

peft.PeftModel.from_pretrained, phases.plan_merge = slow_load, late_plan
main()
"""


def with_adapter(family, folder: Path) -> dict:
    """A config of one model that is an adapter on the base."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(family.base)
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(model, adapter).save_pretrained(folder / "lora")
    reference = f"{family.base}+{folder / 'lora'}"
    config = config_for(family, models=1)
    config["models"][0]["model"] = reference
    return config | {"pave": {"rank_ratio": 0.875, "models": [{"model": reference, "data": {"path": str(family.data[0])}}]}}


def test_one_process_merges_adapters_for_all(llama, tmp_path, cache):
    script = tmp_path / "slow.py"
    script.write_text(_SLOW)
    path = write_config(with_adapter(llama, tmp_path), tmp_path / "lora.yml")
    results = in_two("python", script, "calibrate", path, "--lora-merge-cache", tmp_path / "loras")
    out, err = ("".join(getattr(result, stream) for result in results) for stream in ("stdout", "stderr"))
    assert [result.returncode for result in results] == [0, 0], err
    assert out.count("3 weights ready") == 1 and err.count("merging the adapter into its model") == 1


@pytest.mark.parametrize(
    "change, told",
    [
        ({"pave": {"exclud": []}}, "did you mean 'exclude'"),
        ({"merge_method": "taskarithmetic"}, "did you mean 'task_arithmetic'?"),
    ],
)
def test_what_fails_before_the_calibration_ends_all_processes_with_one_message(llama, tmp_path, cache, change, told):
    config = config_for(llama, {})
    config = config | change | {"pave": config["pave"] | change.get("pave", {})}
    path = write_config(config, tmp_path / "wrong.yml")
    results = in_two("python", "-m", "mergekit_pave", "calibrate", path)
    assert all(result.returncode != 0 for result in results)
    err = "".join(result.stderr for result in results)
    assert err.count(told) == 1
    assert not [line for line in err.splitlines() if 'File "' in line and "mergekit_pave" in line]  # no traceback


def plan(config: dict, tmp_path: Path, *options: str):
    forget_checkpoints()
    return CliRunner().invoke(main, ["plan", str(write_config(config, tmp_path / "plan.yml")), "--json", *options])


def test_plan_says_that_it_merges_adapters(llama, tmp_path, cache, caplog):
    config, loras = with_adapter(llama, tmp_path), tmp_path / "loras"
    told = "merging the adapter into its model, which is written to"
    refused = plan(config, tmp_path)
    assert refused.exit_code == 1 and "say where to with --lora-merge-cache" in refused.output
    for expected in (1, 1):  # the second time it is there
        assert json.loads(plan(config, tmp_path, "--lora-merge-cache", str(loras)).stdout)["models"]
        assert caplog.text.count(told) == expected
    assert len(list(loras.iterdir())) == 1


def test_what_an_adapter_that_does_not_fit_leaves_is_not_taken_for_a_model(llama, tmp_path, cache):
    config, loras = with_adapter(llama, tmp_path), tmp_path / "loras"
    settings = tmp_path / "lora" / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"target_modules": ["elsewhere"]}))
    first, second = (plan(config, tmp_path, "--lora-merge-cache", str(loras)) for _ in range(2))
    for refused in (first, second):
        assert refused.exit_code == 1 and "elsewhere" in refused.stderr
    assert not list(loras.iterdir())
