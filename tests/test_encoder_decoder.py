"""Encoder-decoder models: `target`, two sequences in one batch, and every weight against a reference without padding."""

import dataclasses
import json
import re
from functools import cache
from pathlib import Path

import merging
import pytest
import torch
import transformers
from merging import TOLERANCE, config_for, merge
from models import make_rows, perturbed, read_rows, save, write_rows
from reference import purified_alone, weights

from mergekit_pave.calibration.architecture import describe
from mergekit_pave.calibration.batches import Encoded, make_batches
from mergekit_pave.errors import PaveError

RATIO, SHIFT = 0.875, 0.1
LINEARS = {
    "bart": r"layers\.\d+\.(self_attn|encoder_attn|fc\d)",
    "t5": r"\.(q|k|v|o|wi_0|wi_1|wo)$",
    "t5-untied": r"\.(q|k|v|o|wi_0|wi_1|wo)$",
}


def _model(kind: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    if kind == "bart":
        sizes = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 56))}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 4}
        special = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0, "decoder_start_token_id": 3}
        return transformers.BartForConditionalGeneration(
            transformers.BartConfig(
                vocab_size=320, d_model=32, max_position_embeddings=64, init_std=0.15, **sizes, **heads, **special
            )
        )
    shape = {"d_model": 32, "d_kv": 12, "d_ff": 56, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 2}
    config = transformers.T5Config(
        vocab_size=320, feed_forward_proj="gated-gelu", decoder_start_token_id=0, tie_word_embeddings=kind == "t5", **shape
    )
    return transformers.T5ForConditionalGeneration(config)


@pytest.fixture(scope="module")
def seq2seq(families, tmp_path_factory):
    """Families of encoder-decoder models, with questions and answers as data."""

    @cache
    def make(kind: str):
        folder = tmp_path_factory.mktemp(kind)
        tokenizer = transformers.AutoTokenizer.from_pretrained(families["bert"].base)
        base = _model(kind)
        tuned = tuple(save(perturbed(base, seed=i), tokenizer, folder / f"tuned{i}") for i in (1, 2))
        return dataclasses.replace(families["bert"], kind=kind, base=save(base, tokenizer, folder / "base"), tuned=tuned)

    return make


def block(family, **more) -> dict:
    """A `pave:` block that shows the models questions, and their answers as targets."""
    models = [
        {"model": str(model), "data": {"path": str(data), "text": "Q: {question}", "target": "answer"}}
        for model, data in zip(family.tuned, family.data)
    ]
    return {"models": models, "rank_ratio": RATIO, "regularization": SHIFT, "allocation": "uniform"} | more


@cache
def layer_inputs(kind: str, folder: Path, data: Path) -> dict[str, torch.Tensor]:
    """All inputs (tokens, width) of every linear layer, one row of the data at a time, by the model's own use of labels."""
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    kept: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and re.search(LINEARS[kind], name):
            kept[name] = []
            module.register_forward_hook(lambda m, args, out, name=name: kept[name].append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for row in read_rows(data):
            if row["answer"]:
                inputs = tokenizer(f"Q: {row['question']}", return_tensors="pt")["input_ids"]
                # With `labels` the model makes the decoder's inputs, whatever its rule.
                model(input_ids=inputs, labels=tokenizer(row["answer"], return_tensors="pt")["input_ids"])
    return {name: torch.cat(parts) for name, parts in kept.items()}


def assert_purified(family, which: int, data: Path, written: dict, plain: dict) -> None:
    """Uniform allocation: the float64 definition, one weight at a time."""
    source = weights(family.tuned[which])
    seen = layer_inputs(family.kind, family.tuned[which], data)
    assert len(seen) > 20
    for name, tensor in written.items():
        x = seen.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if x is None:
            assert torch.equal(tensor, plain[name]), name
            continue
        wanted = purified_alone(source[name], x, RATIO, SHIFT)
        error = (tensor.double() - wanted).norm() / (wanted - source[name]).norm()
        assert error <= TOLERANCE, f"{name} is {error:.2e} of ||W'-W|| away from the reference"
    assert {f"{name}.weight" for name in seen} <= written.keys()


def merge_only(family, which: int, out: Path, pave: dict | None) -> dict[str, torch.Tensor]:
    weight = tuple(float(i == which) for i in range(2))
    return merge(config_for(family, pave, weight=weight, dtype="float64"), out)


@pytest.mark.parametrize("kind", ["bart", "t5", "t5-untied"])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_purified_weights_are_exact(seq2seq, tmp_path, kind, batch_size):
    family = seq2seq(kind)
    pave = block(family, cache_dir=str(tmp_path / "cache"), calibration={"batch_size": batch_size})
    plain = merge_only(family, 0, tmp_path / "plain", None)
    written = merge_only(family, 0, tmp_path / "out", pave)
    assert_purified(family, 0, family.data[0], written, plain)


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_questions_as_long_as_their_answers_are_exact(seq2seq, tmp_path, kind):
    """One length on both sides of a batch, but padding in other rows of each."""
    family = seq2seq(kind)
    texts = [row["question"] for row in make_rows("sum add count equal number", 12, seed=8)]
    rows = [{"question": one, "answer": f"Q: {other}"} for one, other in zip(texts, reversed(texts))]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    pave = block(family, calibration={"batch_size": 64})
    for entry in pave["models"]:
        entry["data"]["path"] = str(data)
    plain = merge_only(family, 0, tmp_path / "plain", None)
    assert_purified(family, 0, data, merge_only(family, 0, tmp_path / "out", pave), plain)


def test_the_merged_model_loads_and_the_report_counts_both_sides(seq2seq, tmp_path):
    family = seq2seq("bart")
    merge(config_for(family, block(family)), tmp_path / "out")
    _, info = transformers.BartForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    report = json.loads((tmp_path / "out" / "pave_report.json").read_text())
    seen = layer_inputs("bart", family.tuned[0], family.data[0])
    tokens = {row["tensor"]: row["tokens"] for row in report["purified"] if row["model"] == str(family.tuned[0])}
    assert tokens == {f"{layer}.weight": len(rows) for layer, rows in seen.items()}
    layer = "model.decoder.layers.0"
    encoded, decoded = tokens["model.encoder.layers.0.fc1.weight"], tokens[f"{layer}.fc1.weight"]
    assert tokens[f"{layer}.encoder_attn.k_proj.weight"] == encoded != decoded == tokens[f"{layer}.encoder_attn.q_proj.weight"]
    assert report["models"][str(family.tuned[0])]["tokens"] == encoded + decoded


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_the_token_budget_holds_for_each_side(seq2seq, tmp_path, kind):
    family = seq2seq(kind)
    merge(config_for(family, block(family, calibration={"max_tokens": 30})), tmp_path / "out")
    report = json.loads((tmp_path / "out" / "pave_report.json").read_text())
    assert {row["tokens"] for row in report["purified"] if row["model"] == str(family.tuned[0])} == {30}
    assert report["models"][str(family.tuned[0])]["tokens"] == 60


def test_blocks_go_through_memory_one_by_one_and_layers_that_share_an_input_share_a_covariance(seq2seq, tmp_path, caplog):
    """The encoder's blocks first, then the decoder's; cross-attention's keys and values see the encoder's output."""
    family = seq2seq("bart")
    pave = block(family, cache_dir=str(tmp_path / "cache"), keep_covariances=True)
    with caplog.at_level("INFO", logger="mergekit_pave"):
        merge(config_for(family, pave), tmp_path / "out")
    assert "loading it whole" not in caplog.text and "one by one" not in caplog.text
    for folder in (tmp_path / "cache" / "covariance").glob("[!.]*"):
        layers = json.loads((folder / "manifest.json").read_text())["layers"]
        groups: dict[str, set[str]] = {}
        for layer, entry in layers.items():
            groups.setdefault(entry["file"], set()).add(layer)
        for i in range(2):
            at = f"model.decoder.layers.{i}"
            assert {f"{at}.encoder_attn.{name}_proj" for name in "kv"} in groups.values()
            assert {f"{at}.self_attn.{name}_proj" for name in "qkv"} in groups.values()


def test_encoder_and_decoder_never_have_one_length():
    """Lengths tell the two apart; so they have to differ, with nothing but padding."""
    samples = [
        Encoded(str(i), {"input_ids": [5] * n, "decoder_input_ids": [6] * m}, list(range(n)), list(range(m)))
        for i, (n, m) in enumerate([(4, 4), (2, 3), (7, 1), (1, 1), (3, 7)])
    ]
    for size in (1, 2, 5):
        for batch in make_batches(samples, size):
            source, target = batch.inputs["input_ids"], batch.inputs["decoder_input_ids"]
            assert source.shape[1] != target.shape[1]
            for counted, ids, mask in zip(batch.counted, (source, target), ("attention_mask", "decoder_attention_mask")):
                assert counted.shape == ids.shape
                assert torch.equal(counted, ids != 0)
                assert torch.equal(counted.long(), batch.inputs[mask])


def test_long_rows_are_cut_to_what_the_model_can_take(seq2seq, tmp_path):
    """Also where both sides are as long as the model allows, and one of them has to be padded further."""
    family = seq2seq("bart")
    data = write_rows(tmp_path / "long.jsonl", [{"question": "sum add " * 100, "answer": "add sum " * 100}] * 3)
    pave = block(family)
    for entry in pave["models"]:
        entry["data"]["path"] = str(data)
    merge(config_for(family, pave), tmp_path / "out")
    report = json.loads((tmp_path / "out" / "pave_report.json").read_text())
    assert {row["tokens"] for row in report["purified"]} == {3 * 64, 3 * 63}


def test_empty_targets_are_skipped_and_counted(seq2seq, tmp_path, caplog):
    family = seq2seq("t5")
    rows = make_rows("sum add count equal number", 9, seed=3)
    for i in (1, 4):
        rows[i]["answer"] = ""
    rows[6]["question"] = "nine"
    data = write_rows(tmp_path / "rows.jsonl", rows)
    pave = block(family)
    for entry in pave["models"]:
        entry["data"]["path"] = str(data)
    plain = merge_only(family, 1, tmp_path / "plain", None)
    with caplog.at_level("WARNING", logger="mergekit_pave"):
        written = merge_only(family, 1, tmp_path / "out", pave)
    assert "skipped 2 of 9 rows: 2 with an empty target" in caplog.text
    assert_purified(family, 1, data, written, plain)


def test_a_target_is_required(seq2seq, tmp_path):
    family = seq2seq("t5")
    pave = block(family)
    del pave["models"][1]["data"]["target"]
    with pytest.raises(PaveError, match=r"tuned2\]\.data\.target: missing.*encoder-decoder"):
        merge(config_for(family, pave), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_target_is_refused_for_other_models(families, tmp_path, kind):
    family = families[kind]
    with pytest.raises(PaveError, match=r"tuned0\]\.data\.target: only an encoder-decoder model takes one"):
        merge(config_for(family, {"models": merging.entries(family, target="answer")}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_target_has_to_be_in_the_data(seq2seq, tmp_path):
    family = seq2seq("bart")
    pave = block(family)
    pave["models"][0]["data"]["target"] = "{reply}"
    with pytest.raises(PaveError, match=r"tuned1\]\.data\.target: .* has no column 'reply'; its columns are: .*answer"):
        merge(config_for(family, pave), tmp_path / "out")


@pytest.mark.parametrize("how", ["none", "absent"])
def test_a_decoder_needs_a_start(seq2seq, how):
    family = seq2seq("t5")
    config = transformers.AutoConfig.from_pretrained(family.base)
    if how == "none":
        config.decoder_start_token_id = None
    else:
        del config.decoder_start_token_id
    with pytest.raises(PaveError, match=r"no decoder_start_token_id"):
        describe(config, str(family.base), False)


def test_what_a_decoder_is_shown(seq2seq):
    """Where a class has no rule of its own for labels, as BART's classifier, it is one to the right."""
    config = transformers.AutoConfig.from_pretrained(seq2seq("bart").base)
    config.architectures = ["BartForSequenceClassification"]
    assert describe(config, "", False).shift([7, 8, 3]) == [3, 7, 8]


def test_speech_models_are_refused():
    small = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.WhisperConfig(**small, architectures=["WhisperForConditionalGeneration"])
    with pytest.raises(PaveError, match=r"an encoder that reads input_features cannot be calibrated"):
        describe(config, "whisper", False)


def test_a_module_without_layers_takes_none(seq2seq, tmp_path, cache):
    """Beside the encoder and the decoder mergekit makes a module of what is in no layer; its range is [0, 0]."""
    family = seq2seq("bart")
    config = config_for(family, block(family))
    whole = merge(config, tmp_path / "whole")
    models = [(str(model), {"parameters": {"weight": 0.5}}) for model in family.tuned] + [(str(family.base), {})]

    def module(layers: int) -> dict:
        return {"slices": [{"sources": [{"model": model, "layer_range": [0, layers], **more} for model, more in models]}]}

    del config["models"]
    config["modules"] = {"default": module(0)} | {f"model.{part}.layers": module(2) for part in ("encoder", "decoder")}
    written = merge(config, tmp_path / "out")
    assert written.keys() == whole.keys() and all(torch.equal(written[name], whole[name]) for name in whole)
    config["modules"]["default"] = module(1)
    with pytest.raises(PaveError, match=r"layer_range \[0, 1\] of .* The model has 0 layers"):
        merge(config, tmp_path / "refused")
