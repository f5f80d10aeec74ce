"""How often each token occurs in a model's samples."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergekit_pave.calibration.batches import Encoded
from mergekit_pave.calibration.token_rows import PREDICTED, SIDES

_MOST = 1 << 62  # the sum of integers below it is exact


@dataclass(frozen=True, eq=False)
class TokenCounts:
    """How often each token occurs in a model's samples. All tokens count, also those beyond `max_tokens`.

    Attributes:
        of_use: by the model's input, or `PREDICTED`, the count of each id, int64 (largest id + 1,).
        names: a checksum of each id's token, int64 (largest id of the vocabulary + 1,); 0 where there is none.
    """

    of_use: dict[str, Tensor]
    names: Tensor

    def to_tensors(self) -> dict[str, Tensor]:
        """What is kept beside covariances."""
        return {"names": self.names, **self.of_use}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> TokenCounts:
        """
        Raises:
            ValueError: these are no counts.
        """
        names, of_use = tensors.get("names"), {use: tensors[use] for use in (*SIDES, PREDICTED) if use in tensors}
        if names is None or len(tensors) != 1 + len(of_use) or not of_use:
            raise ValueError(f"it has tensors called {', '.join(sorted(tensors))}")
        for values in tensors.values():
            if values.dtype != torch.int64 or values.dim() != 1 or (values < 0).any() or values.double().sum() > _MOST:
                raise ValueError("it has numbers that are no counts")
        return cls(of_use, names)

    def of(self, uses: Sequence[str], rows: int) -> Tensor:
        """The counts, int64 (rows,), over all of these uses.

        Raises:
            ValueError: there are ids without a row.
        """
        total = torch.zeros(rows, dtype=torch.int64)
        for use in uses:
            counts = self.of_use.get(use, total[:0])
            if len(counts) > rows:
                raise ValueError(f"there is a token with the id {len(counts) - 1}, but only {rows} rows")
            total[: len(counts)] += counts
        return total

    def occurs(self, length: int) -> Tensor:
        """Which of the first ids occur, bool (length,)."""
        result = torch.zeros(length, dtype=torch.bool)
        for counts in self.of_use.values():
            counts = counts[:length]
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
    if not vocabulary:
        return None
    names = torch.zeros(max(vocabulary.values()) + 1, dtype=torch.int64)
    ids = torch.tensor(list(vocabulary.values()))
    names[ids] = torch.tensor([_checksum(token) for token in vocabulary])
    of_use = {}
    for side in SIDES:
        if side in encoded[0].inputs:
            of_use[side] = _counts([sample.inputs[side] for sample in encoded])
            of_use[PREDICTED] = _counts([sample.inputs[side][1:] for sample in encoded])  # in the end by the decoder
    return TokenCounts(of_use, names)


def _checksum(token: str | bytes) -> int:
    """Some tokenizers have bytes as tokens. 0 is for ids without a token."""
    return zlib.crc32(token if isinstance(token, bytes) else token.encode(errors="surrogatepass")) or 1


def _counts(sequences: list[list[int]]) -> Tensor:
    return torch.tensor(list(itertools.chain.from_iterable(sequences)), dtype=torch.int64).bincount()


def conflict(one: TokenCounts, other: TokenCounts) -> int | None:
    """The first id that occurs, and stands for another token in the one model than in the other."""
    length = min(len(one.names), len(other.names))
    first, second = one.names[:length], other.names[:length]
    differs = (first != second) & (first != 0) & (second != 0)
    found = (differs & (one.occurs(length) | other.occurs(length))).nonzero()
    return found[0].item() if len(found) else None
