"""mergekit-multi: several merges from one file, some purified and some not."""

import pytest
import torch
from merging import config_for, entries, invoke_multi, merge
from models import make_rows, write_rows
from reference import weights


def same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def test_a_purified_step_feeds_a_plain_one(llama, tmp_path):
    first = config_for(llama, {})
    last = {"merge_method": "linear", "dtype": "float32"}
    last["models"] = [{"model": m, "parameters": {"weight": 0.5}} for m in ("step", str(llama.tuned[2]))]
    result = invoke_multi([first | {"name": "step"}, last], tmp_path / "multi")
    assert result.exit_code == 0, (result.output, result.exception)

    alone = merge(first, tmp_path / "alone")
    same(weights(tmp_path / "multi" / "step"), alone)
    last["models"][0]["model"] = str(tmp_path / "alone")
    same(weights(tmp_path / "multi" / "final"), merge(last, tmp_path / "last"))
    assert (tmp_path / "multi" / "step" / "pave_report.json").is_file()
    assert not (tmp_path / "multi" / "final" / "pave_report.json").exists()
    assert "PAVE" not in (tmp_path / "multi" / "final" / "README.md").read_text()


def test_a_plain_step_feeds_a_purified_one(llama, tmp_path):
    first = config_for(llama)
    source = {"path": str(llama.data[0]), "text": "text"}
    pave = {"models": [{"model": "step", "data": source}, {"model": str(llama.tuned[2]), "data": source}]}
    last = config_for(llama) | {"pave": {"rank_ratio": 0.875} | pave}
    last["models"] = [{"model": m, "parameters": {"weight": 0.5}} for m in ("step", str(llama.tuned[2]))]
    result = invoke_multi([first | {"name": "step"}, last], tmp_path / "multi")
    assert result.exit_code == 0, (result.output, result.exception)

    same(weights(tmp_path / "multi" / "step"), merge(first, tmp_path / "alone"))
    assert "PAVE" not in (tmp_path / "multi" / "step" / "README.md").read_text()
    # The same step by hand.
    for model in (last["models"][0], last["pave"]["models"][0]):
        model["model"] = str(tmp_path / "multi" / "step")
    by_hand = merge(last, tmp_path / "by-hand")
    same(weights(tmp_path / "multi" / "final"), by_hand)
    plain = merge({k: v for k, v in last.items() if k != "pave"}, tmp_path / "plain")
    assert any(not torch.equal(by_hand[name], plain[name]) for name in plain)


def test_purified_and_plain_steps_side_by_side(llama, tmp_path):
    """The same merge with and without the block, in one process: neither rubs off on the other."""
    purified, plain = config_for(llama, {}), config_for(llama)
    steps = [plain | {"name": "one"}, purified | {"name": "two"}, plain | {"name": "three"}]
    result = invoke_multi(steps, tmp_path / "multi")
    assert result.exit_code == 0, (result.output, result.exception)
    untouched = merge(plain, tmp_path / "alone")
    same(weights(tmp_path / "multi" / "one"), untouched)
    same(weights(tmp_path / "multi" / "three"), untouched)
    same(weights(tmp_path / "multi" / "two"), merge(purified, tmp_path / "purified"))


def purified_after_step(llama, step, pave):
    """A plain step of some name, and a purified final merge that uses it."""
    last = config_for(llama) | {"pave": {"rank_ratio": 0.875} | pave}
    last["models"] = [{"model": m, "parameters": {"weight": 0.5}} for m in (step, str(llama.tuned[2]))]
    return [config_for(llama) | {"name": step}, last]


def test_a_data_set_may_be_named_like_a_step(llama, tmp_path, monkeypatch):
    """mergekit-multi replaces the names of steps by their output folders, but a data set's name is none."""
    folder = tmp_path / "main"  # a folder is a data set, and `name` is one of its configurations
    write_rows(folder / "rows.jsonl", make_rows("sum add count", 20, seed=1))
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: math\n  data_files: rows.jsonl\n---\n")
    data = {"path": "main", "name": "math", "text": "text"}
    monkeypatch.chdir(tmp_path)
    for step in ("math", "main"):
        pave = {"models": [{"model": step, "data": data}, {"model": str(llama.tuned[2]), "data": data}]}
        result = invoke_multi(purified_after_step(llama, step, pave), tmp_path / f"multi-{step}")
        assert result.exit_code == 0, (step, result.output, result.exception)
        assert (tmp_path / f"multi-{step}" / "final" / "pave_report.json").is_file()


@pytest.mark.parametrize(
    ("step", "setting"),
    [
        ("mlp", {"include": ["mlp"]}),
        ("k_proj", {"exclude": ["k_proj"]}),
        ("q_proj", {"rank_ratio": [{"filter": "q_proj", "value": 0.5}, {"filter": "mlp", "value": 0.9}]}),
        ("weights", {"target": "weights"}),
        ("uniform", {"allocation": "uniform"}),
        ("caches", {"cache_dir": "caches"}),
    ],
)
def test_settings_may_be_spelled_like_a_step(llama, tmp_path, monkeypatch, step, setting):
    monkeypatch.chdir(tmp_path)
    models = [*entries(llama, 3)[2:], {"model": step, "data": {"path": str(llama.data[0])}}]
    plain, last = purified_after_step(llama, step, {"models": models} | setting)
    result = invoke_multi([plain, last], tmp_path / "multi")
    assert result.exit_code == 0, (result.output, result.exception)
    assert not (tmp_path / "multi" / step / "covariance").exists()
    for model in (last["models"][0], last["pave"]["models"][1]):
        model["model"] = str(tmp_path / "multi" / step)
    same(weights(tmp_path / "multi" / "final"), merge(last, tmp_path / "by-hand"))
