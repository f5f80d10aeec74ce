"""The ways in which mergekit lets a config name its inputs: each has to end in the same purified weights."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from merging import assert_exact, config_for, entries, merge
from models import Family, make_rows, model_config, perturbed, save, write_rows
from reference import purify, weights
from safetensors.torch import load_file, save_file

EVERYWHERE = 0.875
PAVE = {"regularization": 0.1}
ALONE = (1.0, 0.0)


def expected_for(family: Family, ratios=lambda i, tensor: EVERYWHERE, models: int = 2) -> list[dict]:
    sources = [(data, "text", "text") for data in family.data[:models]]
    return purify(family.kind, family.base, family.tuned[:models], sources, ratios, regularization=0.1)


def check(family: Family, out: Path, expected: list[dict], *, pave: dict | None = None, options: dict | None = None, **more):
    """The first model's purified weights, as a merge writes them, and nothing else changed."""
    settings = {"weight": ALONE, "dtype": "float64"} | more
    written = merge(config_for(family, PAVE | (pave or {}), **settings), out / "pave", **(options or {}))
    assert_exact(written, expected[0], merge(config_for(family, **settings), out / "plain", **(options or {})))


def copied(family: Family, folder: Path, change) -> Family:
    """A family whose checkpoints were copied and then changed, each by `change(folder, number)`; number 0 is the base's."""
    folders = []
    for i, source in enumerate((family.base, *family.tuned)):
        shutil.copytree(source, folder / source.name)
        change(folder / source.name, i)
        folders.append(folder / source.name)
    return dataclasses.replace(family, base=folders[0], tuned=tuple(folders[1:]))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_sharded_safetensors(families, tmp_path, kind):
    def shard(folder: Path, _: int) -> None:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="20KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 3

    family = copied(families[kind], tmp_path / "sharded", shard)
    check(family, tmp_path, expected_for(families[kind]))


@pytest.mark.parametrize("lazy", [False, True])
def test_bin_checkpoints(llama, tmp_path, lazy):
    def pickle(folder: Path, _: int) -> None:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()

    family = copied(llama, tmp_path / "pickled", pickle)
    check(family, tmp_path, expected_for(llama), options={"lazy_unpickle": lazy}, pave={"cache_dir": str(tmp_path / "cache")})


def test_tied_embeddings(llama, tmp_path):
    """The head is in the checkpoint only as the embedding."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama.base)
    torch.manual_seed(0)
    config = model_config("llama", len(tokenizer))
    config.tie_word_embeddings = True
    base = transformers.LlamaForCausalLM(config)
    base.tie_weights()
    tuned = []
    for i in (1, 2):
        model = perturbed(base, i)
        model.tie_weights()
        tuned.append(save(model, tokenizer, tmp_path / f"tied{i}"))
    family = dataclasses.replace(llama, base=save(base, tokenizer, tmp_path / "base"), tuned=tuple(tuned))
    assert "lm_head.weight" not in weights(family.tuned[0])
    check(family, tmp_path, expected_for(family))


def test_lora(llama, tmp_path):
    """`model+lora` is calibrated and purified as the model that mergekit makes of the two."""
    peft = pytest.importorskip("peft")
    references, merged = [], []
    for i in range(2):
        torch.manual_seed(i)
        model = transformers.AutoModelForCausalLM.from_pretrained(llama.base)
        adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model = peft.get_peft_model(model, adapter)
        model.save_pretrained(tmp_path / f"lora{i}")
        references.append(f"{llama.base}+{tmp_path / f'lora{i}'}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(llama.base)
        merged.append(save(model.merge_and_unload(), tokenizer, tmp_path / f"merged{i}"))
    family = dataclasses.replace(llama, tuned=tuple(merged))
    touched = ("q_proj", "down_proj")  # nothing else has a task vector
    expected = expected_for(family, lambda i, tensor: EVERYWHERE if any(name in tensor for name in touched) else None)

    config = config_for(llama, weight=ALONE, dtype="float64")
    config["models"] = [{"model": name, "parameters": {"weight": w}} for name, w in zip(references, ALONE)]
    options = {"lora_merge_cache": str(tmp_path / "loras")}
    plain = merge(config, tmp_path / "plain", **options)
    models = [{"model": name, "data": {"path": str(data)}} for name, data in zip(references, llama.data)]
    pave = PAVE | {"rank_ratio": EVERYWHERE, "models": models}
    assert_exact(merge(config | {"pave": pave}, tmp_path / "out", **options), expected[0], plain)


def test_an_adapters_own_tokenizer_is_used(llama, tmp_path):
    """It may have learnt with other special tokens than the model it belongs to."""
    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(llama.base)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    folder = tmp_path / "lora"
    model.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama.base)
    tokenizer.model_max_length = 5
    tokenizer.save_pretrained(folder)
    reference = f"{llama.base}+{folder}"
    config = config_for(llama, models=1)
    config["models"][0]["model"] = reference
    config["pave"] = {"rank_ratio": 0.9, "models": [{"model": reference, "data": {"path": str(llama.data[0])}}]}
    merge(config, tmp_path / "out", lora_merge_cache=str(tmp_path / "loras"))
    report = json.loads((tmp_path / "out" / "pave_report.json").read_text())
    assert report["models"][reference]["tokens"] <= 5 * 40


def test_override_architecture(llama, tmp_path):
    """A checkpoint whose config names a class that nobody has is run as what the merge says it is."""

    def rename(folder: Path, number: int) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["architectures"] = ["LlamaForCausalLM" if number == 0 else "HomemadeForCausalLM"]
        (folder / "config.json").write_text(json.dumps(config))

    family = copied(llama, tmp_path / "renamed", rename)
    config = config_for(family, PAVE, weight=ALONE, dtype="float64")
    for listed in (config["models"], config["pave"]["models"]):
        for entry in listed:
            entry["model"] = {"model": {"path": entry["model"]}, "override_architecture": "LlamaForCausalLM"}
    written = merge(config, tmp_path / "out")
    assert_exact(written, expected_for(llama)[0], merge(config_for(llama, weight=ALONE, dtype="float64"), tmp_path / "plain"))


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16", "float16"), ("bfloat16", "float32", "bfloat16")])
@pytest.mark.parametrize("target", ["weights", "task_vector"])
def test_models_in_different_precisions(llama, tmp_path, dtypes, target):
    """Each weight is what its checkpoint stores, whatever the others store."""

    def cast(folder: Path, number: int) -> None:
        dtype = getattr(torch, (*dtypes, "float32")[number])
        tensors = {name: tensor.to(dtype) for name, tensor in weights(folder).items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}))

    family = copied(llama, tmp_path / "cast", cast)
    sources = [(data, "text", "text") for data in family.data[:2]]
    wanted = purify("llama", family.base, family.tuned[:2], sources, lambda i, t: EVERYWHERE, regularization=0.1, target=target)
    check(family, tmp_path, wanted, pave={"target": target})


def grown(family: Family, folder: Path) -> Family:
    """The second fine-tune with three more tokens, in its tokenizer and its embeddings."""

    def grow(path: Path, number: int) -> None:
        if number == 2:
            tokenizer = transformers.AutoTokenizer.from_pretrained(path)
            tokenizer.add_tokens(["<one>", "<two>", "<three>"])
            model = transformers.AutoModelForCausalLM.from_pretrained(path)
            model.resize_token_embeddings(len(tokenizer))
            save(model, tokenizer, path)

    return copied(family, folder, grow)


@pytest.mark.parametrize("source", ["union", "base"])
def test_vocabularies_of_different_sizes(llama, tmp_path, source):
    """mergekit makes one vocabulary of them; the linear layers do not care, and each model reads its own."""
    family = grown(llama, tmp_path / "grown")
    data = write_rows(tmp_path / "new.jsonl", [{"text": f"{row['text']} <two>"} for row in make_rows("sum add count", 9, seed=6)])
    family = dataclasses.replace(family, data=(llama.data[0], data, llama.data[2]))
    expected = expected_for(family)
    check(family, tmp_path, expected, tokenizer_source=source, weight=ALONE)
    embeddings = weights(tmp_path / "pave")["model.embed_tokens.weight"]
    stored = [len(weights(folder)["model.embed_tokens.weight"]) for folder in (family.base, family.tuned[1])]
    assert stored[1] == stored[0] + 3
    assert len(embeddings) == stored[source == "union"]


def sliced(family: Family, *ranges: tuple[int, int], weight=ALONE, **more) -> dict:
    config = config_for(family, weight=weight, dtype="float64", **more)
    sources = [{"model": str(m), "parameters": {"weight": w}} for m, w in zip(family.tuned, weight)]
    del config["models"]
    config["slices"] = [
        {"sources": [source | {"layer_range": list(part)} for source in (*sources, {"model": str(family.base)})]}
        for part in ranges
    ]
    return config


def in_place(tensor: str, layer: int | str) -> str:
    return ".".join([*tensor.split(".")[:2], str(layer), *tensor.split(".")[3:]])


def test_slices_that_use_a_layer_twice(llama, tmp_path):
    """Each copy has the rank_ratio of its place: a gradient runs over each slice from its start."""
    config = sliced(llama, (0, 2), (1, 3))
    plain = merge(config, tmp_path / "plain")
    pave = PAVE | {"rank_ratio": [0.95, 0.6], "models": entries(llama)}
    written = merge(config | {"pave": pave}, tmp_path / "out")
    by_slice = [expected_for(llama, lambda i, t, r=r: r)[0] for r in (0.95, 0.6)]
    wanted = {}
    for layer, (source, place) in enumerate([(0, 0), (1, 1), (1, 0), (2, 1)]):
        for tensor, row in by_slice[place].items():
            if tensor.split(".")[2] == str(source):
                wanted[in_place(tensor, layer)] = row
    assert len(wanted) == 4 * 7
    assert_exact(written, wanted, plain)
    report = json.loads((tmp_path / "out" / "pave_report.json").read_text())
    rows = {(row["model"], row["output"]): row for row in report["purified"]}
    assert len(rows) == len(report["purified"]) == 2 * 4 * 7
    for tensor, row in wanted.items():
        found = rows[str(llama.tuned[0]), tensor]
        assert found["kept"] == row.kept
        assert found["tensor"] == in_place(tensor, {"0": 0, "1": 1, "2": 1, "3": 2}[tensor.split(".")[2]])


def test_passthrough_of_slices_from_two_models(llama, tmp_path):
    """A frankenmerge: every tensor has one source, and no base."""
    ranges = ((0, 2), (1, 3))
    slices = [{"sources": [{"model": str(m), "layer_range": list(r)}]} for m, r in zip(llama.tuned, ranges)]
    config = {"merge_method": "passthrough", "slices": slices, "dtype": "float64"}
    plain = merge(config, tmp_path / "plain")
    pave = PAVE | {"rank_ratio": EVERYWHERE, "models": entries(llama)}
    written = merge(config | {"pave": pave}, tmp_path / "out")
    expected = []
    for model, data in zip(llama.tuned, llama.data):
        sources = [(data, "text", "text")]
        expected += purify("llama", llama.base, [model], sources, lambda i, tensor: EVERYWHERE, regularization=0.1)
    wanted = {}
    for layer, (model, source) in enumerate([(0, 0), (0, 1), (1, 1), (1, 2)]):
        rows = expected[model].items()
        wanted |= {in_place(name, layer): row for name, row in rows if name.split(".")[2] == str(source)}
    assert len(wanted) == 4 * 7
    assert_exact(written, wanted, plain)


def test_modules(llama, tmp_path):
    config = config_for(llama, PAVE, weight=ALONE, dtype="float64")
    config["modules"] = {"default": {"models": config.pop("models")}}
    plain = merge(config_for(llama, weight=ALONE, dtype="float64"), tmp_path / "plain")
    assert_exact(merge(config, tmp_path / "out"), expected_for(llama)[0], plain)


def test_a_bare_backbone(families, tmp_path):
    """A checkpoint of GPT2Model lacks the prefix that one of GPT2LMHeadModel has."""
    gpt2 = families["gpt2"]

    def strip(folder: Path, _: int) -> None:
        transformers.GPT2Model.from_pretrained(folder).save_pretrained(folder)

    family = copied(gpt2, tmp_path / "bare", strip)
    assert not any(name.startswith("transformer.") for name in weights(family.base))
    expected = {name.removeprefix("transformer."): row for name, row in expected_for(gpt2)[0].items()}
    check(family, tmp_path, [expected])
