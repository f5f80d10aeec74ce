"""EMR-Merging on the pretend device: masks and models are those of the CPU, bit for bit."""

import pytest
import torch
from merging import invoke
from pretend_device import memory

from mergekit_pave import load_task


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_on_the_device_becomes_another(llama, tmp_path, dtype):
    config = {"merge_method": "emr", "base_model": str(llama.base), "dtype": dtype}
    config["models"] = [{"model": str(model)} for model in llama.tuned]
    for options in ((), ("--cuda",)):
        out = tmp_path / f"out{len(options)}"
        assert invoke(config, out, "--quiet", *options).exit_code == 0
    names = [f"{model.name}.safetensors" for model in llama.tuned]
    for name in ("model.safetensors", *(f"emr/{name}" for name in names)):
        assert (tmp_path / "out0" / name).stat().st_size == (tmp_path / "out1" / name).stat().st_size
    wanted = load_task(tmp_path / "out0", "tuned2").state_dict()
    model = load_task(tmp_path / "out1", "tuned0").to("npu:0")
    memory.devices.clear()
    load_task(tmp_path / "out1", "tuned2", into=model)
    assert memory.devices == {"npu:0"} and {str(parameter.device) for parameter in model.parameters()} == {"npu:0"}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.cpu(), wanted[name]), name
