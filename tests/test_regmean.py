"""`merge_method: regmean`: its mathematics against least squares written from the definition, and merges of real models.

The closed form minimises sum w_i tr((D - D_i) M_i (D - D_i)^T) + e ||D||^2. With M_i = R_i^T R_i that is an ordinary problem of
least squares in stacked rows, which the reference solves by an SVD: no Gram matrix, no normal equations, no inverse.
"""

import functools
import html
import json
import logging
import weakref

import pytest
import torch
from click.testing import CliRunner
from commands import command
from mergekit.merge_methods import merge_state_dicts
from mergekit.merge_methods.base import PerInputValues, TensorEntry, TensorGroup, TensorMetadata
from mergekit.scripts import merge_raw_pytorch
from merging import config_for, entries, forget_checkpoints, invoke, invoke_multi, merge, write_config
from models import Family
from reference import layer_inputs, purify, weights
from safetensors.torch import save_file
from test_experts import family_of, median_tokens, of_expert, seen_in  # noqa: F401
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mergekit_pave import Covariance, PaveError
from mergekit_pave.cli import main
from mergekit_pave.core.ridge import divide
from mergekit_pave.methods import regmean

RIDGE = 1e-6


def rows_of(change, x, share, off_diagonal):
    """R with R^T R = M, for D (d_out, d_in) and X (tokens, d_in)."""
    parts = []
    if share > 0:
        # The diagonal of C is that of the reduced one; what is missing from it is added as rows of its own.
        parts.append((share * off_diagonal) ** 0.5 * x / x.norm())
        parts.append((share * (1 - off_diagonal)) ** 0.5 * torch.diag(x.norm(dim=0)) / x.norm())
    if share < 1 and change.norm() > 0:
        parts.append((1 - share) ** 0.5 * change / change.norm())
    return torch.cat(parts)


def closed_form(changes, inputs, shares_of_models, share, off_diagonal=1.0, ridge=RIDGE):
    """The merged change (d_out, d_in)."""
    a, b = [], []
    for change, x, weight in zip(changes, inputs, shares_of_models):
        rows = weight**0.5 * rows_of(change, x, share, off_diagonal)
        a.append(rows)
        b.append(rows @ change.T)
    stacked, targets = torch.cat(a), torch.cat(b)
    d = stacked.shape[1]
    if ridge:
        root = (ridge * stacked.square().sum() / d).sqrt()
        stacked = torch.cat([stacked, root * torch.eye(d, dtype=stacked.dtype)])
        targets = torch.cat([targets, torch.zeros(d, targets.shape[1], dtype=targets.dtype)])
    return torch.linalg.lstsq(stacked, targets, driver="gelsd").solution.T


def distance(found, exact):
    return ((found - exact).norm() / exact.norm()).item()


def draw(tokens, d_out=24, d_in=40, models=3, decades=2, seed=0):
    """Changes (d_out, d_in) and inputs (tokens, d_in) whose spectrum falls by so many decades."""
    generator = torch.Generator().manual_seed(seed)
    normal = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    scales = torch.logspace(0, -decades / 2, d_in, dtype=torch.float64)
    changes = [0.02 * normal(d_out, d_in) for _ in range(models)]
    inputs = [normal(tokens, d_in) * scales @ torch.linalg.qr(normal(d_in, d_in)).Q for _ in range(models)]
    return changes, inputs


def merged(changes, inputs, shares_of_models, share, off_diagonal=1.0):
    """What the package makes of it."""
    terms = (
        (weight, change, regmean.metric(change, Covariance.from_rows(x), share, off_diagonal))
        for change, x, weight in zip(changes, inputs, shares_of_models)
    )
    return regmean.merge_changes(terms)


@pytest.mark.parametrize("tokens", [9, 300], ids=["few-tokens", "many-tokens"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("off_diagonal", [1.0, 0.6])
@pytest.mark.parametrize("shares_of_models", [(1.0, 1.0, 1.0), (0.2, 1.0, 0.0)], ids=["alike", "weighted"])
def test_closed_form_is_exact(tokens, share, off_diagonal, shares_of_models):
    """With 9 tokens a model C has rank 9 of 40, and with a weight of 0 the sum has rank 18."""
    changes, inputs = draw(tokens)
    exact = closed_form(changes, inputs, shares_of_models, share, off_diagonal)
    assert distance(merged(changes, inputs, shares_of_models, share, off_diagonal), exact) < 1e-8


def test_the_scale_of_weights_and_of_inputs_is_nothing():
    changes, inputs = draw(100)
    once = merged(changes, inputs, (0.1, 0.2, 0.3), 0.5)
    scaled = merged(changes, [x * s for x, s in zip(inputs, (1, 30, 0.01))], (1.0, 2.0, 3.0), 0.5)
    assert distance(scaled, once) < 1e-8


@pytest.mark.parametrize("tokens", [9, 300])
def test_regmean_minimises_the_change_of_outputs(tokens):
    """a = 1: the gradient of sum w_i ||X_i (D - D_i)^T||^2 / tr(C_i) vanishes, which it does not at the mean."""
    changes, inputs = draw(tokens)
    shares_of_models = (0.2, 0.3, 0.5)

    def gradient(change):
        pulls = zip(changes, inputs, shares_of_models)
        return sum(w * (change - own) @ (x.T @ x) / x.square().sum() for own, x, w in pulls).norm()

    found = merged(changes, inputs, shares_of_models, 1.0)
    mean = sum(w * change for w, change in zip(shares_of_models, changes))
    assert gradient(found) < 1e-5 * gradient(mean)


def test_the_ridge_is_hardly_felt_without_rounding():
    """Against the solution of least length, which has no ridge at all."""
    for tokens in (9, 300):
        changes, inputs = draw(tokens)
        exact = closed_form(changes, inputs, (1.0,) * 3, 1.0, ridge=0)
        assert distance(merged(changes, inputs, (1.0,) * 3, 1.0), exact) < 1e-4


def test_rounding_in_covariances_does_not_blow_up(monkeypatch):
    """C of rank 24 of 96 that was summed in float32 is indefinite. Without care the result is several times too long."""
    changes, inputs = draw(12, d_in=96, models=2)
    rounded = [Covariance(len(x), gram=(x.float().T @ x.float()).double()) for x in inputs]

    def result():
        return regmean.merge_changes((1.0, change, regmean.metric(change, c, 1.0)) for change, c in zip(changes, rounded))

    metrics = [regmean.metric(change, c, 1.0) for change, c in zip(changes, rounded)]
    total = sum(metrics)
    assert torch.linalg.eigvalsh(total)[0] < 0, "the sum is not indefinite, so this is no test"
    exact = closed_form(changes, inputs, (1.0, 1.0), 1.0)
    assert distance(result(), exact) < 0.5
    monkeypatch.setattr(divide, "__defaults__", (1e-12,))
    assert result().norm() < 2 * exact.norm()
    shifted = total + 1e-12 * total.diagonal().mean() * torch.eye(96, dtype=torch.float64)
    naive = torch.linalg.solve(shifted, sum(change @ own for change, own in zip(changes, metrics)).T).T
    assert naive.norm() > 5 * exact.norm()


@pytest.mark.parametrize("below", [0.3, 0.6, 0.99, 3.0])
def test_a_sum_that_is_barely_indefinite(below):
    """An eigenvalue that rounding has pushed below zero, by less than the ridge or by more: a Cholesky factor may well exist."""
    metric = torch.eye(10, dtype=torch.float64)
    metric[9, 9] = -below * RIDGE * 0.9
    change = torch.ones(3, 10, dtype=torch.float64)
    found = regmean.merge_changes([(1.0, change, metric)])
    assert torch.allclose(found[:, :9], change[:, :9], atol=1e-5)
    assert found[:, 9].abs().max() <= 1.0


def test_a_model_that_has_not_changed():
    changes, inputs = draw(300)
    changes[1].zero_()
    for share in (0.0, 0.5, 1.0):
        known = slice(None) if share else slice(None, None, 2)
        exact = closed_form(changes[known], inputs[known], (1.0,) * 3, share)
        assert distance(merged(changes, inputs, (1.0,) * 3, share), exact) < 1e-8
    nothing = [torch.zeros_like(change) for change in changes]
    assert not merged(nothing, inputs, (1.0,) * 3, 0.0).any()


def test_inputs_that_are_all_zero():
    """C says nothing of such a model: it is as if it were not there, and if there is no other, nothing changes."""
    changes, inputs = draw(300, models=2)
    inputs[0].zero_()
    assert distance(merged(changes, inputs, (1.0, 1.0), 1.0), closed_form(changes[1:], inputs[1:], (1.0,), 1.0)) < 1e-8
    assert not merged(changes, [torch.zeros_like(x) for x in inputs], (1.0, 1.0), 1.0).any()


# The registered method on tensors in memory.


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors which operations have returned, or written to, held at any time."""

    def __init__(self):
        super().__init__()
        self._known, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._known[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self._known = {place: known for place, known in self._known.items() if not known[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._known.values()))
        return result


@pytest.mark.parametrize("tokens", [50, 1200], ids=["rows", "triangle"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_memory(monkeypatch, tokens, share):
    """What the docstring of `merge_group` tells, for many models; and no two metrics are there at once."""
    d, models = 1024, 3
    changes, inputs = draw(tokens, d_out=2, d_in=d, models=models)
    stored = [Covariance.from_rows(x).to_tensors() for x in inputs]
    assert all(("rows" in tensors) == (tokens < d) for tensors in stored)
    real, metrics = regmean.metric, []

    def watched(*args, **kwargs):
        assert all(other() is None for other in metrics)
        metrics.append(weakref.ref(found := real(*args, **kwargs)))
        return found

    def read(model, _):
        return Covariance.from_tensors({name: tensor.clone() for name, tensor in stored[model].items()}, tokens, d)

    monkeypatch.setattr(regmean, "metric", watched)
    entries = [TensorEntry(i, change, False) for i, change in enumerate(changes)]
    base = TensorEntry("base", torch.zeros(2, d, dtype=torch.float64), True)
    parameters = {"weight": PerInputValues([(i, 1.0) for i in range(models)]), "lambda": 1.0, "covariance": share}
    parameters |= {"reduce_off_diagonal": 0.9, "layer": regmean.Layer(measured=(True,), covariance=read)}
    group = TensorGroup(entries=(base, *entries), metadata=TensorMetadata(name="w"))
    with PeakMemory() as memory:
        found = regmean.RegMean().merge_group(group, **parameters)
    assert len(metrics) == models
    assert 2 * d * d < memory.peak / 8 < 2.5 * d * d + 30 * 2 * d, memory.peak / 8 / d**2
    assert distance(found, closed_form(changes, inputs, (1.0,) * models, share, 0.9)) < 1e-6


def test_a_covariance_is_left_as_it_is():
    changes, inputs = draw(300)
    covariance = Covariance.from_rows(inputs[0])
    before = covariance.gram.clone()
    kept = regmean.metric(changes[0], covariance, 0.5, 0.7)
    assert torch.equal(covariance.gram, before)
    assert torch.equal(regmean.metric(changes[0], covariance, 0.5, 0.7, overwrite=True), kept)


def state_dicts(transposed=False):
    changes, _ = draw(1)
    generator = torch.Generator().manual_seed(5)
    base = {
        "layer.weight": torch.randn(24, 40, generator=generator),
        "norm.weight": torch.randn(24, generator=generator),
        "conv.weight": torch.randn(6, 5, 3, generator=generator),
        "steps": torch.tensor([3]),
    }
    models = []
    for change in changes:
        model = {"layer.weight": (base["layer.weight"] + change).float(), "steps": base["steps"]}
        for name in ("norm.weight", "conv.weight"):
            model[name] = base[name] + 0.1 * torch.randn(base[name].shape, generator=generator)
        models.append(model)
    return base, models


@pytest.mark.parametrize("shares_of_models", [None, (0.2, 0.7, 0.4)])
def test_state_dicts_without_data(shares_of_models):
    base, models = state_dicts()
    given = {"base": base} | dict(enumerate(models))
    parameters = {"covariance": 0.0, "lambda": 1.3}
    known = shares_of_models or (1 / 3,) * 3
    if shares_of_models:
        parameters["weight"] = dict(enumerate(shares_of_models))
    found = merge_state_dicts(given, "regmean", base="base", parameters=parameters)
    changes = [(model["layer.weight"] - base["layer.weight"]).double() for model in models]
    exact = closed_form(changes, [None] * 3, known, 0.0)
    assert distance(found["layer.weight"] - base["layer.weight"], 1.3 * exact) < 1e-5  # stored as float32
    plain = merge_state_dicts(given, "task_arithmetic", base="base", parameters={"weight": dict(enumerate(known)), "lambda": 1.3})
    for name in ("norm.weight", "conv.weight", "steps"):
        assert torch.equal(found[name], plain[name]), name


def test_mergekits_command_for_any_tensors(tmp_path):
    """`mergekit-pytorch`, which knows no architectures either."""
    base, models = state_dicts()
    for i, model in enumerate((base, *models)):
        save_file(model, tmp_path / f"{i}.safetensors")
    config = {"merge_method": "regmean", "base_model": str(tmp_path / "0.safetensors"), "parameters": {"covariance": 0}}
    config["models"] = [{"model": str(tmp_path / f"{i}.safetensors")} for i in (1, 2, 3)]
    done = CliRunner().invoke(merge_raw_pytorch.main, [str(write_config(config, tmp_path / "c.yml")), str(tmp_path / "out")])
    assert done.exit_code == 0, (done.output, done.exception)
    written = weights(tmp_path / "out")
    direct = merge_state_dicts([base, *models], "regmean", base=0, parameters={"covariance": 0})
    assert all(torch.equal(written[name], tensor) for name, tensor in direct.items())


def test_precision_of_the_output():
    base, models = state_dicts()
    given = [{"layer.weight": model["layer.weight"].bfloat16()} for model in (base, *models)]
    wide = [{name: tensor.double() for name, tensor in model.items()} for model in given]
    found = merge_state_dicts(given, "regmean", base=0, parameters={"covariance": 0})["layer.weight"]
    assert found.dtype == torch.bfloat16
    exact = merge_state_dicts(wide, "regmean", base=0, parameters={"covariance": 0})
    assert torch.equal(found, exact["layer.weight"].bfloat16())


@pytest.mark.parametrize(
    ("parameters", "base", "words"),
    [
        ({}, 0, ["`covariance: 0`", "pave"]),
        ({"covariance": 0.5}, 0, ["`covariance: 0`", "pave"]),
        ({"covariance": 1.5}, 0, ["covariance", "0 to 1", "1.5"]),
        ({"covariance": float("nan")}, 0, ["covariance"]),
        ({"covariance": 0, "weight": -0.1}, 0, ["weight", "-0.1"]),
        ({"covariance": 0, "lambda": float("inf")}, 0, ["lambda"]),
        ({"covariance": 0, "reduce_off_diagonal": 0}, 0, ["reduce_off_diagonal"]),
        ({"covariance": 0}, None, ["base_model", "covariance"]),
        ({"covariance": 1, "weight": 0}, None, ["weight is 0", "layer.weight", "base_model"]),
    ],
)
def test_what_is_refused_in_memory(parameters, base, words):
    models = [{"layer.weight": torch.randn(4, 5)} for _ in range(3)]
    with pytest.raises(PaveError) as caught:
        merge_state_dicts(models, "regmean", base=base, parameters=parameters)
    for word in words:
        assert word in caught.value.message


def test_values_that_are_not_finite():
    base, models = state_dicts()
    models[1]["layer.weight"][2, 3] = float("nan")
    with pytest.raises(PaveError, match=r"layer\.weight of 2"):
        merge_state_dicts([base, *models], "regmean", base=0, parameters={"covariance": 0})


# Merges of real models. What is compared is the change, whose length is a few percent of the weight's.


def unpurified(family, models=2):
    return {"models": [entry | {"purify": False} for entry in entries(family, models)]}


def regmean_config(family, pave=None, *, weight=(0.5, 0.8), parameters=None, **more):
    """A merge of layers alone; test_vocabulary.py looks at the embeddings that are merged by token counts otherwise."""
    pave = None if pave is None else {"vocabulary": "method"} | pave
    config = config_for(family, pave, models=len(weight), weight=weight, merge_method="regmean", dtype="float64", **more)
    return config | {"parameters": parameters or {}}


def turned(family, tensor):
    return tensor.T.double() if family.kind == "gpt2" else tensor.double()


def wanted_change(family, tensor, shares_of_models, share, off_diagonal=1.0, tuned=None):
    """The merged change of one tensor as stored, from models that run in float64."""
    base = turned(family, weights(family.base)[tensor])
    tuned = tuned or [weights(folder) for folder in family.tuned]
    changes = [turned(family, model[tensor]) - base for model in tuned[: len(shares_of_models)]]
    inputs = [
        layer_inputs(family.kind, folder, (data, "text", "text"), 64)[tensor.removesuffix(".weight")]
        for folder, data in zip(family.tuned, family.data)
    ]
    change = closed_form(changes, inputs, shares_of_models, share, off_diagonal)
    return change.T if family.kind == "gpt2" else change


def check(family, written, plain, wanted):
    """`wanted` gives the change of a linear weight; every other tensor is as `plain` has it."""
    assert written.keys() == plain.keys()
    base, errors = weights(family.base), {}
    for name, tensor in written.items():
        if not family.is_linear(name):
            assert torch.equal(tensor, plain[name]), name
            continue
        errors[name] = distance(tensor.double() - base[name].double(), wanted(name))
    assert errors
    worst = max(errors, key=errors.get)
    assert errors[worst] < 1e-4, f"{worst} is {errors[worst]:.1e} of the change away from the reference"


def as_task_arithmetic(config, out):
    """The same config merged by mergekit's own method."""
    plain = {key: value for key, value in config.items() if key != "pave"} | {"merge_method": "task_arithmetic"}
    return merge(plain | {"parameters": {"lambda": config["parameters"].get("lambda", 1.0)}}, out)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_merges_are_exact(families, tmp_path, kind, share):
    family = families[kind]
    parameters = {"covariance": share, "lambda": 1.2, "reduce_off_diagonal": 0.9}
    config = regmean_config(family, unpurified(family), parameters=parameters)
    written = merge(config, tmp_path / "out")
    plain = as_task_arithmetic(config, tmp_path / "plain")
    check(family, written, plain, lambda name: 1.2 * wanted_change(family, name, (0.5, 0.8), share, 0.9))


def test_through_the_real_command(llama, tmp_path, cache):
    """With the defaults: half of the metric is data, and weights are alike."""
    config = regmean_config(llama, unpurified(llama))
    for model in config["models"]:
        del model["parameters"]
    done = command("mergekit-yaml", write_config(config, tmp_path / "config.yml"), tmp_path / "out")
    assert done.returncode == 0, done.stderr
    plain = as_task_arithmetic(regmean_config(llama, weight=(0.5, 0.5)), tmp_path / "plain")
    check(llama, weights(tmp_path / "out"), plain, lambda name: wanted_change(llama, name, (0.5, 0.5), 0.5))


def test_parameters_may_be_gradients_and_filters(llama, tmp_path):
    parameters = {
        "covariance": [{"filter": "mlp", "value": [1.0, 0.0]}, {"value": 0.4}],
        "lambda": [{"filter": "self_attn", "value": 0.5}, {"filter": "norm", "value": 2.0}, {"value": [1.0, 2.0]}],
    }
    config = regmean_config(llama, unpurified(llama), parameters=parameters)
    config["models"][0]["parameters"]["weight"] = [{"filter": "q_proj", "value": 0.1}, {"value": 0.5}]

    def wanted(name):
        layer = int(name.split(".")[2])
        share = 1 - layer / 2 if "mlp" in name else 0.4
        scale = 0.5 if "self_attn" in name else 1 + layer / 2
        return scale * wanted_change(llama, name, (0.1 if "q_proj" in name else 0.5, 0.8), share)

    plain = merge(
        {k: v for k, v in config.items() if k != "pave"}
        | {"merge_method": "task_arithmetic", "parameters": {"lambda": parameters["lambda"]}},
        tmp_path / "plain",
    )
    check(llama, merge(config, tmp_path / "out"), plain, wanted)


@pytest.mark.parametrize("how", ["purify", "rank_ratio"])
def test_it_works_on_purified_weights(llama, tmp_path, how):
    """With `purify` both models are purified; a rank_ratio of 1 leaves the second as it is."""
    pave = {"rank_ratio": 0.8, "regularization": 0.1, "models": entries(llama, 2)}
    if how == "rank_ratio":
        pave["models"][1]["rank_ratio"] = 1.0
    config = regmean_config(llama, pave, parameters={"covariance": 0.5})
    sources = [(data, "text", "text") for data in llama.data[:2]]

    def ratio(i, tensor):
        return None if how == "rank_ratio" and i == 1 else 0.8

    rows = purify("llama", llama.base, llama.tuned[:2], sources, ratio, regularization=0.1)
    tuned = [weights(model) | {name: row.weight for name, row in found.items()} for model, found in zip(llama.tuned, rows)]
    written = merge(config, tmp_path / "out")
    plain = as_task_arithmetic(config, tmp_path / "plain")
    check(llama, written, plain, lambda name: wanted_change(llama, name, (0.5, 0.8), 0.5, tuned=tuned))
    report = json.loads((tmp_path / "out" / "pave_report.json").read_text())
    assert {row["model"] for row in report["purified"]} == set(map(str, llama.tuned[: 1 if how == "rank_ratio" else 2]))


@pytest.mark.parametrize("off", [{"purify": False}, {"rank_ratio": 1.0}])
def test_purification_can_be_off(llama, tmp_path, off):
    pave = {"models": [entry | off for entry in entries(llama, 2)]}
    written = merge(regmean_config(llama, pave, parameters={"covariance": 1}), tmp_path / "out")
    plain = as_task_arithmetic(regmean_config(llama), tmp_path / "plain")
    check(llama, written, plain, lambda name: wanted_change(llama, name, (0.5, 0.8), 1.0))
    assert json.loads((tmp_path / "out" / "pave_report.json").read_text())["purified"] == []


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_no_data_is_asked_for_where_none_is_used(families, tmp_path, cache, kind):
    """`covariance: 0` is the same without a block, with an empty one and beside data; nothing is calibrated."""
    family = families[kind]
    parameters = {"covariance": 0, "lambda": 1.1}
    alone = merge(regmean_config(family, parameters=parameters), tmp_path / "alone")
    plain = as_task_arithmetic(regmean_config(family, parameters=parameters), tmp_path / "plain")
    check(family, alone, plain, lambda name: 1.1 * wanted_change(family, name, (0.5, 0.8), 0.0))
    empty = {"models": [{"model": str(model), "purify": False} for model in family.tuned[:2]]}
    for i, pave in enumerate((empty, unpurified(family))):
        written = merge(regmean_config(family, pave, parameters=parameters), tmp_path / f"block{i}")
        assert all(torch.equal(alone[name], written[name]) for name in alone)
        report = json.loads((tmp_path / f"block{i}" / "pave_report.json").read_text())
        assert report["models"] == {} and {row["covariance"] for row in report["regmean"]["closed_form"]} == {0.0}
    assert not cache.exists()
    assert not (tmp_path / "alone" / "pave_report.json").exists()


def test_without_a_base_model(llama, tmp_path):
    """Plain RegMean; what no data shows, and what is no linear weight, is the weighted mean."""
    config = regmean_config(llama, unpurified(llama))
    del config["base_model"]
    written = merge(config, tmp_path / "out")
    plain = merge({k: v for k, v in config.items() if k != "pave"} | {"merge_method": "linear"}, tmp_path / "plain")
    shares_of_models, tuned = (0.5, 0.8), [weights(model) for model in llama.tuned[:2]]
    for name, tensor in written.items():
        if not llama.is_linear(name):
            assert torch.equal(tensor, plain[name]), name
            continue
        own = [model[name].double() for model in tuned]
        mean = (0.5 * own[0] + 0.8 * own[1]) / 1.3
        inputs = [
            layer_inputs("llama", folder, (data, "text", "text"), 64)[name.removesuffix(".weight")]
            for folder, data in zip(llama.tuned, llama.data)
        ]
        change = closed_form([w - mean for w in own], inputs, shares_of_models, 1.0)
        assert distance(tensor - mean, change) < 1e-4, name
        if len(inputs[0]) > len(own[0].T):  # then no direction is without data
            directly = closed_form(own, inputs, shares_of_models, 1.0, ridge=0)
            assert distance(tensor, directly) < 1e-3, name


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "afmoe"])
def test_each_expert_has_a_metric_of_its_own(family_of, tmp_path, cache, kind):  # noqa: F811
    """Experts that saw too few tokens in one of the models are merged as task_arithmetic does, and listed."""
    family: Family = family_of(kind)
    least = median_tokens(family)
    pave = unpurified(family) | {"calibration": {"min_tokens": least}}
    config = regmean_config(family, pave, parameters={"covariance": 0.5})
    written = merge(config, tmp_path / "out")
    plain = as_task_arithmetic(config, tmp_path / "plain")
    alone = []
    for weight in ((0, 0), (1, 0), (0, 1)):
        alone.append(merge(config_for(family, weight=weight, dtype="float64"), tmp_path / f"alone{len(alone)}"))
    left, exact = set(), 0
    seen = seen_in(family)
    assert written.keys() == plain.keys()
    for name, tensor in written.items():
        if name not in seen[0]:
            assert torch.equal(tensor, plain[name]), name
            continue
        for expert in seen[0][name].keys() | seen[1][name].keys():
            part = functools.partial(of_expert, expert=expert)
            inputs = [of[name].get(expert, torch.zeros(0)) for of in seen]
            if expert is not None and min(map(len, inputs)) < least:
                left.add(name if tensor.dim() == 2 else f"{name}[{expert}]")
                assert torch.equal(part(tensor), part(plain[name]))
                continue
            turn = (lambda x: x.T) if expert is not None and kind == "gpt_oss" else (lambda x: x)
            base, *tuned = (turn(part(model[name])) for model in alone)
            change = closed_form([model - base for model in tuned], inputs, (0.5, 0.8), 0.5)
            assert distance(turn(part(tensor)) - base, change) < 1e-4, (name, expert)
            exact += expert is not None
    assert left and exact
    report = json.loads((tmp_path / "out" / "pave_report.json").read_text())["regmean"]
    few = {name for name, reason in report["as_task_arithmetic"].items() if "too few calibration tokens" in reason}
    assert few == left
    assert "router" in report["as_task_arithmetic"].values()


@pytest.mark.parametrize("where", ["merge", "model"])
def test_parameters_that_it_does_not_have_are_refused(llama, tmp_path, where):
    config = config_for(llama, merge_method="regmean", parameters={"covariance": 0})
    holder = config if where == "merge" else config["models"][1]
    holder["parameters"] = holder["parameters"] | {"lamda": 9.9}
    with pytest.raises(PaveError, match="unknown parameter 'lamda'; did you mean 'lambda'"):
        merge(config, tmp_path / "out")
    assert not list(tmp_path.glob("out/*.safetensors"))


def page_of(folder) -> str:
    """The page that `mergekit-pave report` writes for a merge."""
    done = CliRunner().invoke(main, ["report", str(folder)])
    assert done.exit_code == 0, done.output
    return (folder / "pave_report" / "index.html").read_text()


def test_report_card_and_log(llama, tmp_path, cache, caplog):
    parameters = {"covariance": [0.2, 0.6], "lambda": 1.3}
    few = {"calibration": {"max_tokens": 10}}
    with caplog.at_level(logging.INFO, "mergekit_pave"):
        result = invoke(regmean_config(llama, unpurified(llama) | few, parameters=parameters), tmp_path / "out")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "pave_report.json").read_text())
    rows = {row["tensor"]: row for row in report["regmean"]["closed_form"]}
    others = report["regmean"]["as_task_arithmetic"]
    written = weights(tmp_path / "out")
    assert rows.keys() == {name for name in written if llama.is_linear(name)}
    assert others.keys() == written.keys() - rows.keys()
    assert others["lm_head.weight"] == "vocabulary" and "norm" in next(n for n, r in others.items() if "not the weight" in r)
    layer = "model.layers.1.mlp.up_proj.weight"
    told = {"tensor": layer, "covariance": pytest.approx(0.4), "lambda": 1.3, "reduce_off_diagonal": 1.0}
    change, base = (written[layer] - weights(llama.base)[layer]).flatten(), weights(llama.base)[layer]
    told["alignment"] = {
        str(model): pytest.approx(torch.cosine_similarity(change, (weights(model)[layer] - base).flatten(), 0).item(), abs=1e-5)
        for model in llama.tuned[:2]
    }
    assert rows[layer] == told
    sizes = {name: tensor.numel() for name, tensor in written.items()}
    counts = {"closed form": sum(sizes[name] for name in rows)}
    for name, reason in others.items():
        counts[reason] = counts.get(reason, 0) + sizes[name]
    assert report["regmean"]["weights"] == counts
    share = f"{100 * counts['closed form'] / sum(sizes.values()):.0f} %"
    assert f"regmean     21 of 30 tensors in closed form ({share} of the weights), alignment with" in caplog.text
    records = [record for record in caplog.records if record.name.startswith("mergekit_pave")]
    assert {record.getMessage() for record in records if record.levelno >= logging.WARNING} == set(report["warnings"])
    assert any("calibration tokens for layers that are up to" in warning for warning in report["warnings"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "[RegMean](https://arxiv.org/abs/2212.09849)" in card
    section = card[card.index("### PAVE") :]
    assert "21 of 30 tensors" in section and "purified" not in section
    assert "| `covariance` (α) | 0.2 to 0.6 |" in section and "| `lambda` (λ) | 1.3 |" in section
    assert "2 vocabulary" in section
    assert all(f"> {warning}." in section for warning in report["warnings"])
    for model in llama.tuned[:2]:
        assert f"| {model} |" in section and str(report["models"][str(model)]["tokens"]) in section

    page = page_of(tmp_path / "out")
    assert "21 of 30" in page and "tensors merged in closed form" in page and "No model was purified" in page
    assert (
        "<td class=text>model.layers.*.mlp.up_proj.weight</td><td>3</td><td class=text>0.2 to 0.6</td><td>1.3</td><td>1</td>"
        in page
    )
    assert (
        "<td class=text>vocabulary</td><td>2</td>" in page
        and "<td class=text>covariance</td><td class=text>0.2 to 0.6</td>" in page
    )
    assert "<th>max_tokens</th>" in page
    assert all(html.escape(warning) in page for warning in report["warnings"])
    for model in llama.tuned[:2]:
        assert f"<td class=text>{model}</td>" in page and f"<td>{report['models'][str(model)]['tokens']}</td>" in page
    assert page.count("<figure>") == 2 and "Left as they are" not in page and "<td class=text>rank_ratio" not in page
    assert share in page and {p.name for p in (tmp_path / "out" / "pave_report").glob("*.png")} == {"ways.png", "alignment.png"}
    of_config = CliRunner().invoke(main, ["report", str(tmp_path / "out.yml"), "-o", str(tmp_path / "page"), "--quiet"])
    assert of_config.exit_code == 1 and "give the folder of the finished merge" in of_config.output

    merge(regmean_config(llama, {}), tmp_path / "both")
    page = page_of(tmp_path / "both")
    assert "tensors merged in closed form" in page and "tensors purified" in page and "<figure>" in page
    card = (tmp_path / "both" / "README.md").read_text()
    assert "purified the task vectors with" in card and "tensors in closed form" in card


def test_a_step_of_several(llama, tmp_path, cache):
    """mergekit-multi: one step with data, and one without on its output."""
    first = regmean_config(llama, unpurified(llama)) | {"name": "step"}
    last = regmean_config(llama, parameters={"covariance": 0})
    last["models"] = [{"model": model} for model in ("step", str(llama.tuned[2]))]
    result = invoke_multi([first, last], tmp_path / "multi")
    assert result.exit_code == 0, (result.output, result.exception)
    step = merge({k: v for k, v in first.items() if k != "name"}, tmp_path / "step")
    assert all(torch.equal(step[name], tensor) for name, tensor in weights(tmp_path / "multi" / "step").items())
    last["models"][0]["model"] = str(tmp_path / "step")
    by_hand = merge(last, tmp_path / "by-hand")
    assert all(torch.equal(by_hand[name], tensor) for name, tensor in weights(tmp_path / "multi" / "final").items())


def test_what_was_measured_is_not_measured_again(llama, tmp_path, cache):
    """Purified or not, with another share and another lambda."""
    merge(config_for(llama, {"keep_covariances": True}), tmp_path / "purified")
    times = {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}
    assert times
    merge(regmean_config(llama, {}, parameters={"covariance": 0.3, "lambda": 2}), tmp_path / "both")
    merge(regmean_config(llama, unpurified(llama)), tmp_path / "unpurified")
    assert times == {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}


def test_covariances_that_somebody_else_has_measured(llama, tmp_path, cache):
    config = regmean_config(llama, unpurified(llama), parameters={"covariance": 1})
    measured = merge(config, tmp_path / "measured")
    folders = {json.loads((path / "manifest.json").read_text())["model"]: path for path in (cache / "covariance").glob("[!.]*")}
    given = [{"model": str(m), "purify": False, "covariance": str(folders[str(m)])} for m in llama.tuned[:2]]
    written = merge(
        config | {"pave": {"vocabulary": "method", "models": given, "cache_dir": str(tmp_path / "other")}}, tmp_path / "out"
    )
    assert all(torch.equal(measured[name], tensor) for name, tensor in written.items())
    assert not (tmp_path / "other").exists()


def test_slices_of_other_layers(llama, tmp_path, cache):
    """Every model is measured at the layer that is taken from it."""
    ranges = {llama.tuned[0]: [0, 2], llama.tuned[1]: [1, 3], llama.base: [0, 2]}
    sources = [{"model": str(model), "layer_range": layers, "parameters": {"weight": 0.5}} for model, layers in ranges.items()]
    config = regmean_config(llama, unpurified(llama), parameters={"covariance": 1})
    del config["models"]
    written = merge(config | {"slices": [{"sources": sources}]}, tmp_path / "out")
    models = [weights(model) for model in (llama.base, *llama.tuned[:2])]
    checked = 0
    for name in filter(llama.is_linear, written):
        layer = int(name.split(".")[2])
        later = name.replace(f"layers.{layer}.", f"layers.{layer + 1}.")
        base, first, second = (model[n].double() for model, n in zip(models, (name, name, later)))
        inputs = [
            layer_inputs("llama", folder, (data, "text", "text"), 64)[n.removesuffix(".weight")]
            for folder, data, n in zip(llama.tuned, llama.data, (name, later))
        ]
        change = closed_form([first - base, second - base], inputs, (1.0, 1.0), 1.0)
        assert distance(written[name] - base, change) < 1e-4, name
        checked += 1
    assert checked == 14


def test_plan_tells_it_beforehand(llama, tmp_path, cache):
    config = write_config(regmean_config(llama, unpurified(llama)), tmp_path / "config.yml")
    forget_checkpoints()
    told = CliRunner().invoke(main, ["plan", str(config)])
    assert told.exit_code == 0, told.output
    assert told.stdout.startswith("21 of 30 tensors will be merged by regmean in closed form.\n")
    assert "\nMerged as task_arithmetic does: 7 not the weight of a linear layer, 2 vocabulary.\n" in told.stdout
    assert told.stdout.count("to do: about") == 2 and not cache.exists()
    assert not any(words in told.stdout for words in ("decomposition", "to be purified (", "to be merged as they are"))
    found = json.loads(CliRunner().invoke(main, ["plan", str(config), "--json"]).stdout)["regmean"]
    assert found["closed_form"] == 21 and found["as_task_arithmetic"]["lm_head.weight"] == "vocabulary"
    forget_checkpoints()
    done = CliRunner().invoke(main, ["calibrate", str(config)])
    assert done.exit_code == 0 and "Covariances for 21 tensors that regmean merges are in the cache." in done.stdout
    assert "weights ready" not in done.stdout, "nothing is purified"
    assert len(list((cache / "covariance").rglob("manifest.json"))) == 2
    forget_checkpoints()
    told = CliRunner().invoke(main, ["plan", str(config)])
    assert told.stdout.count("calibration    there already") == 2, told.stdout


def test_a_plan_needs_a_block(llama, tmp_path, cache):
    """Not the merge, where no data is used: the message says so."""
    config = write_config(regmean_config(llama, parameters={"covariance": 0}), tmp_path / "config.yml")
    for what in ("plan", "calibrate", "report"):
        done = CliRunner().invoke(main, [what, str(config)])
        assert done.exit_code == 1 and "`pave:` block" in done.output and "regmean alone" in done.output, done.output


def test_layers_that_calibration_does_not_reach(llama, tmp_path, cache, monkeypatch):
    """They have no covariance, and are merged as task_arithmetic does."""
    from mergekit_pave.calibration.stored import StoredCovariances

    real = StoredCovariances._tokens
    hidden = "model.layers.1.mlp.up_proj"
    monkeypatch.setattr(StoredCovariances, "_tokens", lambda self, layer: 0 if layer == hidden else real(self, layer))
    config = regmean_config(llama, unpurified(llama))
    written = merge(config, tmp_path / "out")
    plain = as_task_arithmetic(config, tmp_path / "plain")
    assert torch.equal(written[f"{hidden}.weight"], plain[f"{hidden}.weight"])
    report = json.loads((tmp_path / "out" / "pave_report.json").read_text())["regmean"]
    assert report["as_task_arithmetic"][f"{hidden}.weight"].startswith("never called during calibration")
    assert len(report["closed_form"]) == 20


@pytest.mark.parametrize("reached", ["self_attn", "nothing"])
def test_most_of_a_model_that_is_not_reached(llama, tmp_path, cache, monkeypatch, caplog, reached):
    """Where it is only measured, a warning; where it is to be purified, an error, whose advice helps."""
    from mergekit_pave.calibration.stored import StoredCovariances

    real = StoredCovariances._tokens
    monkeypatch.setattr(StoredCovariances, "_tokens", lambda self, layer: real(self, layer) if reached in layer else 0)
    config = regmean_config(llama, unpurified(llama))
    with caplog.at_level(logging.WARNING, "mergekit_pave"):
        written = merge(config, tmp_path / "out")
    plain = as_task_arithmetic(config, tmp_path / "plain")
    missed = {name for name in written if llama.is_linear(name) and reached not in name}
    assert len(missed) == (9 if reached == "self_attn" else 21)
    assert all(torch.equal(written[name], plain[name]) for name in missed)
    report = json.loads((tmp_path / "out" / "pave_report.json").read_text())
    never = {name for name, why in report["regmean"]["as_task_arithmetic"].items() if why.startswith("never called")}
    assert never == missed and len(report["regmean"]["closed_form"]) == 21 - len(missed)
    found = [warning for warning in report["warnings"] if "21 of 21 weights of linear layers" in warning]
    assert len(found) == (reached == "nothing") and all(warning in caplog.text for warning in found)
    assert all(f"> {warning}." in (tmp_path / "out" / "README.md").read_text() for warning in found)
    if reached == "nothing":
        return
    result = invoke(regmean_config(llama, {}), tmp_path / "purified")
    assert result.exit_code == 1 and "9 of 21 layers to be purified" in result.output and "pave.exclude" in result.output
    assert invoke(regmean_config(llama, {"exclude": ["mlp"]}), tmp_path / "purified").exit_code == 0
    report = json.loads((tmp_path / "purified" / "pave_report.json").read_text())
    assert missed <= report["regmean"]["as_task_arithmetic"].keys()
    assert {row["tensor"] for row in report["purified"]} == {row["tensor"] for row in report["regmean"]["closed_form"]}


def spoilt(family, change):
    config = regmean_config(family, unpurified(family))
    change(config)
    return config


REFUSED = {
    "no-block": (lambda c: c.pop("pave"), ["`pave:`", "`covariance: 0`", "q_proj"]),
    "no-data": (lambda c: c["pave"]["models"][1].pop("data"), ["tuned1", "`data`", "`covariance: 0`"]),
    "no-data-for-some-tensors": (
        lambda c: (
            c["pave"]["models"][1].pop("data"),
            c.update(parameters={"covariance": [{"filter": "mlp", "value": 0.1}, {"value": 0}]}),
        ),
        ["tuned1", "mlp", "`covariance: 0.1`"],
    ),
    "share": (lambda c: c.update(parameters={"covariance": 1.2}), ["covariance", "0 to 1"]),
    "negative-weight": (lambda c: c["models"][0].update(parameters={"weight": -1}), ["weight", "-1"]),
    "no-weight": (
        lambda c: (c.pop("base_model"), [model.update(parameters={"weight": 0}) for model in c["models"]]),
        ["every model's weight is 0", "base_model"],
    ),
    "share-without-base": (
        lambda c: (c.pop("base_model"), c.update(parameters={"covariance": 0.5})),
        ["base_model", "covariance"],
    ),
    "lambda-without-base": (lambda c: (c.pop("base_model"), c.update(parameters={"lambda": 1.3})), ["base_model", "lambda"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(llama, tmp_path, cache, case):
    change, words = REFUSED[case]
    result = invoke(spoilt(llama, change), tmp_path / "out")
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    message = result.output[result.output.index("Error:") :]
    assert all(word in message for word in words), message
    assert not cache.exists() and not (tmp_path / "out").exists()


def test_other_methods_are_told_that_nothing_is_purified(llama, tmp_path, caplog):
    result = invoke(config_for(llama, unpurified(llama)), tmp_path / "out")
    assert result.exit_code == 0 and "changes nothing of this merge" in caplog.text
