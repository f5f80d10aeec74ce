"""Weights are decomposed while their covariances are in memory, and only what something else needs is stored."""

import dataclasses
import json
import logging
import shutil

import pytest
import torch
import transformers
from click.testing import CliRunner
from merging import config_for, entries, invoke, merge, write_config
from models import make_family, perturbed, save

from mergekit_pave import cache as caches
from mergekit_pave.cache import DamagedError
from mergekit_pave.calibration.stored import stored_covariances
from mergekit_pave.cli import main
from mergekit_pave.core import purification
from mergekit_pave.errors import PaveError
from mergekit_pave.tasks import decompose


def stored(cache, kind="covariance"):
    """The tensor files of a kind."""
    return sorted((cache / kind).rglob("*.safetensors"))


def manifests(cache):
    return [json.loads(path.read_text()) for path in sorted((cache / "covariance").rglob("manifest.json"))]


def same(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def decomposed(monkeypatch):
    """The names of the weights that are decomposed."""
    names = []
    original = purification.decompose_weight

    def count(weight, layer, covariances, regularization, count, min_tokens, where):
        names.append(where)
        return original(weight, layer, covariances, regularization, count, min_tokens, where)

    monkeypatch.setattr(decompose, "decompose_weight", count)
    return names


@pytest.fixture(scope="module")
def kept(families, tmp_path_factory):
    """A merge that keeps its covariances, and its cache."""
    folder = tmp_path_factory.mktemp("kept")
    pave = {"keep_covariances": True, "cache_dir": str(folder / "cache")}
    return merge(config_for(families["llama"], pave), folder / "out"), folder / "cache"


def test_a_purified_merge_stores_no_covariances_and_gives_the_same(llama, cache, tmp_path, kept):
    same(merge(config_for(llama, {}), tmp_path / "out"), kept[0])
    for manifest in manifests(cache):
        layers = manifest["layers"]
        assert {layer for layer, entry in layers.items() if entry["file"]} == {manifest["head"]["layer"]} == {"lm_head"}
        assert all(entry["tokens"] == manifest["tokens"] for entry in layers.values())
    assert len(stored(cache, "subspace")) == 42
    assert len(stored(kept[1])) > len(stored(cache)) == 2 * 3  # of each model the head, predictions, and counts


def test_the_cache_of_a_first_merge_is_a_small_part_of_the_checkpoint(cache, tmp_path):
    family = make_family("llama", tmp_path / "models")
    merge(config_for(family, {"rank_ratio": 0.984}), tmp_path / "out")
    # Of covariances nothing but that of the head, whose width and vocabulary are a large part of so small a model.
    layers = [path for path in stored(cache) if path.name.startswith("0")]
    assert len(layers) == 2
    tails = sum(path.stat().st_size for path in stored(cache, "subspace"))
    checkpoint = sum(file.stat().st_size for file in family.tuned[0].glob("*.safetensors"))
    assert 0 < tails < 2 * checkpoint / 4


@pytest.mark.parametrize("change", [{"rank_ratio": 0.5}, {"regularization": 0.1}], ids=["larger cut", "other lambda"])
def test_what_needs_the_covariances_measures_again_and_says_so_before(llama, cache, tmp_path, caplog, kept, change):
    merge(config_for(llama, {}), tmp_path / "first")
    config = config_for(llama, change)
    plan = CliRunner().invoke(main, ["plan", str(write_config(config, tmp_path / "config.yml"))])
    assert plan.output.count("to do again, as they were not kept: about") == 2
    caplog.set_level(logging.INFO, "mergekit_pave")
    written = merge(config, tmp_path / "second")
    assert caplog.text.count("calibrated again, because its covariances were not kept (pave.keep_covariances)") == 2
    config["pave"]["cache_dir"] = str(tmp_path / "fresh")
    same(written, merge(config, tmp_path / "third"))
    # With covariances in the cache the same needs no second pass.
    shutil.copytree(kept[1], tmp_path / "copy")
    config["pave"] |= {"cache_dir": str(tmp_path / "copy"), "keep_covariances": True}
    caplog.clear()
    again = merge(config, tmp_path / "fourth")
    assert "to be calibrated" not in caplog.text
    assert all(torch.allclose(again[name], written[name], rtol=1e-5, atol=1e-6) for name in written)


def test_a_smaller_cut_needs_nothing_new(llama, cache, tmp_path, decomposed):
    merge(config_for(llama, {}), tmp_path / "first")
    decomposed.clear()
    merge(config_for(llama, {"rank_ratio": 0.95}), tmp_path / "second")
    assert decomposed == []


def test_a_stopped_pass_goes_on_and_what_it_left_does_not_count_before(llama, cache, tmp_path, monkeypatch, kept):
    original, calls = decompose.decompose_weight, []

    def stop(*args):
        calls.append(args[-1])
        if len(calls) == 11:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(decompose, "decompose_weight", stop)
    config = config_for(llama, {})
    with pytest.raises(KeyboardInterrupt):
        merge(config, tmp_path / "out")
    assert len(stored(cache, "subspace")) == 10 and not list((cache / "subspace").rglob("manifest.json"))
    plan = CliRunner().invoke(main, ["plan", str(write_config(config, tmp_path / "config.yml")), "--json"])
    assert all(model["decomposition"]["weights"] == 21 for model in json.loads(plan.output)["models"].values())
    same(merge(config, tmp_path / "out"), kept[0])
    assert len(calls) == 42 + 1  # the ten were not made again


def test_what_a_wrong_start_has_made_is_forgotten(families, cache, tmp_path, monkeypatch):
    """ALBERT calls one block again and again, which shows only after the first time."""
    config = transformers.AlbertConfig(
        vocab_size=320, embedding_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2
    )
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(families["bert"].base)
    base = transformers.AlbertForSequenceClassification(config)
    folders = [save(model, tokenizer, tmp_path / str(i)) for i, model in enumerate((base, perturbed(base, 1)))]
    albert = dataclasses.replace(families["bert"], base=folders[0], tuned=(folders[1],))
    passes = []
    original = decompose.DecomposeOnTheWay.start_again

    def watch(self):
        passes.append(len(list((cache / "subspace").rglob("prepared.json"))))
        original(self)
        assert not list((cache / "subspace").rglob("prepared.json"))
        assert not list((cache / "subspace").rglob("*.safetensors"))

    monkeypatch.setattr(decompose.DecomposeOnTheWay, "start_again", watch)
    merge(config_for(albert, {}, models=1, weight=(1.0,)), tmp_path / "out")
    assert passes and passes[0] > 0


def test_regmean_keeps_what_it_merges_with(llama, cache, tmp_path):
    merge(config_for(llama, {}), tmp_path / "first")
    config = config_for(llama, {}, merge_method="regmean")
    merged = merge(config, tmp_path / "second")
    assert all(entry["file"] for manifest in manifests(cache) for entry in manifest["layers"].values())
    config["pave"]["cache_dir"] = str(tmp_path / "fresh")
    same(merged, merge(config, tmp_path / "third"))


def test_regmean_cannot_do_without_them(llama, cache, tmp_path):
    config = config_for(llama, {"keep_covariances": False}, merge_method="regmean")
    result = invoke(config, tmp_path / "out")
    assert result.exit_code and "pave.keep_covariances: false, but regmean merges with the covariances of" in result.output
    assert not stored(cache)


def test_a_second_pass_that_fails_leaves_what_the_first_has_measured(llama, cache, tmp_path, monkeypatch, kept):
    merge(config_for(llama, {}), tmp_path / "first")
    before = {path: path.read_bytes() for path in stored(cache)} | {
        path: path.read_bytes() for path in (cache / "covariance").rglob("manifest.json")
    }

    def fail(*_):
        assert before == {path: path.read_bytes() for path in before}  # also meanwhile: another merge may be reading it
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(decompose, "decompose_weight", fail)
        with pytest.raises(PaveError, match="ran out of memory"):
            merge(config_for(llama, {"regularization": 0.1}), tmp_path / "second")
    assert before == {path: path.read_bytes() for path in stored(cache) + sorted((cache / "covariance").rglob("manifest.json"))}
    # And where it does not fail, what was there before has gone.
    merge(config_for(llama, {"regularization": 0.1}), tmp_path / "third")
    assert len(stored(cache)) == 2 * 3
    merge(config_for(llama, {}, merge_method="regmean"), tmp_path / "fourth")
    named = {name for manifest in manifests(cache) for name in manifest["files"]}
    assert {path.name for path in stored(cache)} == named


def test_covariances_that_vanish_during_a_run_are_told(cache):
    with pytest.raises(DamagedError, match="were removed during the run; run again"):
        stored_covariances(str(cache / "covariance" / "gone"))


def test_exported_covariances_are_imported_where_they_were_not_kept(llama, cache, tmp_path, kept):
    merge(config_for(llama, {}), tmp_path / "out")
    key = next(entry.key for entry in caches.entries(kept[1]) if entry.kind == "covariance")
    run = CliRunner()
    exported = run.invoke(main, ["cache", "export", key, str(tmp_path / "export"), "--cache-dir", str(kept[1])])
    assert exported.exit_code == 0, exported.output
    assert "imported as" in run.invoke(main, ["cache", "import", str(tmp_path / "export")]).output
    manifest = json.loads((cache / "covariance" / key / "manifest.json").read_text())
    assert all(entry["file"] for entry in manifest["layers"].values())
    assert "in the cache already" in run.invoke(main, ["cache", "import", str(tmp_path / "export")]).output


@pytest.mark.parametrize("value", ["yes please", 0.5, "false"])
def test_other_values_are_refused(llama, cache, tmp_path, value):
    result = invoke(config_for(llama, {"keep_covariances": value}), tmp_path / "out")
    assert result.exit_code and "pave.keep_covariances" in result.output and "'auto'" in result.output


def test_covariances_that_were_not_kept_can_neither_be_exported_nor_given(llama, cache, tmp_path):
    merge(config_for(llama, {}), tmp_path / "out")
    entry = next(entry for entry in caches.entries(cache) if entry.kind == "covariance")
    listed = CliRunner().invoke(main, ["cache", "list"])
    assert listed.output.count(", not kept") == 2
    result = CliRunner().invoke(main, ["cache", "export", entry.key, str(tmp_path / "export")])
    assert result.exit_code and "set pave.keep_covariances: true" in result.output
    first, second = entries(llama)
    model = entry.artefacts[0].manifest()["model"]
    given = [
        {"model": one["model"], "covariance": str(entry.folder)} if one["model"] == model else one for one in (first, second)
    ]
    result = invoke(config_for(llama, {"models": given}), tmp_path / "given")
    assert result.exit_code and "was not kept when this was measured" in result.output
