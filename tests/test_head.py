"""The merge of language models' heads: its mathematics, and merges of real models."""

import pytest
import torch

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
