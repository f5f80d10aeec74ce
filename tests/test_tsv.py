"""`merge_method: tsv` against the paper's definition, written with SciPy's SVD and polar decomposition."""

import math
import weakref

import numpy as np
import pytest
import scipy.linalg
import torch
from commands import command
from mergekit.merge_methods import merge_state_dicts
from merging import config_for, invoke, invoke_multi, merge, write_config
from reference import weights
from test_experts import family_of  # noqa: F401

from mergekit_pave import PaveError
from mergekit_pave.methods import tsv


def by_definition(changes):
    """The merged change, where all changes have full rank and no two tasks the same singular vectors."""
    keep = min(changes[0].shape) // len(changes)
    parts = [scipy.linalg.svd(change.double().numpy(), full_matrices=False) for change in changes]
    left = np.hstack([u[:, :keep] for u, _, _ in parts])
    values = np.concatenate([s[:keep] for _, s, _ in parts])
    right = np.hstack([vt[:keep].T for _, _, vt in parts])
    u, v = scipy.linalg.polar(left)[0], scipy.linalg.polar(right)[0]
    return torch.from_numpy(u @ np.diag(values) @ v.T)


def distance(found, exact):
    return ((found - exact).norm() / exact.norm()).item()


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("models", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (30, 30)])
def test_it_is_the_definition(models, shape):
    changes = [draw(*shape, seed=i) for i in range(models)]
    merged = tsv.merge_changes(changes, models)
    assert distance(merged, by_definition(changes)) < 1e-10
    # The values of each task survive, and its vectors are orthogonal to those of the others.
    keep = min(shape) // models
    values = torch.cat([torch.linalg.svdvals(change)[:keep] for change in changes]).sort(descending=True).values
    assert torch.allclose(torch.linalg.svdvals(merged)[: len(values)], values, rtol=1e-9)


def test_transposition_is_nothing():
    """GPT-2 stores its matrices the other way round."""
    changes = [draw(24, 40, seed=i) for i in range(3)]
    assert distance(tsv.merge_changes([change.T for change in changes], 3).T, tsv.merge_changes(changes, 3)) < 1e-10


def test_tasks_that_are_all_the_same():
    """Their vectors span no more than those of one: that one's leading part is what is left, not what an SVD makes up."""
    change = draw(24, 40)
    u, s, vt = torch.linalg.svd(change, full_matrices=False)
    assert distance(tsv.merge_changes([change, change.clone()], 2), u[:, :12] * s[:12] @ vt[:12]) < 1e-10


def test_changes_without_full_rank():
    """Vectors of singular values that are zero are arbitrary; they must not push aside those of other tasks."""
    low = [draw(24, 2, seed=i) @ draw(2, 40, seed=9 + i) for i in range(2)]
    parts = [torch.linalg.svd(change, full_matrices=False) for change in low]
    u = scipy.linalg.polar(torch.cat([u[:, :2] for u, _, _ in parts], dim=1).numpy())[0]
    v = scipy.linalg.polar(torch.cat([vt[:2].T for _, _, vt in parts], dim=1).numpy())[0]
    values = np.concatenate([s[:2] for _, s, _ in parts])
    assert distance(tsv.merge_changes(low, 2), torch.from_numpy(u * values @ v.T)) < 1e-10
    full = draw(24, 40, seed=3)
    u, s, vt = torch.linalg.svd(full, full_matrices=False)
    assert distance(tsv.merge_changes([full, torch.zeros_like(full)], 2), u[:, :12] * s[:12] @ vt[:12]) < 1e-10
    assert not tsv.merge_changes([torch.zeros(3, 4, dtype=torch.float64)] * 2, 2).any()


def test_why_it_is_float64():
    """Of two tasks whose leading vectors are a thousandth apart float32 loses what float32 weights can hold."""
    first = draw(64, 96, seed=1)
    second = first + 1e-3 * draw(64, 96, seed=2)
    exact = by_definition([first, second])
    assert distance(tsv.merge_changes([first, second], 2), exact) < 1e-8
    parts = [torch.linalg.svd(change.float(), full_matrices=False) for change in (first, second)]
    sides = [torch.cat(side, dim=1) for side in ([u[:, :32] for u, _, _ in parts], [vt[:32].T for _, _, vt in parts])]
    left, right = (u @ vt for u, _, vt in (torch.linalg.svd(side, full_matrices=False) for side in sides))
    assert distance(left * torch.cat([s[:32] for _, s, _ in parts]) @ right.T, exact) > 1e-5


@pytest.fixture
def decompositions(monkeypatch):
    """The shapes of what is decomposed by SVD, each time."""
    shapes, svd = [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda a, **given: (shapes.append(tuple(a.shape)), svd(a, **given))[1])
    return shapes


def with_values(values, d_out, d_in, seed):
    """A matrix with these singular values."""
    left, right = (torch.linalg.qr(draw(size, len(values), seed=seed + i)).Q for i, size in enumerate((d_out, d_in)))
    return left * values @ right.mT


@pytest.mark.parametrize("shape", [(150, 150), (120, 300), (300, 120)])
@pytest.mark.parametrize("models", [2, 3, 8])
def test_no_svd_is_needed(decompositions, shape, models):
    """Changes as fine-tuning makes them: a few large values, and noise. Others that are anything but well-conditioned."""
    noisy = [draw(*shape, seed=i) + draw(shape[0], 9, seed=20 + i) @ draw(9, shape[1], seed=40 + i) for i in range(models)]
    decaying = [with_values(torch.logspace(0, -7, min(shape), dtype=torch.float64), *shape, seed=2 * i) for i in range(models)]
    for changes in (noisy, decaying):
        merged = tsv.merge_changes(changes, models)
        assert not decompositions
        assert distance(merged, by_definition(changes)) < 1e-8


def test_a_low_rank_change_that_has_been_rounded(decompositions):
    """A LoRA adapter that was merged into float32 weights: the cut lies in noise a millionth as large as the change."""
    changes = [draw(96, 8, seed=i) @ draw(8, 160, seed=10 + i) + 1e-6 * draw(96, 160, seed=20 + i) for i in range(2)]
    assert distance(tsv.merge_changes(changes, 2), by_definition(changes)) < 1e-6
    assert (96, 160) not in decompositions


@pytest.mark.parametrize("shape", [(64, 64), (64, 96), (96, 64)])
@pytest.mark.parametrize("apart", [1e-3, 1e-5])
def test_tasks_that_are_nearly_the_same(decompositions, shape, apart):
    """Then the Gram matrix of their vectors is too ill-conditioned, and the vectors themselves are decomposed."""
    first = draw(*shape, seed=1)
    changes = [first, first + apart * draw(*shape, seed=2)]
    assert distance(tsv.merge_changes(changes, 2), by_definition(changes)) < 1e-6
    assert 1 <= len(decompositions) <= 2


def test_values_that_coincide():
    """Where all values are equal any half of the vectors is a leading one. What is merged has no other values."""
    changes = [with_values(torch.ones(40, dtype=torch.float64), 40, 60, seed=2 * i) for i in range(2)]
    values = torch.linalg.svdvals(tsv.merge_changes(changes, 2))
    assert torch.allclose(values, values.round(), atol=1e-9) and 20 <= values.round().sum() <= 40


@pytest.mark.parametrize("scale", [1e-140, 1e-30, 1e30, 1e140])
def test_values_of_any_size(scale):
    changes = [draw(24, 40, seed=i) for i in range(2)]
    merged = tsv.merge_changes([scale * change for change in changes], 2)
    assert distance(merged / scale, by_definition(changes)) < 1e-9


def test_the_merged_change_of_one_model_is_its_own():
    change = draw(24, 5) @ draw(5, 40)
    assert torch.equal(tsv.merge_changes([change], 1), change)


def test_changes_are_taken_one_at_a_time():
    taken = []

    def take(i):
        assert all(other() is None for other in taken)
        taken.append(weakref.ref(change := draw(24, 40, seed=i)))
        return change

    merged = tsv.merge_changes(map(take, range(4)), 4)
    assert len(taken) == 4
    assert torch.equal(merged, tsv.merge_changes([draw(24, 40, seed=i) for i in range(4)], 4))


def test_more_models_than_directions():
    changes = [draw(2, 6, seed=i) for i in range(4)]
    assert tsv.merge_changes(changes, 4).isfinite().all()


def models_in_memory(count=3):
    shapes = {"a.weight": (24, 40), "mlp.experts.up": (3, 12, 20), "norm": (24,), "conv.weight": (6, 5, 3)}
    base = {name: draw(*shape, seed=50).float() for name, shape in shapes.items()}
    models = [{name: value + 0.1 * draw(*value.shape, seed=60 + i).float() for name, value in base.items()} for i in range(count)]
    return base, models


def test_state_dicts():
    """Matrices, and experts one by one; the changes of everything else are averaged."""
    base, models = models_in_memory()
    given = {"base": base} | dict(enumerate(models))
    found = merge_state_dicts(given, "tsv", base="base", parameters={"lambda": 1.3})
    change = {name: [(model[name] - base[name]).double() for model in models] for name in base}
    exact = {name: 1.3 * sum(own) / 3 for name, own in change.items()}
    exact["a.weight"] = 1.3 * by_definition(change["a.weight"])
    experts = zip(*change["mlp.experts.up"])
    exact["mlp.experts.up"] = 1.3 * torch.stack([by_definition(expert) for expert in experts])
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        assert distance(tensor - base[name], exact[name]) < 1e-5, name


def test_weights_multiply_changes():
    base, models = models_in_memory()
    given = {"base": base} | dict(enumerate(models))
    found = merge_state_dicts(given, "tsv", base="base", parameters={"weight": {0: 0.5, 1: 0.0, 2: -2.0}})
    for name in ("a.weight", "norm"):
        changes = [factor * (models[i][name] - base[name]).double() for i, factor in ((0, 0.5), (2, -2.0))]
        exact = by_definition(changes) if name == "a.weight" else sum(changes) / 2
        assert distance(found[name] - base[name], exact) < 1e-5, name
    nothing = merge_state_dicts(given, "tsv", base="base", parameters={"weight": 0.0})
    assert all(torch.equal(nothing[name], base[name]) for name in base)


def test_refusals():
    base, models = models_in_memory()
    with pytest.raises(ValueError, match="requires a base"):
        merge_state_dicts(models, "tsv")
    models[2]["a.weight"][3, 3] = math.inf
    with pytest.raises(PaveError, match=r"a\.weight of 3"):
        merge_state_dicts([base, *models], "tsv", base=0)


def expected(base, tuned, name, vocabulary):
    changes = [model[name].double() - base[name].double() for model in tuned]
    if changes[0].dim() == 2 and not vocabulary and not name.endswith("bias"):
        return by_definition(changes)
    if changes[0].dim() == 3:
        return torch.stack([by_definition(expert) for expert in zip(*changes)])
    return sum(changes) / len(changes)


@pytest.mark.parametrize("kind", ["llama", "gpt_oss"])
def test_real_models(families, family_of, tmp_path, kind):  # noqa: F811
    family = families[kind] if kind in families else family_of(kind)
    tuned = family.tuned[:2]
    config = config_for(family, models=2, merge_method="tsv", dtype="float64", parameters={"lambda": [0.5, 1.5]})
    for model in config["models"]:
        del model["parameters"]
    if kind == "llama":
        done = command("mergekit-yaml", write_config(config, tmp_path / "config.yml"), tmp_path / "out")
        assert done.returncode == 0, done.stderr
        written = weights(tmp_path / "out")
        assert "[TSV-Merge](https://arxiv.org/abs/2412.00081)" in (tmp_path / "out" / "README.md").read_text()
    else:
        written = merge(config, tmp_path / "out")
    base, models = weights(family.base), [weights(folder) for folder in tuned]
    layers = sum(name.endswith("input_layernorm.weight") for name in written)
    for name, tensor in written.items():
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        # mergekit resolves a gradient at its start outside the layers.
        scale = 0.5 + numbers[0] / (layers - 1) if numbers else 0.5
        exact = scale * expected(base, models, name, "embed" in name or "lm_head" in name)
        assert distance(tensor.double() - base[name].double(), exact) < 1e-6, name


@pytest.mark.parametrize("block", [{}, None])
def test_parameters_that_it_does_not_have_are_refused(llama, tmp_path, cache, block):
    config = config_for(llama, block, merge_method="tsv", parameters={"lamda": 0.3})
    with pytest.raises(PaveError, match="tsv: unknown parameter 'lamda'; did you mean 'lambda'"):
        merge(config, tmp_path / "out")
    assert not cache.exists()


def test_on_purified_weights_and_in_several_steps(llama, tmp_path, cache):
    config = config_for(llama, {"target": "task_vector"}, merge_method="tsv")
    result = invoke(config, tmp_path / "out")
    assert result.exit_code == 0, result.output
    plain = {key: value for key, value in config.items() if key != "pave"}
    without = merge(plain, tmp_path / "plain")
    written = weights(tmp_path / "out")
    assert all(llama.is_linear(name) != torch.equal(tensor, without[name]) for name, tensor in written.items())
    result = invoke_multi([config | {"name": "step"}, plain | {"base_model": "step"}], tmp_path / "multi")
    assert result.exit_code == 0, (result.output, result.exception)
    assert all(torch.equal(tensor, written[name]) for name, tensor in weights(tmp_path / "multi" / "step").items())
