"""Why a layer's input is not finite: because of a weight, of single rows, or of the range of the model's precision."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mergekit_pave.errors import PaveError


class NotFiniteError(Exception):
    """The input of a layer is not finite.

    Attributes:
        layer: the first such layer of a batch.
        rows: the samples for which it is not finite.
        exact: it is so for each of these samples. Otherwise it is so for at least one of them.
        everywhere: it was so for every sample so far.
    """

    def __init__(self, layer: str, rows: list[str], exact: bool, everywhere: bool):
        super().__init__(layer, rows, exact, everywhere)
        self.layer, self.rows, self.exact, self.everywhere = layer, rows, exact, everywhere


def explained(error: NotFiniteError, model: str, dtype: torch.dtype, weights: Iterable[tuple[str, Tensor]]) -> PaveError:
    """The error with its cause and a remedy. To find the cause, all weights may have to be read.

    Args:
        model: the model's name.
        dtype: the precision that it ran in.
        weights: its weights, with their names.
    """
    bad_weight = next((name for name, weight in weights if weight.is_floating_point() and not weight.isfinite().all()), None)
    rows = ", ".join(error.rows[:8]) + (f" and {len(error.rows) - 8} more" if len(error.rows) > 8 else "")
    where = f"{model}: the input of {error.layer} is not finite for {'' if error.exact else 'one of '}{rows}"
    if bad_weight:
        cause = f"its weight {bad_weight} is not finite, it holds NaN or infinity"
        where = f"{model}: {cause}, and so is the input of {error.layer}" if error.everywhere else f"{where}, because {cause}"
        return PaveError(f"{where}. Fetch the checkpoint again, or leave the model out of the merge")
    if not error.everywhere:
        return PaveError(f"{where}. Leave these rows out, or look at what is in them")
    precision = str(dtype).removeprefix("torch.")
    advice = "give the model `purify: false`"
    if torch.finfo(dtype).max < torch.finfo(torch.float32).max or dtype == torch.bfloat16:
        advice = f"run it in float32, as on a CPU (without --cuda); or {advice}"
    return PaveError(
        f"{model}: the input of {error.layer} is not finite for any sample, though all weights are: the activations overflow in "
        f"{precision}, the precision that the model runs in. Check whether the model works at all; {advice}"
    )
