"""How far what one model gives is from what another gives: predictions by their KL divergence, features by their angle.

Of a large vocabulary only the most likely tokens of the model that is compared with are kept, and the mass of the rest as one.
That can only make a divergence smaller.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_LEAST = 1e-12  # mass of the rest, below which float32 knows nothing


class Top(NamedTuple):
    """The most likely classes at n places, the most likely one first.

    Attributes:
        classes: their numbers, (n, k) int32.
        logs: their log-probabilities, (n, k) float32.
    """

    classes: Tensor
    logs: Tensor


def top(logs: Tensor, count: int) -> Top:
    """The `count` most likely classes, of log-probabilities (n, classes)."""
    found = logs.topk(min(count, logs.shape[1]), dim=1)
    return Top(found.indices.int(), found.values.float())


def divergence(of: Top, logs: Tensor) -> Tensor:
    """KL(p‖q) at each place, (n,) float64, in nats.

    Args:
        of: the most likely classes of p.
        logs: log-probabilities of q, (n, classes). If q has fewer classes than p, the others are part of the rest.
    """
    known = of.classes < logs.shape[1]
    p = torch.where(known, of.logs.double(), -torch.inf)
    q = logs.gather(1, of.classes.long().clamp(max=logs.shape[1] - 1)).double()
    mass = p.exp()
    terms = torch.where(mass > 0, mass * (p - q), 0.0)
    rest = 1 - mass.sum(dim=1)
    rest = torch.where(rest > _LEAST, rest, 0.0)
    of_other = (1 - torch.where(known, q.exp(), 0.0).sum(dim=1)).clamp(min=_LEAST)
    return terms.sum(dim=1) + torch.special.xlogy(rest, rest / of_other)


def angular_distance(one: Tensor, other: Tensor) -> Tensor:
    """1 - cosine of the features of each row, (n,) float64. Each model's features are centred over the rows first.

    Args:
        one, other: (n, d).
    """
    centred = [features.double() - features.double().mean(dim=0) for features in (one, other)]
    return 1 - torch.nn.functional.cosine_similarity(*centred, dim=1)
