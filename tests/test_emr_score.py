"""Scores of merges by `emr`: each model is compared with what it is restored to."""

import json

import pytest
import transformers
from click.testing import CliRunner
from emr_merging import sealed
from merging import forget_checkpoints, merge, write_config
from models import Family, make_model, make_rows, make_tokenizer, perturbed, save, write_rows
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mergekit_pave.cli import main

TOPICS = ("sum add count equal number seven nine twelve apple coin", "def return list index loop print value string import")
ROWS = 10


def scored_config(family: Family, cache, **more) -> dict:
    folder = cache.parent
    data = [write_rows(folder / f"scored{i}.jsonl", make_rows(topic, 40, seed=i)) for i, topic in enumerate(TOPICS)]
    calibration = {"samples": 6, "max_length": 16}
    entries = [{"model": str(m), "data": {"path": str(d), "text": "text"}} for m, d in zip(family.tuned, data)]
    block = {"purify": False, "cache_dir": str(cache), "calibration": calibration, "models": entries}
    models = [{"model": str(model)} for model in family.tuned[:2]]
    config = {"merge_method": "emr", "base_model": str(family.base), "models": models, "dtype": "float32"}
    return config | {"pave": block} | more


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory) -> Family:
    """A masked language model, and classifiers of two and of three classes."""
    folder, tokenizer = tmp_path_factory.mktemp("classifiers"), make_tokenizer("bert")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": 66, "initializer_range": 0.15}
    base = make_model("RobertaForMaskedLM", transformers.RobertaConfig(**sizes))
    tuned = []
    for i, labels in enumerate((2, 3)):
        model = make_model("RobertaForSequenceClassification", transformers.RobertaConfig(**sizes, num_labels=labels))
        model.roberta.load_state_dict(base.roberta.state_dict())
        tuned.append(save(perturbed(model, seed=i + 1), tokenizer, folder / f"task{i}"))
    return Family("bert", save(base, tokenizer, folder / "base"), tuple(tuned), ())


def run(*arguments) -> dict:
    forget_checkpoints()
    result = CliRunner().invoke(main, [*map(str, arguments), "--quiet"])
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "classifiers"])
def test_each_model_is_scored_as_it_is_restored(families, classifiers, tmp_path, kind):
    """The same as scoring a restored checkpoint, of which nothing is written."""
    family = classifiers if kind == "classifiers" else families[kind]
    config = scored_config(family, tmp_path / "cache", dtype="bfloat16")
    merge(config, tmp_path / "out")
    before = sorted(tmp_path.rglob("*.safetensors"))
    path = write_config(config, tmp_path / "config.yml")
    found = run("score", path, tmp_path / "out", "--rows", ROWS, "--json")[str(tmp_path / "out")]["models"]
    made = {file for file in tmp_path.rglob("*.safetensors") if file not in before}
    assert {file.relative_to(tmp_path / "cache").parts[0] for file in made} <= {"predictions", "score", "samples"}
    kept = []
    for model in family.tuned[:2]:
        result = CliRunner().invoke(main, ["restore", str(tmp_path / "out"), model.name, "-o", str(tmp_path / model.name)])
        assert result.exit_code == 0, result.output
        alone = run("score", path, tmp_path / model.name, "--rows", ROWS, "--json")[str(tmp_path / model.name)]["models"]
        own, other = (found[str(model)], alone[str(model)])
        assert own["by_row"] == other["by_row"] and own["kept"] == other["kept"] and own["agreement"] == other["agreement"]
        assert own["drift"] is None
        kept.append(own["kept"])
    assert min(kept) > 0.2
    again = run("score", path, tmp_path / "out", "--rows", ROWS, "--json")[str(tmp_path / "out")]["models"]
    assert again == found


def test_another_file_is_another_merge(families, tmp_path):
    """What has been scored is not taken for a merge with the same weights and other masks."""
    config = scored_config(families["llama"], tmp_path / "cache")
    merge(config, tmp_path / "out")
    path = write_config(config, tmp_path / "config.yml")
    first = run("score", path, tmp_path / "out", "--rows", ROWS, "--json")[str(tmp_path / "out")]["models"]
    one, two = (tmp_path / "out" / "emr" / f"tuned{i}.safetensors" for i in range(2))
    with safe_open(one, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(one)
    del tensors["sha256"]
    for tensor in tensors.values():
        tensor.bitwise_not_()
    save_file(sealed(metadata, tensors), one, metadata)
    second = run("score", path, tmp_path / "out", "--rows", ROWS, "--json")[str(tmp_path / "out")]["models"]
    changed, same = map(str, families["llama"].tuned[:2])
    assert second[changed]["kept"] < first[changed]["kept"] and second[same] == first[same]
    one.unlink()
    result = CliRunner().invoke(main, ["score", str(path), str(tmp_path / "out"), "--rows", str(ROWS), "--quiet"])
    assert result.exit_code == 1 and "tuned0" in result.output and two.stem in result.output


def test_tune_compares_it_with_merges_into_one(families, tmp_path):
    config = scored_config(families["llama"], tmp_path / "cache")
    path = write_config(config, tmp_path / "config.yml")
    found = run("tune", path, "--set", "merge_method=emr,tsv", "--rows", ROWS, "--json")
    kept = [each["score"]["mean"]["kept"] for each in found["settings"]]
    assert len(kept) == 2
    merge(config, tmp_path / "out")
    alone = run("score", path, tmp_path / "out", "--rows", ROWS, "--json")[str(tmp_path / "out")]
    assert alone["mean"]["kept"] in kept
    only_itself = run("tune", path, "--rows", ROWS, "--json")  # by default it tries lambdas and refining, which emr does not have
    assert [each["set"] for each in only_itself["settings"]] == [{}]


def test_a_score_says_that_models_are_restored(families, tmp_path):
    """In the terminal and in the card; and a config without data is told what it lacks."""
    config = scored_config(families["llama"], tmp_path / "cache")
    merge(config, tmp_path / "out")
    path = write_config(config, tmp_path / "config.yml")
    result = CliRunner().invoke(main, ["score", str(path), str(tmp_path / "out"), "--rows", str(ROWS), "--card", "--quiet"])
    assert result.exit_code == 0, result.output
    told = "Of a merge by emr each model is compared with what it is restored to."
    assert told in result.output and told in (tmp_path / "out" / "README.md").read_text()
    del config["pave"]
    result = CliRunner().invoke(main, ["score", str(write_config(config, tmp_path / "bare.yml")), str(tmp_path / "out")])
    assert result.exit_code == 1 and "block, which with `purify: false` changes nothing of the merge" in result.output
