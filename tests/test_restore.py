"""Models that are restored from a merge by EMR-Merging, and the files that they are restored from."""

import json
import shutil
import weakref
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from click.testing import CliRunner
from emr_merging import fingerprint, sealed, write_merge
from huggingface_hub.constants import HF_HUB_CACHE
from merging import merge
from models import make_model, make_tokenizer, model_config, perturbed, save
from reference import weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mergekit_pave import load_task
from mergekit_pave.cache import weights_fingerprint
from mergekit_pave.cli import main
from mergekit_pave.emr import file, writing
from mergekit_pave.emr.restore import open_task
from mergekit_pave.emr.weights import Search
from mergekit_pave.errors import PaveError

METADATA = {
    "format": file.FORMAT,
    "name": "math",
    "model": "./math",
    "scale": "1.25",
    "base": "./base",
    "base_weights": "0" * 32,
    "merged_weights": "1" * 32,
    "names": "{}",
    "copied": '["steps"]',
    "config": '{"model_type": "llama"}',
}


def entries(**tensors: torch.Tensor) -> list[writing.Entry]:
    """Tensors as `write` takes them; `__` in a keyword is a dot."""
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return [(name, tensor.dtype, tuple(tensor.shape), lambda tensor=tensor: tensor) for name, tensor in named.items()]


SOUND = {"mask__x": torch.tensor([1, 255, 3], dtype=torch.uint8), "own__head": torch.arange(6.0).view(2, 3)}


def test_a_file_gives_back_what_was_written(tmp_path):
    own = {f"own__{dtype}".replace("torch.", ""): torch.arange(5).to(dtype) for dtype in file.TYPES.values()}
    path = tmp_path / "emr" / "math.safetensors"
    texts = {"generation_config": '{"eos_token_id": [1, 2]}', "chat_template": "{{ messages }}", "names": '{"x": "y"}'}
    writing.write(path, METADATA | texts, entries(**SOUND, **own, own__number=torch.tensor(7)))
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
        tensor = torch.zeros(100, dtype=torch.uint8)
        alive.append(weakref.ref(tensor))
        return tensor

    writing.write(tmp_path / "a.safetensors", METADATA, [(f"mask.{i}", torch.uint8, (100,), make) for i in range(5)])
    assert len(alive) == 5


def test_a_file_is_written_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "emr" / "math.safetensors"
    writing.write(path, METADATA, entries(**SOUND))
    before = path.read_bytes()

    def fail():
        raise RuntimeError("on the way")

    for make, kind in ((fail, RuntimeError), (lambda: torch.zeros(2), ValueError)):
        with pytest.raises(kind):
            writing.write(path, METADATA, [*entries(**SOUND), ("own.a", torch.float32, (3,), make)])
        assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_names_are_those_of_files_on_every_system():
    models = ["./a/math", "./b/Math", "someone/code+other/lo ra:x", "./.hidden", "./-o", "./..", "./c/math-2", f"./{'x' * 300}"]
    names = file.file_names(models)
    assert list(names) == models
    assert len({name.lower() for name in names.values()}) == len(models)
    for name in names.values():
        assert (
            name and set(name) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-") and name[0] not in ".-"
        )
        assert len(name) < 120
    assert file.file_names(["m+l", "m-l"]) == {"m+l": "m-l-2", "m-l": "m-l"}, "no NAME is what another model is called"
    assert file.file_names(["./a/math", "./a/code"]) == {"./a/math": "math", "./a/code": "code"}


def test_a_task_is_found_by_its_name_or_its_model(tmp_path):
    for name, model in (("math", "./models/math"), ("code", "someone/code")):
        writing.write(tmp_path / "emr" / f"{name}.safetensors", METADATA | {"name": name, "model": model}, entries(**SOUND))
    (tmp_path / "emr" / ".math.safetensors.1-2").write_bytes(b"left by a run that was killed")
    (tmp_path / "emr" / ".math.safetensors").write_bytes(b"hidden")
    assert [task.name for task in file.tasks_of(tmp_path)] == ["code", "math"]
    assert file.find(tmp_path, "code").model == file.find(tmp_path, "someone/code").model == "someone/code"
    with pytest.raises(PaveError, match=r"unknown task 'maths'; did you mean 'math'\? .*code, math"):
        file.find(tmp_path, "maths")
    with pytest.raises(PaveError, match="no tasks"):
        file.find(tmp_path / "emr", "math")
    assert file.tasks_of(tmp_path / "emr") == []


def spoil(tmp_path, metadata: dict | None = None, tensors: dict | None = None) -> Path:
    """A sound file but for some of its metadata (None: left out) or tensors, as safetensors writes it."""
    path = tmp_path / "emr" / "math.safetensors"
    path.parent.mkdir()
    texts = {key: text for key, text in (METADATA | (metadata or {})).items() if text is not None}
    named = {name.replace("__", "."): tensor for name, tensor in (SOUND | (tensors or {})).items()}
    save_file(sealed(texts, named), path, texts)
    return path


@pytest.mark.parametrize(
    "metadata, told",
    [
        ({"format": None}, "not named"),
        ({"format": "mergekit-pave-emr-2"}, "mergekit-pave-emr-2"),
        *(({"scale": text}, "scale") for text in (None, "nan", "inf", "-1.0", "1e999")),
        ({"scale": "one"}, "one"),
        *(({key: None}, key) for key in ("model", "base", "base_weights", "merged_weights", "names", "copied", "config")),
        *(({key: ""}, key) for key in ("model", "base")),
        *(({key: "x" * 32}, key) for key in ("base_weights", "merged_weights")),
        *(({key: text}, key) for key in ("names", "copied", "config") for text in ("1", "null", '"x"')),
        ({"names": '{"x": 1}'}, "names.x"),
        ({"names": '{"z": "x"}'}, "'z' has no mask"),
        ({"copied": '["x"]'}, "'x' is given twice"),
        ({"copied": '["steps", "steps"]'}, "'steps' is given twice"),
        ({"copied": "[1]"}, "copied"),
        ({"config": "{"}, "Expecting"),
        ({"config": '{"a":' + "[" * 10**5}, "nested too deeply"),
        ({"config": '{"a":' + "[" * 100 + "]" * 100 + "}"}, "nested too deeply"),
        ({"config": '{"architectures": ["Nobodys"], "auto_map": []}'}, "auto_map"),
        ({"generation_config": "[]"}, "generation_config"),
    ],
)
def test_unsound_metadata_are_refused(tmp_path, metadata, told):
    path = spoil(tmp_path, metadata)
    with pytest.raises(PaveError) as error:
        file.tasks_of(tmp_path)
    assert str(path) in error.value.message and told in error.value.message and len(error.value.message) < 1000


@pytest.mark.parametrize(
    "tensors, told",
    [
        ({"mask__y": torch.ones(3)}, "mask.y"),
        ({"mask__y": torch.ones(3, 1, dtype=torch.uint8)}, "mask.y"),
        ({"mask__y": torch.tensor(1, dtype=torch.uint8)}, "mask.y"),
        ({"masks__y": torch.ones(3, dtype=torch.uint8)}, "masks.y"),
        ({"own__": torch.ones(3)}, "own."),
        ({"mask__": torch.ones(3, dtype=torch.uint8)}, "mask."),
        ({"y": torch.ones(3)}, "'y'"),
        ({"own__x": torch.ones(3)}, "'x' is given twice"),
        ({"own__y": torch.ones(3, dtype=torch.complex64)}, "own.y"),
    ],
)
def test_unsound_tensors_are_refused(tmp_path, tensors, told):
    path = spoil(tmp_path, tensors=tensors)
    with pytest.raises(PaveError) as error:
        file.tasks_of(tmp_path)
    assert str(path) in error.value.message and told in error.value.message


def header(size: int | None = None, **tensors) -> bytes:
    text = json.dumps({"__metadata__": METADATA} | {name.replace("__", "."): of for name, of in tensors.items()}).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text


MASK = {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no safetensors",
        header(1 << 62, mask__x=MASK),
        header(mask__x=MASK),
        header(mask__x=MASK) + b"12",
        header(mask__x=MASK) + b"1234",
        header(mask__x=MASK | {"shape": [1 << 40, 1 << 40]}) + b"123",
        header(mask__x=MASK, mask__y=MASK) + b"123",
        header(mask__x=MASK | {"data_offsets": [-1, 2]}) + b"123",
        header(mask__x=MASK | {"dtype": "U9"}) + b"123",
    ],
)
def test_files_that_are_no_safetensors_are_refused(tmp_path, content):
    path = tmp_path / "emr" / "math.safetensors"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(PaveError, match="cannot be used") as error:
        file.find(tmp_path, "math")
    assert str(path) in error.value.message


def test_a_pointer_of_git_lfs_is_told(tmp_path):
    path = spoil(tmp_path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9085698\n")
    with pytest.raises(PaveError, match="git lfs pull"):
        file.tasks_of(tmp_path)


@pytest.mark.parametrize("key", ["mask.x", "own.head"])
def test_damage_is_seen_by_who_reads_it(tmp_path, key):
    """Each single bit of a tensor counts, and all others can still be read."""
    path = tmp_path / "emr" / "math.safetensors"
    writing.write(path, METADATA, entries(**SOUND))
    with safe_open(path, "pt") as opened:
        content = opened.get_tensor(key).numpy().tobytes()
    at = path.read_bytes().index(content)
    damaged = bytearray(path.read_bytes())
    damaged[at + 1] ^= 4
    path.write_bytes(damaged)
    (task,) = file.tasks_of(tmp_path)
    with pytest.raises(PaveError, match=rf"math.safetensors is damaged: {key}"):
        task.mask("x") if key == "mask.x" else task.own_tensor("head")
    assert torch.equal(
        *((task.own_tensor("head"), SOUND["own__head"]) if key == "mask.x" else (task.mask("x"), SOUND["mask__x"]))
    )


def test_a_file_with_the_name_of_another_is_refused(llama, tmp_path):
    """Who asks for one model would get the other."""
    out = write_merge(llama.base, llama.tuned[:2], tmp_path / "out")
    shutil.copy(out / "emr" / "tuned1.safetensors", out / "emr" / "tuned0.safetensors")
    with pytest.raises(PaveError, match=r"tuned0.safetensors cannot be used: it holds .*tuned1, and its name was tuned1"):
        load_task(out, "tuned0")


def test_changed_metadata_are_seen(tmp_path):
    path = tmp_path / "emr" / "math.safetensors"
    writing.write(path, METADATA, entries(**SOUND))
    path.write_bytes(path.read_bytes().replace(b'"scale": "1.25"', b'"scale": "1.75"'))
    with pytest.raises(PaveError, match="its metadata are not what was written"):
        file.tasks_of(tmp_path)


# Restoring


def run(*arguments):
    return CliRunner().invoke(main, ["restore", *map(str, arguments)])


def expected(out: Path, task: str, base: Path) -> dict[str, np.ndarray]:
    """A model by the formula, with numpy, from what is on the disk."""
    merged, of_base, found = weights(out), weights(base), load_file(out / "emr" / f"{task}.safetensors")
    with safe_open(out / "emr" / f"{task}.safetensors", "pt") as opened:
        scale = np.float32(opened.metadata()["scale"])
    result = {name.removeprefix("own."): tensor for name, tensor in found.items() if name.startswith("own.")}
    for name, packed in found.items():
        if name.startswith("mask."):
            tensor = merged[name.removeprefix("mask.")]
            bits = np.unpackbits(packed.numpy(), count=tensor.numel(), bitorder="little").reshape(tensor.shape)
            start = of_base[name.removeprefix("mask.")][: len(tensor)].to(tensor.dtype).float().numpy()
            change = (tensor.float().numpy() - start) * bits * scale
            result[name.removeprefix("mask.")] = torch.from_numpy(start + change).to(tensor.dtype)
    return result


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys() and wanted
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def loaded(folder: Path, like: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """A restored folder, by transformers, which finds all weights in it."""
    model, info = type(like).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def assert_same_model(a: transformers.PreTrainedModel, b: transformers.PreTrainedModel) -> None:
    assert type(a) is type(b) and a.dtype == b.dtype and a.training == b.training
    assert_equal(a.state_dict(), b.state_dict())
    ignored = {"_name_or_path": None}
    assert a.config.to_dict() | ignored == b.config.to_dict() | ignored
    if a.can_generate():
        assert a.generation_config.to_dict() == b.generation_config.to_dict()
    ids = torch.tensor([[3, 5, 7, 4]])
    with torch.no_grad():  # how tensors lie in memory may change roundings
        torch.testing.assert_close(a(input_ids=ids).logits, b(input_ids=ids).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_a_model_is_restored_by_the_formula_bit_for_bit(families, tmp_path, kind, dtype):
    family = families[kind]
    out = write_merge(family.base, family.tuned[:2], tmp_path / "out", dtype)
    result = run(out, "tuned0", "-o", tmp_path / "again")
    assert result.exit_code == 0 and result.output == f"written to {tmp_path / 'again'}\n"
    assert_equal(weights(tmp_path / "again"), expected(out, "tuned0", family.base))
    model, other = load_task(out, "tuned0"), load_task(str(out), str(family.tuned[1]))
    assert model.dtype == dtype and all(parameter.requires_grad for parameter in model.parameters())
    assert_same_model(model, loaded(tmp_path / "again", model))
    assert not torch.equal(next(model.parameters()), next(other.parameters()))
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    for task in ("tuned1", "tuned0", "tuned1"):
        assert load_task(out, task, into=model) is model
    assert_same_model(model, other)
    assert places == {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}


def test_restoring_is_the_same_each_time_and_takes_any_number_of_files(llama, tmp_path):
    out = write_merge(llama.base, llama.tuned, tmp_path / "out")
    for folder in ("a", "b"):
        assert run(out, "tuned2", "-o", tmp_path / folder).exit_code == 0
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    assert run(out, "tuned2", "-o", tmp_path / "c", "--out-shard-size", "50K").exit_code == 0
    files = sorted((tmp_path / "c").glob("*.safetensors"))
    largest = max(tensor.nbytes for tensor in weights(tmp_path / "a").values())
    assert len(files) > 5 and all(path.stat().st_size < max(50_000, largest) + 5_000 for path in files)
    assert_equal(weights(tmp_path / "c"), weights(tmp_path / "a"))
    assert_same_model(loaded(tmp_path / "c", load_task(out, "tuned2")), load_task(out, "tuned2"))


def test_a_model_is_written_to_its_name_by_default(llama, tmp_path, monkeypatch):
    out = write_merge(llama.base, llama.tuned[:2], tmp_path / "out")
    (tmp_path / "here" / "tuned1").mkdir(parents=True)  # empty, so it may be taken
    monkeypatch.chdir(tmp_path / "here")
    result = run(out, llama.tuned[1])
    assert result.exit_code == 0 and result.output == "written to tuned1\n"
    assert [path.name for path in Path().iterdir()] == ["tuned1"]
    assert (Path("tuned1").stat().st_mode & 0o777) == (Path().stat().st_mode & 0o777)


def test_what_is_beside_the_weights(llama, tmp_path):
    """The tokenizer and other files are the merge's, the settings the model's but for precision."""
    expert = shutil.copytree(llama.tuned[0], tmp_path / "expert")
    (expert / "chat_template.jinja").write_text("{{ 'the expert' }}\n")
    (expert / "generation_config.json").write_text('{"temperature": 0.3, "do_sample": true}')
    config = json.loads((expert / "config.json").read_text())
    config |= {"torch_dtype": config.pop("dtype", "float32"), "quantization_config": {"bits": 4}, "x": ["é"]}
    (expert / "config.json").write_text(json.dumps(config))
    out = write_merge(llama.base, [expert, llama.tuned[1]], tmp_path / "out", torch.bfloat16)
    (out / "preprocessor_config.json").write_text("{}")
    (out / "notes.txt").write_text("of somebody")
    (out / "chat_template.json").write_text('{"chat_template": "the old way"}')
    (out / "pave_report").mkdir()
    assert run(out, "expert", "-o", tmp_path / "again").exit_code == 0
    wanted = {"config.json", "generation_config.json", "model.safetensors", "chat_template.jinja", "preprocessor_config.json"}
    tokenizer = {path.name for path in llama.base.glob("token*")}
    assert tokenizer and {path.name for path in (tmp_path / "again").iterdir()} == wanted | tokenizer
    for name in (*tokenizer, "preprocessor_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
    for name in ("chat_template.jinja", "generation_config.json"):
        read = (lambda path: json.loads(path.read_text())) if name.endswith("json") else Path.read_text
        assert read(tmp_path / "again" / name) == read(expert / name)
    found = json.loads((tmp_path / "again" / "config.json").read_text())
    for name in ("torch_dtype", "quantization_config"):
        del config[name]
    assert found == config | {"dtype": "bfloat16"}
    model = load_task(out, "expert")
    assert model.generation_config.temperature == 0.3 and model.generation_config.do_sample


def test_links_out_of_the_folder_are_not_followed(llama, tmp_path):
    """Somebody who publishes what is restored would publish what they point to."""
    out = write_merge(llama.base, llama.tuned[:2], tmp_path / "out")
    (tmp_path / "secret").write_text("{}")
    (out / "tokenizer_private.json").symlink_to(tmp_path / "secret")
    result = run(out, "tuned0", "-o", tmp_path / "again")
    assert result.exit_code == 1 and "is a link to" in result.output and not (tmp_path / "again").exists()


def test_an_empty_folder_is_filled_where_it_is(llama, tmp_path, monkeypatch):
    """It may be somebody's current folder."""
    out = write_merge(llama.base, llama.tuned[:2], tmp_path / "out")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = Path().stat().st_ino
    assert run(out, "tuned0", "-o", ".").exit_code == 0
    assert Path().stat().st_ino == before and Path("config.json").exists() and Path("model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_expert_without_a_template_keeps_that_of_the_merge(llama, tmp_path):
    expert = shutil.copytree(llama.tuned[0], tmp_path / "expert")
    for name in ("chat_template.jinja", "generation_config.json"):
        (expert / name).unlink()
    out = write_merge(llama.base, [expert, llama.tuned[1]], tmp_path / "out")
    (out / "chat_template.jinja").write_text("of the merge")
    (out / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert run(out, "expert", "-o", tmp_path / "again").exit_code == 0
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == "of the merge"
    assert not (tmp_path / "again" / "generation_config.json").exists()


def with_head(base: Path, labels: list[str], seed: int, folder: Path) -> Path:
    """A fine-tune of a classifier's backbone, with another head."""
    before = transformers.BertForSequenceClassification.from_pretrained(base)
    config = transformers.BertConfig.from_pretrained(base)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    torch.manual_seed(seed)
    model = transformers.BertForSequenceClassification(config)
    model.bert.load_state_dict(perturbed(before, seed).bert.state_dict())
    return save(model, None, folder)


def test_models_with_heads_of_their_own(families, tmp_path):
    base = families["bert"].base
    labels = {"two": ["no", "yes"], "five": ["a", "b", "c", "d", "e"], "three": ["x", "y", "z"]}
    experts = [with_head(base, names, seed, tmp_path / name) for seed, (name, names) in enumerate(labels.items())]
    out = write_merge(base, experts, tmp_path / "out")
    heads = {name: weights(tmp_path / name)["classifier.weight"] for name in labels}
    model = load_task(out, "two")
    unchanged = model.bert.encoder.layer[0].output.dense.weight
    for name in ("five", "three", "two", "five"):
        fresh = load_task(out, name)
        assert torch.equal(fresh.classifier.weight, heads[name])
        assert model.eval() is load_task(out, name, into=model)
        assert_same_model(model, fresh)
        assert list(model.config.id2label.values()) == labels[name] and model.num_labels == len(labels[name])
        assert model.classifier.out_features == len(labels[name])
        run(out, name, "-o", tmp_path / f"{name}-again")
        assert_same_model(model, loaded(tmp_path / f"{name}-again", model))
        shutil.rmtree(tmp_path / f"{name}-again")
    assert unchanged is model.bert.encoder.layer[0].output.dense.weight


def test_rows_that_the_merge_has_left_out(llama, tmp_path):
    out = write_merge(llama.base, llama.tuned[:2], tmp_path / "out", rows=300)
    model = load_task(out, "tuned0")
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == 300
    assert_equal(model.state_dict(), expected(out, "tuned0", llama.base))


def test_tied_weights_stay_one(tmp_path):
    tokenizer = make_tokenizer("llama")
    config = model_config("llama", len(tokenizer))
    config.tie_word_embeddings = True
    base = make_model("LlamaForCausalLM", config)
    tuned = [save(perturbed(base, seed), tokenizer, tmp_path / f"tuned{seed}") for seed in (1, 2)]
    out = write_merge(save(base, tokenizer, tmp_path / "base"), tuned, tmp_path / "out")
    assert "lm_head.weight" not in weights(out)
    model, other = load_task(out, "tuned1"), load_task(out, "tuned2")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    load_task(out, "tuned2", into=model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same_model(model, other)


def rewrite(out: Path, task: str, change=lambda metadata, tensors: None) -> None:
    """Write a task's file anew after a change, for OUT as it is now."""
    path = out / "emr" / f"{task}.safetensors"
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(path)
    metadata["merged_weights"] = fingerprint(out)
    change(metadata, tensors)
    del tensors["sha256"]
    save_file(sealed(metadata, tensors), path, metadata)


def test_names_that_the_base_model_has_otherwise_and_buffers(llama, tmp_path):
    base = shutil.copytree(llama.base, tmp_path / "base")
    out = write_merge(base, llama.tuned[:2], tmp_path / "out")
    wanted = expected(out, "tuned0", base)
    of_base = weights(base)
    of_base["language.norm"] = of_base.pop("model.norm.weight")
    save_file(of_base, base / "model.safetensors", {"format": "pt"})
    shard = out / "model-00001-of-00002.safetensors"
    save_file(load_file(shard) | {"steps": torch.tensor([1, 2])}, shard, {"format": "pt"})
    index = json.loads((out / "model.safetensors.index.json").read_text())
    index["weight_map"]["steps"] = shard.name
    (out / "model.safetensors.index.json").write_text(json.dumps(index))

    def change(metadata, tensors):
        names = {"names": '{"model.norm.weight": "language.norm"}', "copied": '["steps"]', "base_weights": fingerprint(base)}
        metadata.update(names)

    rewrite(out, "tuned0", change)
    assert run(out, "tuned0", "-o", tmp_path / "again").exit_code == 0
    assert_equal(weights(tmp_path / "again"), wanted | {"steps": torch.tensor([1, 2])})


def test_a_class_that_comes_with_the_expert(llama, tmp_path):
    """Its code is where the expert is, and is run only if it is trusted."""
    base = shutil.copytree(llama.base, tmp_path / "base")
    experts = [shutil.copytree(model, tmp_path / model.name) for model in llama.tuned[:2]]
    for folder in (base, *experts):
        (folder / "own_code.py").write_text("import transformers\nclass OwnLlama(transformers.LlamaForCausalLM):\n    pass\n")
        config = json.loads((folder / "config.json").read_text())
        config |= {"architectures": ["OwnLlama"], "auto_map": {"AutoModelForCausalLM": "own_code.OwnLlama"}}
        (folder / "config.json").write_text(json.dumps(config))
    out = write_merge(base, experts, tmp_path / "out")
    with pytest.raises(PaveError, match="--trust-remote-code"):
        load_task(out, "tuned0")
    model = load_task(out, "tuned0", trust_remote_code=True)
    assert type(model).__name__ == "OwnLlama" and model.__class__.__module__.startswith("transformers_modules")
    assert_equal(model.state_dict(), expected(out, "tuned0", base))
    run(out, "tuned0", "-o", tmp_path / "again", "--trust-remote-code")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert type(again).__name__ == "OwnLlama"
    assert_equal(again.state_dict(), model.state_dict())
    load_task(out, "tuned1", into=model, trust_remote_code=True)
    assert_equal(model.state_dict(), expected(out, "tuned1", base))


# Finding the base model


def test_the_base_model_is_looked_for_where_the_config_says_or_where_told(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llama.base, "base")
    out = write_merge(Path("base"), llama.tuned[:2], tmp_path / "out")

    def named(metadata, tensors):
        metadata["base"] = "./base"

    rewrite(out, "tuned0", named)
    wanted = load_task(out, "tuned0")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    with pytest.raises(PaveError, match=r"no base model at ./base \(looked in .*elsewhere\)\. .* --base MODEL"):
        load_task(out, "tuned0")
    assert_same_model(load_task(out, "tuned0", base="../base"), wanted)
    assert_same_model(load_task(out, "tuned0", base=tmp_path / "base"), wanted)
    assert run(out, "tuned0", "--base", "../base").exit_code == 0
    shutil.rmtree("tuned0")
    for other in (llama.tuned[0], out):
        result = run(out, "tuned0", "--base", other)
        assert result.exit_code == 1 and "not the one that" in result.output and str(other) in result.output
        assert list(Path().iterdir()) == []


def test_a_base_model_in_the_hubs_cache(llama, tmp_path):
    snapshot = Path(HF_HUB_CACHE) / "models--someone--base-of-emr" / "snapshots" / ("a" * 40)
    shutil.copytree(llama.base, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    out = write_merge(llama.base, llama.tuned[:2], tmp_path / "out")
    wanted = load_task(out, "tuned0")
    for name in ("someone/base-of-emr", f"someone/base-of-emr@{'a' * 40}"):
        rewrite(out, "tuned0", lambda metadata, tensors, name=name: metadata.update(base=name))
        assert_same_model(load_task(out, "tuned0"), wanted)
    assert_equal(dict(open_task(out, "tuned0", Search(cache_dir=HF_HUB_CACHE)).tensors()), wanted.state_dict())
    shutil.rmtree(snapshot.parents[1])
    with pytest.raises(PaveError, match=r"neither in .* nor in the Hub's cache, and cannot be fetched"):
        load_task(out, "tuned0")


def test_a_merge_on_the_hub(llama, tmp_path, monkeypatch):
    """As it is cached here, by its name alone or with a revision."""
    out = write_merge(llama.base, llama.tuned[:2], tmp_path / "out")
    wanted = load_task(out, "tuned0")
    snapshot = Path(HF_HUB_CACHE) / "models--someone--shared" / "snapshots" / ("b" * 40)
    shutil.copytree(out, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("b" * 40)
    for name in ("someone/shared", f"someone/shared@{'b' * 40}"):
        assert_same_model(load_task(name, "tuned0"), wanted)
    monkeypatch.chdir(tmp_path)
    assert run("someone/shared", "tuned0").exit_code == 0
    assert_same_model(loaded(tmp_path / "tuned0", wanted), wanted)
    shutil.rmtree(snapshot.parents[1])
    for name in ("someone/shared", "./shared"):
        result = run(name, "tuned1")
        assert result.exit_code == 1 and f"no merge at {name}" in result.output and not Path("tuned1").exists()


def test_a_base_model_with_an_adapter(llama, tmp_path):
    """mergekit merges it into the model, in a cache of its own."""
    model = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(llama.base),
        peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    base, place = f"{llama.base}+{tmp_path / 'adapter'}", tmp_path / "cache"
    merge(
        {"merge_method": "emr", "base_model": base, "models": [{"model": str(m)} for m in llama.tuned[:2]], "dtype": "float32"},
        tmp_path / "out",
        lora_merge_cache=str(place),
    )
    with pytest.raises(PaveError, match="--lora-merge-cache"):
        load_task(tmp_path / "out", "tuned0")
    (folder,) = place.iterdir()
    wanted = expected(tmp_path / "out", "tuned0", folder)
    assert_equal(load_task(tmp_path / "out", "tuned0", base=folder).state_dict(), wanted)
    for cache in (place, tmp_path / "another"):  # the second is filled
        result = run(tmp_path / "out", "tuned0", "-o", tmp_path / f"by-{cache.name}", "--lora-merge-cache", cache)
        assert result.exit_code == 0, result.output
        assert_equal(weights(tmp_path / f"by-{cache.name}"), wanted)


# What is refused


def test_a_merge_that_is_another_is_refused(llama, tmp_path):
    out = write_merge(llama.base, llama.tuned[:2], tmp_path / "out")
    other = write_merge(llama.base, llama.tuned[1:], tmp_path / "other")
    for shard in other.glob("*.safetensors"):
        shutil.copy(shard, out)
    result = run(out, "tuned0", "-o", tmp_path / "again")
    assert result.exit_code == 1 and "its weights are not those" in result.output and not (tmp_path / "again").exists()


def drop(name):
    return lambda metadata, tensors: tensors.pop(name)


def put(**named):
    return lambda metadata, tensors: tensors.update({name.replace("__", "."): tensor for name, tensor in named.items()})


@pytest.mark.parametrize(
    "change, told",
    [
        (put(mask__other=torch.ones(3, dtype=torch.uint8)), "'other' is not in"),
        (lambda metadata, tensors: metadata.update(copied='["steps"]'), "'steps' is not in"),
        (lambda metadata, tensors: metadata.update(names='{"lm_head.weight": "head"}'), "has no tensor 'head'"),
        (lambda metadata, tensors: metadata.update(names='{"lm_head.weight": "model.norm.weight"}'), "does not fit"),
        (
            lambda metadata, tensors: tensors.update({"mask.model.norm.weight": torch.ones(7, dtype=torch.uint8)}),
            "has 7 bytes, which does not fit",
        ),
        (lambda metadata, tensors: metadata.update(base="a+b+c"), "is no name of a model"),
    ],
)
def test_a_file_that_does_not_fit_the_models_is_refused(llama, tmp_path, change, told):
    out = write_merge(llama.base, llama.tuned[:2], tmp_path / "out")
    rewrite(out, "tuned0", change)
    with pytest.raises(PaveError) as error:
        open_task(out, "tuned0")
    assert told in error.value.message
    assert run(out, "tuned1", "-o", tmp_path / "again").exit_code == 0


@pytest.mark.parametrize(
    "settings",
    [
        *({"architectures": odd} for odd in (None, [], "LlamaForCausalLM", [1], ["Trainer"], ["AutoTokenizer"], ["pipeline"])),
        *({"model_type": odd} for odd in (None, 1, "no such type")),
        *({"hidden_size": odd} for odd in ("x", -1, 0, 52, None)),
        {"auto_map": {"AutoModelForCausalLM": "code.Model", "AutoConfig": 1}, "architectures": ["Model"]},
        {"rope_parameters": [], "auto_map": []},
        {"num_attention_heads": 0},
    ],
    ids=str,
)
def test_a_config_that_makes_no_model_is_refused(llama, tmp_path, settings):
    out = write_merge(llama.base, llama.tuned[:2], tmp_path / "out")
    model = load_task(out, "tuned1")
    config = json.dumps(json.loads((llama.tuned[0] / "config.json").read_text()) | settings)
    rewrite(out, "tuned0", lambda metadata, tensors: metadata.update(config=config))
    for into in (None, model):
        with pytest.raises(PaveError):
            load_task(out, "tuned0", into=into)
    assert_same_model(model, load_task(out, "tuned1"))


def test_a_merge_in_bin_files_or_with_files_elsewhere_is_refused(llama, tmp_path):
    out = write_merge(llama.base, llama.tuned[:2], tmp_path / "out")
    index = out / "model.safetensors.index.json"
    outside = json.loads(index.read_text())
    outside["weight_map"]["lm_head.weight"] = "../base/model.safetensors"
    index.write_text(json.dumps(outside))
    assert "which is not in the folder" in run(out, "tuned0", "-o", tmp_path / "again").output
    index.unlink()
    torch.save(weights(out), out / "pytorch_model.bin")
    result = run(out, "tuned0", "-o", tmp_path / "again")
    assert result.exit_code == 1 and "--safe-serialization" in result.output
    (out / "pytorch_model.bin").unlink()
    assert "cannot be read" in run(out, "tuned0", "-o", tmp_path / "again").output
    assert not (tmp_path / "again").exists()


def test_nothing_is_written_over_and_nothing_is_left_behind(llama, tmp_path):
    base = tmp_path / "base"
    save(transformers.AutoModelForCausalLM.from_pretrained(llama.base), None, base)
    torch.save(weights(base), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    out = write_merge(llama.base, llama.tuned[:2], tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    for taken in (tmp_path / "full", tmp_path / "full" / "mine", out):
        result = run(out, "tuned0", "-o", taken)
        assert result.exit_code == 1 and "not empty" in result.output
    before = sorted(tmp_path.rglob("*"))
    # In such a file shapes are seen only as they are read: the last one fails, when most is written.
    of_base = weights(llama.base)
    of_base[max(of_base)] = torch.ones(2, 2)
    torch.save(of_base, base / "pytorch_model.bin")
    of_bin = weights_fingerprint(str(base), ["pytorch_model.bin"])
    rewrite(out, "tuned0", lambda metadata, tensors: metadata.update(base=str(base), base_weights=of_bin))
    result = run(out, "tuned0", "-o", tmp_path / "again", "--out-shard-size", "50K")
    assert result.exit_code == 1 and "in the base model, which does not fit" in result.output
    assert sorted(tmp_path.rglob("*")) == before


def test_a_base_model_in_bin_files(llama, tmp_path):
    base = shutil.copytree(llama.base, tmp_path / "base")
    torch.save(weights(base), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    out = write_merge(llama.base, llama.tuned[:2], tmp_path / "out")
    wanted = load_task(out, "tuned0")
    of_bin = weights_fingerprint(str(base), ["pytorch_model.bin"])
    rewrite(out, "tuned0", lambda metadata, tensors: metadata.update(base=str(base), base_weights=of_bin))
    assert_same_model(load_task(out, "tuned0"), wanted)


def test_a_folder_that_cannot_be_written_is_told(llama, tmp_path):
    out = write_merge(llama.base, llama.tuned[:2], tmp_path / "out")
    (tmp_path / "file").write_text("")
    result = run(out, "tuned0", "-o", tmp_path / "file" / "again")
    assert result.exit_code == 1 and "cannot be written" in result.output


# Switching in place


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, model.config.to_dict()


def refused(out: Path, task: str, model, told: str) -> None:
    """Switching is refused, and nothing is changed."""
    tensors, config = state(model)
    with pytest.raises(PaveError, match=f"cannot become {task} in place: .*{told}.*without `into`"):
        load_task(out, task, into=model)
    assert_equal(model.state_dict(), tensors)
    assert model.config.to_dict() == config


def test_models_that_cannot_become_another_are_refused_unchanged(families, tmp_path):
    llama, bert = families["llama"], families["bert"]
    out = write_merge(llama.base, llama.tuned[:2], tmp_path / "out")
    refused(out, "tuned0", load_task(write_merge(bert.base, bert.tuned[:2], tmp_path / "bert"), "tuned0"), "it is a BertFor")
    model = load_task(out, "tuned1")
    refused(out, "tuned0", type(model)(model.config.__class__(**model.config.to_dict() | {"rms_norm_eps": 0.5})), "rms_norm_eps")
    refused(out, "tuned0", type(model)(model.config.__class__(**model.config.to_dict() | {"vocab_size": 77})), "vocab_size")
    with torch.device("meta"):
        hollow = type(model)(model.config)
    with pytest.raises(PaveError, match="not in memory"):
        load_task(out, "tuned0", into=hollow)


def test_settings_of_tokens_are_taken_over_unless_positions_depend_on_them(llama, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.RobertaConfig(vocab_size=320, max_position_embeddings=66, **sizes)
    base = make_model("RobertaForSequenceClassification", config)
    tuned = [save(perturbed(base, seed), None, tmp_path / f"tuned{seed}") for seed in (0, 1)]
    roberta = write_merge(save(base, None, tmp_path / "base"), tuned, tmp_path / "roberta")
    out = write_merge(llama.base, llama.tuned[:2], tmp_path / "out")

    def other_tokens(metadata, tensors):
        metadata["config"] = json.dumps(json.loads(metadata["config"]) | {"pad_token_id": 7, "eos_token_id": 9})

    for folder in (out, roberta):
        rewrite(folder, "tuned0", other_tokens)
    model = load_task(out, "tuned1")
    load_task(out, "tuned0", into=model)
    assert (model.config.pad_token_id, model.config.eos_token_id) == (7, 9)
    assert_same_model(model, load_task(out, "tuned0"))
    refused(roberta, "tuned0", load_task(roberta, "tuned1"), "pad_token_id")


def test_a_model_with_a_weight_that_is_not_restored_is_refused(llama, tmp_path):
    out = write_merge(llama.base, llama.tuned[:2], tmp_path / "out")
    model = load_task(out, "tuned1")
    rewrite(out, "tuned0", drop("mask.model.norm.weight"))
    refused(out, "tuned0", model, "model.norm.weight is not among the tensors")
    with pytest.raises(PaveError, match=r"1 weights of LlamaForCausalLM are not in .*model\.norm\.weight"):
        load_task(out, "tuned0")


def test_weights_that_have_another_form_in_memory_are_only_loaded_anew(tmp_path):
    """The merge has each expert of a mixture by itself, and transformers all of them in one tensor."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.MixtralConfig(vocab_size=320, num_hidden_layers=1, num_local_experts=3, **sizes)
    base = make_model("MixtralForCausalLM", config)
    tuned = [save(perturbed(base, seed), None, tmp_path / f"tuned{seed}") for seed in (1, 2)]
    out = write_merge(save(base, None, tmp_path / "base"), tuned, tmp_path / "out")
    assert any(".experts.2.w1." in name for name in weights(out))
    model = load_task(out, "tuned1")
    run(out, "tuned1", "-o", tmp_path / "again")
    assert_same_model(model, loaded(tmp_path / "again", model))
    refused(out, "tuned2", model, "in another form in memory")


def test_a_model_keeps_its_precision_its_mode_and_its_device(llama, tmp_path):
    out = write_merge(llama.base, llama.tuned[:2], tmp_path / "out", torch.bfloat16)
    model = load_task(out, "tuned0").float().train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    load_task(out, "tuned1", into=model)
    assert model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert_equal(model.state_dict(), {name: tensor.float() for name, tensor in load_task(out, "tuned1").state_dict().items()})


def test_a_model_made_for_inference_alone(llama, tmp_path):
    out = write_merge(llama.base, llama.tuned[:2], tmp_path / "out")
    with torch.inference_mode():
        model = load_task(out, "tuned0")
        assert next(model.parameters()).is_inference()
    load_task(out, "tuned1", into=model)
    assert_same_model(model, load_task(out, "tuned1"))
