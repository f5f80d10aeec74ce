"""Merges on the pretend device: what is written is what the CPU writes, however a merge is told to use the device."""

import json
import queue
import time

import pytest
import torch
from mergekit import multigpu_executor
from merging import config_for, invoke, merge
from pretend_device import memory
from reference import weights
from safetensors import safe_open
from test_methods import METHODS, method_config

# How a merge may be told to use the device, and which devices that means.
USES = {
    "cuda": (("--cuda",), {"npu:0"}),
    "low_cpu_memory": (("--cuda", "--low-cpu-memory"), {"npu:0"}),
    "read_to_gpu": (("--cuda", "--read-to-gpu"), {"npu:0"}),
    "second": (("--device", "npu:1", "--low-cpu-memory", "--read-to-gpu"), {"npu:1"}),
    "multi_gpu": (("--cuda", "--multi-gpu"), {"npu:0", "npu:1"}),
    "gpu_rich": (("--gpu-rich",), {"npu:0", "npu:1"}),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A cache that the tests of this file share, so that all but one of them find it full."""
    return {"cache_dir": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture(scope="module")
def on_cpu(families, tmp_path_factory):
    """What a CPU alone makes of the config that most tests merge."""
    return merge(config_for(families["llama"], {}), tmp_path_factory.mktemp("cpu") / "out", device="cpu")


def assert_close(written: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], purified: int) -> None:
    """Purified weights are the same but for rounding: attention and decomposition have other kernels here. Others are equal."""
    assert written.keys() == expected.keys()
    different = {name for name, tensor in written.items() if not torch.equal(tensor, expected[name])}
    assert len(different) <= purified
    for name in different:
        assert (written[name] - expected[name]).norm() < 2e-6 * expected[name].norm(), name


@pytest.mark.parametrize("use", USES)
def test_every_way_to_use_it(llama, tmp_path, cache, on_cpu, use):
    options, devices = USES[use]
    for run in ("cold", "warm"):
        memory.devices.clear()
        result = invoke(config_for(llama, {}), tmp_path / run, "--quiet", *options)
        assert result.exit_code == 0, (run, result.output, result.exception)
        assert memory.devices == devices, run
    report = json.loads((tmp_path / "cold" / "pave_report.json").read_text())
    assert_close(weights(tmp_path / "cold"), on_cpu, len(report["purified"]) // 2)
    for name, tensor in weights(tmp_path / "warm").items():
        assert torch.equal(tensor, weights(tmp_path / "cold")[name]), name


@pytest.mark.parametrize("method", [*METHODS, "regmean", "tsv"])
def test_methods(llama, tmp_path, measured, method):
    """With the same decompositions every method gives the same numbers, bit for bit, but for those that decompose themselves."""
    if method in METHODS:
        config = method_config(llama, method, measured)
    else:
        config = config_for(llama, measured, models=3, merge_method=method)
    on_device = merge(config, tmp_path / "device", device="npu", random_seed=1)
    assert memory.allocations
    on_cpu = merge(config, tmp_path / "cpu", device="cpu", random_seed=1)
    if method == "tsv":
        assert_close(on_device, on_cpu, len(on_cpu))
        return
    assert all(torch.equal(tensor, on_device[name]) for name, tensor in on_cpu.items())


@pytest.mark.parametrize("options", [{}, {"low_cpu_memory": True, "read_to_gpu": True}, {"multi_gpu": True}], ids=str)
def test_emr(llama, tmp_path, measured, options):
    """Masks are those of the CPU, and so are scales, in whatever order tensors are merged."""
    config = config_for(llama, measured, models=3, merge_method="emr")
    config["models"] = [{"model": entry["model"]} for entry in config["models"]]
    expected = merge(config, tmp_path / "cpu", device="cpu")
    before = memory.allocations
    found = merge(config, tmp_path / "device", device="npu", **options)
    assert memory.allocations > before
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    for name in ("tuned0", "tuned1", "tuned2"):
        ours, theirs = (tmp_path / out / "emr" / f"{name}.safetensors" for out in ("device", "cpu"))
        with safe_open(ours, "pt") as a, safe_open(theirs, "pt") as b:
            assert float(a.metadata()["scale"]) == pytest.approx(float(b.metadata()["scale"]), rel=1e-12)
            assert a.keys() == b.keys()
            assert all(torch.equal(a.get_tensor(key), b.get_tensor(key)) for key in a.keys())  # noqa: SIM118


def test_no_result_of_several_devices_is_lost(llama, tmp_path, measured, monkeypatch):
    """Though they are taken more slowly than they come."""

    class SlowQueue(queue.Queue):
        def get(self, *args, **kwargs):
            item = super().get(*args, **kwargs)
            time.sleep(0.005)
            return item

    monkeypatch.setattr(multigpu_executor.queue, "Queue", SlowQueue)
    written = merge(config_for(llama, measured), tmp_path / "several", device="npu", multi_gpu=True)
    monkeypatch.undo()
    expected = merge(config_for(llama, measured), tmp_path / "one", device="npu")
    assert all(torch.equal(tensor, written[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("options", [{}, {"low_cpu_memory": True, "read_to_gpu": True}, {"multi_gpu": True}], ids=str)
def test_refining(llama, tmp_path, cache, options):
    """With a head that is fitted, and embeddings merged by token counts."""
    config = config_for(llama, {"purify": False, "refine": True})
    expected = merge(config, tmp_path / "cpu", device="cpu")
    before = memory.allocations
    found = merge(config, tmp_path / "device", device="npu", **options)
    assert memory.allocations > before
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= 1e-4 * (tensor - weights(llama.base)[name]).norm() + 1e-6 * tensor.norm(), name


def test_low_cpu_memory_moves_every_tensor_once(llama, tmp_path, cache):
    """Inputs and tails go to the device, and what is written comes back; otherwise values make the way at every step."""
    config = config_for(llama, {})
    assert invoke(config, tmp_path / "cold", "--cuda", "--quiet").exit_code == 0
    written = sum(tensor.nbytes for tensor in weights(tmp_path / "cold").values())
    tails = sum(file.stat().st_size for file in cache.rglob("tail-*.safetensors"))
    moved = {}
    for options in ((), ("--low-cpu-memory",)):
        before = memory.moved
        assert invoke(config, tmp_path / "warm", "--cuda", "--quiet", *options).exit_code == 0
        moved[options] = memory.moved - before
    # Three models and their tails go there, and one model comes back.
    assert moved["--low-cpu-memory",] <= 4 * written + tails < moved[()]
