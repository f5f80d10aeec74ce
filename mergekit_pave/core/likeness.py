"""How far what one model gives is from what another gives: predictions by their KL divergence, features by their angle.

Of a large vocabulary only the most likely tokens of the model that is compared with are kept, and a few of the others that are
drawn as it would draw them. With the mass r of all others, their part of a divergence is r times the mean of log p - log q over
those that are drawn. That is right on average, and a row has many places.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_LEAST = 1e-12  # mass of the rest, below which float32 knows nothing


class Sketch(NamedTuple):
    """Some classes at n places: the most likely ones, the most likely one first, and some that are drawn from the others.

    Attributes:
        classes: numbers of the most likely ones, (n, k) int32.
        logs: their log-probabilities, (n, k) float32.
        drawn: numbers of those that are drawn, each as often as it is drawn, (n, m) int32; m is 0 if all classes are above.
        drawn_logs: their log-probabilities, (n, m) float32.
    """

    classes: Tensor
    logs: Tensor
    drawn: Tensor
    drawn_logs: Tensor


def sketch(logs: Tensor, count: int, drawn: int, seed: int) -> Sketch:
    """Of log-probabilities (n, classes): all, or the most likely ones and `drawn` others, `count` in all."""
    classes = logs.shape[1]
    found = logs.topk(classes if classes <= count else count - drawn, dim=1)
    others = torch.zeros(len(logs), 0, dtype=torch.int64, device=logs.device)
    if classes > count:
        # By numbers that are drawn on the CPU, so that every device draws the same, also one without a generator.
        reached = logs.float().exp().scatter(1, found.indices, 0.0).cumsum(dim=1)
        numbers = torch.rand(len(logs), drawn, generator=torch.Generator().manual_seed(seed)).to(logs.device)
        others = torch.searchsorted(reached, numbers * reached[:, -1:], right=True).clamp(max=classes - 1)
    return Sketch(found.indices.int(), found.values.float(), others.int(), logs.gather(1, others).float())


def divergence(of: Sketch, logs: Tensor) -> Tensor:
    """KL(p‖q) at each place, (n,) float64, in nats. If there are drawn classes it may be a little below zero.

    Args:
        of: of p.
        logs: log-probabilities of q, (n, classes). What classes of p weigh that q does not have is compared with the mass of
            those that p does not have kept.
    """
    p, q, known = _pairs(of.classes, of.logs, logs)
    mass = p.exp()
    terms = torch.where(mass > 0, mass * (p - q), 0.0)
    rest = 1 - mass.sum(dim=1)
    rest = torch.where(rest > _LEAST, rest, 0.0)
    of_other = (1 - torch.where(known, q.exp(), 0.0).sum(dim=1)).clamp(min=_LEAST)
    part = torch.special.xlogy(rest, rest / of_other)
    if of.drawn.shape[1]:
        p, q, drawn_known = _pairs(of.drawn, of.drawn_logs, logs)
        by_draw = rest * torch.where(p > -torch.inf, p - q, 0.0).mean(dim=1)
        part = torch.where(known.all(dim=1) & drawn_known.all(dim=1), by_draw, part)
    return terms.sum(dim=1) + part


def _pairs(classes: Tensor, p: Tensor, logs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of p, 0 in probability where q does not know a class, those of q, and which classes q knows."""
    known = classes < logs.shape[1]
    q = logs.gather(1, classes.long().clamp(max=logs.shape[1] - 1)).double()
    return torch.where(known, p.double(), -torch.inf), q, known


def angular_distance(one: Tensor, other: Tensor) -> Tensor:
    """1 - cosine of the features of each row, (n,) float64. Each model's features are centred over the rows first.

    Args:
        one, other: (n, d).
    """
    centred = [features.double() - features.double().mean(dim=0) for features in (one, other)]
    return 1 - torch.nn.functional.cosine_similarity(*centred, dim=1)
