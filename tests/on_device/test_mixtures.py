"""Mixtures of experts: how often the CPU waits for the device while each expert's inputs are measured."""

import pytest
import torch
import transformers
from models import make_model, save
from pretend_device import NAME, memory
from test_calibration import measurements
from test_experts import COMMON

from mergekit_pave.calibration.architecture import describe
from mergekit_pave.calibration.batches import Encoded
from mergekit_pave.calibration.job import Job, Runtime
from mergekit_pave.calibration.run import measure_in_lockstep


def job_for(folder, experts: int, batches: int) -> Job:
    """Batches with padding, and with tokens that do not count."""
    config = transformers.Qwen3MoeConfig(vocab_size=64, num_experts=experts, head_dim=8, **COMMON)
    save(make_model("Qwen3MoeForCausalLM", config), None, folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    ids = [torch.randint(3, 64, (40 + i % 3,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(4 * batches)]
    encoded = [Encoded(f"row {i}", {"input_ids": of}, list(range(0, len(of), 1 + i % 2))) for i, of in enumerate(ids)]
    return Job("model", str(folder), config, describe(config, str(folder), False), encoded, 4, {"model": "model", "tokens": 0})


def measured(job: Job, device: str) -> dict:
    found = measurements(measure_in_lockstep(job, Runtime(device, False, True), job.batch_size))
    return {layer: covariance.to(torch.device("cpu")) for layers, covariance in found for layer in layers}


@pytest.mark.parametrize("batches", [1, 3])
def test_more_experts_are_not_waited_for(tmp_path, batches):
    waits = {}
    for experts in (4, 32):
        before = memory.waits
        for _ in measure_in_lockstep(job_for(tmp_path / str(experts), experts, batches), Runtime(NAME, False, True), 4):
            pass
        waits[experts] = memory.waits - before
    assert waits[32] <= waits[4]


def test_each_expert_sees_what_it_sees_on_a_cpu(tmp_path):
    job = job_for(tmp_path / "model", experts=8, batches=2)
    there, here = measured(job, NAME), measured(job, "cpu")
    assert there.keys() == here.keys() and sum(".experts." in layer for layer in there) > 16
    for layer, covariance in here.items():
        assert there[layer].tokens == covariance.tokens
        assert (there[layer].matrix() - covariance.matrix()).norm() <= 1e-5 * covariance.matrix().norm(), layer
