"""Why what a layer sees is not finite: a weight, single rows, or the range of the precision that the model runs in."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mergekit_pave.errors import PaveError


class NotFiniteError(Exception):
    """The input of a layer is not finite.

    Attributes:
        layer: the first such layer of a batch.
        rows: which samples it is so for.
        exact: it is so for each of them, not only for some.
        everywhere: no sample so far was without it.
    """

    def __init__(self, layer: str, rows: list[str], exact: bool, everywhere: bool):
        super().__init__(layer, rows, exact, everywhere)
        self.layer, self.rows, self.exact, self.everywhere = layer, rows, exact, everywhere


def explained(error: NotFiniteError, model: str, dtype: torch.dtype, weights: Iterable[tuple[str, Tensor]]) -> PaveError:
    """What to tell people. All weights may have to be read for that.

    Args:
        model: the model's name.
        dtype: the precision that it ran in.
        weights: its weights with their names.
    """
    guilty = next((name for name, weight in weights if weight.is_floating_point() and not weight.isfinite().all()), None)
    rows = ", ".join(error.rows[:8]) + (f" and {len(error.rows) - 8} more" if len(error.rows) > 8 else "")
    where = f"{model}: the input of {error.layer} is not finite for {'' if error.exact else 'one of '}{rows}"
    if guilty:
        told = f"its weight {guilty} is not finite, it holds NaN or infinity"
        where = f"{model}: {told}, and so is the input of {error.layer}" if error.everywhere else f"{where}, because {told}"
        return PaveError(f"{where}. Fetch the checkpoint again, or leave the model out of the merge")
    if not error.everywhere:
        return PaveError(f"{where}. Leave these rows out, or look at what is in them")
    precision = str(dtype).removeprefix("torch.")
    advice = "give the model `purify: false`"
    if torch.finfo(dtype).max < torch.finfo(torch.float32).max or dtype == torch.bfloat16:
        advice = f"run it in float32, as on a CPU (without --cuda); or {advice}"
    return PaveError(
        f"{model}: the input of {error.layer} is not finite for any sample, though all weights are: the activations overflow in "
        f"{precision}, which the model runs in. Look whether the model works at all; {advice}"
    )
