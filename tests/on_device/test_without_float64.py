"""A device without float64, as Apple's and some of Intel's: sums, decompositions and closed forms are computed on the CPU."""

import json
import logging

import pytest
import torch
from click.testing import CliRunner
from merging import TOLERANCE, config_for, merge, write_config
from pretend_device import memory
from reference import weights
from test_experts import family_of  # noqa: F401
from test_in_memory import batches_of, load

from mergekit_pave import Covariance, purify, purify_model
from mergekit_pave.cli import main
from mergekit_pave.core import exact

OPTIONS = {
    "plain": {},
    "all on the device": {"low_cpu_memory": True, "read_to_gpu": True},
    "two devices": {"multi_gpu": True},
}


@pytest.fixture(autouse=True)
def without_float64():
    exact.float64_device.cache_clear()
    memory.has_float64 = False
    yield
    exact.float64_device.cache_clear()


def assert_as_on_a_cpu(config, tmp_path, plain=None, **options):
    """Cold and warm, with an error far below what purification removes of `plain`."""
    plain = plain or merge({key: value for key, value in config.items() if key != "pave"}, tmp_path / "plain", device="cpu")
    expected = merge(config, tmp_path / "cpu", device="cpu")
    for place in ("cold", "warm"):
        found = merge(config, tmp_path / place, **options)
        for name, tensor in expected.items():
            removed = (tensor - plain[name]).norm()
            assert (found[name] - tensor).norm() <= max(TOLERANCE * removed, 1e-6 * tensor.norm()), (place, name)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_merges(llama, tmp_path, cache, options, caplog):
    with caplog.at_level(logging.INFO, "mergekit_pave"):
        assert_as_on_a_cpu(config_for(llama, {"allocation": "spectral"}), tmp_path, **options)
    told = [record.message for record in caplog.records if "has no float64" in record.message]
    assert told and len(told) == len(set(told))


@pytest.mark.parametrize(
    "config", [{"merge_method": "regmean", "parameters": {"covariance": 1.0}}, {"merge_method": "tsv"}], ids=["regmean", "tsv"]
)
def test_closed_forms(llama, tmp_path, cache, config):
    assert_as_on_a_cpu(config_for(llama, {}, **config), tmp_path, plain=weights(llama.base), low_cpu_memory=True)


def test_refining(llama, tmp_path, cache):
    config = config_for(llama, {"purify": False, "refine": True})
    assert_as_on_a_cpu(config, tmp_path, plain=weights(llama.base), low_cpu_memory=True)


def test_experts(family_of, tmp_path, cache):  # noqa: F811
    assert_as_on_a_cpu(config_for(family_of("mixtral"), {"calibration": {"min_tokens": 1}}), tmp_path)


def test_plan_calibrate_and_report(llama, tmp_path, cache):
    path = str(write_config(config_for(llama, {}), tmp_path / "merge.yml"))
    for command in (["plan", path, "--json"], ["calibrate", path], ["plan", path, "--json"], ["report", path]):
        result = CliRunner().invoke(main, [*command, "--device", "npu"])
        assert result.exit_code == 0, result.output
        if "--json" in command:
            assert json.loads(result.stdout)["device"] == "npu"


@pytest.mark.parametrize("target", ["weights", "task_vector"])
def test_a_model_in_memory(llama, target):
    base, batches = load("llama", llama.base), list(batches_of(llama.tuned[0], llama.data[0]))
    here, there = load("llama", llama.tuned[0]), load("llama", llama.tuned[0]).to("npu:1")
    before = {name: value.clone() for name, value in here.state_dict().items()}
    for model in (here, there):
        purify_model(model, batches, base=base, rank_ratio=0.875, target=target, quiet=True)
    for name, value in here.state_dict().items():
        found = there.get_parameter(name)
        assert found.device == torch.device("npu:1")
        assert (found.cpu() - value).norm() <= TOLERANCE * (value - before[name]).norm(), name


def test_a_single_weight():
    weight, rows = torch.randn(96, 64), torch.randn(3000, 64)
    expected = purify(weight, Covariance.from_rows(rows), 56)
    found = purify(weight.to("npu:0"), Covariance.from_rows(rows.to("npu:0")), 56)
    assert found.device == torch.device("npu:0")
    assert (found.cpu() - expected).norm() <= TOLERANCE * (expected - weight).norm()


def test_a_covariance_that_is_moved_stays_on_the_cpu():
    moved = Covariance.from_rows(torch.randn(500, 24)).to(torch.device("npu:0"))
    assert moved.gram.device == torch.device("cpu")
