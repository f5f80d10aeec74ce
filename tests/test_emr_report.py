"""What a real merge by `emr` tells: its figures are those of the models that are restored from it, computed in float64."""

import json
import re

import pytest
import torch
from click.testing import CliRunner
from merging import entries, forget_checkpoints, invoke
from reference import weights
from test_emr import classifiers, config_of  # noqa: F401, a fixture

from mergekit_pave.cli import main
from mergekit_pave.report.card import section
from mergekit_pave.report.emr import emr_warnings, meaning, restored_table
from mergekit_pave.report.stored import read_report


def command(*arguments) -> str:
    forget_checkpoints()
    done = CliRunner().invoke(main, [*map(str, arguments), "--quiet"])
    assert done.exit_code == 0, done.output
    return done.output


def merged_and_restored(config, folder, caplog):
    """The report of a merge, the block at its end, and by model the tensors of the one that `mergekit-pave restore` writes.

    The command that the block names is what is run.
    """
    result = invoke(config, folder / "out", "--quiet")
    assert result.exit_code == 0, (result.output, result.exception)
    told = caplog.messages[-1]
    first, others = re.search(
        r"^  restore     mergekit-pave restore \S*/out (\S+) -o \S+; likewise (.*)$", told, re.MULTILINE
    ).groups()
    restored = {}
    for name in (first, *others.split(", ")):
        command("restore", folder / "out", name, "-o", folder / name)
        restored[name] = weights(folder / name)
    report = read_report(str(folder / "out"))
    return report, told, {model: restored[name] for model, name in zip(report["emr"]["models"], restored, strict=True)}


def total(tensors) -> float:
    return sum(tensor.double().sum().item() for tensor in tensors)


def check_figures(report, out, base, experts, restored):
    """Distance, share of entries and scale of each model.

    Args:
        base: tensors; only those that all models share.
        experts: by model, as they were before they were purified.
        restored: by model.
    """
    merged = weights(out)
    shared = {name: merged[name].double() - base[name] for name in base}
    entries_of_all = sum(map(torch.numel, base.values()))
    for model, told in report["emr"]["models"].items():
        error = total((restored[model][name].double() - experts[model][name].double()).square() for name in base)
        change = total((experts[model][name].double() - base[name]).square() for name in base)
        assert told["distance"] == pytest.approx((error / change) ** 0.5, rel=1e-4)
        moved = {name: restored[model][name].double() - base[name] for name in base}
        assert told["agreed"] == pytest.approx(total((moved[name] != 0) for name in base) / entries_of_all, abs=2e-3)
        size = total((shared[name] * (moved[name] != 0)).abs() for name in base)
        assert told["scale"] == pytest.approx(total(moved[name].abs() for name in base) / size, rel=1e-4)
        assert told["bytes"] == (out / told["file"]).stat().st_size
        assert told["own"] == sorted(restored[model].keys() - base.keys())
        assert all(torch.equal(restored[model][name], experts[model][name]) for name in told["own"])


def test_heads_and_no_data(classifiers, tmp_path, caplog, undrawn):  # noqa: F811
    base, tuned = classifiers
    config = {"merge_method": "emr", "base_model": str(base), "models": [{"model": str(m)} for m in tuned], "dtype": "float32"}
    report, told, restored = merged_and_restored(config, tmp_path, caplog)
    of_base, kept = weights(base), report["emr"]
    experts = {str(model): weights(model) for model in tuned}
    shared = {name: tensor.double() for name, tensor in of_base.items() if name not in kept["base_only"]}
    assert kept["tensors"] == len(shared) and kept["base_only"]
    check_figures(report, tmp_path / "out", shared, experts, restored)
    for model, of_model in kept["models"].items():
        before = {name: experts[model][name].double() - shared[name] for name in shared}
        merged = weights(tmp_path / "out")
        agrees = {name: restored[model][name].double() != shared[name] for name in shared}
        stored = total((agrees[name] * (merged[name].double() - shared[name])).abs() for name in shared)
        assert of_model["scale"] == pytest.approx(total(change.abs() for change in before.values()) / stored, rel=1e-4)
        line = f"restored, it differs by {of_model['distance']:.2g} x its change; {len(of_model['own'])} tensors of its own kept"
        assert line in told
    card = (tmp_path / "out" / "README.md").read_text()
    assert section(report) in card + "\n" and "Calibration" not in card
    command("report", tmp_path / "out")
    page = (tmp_path / "out" / "pave_report" / "index.html").read_text()
    for row in restored_table(kept)[1]:
        assert all(cell in page for cell in row) and all(cell in card for cell in row)
    assert meaning(report) in page and (tmp_path / "out" / "pave_report" / "restored.png").exists()


def test_some_models_purified(llama, tmp_path, cache, caplog, undrawn):
    """Distances are to the models as they were. Those that are restored badly are warned of everywhere."""
    pave = {"rank_ratio": 0.9, "models": [*entries(llama, 2), {"model": str(llama.tuned[2]), "purify": False}]}
    report, told, restored = merged_and_restored(config_of(llama, pave=pave), tmp_path, caplog)
    base = {name: tensor.double() for name, tensor in weights(llama.base).items()}
    check_figures(report, tmp_path / "out", base, {str(model): weights(model) for model in llama.tuned}, restored)
    assert len(told.splitlines()) <= 10 and "\n  purified    21 of 30 tensors" in told
    warned = emr_warnings(report)
    far = [model for model, of_model in report["emr"]["models"].items() if of_model["distance"] >= 1]
    assert far and [warning.partition(": ")[0] for warning in warned] == far
    assert set(warned) <= set(report["warnings"]) and set(warned) <= set(caplog.messages)
    assert f"  warnings    {len(report['warnings'])}: see above" in told
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(f"> {model}: restored, it is" in card for model in far)
    command("report", tmp_path / "out")
    page = (tmp_path / "out" / "pave_report" / "index.html").read_text()
    assert 'id="restored"' in page and 'id="kept"' in page and all(warning in page for warning in warned)


def test_a_config_has_nothing_to_draw_before_it_is_merged(llama, tmp_path):
    """What is restored is known once the merge is done."""
    config = config_of(llama, pave={"models": [{"model": str(model), "purify": False} for model in llama.tuned]})
    (tmp_path / "config.yml").write_text(json.dumps(config))
    forget_checkpoints()
    done = CliRunner().invoke(main, ["report", str(tmp_path / "config.yml"), "--quiet"])
    assert done.exit_code == 1 and "To see what emr keeps of each model, give the folder of the finished merge" in done.output
