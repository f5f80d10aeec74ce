"""KL divergence from some of the classes: exact where all are kept, right on average where others are drawn."""

import pytest
import torch

from mergekit_pave.core.likeness import divergence, sketch


def predictions(places: int, classes: int, seed: int, spread: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(places, classes, generator=generator)).log_softmax(dim=1)


def exact(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    p, q = p.double(), q.double()
    return (p.exp() * (p - q)).sum(dim=1)


def test_it_is_exact_where_all_classes_are_kept():
    p, q = predictions(20, 50, seed=0), predictions(20, 50, seed=1)
    kept = sketch(p, 50, 8, seed=0)
    assert kept.drawn.shape == (20, 0)
    assert divergence(kept, q).tolist() == pytest.approx(exact(p, q).tolist(), rel=1e-5)


@pytest.mark.parametrize("spread", [0.3, 2.0])
def test_a_few_drawn_classes_stand_for_all_others(spread):
    p, q = predictions(4000, 500, 0, spread), predictions(4000, 500, 1, spread)
    errors = divergence(sketch(p, 24, 8, seed=0), q) - exact(p, q)
    assert abs(errors.mean().item()) < 3 * errors.std().item() / 4000**0.5
    assert abs(errors.sum().item()) < 0.02 * exact(p, q).sum().item()


def test_a_model_is_at_no_distance_from_itself():
    p = predictions(50, 500, seed=0)
    assert divergence(sketch(p, 24, 8, seed=0), p).abs().max() < 1e-6


def test_what_the_other_model_has_no_class_for_stays_finite():
    p, q = predictions(50, 500, seed=0), predictions(50, 400, seed=1)
    found = divergence(sketch(p, 24, 8, seed=0), q)
    assert found.isfinite().all() and (found > 0).all()


def test_classes_that_cannot_be_are_not_drawn():
    p, q = predictions(50, 500, seed=0), predictions(50, 500, seed=1)
    p = p.masked_fill(torch.arange(500) >= 100, -torch.inf).log_softmax(dim=1)
    kept = sketch(p, 24, 8, seed=0)
    assert kept.drawn.max() < 100 and divergence(kept, q).isfinite().all()
