"""The vocabulary merged row by row, by how often each model's data uses each row.

An embedding is a linear layer whose inputs are one-hot. So C, the second moment of its inputs, is diagonal: the share of each
token. RegMean's closed form (see `core.regmean`) then needs no matrix. With the changes D_i = W_i - W_base, the models' weights
w_i and the shares s_i, row v of the merged embedding is

    W[v] = W_base[v] + lambda sum w_i s_i(v) D_i[v] / sum w_i s_i(v),    s_i(v) = (n_i(v) + 1) / (T_i + V)

where n_i(v) counts row v in the T_i tokens of model i's data, and V is the number of rows. A count of 1 more for every row keeps
a row that was seen once, in the data of one model, from being that model's alone.

A head has a row for each token, too, which matters where that token is to be predicted. If inputs are taken to be alike in all
models, the same formula merges it, with n_i(v) the count of v among the tokens that are to be predicted.

Learned positions are embeddings as well. Merged by how many samples reach them they were no better than by task arithmetic: a
GPT-2 kept 65.3 and 65.1 % of what its three fine-tunes had gained, and 63.7 % with the base's positions. So they are left to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_pave.core.exact import float64_device, in_float64

SMOOTHING = 1.0  # the count that every row gets beside its own

_BLOCK = 1 << 20  # elements that are in float64 at a time


def shares(counts: Tensor) -> Tensor:
    """s, (V,) float64, for the counts n, (V,)."""
    smoothed = counts.double() + SMOOTHING
    return smoothed / smoothed.sum()


def seen(counts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Which rows some model's data shows, bool (V,). A model of weight 0 does not count.

    Args:
        counts: of each model, (V,).
    """
    return sum(of_model.bool() for of_model, weight in zip(counts, weights) if weight > 0).bool()


def merge_rows(
    base: Tensor | None,
    models: Sequence[Tensor],
    counts: Sequence[Tensor],
    weights: Sequence[float],
    scale: float = 1.0,
    *,
    out: Tensor,
) -> None:
    """Write the rows that some model's data shows. Beside the tensors it takes a few million float64 numbers.

    Args:
        base: W_base, (V, d). Without it rows are means of the models' own rows, and the scale has to be 1.
        models: W_i, each (V, d).
        counts: n_i, each (V,).
        weights: w_i >= 0, not all 0. Only their ratios matter.
        scale: lambda.
        out: (V, d). Rows that no data shows stay as they are. It must not overlap with the other tensors.
    """
    device = float64_device(out.device)
    factors = [weight * shares(of_model).to(device) for of_model, weight in zip(counts, weights)]
    rows = seen(counts, weights).nonzero().flatten().to(out.device)
    for block in rows.split(max(1, _BLOCK // out.shape[1])):
        here = block.to(device)
        start = in_float64(base[block]) if base is not None else 0.0
        mixed, total = torch.zeros(len(block), out.shape[1], dtype=torch.float64, device=device), 0.0
        for model, factor in zip(models, factors):
            of_model = factor[here, None]
            mixed += of_model * (in_float64(model[block]) - start)
            total = total + of_model
        out[block] = (start + scale * mixed / total).to(out.dtype).to(out.device)
