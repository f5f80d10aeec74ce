"""What cannot be refined is refused before any work, and what fails midway leaves nothing behind."""

import dataclasses
import json
import os
import re
import shutil
import signal
import time

import pytest
import torch
import transformers
from architectures import make_architecture
from commands import command, start
from merging import config_for, invoke, merge, write_config
from models import make_family, perturbed, save, write_rows
from test_complete import images, stored_otherwise
from test_encoder_decoder import block, seq2seq  # noqa: F401
from test_experts import family_of  # noqa: F401
from test_failures import OUT_OF_MEMORY, failing
from test_refine import refined
from test_refused_early import changed, refused
from test_vision_language import data as pictured_data
from test_vision_language import pictured, pictures  # noqa: F401

from mergekit_pave import PaveError
from mergekit_pave.core import refine
from mergekit_pave.planning import refine as planning
from mergekit_pave.tasks import refine as tasks


def report_of(out) -> dict:
    return json.loads((out / "pave_report.json").read_text())["refined"]


def with_slices(family, ranges, sources=None) -> dict:
    config = refined(family)
    models = [str(model) for model in family.tuned[:2]]
    del config["models"]
    config["slices"] = [
        {
            "sources": [
                {"model": model, "layer_range": list(layers), "parameters": {"weight": 0.5}}
                for model in (*(models if sources is None else [models[sources[i]]]), str(family.base))
            ]
        }
        for i, layers in enumerate(ranges)
    ]
    return config


def passthrough(family) -> dict:
    config = with_slices(family, [(0, 1), (1, 3)], sources=(0, 1)) | {"merge_method": "passthrough"}
    for part in config["slices"]:
        part["sources"] = part["sources"][:1]
    return config


def without_data(family, **instead) -> dict:
    config = refined(family)
    config["pave"]["models"][0] = {"model": str(family.tuned[0]), "purify": False, **instead}
    return config


def between_two(family) -> dict:
    config = refined(family, models=1, merge_method="slerp", parameters={"t": 0.5})
    config["models"] = [{"model": config["models"][0]["model"]}, {"model": str(family.base)}]
    return config


def baseless(family) -> dict:
    config = refined(family, merge_method="linear")
    del config["base_model"]
    return config


def under_a_model(family) -> dict:
    config = refined(family, refine=False)
    config["pave"]["models"][0]["refine"] = True
    return config


CONFIGS = {
    "no base": (baseless, r"linear merges without a base model here; set base_model"),
    "slerp": (between_two, r"slerp merges one model with the base model, and refining needs several"),
    "passthrough": (passthrough, r"no tensor of this merge would be refined \(.*21 the base model's weight is not part"),
    "a negative weight": (lambda f: refined(f, weight=(0.5, -0.2)), r"tuned1 has a negative weight \(-0\.2 in model\."),
    "weights of 0": (lambda f: refined(f, weight=(0.0, 0.0)), r"no tensor of this merge would be refined \(.*every weight is 0"),
    "no data": (without_data, r"pave.models: refine needs data for each model, and .*tuned0 has none: give it `data`"),
    "given covariances": (lambda f: without_data(f, covariance="./cov"), r"refine needs data for each model, and .*tuned0"),
    "a new tokenizer": (
        lambda f: refined(f, tokenizer={"source": "union"}),
        r"gets a new tokenizer, in which the token ids of .*tuned0 may be other tokens; set `tokenizer: \{source: .*tuned0\}`",
    ),
    "a layer twice": (
        lambda f: with_slices(f, [(0, 2), (1, 3)]),
        r"model\.layers\.2\.self_attn\.q_proj\.weight is merged from model\.layers\.1\.self_attn\.q_proj\.weight of .*tuned0",
    ),
    "the first layers": (
        lambda f: with_slices(f, [(0, 2)]),
        r"tuned0 has the block model\.layers\.2, and the merged model has none of this place",
    ),
    "covariance": (
        lambda f: refined(f, refine={"covariance": 2}),
        r"pave\.refine\.covariance: must be 1 or less, not 2",
    ),
    "lambda": (lambda f: refined(f, refine={"lambda": 0}), r"pave\.refine\.lambda: must be greater than 0, not 0"),
    "an unknown key": (lambda f: refined(f, refine={"lamda": 1}), r"pave\.refine: unknown key 'lamda'; did you mean 'lambda'\?"),
    "a word": (lambda f: refined(f, refine="layers"), r"pave\.refine: must be true or false, not 'layers'"),
    "under a model": (under_a_model, r"tuned0\]: refine is about the merged model: put it directly under `pave`"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_it_is_refused_before_any_work(llama, tmp_path, cache, case):
    make, words = CONFIGS[case]
    told = refused(make(llama), tmp_path, cache)
    assert re.search(words, told), told


def test_token_ids_of_another_tokenizer(llama, tmp_path, cache):
    def swap(folder):
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text())
        ids = content["model"]["vocab"]
        one, other = [token for token in ids if len(token) > 2][10:12]
        ids[one], ids[other] = ids[other], ids[one]
        path.write_text(json.dumps(content))

    told = refused(refined(changed(llama, tmp_path, swap)), tmp_path, cache)
    assert re.search(r"token id \d+ is '\S+' in the samples of \S+changed, but '\S+' for the merged model, .*of \S+base;", told)


def test_a_base_model_without_a_tokenizer(llama, tmp_path, cache):
    shutil.copytree(llama.base, tmp_path / "bare", ignore=shutil.ignore_patterns("token*"))
    told = refused(refined(dataclasses.replace(llama, base=tmp_path / "bare")), tmp_path, cache)
    assert "bare: its tokenizer cannot be loaded, and refining compares it with that of" in told


def with_more_tokens(folder, out):
    tokenizer, model = (cls.from_pretrained(folder) for cls in (transformers.AutoTokenizer, transformers.AutoModelForCausalLM))
    tokenizer.add_tokens(["<one>", "<two>"])
    model.resize_token_embeddings(len(tokenizer))
    return save(model, tokenizer, out)


def test_a_vocabulary_that_mergekit_resizes(llama, tmp_path, cache):
    """Token ids beyond the merged vocabulary are refused. With the larger vocabulary the merge is refined, and can be loaded."""
    data = write_rows(tmp_path / "new.jsonl", [{"text": "sum <one> add <two> count"}] * 4)
    grown = with_more_tokens(llama.tuned[0], tmp_path / "grown")
    family = dataclasses.replace(llama, tuned=(grown, *llama.tuned[1:]), data=(data, *llama.data[1:]))
    told = refused(refined(family, tokenizer={"source": "base"}), tmp_path, cache)
    assert "the token id 320 is '<one>' in the samples of" in told and "but None for the merged model" in told
    merge(refined(family, tokenizer={"source": str(grown)}), tmp_path / "merged")
    assert len(report_of(tmp_path / "merged")["layers"]) == 21
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values()) and model.config.vocab_size == 322


def test_images_with_texts(pictured, pictures, tmp_path, cache):  # noqa: F811
    family = pictured("gemma3")
    models = [{"model": str(model), "data": pictured_data(pictures, text="caption")} for model in family.tuned[:2]]
    config = config_for(family, {"purify": False, "refine": True, "models": models})
    told = refused(config, tmp_path, cache)
    assert "tuned1 reads images with texts, and such models cannot be refined yet; leave `refine` out" in told


def test_models_of_different_depth(llama, tmp_path, cache):
    deeper = make_family("llama", tmp_path / "deep", num_hidden_layers=4)
    family = dataclasses.replace(llama, tuned=(deeper.tuned[0], llama.tuned[1]))
    told = refused(with_slices(family, [(0, 3)]), tmp_path, cache)
    assert "has the block model.layers.3, and the merged model has none of this place" in told


def albert(families, folder):
    config = transformers.AlbertConfig(
        vocab_size=320,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(families["bert"].base)
    base = transformers.AlbertForSequenceClassification(config)
    folders = [save(model, tokenizer, folder / str(i)) for i, model in enumerate((base, perturbed(base, 1), perturbed(base, 2)))]
    return dataclasses.replace(families["bert"], base=folders[0], tuned=tuple(folders[1:]))


@pytest.mark.parametrize("kind", ["albert", "deberta-v2"])
def test_models_that_call_a_layer_twice(families, tmp_path, cache, monkeypatch, kind):
    made = albert(families, tmp_path) if kind == "albert" else make_architecture(f"{kind}-ForSequenceClassification", tmp_path)
    told = refused(refined(made), tmp_path, cache)
    assert re.search(r"pave\.refine: \S+ calls \S+query\S* more than once for a sample", told)
    monkeypatch.setattr(planning, "called_again", lambda *_: None)  # as where that cannot be told without values
    with pytest.raises(PaveError, match=r"fits each layer once, .* this kind of model calls .*query\S* more than once"):
        merge(refined(made), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# What works, with limits.


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_encoder_decoder_models(seq2seq, tmp_path, kind):  # noqa: F811
    """Both sides, whatever the batch size."""
    family = seq2seq(kind)
    written = []
    for batch_size in (1, 8):
        pave = block(family, purify=False, refine=True, calibration={"batch_size": batch_size})
        written.append(merge(config_for(family, pave), tmp_path / str(batch_size)))
        assert len(report_of(tmp_path / str(batch_size))["layers"]) == {"bart": 32, "t5": 47}[kind]
    for name, tensor in written[0].items():
        assert (tensor - written[1][name]).norm() <= 1e-4 * tensor.norm(), name


@pytest.mark.parametrize("id", ["vit-ForImageClassification", "dinov3_vit-Model"])
def test_image_models(tmp_path, id):
    family = make_architecture(id, tmp_path)
    pave = {"purify": False, "models": images(family)}
    merge(config_for(family, pave | {"refine": True}), tmp_path / "out")
    rows = report_of(tmp_path / "out")["layers"]
    assert len(rows) == 12
    assert sum(row["error_after"] for row in rows) < sum(row["error_before"] for row in rows)


def test_texts_alone_leave_a_vision_tower_to_the_method(pictured, tmp_path):  # noqa: F811
    family = pictured("gemma3")
    written = merge(refined(family), tmp_path / "out")
    plain = merge(config_for(family), tmp_path / "plain")
    left = report_of(tmp_path / "out")["left"]
    towers = [name for name in plain if re.search(r"vision_tower.*(proj|fc\d)\.weight$", name)]
    assert towers and all(left[name] == "never called during calibration" for name in towers)
    assert all(torch.equal(written[name], plain[name]) for name in plain if "vision" in name)


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3", "afmoe"])
def test_experts_keep_what_the_method_gave(family_of, tmp_path, kind):  # noqa: F811
    family = family_of(kind)
    written = merge(refined(family), tmp_path / "out")
    plain = merge(config_for(family), tmp_path / "plain")
    report = report_of(tmp_path / "out")
    experts = {name for name, reason in report["left"].items() if reason == "experts of a mixture"}
    assert experts == {name for name in plain if ".experts." in name and "bias" not in name}
    assert all(torch.equal(written[name], plain[name]) for name in experts)
    fitted = {row["tensor"] for row in report["layers"]}
    assert {name for name in plain if "o_proj" in name or ("shared_expert" in name and "proj" in name)} <= fitted


def test_slices_with_layers_in_their_places(llama, tmp_path):
    whole = merge(refined(llama), tmp_path / "whole")
    sliced = merge(with_slices(llama, [(0, 1), (1, 3)]), tmp_path / "sliced")
    assert all(torch.equal(sliced[name], whole[name]) for name in whole)


@pytest.mark.parametrize("whole", [False, True])
def test_the_configuration_is_that_of_the_merge(families, tmp_path, monkeypatch, whole):
    """Running a model switches off its cache, and notes a precision."""
    if whole:
        monkeypatch.setattr(tasks, "_streamed", tasks._whole)
    for kind, family in families.items():
        configs = []
        for i, config in enumerate((config_for(family, dtype="bfloat16"), refined(family, dtype="bfloat16"))):
            merge(config, tmp_path / kind / str(i))
            configs.append((tmp_path / kind / str(i) / "config.json").read_text())
        assert configs[0] == configs[1]


# Faults.


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 2])
def test_weights_that_are_not_finite(llama, tmp_path, cache, which, value):
    def spoil(name):
        def change(tensors):
            tensors[name] = tensors[name].clone()
            tensors[name].view(-1)[-3] = value
            return tensors

        return change

    layer, norm = "model.layers.1.self_attn.v_proj.weight", "model.layers.1.input_layernorm.weight"
    family = stored_otherwise(llama, tmp_path / "layer", spoil(layer), which=[which])
    model = (family.base, *family.tuned)[which].name
    with pytest.raises(PaveError, match=rf"{model}: its weight {layer} is not finite.*Fetch the checkpoint again"):
        merge(refined(family), tmp_path / "out")
    family = stored_otherwise(llama, tmp_path / "norm", spoil(norm), which=[which])
    config = refined(family)
    config["pave"]["vocabulary"] = "counts"  # or a fine-tune's weight would be found out when its head is measured
    with pytest.raises(PaveError, match=r"give model\.layers\.1\.self_attn\.q_proj in the merged model are not finite.*NaN"):
        merge(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_inputs_that_are_not_finite_are_not_taken_for_none():
    x, y = torch.randn(2, 40, 8)
    for broken in (x, y):
        rows = broken.clone()
        rows[3, 2] = float("nan")
        with pytest.raises(ValueError, match="not finite"):
            refine.summed([(rows, y) if broken is x else (x, rows)])
    assert refine.summed([(x[:0], y[:0])]) is None and refine.summed([(0 * x, y)]) is None


def assert_nothing_is_left(out, cache):
    """Nothing in the output folder, and of the cache only what another run may use."""
    assert not list(out.glob("*"))
    assert {path.name for path in cache.glob("*")} <= {"covariance", "comparison", "samples"}


def test_interrupted(llama, tmp_path, cache, monkeypatch):
    config = refined(llama, merge_method="regmean")
    expected = merge(config, tmp_path / "expected")
    for error in (KeyboardInterrupt(), OUT_OF_MEMORY["cpu"]):
        with monkeypatch.context() as patch:
            patch.setattr(refine, "refine", failing(refine.refine, 9, error))
            with pytest.raises((KeyboardInterrupt, PaveError)) as caught:
                merge(config, tmp_path / "out")
        if not isinstance(error, KeyboardInterrupt):
            assert str(caught.value).startswith("refining model.layers.1.self_attn.k_proj.weight ran out of memory on cpu. Free")
        assert_nothing_is_left(tmp_path / "out", cache)
    written = merge(config, tmp_path / "out")
    assert all(torch.equal(written[name], expected[name]) for name in expected)


def test_memory_that_runs_out_in_a_model(llama, tmp_path, cache, monkeypatch):
    from transformers.models.llama import modeling_llama

    forward = failing(modeling_llama.LlamaMLP.forward, 5, OUT_OF_MEMORY["cuda"])
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    config = refined(llama)
    config["pave"]["vocabulary"] = "counts"  # no model is run before
    with pytest.raises(PaveError, match=r"side by side ran out of memory on cpu\. A smaller pave\.calibration\.batch_size"):
        merge(config, tmp_path / "out")
    assert_nothing_is_left(tmp_path / "out", cache)


_WAITING = """
import pathlib, sys, time
from mergekit.scripts import run_yaml
from mergekit_pave.core import refine
fit, calls, reached = refine.refine, [], sys.argv.pop()

def wait(*args):
    calls.append(args)
    if len(calls) == 9:
        pathlib.Path(reached).touch()
        time.sleep(100)
    return fit(*args)

refine.refine = wait
run_yaml.main()
"""


def test_killed(llama, tmp_path, cache):
    config = refined(llama, merge_method="regmean")
    path, reached = write_config(config, tmp_path / "config.yml"), tmp_path / "reached"
    run = start("python", "-c", _WAITING, path, tmp_path / "out", reached)
    deadline = time.monotonic() + 120
    while not reached.exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGKILL)
    run.communicate(timeout=60)
    assert run.returncode == -signal.SIGKILL, "it was to be killed, but ended by itself"
    assert_nothing_is_left(tmp_path / "out", cache)
    expected = merge(config | {"pave": config["pave"] | {"cache_dir": str(tmp_path / "other")}}, tmp_path / "expected")
    written = merge(config, tmp_path / "out")
    assert all(torch.equal(written[name], expected[name]) for name in expected)


_LIMITED = """
import resource, sys
from mergekit.scripts import run_yaml
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop()),) * 2)
run_yaml.main()
"""


def test_a_full_disk(llama, tmp_path, cache):
    """A limit on file size stands for the full disk: the library's own cache of the data is written before."""
    path = write_config(refined(llama), tmp_path / "config.yml")
    merge(refined(llama), tmp_path / "before")
    result = command("python", "-c", _LIMITED, path, tmp_path / "out", "100000")
    assert result.returncode == 1 and "cannot be written" in result.stderr and "cache_dir" in result.stderr
    assert "Traceback" not in result.stderr
    assert_nothing_is_left(tmp_path / "out", cache)


def test_a_cache_folder_that_cannot_be_written(llama, tmp_path):
    (tmp_path / "blocked").write_text("a file, not a folder")
    config = refined(llama)
    config["pave"]["cache_dir"] = str(tmp_path / "blocked")
    result = invoke(config, tmp_path / "out")
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert "cannot be written" in result.output and "pave.cache_dir" in result.output
    assert not (tmp_path / "out").exists()
