"""Every merge method of mergekit that a purified model can go into, on purified input."""

import shutil

import pytest
import torch
import transformers
from commands import start
from merging import config_for, invoke, merge, write_config
from reference import purify, weights
from safetensors.torch import save_file

REGULARIZATION = 0.1
PAVE = {"regularization": REGULARIZATION}

# Parameters that make the method do something of its own.
METHODS = {
    "task_arithmetic": {},
    "ties": {"density": 0.6},
    "breadcrumbs": {"density": 0.8, "gamma": 0.05},
    "breadcrumbs_ties": {"density": 0.8, "gamma": 0.05},
    "sce": {"select_topk": 0.5},
    "linear": {},
    "model_stock": {},
    "karcher": {},
    "dare_ties": {"density": 0.7},
    "dare_linear": {"density": 0.7},
    "della": {"density": 0.6, "epsilon": 0.1},
    "della_linear": {"density": 0.6, "epsilon": 0.1},
}
RANDOM = {"dare_ties", "dare_linear", "della", "della_linear"}
WITHOUT_BASE = {"linear", "karcher"}
WITHOUT_WEIGHT = {"sce", "model_stock", "karcher"}


def method_config(family, method, pave=None):
    config = config_for(family, pave, models=3, merge_method=method)
    if method in WITHOUT_BASE:
        del config["base_model"]
    weighted = {} if method in WITHOUT_WEIGHT else {"weight": 0.4}
    for model in config["models"]:
        model["parameters"] = dict(weighted)
    return config | {"parameters": dict(METHODS[method])}


@pytest.fixture(scope="module")
def purified_family(families, tmp_path_factory):
    """The fine-tunes with the reference's purified weights in place of their own: what mergekit shall get to see."""
    family = families["llama"]
    folder = tmp_path_factory.mktemp("purified")
    sources = [(data, "text", "text") for data in family.data]
    expected = purify("llama", family.base, family.tuned, sources, lambda i, t: 0.875, regularization=REGULARIZATION)
    tuned = []
    for model, rows in zip(family.tuned, expected):
        shutil.copytree(model, folder / model.name)
        changed = weights(model) | {name: row.weight.float().contiguous() for name, row in rows.items()}
        save_file(changed, folder / model.name / "model.safetensors", metadata={"format": "pt"})
        tuned.append(folder / model.name)
    return type(family)("llama", family.base, tuple(tuned), family.data)


def purified_names(family):
    return {name for name in weights(family.base) if family.is_linear(name)}


@pytest.mark.parametrize("method", METHODS)
def test_runs_loads_and_differs(llama, tmp_path, method):
    config = method_config(llama, method, PAVE)
    result = invoke(config, tmp_path / "out", "--random-seed", "1", "--quiet")
    assert result.exit_code == 0, result.output
    written = weights(tmp_path / "out")
    plain = merge(method_config(llama, method), tmp_path / "plain", random_seed=1)
    assert written.keys() == plain.keys()
    for name in purified_names(llama):
        assert (written[name] - plain[name]).norm() > 1e-3 * plain[name].norm(), name
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.parametrize("method", [name for name in METHODS if name not in RANDOM])
def test_is_mergekits_method_on_purified_weights(llama, purified_family, tmp_path, method):
    written = merge(method_config(llama, method, PAVE), tmp_path / "out")
    wanted = merge(method_config(purified_family, method), tmp_path / "wanted")
    for name, tensor in written.items():
        if not llama.is_linear(name):
            assert torch.equal(tensor, wanted[name]), name
            continue
        close = torch.isclose(tensor, wanted[name], rtol=1e-4, atol=1e-4 * wanted[name].std().item())
        # A method that cuts by magnitude may cut elsewhere where two entries are equal but for rounding.
        assert close.double().mean() > 0.995, f"{name}: only {close.double().mean():.2%} of the entries agree"


@pytest.mark.parametrize("method", sorted(RANDOM))
def test_random_methods_follow_the_seed(llama, tmp_path, method):
    config = method_config(llama, method, PAVE)
    first, again, other = (merge(config, tmp_path / f"out{i}", random_seed=seed) for i, seed in enumerate((7, 7, 8)))
    for name in purified_names(llama):
        assert torch.equal(first[name], again[name]), name
    assert any(not torch.equal(first[name], other[name]) for name in purified_names(llama))


def test_through_the_real_command(llama, tmp_path):
    methods = ("ties", "dare_linear")
    runs = []
    for method in methods:
        config = write_config(method_config(llama, method, PAVE), tmp_path / f"{method}.yml")
        runs.append(start("mergekit-yaml", config, tmp_path / method, "--random-seed", "3", "--quiet"))
    for method, run in zip(methods, runs):
        told = run.communicate(timeout=300)[1]
        assert run.returncode == 0, told
        written = weights(tmp_path / method)
        plain = merge(method_config(llama, method), tmp_path / f"{method}-plain", random_seed=3)
        for name in purified_names(llama):
            assert (written[name] - plain[name]).norm() > 1e-3 * plain[name].norm(), name
