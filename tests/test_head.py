"""The merge of language models' heads: its mathematics, and merges of real models."""

import json

import pytest
import torch
import transformers
from merging import config_for, entries, merge
from models import KINDS
from reference import _texts, weights

from mergekit_pave.cache import Artefact
from mergekit_pave.core import head


def draw(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("tied", [True, False])
def test_heads_are_merged_as_least_squares_would(tied):
    """Against one dense problem in all rows of the head together, solved by an SVD."""
    tokens, d = 12, 8
    base = draw(tokens, d) - 0.5
    heads, rows, targets = [], [], []
    for i in range(3):
        weight, inputs = base + draw(tokens, d, seed=i) - 0.5, (draw(40, d, seed=5 + i) - 0.3) @ draw(d, d, seed=8 + i)
        n, p = draw(tokens, seed=11 + i) + 0.1 if tied else None, draw(tokens, seed=14 + i) + 0.1
        p /= p.sum()
        heads.append(head.Head(0.5 + i, weight, inputs.T @ inputs, p, n))
        prior = torch.diag(((0.5 + i) * (head.PRIOR * p if n is None else n)).sqrt())
        # R^T R = diag(p) - p p^T
        values, vectors = torch.linalg.eigh(torch.diag(p) - p[:, None] @ p[None])
        root = values.clamp(min=0).sqrt()[:, None] * vectors.T * ((0.5 + i) * d) ** 0.5 / inputs.norm()
        # With vec row by row, vec(A E B^T) = (A kron B) vec(E).
        rows += [torch.kron(prior, torch.eye(d, dtype=torch.float64)), torch.kron(root, inputs)]
        targets += [(prior @ weight).flatten(), (root @ weight @ inputs.T).flatten()]
    expected = torch.linalg.lstsq(torch.cat(rows), torch.cat(targets)[:, None], driver="gelsd").solution.view(tokens, d)
    merged = head.merge_heads(base, heads)
    assert (merged - expected).norm() < 1e-3 * (expected - base).norm()
    assert torch.allclose(head.merge_heads(base, heads, 1.5).double(), base + 1.5 * (merged - base), rtol=0, atol=1e-5)


def test_what_one_model_alone_predicts_is_kept():
    base, weight, inputs = draw(30, 8), draw(30, 8, seed=1), draw(50, 8, seed=2)
    p = head.predictions(weight, inputs) / 50
    merged = head.merge_heads(base, [head.Head(1.0, weight, inputs.T @ inputs, p, p)])
    assert (merged - weight).norm() < 1e-3 * (weight - base).norm()


def test_predictions_are_sums_of_softmax():
    weight, rows = draw(40, 16), draw(700, 16, seed=1)
    expected = (rows @ weight.T).softmax(dim=1).sum(dim=0)
    assert torch.allclose(head.predictions(weight.float(), rows.float()), expected, rtol=1e-5)


@pytest.mark.parametrize("method", ["task_arithmetic", "regmean"])
@pytest.mark.parametrize(("kind", "tensor"), [("llama", "lm_head.weight"), ("gpt2", "transformer.wte.weight")])
def test_a_merge_fits_the_head(families, kind, tensor, method, tmp_path, cache):
    """With moments and predictions that whole models have in float64. GPT-2's head is tied with its embedding."""
    family, shares = families[kind], (0.3, 0.6)
    pave = {"purify": False, "models": entries(family)} | ({} if method == "regmean" else {"vocabulary": "fit"})
    written = merge(config_for(family, pave, weight=shares, merge_method=method), tmp_path / "merged")
    heads = []
    for share, folder, path in zip(shares, family.tuned, family.data):
        model = getattr(transformers, KINDS[kind].model).from_pretrained(folder, dtype=torch.float64).eval()
        rows, tokens = [], []
        with torch.no_grad():
            for sample in _texts((path, "text", "text"), folder, 64):
                result = model(**sample, output_hidden_states=True)
                rows.append((result.hidden_states[-1][0], result.logits[0].softmax(dim=1)))
                tokens += sample["input_ids"][0].tolist()
        inputs, predicted = map(torch.cat, zip(*rows))
        counts = torch.tensor(tokens).bincount(minlength=len(model.lm_head.weight)) + 1.0
        tied = counts / counts.sum() if kind == "gpt2" else None
        heads.append(head.Head(share, model.lm_head.weight.detach(), inputs.T @ inputs, predicted.mean(dim=0), tied))
    base = weights(family.base)[tensor]
    expected = head.merge_heads(base, heads)
    assert (written[tensor] - expected).norm() < 1e-3 * (expected - base).norm()
    measured = list((tmp_path / "cache/covariance").glob("[!.]*"))
    layers = [len(Artefact(folder).read_manifest()["layers"]) for folder in measured]
    assert layers == ([1, 1] if method == "task_arithmetic" else [len(family_linears(family)) + 1] * 2)


def family_linears(family):
    return [tensor for tensor in weights(family.base) if family.is_linear(tensor)]


def test_covariances_without_a_head_leave_it_to_counts(llama, tmp_path, cache):
    """Such as an older version has measured."""
    config = config_for(llama, {"purify": False, "models": entries(llama)}, merge_method="regmean")
    merge(config, tmp_path / "first")
    for folder in (tmp_path / "cache/covariance").glob("[!.]*"):
        artefact = Artefact(folder)
        manifest = artefact.read_manifest()
        del manifest["layers"][manifest.pop("head")["layer"]]
        artefact.complete(manifest)
        entry = next(entry for entry in config["pave"]["models"] if entry["model"] == manifest["model"])
        del entry["data"]
        entry["covariance"] = str(folder)
    merge(config, tmp_path / "second")
    report = json.loads((tmp_path / "second/pave_report.json").read_text())
    ways = {row["tensor"]: row["by"] for row in report["vocabulary"]["merged"]}
    assert ways == {"model.embed_tokens.weight": "counts", "lm_head.weight": "counts"}
