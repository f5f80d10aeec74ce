"""PAVE on a weight as a model stores it: of one linear layer, possibly transposed, or of all experts of a mixture."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergekit_pave.core.covariance import Covariance, Covariances
from mergekit_pave.core.exact import float64_device, in_float64
from mergekit_pave.core.linear import Linear
from mergekit_pave.core.memory import empty_in_huge_pages
from mergekit_pave.core.projection import coefficients, drop_components, matrices
from mergekit_pave.core.reasons import FEW_TOKENS, NEVER_CALLED, UNCHANGED
from mergekit_pave.core.subspace import tail_components
from mergekit_pave.errors import PaveError
from mergekit_pave.settings import RelativeRegularization


def missed_layers(model: str, wanted: tuple[Linear, ...], size: int, known: Covariances) -> list[Linear]:
    """Layers that calibration has not reached, which are left as they are, but not most of a model.

    Of experts the tokens are counted instead.

    Args:
        model: its name, for messages.
        wanted: the layers that are to be purified.
        size: the number of weights in all of the model's linear layers.

    Raises:
        PaveError: they hold more than half of its weights in linear layers, or are all that was to be purified.
    """
    missed = [linear for linear in wanted if not linear.experts and not known.tokens(linear.layers[0])]
    share = sum(linear.size for linear in missed) / size
    if share > 0.5 or len(missed) == len(wanted):
        raise PaveError(
            f"{model}: {len(missed)} of {len(wanted)} layers to be purified were never called during calibration "
            f"(such as {missed[0].module}); they hold {share:.0%} of the weights in the model's linear layers. Use data that "
            "reaches them, such as images for a vision tower, or put them under pave.exclude to merge them as they are"
        )
    return missed


def decompose_weight(
    weight: Tensor,
    layer: Linear,
    known: Covariances,
    regularization: float | RelativeRegularization,
    count: int,
    min_tokens: int,
    where: tuple[str, str],
) -> dict[str, Any]:
    """The tails of the matrices of one weight: of one matrix, or of all experts that saw enough tokens.

    Args:
        weight: as it is stored.
        count: components in each tail.
        min_tokens: tokens that an expert must have seen.
        where: the names of the model and the tensor, for messages.

    Returns:
        {directions: U_t, (tails, d_out, count), coefficients: U_t^T W, (tails, count, d_in), values: (tails, count), ascending,
        slices: what else is known of each: [{expert, largest, energy, tokens}], left: {expert, or "": the tokens it saw, which
        are too few}}. The first two are float32 tensors, on the CPU where the weight's device has no float64; values are a
        float64 array, which executors do not move to such a device.

    Raises:
        PaveError: the weight is not finite, too large or not that of the layer.
    """
    model, tensor = where
    if weight.shape != layer.stored_shape or not weight.is_floating_point():
        raise PaveError(
            f"{model}: {tensor} is a {weight.dtype} tensor of shape {tuple(weight.shape)}, but the layer "
            f"{layer.module} of the architecture has a float weight of shape {layer.stored_shape}; "
            "it cannot be purified"
        )
    if not weight.isfinite().all():
        raise PaveError(f"{model}: {tensor} has values that are not finite")
    weight = weight.to(float64_device(weight.device))
    tails, removed, slices, left = [], [], [], {}
    for matrix, names, expert in zip(matrices(weight, layer.transposed), layer.layers, layer.experts or (None,), strict=True):
        if known.tokens(names) < max(1, min_tokens):
            left["" if expert is None else str(expert)] = known.tokens(names)
            continue
        covariance = known.load(names).to(weight.device)
        shift = shift_of(covariance, regularization)
        if not shift > 0:
            raise PaveError(
                f"{model}: all calibration inputs of {names[0]} are zero, so a relative regularization is zero too; "
                "set an absolute pave.regularization or exclude the layer"
            )
        try:
            tail = tail_components(matrix, covariance, shift, count)
        except OverflowError as error:
            raise PaveError(f"{model}: {tensor} cannot be decomposed: {error}") from error
        # float32 adds an error of about 1e-7 of ||W||, which is what storing W' in float32 costs, too.
        tails.append(dataclasses.replace(tail, directions=tail.directions.float()))
        removed.append(coefficients(matrix, tails[-1].directions))
        slices.append({"expert": expert, "largest": tail.largest, "energy": tail.energy, "tokens": covariance.tokens})
    (d_out, d_in), like = layer.shape, {"device": weight.device}
    return {
        "directions": torch.stack([tail.directions for tail in tails]) if tails else torch.zeros(0, d_out, count, **like),
        "coefficients": torch.stack(removed) if removed else torch.zeros(0, count, d_in, **like),
        "values": np.stack([tail.values.cpu().numpy() for tail in tails]) if tails else np.zeros((0, count)),
        "slices": slices,
        "left": left,
    }


def leave_slices(tail: Mapping[str, Any], min_tokens: int, unchanged: Collection[int]) -> dict[str, Any]:
    """The tails without those of experts that saw fewer tokens, or that equal the base model's: under `left` these have None."""
    slices = tail["slices"]
    kept = [i for i, own in enumerate(slices) if own["tokens"] >= min_tokens and own["expert"] not in unchanged]
    left = {str(own["expert"]): own["tokens"] for i, own in enumerate(slices) if i not in kept}
    left = tail["left"] | left | {str(expert): None for expert in unchanged}
    if len(kept) == len(slices):
        return {**tail, "left": left}
    tensors = {name: tail[name][kept] for name in ("directions", "coefficients", "values")}
    return {**tensors, "slices": [slices[i] for i in kept], "left": left}


def shift_of(covariance: Covariance, regularization: float | RelativeRegularization) -> float:
    """λ as a number."""
    if isinstance(regularization, RelativeRegularization):
        return regularization.relative * covariance.mean_diagonal()
    return regularization


def purify_weight(
    weight: Tensor,
    base: Tensor | None,
    tail: Mapping[str, Any],
    drops: list[int],
    *,
    transposed: bool,
    target: str,
    dtype: torch.dtype,
    row: Mapping[str, Any],
) -> dict[str, Any]:
    """W' of one weight.

    Args:
        weight: W, as it is stored.
        base: W_base likewise, if there is one; the target `task_vector` needs it.
        tail: see `decompose_weight`; like the base on any device.
        drops: how many components each of its slices loses.
        dtype: of the result.
        row: what each row of the report says beside its figures, the name of the `tensor` among it.

    Returns:
        {tensor: W', stats: a row of the report for each matrix, left: {a matrix that stays as it is: why}}.
    """
    own = matrices(weight, transposed)
    bases = None if base is None else matrices(base.to(weight.device), transposed)
    # What has no tail stays as it is: an expert with too few tokens, a layer that was never called.
    every = len(tail["slices"]) == len(own)
    result = empty_in_huge_pages(weight, dtype) if every else weight.to(dtype, copy=True)
    stats = []
    for place, (known, drop) in enumerate(zip(tail["slices"], drops, strict=True)):
        i = known["expert"] if weight.dim() == 3 else 0
        directions = tail["directions"][place, :, :drop].to(weight.device)
        of_base = None if bases is None else bases[i]
        known_along = tail["coefficients"][place, :drop].to(weight.device)
        along = known_along if target == "weights" else coefficients(own[i], directions, of_base)
        out = matrices(result, transposed)[i]
        removed, change = drop_components(own[i], directions, along, of_base, out=out)
        components = min(own[i].shape)
        stats.append(
            {
                **row,
                **({} if known["expert"] is None else {"expert": known["expert"]}),
                "components": components,
                "kept": components - drop,
                "energy_dropped": np.square(tail["values"][place, :drop]).sum().item() / (known["energy"] or 1.0),
                "removed_norm": removed,
                "change_norm": change,
                "tokens": known["tokens"],
            }
        )
    left = {}
    for expert, tokens in tail["left"].items():
        name = f"{row['tensor']}[{expert}]" if weight.dim() == 3 else row["tensor"]
        left[name] = UNCHANGED if tokens is None else f"{FEW_TOKENS} ({tokens})" if expert else NEVER_CALLED
    return {"tensor": result, "stats": stats, "left": left}


def purify(weight: Tensor, covariance: Covariance, rank: int, *, shift: float | None = None) -> Tensor:
    """W', the best rank-`rank` approximation of W as seen through C (PAVE section 3.2).

    Args:
        weight: W, (d_out, d_in).
        covariance: of the layer's inputs, width d_in.
        rank: components kept, 1 <= rank <= min(d_out, d_in).
        shift: the regularisation added to C's diagonal, > 0; by default a hundredth of its mean, as in a `pave:` block.

    Returns:
        (d_out, d_in) in the weight's dtype.

    Raises:
        ValueError: the weight is no float matrix or not finite, is not as wide as the covariance, or rank or shift is out
            of range.
    """
    shape = tuple(weight.shape)
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"weight must be a float matrix (d_out, d_in), not {weight.dtype} of shape {shape}")
    if shape[1] != covariance.dim:
        way = "; pass weight.T where (d_in, d_out) is stored, as in GPT-2" if shape[0] == covariance.dim else ""
        raise ValueError(f"a weight of shape {shape} has inputs {shape[1]} wide, but the covariance is for {covariance.dim}{way}")
    if not weight.isfinite().all():
        raise ValueError("weight has values that are not finite")
    components = min(shape)
    if not 1 <= rank <= components:
        raise ValueError(f"rank must be between 1 and {components} for a weight of shape {shape}, not {rank}")
    if rank == components:
        return weight.clone()
    covariance, exact = covariance.to(weight.device), in_float64(weight)
    shift = 0.01 * covariance.mean_diagonal() if shift is None else shift
    if not 0 < shift < float("inf"):
        raise ValueError(f"shift must be positive and finite, not {shift}" + (": every input is zero" if shift == 0 else ""))
    tail = tail_components(exact, covariance, shift, components - rank)
    purified = torch.empty_like(exact, dtype=weight.dtype)
    drop_components(exact, tail.directions, coefficients(exact, tail.directions), out=purified)
    return purified.to(weight.device)
