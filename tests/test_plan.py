"""`mergekit-pave plan`: what it announces is what a merge then does, and it never needs the weights."""

import collections
import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner
from merging import config_for, entries, forget_checkpoints, merge, write_config
from models import model_config, published_shapes, read_rows, write_hollow, write_rows
from reference import weights
from transformers.core_model_loading import WeightTransform

from mergekit_pave.cli import main
from mergekit_pave.errors import PaveError
from mergekit_pave.report.stored import read_report
from mergekit_pave.report.summary import by_model


def plan(config: dict, tmp_path: Path, *options: str) -> str:
    forget_checkpoints()
    result = CliRunner().invoke(main, ["plan", str(write_config(config, tmp_path / "plan.yml")), *options])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_what_is_announced_is_what_is_done(families, tmp_path, cache, kind):
    family = families[kind]
    config = config_for(family, {"rank_ratio": [0.8, 0.95], "exclude": ["1."]})
    announced = json.loads(plan(config, tmp_path, "--json"))
    assert not cache.exists()
    merge(config, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "pave_report.json").read_text())
    assert announced["tensors"] == report["tensors"]
    for model, found in announced["models"].items():
        done = {row["tensor"]: row for row in report["purified"] if row["model"] == model}
        assert {row["tensor"]: row["components"] for row in found["purified"]} == {t: r["components"] for t, r in done.items()}
        assert found["left_as_they_are"] == report["models"][model]["left_as_they_are"]
        assert found["tokens"] == report["models"][model]["tokens"]
        assert found["calibration"]["seconds"] > 0 and found["decomposition"]["weights"] == len(done)
        assert not any(row["cached"] for row in found["purified"])
    dropped = sum(row["components"] - row["kept"] for row in report["purified"])
    assert dropped == sum(row["drop"] for found in announced["models"].values() for row in found["purified"])

    after = json.loads(plan(config, tmp_path, "--json"))
    for found in after["models"].values():
        assert found["calibration"] is None
        assert found["decomposition"] == {"weights": 0, "seconds": 0, "cache": 0}
        assert all(row["cached"] for row in found["purified"])


def test_for_people(llama, tmp_path, cache):
    config = config_for(llama, {"rank_ratio": [0.8, 0.95], "exclude": ["k_proj"]})
    told = plan(config, tmp_path)
    assert told.startswith("18 of 30 tensors will be purified.")
    assert "3 model.layers.*.mlp.down_proj.weight           48 x 112  2 to 10 of 48" in told
    assert "3 under exclude: model.layers.*.self_attn.k_proj.weight" in told
    assert "2 vocabulary: model.embed_tokens.weight, lm_head.weight" in told
    assert "0 of 18 weights in the cache, 18 to do" in told
    merge(config, tmp_path / "out")
    after = plan(config, tmp_path)
    assert "18 of 18 weights in the cache" in after and after.count("calibration    not needed") == 2


def test_the_first_line_tells_all_that_is_done(llama, tmp_path, cache):
    told = plan(config_for(llama, {"refine": True, "exclude": ["k_proj"]}, merge_method="regmean"), tmp_path).splitlines()[0]
    assert told.startswith("18 of 30 tensors will be purified, 21 merged by regmean in closed form, 21 refined.")
    idle = [entry | {"purify": False} for entry in entries(llama)]
    assert plan(config_for(llama, {"models": idle}), tmp_path).startswith("0 of 30 tensors will be purified.\n")


@pytest.mark.parametrize(("samples", "left"), [(20, 20), (33, 7), (40, 0), (99, 0)])
def test_data_without_rows_to_score_with_are_told(llama, tmp_path, cache, samples, left):
    """Data of 40 rows, before and after the cache remembers the samples; of a stream nobody knows."""
    config = config_for(llama, {"calibration": {"samples": samples}}, models=1)
    hint = f"Hint: the data of {llama.tuned[0]} has {left or 'no'} rows beside its calibration samples"
    for _ in range(2):
        assert (hint in plan(config, tmp_path)) == (left < 8)
        assert json.loads(plan(config, tmp_path, "--json"))["models"][str(llama.tuned[0])]["rows_left"] == left
        merge(config, tmp_path / "out")
    config["pave"]["models"][0]["data"]["streaming"] = True
    assert "Hint" not in plan(config, tmp_path)


def test_how_large_the_removed_part_is_once_the_caches_tell(llama, tmp_path, cache):
    config = config_for(llama, {"rank_ratio": 0.8})
    assert all(found["removed"] is None for found in json.loads(plan(config, tmp_path, "--json"))["models"].values())
    merge(config, tmp_path / "out")
    found = json.loads(plan(config, tmp_path, "--json"))
    sums = by_model(read_report(tmp_path / "out"))
    ratios = {model: found["removed_norm"] / found["change_norm"] for model, found in sums.items()}
    for model, of_model in found["models"].items():
        assert of_model["removed"]["weights"] == 7
        assert of_model["removed"]["share_of_change"] == pytest.approx(ratios[model], rel=0.3)
    assert all(any(f"{model}: the removed part is" in warning for warning in found["warnings"]) for model in found["models"])
    text = plan(config, tmp_path)
    assert "x what fine-tuning changed, by 7 weights, one of each kind" in text and "Warning: " in text


def test_few_tokens_and_shared_samples_are_told_beforehand(llama, tmp_path, cache, caplog):
    """Two models with the same texts, of another file and in another order, are found; those with texts of their own are not."""
    rows = read_rows(llama.data[0])
    again = write_rows(tmp_path / "again.jsonl", rows[::-1][:30])
    shared = [entry | {"data": {"path": str(path)}} for entry, path in zip(entries(llama), (llama.data[0], again))]
    config = config_for(llama, {"models": shared, "calibration": {"max_tokens": 10}})
    found = json.loads(plan(config, tmp_path, "--json"))["warnings"]
    assert [warning for warning in found if "30 of 30 calibration samples are the same" in warning]
    assert sum("10 calibration tokens for layers that are up to 112 wide" in warning for warning in found) == 2
    with caplog.at_level("WARNING", logger="mergekit_pave"):
        merge(config, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "pave_report.json").read_text())
    assert report["warnings"][: len(found)] == found
    assert all(caplog.text.count(warning) == 1 for warning in report["warnings"])

    own = json.loads(plan(config_for(llama, {}, models=3), tmp_path, "--json"))["warnings"]
    assert not [warning for warning in own if "the same" in warning]


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda c: c["models"][0].update(model="./nowhere"), "nowhere"),
        (lambda c: c.pop("base_model"), "task_arithmetic needs a base_model: name the model"),
        (lambda c: c.update(Pave=c.pop("pave")), "unknown key 'Pave'; did you mean 'pave'?"),
        (lambda c: c.update(merge_method="taskarithmetic"), "'taskarithmetic'; did you mean 'task_arithmetic'?"),
        (
            lambda c: c["models"][1].pop("parameters"),
            "has no `weight`, which task_arithmetic needs. Write `parameters: {weight: ",
        ),
        (lambda c: c["models"][1]["parameters"].update(weight=[1, "x"]), "must be a number, not 'x'"),
        (lambda c: c.update(models={"model": "a"}), "models: must be a list, with a dash before each entry, not {'model': 'a'}"),
        (lambda c: c["models"].__setitem__(0, "./a"), "models[0]: must be a mapping, such as `- model: ./model`, not './a'"),
        (lambda c: c["models"][0].update(mdel=c["models"][0].pop("model")), "model: is missing; is 'mdel' meant to be it?"),
        (lambda c: c.update(base_model=["./a"]), "base_model: must be the name of a model, not ['./a']"),
        (lambda c: c.update(dtype=["float32"]), "dtype: must be a text, not ['float32']"),
        (lambda c: c.update(tokenizer="base"), "tokenizer: must be a mapping, such as `{source: base}`, not 'base'"),
        (lambda c: c["models"][0].update(parameters=["weight"]), ".parameters: must be a mapping, such as {key: value}"),
        (lambda c: c.pop("merge_method"), "merge_method: is missing"),
        (lambda c: c.pop("models"), "models: the config merges no models"),
        (
            lambda c: c.update(base_modle=c.pop("base_model")),
            "unknown key 'base_modle'; did you mean 'base_model'? mergekit ignores",
        ),
    ],
)
def test_what_mergekit_says_against_a_config_is_a_line(llama, tmp_path, cache, change, told):
    config = config_for(llama, {})
    change(config)
    forget_checkpoints()
    result = CliRunner().invoke(main, ["plan", str(write_config(config, tmp_path / "plan.yml"))])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.exception
    assert told in result.stderr and "Traceback" not in result.stderr
    assert not re.search("nput should|validation error|pydantic", result.stderr)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "it is empty"),
        ("# a comment\n", "it is empty"),
        ("- a\n", "it holds a list, no mapping"),
        ("models:\n\t- model: a\n", "line 2, column 1: there is a tab, and YAML is indented with spaces alone"),
        ("dtype: a\nmodels:\n  - model: a\ndtype: b\n", "line 4, column 1: the key 'dtype' is there twice"),
        ("pave:\n  a: {b: 1,\n    b: 2}\n", "line 3, column 5: the key 'b' is there twice"),
        ("models:\n  - model: a\n   parameters: b\n", "line 3, column 4: "),
        ("merge_method ties\nmodels: []\n", "line 2, column 7: mapping values are not allowed here. Entries of one list"),
        ("merge_method: tiés", "is not a text in UTF-8"),
    ],
)
def test_what_is_no_yaml_is_told_with_its_place(tmp_path, text, told):
    (tmp_path / "config.yml").write_text(text, encoding="latin-1")
    result = CliRunner().invoke(main, ["plan", str(tmp_path / "config.yml")])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.exception
    assert told in result.stderr and result.stderr.startswith("Error: ")


def test_a_key_may_be_in_several_mappings_and_merged_into_one(llama, tmp_path, cache):
    """The sign `<<` of YAML takes keys of another mapping, which the mapping's own replace."""
    text = yaml.safe_dump(config_for(llama, {})).replace("parameters:\n    weight: 0.5", "parameters: &a\n    weight: 0.5", 1)
    text = text.replace("parameters:\n    weight: 0.5", "parameters:\n    <<: *a\n    weight: 0.4")
    assert "&a" in text and "<<" in text
    (tmp_path / "config.yml").write_text(text)
    result = CliRunner().invoke(main, ["plan", str(tmp_path / "config.yml")])
    assert result.exit_code == 0, result.output


def test_several_merges_in_one_file(llama, tmp_path, cache):
    path = tmp_path / "steps.yml"
    path.write_text(yaml.safe_dump_all([config_for(llama, {}), config_for(llama, {})]))
    result = CliRunner().invoke(main, ["plan", str(path)])
    assert result.exit_code == 1 and "mergekit-multi" in result.stderr


def test_seventy_billion_parameters(llama, tmp_path, cache):
    """From configurations and shard headers alone: the shards are holes of the right size."""
    config = model_config("llama", 320)
    for key, value in {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "architectures": ["LlamaForCausalLM"],
    }.items():
        setattr(config, key, value)
    with torch.device("meta"):
        shapes = {name: list(value.shape) for name, value in transformers.LlamaForCausalLM(config).state_dict().items()}
    folders = [tmp_path / name for name in ("base", "tuned0", "tuned1")]
    for folder in folders:
        transformers.AutoTokenizer.from_pretrained(llama.base).save_pretrained(folder)
        config.save_pretrained(folder)
        write_hollow(folder, shapes)
    models = [{"model": str(m), "parameters": {"weight": 0.5}} for m in folders[1:]]
    entries = [{"model": str(m), "data": {"path": str(d)}} for m, d in zip(folders[1:], llama.data)]
    merged = {"merge_method": "ties", "base_model": str(folders[0]), "models": models, "dtype": "bfloat16"}
    merged["parameters"] = {"density": 0.5}
    found = json.loads(plan(merged | {"pave": {"models": entries}}, tmp_path, "--json"))
    for model in found["models"].values():
        assert len(model["purified"]) == 80 * 7
        largest = max(model["purified"], key=lambda row: math.prod(row["shape"]))
        assert sorted(largest["shape"]) == [8192, 28672]
        assert largest["drop"] == 8192 - round(8192 * 0.984)
        # A few float64 copies of the largest weight, and its covariance with an inverse in float32: 9.4 and 9.9 GB. A block is
        # smaller, and there are few tokens.
        assert 3e9 < model["calibration"]["memory"] < 24e9
        assert model["decomposition"]["seconds"] > 60


DEEPSEEK = {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8}
MIXTURES = {"DeepseekV3": ("n_routed_experts", DEEPSEEK), "Olmoe": ("num_experts", {})}


@pytest.mark.parametrize("kind", MIXTURES)
def test_planning_a_mixture_looks_nothing_up_for_each_tensor_anew(llama, tmp_path, cache, monkeypatch, kind):
    """Experts in some layers or in all: for many, no configuration is read more often, and no name is looked at more often."""
    counts = collections.Counter()

    def counted(owner, name):
        function = getattr(owner, name)

        def wrapper(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapper)

    counted(transformers.AutoConfig, "from_pretrained")
    counted(WeightTransform, "rename_source_key")
    found = []
    for size in (1, 3):
        config, stored = mixture(kind, size, llama, tmp_path / str(size))
        counts.clear()
        planned = json.loads(plan(config, tmp_path, "--json"))["models"].values()
        experts = sum(math.prod(row["shape"]) for model in planned for row in model["purified"] if ".experts." in row["tensor"])
        assert experts == 2 * (3 * size - (kind != "Olmoe")) * (4 * size) * 3 * 16 * 32
        found.append((counts["from_pretrained"], counts["rename_source_key"] / stored))
    (reads, looks), (more_reads, more_looks) = found
    assert more_reads == reads < 3 * 12 and more_looks < 1.3 * looks


def mixture(kind: str, size: int, llama, folder: Path) -> tuple[dict, int]:
    """A merge of models with experts that are stored one by one, and the number of tensors; their weights are holes."""
    experts, settings = MIXTURES[kind]
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=16,
        moe_intermediate_size=16,
        num_hidden_layers=3 * size,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts_per_tok=2,
        architectures=[f"{kind}ForCausalLM"],
        **settings,
        **{experts: 4 * size},
    )
    family = dataclasses.replace(llama, base=folder / "base", tuned=(folder / "tuned0", folder / "tuned1"))
    shapes = published_shapes(config)
    if kind != "Olmoe":  # one more layer, which predicts a second token, and which transformers leaves out
        last, next_one = f".layers.{3 * size - 1}.", f".layers.{3 * size}."
        shapes |= {name.replace(last, next_one): shape for name, shape in shapes.items() if last in name}
        shapes[f"model{next_one}enorm.weight"] = [32]
    for place in (family.base, *family.tuned):
        transformers.AutoTokenizer.from_pretrained(llama.base).save_pretrained(place)
        config.save_pretrained(place)
        write_hollow(place, shapes)
    return config_for(family, {}), len(shapes)


@pytest.mark.parametrize("value", ["0", "false"])
def test_a_switch_that_makes_merges_ignore_the_block_is_told(value, llama, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", value)
    path = str(write_config(config_for(llama, {}), tmp_path / "plan.yml"))
    result = CliRunner().invoke(main, ["plan", path, "--json"])
    assert f"Warning: TORCH_DEVICE_BACKEND_AUTOLOAD={value} is set" in result.stderr
    assert json.loads(result.stdout)["models"]


def test_regmean_without_a_block_is_told_what_it_lacks(llama, tmp_path):
    config = config_for(llama, None, merge_method="regmean")
    lacking = CliRunner().invoke(main, ["plan", str(write_config(config, tmp_path / "plan.yml"))])
    assert lacking.exit_code != 0 and "Add a `pave:` block" in lacking.output
    enough = config | {"parameters": {"covariance": 0}}
    forget_checkpoints()
    alone = CliRunner().invoke(main, ["plan", str(write_config(enough, tmp_path / "plan.yml"))])
    assert alone.exit_code != 0 and "needs no plan" in alone.output


def test_a_model_that_is_not_there_is_told_with_the_folder_in_which_it_was_looked_for(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = config_for(llama, {}) | {"base_model": "./elsewhere"}
    result = CliRunner().invoke(main, ["plan", str(write_config(config, tmp_path / "plan.yml"))])
    assert result.exit_code != 0
    assert f"there is no model at ./elsewhere (looked in {tmp_path})" in result.output


@pytest.mark.parametrize(("method", "parameters"), [("slerp", {"t": 0.3}), ("nearswap", {"t": 0.01}), ("arcee_fusion", {})])
def test_a_base_that_is_one_of_two_ends(llama, tmp_path, cache, caplog, method, parameters):
    """What stands beside the removed part is the distance to the other fine-tune, which is said wherever it is shown."""
    one, other = llama.tuned[:2]
    config = config_for(llama, {}, models=1) | {"merge_method": method, "base_model": str(other), "parameters": parameters}
    config["models"] = [{"model": str(one)}, {"model": str(other)}]
    said = f"{method} merges two models, and the base model of the config, {other}, is one of them."
    assert said in plan(config, tmp_path)
    merge(config, tmp_path / "out")
    assert said in caplog.text
    assert said in (tmp_path / "out" / "README.md").read_text()
    distance = {row["tensor"]: row["change_norm"] for row in read_report(str(tmp_path / "out"))["purified"]}
    ends = [weights(folder) for folder in (one, other)]
    assert distance == {name: pytest.approx((ends[0][name] - ends[1][name]).norm().item(), rel=1e-4) for name in distance}


def test_a_parameter_that_no_method_has_is_warned_of(llama, tmp_path, cache, caplog):
    """mergekit ignores it. Parameters of other methods may stay in a config."""
    config = config_for(llama, {}, parameters={"lamda": 0.5, "filter_wise": True, "density": 0.9})
    config["models"][0]["parameters"]["wieght"] = 0.3
    told = [
        "task_arithmetic ignores a parameter of the config: unknown parameter 'lamda'; did you mean 'lambda'?",
        "task_arithmetic ignores a parameter of the config: unknown parameter 'wieght'; did you mean 'weight'?",
    ]
    found = [warning for warning in json.loads(plan(config, tmp_path, "--json"))["warnings"] if "parameter" in warning]
    assert len(found) == 2 and all(warning.startswith(words) for warning, words in zip(found, told))
    merge(config, tmp_path / "out")
    assert all(caplog.text.count(words) == 1 for words in told) and "filter_wise'" not in caplog.text


def test_an_error_of_ours_is_not_told_as_one_of_mergekits(llama, tmp_path, monkeypatch):
    def fail(*_):
        raise PaveError("the reason")

    monkeypatch.setattr("mergekit_pave.plugin.phases.get_architecture_info", fail)
    result = CliRunner().invoke(main, ["plan", str(write_config(config_for(llama, {}), tmp_path / "plan.yml"))])
    assert result.exit_code == 1 and result.stderr == "Error: the reason\n"
