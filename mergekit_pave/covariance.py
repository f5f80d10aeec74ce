"""The second moment of a layer's inputs, C = X^T X / N, in whichever form is smaller.

Few rows are kept as they are, in the model's own precision: exact, and cheaper both to keep and to multiply by
while N < d. Many rows are summed in float64: rounding C to float32 moves the directions that PAVE drops by
far more than the 1e-4 we promise, because they belong to the smallest eigenvalues.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Covariance:
    """Uncentred second moment of N inputs of width d. Exactly one of `rows` and `gram` is set.

    Attributes:
        tokens: N, the number of rows that were seen.
        rows: X, (N, d), in the precision in which the model produced it.
        gram: X^T X (not divided by N), (d, d), float64.
    """

    tokens: int
    rows: Tensor | None = None
    gram: Tensor | None = None

    @classmethod
    def from_rows(cls, rows: Tensor) -> Covariance:
        """Covariance of the rows of one (N, d) tensor."""
        moment = SecondMoment(rows.shape[1])
        moment.add(rows)
        return moment.result()

    @property
    def dim(self) -> int:
        """d, the width of the layer's input."""
        return (self.gram if self.rows is None else self.rows).shape[-1]

    def to(self, device: torch.device) -> Covariance:
        """The same covariance on another device."""
        rows, gram = (x if x is None else x.to(device) for x in (self.rows, self.gram))
        return Covariance(self.tokens, rows, gram)

    def mean_diagonal(self) -> float:
        """Mean of C's diagonal, i.e. the mean square of an input element."""
        total = self.gram.diagonal().sum() if self.rows is None else self.rows.double().square().sum()
        return total.item() / (self.tokens * self.dim)

    def multiply(self, weight: Tensor, shift: float) -> Tensor:
        """`weight @ (C + shift * I)` for a (m, d) float64 weight, without forming C from rows."""
        if self.rows is None:
            product = weight @ self.gram
        else:
            rows = self.rows.to(weight.dtype)
            product = (weight @ rows.mT) @ rows
        return product.div_(self.tokens).add_(weight, alpha=shift)

    def matrix(self) -> Tensor:
        """C itself, (d, d) float64."""
        gram = self.rows.double().mT @ self.rows.double() if self.gram is None else self.gram
        return gram / self.tokens

    def to_tensors(self) -> dict[str, Tensor]:
        """What has to be stored: the rows, or the packed upper triangle of the sum."""
        if self.rows is not None:
            return {"rows": self.rows.contiguous()}
        return {"triangle": torch.cat([self.gram[i, i:] for i in range(self.dim)])}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], tokens: int, dim: int) -> Covariance:
        """The inverse of `to_tensors`."""
        if "rows" in tensors:
            return cls(tokens, rows=tensors["rows"])
        gram = torch.empty(dim, dim, dtype=torch.float64)
        start = 0
        for i in range(dim):
            row = tensors["triangle"][start : start + dim - i]
            gram[i, i:] = row
            gram[i:, i] = row
            start += dim - i
        return cls(tokens, gram=gram)


class SecondMoment:
    """Accumulates a `Covariance` batch by batch, in memory of at most one float64 (d, d) matrix and one batch."""

    def __init__(self, dim: int):
        self.tokens = 0
        self._dim = dim
        self._rows: list[Tensor] = []
        self._gram: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Add the rows of one (n, d) batch."""
        self.tokens += rows.shape[0]
        if self._gram is not None:
            self._sum(rows)
            return
        # A copy: the layer's input may be a view into a buffer that the model reuses.
        self._rows.append(rows.clone())
        triangle_bytes = 8 * self._dim * (self._dim + 1) // 2
        if self.tokens * self._dim * rows.element_size() > triangle_bytes:
            self._gram = torch.zeros(self._dim, self._dim, dtype=torch.float64, device=rows.device)
            for part in self._rows:
                self._sum(part)
            self._rows.clear()

    def _sum(self, rows: Tensor) -> None:
        rows = rows.double()
        self._gram.addmm_(rows.mT, rows)

    def result(self) -> Covariance:
        """The covariance of all rows added so far; at least one."""
        if self._gram is not None:
            return Covariance(self.tokens, gram=self._gram)
        return Covariance(self.tokens, rows=torch.cat(self._rows))
