"""What a user can get wrong: the message names the key, the model and the way out, and nothing is written."""

import copy
import dataclasses
import json
import re
import shutil

import pytest
import torch
import transformers
from commands import start
from merging import config_for, invoke, merge, write_config
from models import perturbed, save, write_rows
from safetensors.torch import load_file

from mergekit_pave.calibration.blame import NotFiniteError, explained
from mergekit_pave.errors import PaveError


@pytest.fixture
def workplace(llama, tmp_path, monkeypatch):
    """A folder with copies of two models under short names, and data, as the current directory."""
    for i, name in enumerate(("alpha", "beta")):
        shutil.copytree(llama.tuned[i], tmp_path / name)
    shutil.copytree(llama.base, tmp_path / "origin")
    write_rows(tmp_path / "rows.jsonl", [{"text": "one two three", "question": "four five"} for _ in range(4)])
    write_rows(tmp_path / "empty.jsonl", [])
    write_rows(tmp_path / "blank.jsonl", [{"text": ""}, {"text": None}, {"text": ""}])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config():
    """A config that is right, to be spoilt."""
    data = {"path": "rows.jsonl", "text": "text"}
    return {
        "merge_method": "task_arithmetic",
        "base_model": "./origin",
        "models": [{"model": name, "parameters": {"weight": 0.5}} for name in ("./alpha", "./beta")],
        "dtype": "float32",
        "pave": {"rank_ratio": 0.9, "models": [{"model": name, "data": dict(data)} for name in ("./alpha", "./beta")]},
    }


def spoil(path, value):
    """The right config with one value of the block set, at a path such as ('models', 0, 'data', 'path')."""
    spoilt = copy.deepcopy(config())
    at = spoilt["pave"]
    for key in path[:-1]:
        at = at.setdefault(key, {}) if isinstance(at, dict) else at[key]
    at[path[-1]] = value
    return spoilt


def without(path):
    spoilt = copy.deepcopy(config())
    at = spoilt["pave"]
    for key in path[:-1]:
        at = at[key]
    del at[path[-1]]
    return spoilt


def assert_refused(spoilt, folder, *words):
    result = invoke(spoilt, folder / "out")
    assert result.exit_code != 0
    # click turns what users are meant to read into "Error: ..." and an exit; anything else is a crash.
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    message = result.output[result.output.index("Error:") :]
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"
    assert "Traceback" not in message and not re.search("nput should|validation error|pydantic|required", message)
    assert not list((folder / "out").glob("*.safetensors"))


def test_the_right_config_is_right(workplace):
    assert invoke(config(), workplace / "out").exit_code == 0


DATA = ("models", 0, "data")

UNKNOWN = [
    (("rank_ration",), "rank_ratio"),
    (("alocation",), "allocation"),
    (("regularisation",), "regularization"),
    (("calibration", "sample"), "samples"),
    (("calibration", "max_len"), "max_length"),
    (("models", 0, "purfy"), "purify"),
    (("models", 0, "ranks_ratio"), "rank_ratio"),
    (("models", 0, "calibration", "batchsize"), "batch_size"),
    ((*DATA, "spilt"), "split"),
    ((*DATA, "txt"), "text"),
]


@pytest.mark.parametrize(("path", "nearest"), UNKNOWN, ids=lambda x: x if isinstance(x, str) else ".".join(map(str, x)))
def test_unknown_keys(workplace, path, nearest):
    where = ["alpha"] if path[0] == "models" else []
    assert_refused(spoil(path, 1), workplace, f"{path[-1]!r}", f"{nearest!r}", "pave", *where)


def test_unknown_key_of_regularization(workplace):
    assert_refused(spoil(("regularization",), {"relativ": 0.1}), workplace, "pave.regularization", "'relative'")


def test_unknown_key_of_a_rank_ratio_filter(workplace):
    given = [{"filtr": "mlp", "value": 0.5}, {"value": 0.9}]
    assert_refused(spoil(("rank_ratio",), given), workplace, "pave.rank_ratio", "'filtr'", "filter")


WHAT_TO_WRITE = [
    (DATA, "rows.jsonl", ["alpha].data", "a mapping, such as {path: rows.jsonl}"]),
    (("include",), "mlp", ["pave.include", "a list: [mlp], not 'mlp' alone"]),
    (("models", 0, "exclude"), "mlp", ["alpha].exclude", "a list: [mlp]"]),
    (("models", 0, "allocation"), "uniform", ["alpha]", "allocation is between models", "directly under `pave`"]),
    (("models", 0, "cache_dir"), "caches", ["alpha]", "cache_dir holds for all models"]),
    (DATA, 3, ["alpha].data: must be a mapping, such as `{path: rows.jsonl}`, not 3"]),
    (DATA, ["rows.jsonl"], ["alpha].data[0]: must be a mapping, such as `{path: rows.jsonl}`, not 'rows.jsonl'"]),
    ((*DATA, "text"), ["a", "b"], ["alpha].data.text: must be a text, not ['a', 'b']"]),
    ((*DATA, "streaming"), "perhaps", ["alpha].data.streaming: must be true or false, not 'perhaps'"]),
    (("models",), {"./alpha": {}}, ["pave.models: must be a list, with a dash before each entry, not {'./alpha': {}}"]),
    (("models", 0), "./alpha", ["pave.models[0]: must be a mapping, such as `- model: ./model`, not './alpha'"]),
    (("models", 0, "model"), ["./alpha"], ["pave.models[0].model: must be the name of a model, not ['./alpha']"]),
    (("purify",), "maybe", ["pave.purify: must be true or false, not 'maybe'"]),
    (("refine",), {"lambda": "big"}, ["pave.refine.lambda: must be a number, not 'big'"]),
    (("refine",), {"covariance": 2}, ["pave.refine.covariance: must be 1 or less, not 2"]),
    (("calibration",), 256, ["pave.calibration: must be a mapping, such as `{samples: 256}`, not 256"]),
    (("calibration",), {"samples": 0}, ["pave.calibration.samples: must be 1 or more, not 0"]),
    (("calibration",), {"samples": "256"}, ["pave.calibration.samples: must be a whole number, not '256'"]),
    (("vocabulary",), True, ["pave.vocabulary: must be 'fit', 'counts' or 'method', not true"]),
    (("exclude",), [1], ["pave.exclude[0]: must be a text, not 1"]),
    (("regularization",), -1, ["pave.regularization: must be greater than 0, not -1"]),
    (("cache_dir",), ["a"], ["pave.cache_dir: must be a text, not ['a']"]),
    (("rank_ratio",), [{"value": 0.9}, {"filter": "mlp", "value": 0.5}], ["rank_ratio", "the filter 'mlp' never holds"]),
    (("rank_ratio",), [{"filter": "*", "value": 0.9}, {"value": 0.5}], ["rank_ratio", "the value never holds", "put that last"]),
]


@pytest.mark.parametrize(("path", "value", "words"), WHAT_TO_WRITE, ids=[".".join(map(str, case[0])) for case in WHAT_TO_WRITE])
def test_what_to_write_instead(workplace, path, value, words):
    assert_refused(spoil(path, value), workplace, *words)
    assert len(invoke(spoil(path, value), workplace / "out").output.strip().splitlines()) == 1, "each fault is told once"


@pytest.mark.parametrize("method", ["ties", "linear", "task_arithmetic"])
def test_a_missing_weight_is_told_with_what_to_write(workplace, method):
    spoilt = config() | {"merge_method": method}
    spoilt["models"] = [{"model": entry["model"]} for entry in spoilt["models"]]
    words = f"{spoilt['models'][0]['model']} has no `weight`, which {method} needs. Write `parameters: {{weight: ...}}` below"
    assert_refused(spoilt, workplace, words)
    assert invoke(spoilt | {"parameters": {"weight": 0.5, "density": 0.9}}, workplace / "out").exit_code == 0


@pytest.mark.parametrize("path", ["./missing", "some/where/missing", "~/missing"])
def test_a_missing_folder_of_covariances_is_not_looked_for_on_the_hub(workplace, path):
    entry = {"model": "./alpha", "covariance": path}
    spoilt = spoil(("models", 0), entry)
    assert_refused(spoilt, workplace, "alpha].covariance", f"there is no folder {path}")
    assert "Hub" not in invoke(spoilt, workplace / "out").output


VALUES = [
    (("rank_ratio",), 0),
    (("rank_ratio",), 1.01),
    (("rank_ratio",), -0.5),
    (("rank_ratio",), "most"),
    (("rank_ratio",), float("nan")),
    (("rank_ratio",), []),
    (("rank_ratio",), [0.9, 1.5]),
    (("rank_ratio",), True),
    (("rank_ratio",), [{"filter": "mlp", "value": 2}]),
    (("models", 0, "rank_ratio"), 98),
    (("allocation",), "spektral"),
    (("target",), "weight"),
    (("regularization",), 0),
    (("regularization",), -1),
    (("regularization",), "small"),
    (("regularization",), float("inf")),
    (("regularization",), True),
    (("regularization", "relative"), 0),
    (("models", 0, "regularization"), {"relative": -0.1}),
    (("exclude",), "k_proj"),
    (("include",), 3),
    (("cache_dir",), 5),
    (("calibration", "samples"), 0),
    (("calibration", "samples"), True),
    (("calibration", "max_length"), -4),
    (("calibration", "max_tokens"), 0),
    (("calibration", "batch_size"), 0),
    (("calibration", "batch_size"), "many"),
    (("calibration", "seed"), "x"),
    (("models", 0, "calibration", "samples"), 0),
    (("models", 0, "purify"), "perhaps"),
    ((*DATA, "path"), ""),
    ((*DATA, "streaming"), "sometimes"),
]


@pytest.mark.parametrize(("path", "value"), VALUES, ids=[f"{'.'.join(map(str, path))}={value}" for path, value in VALUES])
def test_values_out_of_range(workplace, path, value):
    where = ["alpha"] if path[0] == "models" else []
    last = next(key for key in reversed(path) if isinstance(key, str))
    assert_refused(spoil(path, value), workplace, f"{last}", "pave", *where)


def test_negative_seed(workplace):
    """numpy, which shuffles the rows, refuses it: so it has to be refused, or made to work."""
    spoilt = spoil(("calibration",), {"seed": -1, "samples": 2})
    result = invoke(spoilt, workplace / "out")
    if result.exit_code:
        assert isinstance(result.exception, SystemExit), repr(result.exception)
        assert "seed" in result.output


@pytest.mark.parametrize("block", [{}, [], True, "yes", {"models": []}, {"models": {"alpha": {}}}])
def test_a_block_without_models(workplace, block):
    assert_refused(config() | {"pave": block}, workplace, "pave")


MODELS = [
    ("no-entry", without(("models", 1)), ["beta", "`data`", "purify: false"]),
    ("no-data", without(("models", 1, "data")), ["beta", "`data`", "purify: false"]),
    ("no-path", without(("models", 1, "data", "path")), ["beta", "data.path"]),
    ("not-merged", spoil(("models", 1, "model"), "./gamma"), ["gamma", "not part of this merge", "alpha"]),
    (
        "base",
        spoil(("models",), [*config()["pave"]["models"], {"model": "./origin", "data": {"path": "rows.jsonl"}}]),
        ["origin", "base"],
    ),
    ("twice", spoil(("models",), [config()["pave"]["models"][0]] * 2 + [config()["pave"]["models"][1]]), ["alpha", "twice"]),
]


@pytest.mark.parametrize(("spoilt", "words"), [case[1:] for case in MODELS], ids=[case[0] for case in MODELS])
def test_models(workplace, spoilt, words):
    assert_refused(spoilt, workplace, "pave", "models", *words)


SELECTIONS = [
    ("include-nothing", spoil(("include",), ["no_such_layer"]), ["include", "no_such_layer"]),
    ("exclude-nothing", spoil(("exclude",), ["no_such_layer"]), ["exclude", "no_such_layer"]),
    ("include-norms", spoil(("include",), ["norm"]), ["include", "norm"]),
    ("include-head", spoil(("include",), ["lm_head"]), ["include", "lm_head"]),
    ("exclude-all", spoil(("exclude",), ["layers"]), ["alpha", "exclude"]),
]


@pytest.mark.parametrize(("spoilt", "words"), [case[1:] for case in SELECTIONS], ids=[case[0] for case in SELECTIONS])
def test_selections_of_nothing(workplace, spoilt, words):
    assert_refused(spoilt, workplace, "pave", *words)


COLUMNS = ["text", "question"]
DATA_CASES = [
    ("no-file", {"path": "missing.jsonl"}, ["missing.jsonl", "data.path"]),
    ("no-folder", {"path": "./missing"}, ["missing"]),
    ("no-column", {"path": "rows.jsonl", "text": "txt"}, ["'txt'", "data.text", *COLUMNS]),
    ("no-field", {"path": "rows.jsonl", "text": "{question} {answer}"}, ["'answer'", "data.text", *COLUMNS]),
    ("bad-template", {"path": "rows.jsonl", "text": "{question"}, ["{question", "template"]),
    ("no-pair", {"path": "rows.jsonl", "text": "text", "text_pair": "other"}, ["'other'", "data.text_pair", *COLUMNS]),
    ("no-messages", {"path": "rows.jsonl", "messages": "chat"}, ["'chat'", "data.messages", *COLUMNS]),
    ("not-messages", {"path": "rows.jsonl", "messages": "question"}, ["data", "role"]),
    ("both", {"path": "rows.jsonl", "messages": "question", "text": "text"}, ["text", "messages"]),
    ("pair-alone", {"path": "rows.jsonl", "text_pair": "question"}, ["text_pair", "text"]),
    ("empty", {"path": "empty.jsonl"}, ["empty.jsonl"]),
    ("blank", {"path": "blank.jsonl"}, ["data"]),
    ("no-split", {"path": "rows.jsonl", "split": "tset"}, ["rows.jsonl", "tset"]),
    ("nothing-to-choose", {"path": "other.jsonl"}, ["`text`", "`messages`", "body"]),
    ("hub", {"path": "nobody/no-such-data"}, ["nobody/no-such-data"]),
    ("broken", {"path": "broken.jsonl"}, ["broken.jsonl"]),
]


@pytest.mark.parametrize(("data", "words"), [case[1:] for case in DATA_CASES], ids=[case[0] for case in DATA_CASES])
def test_data(workplace, data, words):
    write_rows(workplace / "other.jsonl", [{"body": "one two"}])
    (workplace / "broken.jsonl").write_text('{"text": "one"}\n{"text": ')
    assert_refused(spoil(("models", 1, "data"), data), workplace, "beta", *words)


def test_no_chat_template(workplace):
    (workplace / "beta" / "chat_template.jinja").unlink()
    write_rows(workplace / "chat.jsonl", [{"messages": [{"role": "user", "content": "one two"}]}])
    spoilt = spoil(("models", 1, "data"), {"path": "chat.jsonl"})
    assert_refused(spoilt, workplace, "beta", "messages", "chat template", "`text`")


@pytest.mark.parametrize("kind", ["none", "broken"])
def test_no_tokenizer(workplace, kind):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (workplace / "beta" / name).unlink()
    if kind == "broken":
        (workplace / "beta" / "tokenizer.json").write_text("{}")
    assert_refused(config(), workplace, "beta", "tokenizer")


def test_task_vector_without_base(workplace):
    spoilt = spoil(("target",), "task_vector") | {"merge_method": "linear"}
    del spoilt["base_model"]
    assert_refused(spoilt, workplace, "task_vector", "base", "target: weights")


def rewrite(folder, name, value):
    """Put one value into a stored weight."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_parameter(name)[1, 1] = value
    model.save_pretrained(folder)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "model.layers.2.mlp.down_proj.weight"])
def test_weights_that_are_not_finite(workplace, name):
    """The last layer's weight is seen by no other layer, so only reading it can tell."""
    rewrite(workplace / "beta", name, float("nan"))
    result = invoke(config(), workplace / "out")
    assert isinstance(result.exception, SystemExit)
    assert "beta" in result.output
    assert "not finite" in result.output
    assert ".".join(name.split(".")[:3]) in result.output
    assert not (workplace / "out").exists()


def test_activations_that_are_not_finite(workplace):
    """One token's embedding overflows: the model, the layer and the sample that holds it are named."""
    tokenizer = transformers.AutoTokenizer.from_pretrained("beta")
    rows = [{"text": "one two three"}, {"text": "four five"}, {"text": "zzz"}, {"text": "six seven"}]
    write_rows(workplace / "mixed.jsonl", rows)
    token = tokenizer("zzz", add_special_tokens=False)["input_ids"][0]
    model = transformers.AutoModelForCausalLM.from_pretrained("beta")
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("inf")
    model.save_pretrained("beta")
    for size in (1, 4):
        spoilt = spoil(("models", 1, "data", "path"), "mixed.jsonl")
        spoilt["pave"]["calibration"] = {"batch_size": size}
        assert_refused(spoilt, workplace, "beta", "not finite", "layers.0.self_attn", "2")
        message = invoke(spoilt, workplace / "out").output.split("Error:")[1]
        assert not any(f"row {i}" in message or f"sample {i}" in message for i in (0, 1, 3)), message


@pytest.mark.parametrize("blocks", [True, False], ids=["block by block", "whole"])
@pytest.mark.parametrize("size", [1, 3, 64])
def test_a_weight_that_spoils_every_sample_is_named_and_no_sample_is(workplace, blocks, size):
    """`.bin` files are loaded whole."""
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(workplace / "beta", name, float("nan"))
    if not blocks:
        as_bin(workplace / "beta")
    spoilt = spoil(("calibration",), {"batch_size": size})
    message = refusal(spoilt, workplace)
    assert f"beta: its weight {name} is not finite" in message and "layers.1.mlp.down_proj" in message
    assert "data" not in message and "row" not in message


@pytest.mark.parametrize("blocks", [True, False], ids=["block by block", "whole"])
def test_activations_that_overflow_everywhere_are_not_blamed_on_samples(workplace, blocks):
    model = transformers.AutoModelForCausalLM.from_pretrained("beta")
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight").fill_(1e38)
    model.save_pretrained("beta")
    if not blocks:
        as_bin(workplace / "beta")
    message = refusal(config(), workplace)
    assert "overflow in float32" in message and "beta" in message and "layers.1.mlp.down_proj" in message
    assert "all weights are" in message and "data" not in message


def test_a_row_is_blamed_where_only_some_overflow_and_the_weight_behind_it_is_named(workplace):
    tokenizer = transformers.AutoTokenizer.from_pretrained("beta")
    rows = [{"text": "one two three"}, {"text": "four five"}, {"text": "zzz"}, {"text": "six seven"}]
    write_rows(workplace / "mixed.jsonl", rows)
    token = tokenizer("zzz", add_special_tokens=False)["input_ids"][0]
    model = transformers.AutoModelForCausalLM.from_pretrained("beta")
    spoilt = spoil(("models", 1, "data", "path"), "mixed.jsonl")
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    model.save_pretrained("beta")
    message = refusal(spoilt, workplace)
    assert "because its weight model.embed_tokens.weight is not finite" in message
    assert "2" in message.split("because")[0].split("not finite for")[1]


def test_what_is_said_of_finite_weights():
    """Which depends on whether single samples are at fault, and on the precision."""
    weights = [("w", torch.ones(3))]
    some = NotFiniteError("layer", ["row 1", "row 2"], exact=True, everywhere=False)
    assert "for row 1, row 2. Leave these rows out" in explained(some, "m", torch.float32, weights).message
    every = NotFiniteError("layer", ["row 1"], exact=True, everywhere=True)
    for dtype in (torch.float16, torch.bfloat16):
        message = explained(every, "m", dtype, weights).message
        assert f"overflow in {str(dtype)[6:]}" in message and "float32" in message and "row" not in message
    assert "without --cuda" not in explained(every, "m", torch.float32, weights).message


def as_bin(folder):
    """The same checkpoint as PyTorch pickles."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def refusal(spoilt, folder) -> str:
    result = invoke(spoilt, folder / "out")
    assert isinstance(result.exception, SystemExit), result.exception
    assert not (folder / "out").exists()
    return result.output.split("Error:")[1]


def test_layers_that_mergekit_does_not_merge(families, tmp_path):
    """Cross-attention, of which mergekit's definition of GPT-2 knows nothing."""
    from models import Family, model_config, perturbed, save

    source = families["gpt2"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.base)
    torch.manual_seed(0)
    base = transformers.GPT2LMHeadModel(model_config("gpt2", len(tokenizer), add_cross_attention=True))
    tuned = [save(perturbed(base, i + 1), tokenizer, tmp_path / f"tuned{i}") for i in range(2)]
    family = Family("gpt2", save(base, tokenizer, tmp_path / "base"), tuple(tuned), source.data)
    result = invoke(config_for(family, {}), tmp_path / "out")
    assert result.exit_code == 1
    assert "leave 16 tensors that every input has out" in result.output and "crossattention" in result.output
    assert not (tmp_path / "out").exists()


def test_the_real_command_shows_no_traceback(workplace):
    """A mistake in the block itself, and one that only the data can tell."""
    runs = []
    for name, spoilt in (("key", spoil(("rank_ration",), 1)), ("file", spoil((*DATA, "path"), "missing.jsonl"))):
        runs.append(start("mergekit-yaml", write_config(spoilt, workplace / f"{name}.yml"), workplace / name))
    for name, run in zip(("key", "file"), runs):
        out, err = run.communicate(timeout=300)
        assert run.returncode != 0
        assert "Traceback" not in out + err
        assert err.splitlines()[-1].startswith("Error: pave")
        assert not (workplace / name).exists()


def test_settings_are_checked_before_weights_and_samples(workplace):
    """A wrong setting shows at once: neither the checkpoints nor the data have to be there."""
    for folder in ("alpha", "beta", "origin"):
        (workplace / folder / "model.safetensors").unlink()
    (workplace / "rows.jsonl").unlink()
    assert_refused(spoil(("allocation",), "none"), workplace, "pave.allocation")


def family_of(cls, config, like, folder):
    """A base and two fine-tunes of another architecture, with the tokenizer and data of a known one."""
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(like.base)
    base = cls(config)
    paths = [save(base, tokenizer, folder / "base")]
    paths += [save(perturbed(base, seed=i), tokenizer, folder / f"tuned{i}") for i in (1, 2)]
    return dataclasses.replace(like, base=paths[0], tuned=tuple(paths[1:]))


def test_models_that_are_mostly_something_else_than_linear_layers(llama, tmp_path):
    """Experts outside transformers' interface would keep their plain task vector; that has to be asked for."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_local_experts": 4}
    heads = {"num_key_value_heads": 2, "kv_channels": 8, "max_position_embeddings": 64}
    config = transformers.JetMoeConfig(vocab_size=320, **shape, **heads)
    family = family_of(transformers.JetMoeForCausalLM, config, llama, tmp_path)
    with pytest.raises(PaveError, match=r"tuned1 has more weights in 8 tensors .*input_linear.*pave\.exclude"):
        merge(config_for(family, {}), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    merge(config_for(family, {"exclude": ["put_linear", "router"]}), tmp_path / "out")
    report = json.loads((tmp_path / "out" / "pave_report.json").read_text())
    assert {row["tensor"] for row in report["purified"]} == {f"model.layers.{i}.self_attention.kv_proj.weight" for i in range(2)}


def test_models_of_different_vocabularies_are_refused_before_calibration(workplace, cache):
    larger = transformers.AutoModelForCausalLM.from_pretrained("alpha")
    larger.resize_token_embeddings(larger.config.vocab_size + 3)
    larger.save_pretrained("alpha")
    rows = larger.config.vocab_size
    assert_refused(
        config(), workplace, "model.embed_tokens.weight", f"{rows} x ", f"{rows - 3} x ", "./alpha", "tokenizer: {source: base}"
    )
    assert not cache.exists()
    mended = config() | {"tokenizer": {"source": "base"}}
    assert invoke(mended, workplace / "out").exit_code == 0


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("intermediate_size", "up_proj.weight is 224 x 48 in ./alpha, 112 x 48 in ./beta"),
        ("hidden_size", "embed_tokens.weight is"),
    ],
)
def test_models_of_different_shapes_are_refused_before_calibration(key, told, workplace, cache):
    wider = transformers.AutoConfig.from_pretrained("alpha")
    setattr(wider, key, 2 * getattr(wider, key))
    transformers.AutoModelForCausalLM.from_config(wider).save_pretrained("alpha")
    assert_refused(config(), workplace, told, "of the same size")
    assert not cache.exists()
