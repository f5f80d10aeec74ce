"""Models whose configuration speaks of quantisation: refused where the weights are quantised, and only there."""

import dataclasses
import json
import shutil

import pytest
import torch
from merging import config_for, invoke, merge
from safetensors.torch import load_file, save_file

from mergekit_pave.calibration import run
from mergekit_pave.calibration.weights import UnknownWeightError

# As merging QLoRA leaves it behind.
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "_load_in_4bit": True}


@pytest.fixture
def family(llama, tmp_path):
    """The models, the fine-tunes of them with a configuration that tells of 4 bits."""
    tuned = tuple(shutil.copytree(folder, tmp_path / folder.name) for folder in llama.tuned)
    for folder in tuned:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | {"quantization_config": NF4}))
    return dataclasses.replace(llama, tuned=tuned)


@pytest.mark.parametrize("blocks", [True, False], ids=["block by block", "whole"])
def test_what_merging_qlora_leaves_behind_does_not_matter(blocks, family, llama, tmp_path, cache, monkeypatch):
    expected = merge(config_for(llama, {"cache_dir": str(tmp_path / "other")}), tmp_path / "expected")
    if not blocks:

        def refuse(*_):
            raise UnknownWeightError("whole, please")

        monkeypatch.setattr(run, "StreamedModel", refuse)
    written = merge(config_for(family, {}), tmp_path / "out")
    assert written.keys() == expected.keys()
    for name, weight in expected.items():
        assert (written[name] - weight).norm() <= 1e-5 * weight.norm(), name


WEIGHT = "model.layers.1.mlp.up_proj.weight"
LAYER = WEIGHT.removesuffix("weight")


def int8(tensors):
    tensors[WEIGHT] = tensors[WEIGHT].to(torch.int8)
    tensors[f"{LAYER}SCB"] = torch.ones(112)


def nf4(tensors):
    tensors[WEIGHT] = torch.zeros(112 * 48 // 2, 1, dtype=torch.uint8)
    tensors[f"{WEIGHT}.absmax"] = torch.zeros(84, dtype=torch.uint8)


def fp8(tensors):
    tensors[WEIGHT] = tensors[WEIGHT].to(torch.float8_e4m3fn)
    tensors[f"{WEIGHT}_scale_inv"] = torch.ones(1, 1)


def gptq(tensors):
    del tensors[WEIGHT]
    tensors |= {f"{LAYER}qweight": torch.zeros(6, 112, dtype=torch.int32), f"{LAYER}scales": torch.ones(1, 112).half()}


def fake(tensors):
    """What a quantised layer would multiply with, beside weights that are whole."""
    tensors[f"{LAYER}weight_scale"] = torch.ones(1)


@pytest.mark.parametrize("quantise", [int8, nf4, fp8, gptq, fake])
def test_quantised_weights_are_refused(quantise, family, tmp_path, cache):
    path = family.tuned[1] / "model.safetensors"
    tensors = load_file(path)
    quantise(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    result = invoke(config_for(family, {}), tmp_path / "out")
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.exception
    assert f"{family.tuned[1]}" in result.output
    assert not cache.exists() and not (tmp_path / "out").exists()
    if quantise not in (nf4, gptq):  # sizes and names are looked at first
        assert "is quantised" in result.output and "purify: false" in result.output
