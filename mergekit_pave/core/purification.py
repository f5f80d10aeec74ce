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


def missed_layers(model: str, linears: tuple[Linear, ...], num_weights: int, covariances: Covariances) -> list[Linear]:
    """Layers that were never called during calibration. They are left as they are, unless they are most of the model.

    Experts are not among them: for each expert its tokens are counted.

    Args:
        model: its name, for messages.
        linears: the layers that are to be purified.
        num_weights: in all of the model's linear layers.

    Raises:
        PaveError: they hold more than half of the weights in linear layers, or are all layers that are to be purified.
    """
    missed = [linear for linear in linears if not linear.experts and not covariances.tokens(linear.layers[0])]
    share = sum(linear.num_weights for linear in missed) / num_weights
    if share > 0.5 or len(missed) == len(linears):
        raise PaveError(
            f"{model}: {len(missed)} of {len(linears)} layers to be purified were never called during calibration "
            f"(such as {missed[0].module}); they hold {share:.0%} of the weights in the model's linear layers. Use data that "
            "reaches them, such as images for a vision tower, or put them under pave.exclude to merge them as they are"
        )
    return missed


def decompose_weight(
    weight: Tensor,
    layer: Linear,
    covariances: Covariances,
    regularization: float | RelativeRegularization,
    count: int,
    min_tokens: int,
    where: tuple[str, str],
) -> dict[str, Any]:
    """The tails of the matrices of one weight: that of a single matrix, or those of all experts that saw enough tokens.

    Args:
        weight: as it is stored.
        count: components in each tail.
        min_tokens: tokens that an expert must have seen.
        where: the names of the model and the tensor, for messages.

    Returns:
        {directions: U_t, (tails, d_out, count), coefficients: U_t^T W, (tails, count, d_in), values: (tails, count), ascending,
        slices: [{expert, largest, energy, tokens}], one for each tail, without_tail: {expert: the tokens that it saw, which are
        too few}}. The expert is None for an ordinary layer. Directions and coefficients are float32 tensors, on the CPU if the
        weight's device has no float64. Values are a float64 array, because executors would move a tensor to such a device.

    Raises:
        PaveError: the weight is not finite, has values that are too large, or is not that of the layer.
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
    tails, along, slices, without_tail = [], [], [], {}
    for matrix, names, expert in zip(matrices(weight, layer.transposed), layer.layers, layer.experts or (None,), strict=True):
        if covariances.tokens(names) < max(1, min_tokens):
            without_tail[expert] = covariances.tokens(names)
            continue
        covariance = covariances.load(names, weight.device)
        if layer.experts:  # no other weight needs what is remembered of it, and there are many
            covariance = dataclasses.replace(covariance)
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
        # float32 adds an error of about 1e-7 of ||W||, as much as storing W' in float32.
        tails.append(dataclasses.replace(tail, directions=tail.directions.float()))
        along.append(coefficients(matrix, tails[-1].directions))
        slices.append({"expert": expert, "largest": tail.largest, "energy": tail.energy, "tokens": covariance.tokens})
    (d_out, d_in), like = layer.shape, {"device": weight.device}
    return {
        "directions": torch.stack([tail.directions for tail in tails]) if tails else torch.zeros(0, d_out, count, **like),
        "coefficients": torch.stack(along) if along else torch.zeros(0, count, d_in, **like),
        "values": np.stack([tail.values.cpu().numpy() for tail in tails]) if tails else np.zeros((0, count)),
        "slices": slices,
        "without_tail": without_tail,
    }


def leave_slices(tail: Mapping[str, Any], min_tokens: int, unchanged: Collection[int]) -> dict[str, Any]:
    """The tails without those of experts that saw fewer tokens, or that equal the base model's.

    Args:
        tail: see `decompose_weight`.
        unchanged: the experts that equal the base model's. They get None under `without_tail`.
    """
    slices = tail["slices"]
    kept = [i for i, piece in enumerate(slices) if piece["tokens"] >= min_tokens and piece["expert"] not in unchanged]
    dropped = {piece["expert"]: piece["tokens"] for i, piece in enumerate(slices) if i not in kept}
    without_tail = tail["without_tail"] | dropped | dict.fromkeys(unchanged)
    if len(kept) == len(slices):
        return {**tail, "without_tail": without_tail}
    tensors = {name: tail[name][kept] for name in ("directions", "coefficients", "values")}
    return {**tensors, "slices": [slices[i] for i in kept], "without_tail": without_tail}


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
        tail: see `leave_slices`. It may be on another device, like the base.
        drops: how many components each of its slices drops.
        dtype: of the result.
        row: names for each row of the report, which are added to its figures. The `tensor` is among them.

    Returns:
        {tensor: W', stats: a row of the report for each matrix, left_as_they_are: {name of a matrix: the reason}}.
    """
    originals = matrices(weight, transposed)
    bases = None if base is None else matrices(base.to(weight.device), transposed)
    # A matrix without a tail stays as it is: that of an expert with too few tokens, or of a layer that was never called.
    all_have_tails = len(tail["slices"]) == len(originals)
    result = empty_in_huge_pages(weight, dtype) if all_have_tails else weight.to(dtype, copy=True)
    stats = []
    for i, (piece, drop) in enumerate(zip(tail["slices"], drops, strict=True)):
        number = piece["expert"] if weight.dim() == 3 else 0
        original, base_matrix = originals[number], None if bases is None else bases[number]
        directions = tail["directions"][i, :, :drop].to(weight.device)
        if target == "weights":
            along = tail["coefficients"][i, :drop].to(weight.device)
        else:
            along = coefficients(original, directions, base_matrix)
        removed, change = drop_components(original, directions, along, base_matrix, out=matrices(result, transposed)[number])
        components = min(original.shape)
        stats.append(
            {
                **row,
                **({} if piece["expert"] is None else {"expert": piece["expert"]}),
                "components": components,
                "kept": components - drop,
                "energy_dropped": np.square(tail["values"][i, :drop]).sum().item() / (piece["energy"] or 1.0),
                "removed_norm": removed,
                "change_norm": change,
                "tokens": piece["tokens"],
            }
        )
    reasons = {}
    for expert, tokens in tail["without_tail"].items():
        name = f"{row['tensor']}[{expert}]" if weight.dim() == 3 else row["tensor"]
        too_few = NEVER_CALLED if expert is None else f"{FEW_TOKENS} ({tokens})"
        reasons[name] = UNCHANGED if tokens is None else too_few
    return {"tensor": result, "stats": stats, "left_as_they_are": reasons}


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
        ValueError: the weight is not a float matrix, is not finite or not as wide as the covariance, or rank or shift is out of
            range.
    """
    shape = tuple(weight.shape)
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"weight must be a float matrix (d_out, d_in), not {weight.dtype} of shape {shape}")
    if shape[1] != covariance.dim:
        hint = "; pass weight.T where (d_in, d_out) is stored, as in GPT-2" if shape[0] == covariance.dim else ""
        raise ValueError(f"a weight of shape {shape} has inputs {shape[1]} wide, the covariance is for {covariance.dim}{hint}")
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
