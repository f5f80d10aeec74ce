"""Bars: one a phase, lines where output goes to a file, and nothing with --quiet."""

import io
import sys
import time

import datasets
import huggingface_hub.utils
import pytest
import torch
import tqdm.notebook
from click.testing import CliRunner
from commands import command
from merging import config_for, entries, forget_checkpoints, invoke, merge, write_config

from mergekit_pave import cli, progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_file_gets_a_line_now_and_then(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress.bar(1000, "Decomposing", "weights", hidden=False) as bar:
        for _ in range(1000):
            bar.update()
    lines = sys.stderr.getvalue().splitlines()
    assert "\r" not in sys.stderr.getvalue()
    assert len(lines) == 2 and lines[0].startswith("Decomposing: 0 of 1000 weights") and "1000 of 1000" in lines[1]


def test_a_line_is_told_when_it_is_time(monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS", 0)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress.bar(3, "Calibrating x", "blocks", hidden=False) as bar:
        for i in range(3):
            bar.set_postfix_str(f"{i} tokens/s", refresh=False)
            bar.update()
    lines = sys.stderr.getvalue().splitlines()
    assert [line.split(" after")[0] for line in lines[:4]] == [f"Calibrating x: {i} of 3 blocks" for i in range(4)]
    assert lines[3].endswith("2 tokens/s")


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress.bar(3, "Calibrating x", "blocks", hidden=False) as bar:
        bar.update(3)
    assert "\rCalibrating x:" in sys.stderr.getvalue() and "3/3" in sys.stderr.getvalue()


def test_a_notebook_gets_its_own_bar(monkeypatch):
    class Widget(tqdm.notebook.tqdm_notebook):
        def __init__(self, **options):
            self.options = options

        def __del__(self):
            pass

    monkeypatch.setattr("tqdm.auto.tqdm", Widget)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    bar = progress.bar(3, "Calibrating x", "blocks", hidden=False)
    assert bar.options == {"total": 3, "desc": "Calibrating x", "unit": "blocks", "disable": False, "delay": 0}


def test_what_is_quick_draws_no_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress.bar(2, "Comparing", "weights", hidden=False, delay=60) as bar:
        bar.update(2)
    assert sys.stderr.getvalue() == ""
    monkeypatch.setattr(progress, "_SECONDS", 0)
    with progress.bar(2, "Comparing", "weights", hidden=False, delay=0.05) as bar:
        time.sleep(0.1)
        bar.update()
        bar.update()
    assert "Comparing: 2 of 2 weights" in sys.stderr.getvalue()


def test_phases_of_a_merge(llama, tmp_path, cache):
    """Each phase is told to its end, and mergekit's bar counts nothing but the merge."""
    path = write_config(config_for(llama, {"keep_covariances": True}), tmp_path / "config.yml")
    cold = command("mergekit-yaml", path, tmp_path / "cold").stderr
    names = [str(model) for model in llama.tuned[:2]]
    told = phases(cold, [f"Calibrating {name}: {n} of 3 blocks" for name in names for n in (0, 3)])
    assert "tokens/s" in told[1] and "Comparing" not in cold
    assert cold.count("of 42 weights are in the cache") == 1 and cold.count("to be calibrated") == 2
    warm = command("mergekit-yaml", path, tmp_path / "warm").stderr
    assert "Calibrating" not in warm and "Decomposing" not in warm
    assert last_count(cold) == last_count(warm)
    # From covariances that are there.
    path = write_config(config_for(llama, {"keep_covariances": True, "rank_ratio": 0.5}), tmp_path / "wider.yml")
    wider = command("mergekit-yaml", path, tmp_path / "wider").stderr
    phases(wider, [f"Decomposing: {n} of 42 weights" for n in (0, 42)])


def phases(stderr: str, starts: list[str]) -> list[str]:
    """The lines of our phases, which have to start like this."""
    told = [line for line in stderr.splitlines() if line.startswith(("Calibrating", "Decomposing"))]
    assert len(told) == len(starts) and all(line.startswith(start) for line, start in zip(told, starts)), told
    return told


def last_count(stderr: str) -> str:
    """How many tasks mergekit's bar counts."""
    return stderr.rpartition("Executing graph")[2].split("/")[1].split(" ")[0]


def test_quiet_is_quiet(llama, tmp_path, cache):
    models = entries(llama)
    models[0]["data"]["path"] = str(tmp_path / "fresh.jsonl")  # which `datasets` has not seen, and would draw a bar for
    (tmp_path / "fresh.jsonl").write_text(llama.data[0].read_text())
    result = invoke(config_for(llama, {"models": models}), tmp_path / "out", "--quiet")
    assert result.exit_code == 0
    assert "\r" not in result.output and "Calibrating" not in result.output and "Decomposing" not in result.output


@pytest.fixture
def others(monkeypatch):
    """Libraries that draw bars, as in a user's terminal."""
    for name, value in (("HF_DATASETS_DISABLE_PROGRESS_BARS", None), ("_hf_datasets_progress_bars_disabled", False)):
        monkeypatch.setattr(sys.modules["datasets.utils.tqdm"], name, value)
    huggingface_hub.utils.enable_progress_bars()
    libraries = {"datasets": datasets, "hub": huggingface_hub.utils}
    return lambda: {name for name, library in libraries.items() if not library.are_progress_bars_disabled()}


def test_a_download_may_be_watched_unless_all_is_hidden(others):
    with progress.no_bars_of_others(hidden=True, downloads=False):
        assert others() == {"hub"}
        with progress.no_bars_of_others(hidden=True):
            assert others() == set()
        assert others() == {"hub"}
    assert others() == {"hub", "datasets"}


@pytest.mark.parametrize("words", [("plan",), ("calibrate",), ("score",), ("tune", "--set", "lambda=2")])
def test_commands_show_no_bars_of_others(llama, tmp_path, cache, others, words):
    """`datasets` draws one for a file that it has not seen."""
    config = config_for(llama, {"calibration": {"samples": 20}}, models=1)
    data = tmp_path / f"{words[0]}.jsonl"
    data.write_text(llama.data[0].read_text())
    config["pave"]["models"][0]["data"]["path"] = str(data)
    forget_checkpoints()
    done = CliRunner().invoke(cli.main, [words[0], str(write_config(config, tmp_path / "config.yml")), *words[1:]])
    assert done.exit_code == 0, done.output
    assert "Generating" not in done.output and "examples/s" not in done.output
    assert others() == {"hub", "datasets"}


def test_planning_says_nothing_of_what_it_does_not_do(llama, tmp_path, cache, caplog):
    forget_checkpoints()
    path = write_config(config_for(llama, {}), tmp_path / "config.yml")
    assert CliRunner().invoke(cli.main, ["plan", str(path)]).exit_code == 0
    assert not [record for record in caplog.records if "to be calibrated" in record.getMessage()]


@pytest.mark.parametrize("cached", [False, True])
def test_a_weight_that_goes_to_two_places_with_two_cuts(llama, tmp_path, cache, cached):
    """In a frankenmerge a gradient asks for two cuts of one weight; each has to get its own, in whatever order they come."""
    model, data = str(llama.tuned[0]), {"path": str(llama.data[0])}

    def stacked(*ranges):
        slices = [{"sources": [{"model": model, "layer_range": list(r)}]} for r in ranges]
        pave = {"models": [{"model": model, "data": data}], "rank_ratio": [0.95, 0.5]}
        return {"merge_method": "passthrough", "slices": slices, "dtype": "float32", "pave": pave}

    if cached:
        merge(stacked((0, 2)), tmp_path / "first")
    both = merge(stacked((0, 2), (0, 3)), tmp_path / "both")
    name = "mlp.up_proj.weight"
    first, second = (merge(stacked(r), tmp_path / str(r)) for r in ((0, 2), (0, 3)))
    for layer, alone, of in ((0, first, 0), (1, first, 1), (2, second, 0), (3, second, 1), (4, second, 2)):
        tensor = both[f"model.layers.{layer}.{name}"]
        torch.testing.assert_close(tensor, alone[f"model.layers.{of}.{name}"], rtol=1e-4, atol=1e-6)
    assert not torch.equal(both[f"model.layers.1.{name}"], both[f"model.layers.3.{name}"])
