"""`pave.refine`: its mathematics against least squares written from the definition, and merges of real models.

The reference runs whole models in float64, once for each group of layers, and solves stacked rows of least squares by an SVD:
no sums over batches, no normal equations, no inverse.
"""

import dataclasses
import json
import shutil

import pytest
import torch
import transformers
from merging import config_for, entries, invoke_multi, merge
from models import KINDS
from reference import _texts, weights
from test_complete import make_llama, stored_otherwise
from test_processes import with_adapter

from mergekit_pave.calibration.weights import UnknownWeightError
from mergekit_pave.core import refine
from mergekit_pave.tasks import refine as tasks

RIDGE = 1e-4


def least_squares(anchor, base, experts, share):
    """W for experts (w, W_i, X_m, X_e), with rows of tokens."""
    rows, targets = [], []
    for weight, expert, merged, own in experts:
        change = expert - base
        for part, x, y in ((share, merged, own @ expert.T), (1 - share, change, change @ expert.T)):
            if part > 0 and x.norm() > 0:
                rows.append((weight * part) ** 0.5 * x / x.norm())
                targets.append((weight * part) ** 0.5 * y / x.norm())
    stacked = torch.cat(rows)
    root = (RIDGE * stacked.square().sum() / anchor.shape[1]).sqrt()
    rows.append(root * torch.eye(anchor.shape[1], dtype=torch.float64))
    targets.append(root * anchor.T)
    return torch.linalg.lstsq(torch.cat(rows), torch.cat(targets), driver="gelsd").solution.T


def random_problem(d_out, d_in, tokens, models=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    base = draw(d_out, d_in)
    experts = []
    for i in range(models):
        x = draw(tokens, d_in) @ draw(d_in, d_in)
        experts.append((0.5 + i, base + 0.1 * draw(d_out, d_in), x, x + 0.3 * draw(tokens, d_in)))
    return base + 0.1 * draw(d_out, d_in), base, experts


def fitted(anchor, base, experts, share, scale=1.0, batches=3):
    given = [
        refine.Expert(w, weight, refine.summed(list(zip(merged.chunk(batches), own.chunk(batches)))))
        for w, weight, merged, own in experts
    ]
    return refine.refine(anchor, base, given, share, scale)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("d_out", "d_in", "tokens"), [(24, 40, 300), (40, 24, 300), (24, 40, 12)])
def test_a_layer_is_fitted_as_least_squares_would(share, d_out, d_in, tokens, monkeypatch):
    monkeypatch.setattr(refine, "CLIP", 1e9)
    anchor, base, experts = random_problem(d_out, d_in, tokens)
    expected = least_squares(anchor, base, experts, share)
    assert (fitted(anchor, base, experts, share) - expected).norm() < 1e-7 * (expected - anchor).norm()
    scaled = fitted(anchor, base, experts, share, scale=1.3)
    assert torch.allclose(scaled, base + 1.3 * (expected - base), rtol=0, atol=1e-6)


def reference(family, anchors, shares, share=0.5, scale=1.0):
    """The refined weights of linear layers by name, from whole models in float64."""

    def load(folder):
        return getattr(transformers, KINDS[family.kind].model).from_pretrained(folder, dtype=torch.float64).eval()

    def inputs(model, samples):
        """By layer, in the order of the calls, the rows of all samples."""
        seen, hooks = {}, []
        for name, module in model.named_modules():
            if family.is_linear(f"{name}.weight"):
                hook = lambda m, args, name=name: seen.setdefault(name, []).append(args[0][0])  # noqa: E731
                hooks.append(module.register_forward_pre_hook(hook))
        with torch.no_grad():
            for sample in samples:
                model(**sample)
        for hook in hooks:
            hook.remove()
        return {name: torch.cat(parts) for name, parts in seen.items() if "pooler" not in name}

    def weight_of(model, name):
        weight = model.get_submodule(name).weight
        return weight.T if KINDS[family.kind].transposed else weight

    folders = family.tuned[: len(shares)]
    base, merged, experts = load(family.base), load(family.base), [load(folder) for folder in folders]
    merged.load_state_dict({name: value.double() for name, value in anchors.items()}, strict=False)
    samples = [list(_texts((path, "text", "text"), folder, 64)) for path, folder in zip(family.data, folders)]
    theirs = [inputs(expert, of_model) for expert, of_model in zip(experts, samples)]
    result = {}
    with torch.no_grad():
        for name in theirs[0]:
            ours = [inputs(merged, of_model)[name] for of_model in samples]
            given = [(w, weight_of(expert, name), x, y[name]) for w, expert, x, y in zip(shares, experts, ours, theirs)]
            of_base = weight_of(base, name)
            fit = of_base + scale * (least_squares(weight_of(merged, name), of_base, given, share) - of_base)
            weight_of(merged, name).copy_(fit)
            result[f"{name}.weight"] = merged.get_submodule(name).weight.clone()
    return result


def refined(family, models=2, refine=True, **more):
    pave = {"purify": False, "refine": refine, "models": entries(family, models)}
    return config_for(family, pave, models=models, **more)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_a_merge_is_refined_as_whole_models_would_be(families, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(refine, "CLIP", 1e9)
    family, weight = families[kind], (0.3, 0.6)
    pave = {"purify": False, "vocabulary": "fit", "models": entries(family)}
    plain = merge(config_for(family, pave, weight=weight), tmp_path / "plain")
    written = merge(refined(family, weight=weight, refine={"lambda": 1.0}), tmp_path / "refined")
    expected = reference(family, plain, weight)
    report = json.loads((tmp_path / "refined/pave_report.json").read_text())["refined"]
    rows = {row["tensor"]: row for row in report["layers"]}
    assert rows.keys() == expected.keys() and len(expected) >= 8
    before, after = (sum(rows[name][key] for name in expected) for key in ("error_before", "error_after"))
    assert after < before
    base = weights(family.base)
    for name, tensor in written.items():
        if name in expected:
            assert (tensor - expected[name]).norm() < 1e-4 * (expected[name] - base[name]).norm(), name
        else:
            assert torch.equal(tensor, plain[name])


# What may not matter: how models are loaded, how samples are batched, where tensors are kept.


def rows_of(out):
    return json.loads((out / "pave_report.json").read_text())["refined"]["layers"]


def assert_equal(left, right):
    assert left.keys() == right.keys()
    assert not [name for name in left if not torch.equal(left[name], right[name])]


def stored_as_bin(family, folder):
    """The same models in files that cannot be read in parts."""
    folders = []
    for path in (family.base, *family.tuned):
        shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("*.safetensors"))
        torch.save(weights(path), folder / path.name / "pytorch_model.bin")
        folders.append(folder / path.name)
    return dataclasses.replace(family, base=folders[0], tuned=tuple(folders[1:]))


def unknown_weight(*args, **kwargs):
    raise UnknownWeightError("a weight")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_block_by_block_and_whole_models_give_the_same(families, kind, tmp_path, monkeypatch, caplog):
    family = families[kind]
    caplog.set_level("INFO", logger="mergekit_pave")
    streamed = merge(refined(family), tmp_path / "streamed")
    assert "loading them whole" not in caplog.text and "one by one" not in caplog.text
    assert_equal(merge(refined(family), tmp_path / "again", low_cpu_memory=True), streamed)
    if kind == "llama":
        assert_equal(merge(refined(stored_as_bin(family, tmp_path / "bin")), tmp_path / "of bin"), streamed)
        assert "not in safetensors files" in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "StreamedModel", unknown_weight)
        assert_equal(merge(refined(family), tmp_path / "whole"), streamed)
    assert "loading them whole" in caplog.text
    config = refined(family)
    config["pave"]["calibration"] = {"batch_size": 1}
    single = merge(config, tmp_path / "single")
    for name, tensor in streamed.items():
        assert (single[name] - tensor).norm() <= 1e-5 * tensor.norm(), name


PARAMETERS = {
    "ties": {"density": 0.6},
    "dare_ties": {"density": 0.6},
    "della": {"density": 0.6, "epsilon": 0.1},
    "model_stock": {},
    "regmean": {"covariance": 0.5},
    "task_arithmetic": {},
}


@pytest.mark.parametrize("method", PARAMETERS)
def test_it_begins_where_any_method_ends(llama, tmp_path, monkeypatch, method):
    """Samples run through the very tensors that are written, also where a method draws random numbers."""
    config = refined(llama, merge_method=method, parameters=PARAMETERS[method])
    if method in ("ties", "regmean"):
        config["pave"]["purify"] = True
    if method == "model_stock":
        config["models"] = [{"model": entry["model"]} for entry in config["models"]]
    if method == "task_arithmetic":
        config["models"][0]["parameters"]["weight"] = [0.1, 0.9, 0.3]
    ran_with, find = {}, tasks.MergedTensors.find

    def noting(self, names):
        value = find(self, names)
        ran_with.update({name: value.clone() for name in names if name in self.names})
        return value

    monkeypatch.setattr(tasks.MergedTensors, "find", noting)
    written = merge(config, tmp_path / "out", random_seed=5)
    rows = {row["tensor"]: row for row in rows_of(tmp_path / "out")}
    assert len(rows) == 21
    others = written.keys() - rows.keys() - {"lm_head.weight"}
    assert others <= ran_with.keys() and all(torch.equal(written[name], ran_with[name]) for name in others)
    assert any(not torch.equal(written[name], ran_with[name]) for name in rows)
    assert sum(row["error_after"] for row in rows.values()) < sum(row["error_before"] for row in rows.values())
    again = merge(config, tmp_path / "again", random_seed=5)
    assert_equal(again, written)


def test_precisions(llama, tmp_path):
    exact = merge(refined(llama), tmp_path / "exact")
    for i, more in enumerate(({"dtype": "bfloat16"}, {"dtype": "float32", "out_dtype": "bfloat16"})):
        written = merge(refined(llama) | more, tmp_path / str(i))
        assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
        assert all((written[name] - exact[name]).norm() < 0.01 * exact[name].norm() for name in exact)


def test_an_adapter(llama, tmp_path):
    """A single expert is what its own merge is refined to, whatever the weight."""
    config = with_adapter(llama, tmp_path)
    config["pave"] |= {"purify": False, "refine": {"covariance": 1.0, "lambda": 1.0}, "vocabulary": "method"}
    merge(config, tmp_path / "out", lora_merge_cache=str(tmp_path / "loras"))
    rows = rows_of(tmp_path / "out")
    assert rows[0]["error_before"] > 0.01 and all(row["error_after"] < 1e-3 for row in rows)


@pytest.mark.parametrize("twice", [False, True])
def test_a_tied_vocabulary(tmp_path, twice):
    family = make_llama(tmp_path / "made", tie_word_embeddings=True)
    if twice:
        head = lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}  # noqa: E731
        family = stored_otherwise(family, tmp_path / "twice", head)
    by_data = None if twice else {"purify": False, "vocabulary": "fit", "models": entries(family)}
    plain = merge(config_for(family, by_data), tmp_path / "plain")
    written = merge(refined(family, refine={"lambda": 1.0}), tmp_path / "out")
    names = {row["tensor"] for row in rows_of(tmp_path / "out")}
    assert len(names) == 21
    assert_equal({name: written[name] for name in plain if name not in names}, {n: t for n, t in plain.items() if n not in names})


def test_steps_of_several_merges(llama, tmp_path):
    data = {"path": str(llama.data[0]), "text": "text"}
    first, last = refined(llama), config_for(llama)

    def last_with(step):
        last["models"] = [{"model": model, "parameters": {"weight": 0.5}} for model in (step, str(llama.tuned[2]))]
        last["pave"] = {
            "purify": False,
            "refine": True,
            "models": [{"model": one["model"], "data": data} for one in last["models"]],
        }
        return last

    result = invoke_multi([first | {"name": "step"}, last_with("step")], tmp_path / "multi")
    assert result.exit_code == 0, (result.output, result.exception)
    alone = merge(first, tmp_path / "alone")
    assert_equal(weights(tmp_path / "multi" / "step"), alone)
    assert_equal(weights(tmp_path / "multi" / "final"), merge(last_with(str(tmp_path / "alone")), tmp_path / "last"))


# Attention sinks: the first token's input of a layer may be hundreds of times larger than all others.


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_other_tokens_count_beside_a_sink(monkeypatch, share):
    anchor, base, experts = random_problem(24, 48, 400, models=2)
    generator = torch.Generator().manual_seed(7)
    direction = torch.randn(48, generator=generator, dtype=torch.float64)
    size = 500 * experts[0][2].norm(dim=1).median()
    sunk = []
    for w, weight, merged, own in experts:
        noise = 5 * torch.randn(2, 8, 48, generator=generator, dtype=torch.float64)
        ours, theirs = size * direction / direction.norm() + noise
        sunk.append((w, weight, torch.cat([ours, merged]), torch.cat([1.02 * theirs, own])))

    def error(fit):
        return sum((x @ fit.T - y @ w.T).square().sum() / (y @ w.T).square().sum() for _, w, x, y in experts).sqrt()

    without = error(fitted(anchor, base, experts, share))
    assert without < error(anchor)
    assert error(fitted(anchor, base, sunk, share)) < 1.05 * without
    monkeypatch.setattr(refine, "CLIP", 1e9)
    assert error(fitted(anchor, base, sunk, share)) > 1.5 * without, "or this test shows nothing"


LAYER, CHANNEL = "model.layers.1.mlp", 3


def with_sink(family, folder):
    """The same models with a dimension that only the first token has, and a channel of the second MLP that it sets off."""

    def plant(tensors):
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        tensors["model.embed_tokens.weight"][:, 0] = 0
        tensors["model.embed_tokens.weight"][1, 0] = 3
        for name, tensor in tensors.items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                tensor[0] = 0  # nothing else is written to that dimension
        for part in ("gate", "up"):
            tensors[f"{LAYER}.{part}_proj.weight"][CHANNEL] = 0
            tensors[f"{LAYER}.{part}_proj.weight"][CHANNEL, 0] = 30
        tensors[f"{LAYER}.down_proj.weight"][:, CHANNEL] /= 100
        return tensors

    return stored_otherwise(family, folder, plant)


def test_a_merge_of_models_with_a_sink(llama, tmp_path, monkeypatch):
    family = with_sink(llama, tmp_path)

    def error(out):
        """Of the layer's outputs for all tokens but the first, and how much larger the first token's input is than others."""
        merged = transformers.AutoModelForCausalLM.from_pretrained(out)
        differences, sizes = [], []
        for path, folder in zip(family.data, family.tuned[:2]):
            seen = []
            for model in (merged, transformers.AutoModelForCausalLM.from_pretrained(folder)):
                layer = model.get_submodule(f"{LAYER}.down_proj")
                layer.register_forward_hook(lambda m, args, output, seen=seen: seen.append((args[0][0], output[0])))
                with torch.no_grad():
                    for sample in _texts((path, "text", "text"), folder, 64):
                        model(**sample)
            half = len(seen) // 2
            ours, theirs = (torch.cat([output[1:] for _, output in part]) for part in (seen[:half], seen[half:]))
            differences.append((ours - theirs).norm() / theirs.norm())
            sizes += [x[0].norm() / x[1:].norm(dim=1).median() for x, _ in seen if len(x) > 4]
        return sum(differences).item(), min(sizes).item()

    merge(refined(family), tmp_path / "clipped")
    monkeypatch.setattr(refine, "CLIP", 1e9)
    merge(refined(family), tmp_path / "unclipped")
    (clipped, size), (unclipped, _) = error(tmp_path / "clipped"), error(tmp_path / "unclipped")
    assert size > 200
    assert clipped < 0.97 * unclipped, (clipped, unclipped)
