"""Models that are restored from a merge by EMR-Merging, and the files that they are restored from."""

import pytest
import torch

from mergekit_pave.emr import file
from mergekit_pave.errors import PaveError

METADATA = {
    "format": file.FORMAT,
    "model": "./math",
    "scale": "1.25",
    "base": "./base",
    "base_weights": "0" * 32,
    "merged_weights": "1" * 32,
    "names": "{}",
    "copied": '["steps"]',
    "config": '{"model_type": "llama"}',
}


def entries(**tensors: torch.Tensor) -> list[file.Entry]:
    """Tensors as `write` takes them; `__` in a keyword is a dot."""
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return [(name, tensor.dtype, tuple(tensor.shape), lambda tensor=tensor: tensor) for name, tensor in named.items()]


SOUND = {"mask__x": torch.tensor([1, 255, 3], dtype=torch.uint8), "own__head": torch.arange(6.0).view(2, 3)}


def test_a_file_gives_back_what_was_written(tmp_path):
    own = {f"own__{dtype}".replace("torch.", ""): torch.arange(5).to(dtype) for dtype in file._TYPES.values()}
    path = tmp_path / "emr" / "math.safetensors"
    texts = {"generation_config": '{"eos_token_id": [1, 2]}', "chat_template": "{{ messages }}", "names": '{"x": "y"}'}
    file.write(path, METADATA | texts, entries(**SOUND, **own, own__number=torch.tensor(7)))
    (task,) = file.tasks_of(tmp_path)
    assert (task.name, task.model, task.scale, task.base) == ("math", "./math", 1.25, "./base")
    assert (task.names, task.copied, task.config) == ({"x": "y"}, ["steps"], {"model_type": "llama"})
    assert (task.generation_config, task.chat_template) == ({"eos_token_id": [1, 2]}, "{{ messages }}")
    assert torch.equal(task.mask("x"), SOUND["mask__x"])
    assert set(task.own) == {name.removeprefix("own__") for name in ("own__head", "own__number", *own)}
    assert task.own_tensor("number").shape == () and task.own_tensor("number") == 7
    for name, tensor in own.items():
        found = task.own_tensor(name.removeprefix("own__"))
        assert found.dtype == tensor.dtype and torch.equal(found, tensor)
    assert [path.name for path in (tmp_path / "emr").iterdir()] == ["math.safetensors"]


def test_tensors_are_made_one_after_the_other(tmp_path):
    alive = []

    def make():
        assert sum(reference() is not None for reference in alive) <= 1, "the last may still be there, but none before it"
        import weakref

        tensor = torch.zeros(100, dtype=torch.uint8)
        alive.append(weakref.ref(tensor))
        return tensor

    file.write(tmp_path / "a.safetensors", METADATA, [(f"mask.{i}", torch.uint8, (100,), make) for i in range(5)])
    assert len(alive) == 5


def test_a_file_is_written_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "emr" / "math.safetensors"
    file.write(path, METADATA, entries(**SOUND))
    before = path.read_bytes()

    def fail():
        raise RuntimeError("on the way")

    for make, kind in ((fail, RuntimeError), (lambda: torch.zeros(2), ValueError)):
        with pytest.raises(kind):
            file.write(path, METADATA, [*entries(mask__y=torch.ones(3, dtype=torch.uint8)), ("own.a", torch.float32, (3,), make)])
        assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_names_are_those_of_files_on_every_system():
    models = ["./a/math", "./b/Math", "someone/code+other/lo ra:x", "./.hidden", "./..", "./c/math-2", f"./{'x' * 300}"]
    names = file.file_names(models)
    assert list(names) == models
    assert len({name.lower() for name in names.values()}) == len(models)
    for name in names.values():
        assert name and set(name) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-") and name[0] != "."
        assert len(name) < 120
    assert file.file_names(["./a/math", "./a/code"]) == {"./a/math": "math", "./a/code": "code"}


def test_a_task_is_found_by_its_name_or_its_model(tmp_path):
    for name, model in (("math", "./models/math"), ("code", "someone/code")):
        file.write(tmp_path / "emr" / f"{name}.safetensors", METADATA | {"model": model}, entries(**SOUND))
    (tmp_path / "emr" / ".math.safetensors.1-2").write_bytes(b"left by a run that was killed")
    (tmp_path / "emr" / ".math.safetensors").write_bytes(b"hidden")
    assert [task.name for task in file.tasks_of(tmp_path)] == ["code", "math"]
    assert file.find(tmp_path, "code").model == file.find(tmp_path, "someone/code").model == "someone/code"
    with pytest.raises(PaveError, match=r"unknown task 'maths'; did you mean 'math'\? .*code, math"):
        file.find(tmp_path, "maths")
    with pytest.raises(PaveError, match="no tasks"):
        file.find(tmp_path / "emr", "math")
    assert file.tasks_of(tmp_path / "emr") == []
