"""What refining will cost, from the architecture and the tokenised samples alone."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from mergekit_pave.calibration.architecture import NO_BLOCK, Architecture
from mergekit_pave.calibration.batches import Encoded
from mergekit_pave.calibration.estimate import (
    activations,
    batches_of,
    distinct_inputs,
    hidden_of_token,
    padded_tokens,
    pass_operations,
)
from mergekit_pave.core.linear import Linear
from mergekit_pave.core.refine import SAMPLE


@dataclass(frozen=True)
class RefineCost:
    """What refining needs: memory in bytes, and numbers of multiplications and additions.

    Attributes:
        embeddings: weights of one model that are in no block.
        weights: one block of the merged model and of each expert.
        hidden: what all samples have between two blocks, in the merged model and in the experts.
        within: what they have beside that where they stop within a block.
        fit: the sums of one input for all experts, and fitting a layer with them.
        batch: activations of the largest batch within a block.
        passes: operations of the forward passes.
        sums: operations of the sums.
        fits: operations of the fits, which are float64.
    """

    embeddings: int
    weights: int
    hidden: int
    within: int
    fit: int
    batch: int
    passes: int
    sums: int
    fits: int

    @property
    def peak(self) -> int:
        """Peak memory, beyond that of Python and its libraries."""
        return max(self.embeddings, self.weights + self.within + self.fit + self.batch) + self.hidden


def refine_cost(
    architecture: Architecture,
    samples: Sequence[list[Encoded]],
    linears: Sequence[Linear],
    batch_size: int,
    itemsize: int,
    data: float,
) -> RefineCost:
    """
    Args:
        architecture: of the merged model. Those of the experts are alike.
        samples: of each expert.
        linears: the layers that are fitted.
        itemsize: bytes of one number in the precision that the models run in.
        data: how much of the metric comes from inputs, from 0 to 1.
    """
    experts, tokens = len(samples), [sum(sample.tokens for sample in encoded) for encoded in samples]
    batches = [batch for encoded in samples for batch in batches_of(encoded, batch_size)]
    padded = sum(map(padded_tokens, batches))
    block = max(count for path, count in architecture.blocks.items() if path != NO_BLOCK)
    return RefineCost(
        embeddings=architecture.blocks[NO_BLOCK] * itemsize,
        weights=(1 + experts) * block * itemsize,
        hidden=2 * padded * hidden_of_token(architecture, itemsize),
        within=2 * padded * _held(architecture) * itemsize,
        fit=max(_fit_memory(linear, max(tokens), experts, itemsize) for linear in linears),
        batch=max(activations(architecture, batch, itemsize, 0) for batch in batches),
        passes=2 * sum(pass_operations(architecture, encoded) for encoded in samples),
        sums=sum(3 * sum(tokens) * linear.shape[1] ** 2 for _, linear in distinct_inputs(architecture, linears)),
        fits=sum(_fit_operations(linear, tokens, data) for linear in linears),
    )


def _held(architecture: Architecture) -> int:
    """Numbers that a token has within a block at most: the input of a module, and the outputs of the layers in it.

    Of several layers that widen their input, only the product of their outputs is kept: gate and up.
    """
    modules: dict[str, list[Linear]] = defaultdict(list)
    for linear in architecture.linears.values():
        if not linear.experts:
            modules[linear.module.rpartition(".")[0]].append(linear)
    held = []
    for layers in modules.values():
        wider = max((layer.shape[0] for layer in layers if layer.shape[0] > layer.shape[1]), default=0)
        held.append(layers[0].shape[1] + wider + sum(layer.shape[0] for layer in layers if layer.shape[0] <= layer.shape[1]))
    return max(held)


def _fit_memory(linear: Linear, tokens: int, experts: int, itemsize: int) -> int:
    """Bytes of the sums of a layer's input for all experts, with those that are at work while one is summed or the layer fitted.

    Args:
        tokens: of the expert that has most of them.
    """
    (d_out, d_in), number = linear.shape, 8
    kept = experts * (2 * number * d_in**2 + 2 * SAMPLE * d_in * itemsize)
    summing = int(2.5 * number * d_in**2) + 2 * tokens * d_in * itemsize
    fitting = 3 * number * d_in**2 + (6 * number + (2 + experts) * itemsize) * d_out * d_in
    return kept + max(summing, fitting)


def _fit_operations(linear: Linear, tokens: list[int], data: float) -> int:
    """Multiplications and additions of both sides of the system, of its solution, and of the errors of two weights."""
    (d_out, d_in), experts = linear.shape, len(tokens)
    sides = ((data > 0) + (data < 1)) * experts * 4 * d_out * d_in**2
    solution = d_in**3 // 3 + 2 * d_out * d_in**2
    return sides + solution + sum(8 * min(count, SAMPLE) * math.prod(linear.shape) for count in tokens)
