"""What a calibration will cost, from the architecture and the tokenised samples alone."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from mergekit_pave.calibration.batches import Encoded
from mergekit_pave.calibration.layers import Architecture


@dataclass(frozen=True)
class Estimate:
    """What a calibration needs, in bytes but for the last. Upper bounds: layers that turn out to share an input need less.

    Attributes:
        cache: covariances on disk.
        weights: the largest block's weights, or the embeddings' where these are larger.
        covariances: accumulators of the block that has most.
        hidden: hidden states of all samples between two blocks.
        batch: activations of the largest batch within a block.
        operations: multiplications and additions of the forward pass and of the sums.
    """

    cache: int
    weights: int
    covariances: int
    hidden: int
    batch: int
    operations: int

    @property
    def peak(self) -> int:
        """Memory at the worst moment, beyond what Python and its libraries take."""
        return self.weights + self.covariances + self.hidden + self.batch


def estimate(architecture: Architecture, encoded: list[Encoded], batch_size: int, itemsize: int) -> Estimate:
    """Estimate a calibration of one model.

    Args:
        itemsize: bytes of one number in the precision that the model runs in.
    """
    tokens = sum(sample.tokens for sample in encoded)
    # How many rows a vision tower makes of an image only the model knows: perhaps so many that they are summed.
    pictured = any(sample.is_pictured for sample in encoded)
    lengths = sorted(sample.length for sample in encoded)
    cache = operations = 0
    accumulators: dict[str, int] = defaultdict(int)
    for linear in architecture.linears.values():
        width, matrices = linear.shape[1], len(linear.layers)
        # However tokens spread over experts, each has so many rows in all.
        routed = tokens * min(matrices, architecture.experts_a_token) if linear.experts else tokens
        triangle = 4 * width * (width + 1)
        rows = math.inf if pictured else routed * width * itemsize
        cache += min(rows, matrices * triangle)
        # A weight meets every token, also those that do not count; of a symmetric sum half is computed.
        meets = min(matrices, architecture.experts_a_token) if linear.experts else 1
        operations += 2 * meets * math.prod(linear.shape) * sum(lengths) + (routed * width**2 if rows > triangle else 0)
        # A sum takes twice its triangle, and the place of at least a triangle's bytes of rows.
        largest = rows if rows <= triangle else min(2 * rows, matrices * 8 * width * width)
        accumulators[architecture.block_of(linear.module)] += largest
    wide = max((sum(linear.shape) for linear in architecture.linears.values()), default=0)
    return Estimate(
        cache=cache,
        weights=max(architecture.blocks.values()) * itemsize,
        covariances=max(accumulators.values(), default=0),
        hidden=sum(lengths) * architecture.hidden_size * itemsize,
        batch=lengths[-1] * batch_size * 4 * wide * itemsize,
        operations=operations,
    )


def readable(size: float) -> str:
    """Bytes for people."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
