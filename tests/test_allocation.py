"""Rank allocation against method.md's words written out naively, with exact fractions."""

import random
from fractions import Fraction

import pytest

from mergekit_pave.core.allocation import allocate_ranks, fair_share, most_dropped


def naive(tails, shares, caps):
    """Look at every value that may still be dropped, drop the smallest, and begin again until the budget is spent."""
    dropped = [0 for _ in tails]
    for _ in range(sum(shares)):
        candidates = [(tails[model][dropped[model]], model) for model in range(len(tails)) if dropped[model] < caps[model]]
        smallest = min(value for value, _ in candidates)
        dropped[next(model for value, model in candidates if value == smallest)] += 1
    return dropped


@pytest.mark.parametrize("seed", range(200))
def test_random_merges_agree_with_the_words(seed):
    rng = random.Random(seed)
    models = rng.randint(1, 9)
    components = rng.randint(2, 60)
    # Few distinct values, so that ties are frequent within a model and between models.
    grid = rng.choice([3, 10, 10**6])
    tails = [sorted(rng.randint(0, grid) / grid for _ in range(components)) for _ in range(models)]
    shares = [fair_share(components, rng.choice([0.3, 0.5, 0.875, 0.984, 1.0])) for _ in range(models)]
    caps = [most_dropped(components, share) for share in shares]
    dropped = allocate_ranks(tails, shares, caps)
    assert dropped == naive(tails, shares, caps)
    assert sum(dropped) == sum(shares)
    assert all(0 <= drop <= cap < components for drop, cap in zip(dropped, caps))


@pytest.mark.parametrize("seed", range(20))
def test_no_swap_between_two_models_drops_a_smaller_value(seed):
    """What the greedy choice is for: nothing kept is smaller than something dropped, unless its model is at its cap."""
    rng = random.Random(seed)
    tails = [sorted(rng.random() ** rng.randint(1, 6) for _ in range(40)) for _ in range(5)]
    shares, caps = [10] * 5, [15] * 5
    dropped = allocate_ranks(tails, shares, caps)
    largest_dropped = max(tail[drop - 1] for tail, drop in zip(tails, dropped) if drop)
    assert all(tail[drop] >= largest_dropped for tail, drop, cap in zip(tails, dropped, caps) if drop < cap)


def test_the_flatter_spectrum_loses_less_but_not_more_than_half_as_much_again():
    low, high = [0.001 * i for i in range(30)], [0.5 + 0.001 * i for i in range(30)]
    assert allocate_ranks([low, high], [10, 10], [15, 15]) == [15, 5]
    assert allocate_ranks([high, low], [10, 10], [15, 15]) == [5, 15]
    assert allocate_ranks([high, low, high], [10, 10, 10], [15, 15, 15]) == [8, 15, 7]


def test_on_a_tie_the_earlier_model_loses_first():
    same = [0.1] * 20
    assert allocate_ranks([same, same], [5, 5], [8, 8]) == [8, 2]
    assert allocate_ranks([[0.1, 0.3], [0.1, 0.2]], [1, 0], [1, 1]) == [1, 0]
    assert allocate_ranks([[0.1, 0.3], [0.1, 0.2]], [1, 1], [2, 2]) == [1, 1]
    assert allocate_ranks([[0.1, 0.2], [0.1, 0.2]], [2, 1], [2, 2]) == [2, 1]


def test_uniform_allocation_is_a_cap_at_the_fair_share():
    rng = random.Random(0)
    tails = [sorted(rng.random() for _ in range(40)) for _ in range(4)]
    for shares in ([6, 6, 6, 6], [3, 0, 11, 39]):
        assert allocate_ranks(tails, shares, caps=shares) == shares


@pytest.mark.parametrize("share", [1, 5, 19])
def test_a_single_model_loses_its_fair_share(share):
    tail = [i / 100 for i in range(40)]
    assert allocate_ranks([tail], [share], [share]) == [share]
    assert allocate_ranks([tail], [share], [most_dropped(40, share)]) == [share]


def test_models_with_nothing_to_drop():
    assert allocate_ranks([], [], []) == []
    assert allocate_ranks([[0.5, 0.6], [0.1, 0.2]], [0, 0], [0, 0]) == [0, 0]
    # A model with rank_ratio 1 keeps everything, however small.
    assert allocate_ranks([[0.5, 0.6, 0.7], [0.0, 0.0, 0.0]], [2, 0], [3, 0]) == [2, 0]


def test_only_the_values_up_to_the_cap_are_needed():
    """A tail is computed and cached only up to its cap."""
    assert allocate_ranks([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], [2, 2], [3, 3]) == [3, 1]


def test_values_beyond_a_cap_are_ignored():
    assert allocate_ranks([[0.0] * 50, [0.9] * 50], [10, 10], [15, 15]) == [15, 5]


def test_unequal_shares_share_one_budget():
    low, high = [0.001 * i for i in range(40)], [0.5 + 0.001 * i for i in range(40)]
    assert allocate_ranks([low, high], [4, 20], [6, 30]) == [6, 18]
    assert allocate_ranks([high, low], [4, 20], [6, 30]) == [0, 24]


@pytest.mark.parametrize("ratio", [0.001, 0.3, 0.5, 0.875, 0.96875, 0.984, 0.984375, 0.99829, 0.99878, 1.0])
@pytest.mark.parametrize("components", [1, 2, 3, 22, 768, 2048, 4096])
def test_the_fair_share_is_what_a_rounded_rank_leaves(components, ratio):
    rank = components - fair_share(components, ratio)
    assert 1 <= rank <= components
    exact = Fraction(components) * Fraction(str(ratio))
    assert abs(rank - exact) <= Fraction(1, 2) or rank == 1
    # Half a component goes to the even neighbour, as Python rounds.
    assert [fair_share(n, 0.5) for n in (3, 5, 7)] == [1, 3, 3]


def test_the_papers_settings():
    assert fair_share(768, 0.875) == 96
    assert fair_share(768, 0.984375) == 12
    assert fair_share(768, 0.96875) == 24
    assert fair_share(4096, 0.99829) == 7
    assert fair_share(4096, 1.0) == 0


def test_the_cap_is_half_as_much_again_and_leaves_one_component():
    assert [most_dropped(768, share) for share in (0, 1, 2, 3, 12, 96)] == [0, 2, 3, 4, 18, 144]
    assert [most_dropped(10, share) for share in (6, 7, 9)] == [9, 9, 9]
    assert most_dropped(1, 0) == 0
    assert most_dropped(2, 1) == 1
