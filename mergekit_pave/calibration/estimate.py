"""What a calibration will cost, from the architecture and the tokenised samples alone."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mergekit_pave.calibration.architecture import NO_BLOCK, Architecture
from mergekit_pave.calibration.batches import Encoded
from mergekit_pave.core.covariance import SecondMoment
from mergekit_pave.core.linear import Linear


@dataclass(frozen=True)
class Estimate:
    """What a calibration needs, in bytes; only `operations` is a number of multiplications and additions.

    Attributes:
        cache: covariances on disk. Only the model shows which layers share an input, so it may turn out a little more or less.
        embeddings: weights that are in no block.
        weights: weights of the largest block.
        covariances: sums and rows of the block that has most of them.
        hidden: the embeddings and hidden states of all samples between two blocks; on a device, of those that wait there.
        batch: activations of the largest batch within a block, with its attention mask or with the memory for adding to a sum.
        operations: of the forward pass and of the sums.
        decomposition: decomposing the largest weight while the covariances of its block are in memory.
    """

    cache: int
    embeddings: int
    weights: int
    covariances: int
    hidden: int
    batch: int
    operations: int
    decomposition: int = 0

    @property
    def peak(self) -> int:
        """Peak memory, beyond that of Python and its libraries."""
        at_work = max(self.weights + self.batch, self.decomposition)
        return max(self.embeddings + self.hidden // 2, self.covariances + self.hidden + at_work)


def estimate(
    architecture: Architecture,
    encoded: list[Encoded],
    batch_size: int,
    itemsize: int,
    *,
    only_head: bool = False,
    keep: bool = True,
) -> Estimate:
    """Estimate a calibration of one model.

    Args:
        itemsize: bytes of one number in the precision that the model runs in.
        only_head: only the head is measured.
        keep: the covariances are stored.
    """
    tokens = sum(sample.tokens for sample in encoded)
    # Only the model knows how many rows a vision tower makes of an image. There may be so many that they are summed.
    pictured = any(sample.is_pictured for sample in encoded)
    batches = batches_of(encoded, batch_size)
    padded = [padded_tokens(batch) for batch in batches]

    def rows_of(linear: Linear) -> float:
        return math.inf if pictured else tokens * _meets(architecture, linear) * linear.shape[1] * itemsize

    head = architecture.weights[f"{architecture.head}.weight"] if architecture.head else (0, 0)
    heads = [Linear(architecture.head, head, transposed=False)] if architecture.head else []
    measured = () if only_head else architecture.linears.values()
    # The weight of a head multiplies only tokens that count.
    cache, operations = 0, pass_operations(architecture, encoded) + 2 * math.prod(head) * tokens
    inputs = list(distinct_inputs(architecture, measured))
    for linear in (*(linear for _, linear in inputs), *heads):
        triangle, meets = _triangle(linear), _meets(architecture, linear)
        if keep or linear in heads:
            cache += min(rows_of(linear), len(linear.layers) * triangle)
        # Of a symmetric sum half is computed.
        operations += tokens * meets * linear.shape[1] ** 2 if rows_of(linear) > triangle else 0
    sums: dict[str, int] = defaultdict(int)
    adding = 0
    for block, linear in inputs:
        rows, width = rows_of(linear), linear.shape[1]
        if rows > _triangle(linear):
            # An expert keeps rows until they take more memory than their sum would.
            sums[block] += min(2 * rows, len(linear.layers) * 8 * width**2)
            together = width * min(tokens, _CHUNK + max(padded)) * itemsize
            adding = max(adding, 2 * together + width * min(tokens, _CHUNK) * 8)
        else:
            sums[block] += rows
            adding = max(adding, rows)
    return Estimate(
        cache=cache + 8 * head[0] + _COUNTS * (architecture.vocabulary or 0),
        embeddings=max(architecture.blocks[NO_BLOCK], math.prod(head)) * itemsize,
        weights=max((count for path, count in architecture.blocks.items() if path != NO_BLOCK), default=0) * itemsize,
        covariances=max(sums.values(), default=0),
        hidden=sum(padded) * hidden_of_token(architecture, itemsize),
        batch=max(activations(architecture, batch, itemsize, adding) for batch in batches[-2:]),
        operations=operations,
    )


_CHUNK = SecondMoment.CHUNK  # rows in one product of a sum
_COUNTS = 8 * 4  # bytes of a token on disk: how often it is an input, of a decoder too, how often it is to come, and its name


def batches_of(encoded: list[Encoded], batch_size: int) -> list[list[Encoded]]:
    """The samples in their batches, the longest batch last."""
    ordered = sorted(encoded, key=lambda sample: sample.length)
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def padded_tokens(batch: list[Encoded]) -> int:
    """The number of tokens in a batch, with padding."""
    return len(batch) * batch[-1].length


def hidden_of_token(architecture: Architecture, itemsize: int) -> int:
    """Bytes of a token between two blocks: its embedding and hidden state; its id, whether it counts, runs of packed masks."""
    return 2 * architecture.hidden_size * itemsize + 40


def pass_operations(architecture: Architecture, encoded: list[Encoded]) -> int:
    """Multiplications and additions of one pass. A weight multiplies all tokens, also those that do not count."""
    tokens = sum(sample.length for sample in encoded)
    return sum(2 * _meets(architecture, one) * math.prod(one.shape) * tokens for one in architecture.linears.values())


def _triangle(linear: Linear) -> int:
    """Bytes of a sum on disk."""
    return 4 * linear.shape[1] * (linear.shape[1] + 1)


def _meets(architecture: Architecture, linear: Linear) -> int:
    """How many of the layer's matrices multiply a token. For experts this is the same however tokens are routed."""
    return min(len(linear.layers), architecture.experts_a_token) if linear.experts else 1


def distinct_inputs(architecture: Architecture, linears: Iterable[Linear]) -> Iterator[tuple[str, Linear]]:
    """Those linear layers of a model that probably have different inputs, each with its block.

    Only a run of the model shows which layers share an input. Most often these are the layers of one module with inputs of one
    width, except for the layer whose output is added to the hidden states: query, key and value, but not output; gate and up.
    """
    groups: dict[tuple[str, int, bool], list[Linear]] = defaultdict(list)
    for linear in linears:
        may_be_last = linear.shape[0] == architecture.hidden_size
        groups[linear.module.rpartition(".")[0], linear.shape[1], may_be_last].append(linear)
    for (*_, may_be_last), alike in groups.items():
        for linear in alike[: 2 if may_be_last and len(alike) > 3 else 1]:
            yield architecture.block_of(linear.module), linear


def activations(architecture: Architecture, batch: list[Encoded], itemsize: int, adding: int) -> int:
    """Bytes of a batch within a block.

    Args:
        adding: bytes that adding to a sum takes.
    """
    lengths = [sample.longest for sample in batch]
    pairs, of_one_channel = len(batch) * max(lengths) ** 2, len(batch) * max(lengths) * itemsize
    hidden = architecture.hidden_size
    widest = max((_meets(architecture, one) * max(one.shape) for one in architecture.linears.values()), default=hidden)
    # Scores are in memory twice, before and after softmax. Other attention turns its mask into numbers.
    attention = 8 * hidden * of_one_channel + 2 * pairs * architecture.scored_heads * itemsize
    if architecture.is_windowed or min(lengths) < max(lengths):
        attention += pairs * (1 + itemsize)
    return max(attention, (2 * hidden + 3 * widest) * of_one_channel, (2 * hidden + widest) * of_one_channel + adding)
