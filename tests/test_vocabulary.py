"""Rows of the vocabulary merged by token counts: the mathematics against least squares on one-hot inputs, and real merges.

The reference knows nothing of counts. It takes each token of a model's samples as a one-hot row, and each row of the table once
more, which is the smoothing; it solves for the table whose rows differ least from those of the models.
"""

import dataclasses
import functools
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from architectures import make_architecture
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from merging import config_for, entries, forget_checkpoints, invoke, merge, write_config
from models import Family, make_model, make_tokenizer, model_config, read_rows, save_family, write_texts
from reference import weights
from safetensors.torch import save_file
from test_encoder_decoder import block, seq2seq  # noqa: F401

from mergekit_pave import PaveError
from mergekit_pave.cache import Artefact
from mergekit_pave.calibration.architecture import describe
from mergekit_pave.calibration.batches import Encoded
from mergekit_pave.calibration.counts import count_tokens
from mergekit_pave.calibration.token_rows import find_token_rows
from mergekit_pave.cli import main
from mergekit_pave.core.vocabulary import merge_rows

EMBEDDING = {
    "llama": "model.embed_tokens.weight",
    "tied-llama": "model.embed_tokens.weight",
    "gpt2": "transformer.wte.weight",
    "bert": "bert.embeddings.word_embeddings.weight",
}
HEAD = "lm_head.weight"  # of the untied Llamas


def least_squares(base, models, ids, shares_of_models, scale=1.0):
    """The rows that some model's ids show, and which these are."""
    count = len(models[0])
    identity = torch.eye(count, dtype=torch.float64)
    inputs, targets = [], []
    for model, of_model, weight in zip(models, ids, shares_of_models):
        x = torch.cat([identity[of_model], identity])
        factor = (weight / len(x)) ** 0.5
        inputs.append(factor * x)
        targets.append(factor * x @ (model.double() - base.double()))
    change = torch.linalg.lstsq(torch.cat(inputs), torch.cat(targets), driver="gelsd").solution
    shown = sorted({i for of_model, weight in zip(ids, shares_of_models) if weight for i in of_model.tolist()})
    return base.double() + scale * change, shown


def draw(rows=40, width=7, models=3, tokens=(60, 9, 300)):
    normal = torch.Generator().manual_seed(0)
    base = torch.randn(rows, width, generator=normal)
    tuned = [base + 0.1 * torch.randn(rows, width, generator=normal) for _ in range(models)]
    # Few rows are frequent, and the last ten never occur.
    ids = [(torch.rand(count, generator=normal).square() * (rows - 10)).long() for count in tokens]
    return base, tuned, ids


def merged_rows(base, tuned, ids, shares_of_models, scale=1.0, dtype=torch.float64):
    counts = [torch.bincount(of_model, minlength=len(tuned[0])) for of_model in ids]
    out = torch.full(tuned[0].shape, 7.0, dtype=dtype)
    merge_rows(base, tuned, counts, shares_of_models, scale, out=out)
    return out


@pytest.mark.parametrize("shares_of_models", [(1.0, 1.0, 1.0), (0.2, 0.7, 0.4), (0.0, 1.0, 0.0)])
@pytest.mark.parametrize("scale", [1.0, 1.3])
@pytest.mark.parametrize("elements", [1 << 20, 20], ids=["one-block", "blocks-of-two-rows"])
def test_rows_are_exact(monkeypatch, shares_of_models, scale, elements):
    monkeypatch.setattr("mergekit_pave.core.vocabulary._BLOCK", elements)
    base, tuned, ids = draw()
    exact, shown = least_squares(base, tuned, ids, shares_of_models, scale)
    found = merged_rows(base, tuned, ids, shares_of_models, scale)
    assert 1 < len(shown) <= 30
    assert torch.allclose(found[shown], exact[shown], rtol=0, atol=1e-12)
    unseen = sorted(set(range(40)) - set(shown))
    assert (found[unseen] == 7).all(), "a row that no data shows was changed"


def test_without_a_base_model():
    """Changes may be measured from anything, so nothing is the same."""
    base, tuned, ids = draw()
    exact, shown = least_squares(torch.zeros_like(base), tuned, ids, (0.2, 0.7, 0.4))
    assert torch.allclose(merged_rows(None, tuned, ids, (0.2, 0.7, 0.4))[shown], exact[shown], rtol=0, atol=1e-12)


def test_precision_of_the_output():
    base, tuned, ids = draw()
    base, tuned = base.bfloat16(), [model.bfloat16() for model in tuned]
    exact = merged_rows(base, tuned, ids, (1.0,) * 3)
    assert torch.equal(merged_rows(base, tuned, ids, (1.0,) * 3, dtype=torch.bfloat16), exact.bfloat16())


def test_the_scale_of_weights_is_nothing():
    base, tuned, ids = draw()
    once = merged_rows(base, tuned, ids, (0.1, 0.2, 0.3))
    assert torch.allclose(merged_rows(base, tuned, ids, (10.0, 20.0, 30.0)), once, rtol=0, atol=1e-14)


# Merges of real models.


@pytest.fixture(scope="module")
def family_of(families, tmp_path_factory):
    """The families that all tests share, and one of Llamas whose embedding is also their head. So is that of GPT-2."""

    @functools.cache
    def make(kind: str) -> Family:
        if kind != "tied-llama":
            return families[kind]
        folder, tokenizer = tmp_path_factory.mktemp(kind), make_tokenizer("llama")
        config = model_config("llama", len(tokenizer))
        config.tie_word_embeddings = True
        return save_family("llama", make_model("LlamaForCausalLM", config), tokenizer, write_texts(folder), folder)

    return make


def tokens_of(family: Family, predicted: bool = False) -> list[torch.Tensor]:
    """All token ids of each model's samples, or those that come after another."""
    ids = []
    for folder, data in zip(family.tuned[:2], family.data):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        texts = [row["text"] for row in read_rows(data)]
        samples = [tokenizer(text, truncation=True, max_length=64)["input_ids"] for text in texts]
        ids.append(torch.tensor([i for sample in samples for i in sample[predicted:]]))
    return ids


def unpurified(family: Family, **more) -> dict:
    return {"models": [entry | {"purify": False} for entry in entries(family, 2)]} | more


def counting(family: Family, pave: dict | None = None, **more) -> dict:
    """A merge by task arithmetic whose embedding is merged by counts."""
    pave = unpurified(family, vocabulary="counts") | (pave or {})
    return config_for(family, pave, **{"dtype": "float64", "weight": (0.3, 0.5)} | more)


def plain(config: dict, out: Path) -> dict[str, torch.Tensor]:
    """What mergekit alone makes of a config, or of one for `regmean` where its closed form is not used."""
    config = {key: value for key, value in config.items() if key != "pave"}
    if config["merge_method"] == "regmean":
        shown = {"lambda": config["parameters"].get("lambda", 1.0)}
        config |= {"merge_method": "task_arithmetic" if "base_model" in config else "linear", "parameters": shown}
    return merge(config, out)


def check(family: Family, name: str, written: dict, unmerged: dict, shares_of_models: tuple, scale: float = 1.0) -> None:
    """The rows that the samples show are exact, and all others as the method gives them."""
    base, *tuned = (weights(folder)[name] for folder in (family.base, *family.tuned[:2]))
    exact, shown = least_squares(base, tuned, tokens_of(family, predicted=name == HEAD), shares_of_models, scale)
    change = (exact - base.double())[shown]
    assert 10 < len(shown) < 200
    assert (written[name][shown] - exact[shown]).norm() < 1e-6 * change.norm()
    assert (unmerged[name][shown] - exact[shown]).norm() > 0.1 * change.norm(), "the method gives the same, so this is no test"
    others = sorted(set(range(len(exact))) - set(shown))
    assert torch.equal(written[name][others], unmerged[name][others])


def report_of(folder: Path) -> dict:
    return json.loads((folder / "pave_report.json").read_text())


@pytest.mark.parametrize("kind", EMBEDDING)
def test_merges_are_exact(family_of, tmp_path, cache, kind):
    """The embedding, and a head of its own that predicts the next token. All else is as the method gives it."""
    family, name = family_of(kind), EMBEDDING[kind]
    names = {name, HEAD} if kind == "llama" else {name}
    config = counting(family)
    written = merge(config, tmp_path / "out")
    unmerged = plain(config, tmp_path / "plain")
    assert written.keys() == unmerged.keys()
    assert {key for key in written if not torch.equal(written[key], unmerged[key])} == names
    for key in names:
        check(family, key, written, unmerged, (0.3, 0.5))
    assert not (cache / "covariance").exists(), "something was calibrated"
    rows = {row["tensor"]: row for row in report_of(tmp_path / "out")["vocabulary"]["merged"]}
    assert rows.keys() == names
    row, tokens = rows[name], tokens_of(family)
    assert row["rows"] == len(written[name]) and row["lambda"] == 1.0
    assert row["shown"] == len(set(torch.cat(tokens).tolist()))
    assert row["tokens"] == {str(model): len(ids) for model, ids in zip(family.tuned, tokens)}


@pytest.mark.parametrize("method", ["ties", "model_stock", "task_arithmetic", "tsv"])
def test_other_methods(llama, tmp_path, method):
    """A method's own `lambda` is not that of the rows. Without weights all models are alike."""
    config = counting(llama, merge_method=method)
    shares_of_models = (0.3, 0.5)
    if method == "model_stock":
        config["models"] = [{"model": model["model"]} for model in config["models"]]
        shares_of_models = (1.0, 1.0)
    else:
        config["parameters"] = {"lambda": 0.4}
    written, unmerged = merge(config, tmp_path / "out"), plain(config, tmp_path / "plain")
    check(llama, EMBEDDING["llama"], written, unmerged, shares_of_models)


def test_beside_purification(llama, tmp_path):
    """Purified layers are the same with and without it."""
    config = counting(llama, {"models": entries(llama, 2)})
    written = merge(config, tmp_path / "out")
    del config["pave"]["vocabulary"]
    purified = merge(config, tmp_path / "purified")
    names = {EMBEDDING["llama"], HEAD}
    assert {key for key in written if not torch.equal(written[key], purified[key])} == names
    for name in names:
        check(llama, name, written, purified, (0.3, 0.5))
    assert "vocabulary" not in report_of(tmp_path / "purified")


def test_it_is_part_of_regmean(llama, tmp_path, cache):
    """With data, and unless it is switched off. The `lambda` of the tensor counts."""
    name = EMBEDDING["llama"]
    config = config_for(llama, unpurified(llama), weight=(0.3, 0.5), merge_method="regmean", dtype="float64")
    config["parameters"] = {"lambda": [{"filter": "embed", "value": 1.3}, {"value": 1.1}]}
    written = merge(config, tmp_path / "out")
    check(llama, name, written, plain(config, tmp_path / "plain"), (0.3, 0.5), 1.3)
    report = report_of(tmp_path / "out")
    assert {row["tensor"]: row["lambda"] for row in report["vocabulary"]["merged"]} == {name: 1.3, HEAD: 1.1}
    assert report["vocabulary"]["left"] == {}
    assert not {name, HEAD} & report["regmean"]["as_task_arithmetic"].keys()
    for i, off in enumerate(({"vocabulary": "method"}, {})):
        config["pave"] = unpurified(llama) | off
        if not off:
            config["parameters"]["covariance"] = [
                {"filter": "embed", "value": 0.0},
                {"filter": "lm_head", "value": 0.0},
                {"value": 0.5},
            ]
        same = merge(config, tmp_path / f"off{i}")
        assert torch.equal(same[name], plain(config, tmp_path / f"plain{i}")[name])
        assert all(torch.equal(same[key], written[key]) for key in written if key not in (name, HEAD))
        report = report_of(tmp_path / f"off{i}")
        assert "vocabulary" not in report and report["regmean"]["as_task_arithmetic"][name] == "vocabulary"


def test_without_data_it_can_be_asked_for(llama, tmp_path, cache):
    """`covariance: 0` needs no calibration, and neither do counts."""
    config = config_for(llama, unpurified(llama, vocabulary="counts"), weight=(0.3, 0.5), merge_method="regmean", dtype="float64")
    config["parameters"] = {"covariance": 0}
    written = merge(config, tmp_path / "out")
    check(llama, EMBEDDING["llama"], written, plain(config, tmp_path / "plain"), (0.3, 0.5))
    assert not (cache / "covariance").exists()


def test_regmean_without_a_base_model(llama, tmp_path):
    config = config_for(llama, unpurified(llama), weight=(0.3, 0.5), merge_method="regmean", dtype="float64", parameters={})
    del config["base_model"]
    check(llama, EMBEDDING["llama"], merge(config, tmp_path / "out"), plain(config, tmp_path / "plain"), (0.3, 0.5))


def test_an_encoder_decoder_model(seq2seq, tmp_path):  # noqa: F811
    """Its embedding is looked up by both sides, and is the head, too."""
    family = seq2seq("t5")
    models = [entry | {"purify": False} for entry in block(family)["models"]]
    config = counting(family, {"models": models})
    written, unmerged = merge(config, tmp_path / "out"), plain(config, tmp_path / "plain")
    (row,) = report_of(tmp_path / "out")["vocabulary"]["merged"]
    assert [key for key in written if not torch.equal(written[key], unmerged[key])] == [row["tensor"]] == ["shared.weight"]
    ids = []
    for folder, data in zip(family.tuned, family.data):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)
        of_model = []
        for row in read_rows(data):
            if row["answer"]:
                of_model += tokenizer(f"Q: {row['question']}")["input_ids"]
                labels = tokenizer(row["answer"], return_tensors="pt")["input_ids"]
                of_model += model.prepare_decoder_input_ids_from_labels(labels)[0].tolist()
        ids.append(torch.tensor(of_model))
    base, *tuned = (weights(folder)["shared.weight"] for folder in (family.base, *family.tuned))
    exact, shown = least_squares(base, tuned, ids, (0.3, 0.5))
    assert torch.allclose(written["shared.weight"][shown], exact[shown], rtol=0, atol=1e-8)
    others = sorted(set(range(len(exact))) - set(shown))
    assert torch.equal(written["shared.weight"][others], unmerged["shared.weight"][others])


def test_each_side_has_its_own_embedding():
    """Bart's decoder with an embedding of its own is looked up by the ids of its own."""
    config = transformers.BartConfig(
        vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8, decoder_ffn_dim=8
    )
    config.architectures = ["BartForConditionalGeneration"]
    both = ("input_ids", "decoder_input_ids")
    found = describe(config, "somewhere", False).token_rows
    assert set(found.values()) == {both} and "lm_head.weight" in found
    model = transformers.BartForConditionalGeneration(config)
    model.model.decoder.embed_tokens = torch.nn.Embedding(50, 16)
    model.lm_head = torch.nn.Linear(16, 50)
    found = find_token_rows(model, has_decoder=True)
    assert found["lm_head.weight"] == ("predicted",)
    assert found["model.encoder.embed_tokens.weight"] == both[:1] and found["model.decoder.embed_tokens.weight"] == both[1:]


def test_weights_alone_need_nothing_anew(llama, tmp_path, cache):
    config = config_for(llama, unpurified(llama), merge_method="regmean", dtype="float64", parameters={})
    merge(config, tmp_path / "first")
    times = {path: path.stat().st_mtime_ns for path in cache.rglob("*.*")}
    for model, weight in zip(config["models"], (0.1, 0.9)):
        model["parameters"]["weight"] = weight
    check(llama, EMBEDDING["llama"], merge(config, tmp_path / "out"), plain(config, tmp_path / "plain"), (0.1, 0.9))
    assert times and times == {path: path.stat().st_mtime_ns for path in cache.rglob("*.*")}


# What is left to the method, and why.


def regmean_with(llama: Family, pave: dict, **more) -> dict:
    return config_for(llama, unpurified(llama) | pave, merge_method="regmean", dtype="float64", parameters={}, **more)


PADDED = {"source": "base", "pad_to_multiple_of": 7}  # two rows more than there are tokens


def left(config: dict, out: Path) -> dict[str, str]:
    """The reasons of a merge whose vocabulary is all as the method gives it."""
    name = EMBEDDING["llama"]
    written = merge(config, out)
    config["pave"]["vocabulary"] = "method"
    assert torch.equal(written[name], merge(config, out.parent / "method")[name])
    report = report_of(out)
    assert report["vocabulary"]["merged"] == [] and name in report["regmean"]["as_task_arithmetic"]
    return report["vocabulary"]["left"]


def test_a_vocabulary_that_mergekit_rearranges(llama, tmp_path):
    reasons = left(regmean_with(llama, {}, tokenizer=PADDED), tmp_path / "out")
    assert reasons.keys() == {EMBEDDING["llama"], HEAD}
    assert set(reasons.values()) == {"rearranged by mergekit to fit another vocabulary"}


def test_a_tokenizer_section_that_changes_nothing(llama, tmp_path):
    """All models have the same tokens: the vocabulary is fitted as it is without the section."""
    written = merge(regmean_with(llama, {}, tokenizer={"source": "base"}), tmp_path / "with")
    plain = merge(regmean_with(llama, {}), tmp_path / "without")
    assert written.keys() == plain.keys() and all(torch.equal(tensor, plain[name]) for name, tensor in written.items())
    assert report_of(tmp_path / "with")["vocabulary"] == report_of(tmp_path / "without")["vocabulary"]
    assert {row["tensor"] for row in report_of(tmp_path / "with")["vocabulary"]["merged"]} == {EMBEDDING["llama"], HEAD}


def measured_elsewhere(llama: Family, cache: Path) -> dict:
    """A block with the covariances of the second model in the place of its data."""
    manifests = {path.parent: json.loads(path.read_text()) for path in (cache / "covariance").rglob("manifest.json")}
    models = unpurified(llama)["models"]
    del models[1]["data"]
    folder = next(folder for folder, manifest in manifests.items() if manifest["model"] == str(llama.tuned[1]))
    models[1]["covariance"] = str(folder)
    return {"models": models}


def test_counts_are_kept_with_covariances(llama, tmp_path, cache):
    """Also by a merge that has no use for them."""
    merge(config_for(llama, {"models": entries(llama, 2)}), tmp_path / "purified")
    wanted = merge(regmean_with(llama, {}), tmp_path / "measured")
    written = merge(regmean_with(llama, measured_elsewhere(llama, cache)), tmp_path / "out")
    assert all(torch.equal(written[name], tensor) for name, tensor in wanted.items())
    assert report_of(tmp_path / "out")["vocabulary"] == report_of(tmp_path / "measured")["vocabulary"]


def test_given_covariances_without_counts(llama, tmp_path, cache):
    """As those of earlier versions are."""
    merge(regmean_with(llama, {}), tmp_path / "measured")
    pave = measured_elsewhere(llama, cache)
    artefact = Artefact(Path(pave["models"][1]["covariance"]))
    manifest = artefact.manifest()
    del manifest["files"][manifest.pop("counts")]
    artefact.complete(manifest)
    reasons = left(regmean_with(llama, pave), tmp_path / "out")
    assert reasons[EMBEDDING["llama"]] == f"no tokens were counted for one of the models ({llama.tuned[1]})"


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "damaged"),
        ({"input_ids": torch.ones(5, dtype=torch.int64)}, "damaged"),
        ({"names": torch.ones(5, dtype=torch.int64)}, "damaged"),
        ({"names": torch.ones(5), "input_ids": torch.ones(5, dtype=torch.int64)}, "damaged"),
        ({"names": torch.ones(5, dtype=torch.int64), "input_ids": -torch.ones(5, dtype=torch.int64)}, "damaged"),
        ({"names": torch.ones(5, dtype=torch.int64), "input_ids": torch.ones(5, 5, dtype=torch.int64)}, "damaged"),
        ({"names": torch.ones(5, dtype=torch.int64), "input_ids": torch.full((5,), 1 << 62)}, "damaged"),
        ({"names": torch.ones(5, dtype=torch.int64), "input_ids": torch.ones(900, dtype=torch.int64)}, "does not know"),
        (None, "damaged"),
    ],
)
def test_given_counts_that_are_none(llama, tmp_path, cache, tensors, words):
    """Whoever published them wrote a sound manifest; without tensors a bit of the file is flipped."""
    merge(regmean_with(llama, {}), tmp_path / "measured")
    pave = measured_elsewhere(llama, cache)
    artefact = Artefact(Path(pave["models"][1]["covariance"]))
    manifest = artefact.manifest()
    path = artefact.folder / manifest["counts"]
    if tensors is None:
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
    else:
        manifest["files"][manifest["counts"]] = artefact.write(manifest["counts"], tensors)
        artefact.complete(manifest)
    with pytest.raises(PaveError, match=rf"tuned1\]\.covariance: .*counts\.safetensors.*{words}"):
        merge(counting(llama, pave), tmp_path / "out")


def test_names_that_only_the_checkpoints_have(tmp_path):
    """A bare backbone, whose tensors mergekit alone does not find. Nothing is purified here."""
    family = make_architecture("roberta-Model", tmp_path / "models")
    written = merge(counting(family), tmp_path / "out")
    unmerged = merge(
        config_for(family, {"models": entries(family, 2)}, weight=(0.3, 0.5), dtype="float64"), tmp_path / "purified"
    )
    check(family, "embeddings.word_embeddings.weight", written, unmerged, (0.3, 0.5))


@pytest.mark.parametrize("seen", [True, False])
def test_token_ids_that_mean_different_tokens(llama, tmp_path, seen):
    """Two tokens of one model swap their ids. If no sample has them, that does no harm."""
    tuned = shutil.copytree(llama.tuned[1], tmp_path / "swapped")
    content = json.loads((tuned / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    used = set(torch.cat(tokens_of(llama)).tolist())
    free = [token for token, number in vocabulary.items() if number not in used and len(token) == 1]
    first, second = next(token for token, number in vocabulary.items() if number in used and len(token) == 1), free[0]
    if not seen:
        first = free[1]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (tuned / "tokenizer.json").write_text(json.dumps(content))
    family = dataclasses.replace(llama, tuned=(llama.tuned[0], tuned))
    if seen:
        reason = left(regmean_with(family, {}), tmp_path / "out")[EMBEDDING["llama"]]
        assert reason.startswith("a token id stands for different tokens (")
        assert any(f"({number} in {llama.tuned[0]} and {tuned})" in reason for number in (vocabulary[first], vocabulary[second]))
    else:
        check(
            family,
            EMBEDDING["llama"],
            *(merge(counting(family), tmp_path / "out"), plain(counting(family), tmp_path / "plain")),
            (0.3, 0.5),
        )


def test_a_head_that_is_stored_beside_the_embedding_it_is_tied_with(family_of, tmp_path):
    """It may differ from it, so both stay as the method gives them."""
    family = family_of("tied-llama")
    folders = []
    for folder in (family.base, *family.tuned[:2]):
        folders.append(shutil.copytree(folder, tmp_path / folder.name))
        stored = weights(folder)
        stored["lm_head.weight"] = stored[EMBEDDING["llama"]].clone()
        save_file(stored, folders[-1] / "model.safetensors", {"format": "pt"})
    twice = dataclasses.replace(family, base=folders[0], tuned=tuple(folders[1:]))
    reasons = left(regmean_with(twice, {}), tmp_path / "out")
    assert set(reasons) == {EMBEDDING["llama"], "lm_head.weight"}
    assert set(reasons.values()) == {"stored twice, as an embedding and as a head that is tied with it"}
    written = weights(tmp_path / "out")
    assert torch.equal(written["lm_head.weight"], written[EMBEDDING["llama"]])


REFUSED = {
    "negative-weight": (lambda c: c["models"][1]["parameters"].update(weight=-0.2), "a weight is below 0"),
    "no-weight": (lambda c: [model["parameters"].update(weight=0) for model in c["models"]], "every weight is 0"),
    "no-data": (lambda c: c["pave"]["models"][1].pop("data"), "no tokens were counted for one of the models"),
    "tokenizer": (lambda c: c.update(tokenizer=PADDED), "rearranged by mergekit"),
    "between-two": (
        lambda c: (c.update(merge_method="slerp", parameters={"t": 0.5}), c["models"].pop(), c["pave"]["models"].pop()),
        "the base model is one of the two that slerp merges",
    ),
    "no-base": (lambda c: (c.update(merge_method="linear"), c.pop("base_model")), "there is no base model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_counts_that_were_asked_for_in_vain(llama, tmp_path, cache, case):
    config = counting(llama)
    change, why = REFUSED[case]
    change(config)
    result = invoke(config, tmp_path / "out")
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), repr(result.exception)
    message = result.output[result.output.index("Error:") :]
    assert "pave.vocabulary" in message and EMBEDDING["llama"] in message and why in message, message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("place", "words"), [("block", "pave.vocabulary"), ("model", "directly under `pave`")])
def test_keys_that_are_wrong(llama, place, words):
    config = counting(llama)
    holder = config["pave"] if place == "block" else config["pave"]["models"][0]
    holder["vocabulary"] = "count" if place == "block" else "counts"
    with pytest.raises((PaveError, ValueError), match=words):
        MergeConfiguration.model_validate(config)


def test_a_table_that_is_not_that_of_the_architecture(llama, tmp_path):
    """More rows than config.json speaks of: whose tokens they are is not known."""
    config, folders = counting(llama), []
    for folder in (llama.base, *llama.tuned[:2]):
        folders.append(shutil.copytree(folder, tmp_path / folder.name))
        stored = weights(folder)
        for name in (EMBEDDING["llama"], "lm_head.weight"):
            stored[name] = torch.cat([stored[name], stored[name][:8]])
        save_file(stored, folders[-1] / "model.safetensors", {"format": "pt"})
    config = counting(dataclasses.replace(llama, base=folders[0], tuned=tuple(folders[1:])))
    with pytest.raises(PaveError, match=r"(embed_tokens|lm_head)\.weight has 328 rows, but its config\.json speaks of 320"):
        merge(config, tmp_path / "out")


def test_the_head_of_a_masked_language_model():
    """What its rows predict is not the next token."""
    for tied in (True, False):
        config = model_config("bert", 30)
        config.architectures, config.tie_word_embeddings = ["BertForMaskedLM"], tied
        rows = describe(config, "somewhere", False).token_rows
        assert set(rows.values()) == {("input_ids",)} and EMBEDDING["bert"] in rows
        assert ("cls.predictions.decoder.weight" in rows) == tied


def test_the_bias_of_a_head(tmp_path):
    family = make_architecture("phi-ForCausalLM", tmp_path / "models")
    written = merge(counting(family), tmp_path / "out")
    unmerged = plain(counting(family), tmp_path / "plain")
    for name in (EMBEDDING["llama"], HEAD):
        check(family, name, written, unmerged, (0.3, 0.5))
    assert torch.equal(written["lm_head.bias"], unmerged["lm_head.bias"])
    reasons = report_of(tmp_path / "out")["vocabulary"]["left"]
    assert reasons == {"lm_head.bias": "neither a token embedding nor the head of a language model"}


def test_what_cannot_be_counted():
    """Images have no tokens; in a text with an image most ids stand for parts of the image."""
    tokenizer = make_tokenizer("bert")
    text = Encoded("a", {"input_ids": [5, 6, 6]}, [0])
    assert count_tokens([text], tokenizer).of(("input_ids",), 8).tolist() == [0, 0, 0, 0, 0, 1, 2, 0]
    assert count_tokens([text], tokenizer).of(("predicted",), 8).tolist() == [0, 0, 0, 0, 0, 0, 2, 0]
    both = Encoded("a", {"input_ids": [5, 6], "decoder_input_ids": [7, 4]}, [0])
    assert count_tokens([both], tokenizer).of(("input_ids", "decoder_input_ids"), 8).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert count_tokens([both], tokenizer).of(("predicted",), 8).tolist() == [0, 0, 0, 0, 1, 0, 0, 0]
    pixels = torch.zeros(1, 3, 4, 4)
    assert count_tokens([Encoded("b", {"pixel_values": pixels}, [0])], tokenizer) is None
    assert count_tokens([text, Encoded("c", {"input_ids": [5], "pixel_values": pixels}, [0])], tokenizer) is None


# What people are told.


def test_plan_report_card_and_log(llama, tmp_path, cache, caplog, undrawn):
    name, tokens = EMBEDDING["llama"], tokens_of(llama)
    config = regmean_with(llama, {})
    shown = len(set(torch.cat(tokens).tolist()))
    line = f"{shown} of 320 rows of {name} are merged by token counts ("
    counts = [f"{len(ids)} tokens of {model}" for ids, model in zip(tokens, llama.tuned)]
    path = write_config(config, tmp_path / "config.yml")
    forget_checkpoints()
    told = CliRunner().invoke(main, ["plan", str(path)]).stdout
    assert line in told and all(count in told for count in counts)
    assert f"320 of 320 rows of {HEAD} are merged by what the models predict" in told
    forget_checkpoints()
    found = json.loads(CliRunner().invoke(main, ["plan", str(path), "--json"]).stdout)["vocabulary"]
    with caplog.at_level(logging.INFO, "mergekit_pave"):
        assert invoke(config, tmp_path / "out").exit_code == 0
    assert f"  vocabulary  {shown} of 320 rows of {name} by token counts; 320 of 320 rows of {HEAD} by what" in caplog.text
    assert report_of(tmp_path / "out")["vocabulary"] == found
    card = (tmp_path / "out" / "README.md").read_text()
    section = card[card.index("### PAVE") :]
    assert f"| {name} | {shown} of 320 |" in section
    forget_checkpoints()
    done = CliRunner().invoke(main, ["report", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "out" / "pave_report" / "index.html").read_text()
    assert "Vocabulary" in page and name in page and f"{shown} of 320" in page


def test_people_are_told_of_what_is_left(llama, tmp_path, cache, caplog, undrawn):
    config = regmean_with(llama, {}, tokenizer=PADDED)
    told = "2 rearranged by mergekit to fit another vocabulary"
    with caplog.at_level(logging.INFO, "mergekit_pave"):
        assert invoke(config, tmp_path / "out").exit_code == 0
    assert f"  vocabulary  left to the merge method: {told}" in caplog.text
    assert f"Vocabulary left to the merge method, by reason: {told}." in (tmp_path / "out" / "README.md").read_text()
    planned = CliRunner().invoke(main, ["plan", str(tmp_path / "out.yml")]).stdout
    assert f"Vocabulary left to the merge method: {told}." in planned
    assert CliRunner().invoke(main, ["report", str(tmp_path / "out")]).exit_code == 0
    assert f"<td class=text>{told[2:]}</td><td>2</td>" in (tmp_path / "out" / "pave_report" / "index.html").read_text()


def test_a_merge_of_which_nothing_else_is_told(llama, tmp_path, cache, undrawn):
    """Neither purified nor by regmean."""
    assert invoke(counting(llama), tmp_path / "out").exit_code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "of 320 |" in card and "purified the task vectors" not in card
    done = CliRunner().invoke(main, ["report", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "out" / "pave_report" / "index.html").read_text()
    assert "of 320" in page and "task vectors purified" not in page and "by <code>regmean</code>" not in page
    forget_checkpoints()
    done = CliRunner().invoke(main, ["report", str(tmp_path / "out.yml"), "-o", str(tmp_path / "page"), "--quiet"])
    assert done.exit_code == 0, done.output
    assert "of 320" in (tmp_path / "page" / "index.html").read_text()
