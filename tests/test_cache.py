"""The primitives of the cache: keys, atomic writes, and artefacts that are never trusted when they do not match."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from attacks import ATTACKS, publish, spoilt
from click.testing import CliRunner
from commands import python

from mergekit_pave import cache
from mergekit_pave.cache import MANIFEST, Artefact, DamagedError, cache_root, digest, weights_identity
from mergekit_pave.cache import artefact as artefact_module
from mergekit_pave.calibration.stored import StoredCovariances
from mergekit_pave.cli import main
from mergekit_pave.errors import PaveError
from mergekit_pave.files import readable
from mergekit_pave.tasks.decompose import has_tail

WAY_OUT = r"pave\.cache_dir or MERGEKIT_PAVE_CACHE"


class TestDigest:
    def test_equal_values_give_equal_keys(self):
        assert digest({"a": 1, "b": [2.5, None]}, "x") == digest({"b": [2.5, None], "a": 1}, "x")
        assert len(digest("x")) == 32
        assert int(digest("x"), 16) >= 0

    @pytest.mark.parametrize(
        "other", [("ab", "c"), ("a", "bc", ""), ("a",), ("bc", "a"), ("abc",), (b"a", "bc"), ("a", b"bc"), (["a", "bc"],), ()]
    )
    def test_different_values_give_different_keys(self, other):
        assert digest(*other) != digest("a", "bc")

    def test_numbers_are_told_apart(self):
        assert len({digest(value) for value in (0, 1, 1.0, "1", True, None, 0.1, 0.1 + 1e-16)}) == 8

    def test_a_new_format_gives_new_keys(self, monkeypatch):
        before = [cache.key(kind, "x") for kind in ("covariance", "subspace")]
        monkeypatch.setitem(cache.FORMATS, "subspace", cache.FORMATS["subspace"] + 1)
        after = [cache.key(kind, "x") for kind in ("covariance", "subspace")]
        assert after[0] == before[0] and after[1] != before[1]

    def test_keys_last_from_one_process_to_the_next(self):
        code = "from mergekit_pave.cache import digest; print(digest({'b': 'x', 'a': [1, 'y']}))"
        assert python(code).stdout.strip() == digest({"b": "x", "a": [1, "y"]})


class TestCacheRoot:
    def test_the_config_comes_before_the_environment(self, tmp_path, monkeypatch):
        monkeypatch.setenv("MERGEKIT_PAVE_CACHE", str(tmp_path / "environment"))
        assert cache_root(str(tmp_path / "config")) == tmp_path / "config"
        assert cache_root(None) == tmp_path / "environment"

    def test_a_relative_path_and_a_home_are_resolved(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert cache_root("./here") == tmp_path / "here"
        assert cache_root("~/there") == tmp_path / "home" / "there"

    def test_the_default_is_beside_the_hubs_cache(self, monkeypatch):
        from huggingface_hub.constants import HF_HOME

        monkeypatch.delenv("MERGEKIT_PAVE_CACHE")
        assert cache_root(None) == Path(HF_HOME) / "mergekit-pave"


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of two shards, and a function that says what its identity is now."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("a.safetensors", "b.safetensors"):
        generator = torch.Generator().manual_seed(ord(name[0]))
        safetensors.torch.save_file({"w": torch.randn(300, 1000, generator=generator)}, folder / name)
        os.utime(folder / name, ns=(10**18, 10**18))
    (folder / "config.json").write_text("{}")
    return folder, lambda: weights_identity(str(folder), ["a.safetensors", "b.safetensors"])


class TestWeightsIdentity:
    def test_nothing_changed(self, checkpoint):
        folder, identity = checkpoint
        assert identity() == identity()
        assert weights_identity(str(folder), ["b.safetensors", "a.safetensors", "a.safetensors"]) == identity()

    def test_another_modification_time(self, checkpoint):
        folder, identity = checkpoint
        before = identity()
        os.utime(folder / "b.safetensors", ns=(10**18, 10**18 + 1))
        assert identity() != before

    def test_other_weights_of_the_same_size_and_time(self, checkpoint):
        folder, identity = checkpoint
        before = identity()
        tensors = safetensors.torch.load_file(folder / "a.safetensors")
        safetensors.torch.save_file({"w": tensors["w"] * 1.001}, folder / "a.safetensors")
        os.utime(folder / "a.safetensors", ns=(10**18, 10**18))
        assert identity() != before

    def test_a_renamed_tensor_of_the_same_size_and_time(self, checkpoint):
        folder, identity = checkpoint
        before = identity()
        tensors = safetensors.torch.load_file(folder / "a.safetensors")
        safetensors.torch.save_file({"v": tensors["w"]}, folder / "a.safetensors")
        os.utime(folder / "a.safetensors", ns=(10**18, 10**18))
        assert identity() != before

    def test_other_shards_and_another_config(self, checkpoint):
        folder, identity = checkpoint
        before = identity()
        assert weights_identity(str(folder), ["a.safetensors"]) != before
        (folder / "config.json").write_text('{"rope_theta": 1}')
        assert identity() != before

    def test_two_shards_in_each_others_place(self, checkpoint):
        folder, identity = checkpoint
        before = identity()
        (folder / "a.safetensors").rename(folder / "c")
        (folder / "b.safetensors").rename(folder / "a.safetensors")
        (folder / "c").rename(folder / "b.safetensors")
        assert identity() != before

    def test_a_file_of_the_hubs_cache_is_known_by_its_hash(self, checkpoint):
        folder, identity = checkpoint
        blobs = folder.parent / "blobs"
        blobs.mkdir()
        for name in ("a.safetensors", "b.safetensors"):
            blob = (folder / name).rename(blobs / (name[0] * 64))
            (folder / name).symlink_to(blob)
        before = identity()
        # The Hub's cache may be copied or restored with other times.
        os.utime(blobs / ("a" * 64), ns=(1, 1))
        assert identity() == before
        (blobs / ("a" * 64)).rename(blobs / ("c" * 64))
        (folder / "a.safetensors").unlink()
        (folder / "a.safetensors").symlink_to(blobs / ("c" * 64))
        assert identity() != before

    def test_pickled_and_tiny_shards(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        path = tmp_path / "pytorch_model.bin"
        path.write_bytes(b"abc")
        os.utime(path, ns=(1, 1))
        before = weights_identity(str(tmp_path), [path.name])
        path.write_bytes(b"abd")
        os.utime(path, ns=(1, 1))
        assert weights_identity(str(tmp_path), [path.name]) != before

    def test_every_tensor_is_sampled(self, tmp_path):
        """A change of one small tensor among large ones shows, even where the file's time does not."""
        (tmp_path / "config.json").write_text("{}")
        path = tmp_path / "model.safetensors"
        tensors = {"large": torch.zeros(1_000_000), "small": torch.zeros(3), "last": torch.zeros(500_000)}
        keys = set()
        for value in (0, 1):
            tensors["small"][0] = value
            safetensors.torch.save_file(tensors, path)
            os.utime(path, ns=(1, 1))
            keys.add(weights_identity(str(tmp_path), [path.name]))
        assert len(keys) == 2


@pytest.fixture
def artefact(tmp_path):
    """A complete artefact of two files."""
    artefact = Artefact(tmp_path / "deep" / "key")
    files = {
        "one.safetensors": artefact.write("one.safetensors", {"x": torch.arange(1000)}),
        "two.safetensors": artefact.write("two.safetensors", {"y": torch.ones(3, 4, dtype=torch.bfloat16).mT}),
    }
    artefact.complete({"files": files, "model": "é", "base": "base", "equal": {}})
    return artefact


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestArtefact:
    def test_what_was_written_is_read(self, artefact):
        assert artefact.is_intact()
        assert artefact.manifest()["model"] == "é"
        assert torch.equal(artefact.read("one.safetensors")["x"], torch.arange(1000))
        assert torch.equal(artefact.read("two.safetensors")["y"], torch.ones(4, 3, dtype=torch.bfloat16))
        assert names(artefact.folder) == [MANIFEST, "one.safetensors", "two.safetensors"]

    def test_others_can_read_it_too(self, artefact):
        with safetensors.safe_open(artefact.folder / "one.safetensors", "pt") as file:
            assert list(file.keys()) == ["x"]
        entry = json.loads((artefact.folder / MANIFEST).read_text())["files"]["one.safetensors"]
        assert entry["size"] == (artefact.folder / "one.safetensors").stat().st_size

    def test_without_a_manifest_there_is_nothing(self, artefact, tmp_path):
        artefact.discard()
        assert artefact.manifest() is None
        assert not artefact.is_intact()
        artefact.discard()
        assert Artefact(tmp_path / "nowhere").manifest() is None
        assert not Artefact(tmp_path / "nowhere").is_intact()

    def test_a_truncated_file(self, artefact):
        path = artefact.folder / "one.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        assert not artefact.is_intact() and not artefact.is_complete()

    @pytest.mark.parametrize("name", ["one.safetensors", "two.safetensors"])
    @pytest.mark.parametrize("place", [0, -1])
    def test_a_flipped_bit(self, artefact, name, place):
        path = artefact.folder / name
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(data)
        assert not artefact.is_intact()
        assert artefact.is_complete(), "this is asked often, so it costs no reading"
        with pytest.raises(DamagedError, match=rf"{name} is damaged: it is not the file that its manifest\.json describes"):
            artefact.read(name)
        assert len(artefact.read({"one.safetensors": "two.safetensors"}.get(name, "one.safetensors"))) == 1

    def test_a_file_is_hashed_once_unless_it_changes(self, artefact):
        hashed = artefact_module._hash_of.cache_info().misses
        for _ in range(3):
            artefact.read("one.safetensors")
        assert artefact_module._hash_of.cache_info().misses == hashed + 1
        flip(artefact.folder / "one.safetensors")
        with pytest.raises(DamagedError):
            artefact.read("one.safetensors")

    def test_a_missing_file(self, artefact):
        (artefact.folder / "two.safetensors").unlink()
        assert not artefact.is_intact() and not artefact.is_complete()
        with pytest.raises(DamagedError, match=r"two\.safetensors"):
            artefact.read("two.safetensors")
        with pytest.raises(DamagedError, match=r"three\.safetensors"):
            artefact.read("three.safetensors")

    def test_a_folder_in_the_place_of_a_file(self, artefact):
        (artefact.folder / "two.safetensors").unlink()
        (artefact.folder / "two.safetensors").mkdir()
        assert not artefact.is_intact() and not artefact.is_complete()

    def test_a_file_that_is_no_safetensors(self, artefact):
        content = b"\0" * 40
        (artefact.folder / "one.safetensors").write_bytes(content)
        entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        artefact.complete(artefact.manifest() | {"files": {"one.safetensors": entry}})
        with pytest.raises(DamagedError, match=r"one\.safetensors is damaged: "):
            artefact.read("one.safetensors")

    def test_what_is_damaged_is_removed_and_nothing_else(self, artefact):
        other = Artefact(artefact.folder.parent / "other")
        other.complete(artefact.manifest() | {"files": {}})
        error = artefact.discard_damaged(artefact.manifest(), DamagedError("a file is damaged"))
        assert str(error) == "a file is damaged. This entry was removed from the cache; run again, and it is made anew"
        assert not artefact.folder.exists() and other.is_intact()

    def test_what_another_process_has_replaced_is_not_removed(self, artefact):
        before = artefact.manifest()
        artefact.complete(before | {"model": "other"})
        artefact.discard_damaged(before, DamagedError("a file is damaged"))
        assert artefact.is_intact()

    def test_what_another_process_is_at_work_on_is_not_removed(self, artefact):
        with artefact.lock():
            error = artefact.discard_damaged(artefact.manifest(), DamagedError("a file is damaged"))
        assert "Another process is at work" in str(error) and artefact.is_intact()

    @pytest.mark.parametrize("content", [b"", b"{", b'{"files": {', b"\xff\xfe"])
    def test_a_torn_manifest(self, artefact, content):
        (artefact.folder / MANIFEST).write_bytes(content)
        assert artefact.manifest() is None
        assert not artefact.is_intact()

    def test_a_second_write_replaces_the_first(self, artefact):
        entry = artefact.write("one.safetensors", {"x": torch.zeros(2)})
        assert not artefact.is_intact()
        artefact.complete(artefact.manifest() | {"files": {"one.safetensors": entry}})
        assert artefact.is_intact()
        assert torch.equal(artefact.read("one.safetensors")["x"], torch.zeros(2))

    def test_a_failed_write_leaves_the_old_file_and_nothing_else(self, artefact, monkeypatch):
        def fail(tensors, path):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")

        before = names(artefact.folder)
        monkeypatch.setattr(safetensors.torch, "save_file", fail)
        with pytest.raises(PaveError, match=rf"No space left on device.*{WAY_OUT}"):
            artefact.write("one.safetensors", {"x": torch.zeros(2)})
        assert names(artefact.folder) == before
        assert artefact.is_intact()

    def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(self, artefact, monkeypatch):
        def interrupt(tensors, path):
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt

        before = names(artefact.folder)
        monkeypatch.setattr(safetensors.torch, "save_file", interrupt)
        with pytest.raises(KeyboardInterrupt):
            artefact.write("one.safetensors", {"x": torch.zeros(2)})
        assert names(artefact.folder) == before
        assert artefact.is_intact()

    def test_a_manifest_that_cannot_be_written_is_no_manifest(self, tmp_path):
        artefact = Artefact(tmp_path / "key")
        with pytest.raises(TypeError):
            artefact.complete({"files": {}, "note": object()})
        assert names(artefact.folder) == []

    def test_a_place_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        artefact = Artefact(tmp_path / "file" / "cache" / "key")
        with pytest.raises(PaveError, match=WAY_OUT):
            artefact.write("one.safetensors", {"x": torch.zeros(2)})
        with pytest.raises(PaveError, match=WAY_OUT):
            artefact.complete({"files": {}})
        with pytest.raises(PaveError, match=WAY_OUT), artefact.lock():
            pass

    def test_the_lock_keeps_others_out_and_is_released_on_failure(self, artefact):
        code = (
            "import sys; from pathlib import Path; import filelock; lock = filelock.FileLock(sys.argv[1])\n"
            "try: lock.acquire(timeout=0)\nexcept filelock.Timeout: sys.exit(7)"
        )
        with artefact.lock():
            (lock,) = [path for path in artefact.folder.parent.iterdir() if path.name.endswith(".lock")]
            other = [sys.executable, "-c", code, str(lock)]
            assert subprocess.run(other).returncode == 7
        assert subprocess.run(other).returncode == 0
        with pytest.raises(ZeroDivisionError), artefact.lock():
            raise ZeroDivisionError
        assert subprocess.run(other).returncode == 0


class TestAttacks:
    """Nothing that anybody publishes is used, or brings down what reads it; see attacks.py."""

    @pytest.fixture
    def published(self, tmp_path):
        return publish(tmp_path / "published")

    def test_what_they_start_from_is_sound(self, published):
        assert published.is_intact() and published.validate() == published.manifest()
        assert StoredCovariances(published).load(["model.layers.0.mlp.up_proj"]).tokens == 3

    @pytest.mark.parametrize("name", ATTACKS["manifest"])
    def test_a_manifest_that_is_not_sound(self, published, tmp_path, name):
        ATTACKS["manifest"][name](published.folder)
        assert published.manifest() is None
        with pytest.raises(DamagedError, match=r"manifest\.json"):
            published.read_manifest()
        with pytest.raises(DamagedError, match=r"manifest\.json"):
            StoredCovariances(published)
        self.refused(published, tmp_path)

    @pytest.mark.parametrize("name", ATTACKS["files"])
    def test_a_file_that_is_not_what_the_manifest_says(self, published, tmp_path, name):
        ATTACKS["files"][name](published.folder)
        assert published.manifest() is not None
        assert published.is_complete() == (name == "another hash")  # which only those see who read the file
        self.refused(published, tmp_path)
        if published.is_complete():
            with pytest.raises(DamagedError, match=r"00000\.safetensors is damaged"):
                published.read("00000.safetensors")

    def refused(self, published, tmp_path):
        assert not published.is_intact()
        with pytest.raises(DamagedError, match=re.escape(str(published.folder))):
            published.validate()
        with pytest.raises(DamagedError):
            cache.copy(published.folder, tmp_path / "copy")
        assert not (tmp_path / "copy").exists()
        assert names(tmp_path) == ["published"]

    @pytest.mark.parametrize("name", ATTACKS["covariance"])
    def test_a_covariance_that_is_not_what_the_manifest_says(self, published, name):
        ATTACKS["covariance"][name](published.folder)
        assert published.is_intact()  # every file has its hash
        with pytest.raises(DamagedError, match=r"00000\.safetensors"):
            StoredCovariances(published).load(["model.layers.0.mlp.up_proj"])

    @pytest.mark.parametrize("kind", ["covariance", "subspace", "comparison"])
    def test_every_odd_value_in_every_place(self, published, tmp_path, kind):
        """Whatever a manifest holds, what reads it can use it, or says that it is damaged."""
        tail = {"model": "m", "tensor": "t", "count": 2, "min_tokens": 3, "left": {"": 0, "5": 1}}
        tail["slices"] = [{"expert": None, "tokens": 3, "largest": 1.0, "energy": 2.0}]
        equal = {"model": "m", "base": "b", "equal": {"t": [0, 1], "u": []}}
        files = {"files": published.manifest()["files"]}
        form = {"covariance": published.manifest(), "subspace": files | tail, "comparison": {"files": {}} | equal}[kind]
        folder = tmp_path / "cache" / kind / "0" / ("0" if kind == "subspace" else "")
        shutil.copytree(published.folder, folder)
        artefact = Artefact(folder)
        artefact.complete(form)
        assert artefact.manifest() == form and self.read(artefact, kind)
        refused = 0
        for _, _, manifest in spoilt(form):
            artefact.complete(manifest)
            try:
                self.read(artefact, kind)
            except DamagedError:
                refused += 1
            if artefact.manifest():
                assert CliRunner().invoke(main, ["cache", "list", "--cache-dir", str(tmp_path / "cache")]).exit_code == 0
        assert refused > 20

    def read(self, artefact, kind):
        """All that the readers of such an artefact take from it."""
        manifest = artefact.validate()
        if kind == "covariance":
            covariances = StoredCovariances(artefact)
            return [covariances.load([layer]).matrix() for layer in manifest["layers"] if covariances.has([layer])]
        if kind == "subspace":
            return [has_tail(artefact.folder, 1, 2) for _ in manifest["left"]]
        return [torch.zeros(2)[number:] for numbers in manifest["equal"].values() for number in numbers]


def test_sizes_for_people():
    given = (0, 999, 999.4, 999_600, 12_345, 999_499_999, 1.5e9, 999.6e9, 7e13)
    assert [readable(size) for size in given] == [
        "0 bytes", "999 bytes", "999 bytes", "1 MB", "12.3 KB", "999 MB", "1.5 GB", "1 TB", "70 TB",
    ]  # fmt: skip


def test_little_space_is_told_in_small_units(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1234))
    with pytest.raises(PaveError, match=r"may need 2\.5 MB, but only 1\.23 KB are free"):
        cache.require_space(tmp_path / "cache" / "key", 2_500_000)
