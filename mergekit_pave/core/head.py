"""Refining the head of a language model: a matrix with a row for each token, fitted row by row.

The score of token v is E_v x, with the last hidden state x. It matters for how likely v is where an expert expects it, so each
row has a metric of its own. With p_i(v) the mean probability that expert i gives to v, C_i = X_m X_m^T of the merged model's
last hidden states and d their width, row v minimises

    sum w_i ( n_i(v) ||E_v - E_i,v||^2 + p_i(v) ||E_v X_m - E_i,v X_e||^2 d / tr(C_i) ).

n_i(v) is the share of v in the tokens of expert i's data, for a head that is also the token embedding: an embedding is a linear
layer on one-hot inputs. Any other head has n_i = `PRIOR` p_i instead. The systems of a row and its neighbours have the same
few matrices in other mixtures, so they are solved together by conjugate gradients, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_pave.core.exact import float64_device
from mergekit_pave.core.refine import Inputs

PRIOR = 0.1

_ROWS = 4096  # that are solved together
_TOLERANCE = 1e-7
_STEPS = 200


@dataclass(frozen=True)
class ExpertHead:
    """One expert's part in the fit of a head.

    Attributes:
        share: w_i >= 0.
        weight: E_i, (tokens, d).
        embedded: n_i, (tokens,); None for a head that is not the token embedding.
        predicted: p_i, (tokens,).
    """

    share: float
    weight: Tensor
    inputs: Inputs
    embedded: Tensor | None
    predicted: Tensor


def probabilities(weight: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """The mean over rows of the softmax of their scores, (tokens,) float64.

    Args:
        weight: (tokens, d).
        rows: last hidden states by batch, (n, d) each; at least one row.
    """
    total = weight.new_zeros(len(weight), dtype=torch.float64)
    for batch in rows:
        for part in batch.split(256):
            total += (part.float() @ weight.float().mT).softmax(dim=1).sum(dim=0)
    return total / sum(map(len, rows))


def refine_head(anchor: Tensor, base: Tensor, experts: Sequence[ExpertHead], scale: float) -> Tensor:
    """E_base + scale (E - E_base) with the E of the module's docstring, (tokens, d) in the anchor's type.

    Args:
        anchor: what a merge method gave, (tokens, d): where the search starts.
        base: E_base, (tokens, d).
        scale: what the fitted change is multiplied by.
    """
    device, width = float64_device(anchor.device), anchor.shape[1]
    result = torch.empty_like(anchor)
    for start in range(0, len(anchor), _ROWS):
        rows = slice(start, start + _ROWS)
        first, of_base = (matrix[rows].to(device).double() for matrix in (anchor, base))
        parts, wanted = [], torch.zeros_like(first)
        for expert in experts:
            own = expert.weight[rows].to(device).double()
            predicted = expert.share * expert.predicted[rows, None].to(device)
            embedded = PRIOR * predicted if expert.embedded is None else expert.share * expert.embedded[rows, None].to(device)
            predicted = predicted * width
            wanted += embedded * (own - first) + predicted * (own @ expert.inputs.cross - first @ expert.inputs.square)
            parts.append((embedded, predicted, expert.inputs.square))
        fitted = first + _solve(parts, wanted)
        result[rows] = (of_base + scale * (fitted - of_base)).to(result.device, result.dtype)
    return result


def _solve(parts: list[tuple[Tensor, Tensor, Tensor]], wanted: Tensor) -> Tensor:
    """x with sum a_v x_v + b_v x_v C = wanted_v in each row v, for parts (a, b, C)."""

    def times(x: Tensor) -> Tensor:
        return sum(a * x + b * (x @ square) for a, b, square in parts)

    x, residual, direction = torch.zeros_like(wanted), wanted.clone(), wanted.clone()
    size = first = residual.square().sum(dim=1, keepdim=True)
    for _ in range(_STEPS):
        if not (size > _TOLERANCE**2 * first).any():
            break
        product = times(direction)
        step = size / (direction * product).sum(dim=1, keepdim=True).clamp(min=torch.finfo(size.dtype).tiny)
        x += step * direction
        residual -= step * product
        before, size = size, residual.square().sum(dim=1, keepdim=True)
        direction = residual + size / before.clamp(min=torch.finfo(size.dtype).tiny) * direction
    return x
