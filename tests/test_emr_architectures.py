"""Every architecture of the table, and mixtures of experts, merged by `emr`: one model alone is restored as it was."""

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, make_architecture
from merging import merge
from models import Family
from test_experts import KINDS, family_of  # noqa: F401

from mergekit_pave import load_task

QUICK = {"gpt2-LMHeadModel", "bert-ForSequenceClassification", "dinov3_vit-Model"}  # the last has tensors without entries


def assert_restored(family: Family, cls: type[transformers.PreTrainedModel], out) -> None:
    model = family.tuned[0]
    config = {"merge_method": "emr", "base_model": str(family.base), "models": [{"model": str(model)}], "dtype": "float64"}
    merge(config, out)
    expected = cls.from_pretrained(model, dtype=torch.float64).state_dict()
    restored = load_task(out, model.name)
    assert type(restored) is cls
    found = restored.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name].double(), tensor.double(), rtol=0, atol=1e-12), name


@pytest.mark.parametrize("id", [id if id in QUICK else pytest.param(id, marks=pytest.mark.slow) for id in ARCHITECTURES])
def test_architecture(id, tmp_path):
    assert_restored(make_architecture(id, tmp_path), getattr(transformers, ARCHITECTURES[id].kind.model), tmp_path / "out")


@pytest.mark.parametrize("kind", KINDS)
def test_mixtures(family_of, tmp_path, kind):  # noqa: F811
    """Checkpoints have experts one by one, and transformers has them in one tensor."""
    assert_restored(family_of(kind), getattr(transformers, f"{KINDS[kind][0]}ForCausalLM"), tmp_path / "out")
