"""Measure once, merge often: what is measured again and what is not, and that nothing damaged is ever used."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import transformers
from commands import start
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.options import MergeOptions
from merging import config_for, entries, invoke, merge, write_config
from models import make_family, make_rows, read_rows, write_rows
from reference import weights

from mergekit_pave.errors import PaveError
from mergekit_pave.plugin.phases import plan_merge


@pytest.fixture
def family(tmp_path):
    """Models and data of the test's own, so that it may change them."""
    return make_family("llama", tmp_path / "models")


def artefacts(cache):
    """Every tensor file of the cache with its time of writing."""
    return {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}


def same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def differ(left, right):
    assert any(not torch.equal(left[name], right[name]) for name in left)


class Watch:
    """Runs merges and tells which models were calibrated and how many weights decomposed, by the files that appear."""

    def __init__(self, cache, tmp_path):
        self._cache, self._out, self._runs = cache, tmp_path / "outs", 0

    def __call__(self, config):
        """(what the merge wrote, covariance files written, subspace files written)"""
        before = artefacts(self._cache)
        self._runs += 1
        tensors = merge(config, self._out / str(self._runs))
        new = [path for path, at in artefacts(self._cache).items() if before.get(path) != at]
        kinds = [path.relative_to(self._cache).parts[0] for path in new]
        return tensors, kinds.count("covariance"), kinds.count("subspace")


@pytest.fixture
def watch(cache, tmp_path):
    return Watch(cache, tmp_path)


PAVE = {"regularization": 0.1, "keep_covariances": True}


@pytest.fixture(scope="module")
def measured(families, tmp_path_factory):
    """A cache that a merge has filled, and what the merge wrote."""
    folder = tmp_path_factory.mktemp("measured")
    written = merge(config_for(families["llama"], PAVE | {"cache_dir": str(folder / "cache")}), folder / "out")
    return folder / "cache", written


@pytest.fixture
def first(measured, cache):
    """What a first merge wrote. The test's own cache is as it left it."""
    shutil.copytree(measured[0], cache)
    return measured[1]


def test_the_first_run_measures_and_the_second_does_not(llama, watch):
    first, covariances, tails = watch(config_for(llama, PAVE))
    assert covariances > 0
    assert tails == 42  # 21 weights of each model
    second, *again = watch(config_for(llama, PAVE))
    assert again == [0, 0]
    same(first, second)


REUSED = {
    "weight": lambda c: c["models"][0].update(parameters={"weight": 0.9}),
    "lambda": lambda c: c.update(parameters={"lambda": 0.7}),
    "method and density": lambda c: c.update(merge_method="ties", parameters={"density": 0.5}),
    "dtype": lambda c: c.update(dtype="bfloat16"),
    "smaller cut": lambda c: c["pave"].update(rank_ratio=0.95),
    "allocation": lambda c: c["pave"].update(allocation="uniform"),
    "target": lambda c: c["pave"].update(target="task_vector"),
    "selection": lambda c: c["pave"].update(exclude=["k_proj"]),
    "fewer models": lambda c: (c["models"].pop(), c["pave"]["models"].pop()),
    "other order": lambda c: (c["models"].reverse(), c["pave"]["models"].reverse()),
    "batch size": lambda c: c["pave"].update(calibration={"batch_size": 3}),
}


def test_what_needs_no_new_measurement(llama, first, watch, tmp_path):
    for name, change in REUSED.items():
        config = config_for(llama, PAVE)
        change(config)
        written, *new = watch(config)
        assert new == [0, 0], name
        if name not in ("other order", "batch size"):
            differ(written, first)
        if name == "smaller cut":  # and it is the smaller cut that was made
            fresh = config | {"pave": config["pave"] | {"cache_dir": str(tmp_path / "fresh")}}
            for tensor, value in merge(fresh, tmp_path / "fresh-out").items():
                assert torch.allclose(value, written[tensor], rtol=1e-5, atol=1e-6), tensor


def test_a_larger_cut_decomposes_again_from_the_same_measurements(llama, first, watch):
    _, covariances, tails = watch(config_for(llama, PAVE | {"rank_ratio": 0.5}))
    assert covariances == 0
    assert tails == 42


def test_another_regularization_decomposes_again_from_the_same_measurements(llama, first, watch):
    second, covariances, tails = watch(config_for(llama, {"regularization": {"relative": 0.1}}))
    assert (covariances, tails) == (0, 42)
    differ(first, second)


def test_changed_data_is_measured(family, watch):
    first, all_covariances, _ = watch(config_for(family, PAVE))
    rows = read_rows(family.data[0])
    rows[0]["text"] += " twelve"
    write_rows(family.data[0], rows)
    second, covariances, tails = watch(config_for(family, PAVE))
    assert 0 < covariances < all_covariances  # of this model only
    assert tails == 21
    differ(first, second)


@pytest.mark.parametrize("setting", [{"max_tokens": 90}, {"max_length": 10}, {"samples": 2}])
def test_changed_calibration_is_measured(llama, first, watch, setting):
    second, covariances, tails = watch(config_for(llama, PAVE | {"calibration": setting}))
    assert covariances > 0
    assert tails == 42
    differ(first, second)


def test_changed_seed_draws_other_samples(llama, watch):
    first, *_ = watch(config_for(llama, PAVE | {"calibration": {"samples": 2}}))
    second, covariances, _ = watch(config_for(llama, PAVE | {"calibration": {"samples": 2, "seed": 7}}))
    assert covariances > 0
    differ(first, second)


def test_changed_weights_are_measured(family, watch):
    """The same file name and size, and even the same time stamp."""
    first, all_covariances, _ = watch(config_for(family, PAVE))
    file = family.tuned[1] / "model.safetensors"
    times = file.stat()
    model = transformers.AutoModelForCausalLM.from_pretrained(family.tuned[1])
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] += 0.5
    model.save_pretrained(family.tuned[1])
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file.stat().st_size == times.st_size
    second, covariances, tails = watch(config_for(family, PAVE))
    assert 0 < covariances < all_covariances
    assert tails == 21
    differ(first, second)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-20] ^= 0x40
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


DAMAGE = {"truncated": truncate, "empty": empty, "gone": Path.unlink}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", ["covariance", "subspace"])
def test_tensors_that_are_gone_or_cut_are_made_again(llama, first, watch, cache, kind, damage):
    # A new decomposition reads the covariances; without one nobody has to notice.
    if kind == "covariance":
        shutil.rmtree(cache / "subspace")
    victims = list((cache / kind).rglob("*.safetensors"))
    for path in victims:
        DAMAGE[damage](path)
    second, covariances, tails = watch(config_for(llama, PAVE))
    same(first, second)
    assert tails == 42
    assert covariances == (len(victims) if kind == "covariance" else 0)


@pytest.mark.parametrize("kind", ["covariance", "subspace"])
def test_flipped_bits_are_told_and_the_next_run_makes_the_tensors_again(llama, first, watch, cache, kind):
    if kind == "covariance":
        shutil.rmtree(cache / "subspace")
    victim = sorted((cache / kind).rglob("*.safetensors"))[3]
    flip(victim)
    others = artefacts(cache)
    told = rf"{re.escape(str(victim))} is damaged: .*was removed from the cache; run again"
    with pytest.raises(PaveError, match=told):
        watch(config_for(llama, PAVE))
    assert not victim.parent.exists()
    kept = {path: at for path, at in others.items() if path.parent != victim.parent}
    assert kept.items() <= artefacts(cache).items(), "something else was removed"
    second, covariances, tails = watch(config_for(llama, PAVE))
    same(first, second)
    assert covariances == sum(path.parent == victim.parent for path in others) * (kind == "covariance")
    assert tails == 1 if kind == "subspace" else tails > 0


def test_what_is_not_read_is_not_hashed(llama, first, cache, tmp_path):
    """A warm merge reads no covariances, and a warm plan reads nothing, so damage there goes unnoticed."""
    covariances = list((cache / "covariance").rglob("*.safetensors"))
    assert len(covariances) > 20
    for path in covariances:
        flip(path)
    same(first, merge(config_for(llama, PAVE), tmp_path / "out"))
    for path in (cache / "subspace").rglob("*.safetensors"):
        flip(path)
    plan = plan_merge(MergeConfiguration.model_validate(config_for(llama, PAVE)), MergeOptions(quiet=True))
    assert not plan.decompositions and all(task.is_done for task in plan.calibrations)


def cut_short(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other_json(path):
    path.write_text("[]")


def incomplete(path):
    path.write_text("{}")


MANIFEST_DAMAGE = [Path.unlink, cut_short, empty, other_json, incomplete]


@pytest.mark.parametrize("damage", MANIFEST_DAMAGE, ids=["gone", "cut-short", "empty", "other-json", "incomplete"])
def test_damaged_manifests_are_made_again(llama, first, watch, cache, damage):
    for path in cache.rglob("manifest.json"):
        damage(path)
    second, covariances, tails = watch(config_for(llama, PAVE))
    same(first, second)
    assert covariances > 0
    assert tails == 42


@pytest.mark.parametrize(("kind", "key"), [("subspace", "largest"), ("covariance", "tokens")])
def test_a_wrong_number_in_a_manifest_is_noticed(llama, first, watch, cache, kind, key):
    """A manifest holds numbers that decide ranks and means; one that has changed must not be believed."""

    def spoil(value):
        if isinstance(value, dict):
            return {k: v * 100 if k == key and not isinstance(v, dict) else spoil(v) for k, v in value.items()}
        return [spoil(v) for v in value] if isinstance(value, list) else value

    if kind == "covariance":
        shutil.rmtree(cache / "subspace")
    # Of the first model only: all alike would leave the ranks as they are.
    model = json.loads(next((cache / "covariance").rglob("manifest.json")).read_text())["model"]
    assert model in {str(m) for m in llama.tuned}
    changed = 0
    for path in sorted((cache / kind).rglob("manifest.json"))[: 21 if kind == "subspace" else 1]:
        before = json.loads(path.read_text())
        path.write_text(json.dumps(spoil(before)))
        changed += json.loads(path.read_text()) != before
    assert changed
    second, *_ = watch(config_for(llama, PAVE))
    same(first, second)


def test_two_models_with_equal_weights_share_what_is_measured(family, watch):
    shutil.rmtree(family.tuned[1])
    shutil.copytree(family.tuned[0], family.tuned[1])  # with its times
    models = entries(family, 2, path=str(family.data[0]))
    _, _, tails = watch(config_for(family, PAVE | {"models": models}))
    assert tails in (21, 42)
    _, *again = watch(config_for(family, PAVE | {"models": models}))
    assert again == [0, 0]


@pytest.mark.parametrize("place", ["setting", "environment"])
def test_a_cache_that_cannot_be_written(llama, tmp_path, monkeypatch, place):
    blocked = tmp_path / "blocked"
    blocked.write_text("a file, not a folder")
    config = config_for(llama, PAVE)
    if place == "setting":
        config["pave"]["cache_dir"] = str(blocked)
    else:
        monkeypatch.setenv("MERGEKIT_PAVE_CACHE", str(blocked))
    result = invoke(config, tmp_path / "out")
    assert result.exit_code != 0
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    for words in (str(blocked), "pave.cache_dir", "MERGEKIT_PAVE_CACHE"):
        assert words in result.output
    assert not list((tmp_path / "out").glob("*"))
    assert blocked.read_text() == "a file, not a folder"


def test_cache_dir_goes_before_the_environment(llama, tmp_path, cache):
    merge(config_for(llama, PAVE | {"cache_dir": str(tmp_path / "mine")}), tmp_path / "out")
    assert artefacts(tmp_path / "mine")
    assert not cache.exists()


def test_two_processes_at_once(llama, tmp_path, cache):
    """They wait for each other or work twice, but both give what one alone gives."""
    alone = merge(config_for(llama, PAVE | {"cache_dir": str(tmp_path / "alone")}), tmp_path / "expected")
    config = write_config(config_for(llama, PAVE), tmp_path / "config.yml")
    runs = [start("mergekit-yaml", config, tmp_path / f"out{i}", "--quiet") for i in range(2)]
    for i, run in enumerate(runs):
        told = run.communicate(timeout=300)[1]
        assert run.returncode == 0, told
        for name, tensor in weights(tmp_path / f"out{i}").items():
            assert torch.allclose(tensor, alone[name], rtol=1e-4, atol=1e-5), name
    same(weights(tmp_path / "out0"), weights(tmp_path / "out1"))
    same(merge(config_for(llama, PAVE), tmp_path / "after"), weights(tmp_path / "out0"))


def test_two_cuts_at_once(llama, tmp_path, cache):
    """A sweep over rank_ratio in parallel: neither takes from the other what it needs."""
    merge(config_for(llama, PAVE | {"rank_ratio": 0.97}), tmp_path / "calibrated")
    configs = {ratio: config_for(llama, PAVE | {"rank_ratio": ratio}) for ratio in (0.5, 0.95)}
    runs = {}
    for ratio, config in configs.items():
        path = write_config(config, tmp_path / f"{ratio}.yml")
        runs[ratio] = start("mergekit-yaml", path, tmp_path / f"out{ratio}", "--quiet")
    for ratio, run in runs.items():
        told = run.communicate(timeout=300)[1]
        assert run.returncode == 0, told
        own = PAVE | {"rank_ratio": ratio, "cache_dir": str(tmp_path / "own")}
        expected = merge(config_for(llama, own), tmp_path / "alone")
        for name, tensor in weights(tmp_path / f"out{ratio}").items():
            assert torch.allclose(tensor, expected[name], rtol=1e-4, atol=1e-5), name


def test_a_narrow_tail_never_replaces_a_wide_one(llama, tmp_path, cache):
    """Two merges are planned, and then the one that needs less decomposes last."""
    options = MergeOptions(quiet=True)
    narrow, wide = (
        plan_merge(MergeConfiguration.model_validate(config_for(llama, PAVE | {"rank_ratio": ratio})), options)
        for ratio in (0.95, 0.5)
    )
    for calibration in narrow.calibrations:
        calibration.execute()
    for plan in (narrow, wide, narrow):
        for _ in Executor(plan.decompositions).run(quiet=True):
            pass
        assert sum(path.stat().st_size for path in cache.rglob("tail-*.safetensors")) < 1.2 * sum(
            task.cache for task in wide.decompositions
        )
    for plan in (narrow, wide):
        for _ in Executor(plan.stats).run(quiet=True):
            pass


def test_killed_while_calibrating(llama, tmp_path, cache, watch):
    """SIGKILL leaves no time to clean up. The next run gives what an undisturbed one gives."""
    data = write_rows(tmp_path / "long.jsonl", make_rows("doctor nurse clinic scan blood pain", 500, seed=2))
    pave = PAVE | {"models": entries(llama, 2, path=str(data)), "calibration": {"batch_size": 1, "samples": 500}}
    config = write_config(config_for(llama, pave), tmp_path / "config.yml")
    run = start("mergekit-yaml", config, tmp_path / "killed")
    deadline = time.monotonic() + 120
    # Some of it is on disk and the rest is not.
    while not artefacts(cache) and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(run.pid, signal.SIGKILL)
    run.communicate(timeout=60)
    assert run.returncode == -signal.SIGKILL, "it was to be killed, but ended by itself"
    assert not list((tmp_path / "killed").glob("*.safetensors"))
    assert artefacts(cache)

    second, *_ = watch(config_for(llama, pave))
    same(second, merge(config_for(llama, pave | {"cache_dir": str(tmp_path / "fresh")}), tmp_path / "fresh-out"))
