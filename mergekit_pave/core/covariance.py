"""The second moment of a layer's inputs, C = X^T X / N, in whichever form is smaller.

Few rows are kept as they are, in the model's own precision. This is exact, and cheaper to multiply by. Many rows are summed:
products of a thousand rows at a time are added up in float64. The products of the first two thousand rows are float64, too.
Later products are float32, which is twice as fast. Over many products their rounding averages out to that of the model's own
forward pass. They stay float64 where squares of the values would be out of range of float32. (A sum in float32 would move the
directions that PAVE drops, which belong to the smallest eigenvalues, about ten times further.)
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_pave.core.exact import float32_products, float64_device, in_float64
from mergekit_pave.core.gram import add_upper_gram, inverse_of_gram, mirror_upper, packed, unpacked, upper_gram


@dataclass(frozen=True)
class Covariance:
    """Uncentred second moment of N inputs of width d. Exactly one of `rows` and `gram` is set.

    Layers that see the same input share one covariance. So what several decompositions need of it is computed once, and kept
    as long as the covariance.

    Attributes:
        tokens: N, the number of rows.
        rows: X, (N, d), in the precision in which the model produced it.
        gram: X^T X (not divided by N), (d, d), float64.
    """

    tokens: int
    rows: Tensor | None = None
    gram: Tensor | None = None

    @classmethod
    def from_rows(cls, rows: Tensor) -> Covariance:
        """Covariance of the rows of one (N, d) tensor.

        Raises:
            ValueError: it is not a float matrix, has no rows, or it or its second moment is not finite.
        """
        if rows.dim() != 2 or not len(rows) or not rows.is_floating_point():
            raise ValueError(f"rows must be a float matrix (tokens, width), not {rows.dtype} of shape {tuple(rows.shape)}")
        moment = SecondMoment(rows.shape[1])
        moment.add(rows)
        return moment.result()

    @classmethod
    def joined(cls, parts: Sequence[Covariance]) -> Covariance:
        """The covariance of all rows of several covariances. Of one it is that covariance itself, not a copy."""
        if len(parts) == 1:
            return parts[0]
        moment = SecondMoment(parts[0].dim)
        for part in parts:
            moment.add_all(part.to(parts[0].device))
        return moment.result()

    @property
    def dim(self) -> int:
        """d, the width of the layer's input."""
        return (self.gram if self.rows is None else self.rows).shape[-1]

    @property
    def device(self) -> torch.device:
        """The device of its tensor."""
        return (self.gram if self.rows is None else self.rows).device

    def to(self, device: torch.device) -> Covariance:
        """The same covariance on another device, or on the CPU where that one has no float64. There it is itself, not a copy."""
        device = float64_device(device)
        if device == self.device:
            return self
        rows, gram = (x if x is None else x.to(device) for x in (self.rows, self.gram))
        return Covariance(self.tokens, rows, gram)

    def with_exact_rows(self) -> Covariance:
        """The same with rows in float64, for many products. It is itself if these will not be of rows."""
        if self.rows is None or "_sum" in self.__dict__:
            return self
        return Covariance(self.tokens, rows=in_float64(self.rows))

    def mean_diagonal(self) -> float:
        """Mean of C's diagonal, which is the mean square of an input element."""
        total = self.gram.diagonal().sum() if self.rows is None else in_float64(self.rows).square().sum()
        return total.item() / (self.tokens * self.dim)

    def multiply(self, weight: Tensor, shift: float) -> Tensor:
        """`weight @ (C + shift * I)` in the precision of a (m, d) weight, without forming C from rows where that takes longer."""
        if self.rows is not None and "_sum" not in self.__dict__:
            rows = self.rows.to(weight.dtype)
            m, (n, d) = weight.shape[0], rows.shape
            if 4 * m * n <= n * d + 2 * m * d:  # the operations of (W X^T) X and of W (X^T X), over d
                product = (weight @ rows.mT) @ rows
                return product.div_(self.tokens).add_(weight, alpha=shift)
        product = weight @ self._sum.to(weight.dtype)
        return product.div_(self.tokens).add_(weight, alpha=shift)

    def inverse(self, shift: float) -> Tensor | None:
        """shift * (C + shift * I)^-1, (d, d) float32, which must not change; None where rounding makes C indefinite."""
        if self.__dict__.get("_inverse", (None, None))[0] != shift:
            shifted = self._sum / self.tokens
            shifted.diagonal().add_(shift)
            inverse = inverse_of_gram(shifted)
            self.__dict__["_inverse"] = shift, None if inverse is None else inverse.mul_(shift).float()
        return self.__dict__["_inverse"][1]

    @functools.cached_property
    def _sum(self) -> Tensor:
        return self.unscaled()

    def unscaled(self) -> Tensor:
        """X^T X, (d, d) float64."""
        return mirror_upper(upper_gram(in_float64(self.rows))) if self.gram is None else self.gram

    def matrix(self) -> Tensor:
        """C itself, (d, d) float64."""
        return self.unscaled() / self.tokens

    def to_tensors(self) -> dict[str, Tensor]:
        """What is stored: the rows, or the upper triangle of the sum; see `gram.packed`."""
        if self.rows is not None:
            return {"rows": self.rows.contiguous()}
        return {"triangle": packed(self.gram)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], tokens: int, dim: int) -> Covariance:
        """The inverse of `to_tensors`.

        Raises:
            ValueError: the tensors are not those of a covariance of so many tokens and of this width.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if shapes == {"rows": (tokens, dim)} and tensors["rows"].is_floating_point():
            return cls(tokens, rows=tensors["rows"])
        if shapes != {"triangle": (dim * (dim + 1) // 2,)} or tensors["triangle"].dtype != torch.float64:
            raise ValueError(f"tensors of shapes {shapes} are not the covariance of {tokens} rows of width {dim}")
        return cls(tokens, gram=unpacked(tensors["triangle"], dim))


class SecondMoment:
    """Accumulates a `Covariance` batch by batch, in memory of at most one float64 (d, d) matrix and a few batches."""

    CHUNK = 1024  # rows in one product: fewer would spend their time on reading the sum, more would lose precision
    EXACT = 2048  # rows that are multiplied in float64
    _RANGE = 1e-12, 1e15  # of the largest magnitude in a product in float32, so that squares of much smaller values are in range
    _SQUARABLE = 1e145  # magnitudes up to this have squares whose sums are within float64

    def __init__(self, dim: int):
        self.tokens = 0
        self._dim = dim
        self._rows: list[Tensor] = []
        self._pending = 0  # rows that are not in the sum
        self._largest = self._ever_largest = 0.0  # magnitudes, among the pending rows and among all
        self._gram: Tensor | None = None

    def add(self, rows: Tensor, largest: float | None = None) -> None:
        """Add the rows of one (n, d) batch, which must not change afterwards.

        Args:
            largest: the largest magnitude among them, if it is known: see `magnitudes`.

        Raises:
            ValueError: a value is not finite.
        """
        if not len(rows):
            return
        rows = rows.to(float64_device(rows.device))
        if largest is None:
            (largest,) = magnitudes([rows])
        if not math.isfinite(largest):
            raise ValueError("rows have values that are not finite")
        self._largest, self._ever_largest = max(self._largest, largest), max(self._ever_largest, largest)
        self.tokens += rows.shape[0]
        self._rows.append(rows)
        self._pending += rows.shape[0]
        triangle_bytes = 8 * self._dim * (self._dim + 1) // 2
        if self._gram is None and self._pending * self._dim * rows.element_size() > triangle_bytes:
            self._gram = torch.zeros(self._dim, self._dim, dtype=torch.float64, device=rows.device)
        if self._gram is not None and self._pending >= self.CHUNK:
            self._sum_pending()

    def add_all(self, other: Covariance) -> None:
        """Add the rows of another covariance on the same device."""
        if other.rows is not None:
            self.add(other.rows)
            return
        if self._gram is None:
            self._gram = torch.zeros_like(other.gram)
        self._gram += other.gram
        self._ever_largest = math.inf  # it is not known
        self.tokens += other.tokens

    def _sum_pending(self) -> None:
        summed = self.tokens - self._pending
        pending = self._rows[0] if len(self._rows) == 1 else torch.cat(self._rows)  # `cat` copies even a single tensor
        fits = self._RANGE[0] < self._largest < self._RANGE[1]
        for rows in pending.split(self.CHUNK):
            precision = torch.float32 if fits and summed >= self.EXACT else torch.float64
            with float32_products(rows.device):
                add_upper_gram(self._gram, rows.to(torch.promote_types(rows.dtype, precision)))
            summed += rows.shape[0]
        self._rows.clear()
        self._pending = 0
        self._largest = 0.0

    def result(self) -> Covariance:
        """The covariance of all rows added so far; at least one.

        Raises:
            ValueError: the values are so large that their squares are not finite, even in float64.
        """
        if self._gram is None:
            self._rows = [torch.cat(self._rows)]  # the parts are let go: there may be no room for both
            result = Covariance(self.tokens, rows=self._rows[0])
        else:
            if self._pending:
                self._sum_pending()
            result = Covariance(self.tokens, gram=mirror_upper(self._gram))
        # No element of C is larger than the largest on its diagonal. To look at that an accelerator would have to be waited for.
        if self._ever_largest > self._SQUARABLE and not math.isfinite(result.mean_diagonal()):
            raise ValueError("rows have values that are too large: their second moment is not finite")
        return result


def magnitudes(tensors: Sequence[Tensor]) -> list[float]:
    """The largest magnitude in each of several float tensors of one device, NaN if one is in it, and 0 in an empty one.

    An accelerator has to be waited for only once for all of them.
    """
    filled = [torch.stack(tensor.aminmax()) for tensor in tensors if tensor.numel()]
    found = iter(torch.stack(filled).abs().amax(dim=1).tolist() if filled else [])
    return [next(found) if tensor.numel() else 0.0 for tensor in tensors]


class Measurement(NamedTuple):
    """The covariance of an input, and the names of the layers that see this input."""

    layers: list[str]
    covariance: Covariance


class Covariances(ABC):
    """The covariances of a model's layers, by the layers' names.

    Layers that share a weight are named together, because the inputs of all of them are multiplied by it.
    """

    @abstractmethod
    def _tokens(self, layer: str) -> int: ...

    @abstractmethod
    def _load(self, layer: str, device: torch.device | str) -> Covariance: ...

    def tokens(self, layers: Sequence[str]) -> int:
        """How many tokens the layers saw, together."""
        return sum(map(self._tokens, layers))

    def load(self, layers: Sequence[str], device: torch.device | str = "cpu") -> Covariance:
        """The covariance of the inputs of layers, together. At least one of them has seen tokens.

        Args:
            device: where it goes, or to the CPU if that device has no float64.
        """
        return Covariance.joined([self._load(layer, device) for layer in layers if self._tokens(layer)])
