"""`pave.refine`: its mathematics against least squares written from the definition, and merges of real models.

The reference runs whole models in float64, once for each group of layers, and solves stacked rows of least squares by an SVD:
no sums over batches, no normal equations, no inverse.
"""

import json

import pytest
import torch
import transformers
from merging import config_for, entries, merge
from models import KINDS
from reference import _texts, weights

from mergekit_pave.core import refine

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
