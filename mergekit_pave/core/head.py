"""The vocabulary of a language model merged so that the head predicts what each model predicts on its own data.

A head has a row for each token, whose product with a last hidden state x is the token's score. To second order, the KL divergence
between the predictions of two heads is the variance, over the tokens that are expected, of what their scores differ by. With the
mean probability p_i(v) that model i gives to token v on its data, with C_i, the second moment of its last hidden states, and d,
their width, the merged head E minimises

    sum w_i ( sum_v n_i(v) ||E_v - E_i,v||^2 + d / tr(C_i) tr(D_i^T (diag(p_i) - p_i p_i^T) D_i C_i) ),    D_i = E - E_i.

n_i(v) is the (smoothed) share of v among the tokens of model i's data, for a head that is also the token embedding: an embedding
is a linear layer on one-hot inputs, see `core.vocabulary`. Any other head has n_i = `PRIOR` p_i instead. The minimum is found by
conjugate gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_pave.core.exact import float32_products

PRIOR = 0.1

_STEPS = 60
_TOLERANCE = 1e-4  # of the residual: what is left would be lost when the head is stored in 16 bits


@dataclass(frozen=True)
class Head:
    """One model's part in the merge of heads.

    Attributes:
        share: w_i >= 0.
        weight: E_i, (tokens, d).
        moment: C_i, or a multiple of it, (d, d).
        predicted: p_i, (tokens,), with sum 1.
        embedded: n_i, (tokens,); None for a head that is not the token embedding.
    """

    share: float
    weight: Tensor
    moment: Tensor
    predicted: Tensor
    embedded: Tensor | None = None


def predictions(weight: Tensor, rows: Tensor, bias: Tensor | None = None) -> Tensor:
    """The sum over rows of the softmax of their scores, (tokens,) float64.

    Args:
        weight: (tokens, d).
        rows: last hidden states, (n, d).
        bias: (tokens,).
    """
    total = torch.zeros(len(weight), dtype=torch.float64)
    for part in rows.split(256):
        total += torch.nn.functional.linear(part, weight, bias).float().softmax(dim=1).sum(dim=0).cpu()
    return total


def merge_heads(base: Tensor, heads: Sequence[Head], scale: float = 1.0) -> Tensor:
    """E_base + scale (E - E_base) with the E of the module's docstring, (tokens, d) float32.

    About six matrices of this size and type are in memory at a time.

    Args:
        base: E_base, (tokens, d): where the search starts.
        scale: what the merged change is multiplied by.
    """
    device, width = base.device, base.shape[1]
    parts, wanted = [], torch.zeros(base.shape, device=device)
    with float32_products(device):
        for head in heads:
            predicted = head.predicted.to(device, torch.float32)[:, None]
            embedded = PRIOR * predicted if head.embedded is None else head.embedded.to(device, torch.float32)[:, None]
            moment = (head.moment * (width / head.moment.diagonal().sum())).to(device, torch.float32)
            part = head.share, embedded, predicted, moment
            _add_product(wanted, head.weight.float() - base.float(), part)
            parts.append(part)
        change = _solve(parts, wanted)
    return change.mul_(scale).add_(base)


def _add_product(total: Tensor, x: Tensor, part: tuple[float, Tensor, Tensor, Tensor]) -> None:
    """Add w (diag(n) x + (diag(p) - p p^T) x C), for a part (w, n, p, C)."""
    share, embedded, predicted, moment = part
    total.addcmul_(x, embedded, value=share)
    scores = x @ moment
    total.addcmul_(scores.sub_(predicted.mT @ scores), predicted, value=share)


def _solve(parts: list[tuple[float, Tensor, Tensor, Tensor]], wanted: Tensor) -> Tensor:
    """x for which the sum of the parts' products is wanted. Overwrites wanted."""
    rows = sum(share * (embedded + predicted) for share, embedded, predicted, _ in parts)
    rows = rows.clamp(min=torch.finfo(torch.float32).tiny)  # the preconditioner
    x, residual, direction = torch.zeros_like(wanted), wanted, wanted / rows
    size = first = _dot(residual, direction)
    for _ in range(_STEPS):
        if not size > _TOLERANCE**2 * first:
            break
        product = torch.zeros_like(direction)
        for part in parts:
            _add_product(product, direction, part)
        step = size / _dot(direction, product)
        x.add_(direction, alpha=step)
        residual.sub_(product, alpha=step)
        del product
        before, size = size, _dot(residual, residual / rows)
        direction.mul_(size / before).addcdiv_(residual, rows)
    return x


def _dot(x: Tensor, y: Tensor) -> float:
    parts = [a @ b for a, b in zip(x.flatten().split(1 << 20), y.flatten().split(1 << 20))]
    return torch.stack(parts).cpu().double().sum().item()
