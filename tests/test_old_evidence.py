"""A folder that is merged into again: what tells of the earlier merge goes with its weights, or is not believed."""

import contextlib
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from commands import command, start
from mergekit import multigpu_executor
from mergekit.io.tensor_writer import TensorWriter
from merging import config_for, merge, write_config

from mergekit_pave.cli import main
from mergekit_pave.errors import PaveError
from mergekit_pave.report import outputs as _outputs
from mergekit_pave.report.page.picture import draw_ranks
from mergekit_pave.report.stored import read_report


@pytest.fixture(scope="module")
def purified(families, tmp_path_factory):
    """A purified merge, with its page."""
    out = tmp_path_factory.mktemp("purified") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mergekit_pave.plugin.wrap.draw_ranks", draw_ranks)
        merge(config_for(families["llama"], {}), out)
    assert CliRunner().invoke(main, ["report", str(out)]).exit_code == 0
    assert (out / "pave_ranks.png").is_file() and (out / "pave_report" / "kept-rank.png").is_file()
    return out


@pytest.fixture
def out(purified, tmp_path):
    return shutil.copytree(purified, tmp_path / "out")


def refusal(folder) -> str | None:
    """Why `mergekit-pave report` takes the folder for no purified merge."""
    try:
        read_report(str(folder))
    except PaveError as error:
        return str(error)
    return None


def ours(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*pave*"))


def unwatched(monkeypatch):
    """mergekit as it is without the plugin."""
    monkeypatch.setattr(TensorWriter, "finalize", TensorWriter.finalize.__wrapped__)


def test_a_merge_without_a_block_removes_what_tells_of_the_earlier_one(llama, out, tmp_path):
    (out / "notes.md").write_text("mine")
    merge(config_for(llama), out)
    assert ours(out) == []
    assert (out / "notes.md").read_text() == "mine"
    merge(config_for(llama), tmp_path / "fresh")
    names = [sorted(path.name for path in folder.iterdir()) for folder in (out, tmp_path / "fresh")]
    assert names[0] == sorted([*names[1], "notes.md"])
    refused = CliRunner().invoke(main, ["report", str(out)])
    assert refused.exit_code == 1 and refused.output == f"Error: {refusal(out)}\n" and "no pave_report.json" in refused.output


def test_a_real_command_without_a_block_does_so_too(llama, out, tmp_path):
    path = write_config(config_for(llama), tmp_path / "plain.yml")
    assert command("mergekit-yaml", path, out, "--no-write-model-card").returncode == 0
    assert ours(out) == []


def test_what_is_not_ours_stays(llama, out):
    for name in ("mine.png", "notes.txt"):
        (out / "pave_report" / name).write_text("mine")
    merge(config_for(llama), out)
    assert ours(out) == ["pave_report"]
    assert sorted(path.name for path in (out / "pave_report").iterdir()) == ["mine.png", "notes.txt"]


def test_a_page_of_somebody_elses_stays(llama, tmp_path):
    page = tmp_path / "out" / "pave_report" / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text('<a href="plot.png">PNG</a>')
    (page.parent / "plot.png").write_text("mine")
    merge(config_for(llama), tmp_path / "out")
    assert sorted(path.name for path in page.parent.iterdir()) == ["index.html", "plot.png"]


@pytest.mark.parametrize("block", [None, {}], ids=["plain", "purified"])
def test_a_merge_that_fails_while_it_writes_destroys_nothing(block, llama, out, monkeypatch):
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(TensorWriter, "_write_shard_task", full)
    with pytest.raises(OSError, match="No space left"):
        merge(config_for(llama, block), out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert refusal(out) is None


@pytest.mark.parametrize(
    "options",
    [{}, {"out_shard_size": 50000}, {"safe_serialization": False}, {"async_write": True}, {"write_model_card": False}],
    ids=lambda options: "".join(options) or "defaults",
)
def test_the_report_is_of_the_weights_beside_it(options, llama, out, monkeypatch):
    """However they are written; once others are, without the plugin, it is refused."""
    for path in out.glob("model*"):
        path.unlink()
    merge(config_for(llama, {"rank_ratio": 0.75}), out, **options)
    told = json.loads((out / "pave_report.json").read_text())
    assert told["format"] == 1 and told["settings"]["rank_ratio"] == 0.75
    pattern = "model*.safetensors" if options.get("safe_serialization", True) else "pytorch_model*.bin"
    assert sorted(told["weights"]) == sorted(path.name for path in out.glob(pattern))
    assert len(told["weights"]) > 1 or "out_shard_size" not in options
    assert not (out / "pave_report").exists()
    if options.get("write_model_card", True):
        assert "### PAVE" in (out / "README.md").read_text()
    assert refusal(out) is None

    unwatched(monkeypatch)
    merge(config_for(llama, weight=(0.5, 0.4)), out, **options)
    line = refusal(out)
    assert str(out / "pave_report.json") in line and "is not of the weights beside it" in line and "copy pave_report.json" in line
    shutil.copy(out / "pave_report.json", out.parent)
    assert refusal(out.parent) is None


def test_several_devices_write_the_report_after_the_weights(llama, out, monkeypatch):
    """mergekit's executor for several GPUs, on a CPU that stands for two: it runs in threads and in another order."""
    monkeypatch.setattr(multigpu_executor, "get_torch_accelerator_type", lambda: "cpu")
    monkeypatch.setattr(multigpu_executor, "get_torch_accelerator_count", lambda: 2)
    monkeypatch.setattr(
        multigpu_executor, "get_torch_accelerator_module", lambda _: SimpleNamespace(synchronize=lambda device: None)
    )
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    merge(config_for(llama, {"rank_ratio": 0.75}), out, multi_gpu=True)
    assert json.loads((out / "pave_report.json").read_text())["settings"]["rank_ratio"] == 0.75
    assert refusal(out) is None
    merge(config_for(llama), out, multi_gpu=True)
    assert ours(out) == []


@pytest.mark.parametrize(("first", "then"), [({"out_shard_size": 50000}, {}), ({}, {"out_shard_size": 50000})])
def test_weights_of_two_merges_side_by_side(first, then, llama, out, monkeypatch):
    """mergekit leaves files of other names: what counts is what transformers loads, the single file."""
    for path in out.glob("model*"):
        path.unlink()
    merge(config_for(llama, {}), out, **first)
    unwatched(monkeypatch)
    merge(config_for(llama), out, **then)
    assert (refusal(out) is None) == (not first)


def test_another_mergekit_that_knows_nothing_of_the_plugin(llama, out, tmp_path):
    path = write_config(config_for(llama, weight=(0.5, 0.4)), tmp_path / "plain.yml")
    off = start("mergekit-yaml", path, out, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert off.communicate(timeout=300) and off.returncode == 0
    assert "is not of the weights beside it" in refusal(out)


def test_a_report_without_its_weights_is_drawn(out):
    (out / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert refusal(out) is None
    (out / "model.safetensors").unlink()
    assert refusal(out) is None
    (out / "model.safetensors").write_bytes(b"cut")
    assert "is not of the weights beside it" in refusal(out)
    (out / "model.safetensors").unlink()
    (out / "model.safetensors.index.json").write_text("{")
    assert "model.safetensors.index.json was written by another merge, or changed since" in refusal(out)


def test_formats_of_other_versions(out):
    """An older report has neither a number nor its weights; a newer one is not guessed at."""
    path = out / "pave_report.json"
    known = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in known.items() if key not in ("format", "weights")}))
    assert refusal(out) is None
    path.write_text(json.dumps({"format": 2, "rows": []}))
    newer = refusal(out)
    assert "format 2" in newer and "pip install --upgrade mergekit-pave" in newer
    for other in ([], {}, {"format": "new"}, known | {"purified": None, "format": None}):
        path.write_text(json.dumps(other))
        assert refusal(out).startswith(f"{path} is not a report of mergekit-pave")


def test_an_adapter_beside_the_model_leaves_its_report(out):
    with TensorWriter(str(out), override_basename="adapter_model") as writer:
        writer.save_tensor("a", torch.ones(2))
    assert refusal(out) is None


def test_what_cannot_be_removed_costs_no_merge(llama, out, monkeypatch, caplog):
    monkeypatch.setattr("mergekit_pave.hook.outputs.remove", lambda _: 1 / 0)
    merge(config_for(llama), out)
    assert "could not be removed" in caplog.text


def test_nothing_outside_of_the_folder_is_removed(tmp_path):
    """A page may have come from somebody else."""
    (tmp_path / "precious.png").write_bytes(b"")
    page = tmp_path / "out" / "pave_report" / "index.html"
    page.parent.mkdir(parents=True)
    link = '<a href="..&#47;..&#47;precious.png">PNG</a>'
    page.write_text(f'<meta name="generator" content="mergekit-pave report">{link}')
    _outputs.remove(tmp_path / "out")
    assert (tmp_path / "precious.png").is_file() and not page.exists()
