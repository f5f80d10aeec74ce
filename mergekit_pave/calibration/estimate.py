"""What a calibration will cost, from the architecture and the tokenised samples alone."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from mergekit_pave.calibration.architecture import Architecture
from mergekit_pave.calibration.batches import Encoded
from mergekit_pave.core.covariance import SecondMoment
from mergekit_pave.core.linear import Linear


@dataclass(frozen=True)
class Estimate:
    """What a calibration needs, in bytes but for the last.

    Attributes:
        cache: covariances on disk, at most: layers that turn out to share an input need less.
        embeddings: weights that are in no block.
        weights: the largest block's weights.
        covariances: accumulators of the block that has most.
        hidden: what all samples keep between two blocks: their embeddings and their hidden states.
        batch: activations of the largest batch within a block, with its attention mask or with what adding to a sum takes.
        operations: multiplications and additions of the forward pass and of the sums.
    """

    cache: int
    embeddings: int
    weights: int
    covariances: int
    hidden: int
    batch: int
    operations: int

    @property
    def peak(self) -> int:
        """Memory at the worst moment, beyond what Python and its libraries take."""
        return max(self.embeddings + self.hidden // 2, self.weights + self.covariances + self.hidden + self.batch)


def estimate(architecture: Architecture, encoded: list[Encoded], batch_size: int, itemsize: int) -> Estimate:
    """Estimate a calibration of one model.

    Args:
        itemsize: bytes of one number in the precision that the model runs in.
    """
    tokens = sum(sample.tokens for sample in encoded)
    # How many rows a vision tower makes of an image only the model knows: perhaps so many that they are summed.
    pictured = any(sample.is_pictured for sample in encoded)
    ordered = sorted(encoded, key=lambda sample: sample.length)
    batches = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    padded = [len(batch) * batch[-1].length for batch in batches]

    def rows_of(linear: Linear) -> float:
        return math.inf if pictured else tokens * _meets(architecture, linear) * linear.shape[1] * itemsize

    cache = operations = 0
    for linear in architecture.linears.values():
        triangle, meets = _triangle(linear), _meets(architecture, linear)
        cache += min(rows_of(linear), len(linear.layers) * triangle)
        # A weight meets every token, also those that do not count; of a symmetric sum half is computed.
        operations += 2 * meets * math.prod(linear.shape) * sum(sample.length for sample in encoded)
        operations += tokens * meets * linear.shape[1] ** 2 if rows_of(linear) > triangle else 0
    sums: dict[str, int] = defaultdict(int)
    adding = 0
    for block, linear in _inputs(architecture):
        rows, width = rows_of(linear), linear.shape[1]
        if rows > _triangle(linear):
            # An expert's sum begins when its rows take more than that.
            sums[block] += min(2 * rows, len(linear.layers) * 8 * width**2)
            together = width * min(tokens, _CHUNK + max(padded)) * itemsize
            adding = max(adding, 2 * together + width * min(tokens, _CHUNK) * 8)
        else:
            sums[block] += rows
            adding = max(adding, rows)
    return Estimate(
        cache=cache,
        embeddings=architecture.blocks[""] * itemsize,
        weights=max((size for path, size in architecture.blocks.items() if path), default=0) * itemsize,
        covariances=max(sums.values(), default=0),
        hidden=sum(padded) * (2 * architecture.hidden_size * itemsize + _BESIDE),
        batch=max(_activations(architecture, batch, itemsize, adding) for batch in batches[-2:]),
        operations=operations,
    )


# Rows in one product of a sum, and bytes that a token takes beside its hidden states: ids, marks, and the runs of masks.
_CHUNK = SecondMoment._CHUNK
_BESIDE = 40


def _triangle(linear: Linear) -> int:
    """Bytes of a sum on disk."""
    return 4 * linear.shape[1] * (linear.shape[1] + 1)


def _meets(architecture: Architecture, linear: Linear) -> int:
    """How many of the layer's matrices each token meets. However tokens spread over experts, it is so many of them."""
    return min(len(linear.layers), architecture.experts_a_token) if linear.experts else 1


def _inputs(architecture: Architecture) -> Iterator[tuple[str, Linear]]:
    """Linear layers that seem to have different inputs, each with its block.

    Which layers share one shows only when the model runs. Most often those of one module do that are equally wide, but for the
    one that gives what is added to the hidden states: query, key and value, but not output; gate and up.
    """
    found: dict[tuple[str, int, bool], list[Linear]] = defaultdict(list)
    for linear in architecture.linears.values():
        last = linear.shape[0] == architecture.hidden_size
        found[linear.module.rpartition(".")[0], linear.shape[1], last].append(linear)
    for (*_, last), linears in found.items():
        for linear in linears[: 2 if last and len(linears) > 3 else 1]:
            yield architecture.block_of(linear.module), linear


def _activations(architecture: Architecture, batch: list[Encoded], itemsize: int, adding: int) -> int:
    """Bytes of what a batch takes within a block.

    Args:
        adding: bytes that adding to a sum takes.
    """
    lengths = [sample.longest for sample in batch]
    pairs, size = len(batch) * max(lengths) ** 2, len(batch) * max(lengths) * itemsize
    hidden = architecture.hidden_size
    wide = max((_meets(architecture, one) * max(one.shape) for one in architecture.linears.values()), default=hidden)
    # Scores are there twice at once, before and after softmax; other attention makes numbers of its mask.
    attention = 8 * hidden * size + 2 * pairs * architecture.scored_heads * itemsize
    if architecture.is_windowed or min(lengths) < max(lengths):
        attention += pairs * (1 + itemsize)
    return max(attention, (2 * hidden + 3 * wide) * size, (2 * hidden + wide) * size + adding)
