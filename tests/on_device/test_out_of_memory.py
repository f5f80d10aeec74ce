"""A device whose memory runs out, at any point: what is told, and that nothing is half done."""

import re

import pytest
import torch
from merging import config_for, invoke
from pretend_device import memory
from reference import weights
from test_in_memory import batches_of, load

from mergekit_pave import PaveError, purify_model
from mergekit_pave.core.projection import coefficients, drop_components


def on_device(llama):
    return load("llama", llama.tuned[0]).to("npu:1")


def state(model):
    return {name: value.cpu() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("place", [0.0, 0.3, 0.7, 0.9, 0.95, 0.98, 0.99, 1.0])
@pytest.mark.parametrize("target", ["weights", "task_vector"])
def test_a_model_in_memory_is_purified_as_a_whole_or_not_at_all(llama, place, target):
    base = load("llama", llama.base).to("npu:0")
    model, batch = on_device(llama), next(batches_of(llama.tuned[0], llama.data[0]))
    before, start = state(model), memory.allocations
    purify_model(model, batch, base=base, target=target, quiet=True)
    last = memory.allocations - start - 1
    model.load_state_dict(before)
    memory.failing = range(first := memory.allocations + round(place * last), first + 1)
    with pytest.raises(PaveError, match=r"(calibrating|decomposing model.*|purifying model.*) ran out of memory on npu:1\. "):
        purify_model(model, batch, base=base, target=target, quiet=True)
    memory.failing = range(0)
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


BLOCK = "(calibration|decomposing model)"  # the two take turns, block by block
PLACES = {0.02: "calibration", 0.4: BLOCK, 0.7: BLOCK, 0.9: " model", 0.95: " model", 0.98: " model"}


def test_a_merge_that_fails_and_goes_on(llama, tmp_path, cache):
    """Whatever fails is told in a line, also where mergekit moves tensors or merges; what is in the cache is whole."""
    start, config = memory.allocations, config_for(llama, {})
    assert invoke(config, tmp_path / "whole").exit_code == 0
    asked = memory.allocations - start
    for place, work in PLACES.items():
        other = config | {"pave": config["pave"] | {"cache_dir": str(tmp_path / f"cache{place}")}}
        memory.failing = range(first := memory.allocations + round(place * asked), first + 1)
        result = invoke(other, tmp_path / f"out{place}")
        told = result.output.strip().splitlines()[-1]
        assert isinstance(result.exception, SystemExit) and re.search(rf"{work}.* ran out of memory on npu", told), told
        assert not [*(tmp_path / f"out{place}").glob("*.safetensors"), *(tmp_path / f"out{place}").glob("*.json")]
        memory.failing = range(0)
        assert invoke(other, tmp_path / f"out{place}").exit_code == 0
        found, expected = weights(tmp_path / f"out{place}"), weights(tmp_path / "whole")
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_purifying_takes_memory_for_one_weight():
    weight, base = torch.randn(48, 48).to("npu:0"), torch.randn(48, 48).to("npu:0")
    directions, out = torch.linalg.qr(torch.randn(48, 4)).Q.to("npu:0"), torch.empty(48, 48, device="npu:0")
    before = memory.peak = memory.used
    drop_components(weight, directions, coefficients(weight, directions, base), base, out=out)
    assert memory.peak - before <= 4 * weight.nbytes
