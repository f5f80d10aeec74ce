"""RegMean: the weights of linear layers merged in closed form, with a metric for each model.

With the changes D_i = W_i - W_base, the second moments C_i of the layer's inputs and the weights w_i,

    W = W_base + lambda (sum w_i D_i M_i) (sum w_i M_i + e I)^-1,    M_i = a C_i / tr(C_i) + (1 - a) D_i^T D_i / ||D_i||^2

minimises sum w_i tr((D - D_i) M_i (D - D_i)^T) + e ||D||^2 over D, and is then scaled by lambda. At a = 1 this is RegMean (Jin
et al., arXiv 2212.09849) with each C scaled to trace 1: it changes the outputs on each model's own inputs least. At a = 0 it is
the closed form of WUDI-Merging's objective (Cheng et al., arXiv 2503.08099), which needs no data.

Sums and the solution are float64. e is `RIDGE` of `core.ridge` times the mean of the diagonal of sum w_i M_i. Because of it,
directions along which all metrics are zero keep W_base. Without a base model the weighted mean of the W_i takes its place, which
changes only what becomes of these directions (in RegMean's own form they would be lost).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mergekit_pave.core.covariance import Covariance
from mergekit_pave.core.exact import in_float64
from mergekit_pave.core.ridge import divide

_AT_ONCE = 1 << 22  # numbers of a tensor that `alignment` looks at


def metric(
    change: Tensor, covariance: Covariance | None, share: float, off_diagonal: float = 1.0, *, overwrite: bool = False
) -> Tensor:
    """M = a C / tr(C) + (1 - a) D^T D / ||D||^2, (d_in, d_in) float64. A part whose norm is zero counts as zero.

    Args:
        change: D, (d_out, d_in) float64.
        covariance: of the layer's inputs, on the same device; not needed for a = 0.
        share: a, from 0 to 1.
        off_diagonal: what the elements of C off its diagonal are multiplied by (RegMean's reduction), 0 < x <= 1.
        overwrite: the covariance's tensor may become the metric, which saves d_in^2 numbers. The caller gives the covariance up.
    """
    if share > 0:
        result = covariance.unscaled()  # N C: the trace takes N out
        if result is covariance.gram and not overwrite:
            result = result.clone()
        trace = result.diagonal().sum().item()
        result.mul_(share * off_diagonal / trace if trace > 0 else 0.0)
        result.diagonal().div_(off_diagonal)
    else:
        result = change.new_zeros(change.shape[1], change.shape[1])
    if share < 1:
        square = change.square().sum().item()
        if square > 0:
            result.addmm_(change.mT, change, alpha=(1 - share) / square)
    return result


def merge_changes(terms: Iterable[tuple[float, Tensor, Tensor]]) -> Tensor:
    """(sum w_i D_i M_i) (sum w_i M_i + e I)^-1, (d_out, d_in) float64; zero where all metrics are.

    Args:
        terms: of each model w_i >= 0, D_i (d_out, d_in) and M_i (d_in, d_in), float64. They are borrowed one at a time: if the
            caller's iterator keeps none, only one metric is in memory beside the sum.
    """
    mixed = total = None
    for weight, change, metric_of_model in terms:
        if total is None:
            mixed, total = torch.zeros_like(change), torch.zeros_like(metric_of_model)
        mixed.addmm_(change, metric_of_model, alpha=weight)
        total.add_(metric_of_model, alpha=weight)
        del change, metric_of_model  # or they would be in memory while the next term is made
    return divide(mixed, total)


def alignment(merged: Tensor, model: Tensor, base: Tensor) -> float | None:
    """The cosine between the change of the merge and that of a model: 1 where the merge went the model's way.

    Args:
        merged, model, base: weights of one shape, in any precision. A few rows of them at a time become float64.

    Returns:
        None where one of the two is no change.
    """
    rows = max(1, _AT_ONCE // max(1, merged[0].numel()))
    product, squares = 0.0, [0.0, 0.0]
    for parts in zip(*(tensor.split(rows) for tensor in (merged, model, base))):
        of_merged, of_model, start = map(in_float64, parts)
        changes = of_merged - start, of_model - start
        product += (changes[0] * changes[1]).sum().item()
        squares = [square + change.square().sum().item() for square, change in zip(squares, changes)]
    norm = (squares[0] * squares[1]) ** 0.5
    return product / norm if norm else None
