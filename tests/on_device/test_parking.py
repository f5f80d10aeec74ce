"""Hidden states that would fill the device wait in main memory, and nothing else changes."""

import math

import pretend_device
import pytest
import torch
from merging import config_for, merge
from pretend_device import NAME, memory
from test_calibration_memory import job_for, lengths
from test_score import averaged, score, scored_config, with_more_rows

from mergekit_pave.calibration.job import Job, Runtime
from mergekit_pave.calibration.parking import Parking, room_on
from mergekit_pave.calibration.run import measure_in_lockstep


@pytest.fixture
def free(monkeypatch):
    """Sets how many bytes of the device are said to be free."""
    return lambda size: monkeypatch.setattr(pretend_device._Module, "mem_get_info", lambda device=None: (size, size))


def measured(job: Job) -> tuple[dict[str, torch.Tensor], int, int]:
    """The second moments, the device's peak, and what was moved."""
    memory.reset()
    before, found = memory.used, {}
    for _, of_block in measure_in_lockstep(job, Runtime(NAME, False, True), job.batch_size):
        for layers, covariance in of_block:
            found |= dict.fromkeys(layers, covariance.to(torch.device("cpu")).matrix())
        of_block = covariance = None  # or they would be in memory while the next block runs
    return found, memory.peak - before, memory.moved


@pytest.mark.parametrize("cls", ["LlamaForCausalLM", "BertModel", "T5ForConditionalGeneration"])
def test_calibration_gives_the_same_and_takes_less(tmp_path, cls, free):
    job = job_for(cls, tmp_path / "model", lengths(40, 60, 120), batch_size=2)
    hidden = job.estimate("cpu").hidden
    expected, whole, moved = measured(job)
    free(0)
    found, least, moved_all = measured(job)
    free(2 * hidden)  # room for half of them
    found_too, some, moved_some = measured(job)
    for matrices in (found, found_too):
        assert matrices.keys() == expected.keys()
        assert all(torch.equal(matrix, expected[layer]) for layer, matrix in matrices.items())
    assert least < some <= whole
    if not job.config.is_encoder_decoder:  # what a decoder sees of its encoder stays
        assert least < whole - 0.8 * hidden and whole - 0.6 * hidden < some < whole - 0.3 * hidden
    assert moved <= moved_some < moved_all


def test_the_estimate_knows(tmp_path, free):
    job = job_for("LlamaForCausalLM", tmp_path / "model", lengths(24, 60, 120), batch_size=2)
    free(job.estimate("cpu").hidden)
    assert job.estimate(NAME).hidden == job.estimate("cpu").hidden // 4
    assert 1 / 1.3 < job.estimate(NAME).peak / measured(job)[1] < 1.3


def test_the_room(free):
    assert room_on("cpu") == room_on(NAME) == math.inf
    free(1000)
    assert room_on("cpu") == math.inf and room_on(NAME) == room_on("npu:1") == 250


def test_scoring(families, tmp_path, free):
    family = with_more_rows(families["llama"])
    merged = averaged(family, tmp_path / "merged")
    (expected,) = score(scored_config(family, tmp_path / "cache"), merged)
    free(0)
    before = memory.moved
    (found,) = score(scored_config(family, tmp_path / "cache_too"), merged)
    assert found["models"] == expected["models"] and memory.moved > before


def test_refining_looks_at_all_of_them(llama, tmp_path, cache, free):
    config = config_for(llama, {"purify": False, "refine": True})
    expected = merge(config, tmp_path / "expected", device=NAME)
    free(0)
    config["pave"]["cache_dir"] = str(tmp_path / "another")
    found = merge(config, tmp_path / "found", device=NAME)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_what_is_not_a_batchs_own_stays(free):
    free(0)
    model = torch.nn.BatchNorm1d(4, device=NAME)
    others = torch.zeros(3, 4, device=NAME)
    for x in (model.weight, model.running_mean, others[0], torch.zeros(2, 4), None):
        values = x.tolist() if x is not None else None
        go_on = Parking(model).leave(x)
        assert x is None or x.tolist() == values
        go_on()
    own = others + 1
    view = own.mT
    go_on = Parking(model).leave(own)
    assert own.shape == (0,) and view.tolist() == torch.ones(4, 3).tolist()
    go_on()
    assert own.tolist() == torch.ones(3, 4).tolist()
