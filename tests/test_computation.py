"""What counts as another computation and has to be measured anew, and models that bring code of their own."""

import dataclasses
import functools
import importlib.util
import json
import shutil
import textwrap
from pathlib import Path

import merging
import pytest
import torch
import transformers
from huggingface_hub.constants import HF_HUB_CACHE
from mergekit.common import ModelReference
from merging import config_for
from models import Family
from transformers.models.llama import modeling_llama

from mergekit_pave.cache import Artefact, entries
from mergekit_pave.calibration import job, run
from mergekit_pave.calibration.computation import computation
from mergekit_pave.errors import PaveError
from mergekit_pave.planning import calibration
from mergekit_pave.report.outputs import REPORT_NAME


@pytest.fixture
def keys(cache, tmp_path):
    """Runs a merge, and returns the keys of the covariances that are in the cache after it."""

    def merge(config: dict, **options) -> set[str]:
        merging.merge(config, tmp_path / "out", **options)
        return {entry.key for entry in entries(cache) if entry.kind == "covariance"}

    return merge


def with_default(monkeypatch, name: str, value) -> None:
    """A release of transformers whose Llama has this setting where config.json says nothing."""
    cls = transformers.LlamaConfig
    made = cls.__init__

    @functools.wraps(made)
    def init(self, *args, **kwargs):
        made(self, *args, **kwargs)
        if name not in kwargs:
            setattr(self, name, value)

    monkeypatch.setattr(cls, "__init__", init)


def test_a_default_that_a_release_adds_keeps_every_measurement(llama, keys, monkeypatch):
    before = keys(config_for(llama, {}))
    with_default(monkeypatch, "a_default_of_all_models", 7)
    assert transformers.AutoConfig.from_pretrained(llama.base).to_dict()["a_default_of_all_models"] == 7
    assert keys(config_for(llama, {})) == before


def test_a_default_that_the_model_reads_and_a_release_changes_is_measured(llama, keys, monkeypatch, tmp_path):
    before = keys(config_for(llama, {}))
    with_default(monkeypatch, "rms_norm_eps", 0.5)
    assert keys(config_for(llama, {})) == before  # config.json sets it
    without = copied(llama, tmp_path, lambda folder: edit_json(folder / "config.json", lambda known: known.pop("rms_norm_eps")))
    first = keys(config_for(without, {}))
    with_default(monkeypatch, "rms_norm_eps", 0.25)
    assert len(keys(config_for(without, {})) - first) == 2


def other_rotation(x):
    return torch.cat((-x[..., x.shape[-1] // 2 :], 1.5 * x[..., : x.shape[-1] // 2]), dim=-1)


def other_forward(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * 1.5)


@pytest.mark.parametrize(
    "of, name, other", [(modeling_llama, "rotate_half", other_rotation), (modeling_llama.LlamaMLP, "forward", other_forward)]
)
def test_transformers_that_computes_otherwise_is_measured_anew(llama, keys, monkeypatch, of, name, other):
    before = keys(config_for(llama, {}))
    monkeypatch.setattr(of, name, other)
    assert len(keys(config_for(llama, {})) - before) == 2


def module(folder: Path, code: str):
    """A module with this source."""
    path = folder / f"m{len(list(folder.iterdir()))}.py"
    path.write_text("import torch\n" + textwrap.dedent(code))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_only_what_is_computed_counts(tmp_path):
    def digest(code: str) -> str:
        return computation(module(tmp_path, code).Block(), transformers.LlamaConfig())

    first = """
        SCALE = 2
        class Block(torch.nn.Module):
            def forward(self, x):
                return act(x) * SCALE
        def act(x):
            return x + 1
    """
    same = """
        from typing import Optional
        UNUSED = 3
        def unused(x):
            return x
        def act(x: torch.Tensor) -> torch.Tensor:
            '''Adds.'''
            return x + 1  # one
        SCALE = 2
        class Block(torch.nn.Module):
            '''A block.'''
            @torch.no_grad()
            def forward(self, x: Optional[torch.Tensor]) -> torch.Tensor:
                return (
                    act(x)
                    * SCALE
                )
    """
    assert digest(first) == digest(same)
    others = [first.replace("x + 1", "x + 2"), first.replace("SCALE = 2", "SCALE = 3"), first.replace("act(x) *", "act(x) -")]
    assert len({digest(code) for code in (first, *others)}) == 4


def test_the_precision_that_a_model_runs_in_is_part_of_the_key(llama, keys, cache, tmp_path, monkeypatch):
    """float32 here and bfloat16 on a GPU. What is there in another precision is told, and can be used all the same."""
    before = keys(config_for(llama, {"keep_covariances": True}))
    assert recorded(tmp_path, cache, before) == {"float32"}
    swapped = {"cpu": torch.bfloat16, "cuda": torch.float32}
    for place in (calibration, job, run):
        monkeypatch.setattr(place, "inference_dtype", lambda config, device: swapped[device])
    new = keys(config_for(llama, {})) - before
    assert len(new) == 2
    assert recorded(tmp_path, cache, new) == {"bfloat16"}
    warning = next(line for line in report(tmp_path)["warnings"] if "float32" in line)
    folder = next(word for word in warning.split() if str(cache) in word).rstrip("`")
    assert Path(folder).name in before
    first, second = merging.entries(llama)
    given = config_for(llama, {"models": [{"model": first["model"], "covariance": folder}, second]})
    assert keys(given) == before | new
    assert report(tmp_path)["models"][first["model"]]["dtype"] == "float32"


def test_another_precision_is_not_told_where_nothing_has_to_be_measured(llama, keys, cache, tmp_path, monkeypatch):
    """All decompositions are in the cache, and covariances only in the other precision."""
    config = config_for(llama, {"keep_covariances": True})
    float32 = keys(config)
    swapped = {"cpu": torch.bfloat16, "cuda": torch.float32}
    for place in (calibration, job, run):
        monkeypatch.setattr(place, "inference_dtype", lambda config, device: swapped[device])
    for key in keys(config) - float32:
        shutil.rmtree(cache / "covariance" / key)
    config["pave"]["keep_covariances"] = "auto"
    assert keys(config) == float32
    assert not [line for line in report(tmp_path)["warnings"] if "float32" in line]


def report(tmp_path) -> dict:
    return json.loads((tmp_path / "out" / REPORT_NAME).read_text())


def recorded(tmp_path, cache, keys) -> set[str]:
    """The precisions in the manifests, which have to be those in the report."""
    told = {Artefact(cache / "covariance" / key).manifest()["dtype"] for key in keys}
    assert {model["dtype"] for model in report(tmp_path)["models"].values()} == told
    return told


CODE = """
from transformers import LlamaForCausalLM
from .{parts} import widen


class OwnForCausalLM(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.act_fn = widen(layer.mlp.act_fn)
"""
PARTS = """
from torch import nn


class Widened(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.act = act

    def forward(self, x):
        return 2.0 * self.act(x)


def widen(act):
    return Widened(act)
"""


def copied(family: Family, folder: Path, change) -> Family:
    """A family whose checkpoints were copied and then changed by `change(folder)`."""
    folders = [Path(shutil.copytree(source, folder / source.name)) for source in (family.base, *family.tuned)]
    for path in folders:
        change(path)
    return dataclasses.replace(family, base=folders[0], tuned=tuple(folders[1:]))


def edit_json(path: Path, change) -> None:
    known = json.loads(path.read_text())
    change(known)
    path.write_text(json.dumps(known))


def bring_code(folder: Path, reference: str = "modeling_own.OwnForCausalLM") -> None:
    """Make a checkpoint one of a model that brings its own code."""
    own = {"architectures": ["OwnForCausalLM"], "auto_map": {"AutoModelForCausalLM": reference}}
    edit_json(folder / "config.json", lambda known: known.update(own))
    (folder / "modeling_own.py").write_text(CODE.format(parts="parts_of_own"))
    (folder / "parts_of_own.py").write_text(PARTS)


def test_code_in_a_models_folder(llama, keys, tmp_path):
    family = copied(llama, tmp_path, bring_code)
    with pytest.raises(PaveError, match="trust-remote-code"):
        keys(config_for(family, {}))
    before = keys(config_for(family, {}), trust_remote_code=True)
    for path in (family.base, *family.tuned):
        (path / "README.md").write_text("# Changed")
        (path / "unused.py").write_text("x = 1")
    assert keys(config_for(family, {}), trust_remote_code=True) == before
    for path in (family.base, *family.tuned):
        (path / "parts_of_own.py").write_text(PARTS.replace("2.0", "3.0"))
    assert len(keys(config_for(family, {}), trust_remote_code=True) - before) == 2


def publish(folder: Path, name: str, files: list[str]) -> None:
    """Put files into the Hub's cache as a download of the model `name` would have done, a new revision each time."""
    stored = Path(HF_HUB_CACHE, f"models--{name.replace('/', '--')}")
    revision = f"{len(list(stored.glob('snapshots/*'))) + 1:040x}"
    snapshot = stored / "snapshots" / revision
    snapshot.mkdir(parents=True)
    for file in files:
        shutil.copy(folder / file, snapshot)
    (stored / "refs").mkdir(exist_ok=True)
    (stored / "refs" / "main").write_text(revision)


@pytest.mark.parametrize("code_in", ["someone/own", "someone/code"])
def test_code_on_the_hub(llama, keys, tmp_path, monkeypatch, code_in):
    """mergekit fetches weights and no code; that comes from where transformers finds it, be it another repository."""
    names = [f"{code_in}-{name}" for name in ("base", "tuned0", "tuned1")]
    code = ["modeling_own.py", "parts_of_own.py"]
    own = code_in == "someone/own"
    fetched = {}

    def prepare(folder: Path) -> None:
        bring_code(folder, f"{'' if own else 'someone/code--'}modeling_own.OwnForCausalLM")
        name = f"{code_in}-{folder.name}"
        others = [path.name for path in folder.iterdir() if path.suffix == ".json"]
        if name in names:
            publish(folder, name, others + (code if own else []))
            fetched[name] = shutil.copytree(folder, tmp_path / "fetched" / folder.name, ignore=shutil.ignore_patterns("*.py"))

    copies = tmp_path / "copies"
    copied(llama, copies, prepare)
    if not own:
        publish(copies / "base", "someone/code", code)
    monkeypatch.setattr(ModelReference, "local_path", lambda self, *_, **__: str(fetched.get(self.model.path, self.model.path)))
    config = config_for(dataclasses.replace(llama, base=names[0], tuned=tuple(names[1:])), {})
    before = keys(config, trust_remote_code=True)
    assert len(before) == 2
    (copies / "base" / "parts_of_own.py").write_text(PARTS.replace("2.0", "3.0"))
    if own:
        files = [path.name for path in (copies / "tuned0").iterdir() if path.suffix == ".json"]
        shutil.copy(copies / "base" / "parts_of_own.py", copies / "tuned0")
        publish(copies / "tuned0", names[1], files + code)
    else:
        publish(copies / "base", "someone/code", code)
    assert len(keys(config, trust_remote_code=True) - before) == (1 if own else 2)


def test_code_that_is_not_there_is_told_in_one_line(llama, keys, tmp_path):
    def without_part(folder: Path) -> None:
        bring_code(folder)
        (folder / "parts_of_own.py").unlink()

    with pytest.raises(PaveError, match=r"the code of OwnForCausalLM .* cannot be loaded") as refused:
        keys(config_for(copied(llama, tmp_path, without_part), {}), trust_remote_code=True)
    assert "\n" not in refused.value.message
