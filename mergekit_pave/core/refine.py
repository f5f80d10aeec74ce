"""Refining: the weight of a linear layer fitted to what the experts' layers give, on the inputs that the merged model gives it.

With the inputs X_m of the layer in the merged model (a column a token) and X_e in expert i, on the same tokens of that expert's
data, and with the change D_i = W_i - W_base, the expert asks for outputs W_i X_e. The fit minimises

    sum w_i ( a ||W X_m - W_i X_e||^2 / tr(C_i) + (1 - a) ||(W - W_i) D_i^T||^2 / ||D_i||^2 ) + e ||W - A||^2,    C_i = X_m X_m^T,

where A is what a merge method gave. Its solution is A + N S^-1 with

    N = sum w_i ( a (W_i X_e X_m^T - A C_i) / tr(C_i) + (1 - a) (W_i - A) G_i ),    G_i = D_i^T D_i / ||D_i||^2,
    S = sum w_i ( a C_i / tr(C_i) + (1 - a) G_i ) + e I.

`regmean` is the same with X_m = X_e, but for the inputs being the expert's and the ridge pulling towards W_base: it does not
know that the layers before have changed, too. Sums are float64. e is `RIDGE` times the mean of the diagonal of the rest of S.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_pave.core.covariance import SecondMoment
from mergekit_pave.core.exact import float32_products, float64_device
from mergekit_pave.core.ridge import divide

# Along directions that have next to no part in the metric, targets are mostly rounding: a model's own, of 1e-7 or more. Unlike
# in `regmean`, where rounding is on both sides, it would be divided by next to nothing.
RIDGE = 1e-4

# How many times the median norm a row may have before it is scaled down.
CLIP = 4.0

SAMPLE = 1024  # pairs of rows that an error is measured on


@dataclass(frozen=True)
class Inputs:
    """What one expert's data show of the inputs that some layers share.

    Attributes:
        square: C = X_m X_m^T / tr(X_m X_m^T), (d_in, d_in) float64.
        cross: X_e X_m^T / tr(X_m X_m^T), (d_in, d_in) float64: rows belong to the expert, columns to the merged model.
        merged, expert: some of the pairs of rows, (n, d_in) each.
        tokens: how many rows there were.
    """

    square: Tensor
    cross: Tensor
    merged: Tensor
    expert: Tensor
    tokens: int


def summed(pairs: Sequence[tuple[Tensor, Tensor]]) -> Inputs | None:
    """Sum up a layer's inputs; None where they have no row, or are all zero.

    In models with attention sinks, the first token's input of a layer may be hundreds of times larger than all others. It would
    be the whole of C / tr(C). So the norm of a row counts up to `CLIP` times the median norm of the merged model's rows, or of
    the expert's. A pair with a longer row is scaled down to that: it weighs less, and asks for the same.

    Args:
        pairs: by batch the rows of the merged model and of the expert for the same tokens, (n, d_in) each.

    Raises:
        ValueError: a value is not finite.
    """
    pairs = [(merged, expert) for merged, expert in pairs if len(merged)]
    if not pairs:
        return None
    norms = [tuple(rows.float().norm(dim=1) for rows in pair) for pair in pairs]
    if not all(norm.isfinite().all() for of_pair in norms for norm in of_pair):
        raise ValueError("rows have values that are not finite, or too large")
    tokens = sum(len(norm) for norm, _ in norms)
    limits = [CLIP * _median_above_0([of_pair[side] for of_pair in norms]) for side in (0, 1)]
    if not limits[0]:
        return None
    width, device = pairs[0][0].shape[1], float64_device(pairs[0][0].device)
    moment = SecondMoment(width)
    # X_e X_m^T is C + (X_e - X_m) X_m^T. So rounding in the sums does not pass for a difference between the streams.
    difference = torch.zeros(width, width, dtype=torch.float64, device=device)
    sample, done = [], 0
    for (merged, expert), of_pair in zip(pairs, norms):
        shorter = torch.stack([limit / norm for limit, norm in zip(limits, of_pair) if limit]).amin(dim=0)
        scale = shorter.clamp(max=1)[:, None].to(device)
        merged, expert = (rows.to(device, torch.promote_types(rows.dtype, torch.float32)) * scale for rows in (merged, expert))
        moment.add(merged)
        done += _add_product(difference, expert - merged, merged, done)
        kept = torch.linspace(0, len(merged) - 1, max(1, SAMPLE * len(merged) // tokens), device=device).long()
        sample.append((merged[kept], expert[kept]))
    square = moment.result().unscaled()
    trace = square.diagonal().sum()
    cross = difference.add_(square).div_(trace)
    if not cross.isfinite().all():
        raise ValueError("rows have values that are not finite, or too large")
    return Inputs(square / trace, cross, *map(torch.cat, zip(*sample)), tokens)


def _median_above_0(norms: Sequence[Tensor]) -> float:
    """The median of those that are not 0; 0 if all are."""
    above = torch.cat([norm[norm > 0] for norm in norms])
    return above.median().item() if len(above) else 0.0


def _add_product(total: Tensor, left: Tensor, right: Tensor, done: int) -> int:
    """Add left^T right, of (n, d_in) each. As in `SecondMoment`, all but the first rows are multiplied in float32."""
    for x, y in zip(left.split(SecondMoment.CHUNK), right.split(SecondMoment.CHUNK)):
        precision = torch.float64 if done < SecondMoment.EXACT else x.dtype
        with float32_products(x.device):
            total += x.to(precision).mT @ y.to(precision)
        done += len(x)
    return len(left)


@dataclass(frozen=True)
class Expert:
    """One expert's part in the fit of a layer.

    Attributes:
        share: w_i >= 0.
        weight: W_i, (d_out, d_in).
        inputs: None leaves only the part that needs no data.
    """

    share: float
    weight: Tensor
    inputs: Inputs | None


def refine(anchor: Tensor, base: Tensor, experts: Iterable[Expert], data: float, scale: float) -> Tensor:
    """W_base + scale (W - W_base) with the W of the module's docstring, (d_out, d_in) float64.

    Args:
        anchor, base: A and W_base, (d_out, d_in).
        data: a, from 0 to 1.
        scale: what the fitted change is multiplied by.
    """
    device = float64_device(anchor.device)
    anchor, base = anchor.to(device).double(), base.to(device).double()
    wanted = torch.zeros_like(anchor)
    metric = anchor.new_zeros(anchor.shape[1], anchor.shape[1])
    for expert in experts:
        weight, seen = expert.weight.to(device).double(), expert.inputs
        if data > 0 and seen is not None:
            wanted.addmm_(weight, seen.cross, alpha=expert.share * data)
            wanted.addmm_(anchor, seen.square, alpha=-expert.share * data)
            metric.add_(seen.square, alpha=expert.share * data)
        change = weight - base
        square = change.square().sum().item()
        if data < 1 and square > 0:
            alike = (change.mT @ change).mul_(expert.share * (1 - data) / square)
            wanted.addmm_(weight - anchor, alike)
            metric.add_(alike)
    fitted = divide(wanted, metric, RIDGE).add_(anchor)
    return fitted.sub_(base).mul_(scale).add_(base)


def relative_error(weight: Tensor, experts: Iterable[Expert]) -> float | None:
    """How far a layer's outputs are from those of the experts, on a sample of tokens; None where no tokens were seen.

    Long rows are scaled down in it, as in the fit.

    The root of the mean, over the experts by their shares, of ||W X_m - W_i X_e||^2 / ||W_i X_e||^2.
    """
    total = shares = 0.0
    for expert in experts:
        if expert.inputs is None:
            continue
        rows, asked = expert.inputs.merged.double(), expert.inputs.expert.double()
        target = asked @ expert.weight.to(asked.device).double().mT
        size = target.square().sum().item()
        if size > 0:
            difference = rows @ weight.to(rows.device).double().mT - target
            total += expert.share * difference.square().sum().item() / size
            shares += expert.share
    return (total / shares) ** 0.5 if shares else None
