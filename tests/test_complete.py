"""No merge with a `pave:` block goes without a tensor that every input has, and none is refused without need."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from architectures import make_architecture
from merging import assert_exact, config_for, entries, merge
from models import make_model, make_tokenizer, model_config, save_family, saved_anew, write_texts
from reference import purify, weights
from safetensors.torch import save_file

from mergekit_pave import PaveError
from mergekit_pave.plugin import wrap


def make_llama(folder: Path, **settings):
    tokenizer = make_tokenizer("llama")
    config = model_config("llama", len(tokenizer))
    config.update(settings)
    base = make_model("LlamaForCausalLM", config)
    return save_family("llama", base, tokenizer, write_texts(folder), folder)


def stored_otherwise(family, folder: Path, change, which=None):
    """The same models with other tensors in the checkpoints; `change` takes and returns a dict of them."""
    folders = []
    for i, path in enumerate((family.base, *family.tuned)):
        shutil.copytree(path, folder / path.name)
        if which is None or i in which:
            save_file(change(weights(path)), folder / path.name / "model.safetensors", {"format": "pt"})
        folders.append(folder / path.name)
    return dataclasses.replace(family, base=folders[0], tuned=tuple(folders[1:]))


def test_tensors_that_mergekit_does_not_know_are_not_lost(tmp_path, cache):
    """Llama with biases: mergekit's definition has none."""
    family = make_llama(tmp_path, attention_bias=True)
    plain = merge(config_for(family), tmp_path / "plain")
    lost = weights(family.base).keys() - plain.keys()
    assert len(lost) == 4 * 3, "or mergekit has learnt of them, and this test needs another example"
    with pytest.raises(PaveError, match=r"leave 12 tensors that every input has out .*self_attn\.k_proj\.bias.*knows no such"):
        merge(config_for(family, {}), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(cache.rglob("manifest.json"))


def test_tensors_that_mergekit_looks_for_under_another_name_are_not_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(wrap, "with_stored_names", lambda planner: planner.arch_info)
    family = make_architecture("vit-ForImageClassification", tmp_path)
    with pytest.raises(PaveError, match=r"leave 32 tensors .*vit\.encoder\.layer\.0.*save_original_format=False"):
        merge(config_for(family, {"models": images(family)}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_only_some_inputs_have_is_no_reason_to_refuse(llama, tmp_path):
    extra = {"value_head.weight": torch.ones(3, 48)}
    family = stored_otherwise(llama, tmp_path, lambda tensors: tensors | extra, which=[1])
    assert "value_head.weight" not in merge(config_for(family, {}), tmp_path / "out")


def test_what_transformers_ignores_is_no_reason_to_refuse(llama, tmp_path):
    """Buffers that older versions stored."""
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(6) for i in range(3)}
    family = stored_otherwise(llama, tmp_path, lambda tensors: tensors | extra)
    assert merge(config_for(family, {}), tmp_path / "out").keys() == weights(llama.base).keys()


@pytest.mark.parametrize("twice", [False, True])
def test_a_tied_head_is_no_reason_to_refuse(tmp_path, twice):
    family = make_llama(tmp_path / "made", tie_word_embeddings=True)
    if twice:
        family = stored_otherwise(
            family, tmp_path / "twice", lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()}
        )
    assert merge(config_for(family, {}), tmp_path / "out").keys() == weights(family.base).keys()


@pytest.mark.parametrize("twice", [False, True])
def test_a_tied_head_of_an_inferred_architecture(tmp_path, twice):
    family = make_architecture("opt-ForCausalLM", tmp_path / "made")
    if twice:
        family = stored_otherwise(
            family, tmp_path / "twice", lambda t: t | {"lm_head.weight": t["model.decoder.embed_tokens.weight"].clone()}
        )
    assert merge(config_for(family, {}), tmp_path / "out").keys() == weights(family.base).keys()


@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_layers_that_the_config_leaves_out_are_no_reason_to_refuse(llama, tmp_path, kind):
    family = llama if kind == "llama" else make_architecture("vit-ForImageClassification", tmp_path)
    pave = {"models": entries(family)} if kind == "llama" else {"models": images(family)}
    sources = [{"model": str(model), "layer_range": [0, 1], "parameters": {"weight": 0.5}} for model in family.tuned[:2]]
    sources.append({"model": str(family.base), "layer_range": [0, 1]})
    config = config_for(family, pave) | {"slices": [{"sources": sources}]}
    del config["models"]
    written = merge(config, tmp_path / "out")
    second = {name for name in weights(family.base) if ".1." in name or ".2." in name}
    assert second and written.keys() == weights(family.base).keys() - second


def images(family):
    return [{"model": str(m), "data": {"path": str(d), "image": "image"}} for m, d in zip(family.tuned, family.data)]


def renamed(folder: Path, out: Path) -> Path:
    """A ViT with the names of its modules, where transformers stores it under older ones by default."""
    shutil.copytree(folder, out)
    transformers.ViTForImageClassification.from_pretrained(folder).save_pretrained(out, save_original_format=False)
    return out


@pytest.mark.parametrize("first", [0, 1])
def test_slices_of_checkpoints_that_name_their_tensors_differently(tmp_path, first):
    stored = make_architecture("vit-ForImageClassification", tmp_path / "old")
    folders = [stored.tuned[0], renamed(stored.tuned[1], tmp_path / "new")]
    models = [folders[first], folders[1 - first]]
    slices = [{"sources": [{"model": str(model), "layer_range": [i, i + 1]}]} for i, model in enumerate(models)]
    data = {"path": str(stored.data[0]), "image": "image"}
    pave = {"models": [{"model": str(model), "data": data} for model in models], "regularization": 0.1}
    written = merge({"merge_method": "passthrough", "slices": slices, "pave": pave}, tmp_path / "out")
    assert len(written) == len(weights(stored.base))
    report = json.loads((tmp_path / "out" / "pave_report.json").read_text())
    assert sorted(row["model"] for row in report["purified"]) == sorted([str(model) for model in models] * 6)


@pytest.mark.parametrize("old", [(0,), (1,), (1, 2)])
def test_checkpoints_that_name_their_tensors_differently(tmp_path, old):
    """Some as transformers stores a ViT by default, the others with the names of its modules: one architecture all the same."""
    stored = make_architecture("vit-ForImageClassification", tmp_path / "old")
    folders = []
    for i, folder in enumerate((stored.base, *stored.tuned)):
        if i not in old:
            folder = renamed(folder, tmp_path / "new" / folder.name)
        folders.append(folder)
    assert len({frozenset(weights(folder)) for folder in folders}) == 2
    family = dataclasses.replace(stored, base=folders[0], tuned=tuple(folders[1:]))
    pave = {"models": images(family), "regularization": 0.1}
    written = merge(config_for(family, pave, weight=(1.0, 0.0), dtype="float64"), tmp_path / "out")
    sources = [(data, "image", "image") for data in stored.data]
    expected = purify(stored.kind, stored.base, stored.tuned, sources, lambda i, tensor: 0.875, regularization=0.1)[0]
    plain = {name: tensor.double() for name, tensor in weights(stored.tuned[0]).items()}
    assert len(written) == len(plain)
    again = saved_anew("ViTForImageClassification", tmp_path / "out", tmp_path / "again")
    assert_exact(weights(again), expected, plain)


@pytest.mark.parametrize("tied", [False, True])
def test_a_whole_models_tensors_without_its_prefix(tmp_path, cache, tied):
    """As Qwen3-Embedding is stored: the class of a whole model, and the names of its backbone."""
    family = make_llama(tmp_path, tie_word_embeddings=tied)
    bare = stored_otherwise(
        family, tmp_path / "bare", lambda tensors: {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    )
    given, written = (merge(config_for(one, {}), tmp_path / f"out{i}") for i, one in enumerate((family, bare)))
    assert written.keys() == weights(bare.base).keys()
    assert ("lm_head.weight" in written) is not tied
    assert all(torch.equal(written[name.removeprefix("model.")], tensor) for name, tensor in given.items())
