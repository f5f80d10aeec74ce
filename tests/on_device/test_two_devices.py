"""A loaded model whose layers lie on two devices, as transformers' `device_map` leaves it."""

import accelerate
import pytest
import torch
import transformers
from merging import TOLERANCE
from models import make_model
from test_in_memory import batches_of, load

from mergekit_pave import Covariance, purify_model
from mergekit_pave.calibration import distributed
from mergekit_pave.core.covariance import SecondMoment


def dispatched(model, first, second):
    """Half of the layers on each of the devices."""
    layers = len(model.model.layers)
    places = {"model.embed_tokens": first, "model.rotary_emb": first, "model.norm": second, "lm_head": second}
    places |= {f"model.layers.{i}": first if i < layers / 2 else second for i in range(layers)}
    return accelerate.dispatch_model(model, device_map=places, force_hooks=True)


def assert_purified_alike(here, there, batches, **settings):
    before = {name: value.clone() for name, value in here.state_dict().items()}
    for model in (here, there):
        purify_model(model, batches, rank_ratio=0.75, quiet=True, **settings)
    assert {value.device for value in there.parameters()} == {torch.device("npu:0"), torch.device("npu:1")}
    for name, value in here.state_dict().items():
        found = there.state_dict()[name].cpu()
        assert (found - value).norm() <= TOLERANCE * (value - before[name]).norm(), name


@pytest.mark.parametrize("target", ["weights", "task_vector"])
def test_padded_batches(llama, target):
    here, there = load("llama", llama.tuned[0]), dispatched(load("llama", llama.tuned[0]), "npu:0", "npu:1")
    base = load("llama", llama.base).to("npu:1")
    assert_purified_alike(here, there, list(batches_of(llama.tuned[0], llama.data[0])), base=base, target=target)


def test_under_autocast(llama, monkeypatch):
    """The model runs in bfloat16, our sums and products do not: on the device as on a CPU."""
    monkeypatch.setattr(SecondMoment, "EXACT", 0)  # as of many tokens, whose products are float32
    here, there = load("llama", llama.tuned[0]), dispatched(load("llama", llama.tuned[0]), "npu:1", "npu:0")
    batches = list(batches_of(llama.tuned[0], llama.data[0]))
    first = "model.layers.0.self_attn.q_proj.weight"  # what it sees has been in no product
    before = here.get_parameter(first).clone()
    purify_model(here, batches, rank_ratio=0.75, quiet=True)
    with torch.autocast("npu", dtype=torch.bfloat16):
        purify_model(there, batches, rank_ratio=0.75, quiet=True)
    error = (there.get_parameter(first).cpu() - here.get_parameter(first)).norm()
    assert error <= TOLERANCE * (here.get_parameter(first) - before).norm()


def test_a_mixture_goes_on_as_it_was_dispatched():
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, head_dim=8,
    )  # fmt: skip
    here, there = (make_model("MixtralForCausalLM", config).eval() for _ in range(2))
    there.load_state_dict(here.state_dict())
    there = dispatched(there, "npu:0", "npu:1")
    forwards = {path: vars(module).get("forward") for path, module in there.named_modules()}
    ids = torch.randint(0, 64, (1, 60), generator=torch.Generator().manual_seed(0))
    assert_purified_alike(here, there, {"input_ids": ids}, min_tokens=1)
    assert {path: vars(module).get("forward") for path, module in there.named_modules()} == forwards
    with torch.no_grad():
        torch.testing.assert_close(there(ids).logits.cpu(), here(ids).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("device", "rank", "own"),
    [("npu", 0, "npu:0"), ("npu", 1, "npu:1"), ("npu", 3, "npu:1"), ("npu:1", 0, "npu:1"), ("cpu", 1, "cpu")],
)
def test_each_process_takes_a_device_of_its_own(monkeypatch, device, rank, own):
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    assert distributed.local_device(device) == device
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    assert distributed.local_device(device) == own


@pytest.mark.parametrize("tokens", [5, 500], ids=["rows", "gram"])
def test_a_covariance_that_is_moved(tokens):
    covariance = Covariance.from_rows(torch.randn(tokens, 24, generator=torch.Generator().manual_seed(0)))
    assert (covariance.rows is None) == (tokens == 500)
    moved = covariance.to(torch.device("npu:1"))
    assert (moved.rows is None, moved.gram is None) == (covariance.rows is None, covariance.gram is None)
    assert moved.matrix().device == torch.device("npu:1")
    assert (moved.tokens, moved.dim) == (tokens, 24) and torch.equal(moved.matrix().cpu(), covariance.matrix())
