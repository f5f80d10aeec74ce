"""One parameter that is the weight of several layers: the inputs of all of them count. (Its purification in a merge is one of
`test_architectures`: Zamba2.)"""

import pytest
import torch
from architectures import make_architecture
from merging import TOLERANCE, merge
from models import make_model, model_config
from reference import purified_alone
from test_regmean import as_task_arithmetic, check, regmean_config, unpurified, wanted_change

from mergekit_pave import purify_model
from mergekit_pave.calibration.linears import find_linears

UP = "model.layers.{}.mlp.up_proj"


def test_regmean(tmp_path, cache):
    family = make_architecture("zamba2-ForCausalLM", tmp_path)
    config = regmean_config(family, unpurified(family), parameters={"covariance": 0.5})
    plain = as_task_arithmetic(config, tmp_path / "plain")
    check(family, merge(config, tmp_path / "out"), plain, lambda name: wanted_change(family, name, (0.5, 0.8), 0.5))


@pytest.fixture
def tied():
    """A Llama whose first and last layer share a weight."""
    model = make_model("LlamaForCausalLM", model_config("llama", 64)).eval()
    model.get_submodule(UP.format(2)).weight = model.get_submodule(UP.format(0)).weight
    return model


@pytest.mark.parametrize("tokens", [30, 400])  # stored as rows, and as a sum
def test_in_memory(tied, tokens):
    ids = torch.randint(0, 64, (tokens // 10, 10), generator=torch.Generator().manual_seed(0))
    seen = []
    for i in (0, 2):
        tied.get_submodule(UP.format(i)).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().reshape(-1, 48)))
    with torch.no_grad():
        tied(ids)
    before, x = tied.get_submodule(UP.format(0)).weight.detach().clone(), torch.cat(seen).double()
    rows = purify_model(
        tied, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, rank_ratio=0.75, regularization=0.1, quiet=True
    )
    wanted = purified_alone(before, x, 0.75, 0.1)
    weight = tied.get_submodule(UP.format(2)).weight
    assert weight is tied.get_submodule(UP.format(0)).weight
    assert (weight - wanted).norm() <= TOLERANCE * (wanted - before).norm()
    assert [row["tokens"] for row in rows if "up_proj" in row["tensor"]] == [2 * tokens, tokens]


def test_a_pattern_may_name_it_in_either_layer(tied):
    ids = torch.ones(1, 9, dtype=torch.long)
    for i in (0, 2):
        rows = purify_model(tied, {"input_ids": ids}, rank_ratio=0.75, exclude=[UP.format(i)], quiet=True)
        assert [row["tensor"] for row in rows if "up_proj" in row["tensor"]] == [UP.format(1) + ".weight"]


def test_what_something_else_uses_too_is_left(tied):
    """A layer in the backbone that shares its weight with the head is not measured there."""
    tied.lm_head.weight = tied.get_submodule(UP.format(2)).weight
    linears, heads, _ = find_linears(tied)
    assert {UP.format(i) + ".weight" in linears for i in (0, 2)} == {False}
    assert {UP.format(i) + ".weight" for i in (0, 2)} < heads
    assert UP.format(1) + ".weight" in linears
