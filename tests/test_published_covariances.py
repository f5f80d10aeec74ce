"""`mergekit-pave cache`, and covariances that travel: exported, published, used in the place of data."""

import re
import shutil
import time

import merging
import pytest
import torch
from attacks import ATTACKS
from click.testing import CliRunner
from models import perturbed, save

from mergekit_pave.cache import Artefact, entries
from mergekit_pave.cli import main
from mergekit_pave.errors import PaveError


@pytest.fixture
def filled(llama, tmp_path, cache):
    """A cache that a merge has filled, and what the merge wrote."""
    return merging.merge(merging.config_for(llama, {"keep_covariances": True}), tmp_path / "out")


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def key_of(cache, model, kind: str = "covariance") -> str:
    return next(e.key for e in entries(cache) if e.kind == kind and e.artefacts[0].manifest()["model"] == str(model))


def given(llama, folder) -> dict:
    """The config of `filled` with published covariances in the place of the first model's data."""
    first, second = merging.entries(llama)
    return merging.config_for(llama, {"models": [{"model": first["model"], "covariance": str(folder)}, second]})


def test_list_tells_models_and_sizes(llama, filled, cache):
    result = run("cache", "list")
    assert result.exit_code == 0
    for model in llama.tuned[:2]:
        assert result.output.count(str(model)) == 3  # covariances, subspaces, samples
    assert "22 layers" in result.output and "21 weights" in result.output
    assert result.output.split()[:6] == ["key", "kind", "size", "date", "content", "model"]
    assert result.output.count(time.strftime("%Y-%m-%d")) >= 4 and "incomplete" not in result.output


def test_list_says_what_incomplete_means_and_how_to_remove_it(llama, filled, cache):
    key = key_of(cache, llama.tuned[0])
    (cache / "covariance" / key / "manifest.json").unlink()
    lines = run("cache", "list", "--cache-dir", cache).output.splitlines()
    assert sum(line.endswith("  (incomplete)") for line in lines) == 1
    assert lines[-1].startswith("(incomplete): a run is making it, or was stopped on the way")
    command = lines[-1].partition("this removes it: mergekit-pave ")[2].split()
    assert run(*command).exit_code == 0 and key not in {entry.key for entry in entries(cache)}
    assert "(incomplete)" not in run("cache", "list").output


def test_verify_finds_a_flipped_bit(filled, cache, llama):
    intact = run("cache", "verify")
    assert intact.exit_code == 0 and re.fullmatch(r"6 entries checked \([\d.]+ [KM]B\): all are intact.\n", intact.output)
    damaged = cache / "covariance" / key_of(cache, llama.tuned[0]) / "00003.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-5] ^= 1
    damaged.write_bytes(data)
    result = run("cache", "verify")
    assert result.exit_code == 1 and "DAMAGED" in result.output and str(damaged.parent) in result.output
    assert "6 entries checked" in result.output and "1 artefacts are not intact" in result.output


def test_remove_takes_one_entry(filled, cache, llama):
    key = key_of(cache, llama.tuned[0])
    assert run("cache", "remove", key[:10]).exit_code == 0
    assert key not in {entry.key for entry in entries(cache)} and len(entries(cache)) == 5
    result = run("cache", "remove", key[:10])
    assert result.exit_code == 1 and "no entry" in result.output


def test_exported_covariances_take_the_place_of_data(filled, cache, llama, tmp_path):
    assert run("cache", "export", key_of(cache, llama.tuned[0]), tmp_path / "published").exit_code == 0
    llama_data = given(llama, tmp_path / "published")
    assert run("cache", "remove", key_of(cache, llama.tuned[0])).exit_code == 0
    again = merging.merge(llama_data, tmp_path / "again")
    assert all(torch.equal(again[name], tensor) for name, tensor in filled.items())
    assert "data0.jsonl" in (tmp_path / "again" / "README.md").read_text()


def test_imported_covariances_are_found(filled, cache, llama, tmp_path, monkeypatch):
    run("cache", "export", key_of(cache, llama.tuned[0]), tmp_path / "published")
    result = run("cache", "import", tmp_path / "published", "--cache-dir", tmp_path / "elsewhere")
    assert result.exit_code == 0
    (entry,) = entries(tmp_path / "elsewhere")
    assert entry.key == key_of(cache, llama.tuned[0]) and entry.artefacts[0].is_intact()
    again = run("cache", "import", tmp_path / "published", "--cache-dir", tmp_path / "elsewhere")
    assert again.exit_code == 0 and "is in the cache already" in again.output


@pytest.mark.parametrize("number, advice", [(1, "measure them again"), (4, "pip install --upgrade")])
def test_covariances_of_another_format_are_not_imported(filled, cache, llama, tmp_path, number, advice):
    """Nothing would ever use them."""
    run("cache", "export", key_of(cache, llama.tuned[0]), tmp_path / "published")
    artefact = Artefact(tmp_path / "published")
    manifest = artefact.manifest() | {"format": number}
    if number == 1:
        del manifest["dtype"]
    artefact.complete(manifest)
    result = run("cache", "import", tmp_path / "published", "--cache-dir", tmp_path / "elsewhere")
    assert result.exit_code == 1 and f"in format {number}" in result.output and advice in result.output
    assert not (tmp_path / "elsewhere").exists()


def test_export_never_overwrites(filled, cache, llama, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    result = run("cache", "export", key_of(cache, llama.tuned[0]), tmp_path / "mine")
    assert result.exit_code == 1 and "not empty" in result.output
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_covariances_of_other_weights_are_refused(filled, cache, llama, tmp_path):
    run("cache", "export", key_of(cache, llama.tuned[1]), tmp_path / "published")
    with pytest.raises(PaveError, match=r"tuned0.*\.covariance: these were measured on other weights, those of .*tuned1"):
        merging.merge(given(llama, tmp_path / "published"), tmp_path / "refused")
    assert not list(tmp_path.glob("refused/*.safetensors"))


def test_a_checkpoint_that_changed_is_other_weights(filled, cache, llama, tmp_path):
    import transformers

    run("cache", "export", key_of(cache, llama.tuned[0]), tmp_path / "published")
    model = transformers.AutoModelForCausalLM.from_pretrained(llama.tuned[0])
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama.tuned[0])
    other = save(perturbed(model, seed=9), tokenizer, tmp_path / "tuned0")
    config = given(llama, tmp_path / "published")
    config["models"][0]["model"] = config["pave"]["models"][0]["model"] = str(other)
    with pytest.raises(PaveError, match="other weights"):
        merging.merge(config, tmp_path / "refused")


def flip(path):
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize("damage", [flip, cut])
@pytest.mark.parametrize("place", ["elsewhere", "in the cache"])
def test_damaged_covariances_are_refused(filled, cache, llama, tmp_path, damage, place):
    """What somebody has published is told, and never removed, wherever it is."""
    published = cache / "covariance" / key_of(cache, llama.tuned[0])
    if place == "elsewhere":
        run("cache", "export", published.name, tmp_path / "published")
        published = tmp_path / "published"
    shutil.rmtree(cache / "subspace")
    damage(published / "00000.safetensors")
    before = sorted(published.iterdir())
    with pytest.raises(PaveError, match=rf"{re.escape(str(published))}.* damaged: .*; fetch (them|these covariances) again"):
        merging.merge(given(llama, published), tmp_path / "refused")
    assert not list(tmp_path.glob("refused/*.safetensors"))
    assert sorted(published.iterdir()) == before


def test_attacks_are_refused(filled, cache, llama, tmp_path):
    for seen_by, attack, message in [
        ("manifest", "a file above the folder", r"pave\.models\[.*covariance: .*manifest\.json is damaged"),
        ("manifest", "no versions", r"pave\.models\[.*manifest\.json is damaged: versions"),
        ("files", "a huge size", "damaged"),
        ("covariance", "a huge width", r"safetensors is damaged: .* of width 2147483648"),
    ]:
        run("cache", "export", key_of(cache, llama.tuned[0]), tmp_path / attack)
        ATTACKS[seen_by][attack](tmp_path / attack)
        with pytest.raises(PaveError, match=message):
            merging.merge(given(llama, tmp_path / attack), tmp_path / "refused")
        assert not list(tmp_path.glob("refused/*.safetensors"))


@pytest.mark.parametrize(
    "change, told", [({"format": 0}, "another version of mergekit-pave"), ({"data": [{}]}, "another version of mergekit-pave")]
)
def test_a_manifest_of_another_making_is_refused(filled, cache, llama, tmp_path, change, told):
    run("cache", "export", key_of(cache, llama.tuned[0]), tmp_path / "published")
    artefact = Artefact(tmp_path / "published")
    artefact.complete(artefact.manifest() | change)
    with pytest.raises(PaveError, match=told):
        merging.merge(given(llama, tmp_path / "published"), tmp_path / "refused")
    assert not list(tmp_path.glob("refused/*.safetensors"))


def test_a_folder_that_is_not_there_is_told_before_anything_else_is_looked_at(llama, tmp_path, cache):
    """Also where another model's data, or what is selected, is wrong, too."""
    config = given(llama, "./nowhere")
    first, second = config["pave"]["models"]
    second["data"]["path"] = "./nothing.jsonl"
    config["pave"] |= {"models": [second, first], "exclude": ["no such weight"]}
    with pytest.raises(PaveError, match=r"tuned0.*\.covariance: there is no folder \./nowhere \(looked in"):
        merging.merge(config, tmp_path / "refused")


def test_nothing_where_covariances_should_be(llama, tmp_path, cache):
    (tmp_path / "empty").mkdir()
    with pytest.raises(PaveError, match=r"\.covariance: .*empty has no covariances"):
        merging.merge(given(llama, tmp_path / "empty"), tmp_path / "refused")
    with pytest.raises(PaveError, match=r"\.covariance: nobody/nothing is not a folder here, and the Hub"):
        merging.merge(given(llama, "nobody/nothing"), tmp_path / "refused")
