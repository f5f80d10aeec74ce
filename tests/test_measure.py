"""The figures of the page: spectra, covariances and interference against NumPy, and where a tensor lies by its name."""

import numpy as np
import pytest
import torch

from mergekit_pave.core.covariance import Covariance
from mergekit_pave.report.page import measure
from mergekit_pave.report.page.measure import condition, effective_rank, interference, pair_mean, spectrum
from mergekit_pave.report.places import Place, grids, place, short, short_models, spread


def inputs(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    """Rows of which some directions are far larger than others."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    return rows * torch.logspace(0, -3, width, dtype=torch.float64)


def moment(rows: torch.Tensor) -> np.ndarray:
    x = rows.numpy()
    return x.T @ x / len(x)


@pytest.mark.parametrize("shape", [(12, 20), (30, 20), (20, 20)])
@pytest.mark.parametrize("tokens", [7, 300])
def test_spectrum(shape, tokens):
    rows = inputs(tokens, shape[1])
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = spectrum(weight, Covariance.from_rows(rows), 0.01)
    wanted = np.linalg.svd(weight.double().numpy() @ (moment(rows) + 0.01 * np.eye(shape[1])), compute_uv=False)
    assert found.shape == (min(shape),)
    np.testing.assert_allclose(found, wanted, rtol=1e-8)


@pytest.mark.parametrize("tokens", [7, 20, 300])
def test_effective_rank_and_condition(tokens):
    rows = inputs(tokens, 20)
    covariance = Covariance.from_rows(rows)
    values = np.linalg.eigvalsh(moment(rows))
    assert effective_rank(covariance) == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-9)
    shifted = np.linalg.eigvalsh(moment(rows) + 1e-3 * np.eye(20))
    assert condition(covariance, 1e-3) == pytest.approx(shifted[-1] / shifted[0], rel=1e-4)


def test_effective_rank_counts_equal_directions():
    rows = torch.zeros(6, 9, dtype=torch.float64)
    rows[torch.arange(6), torch.tensor([0, 1, 2, 0, 1, 2])] = 5
    assert effective_rank(Covariance.from_rows(rows)) == pytest.approx(3)


@pytest.mark.parametrize("width", [1, 2, 3])
def test_condition_of_the_smallest_inputs(width):
    rows = inputs(50, width)
    values = np.linalg.eigvalsh(moment(rows) + 0.1 * np.eye(width))
    assert condition(Covariance.from_rows(rows), 0.1) == pytest.approx(values[-1] / values[0], rel=1e-6)


def test_condition_where_rounding_has_made_c_indefinite():
    """C has no eigenvalue below zero, whatever its sum says."""
    rows = inputs(50, 20)
    gram = rows.T @ rows
    values, vectors = torch.linalg.eigh(gram)
    values[0] = -1.0
    rounded = Covariance(50, gram=vectors * values @ vectors.T)
    found = condition(rounded, 1e-6)
    assert found == pytest.approx((values[-1].item() / 50 + 1e-6) / 1e-6, rel=1e-4)


@pytest.mark.parametrize("block", [7, 1 << 20])
def test_interference(monkeypatch, block):
    monkeypatch.setattr(measure, "_BLOCK", block)
    generator = torch.Generator().manual_seed(2)
    vectors = [torch.randn(5, 9, generator=generator) for _ in range(3)]
    vectors[1][0] = 0  # has no sign
    vectors[2] += vectors[0]
    found = interference(vectors)
    flat = [vector.double().numpy().ravel() for vector in vectors]
    for i in range(3):
        for j in range(3):
            cosine = flat[i] @ flat[j] / np.linalg.norm(flat[i]) / np.linalg.norm(flat[j])
            assert found.cosines()[i, j] == pytest.approx(cosine, abs=1e-6)
            assert found.sign_conflicts()[i, j] == pytest.approx(np.mean(flat[i] * flat[j] < 0))
    assert pair_mean(found.cosines()) == pytest.approx(np.mean([found.cosines()[i, j] for i, j in ((0, 1), (0, 2), (1, 2))]))


def test_interference_adds_up():
    vectors = [torch.randn(40, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    total = interference([v[:13] for v in vectors]) + interference([v[13:] for v in vectors])
    whole = interference(vectors)
    np.testing.assert_allclose(total.cosines(), whole.cosines())
    np.testing.assert_allclose(total.sign_conflicts(), whole.sign_conflicts())


def test_a_task_vector_of_zeros_is_at_right_angles_to_all():
    found = interference([torch.zeros(4), torch.ones(4)])
    assert found.cosines()[0, 1] == 0 and found.sign_conflicts()[0, 1] == 0


@pytest.mark.parametrize(
    "tensor, wanted",
    [
        ("model.layers.11.self_attn.q_proj.weight", Place("model.layers", 11, "self_attn.q_proj")),
        ("h.0.attn.c_attn.weight", Place("h", 0, "attn.c_attn")),
        ("encoder.block.2.layer.0.SelfAttention.q.weight", Place("encoder.block", 2, "layer.0.SelfAttention.q")),
        ("model.layers.3.mlp.experts.17.up_proj.weight", Place("model.layers", 3, "mlp.experts.*.up_proj")),
        ("model.layers.3.mlp.experts.gate_up_proj", Place("model.layers", 3, "mlp.experts.gate_up_proj")),
        ("embeddings_project.weight", Place("", 0, "embeddings_project")),
    ],
)
def test_places(tensor, wanted):
    assert place(tensor) == wanted


def test_short_names_stay_apart():
    assert list(short(["self_attn.q_proj", "mlp.up_proj"]).values()) == ["q_proj", "up_proj"]
    assert list(short(["attention.output.dense", "output.dense"]).values()) == ["attention.output.dense", "output.dense"]
    assert short_models(["./a/math/", "b/code"]) == {"./a/math/": "math", "b/code": "code"}
    assert list(short_models(["a/7b", "b/7b"]).values()) == ["a/7b", "b/7b"]


def test_grids_average_experts_and_know_what_is_not_there():
    def row(output, model, kept):
        return {"output": output, "model": model, "kept": kept}

    rows = [
        row("layers.0.experts.0.w", "a", 1),
        row("layers.0.experts.1.w", "a", 3),
        row("layers.2.experts.0.w", "b", 5),
        row("tower.0.w", "a", 7),
    ]
    first, second = grids(rows, lambda row: row["kept"])
    assert (first.stack, first.projections, first.layers) == ("layers", ["experts.*.w"], [0, 2])
    np.testing.assert_array_equal(first.values["a"], [[2, np.nan]])
    np.testing.assert_array_equal(first.values["b"], [[np.nan, 5]])
    assert second.stack == "tower" and np.isnan(second.values["b"]).all()


def test_layers_that_are_looked_at_closely():
    costs = {layer: 10.0 for layer in range(80)}
    assert spread(costs, 3, 1000) == [0, 40, 79]
    assert spread(costs, 3, 25) == [0, 79]
    assert spread(costs, 3, 15) == [40]
    assert spread(costs, 3, 1) == []
    assert spread({4: 1.0}, 3, 10) == [4]
    assert len(set(spread(costs, 16, 1000))) == 16
