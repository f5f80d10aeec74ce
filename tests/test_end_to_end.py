"""Merges of real models, tensor by tensor against the float64 reference that knows only PAVE's definition.

task_arithmetic with weight 1 on one model and 0 on the others writes that model's purified weights themselves.
"""

import functools
import itertools
import tempfile
from pathlib import Path

import pytest
import torch
from commands import finish, fresh
from merging import assert_exact, config_for, entries, merge, write_config
from models import make_rows, write_rows
from reference import purify, weights

EVERYWHERE = 0.875


def text_sources(family, models):
    return [(data, "text", "text") for data in family.data[:models]]


def expected_for(family, models, ratios=lambda i, tensor: EVERYWHERE, sources=None, **settings):
    sources = sources or text_sources(family, models)
    return purify(family.kind, family.base, family.tuned[:models], sources, ratios, **settings)


@functools.cache
def plain_merge(family, weight, dtype):
    config = config_for(family, models=len(weight), weight=weight, dtype=dtype)
    with tempfile.TemporaryDirectory() as out:
        return merge(config, Path(out) / "plain")


def check(family, tmp_path, pave, expected, models, dtype="float64", only=None):
    """Compare each model's purified weights, as a merge writes them, with the reference."""
    for i in range(models) if only is None else [only]:
        weight = tuple(float(i == j) for j in range(models))
        config = config_for(family, pave, models=models, weight=weight, dtype=dtype)
        written = merge(config, tmp_path / f"purified{i}")
        assert_exact(written, expected[i], plain_merge(family, weight, dtype))


GRID = [
    (kind, count, allocation, regularization, target)
    for kind, count, allocation in itertools.product(("llama", "gpt2", "bert"), (2, 3), ("spectral", "uniform"))
    for regularization, target in (("relative", "weights"), ("absolute", "weights"), ("relative", "task_vector"))
]


@pytest.mark.parametrize(("kind", "count", "allocation", "regularization", "target"), GRID)
def test_purified_weights_are_exact(families, tmp_path, kind, count, allocation, regularization, target):
    family = families[kind]
    given, wanted = (0.1, 0.1) if regularization == "absolute" else ({"relative": 0.01}, ("relative", 0.01))
    pave = {"allocation": allocation, "regularization": given, "target": target}
    expected = expected_for(family, count, allocation=allocation, regularization=wanted, target=target)
    if allocation == "spectral":
        kept = [[row.kept for row in of_model.values()] for of_model in expected]
        assert kept[0] != kept[1], "the models must differ, or this is no test of allocation"
    check(family, tmp_path, pave, expected, count)


def test_defaults_are_those_of_the_contract(llama, tmp_path):
    """rank_ratio 0.984, spectral, lambda 0.01 of the mean diagonal, W' as published; and the column `text`."""
    pave = {"models": [{"model": str(m), "data": {"path": str(d)}} for m, d in zip(llama.tuned[:2], llama.data)]}
    config = config_for(llama, weight=(1.0, 0.0), dtype="float64")
    written = merge(config | {"pave": pave}, tmp_path / "purified")
    expected = expected_for(llama, 2, lambda i, tensor: 0.984)
    assert_exact(written, expected[0], plain_merge(llama, (1.0, 0.0), "float64"))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_few_tokens(families, tmp_path, kind):
    """With fewer tokens than inputs C has no full rank, and is stored as rows."""
    family = families[kind]
    data = write_rows(tmp_path / "few.jsonl", [{"text": "one two three four five"}])
    pave = {"models": entries(family, 2, path=str(data)), "regularization": 0.1}
    expected = expected_for(family, 2, sources=[(data, "text", "text")] * 2, regularization=0.1)
    assert next(iter(expected[0].values())).tokens < 32
    check(family, tmp_path, pave, expected, 2)


DATA_FORMS = {
    "template": ({"text": "Q: {question}\nA: {answer} ({number})"}, ("template", "Q: {question}\nA: {answer} ({number})")),
    "column": ({"text": "answer"}, ("text", "answer")),
    "pair": ({"text": "question", "text_pair": "answer"}, ("pair", "question", "answer")),
    "messages": ({"messages": "conversation"}, ("messages", "conversation")),
}


@pytest.mark.parametrize(
    ("kind", "form"),
    [("llama", "template"), ("llama", "messages"), ("llama", "pair"), ("gpt2", "column"), ("bert", "pair"), ("bert", "template")],
)
def test_forms_of_data(families, tmp_path, kind, form):
    family = families[kind]
    given, how = DATA_FORMS[form]
    models = [{"model": str(m), "data": {"path": str(d)} | given} for m, d in zip(family.tuned[:2], family.data)]
    sources = [(data, *how) for data in family.data[:2]]
    expected = expected_for(family, 2, sources=sources, regularization=0.1)
    check(family, tmp_path, {"models": models, "regularization": 0.1}, expected, 2)


def test_messages_column_is_found_by_itself(llama, tmp_path):
    rows = [{"messages": row["conversation"], "n": i} for i, row in enumerate(make_rows("list index loop print", 12, seed=1))]
    data = write_rows(tmp_path / "chat.jsonl", rows)
    pave = {"models": [{"model": str(m), "data": {"path": str(data)}} for m in llama.tuned[:2]]}
    check(llama, tmp_path, pave, expected_for(llama, 2, sources=[(data, "messages", "messages")] * 2), 2, only=0)


@pytest.mark.parametrize("kind", ["csv", "json", "parquet", "txt", "folder", "streaming"])
def test_kinds_of_files(llama, tmp_path, kind):
    """The same texts in another container give the same purified weights."""
    import datasets

    rows = [{"text": row["text"]} for row in make_rows("patient doctor fever dose blood", 15, seed=5)]
    jsonl = write_rows(tmp_path / "folder" / "rows.jsonl", rows)
    path = {"folder": tmp_path / "folder", "streaming": jsonl}.get(kind, tmp_path / f"rows.{kind}")
    table = datasets.Dataset.from_list(rows)
    if kind == "txt":
        path.write_text("".join(row["text"] + "\n" for row in rows))
    elif kind in ("csv", "json", "parquet"):
        getattr(table, f"to_{kind}")(path)
    more = {"data_files": "rows.jsonl"} if kind == "folder" else {"streaming": True} if kind == "streaming" else {}
    models = [{"model": str(m), "data": {"path": str(path)} | more} for m in llama.tuned[:2]]
    expected = expected_for(llama, 2, sources=[(jsonl, "text", "text")] * 2, regularization=0.1)
    check(llama, tmp_path, {"models": models, "regularization": 0.1}, expected, 2, only=1)


def test_rank_ratio_gradient(llama, tmp_path):
    """Interpolated over the layers, as mergekit does it."""
    by_layer = {"0": 0.95, "1": 0.775, "2": 0.6}
    expected = expected_for(llama, 2, lambda i, tensor: by_layer[tensor.split(".")[2]], regularization=0.1)
    check(llama, tmp_path, {"rank_ratio": [0.95, 0.6], "regularization": 0.1}, expected, 2)


def test_rank_ratio_gradient_outside_the_layers(families, tmp_path):
    """BERT's pooler comes after the layers; mergekit resolves a gradient at its start there."""
    bert = families["bert"]

    def ratio(i, tensor):
        return 0.6 if "layer.1" in tensor else 0.9

    expected = expected_for(bert, 2, ratio, regularization=0.1)
    check(bert, tmp_path, {"rank_ratio": [0.9, 0.6], "regularization": 0.1}, expected, 2)


def test_rank_ratio_filters(llama, tmp_path):
    """The first filter that fits decides, and what none fits has the default."""
    given = [{"filter": "q_proj", "value": 0.5}, {"filter": "mlp", "value": [0.9, 0.7]}, {"filter": "v_proj", "value": 1.0}]

    def ratio(i, tensor):
        if "q_proj" in tensor:
            return 0.5
        if "mlp" in tensor:
            return {"0": 0.9, "1": 0.8, "2": 0.7}[tensor.split(".")[2]]
        return None if "v_proj" in tensor else 0.984

    expected = expected_for(llama, 2, ratio, regularization=0.1)
    check(llama, tmp_path, {"rank_ratio": given, "regularization": 0.1}, expected, 2)


def test_a_model_may_differ_from_the_block(llama, tmp_path):
    models = entries(llama, 3)
    models[0] |= {"rank_ratio": [{"filter": "mlp", "value": 0.5}], "regularization": 0.2}
    models[1] |= {"target": "task_vector", "exclude": ["self_attn.k_proj"], "calibration": {"max_length": 9}}
    models[2] |= {"include": ["self_attn"], "regularization": {"relative": 0.05}}

    def ratio(i, tensor):
        if (i == 1 and "k_proj" in tensor) or (i == 2 and "self_attn" not in tensor):
            return None
        return 0.5 if i == 0 and "mlp" in tensor else 0.875

    pave = {"models": models, "regularization": {"relative": 0.1}, "calibration": {"max_length": 20}}
    settings = {
        "regularization": [0.2, ("relative", 0.1), ("relative", 0.05)],
        "target": ["weights", "task_vector", "weights"],
        "max_length": [20, 9, 20],
    }
    check(llama, tmp_path, pave, expected_for(llama, 3, ratio, **settings), 3)


@pytest.mark.parametrize(
    ("selection", "chosen"),
    [
        ({"exclude": ["k_proj", "layers.1."]}, lambda t: "k_proj" not in t and "layers.1." not in t),
        ({"include": ["mlp"]}, lambda t: "mlp" in t),
        ({"include": ["mlp", "q_proj"], "exclude": ["down"]}, lambda t: ("mlp" in t or "q_proj" in t) and "down" not in t),
    ],
)
def test_include_and_exclude(llama, tmp_path, selection, chosen):
    expected = expected_for(llama, 2, lambda i, tensor: EVERYWHERE if chosen(tensor) else None)
    check(llama, tmp_path, selection, expected, 2, only=0)


def test_purify_false_leaves_a_model_out_of_allocation_too(llama, tmp_path):
    models = [*entries(llama, 2), {"model": str(llama.tuned[2]), "purify": False}]
    expected = expected_for(llama, 3, lambda i, tensor: None if i == 2 else EVERYWHERE)
    check(llama, tmp_path, {"models": models}, expected, 3, only=1)
    config = config_for(llama, {"models": models}, models=3, weight=(0.0, 0.0, 1.0))
    alone = plain_merge(llama, (0.0, 0.0, 1.0), "float32")
    for name, tensor in merge(config, tmp_path / "third").items():
        assert torch.equal(tensor, alone[name]), name


def test_a_single_model(llama, tmp_path):
    check(llama, tmp_path, {}, expected_for(llama, 1), 1)


def test_stored_in_the_dtype_of_the_merge(llama, tmp_path):
    """W' is computed from the weights as stored and rounded once, whatever dtype the merge works in."""
    expected = expected_for(llama, 2)[1]
    # linear hands a single tensor through unchanged.
    config = config_for(llama, {}, weight=(0.0, 1.0), merge_method="linear", base_model=None, dtype="bfloat16")
    written = merge(config, tmp_path / "out")
    for name, wanted in expected.items():
        assert written[name].dtype == torch.bfloat16
        # A value next to a rounding boundary may fall on either side of it.
        differing = (written[name] != wanted.weight.bfloat16()).double().mean().item()
        assert differing < 0.01, f"{name}: {differing:.1%} of the values are not W' rounded to bfloat16"


def test_half_precision_checkpoints(families, tmp_path):
    """A bfloat16 checkpoint runs in float32 on a CPU; its weights are what they are."""
    import transformers
    from models import Family

    source = families["llama"]
    folders = []
    for folder in (source.base, *source.tuned):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / folder.name)
        transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / folder.name)
        folders.append(tmp_path / folder.name)
    family = Family("llama", folders[0], tuple(folders[1:]), source.data)
    expected = expected_for(family, 2, regularization=0.1)
    check(family, tmp_path / "out", {"regularization": 0.1}, expected, 2, only=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_batch_size_does_not_matter(families, tmp_path, kind):
    """Padding never enters C: one sample at a time or all at once, within float32 rounding of the forward pass."""
    family = families[kind]
    expected = expected_for(family, 2, regularization=0.1)
    for size in (1, 40):
        pave = {"calibration": {"batch_size": size}, "cache_dir": str(tmp_path / f"cache{size}"), "regularization": 0.1}
        check(family, tmp_path / str(size), pave, expected, 2, only=0)


def test_the_real_command(families, tmp_path):
    """`mergekit-yaml` with nothing but the block, in a fresh process."""
    family = families["gpt2"]
    pave = {"cache_dir": str(tmp_path / "cache"), "regularization": 0.1}
    config = config_for(family, pave, weight=(1.0, 0.0), dtype="float64")
    done = finish(fresh("mergekit-yaml", write_config(config, tmp_path / "config.yml"), tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    expected = expected_for(family, 2, regularization=0.1)[0]
    assert_exact(weights(tmp_path / "out"), expected, plain_merge(family, (1.0, 0.0), "float64"))
