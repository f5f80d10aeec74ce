"""The merged model and its experts side by side: each expert's samples run through both, and stop before the same layers."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from mergekit_pave.calibration.batches import Encoded, make_batches
from mergekit_pave.calibration.forward import counted_rows, runner, version
from mergekit_pave.calibration.lockstep import Loads, Stop, run_in_lockstep
from mergekit_pave.calibration.masks import packed_masks
from mergekit_pave.errors import PaveError


@dataclass(frozen=True)
class Expert:
    """One expert.

    Attributes:
        name: the model's name, for messages.
        encoded: its samples.
        batch_size: how many of them run at a time.
    """

    name: str
    model: Loads
    encoded: list[Encoded]
    batch_size: int


Pairs = list[tuple[Tensor, Tensor]]  # by batch the rows of the merged model and of the expert for the same tokens, (n, d) each


class Reached(NamedTuple):
    """All samples stand before a layer, in the merged model and in the experts; or they have left a block.

    Attributes:
        path: of the layer or of the block.
        is_new: the layer's input is not that of the layer before it.
        pairs: gives an expert's inputs of the layer, by its number; None when a block has been left.
    """

    path: str
    is_new: bool
    pairs: Callable[[int], Pairs] | None


def run_side_by_side(
    merged: Loads, experts: list[Expert], layers: Iterable[str], unpadded: bool, device: str
) -> Iterator[Reached]:
    """Run each expert's samples through it and through the merged model.

    Args:
        unpadded: samples run one by one.
        layers: paths of linear layers within blocks. The merged model's weights may be replaced while samples stand before them.

    Raises:
        UnalignedInputError: samples have to run one by one.
        UnknownWeightError: a model has to be loaded whole.
        PaveError: the models do not call the same layers in the same order, or one of them more than once.
    """
    layers = list(layers)
    batches = [
        [batch.to(device) for batch in make_batches(expert.encoded, 1 if unpadded else expert.batch_size)] for expert in experts
    ]
    total = [len(of_expert) for of_expert in batches]
    ours = run_in_lockstep(merged, list(itertools.chain(*batches)), runner(merged.model, unpadded), layers=layers)
    theirs = [
        run_in_lockstep(expert.model, of_expert, runner(expert.model.model, unpadded), layers=layers)
        for expert, of_expert in zip(experts, batches)
    ]
    seen: set[str] = set()
    last: list[tuple[weakref.ref[Tensor], int]] = []
    with packed_masks():
        # Not by `zip`, which would keep each step's inputs in memory until the next.
        while (stop := next(ours, None)) is not None:
            others = [next(of_expert, Stop(None, [])) for of_expert in theirs]
            if stop.path is None:
                continue
            inputs = [[x for _, x in other.inputs] for other in others]
            _check_place(stop, others, experts)
            if not stop.inputs:
                last = []
                yield Reached(stop.path, True, None)
                continue
            if stop.path in seen or [len(x) for x in (stop.inputs, *inputs)] != [sum(total), *total]:
                raise PaveError(
                    f"{experts[0].name}: refining fits each layer once, on all samples, but this kind of model calls {stop.path} "
                    "more than once or not for each sample; leave `refine` out"
                )
            seen.add(stop.path)
            current = [x for _, x in stop.inputs] + list(itertools.chain(*inputs))
            is_same = len(last) == len(current) and all(ref() is x and v == version(x) for (ref, v), x in zip(last, current))
            last = [(weakref.ref(x), version(x)) for x in current]
            of_merged = {id(batch): x for batch, x in stop.inputs}

            def pairs(number: int, path: str = stop.path, of_merged: dict = of_merged, inputs: list = inputs) -> Pairs:
                found = []
                for batch, theirs in zip(batches[number], inputs[number]):
                    ours = of_merged[id(batch)]
                    counted = counted_rows(batch, path, ours, unpadded)
                    rows = [x.reshape(-1, x.shape[-1]) for x in (ours, theirs)]
                    found.append(tuple(rows if counted is None else [x[counted] for x in rows]))
                return found

            yield Reached(stop.path, not is_same, pairs)
            del current, inputs, of_merged, pairs, stop, others  # or the inputs would be in memory until the next stop


def _check_place(stop: Stop, others: list[Stop], experts: list[Expert]) -> None:
    for expert, other in zip(experts, others):
        if other.path != stop.path:
            raise PaveError(
                f"{expert.name}: refining follows a model layer by layer, but this one calls {other.path} where the merged model "
                f"calls {stop.path}; leave `refine` out"
            )
