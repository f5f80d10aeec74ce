"""Ranks across the models that are merged into one tensor ("spectral rank allocation", PAVE section 3.3)."""

import heapq
import math
from collections.abc import Sequence


def fair_share(components: int, rank_ratio: float) -> int:
    """How many of n components a model drops where all models drop equally many: n - max(1, round(n * ratio))."""
    return components - max(1, round(components * rank_ratio))


def most_dropped(components: int, share: int) -> int:
    """The most components that spectral allocation may take from one model: 1.5 times its fair share."""
    return min(components - 1, round(1.5 * share))


def allocate_ranks(tails: Sequence[Sequence[float]], shares: Sequence[int], caps: Sequence[int]) -> list[int]:
    """How many components each model drops, by spectral allocation.

    The smallest normalised singular value of all models is dropped, again and again, until as many are dropped as the fair
    shares add up to. Of equal values that of the earlier model is dropped first.

    Args:
        tails: per model, its smallest singular values of W C divided by its largest one, in ascending
            order; at least `caps[i]` of them.
        shares: per model, its fair share of drops (see `fair_share`).
        caps: per model, the most that it may drop (see `most_dropped`).

    Returns:
        The number of dropped components per model; they sum to `sum(shares)`.

    Raises:
        ValueError: the three arguments do not fit each other, or a value is not finite.
    """
    if not len(tails) == len(shares) == len(caps):
        raise ValueError(
            f"there must be one of each per model, not {len(tails)} tails, {len(shares)} shares and {len(caps)} caps"
        )
    if sum(shares) > sum(caps):
        raise ValueError(f"the shares {list(shares)} add up to more than the caps {list(caps)}")
    if short := [model for model, tail in enumerate(tails) if len(tail) < caps[model]]:
        raise ValueError(f"the tail of model {short[0]} has {len(tails[short[0]])} values, fewer than its cap {caps[short[0]]}")
    if not_finite := [model for model, tail in enumerate(tails) if not all(map(math.isfinite, tail))]:
        raise ValueError(f"the tail of model {not_finite[0]} has values that are not finite")
    dropped = [0] * len(tails)
    queue = [(tail[0], model) for model, tail in enumerate(tails) if caps[model] > 0]
    heapq.heapify(queue)
    for _ in range(sum(shares)):
        _, model = heapq.heappop(queue)
        dropped[model] += 1
        if dropped[model] < caps[model]:
            heapq.heappush(queue, (tails[model][dropped[model]], model))
    return dropped
