"""A run whose caches are filled: what it imports and opens, and that everything that has changed is noticed."""

import copy
import json
import os
import shutil
import time

import pytest
from click.testing import CliRunner
from commands import finish, fresh
from merging import config_for, forget_checkpoints, merge, write_config
from models import age, make_family, read_rows, write_rows
from reference import weights
from test_caches import PAVE, same

import mergekit_pave.planning.samples as planned
from mergekit_pave.cache import Artefact, entries, files_identity
from mergekit_pave.cli import main

PLAN = "from mergekit_pave.cli import main; main(['plan', sys.argv[1]], standalone_mode=False)"
MERGE = "from mergekit.scripts import run_yaml; run_yaml.main([*sys.argv[1:], '--quiet'], standalone_mode=False)"


@pytest.fixture
def family(tmp_path):
    """Models and data of the test's own, so that it may change them."""
    return make_family("llama", tmp_path / "models")


@pytest.fixture
def reads(monkeypatch):
    """The models whose samples are read from their data sets, by the keys of the data."""
    read, draw_samples = [], planned.draw_samples
    monkeypatch.setattr(planned, "draw_samples", lambda *args: read.append(args[-1]) or draw_samples(*args))
    return read


def remembered(cache) -> list[Artefact]:
    return [artefact for entry in entries(cache) if entry.kind == "samples" for artefact in entry.artefacts]


def test_a_warm_run_imports_nothing_that_reads_data_or_draws(family, tmp_path, cache):
    config = write_config(config_for(family, PAVE), tmp_path / "config.yml")
    assert imported(PLAN, config) == {"datasets", "pyarrow", "pandas"}
    first = merge(config_for(family, PAVE), tmp_path / "out")
    assert not imported(PLAN, config)
    assert not imported(MERGE, config, tmp_path / "again") and (tmp_path / "again" / "pave_ranks.png").is_file()
    same(first, weights(tmp_path / "again"))


def imported(code: str, *arguments) -> set[str]:
    """What a program in a fresh interpreter has imported of what takes long."""
    names = ("datasets", "pandas", "pyarrow", "matplotlib", "IPython")
    told = f"import sys; {code}; print('imported', *(name for name in {names} if name in sys.modules))"
    done = finish(fresh("python", "-c", told, *arguments))
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_a_plan_is_the_same_from_memory(family, tmp_path, cache, reads):
    config = config_for(family, PAVE | {"calibration": {"max_tokens": 90, "samples": 12}})
    shown = plan(config, tmp_path)
    assert len(reads) == 2 and not remembered(cache), "a plan leaves nothing"
    merge(config, tmp_path / "out")
    before = plan(config, tmp_path)
    reads.clear()
    assert plan(config, tmp_path) == before and not reads
    for artefact in remembered(cache):
        artefact.discard()
    assert plan(config, tmp_path) == before and len(reads) == 2
    assert {name: model["data"] for name, model in shown.items()} == {name: model["data"] for name, model in before.items()}


def plan(config, folder) -> dict:
    forget_checkpoints()
    result = CliRunner().invoke(main, ["plan", str(write_config(config, folder / "config.yml")), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["models"]


def rewrite(family, config):
    rows = read_rows(family.data[0])
    rows[0]["text"] = rows[0]["text"][::-1]  # as long as before
    write_rows(family.data[0], rows)
    os.utime(family.data[0], (time.time() - 500, time.time() - 500))


def other_tokenizer(family, config):
    path = family.tuned[0] / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 9}))
    os.utime(path, (time.time() - 500, time.time() - 500))


def another_place(family, config):
    moved = family.data[0].with_name("moved.jsonl")
    shutil.copy2(family.data[0], moved)
    config["pave"]["models"][0]["data"]["path"] = str(moved)


CHANGES = {
    "data": rewrite,
    "tokenizer": other_tokenizer,
    "place": another_place,
    "setting": lambda family, config: config["pave"].update(calibration={"max_length": 10}),
    "column": lambda family, config: config["pave"]["models"][0]["data"].update(text="question"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_read_again(family, tmp_path, cache, reads, change):
    config = config_for(family, PAVE)
    merge(config, tmp_path / "out")
    merge(config, tmp_path / "out")
    assert len(reads) == 2
    reads.clear()
    changed = copy.deepcopy(config)
    CHANGES[change](family, changed)
    merge(changed, tmp_path / "out")
    assert len(reads) == (2 if change == "setting" else 1)
    same(merge(changed, tmp_path / "out"), merge(in_fresh_cache(changed, tmp_path), tmp_path / "fresh"))


def in_fresh_cache(config, folder):
    return config | {"pave": config["pave"] | {"cache_dir": str(folder / "fresh-cache")}}


def test_damaged_memory_is_made_again(family, tmp_path, cache, reads):
    config = config_for(family, PAVE)
    first = merge(config, tmp_path / "out")
    for artefact in remembered(cache):
        path = artefact.folder / "samples.safetensors"
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
    same(first, merge(config, tmp_path / "out"))
    assert len(reads) == 4 and all(artefact.is_intact() for artefact in remembered(cache))


def test_rows_that_cannot_be_used_are_told_each_time(family, tmp_path, cache, caplog, reads):
    rows = read_rows(family.data[0])
    rows[3]["text"] = ""
    write_rows(family.data[0], rows)
    age(tmp_path)
    for _ in range(2):
        caplog.clear()
        merge(config_for(family, PAVE), tmp_path / "out")
        assert "skipped 1 of 40 rows: 1 empty" in caplog.text
    assert len(reads) == 2


def test_files_that_have_just_been_written_are_read_again(family, tmp_path, cache, reads):
    """Within the time that a file system tells apart a file may change once more."""
    os.utime(family.data[0])
    for _ in range(2):
        merge(config_for(family, PAVE), tmp_path / "out")
        os.utime(family.data[0])
    assert len(reads) == 3 and len(remembered(cache)) == 1


def test_data_that_may_change_elsewhere_is_read_again(family, tmp_path, cache, reads):
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy2(family.data[0], folder / "rows.jsonl")
    config = config_for(family, PAVE)
    data = config["pave"]["models"][0]["data"]
    for change, number in [({"path": str(folder), "data_files": "*.jsonl"}, 1), ({"path": str(folder)}, 0)]:
        data.clear()
        data.update(change | {"text": "text"})
        merge(config, tmp_path / "out")
        reads.clear()
        merge(config, tmp_path / "out")
        assert len(reads) == number, change
    (folder / "README.md").write_text("---\nconfigs: [{config_name: default, data_files: '*.jsonl'}]\n---\n")
    age(folder)
    for _ in range(2):
        merge(config, tmp_path / "out")
    assert len(reads) == 2


class TestFilesIdentity:
    @pytest.fixture
    def folder(self, tmp_path):
        for name in ("a", "b/c"):
            (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "folder" / name).write_text(name)
        age(tmp_path)
        return tmp_path / "folder"

    def test_every_change_shows(self, folder):
        found = [files_identity([folder])]
        assert found == [files_identity([folder])]
        os.utime(folder / "b" / "c", (1, 1))
        found.append(files_identity([folder]))
        (folder / "b" / "c").write_text("longer")
        os.utime(folder / "b" / "c", (1, 1))
        found.append(files_identity([folder]))
        (folder / "b" / "c").rename(folder / "b" / "d")
        found.append(files_identity([folder]))
        found.append(files_identity([shutil.copytree(folder, folder.parent / "copy")]))
        assert None not in found and len(set(found)) == len(found)

    def test_where_nobody_can_tell(self, folder):
        assert files_identity([folder / "none"]) is None
        (folder / "new").write_text("")
        assert files_identity([folder]) is None
        age(folder)
        assert files_identity([folder])
        (folder.parent / "elsewhere").mkdir()
        (folder / "link").symlink_to(folder.parent / "elsewhere")
        assert files_identity([folder]) is None
