"""How often each token occurs in a model's samples."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergekit_pave.calibration.batches import Encoded
from mergekit_pave.calibration.embeddings import SIDES

_MOST = 1 << 62  # the sum of integers below it is exact


@dataclass(frozen=True, eq=False)
class TokenCounts:
    """How often each token occurs in a model's samples. All tokens count, also those beyond `max_tokens`.

    Attributes:
        sides: by the model's input, the count of each id, int64 (largest id + 1,).
        names: a checksum of each id's token, int64 (largest id of the vocabulary + 1,); 0 where there is none.
    """

    sides: dict[str, Tensor]
    names: Tensor

    def to_tensors(self) -> dict[str, Tensor]:
        """What is kept beside covariances."""
        return {"names": self.names, **self.sides}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> TokenCounts:
        """
        Raises:
            ValueError: these are no counts.
        """
        names, sides = tensors.get("names"), {side: tensors[side] for side in SIDES if side in tensors}
        if names is None or len(tensors) != 1 + len(sides) or not sides:
            raise ValueError(f"it has tensors called {', '.join(sorted(tensors))}")
        for values in tensors.values():
            if values.dtype != torch.int64 or values.dim() != 1 or (values < 0).any() or values.double().sum() > _MOST:
                raise ValueError("it has numbers that are no counts")
        return cls(sides, names)

    def of(self, sides: Sequence[str], rows: int) -> Tensor:
        """The counts, int64 (rows,), of all ids that some of the model's inputs have.

        Raises:
            ValueError: there are ids without a row.
        """
        total = torch.zeros(rows, dtype=torch.int64)
        for side in sides:
            counts = self.sides.get(side, total[:0])
            if len(counts) > rows:
                raise ValueError(f"there is a token with the id {len(counts) - 1}, but only {rows} rows")
            total[: len(counts)] += counts
        return total

    def occurs(self, length: int) -> Tensor:
        """Which of the first ids occur, bool (length,)."""
        result = torch.zeros(length, dtype=torch.bool)
        for side in SIDES:
            if side in self.sides:
                counts = self.sides[side][:length]
                result[: len(counts)] |= counts > 0
        return result


def count_tokens(encoded: Sequence[Encoded], tokenizer: Any) -> TokenCounts | None:
    """Count the tokens of samples. None if they are not made of tokens alone, or nobody knows which tokens these are.

    In a text with an image, most ids stand for parts of the image.
    """
    if any(sample.is_pictured or "input_ids" not in sample.inputs for sample in encoded):
        return None
    try:
        vocabulary = tokenizer.get_vocab()
    except NotImplementedError:
        return None
    names = torch.zeros(max(vocabulary.values()) + 1, dtype=torch.int64)
    ids = torch.tensor(list(vocabulary.values()))
    names[ids] = torch.tensor([zlib.crc32(token.encode(errors="surrogatepass")) or 1 for token in vocabulary])
    sides = {}
    for side in SIDES:
        ids = [torch.tensor(sample.inputs[side]) for sample in encoded if sample.inputs.get(side)]
        if ids:
            sides[side] = torch.cat(ids).bincount()
    return TokenCounts(sides, names)


def conflict(one: TokenCounts, other: TokenCounts) -> int | None:
    """The first id that occurs, and stands for another token in the one model than in the other."""
    length = min(len(one.names), len(other.names))
    first, second = one.names[:length], other.names[:length]
    differs = (first != second) & (first != 0) & (second != 0)
    found = (differs & (one.occurs(length) | other.occurs(length))).nonzero()
    return found[0].item() if len(found) else None
