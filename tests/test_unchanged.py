"""Weights that fine-tuning did not change: they stay as they are, take no part in allocation, and are listed with that reason."""

import contextlib
import json
import logging
import shutil
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from merging import assert_exact, config_for, forget_checkpoints, merge, write_config
from reference import purify, weights
from safetensors.torch import save_file
from test_experts import EXPERTS, family_of  # noqa: F401
from test_in_memory import BATCH, load

from mergekit_pave import PaveError, purify_model
from mergekit_pave.cache import comparison
from mergekit_pave.cli import main
from mergekit_pave.core import equality
from mergekit_pave.core.equality import equal_matrices
from mergekit_pave.core.reasons import UNCHANGED
from mergekit_pave.report.summary import warnings

RATIO = 0.875


def restored(family, folder, is_changed, place=0):
    """The family with one fine-tune whose weights are the base's but for those of some names."""
    tuned, base = family.tuned[place], weights(family.base)
    copy = folder / "restored"
    copy.mkdir()
    for file in tuned.iterdir():
        if file.suffix != ".safetensors":
            (copy / file.name).write_bytes(file.read_bytes())
    own = {name: tensor if is_changed(name) else base[name] for name, tensor in weights(tuned).items()}
    save_file(own, copy / "model.safetensors", {"format": "pt"})
    return replace(family, tuned=(*family.tuned[:place], copy, *family.tuned[place + 1 :]))


def is_query(name):
    return "q_proj" in name or "v_proj" in name


@pytest.fixture
def frozen(llama, tmp_path):
    """The first model has other queries and values, and nothing else."""
    return restored(llama, tmp_path, is_query)


def report_of(out):
    return json.loads((out / "pave_report.json").read_text())


def left_of(report, model):
    return {name for name, why in report["models"][str(model)]["left_as_they_are"].items() if why == UNCHANGED}


def run(*arguments):
    forget_checkpoints()
    done = CliRunner().invoke(main, [*map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.output


def test_they_stay_as_they_are(frozen, tmp_path, cache, caplog):
    """Where one model has not changed a weight, the other drops its fair share of it, as if it were alone."""
    sources = [(data, "text", "text") for data in frozen.data[:2]]
    expected = purify(
        frozen.kind, frozen.base, frozen.tuned[:2], sources, lambda i, tensor: RATIO if i or is_query(tensor) else None
    )
    for i, weight in enumerate([(1.0, 0.0), (0.0, 1.0)]):
        plain = merge(config_for(frozen, weight=weight, dtype="float64"), tmp_path / f"plain{i}")
        config = config_for(frozen, {}, weight=weight, dtype="float64")
        assert_exact(merge(config, tmp_path / f"out{i}"), expected[i], plain)
    report = report_of(tmp_path / "out0")
    unchanged = {name for name in weights(frozen.base) if frozen.is_linear(name) and not is_query(name)}
    assert left_of(report, frozen.tuned[0]) == unchanged
    assert not left_of(report, frozen.tuned[1])
    assert {row["tensor"] for row in report["purified"] if row["model"] == str(frozen.tuned[0])} == expected[0].keys()
    assert all(row["change_norm"] > 0 for row in report["purified"])
    assert f"left alone  {len(unchanged)} weights of {frozen.tuned[0].name}, {UNCHANGED}: model.layers.*" in caplog.text


def test_they_are_read_whole_once(frozen, tmp_path, cache, monkeypatch):
    """The cache remembers them; `plan` reads no weights, and tells what the cache knows."""
    config = config_for(frozen, {})
    path = write_config(config, tmp_path / "config.yml")
    assert "the merge finds out" in run("plan", path)
    assert not list((cache / "comparison").glob("*"))
    merge(config, tmp_path / "first")
    told = run("cache", "list")
    assert "comparison" in told and "15 equal weights" in told
    found = json.loads(run("plan", path, "--json"))
    assert len(found["models"][str(frozen.tuned[0])]["purified"]) == 6
    assert set(found["models"][str(frozen.tuned[0])]["left_as_they_are"].values()) >= {UNCHANGED}

    compared = []
    monkeypatch.setattr(comparison, "equal_matrices", lambda *both: compared.append(both) or equal_matrices(*both))
    monkeypatch.setattr("mergekit_pave.tasks.decompose.decompose_weight", lambda *_: pytest.fail("decomposed again"))
    again = merge(config, tmp_path / "again")
    first = weights(tmp_path / "first")
    assert all(torch.equal(tensor, first[name]) for name, tensor in again.items())
    assert 0 < len(compared) == 6 + 21  # what may have changed, in both models


def test_another_base(frozen, llama, tmp_path, cache):
    """What equals one base model need not equal another."""
    merge(config_for(frozen, {}), tmp_path / "out")
    merge(config_for(frozen, {}) | {"base_model": str(llama.tuned[2])}, tmp_path / "other")
    assert not left_of(report_of(tmp_path / "other"), frozen.tuned[0])


def test_a_model_that_is_the_base(llama, tmp_path, cache, caplog):
    """It is told that it adds nothing, and it is not calibrated."""
    copy = restored(llama, tmp_path, lambda name: False)
    config = config_for(copy, {}, dtype="float64")
    written = merge(config, tmp_path / "out")
    warning = f"{copy.tuned[0]}: all 21 weights of it that would be purified equal the base model's"
    assert warning in caplog.text and "it adds nothing to the merge" in caplog.text
    measured = [json.loads(path.read_text())["model"] for path in (cache / "covariance").glob("*/manifest.json")]
    assert measured == [str(copy.tuned[1])]
    source = report_of(tmp_path / "out")["models"][str(copy.tuned[0])]
    assert (source["data"], source["samples"], source["tokens"]) == ([], 0, 0)
    assert f"| {copy.tuned[0]} | not needed | 0 | 0 |" in (tmp_path / "out" / "README.md").read_text()
    assert f"Warning: {warning}" in run("plan", write_config(config, tmp_path / "config.yml"))
    alone = merge(
        config_for(copy, {"models": config["pave"]["models"][1:]}, models=1, dtype="float64") | {"models": config["models"][1:]},
        tmp_path / "alone",
    )
    assert all((written[name] - tensor).norm() <= 1e-9 * tensor.norm() for name, tensor in alone.items())
    report = report_of(tmp_path / "out")
    assert len(left_of(report, copy.tuned[0])) == 21
    assert {row["model"] for row in report["purified"]} == {str(copy.tuned[1])}


def test_no_model_has_changed(llama, tmp_path, cache):
    copy = restored(llama, tmp_path, lambda name: False)
    written = merge(config_for(copy, {}, models=1), tmp_path / "out")
    plain = merge(config_for(copy, models=1), tmp_path / "plain")
    assert all(torch.equal(tensor, plain[name]) for name, tensor in written.items())
    assert "### PAVE" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])  # each expert stored by itself, and all in one tensor
def test_untouched_experts(family_of, tmp_path, cache, kind):  # noqa: F811
    family = family_of(kind)
    base, tuned = weights(family.base), weights(family.tuned[0])
    folder = tmp_path / "restored"
    folder.mkdir()
    for file in family.tuned[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    for name, tensor in tuned.items():
        if kind == "mixtral" and ".experts.1." in name:
            tensor.copy_(base[name])
        elif kind == "gpt_oss" and name.endswith("_proj") and ".experts." in name:
            tensor[1] = base[name][1]
    save_file(tuned, folder / "model.safetensors", {"format": "pt"})
    family = replace(family, tuned=(folder, family.tuned[1]))
    config = config_for(family, {"calibration": {"min_tokens": 1}}, dtype="float64")
    merge(config, tmp_path / "out")
    rows = [row for row in report_of(tmp_path / "out")["purified"] if "expert" in row and row["model"] == str(folder)]
    assert {row["expert"] for row in rows} == set(range(EXPERTS)) - {1}
    left = left_of(report_of(tmp_path / "out"), folder)
    assert left and all(".experts.1." in name or name.endswith("[1]") for name in left)
    only = merge(config_for(family, config["pave"], weight=(1.0, 0.0), dtype="float64"), tmp_path / "only")
    plain = merge(config_for(family, weight=(1.0, 0.0), dtype="float64"), tmp_path / "plain")
    if kind == "mixtral":
        purified = {row["output"] for row in rows}
        assert {name for name in only if ".experts." in name and torch.equal(only[name], plain[name])} == {
            name for name in only if ".experts." in name and name not in purified
        }
    for name in {row["output"] for row in rows} if kind == "gpt_oss" else ():
        same = [torch.equal(*both) for both in zip(only[name], plain[name], strict=True)]
        assert same == [i == 1 for i in range(EXPERTS)], name


def test_in_memory(frozen):
    model, base = load("llama", frozen.tuned[0]), load("llama", frozen.base)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = purify_model(model, BATCH, rank_ratio=RATIO, base=base, quiet=True)
    assert {row["tensor"] for row in rows} == {name for name in before if is_query(name)}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) is not is_query(name), name
    assert purify_model(base, BATCH, rank_ratio=RATIO, base=load("llama", frozen.base), quiet=True) == []


def test_equal_matrices():
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 7, generator=draw).bfloat16()
    assert equal_matrices(weight, weight.clone()) == (0,)
    assert equal_matrices(weight, weight.float()) == (0,)
    assert equal_matrices(weight.float(), weight.float() * (1 + 2e-7)) == ()
    assert equal_matrices(weight, weight[:-1]) == equal_matrices(weight, None) == ()
    precise = torch.randn(300, 7, generator=draw)
    assert equal_matrices(precise.bfloat16(), precise) == (0,)  # stored in fewer bits, and not changed otherwise
    assert equal_matrices(precise, precise.bfloat16()) == ()
    other = weight.clone()
    other[-1, -1] += 1
    assert equal_matrices(weight, other) == ()
    assert equal_matrices(torch.stack([weight, other, weight]), torch.stack([weight, weight, weight])) == (0, 2)
    unknown = weight.clone()
    unknown[0, 0] = float("nan")
    assert equal_matrices(unknown, unknown) == ()


def test_a_comparison_in_blocks(monkeypatch):
    monkeypatch.setattr(equality, "_BLOCK", 20)
    weight = torch.arange(140.0).view(20, 7)
    assert equal_matrices(weight, weight.clone()) == (0,)
    for row in range(20):
        other = weight.clone()
        other[row, 3] = -1
        assert equal_matrices(weight, other) == (), row


def test_tensors_that_lost_more_than_their_change_are_counted(llama, tmp_path, cache, caplog):
    """Also where the sum over all tensors shows nothing."""
    with caplog.at_level(logging.INFO, "mergekit_pave"):
        merge(config_for(llama, {}), tmp_path / "out")
    report = report_of(tmp_path / "out")
    for model in llama.tuned[:2]:
        rows = [row for row in report["purified"] if row["model"] == str(model)]
        count = sum(row["removed_norm"] > row["change_norm"] for row in rows)
        assert 0 < count < len(rows)
        assert report["models"][str(model)]["removed_more_than_changed"] == count
        assert f"(more than it in {count} of {len(rows)} tensors)" in caplog.text


@pytest.mark.parametrize(("removed", "said"), [(1.01, "about as large as"), (1.4, "1.4 times as large as"), (0.99, None)])
def test_how_much_larger(removed, said):
    row = {"model": "m", "output": "w", "kept": 1, "components": 2, "energy_dropped": 0.0, "tokens": 1}
    report = {"models": {}, "purified": [row | {"removed_norm": removed, "change_norm": 1.0}]}
    assert [said is not None and said in line for line in warnings(report)] == [True] * (said is not None)


def test_a_cache_that_is_read_only_does_not_stop_a_merge(frozen, tmp_path, cache, monkeypatch):
    @contextlib.contextmanager
    def refuse(self):
        raise PaveError("read-only")
        yield

    config = config_for(frozen, {})
    merge(config, tmp_path / "first")
    shutil.rmtree(cache / "comparison")
    monkeypatch.setattr("mergekit_pave.cache.comparison.Artefact.lock", refuse)
    again = merge(config, tmp_path / "again")
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights(tmp_path / "first").items())
