"""The second moment of a layer's inputs, C = X^T X / N, in whichever form is smaller.

Few rows are kept as they are, in the model's own precision: exact, and the cheaper thing to multiply by too. Many
rows are summed in float64. Float32 would be twice as fast and half as large, but it moves the directions that PAVE
drops, which belong to the smallest eigenvalues, by 1e-4 of the removed part at the default λ and by far more below it.
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
        gram = self.gram
        if self.rows is not None:
            rows = self.rows.to(weight.dtype)
            m, (n, d) = weight.shape[0], rows.shape
            if 4 * m * n <= n * d + 2 * m * d:  # operations, over d: (W X^T) X against W (X^T X)
                product = (weight @ rows.mT) @ rows
                return product.div_(self.tokens).add_(weight, alpha=shift)
            gram = upper_gram(rows)
            gram += gram.triu(1).mT
        product = weight @ gram
        return product.div_(self.tokens).add_(weight, alpha=shift)

    def unscaled(self) -> Tensor:
        """X^T X, (d, d) float64."""
        return self.rows.double().mT @ self.rows.double() if self.gram is None else self.gram

    def matrix(self) -> Tensor:
        """C itself, (d, d) float64."""
        return self.unscaled() / self.tokens

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
    """Accumulates a `Covariance` batch by batch, in memory of at most one float64 (d, d) matrix and a few batches."""

    _CHUNK = 1024  # rows are saved up to this number: many small products would spend their time on reading the sum
    _STRIP = 512  # columns in one product: what is left of the strip is its mirror image and need not be computed

    def __init__(self, dim: int):
        self.tokens = 0
        self._dim = dim
        self._rows: list[Tensor] = []
        self._pending = 0
        self._gram: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Add the rows of one (n, d) batch, which must not change afterwards."""
        self.tokens += rows.shape[0]
        self._rows.append(rows)
        self._pending += rows.shape[0]
        triangle_bytes = 8 * self._dim * (self._dim + 1) // 2
        if self._gram is None and self._pending * self._dim * rows.element_size() > triangle_bytes:
            self._gram = torch.zeros(self._dim, self._dim, dtype=torch.float64, device=rows.device)
        if self._gram is not None and self._pending >= self._CHUNK:
            self._sum_pending()

    def _sum_pending(self) -> None:
        for rows in torch.cat(self._rows).split(4 * self._CHUNK):
            rows = rows.double()
            for start in range(0, self._dim, self._STRIP):
                stop = start + self._STRIP
                self._gram[start:stop, start:].addmm_(rows[:, start:stop].mT, rows[:, start:])
        self._rows.clear()
        self._pending = 0

    def result(self) -> Covariance:
        """The covariance of all rows added so far; at least one."""
        if self._gram is None:
            return Covariance(self.tokens, rows=torch.cat(self._rows))
        if self._pending:
            self._sum_pending()
        for start in range(0, self._dim, self._STRIP):
            stop = start + self._STRIP
            self._gram[stop:, start:stop] = self._gram[start:stop, stop:].mT
        return Covariance(self.tokens, gram=self._gram)


def upper_gram(x: Tensor, strip: int = 512) -> Tensor:
    """The upper triangle of x^T x for x (rows, n), and zeros below it: half of the work of the whole product."""
    n = x.shape[1]
    gram = x.new_zeros(n, n)
    for start in range(0, n, strip):
        torch.mm(x[:, start : start + strip].mT, x[:, start:], out=gram[start : start + strip, start:])
    return gram.triu_()
