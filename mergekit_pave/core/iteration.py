"""A few eigenvectors or singular vectors of a matrix that multiplies many vectors at a time, by iteration.

Vectors are rows, (vectors, n): thin products are up to twice as fast that way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]  # rows to rows

_ROUNDS, _DEGREE = 12, 10
_GROWTH = math.log(1e5)  # of a vector in one round, at most: float32 has seven digits


class Leading(NamedTuple):
    """Leading eigenpairs, and some more that are less exact.

    Attributes:
        values: (width,) float64, descending.
        vectors: (width, n).
        error: the norm of the residuals of those that were asked for, over the distance from the last of them to the end of
            the block. It bounds the angle between their span and the true one.
    """

    values: Tensor
    vectors: Tensor
    error: float


def width_of_block(count: int) -> int:
    """Vectors that are iterated to find `count` of them. The more there are, the farther away is the rest of the spectrum."""
    return count + max(8, count // 2)


def leading(apply: Map, n: int, count: int, like: Tensor, tolerance: float = 1e-6) -> Leading:
    """Leading eigenpairs of a positive semidefinite (n, n) operator, in the precision of `like`.

    Between two Rayleigh-Ritz steps the block is multiplied by a Chebyshev polynomial of the operator: among all polynomials of
    a degree that are small on what lies below the block's smallest Ritz value, it grows fastest above.

    Args:
        apply: the operator.
        count: how many are to be exact. `width_of_block(count)` are found, which must not be more than n.
        tolerance: of the `error`.
    """
    block = orthonormal(apply(random_rows(width_of_block(count), n, like)))
    before = math.inf
    for _ in range(_ROUNDS):
        images = apply(block)
        values, rotation = torch.linalg.eigh(_symmetric(images @ block.mT).double())
        values, rotation = values.flip(0), rotation.flip(1).mT.to(like.dtype)
        block, images = rotation @ block, rotation @ images
        residual = (images - values[:, None].to(like.dtype) * block)[:count].norm().double()
        first, last, edge, residual = torch.stack([values[0], values[count - 1], values[-1], residual]).tolist()
        error = residual / (last - edge) if last > edge else math.inf if residual > 1e-9 * last else 0.0
        # Near the limits of the precision residuals do not fall any more.
        if not edge > 0 or error < tolerance or (before < 1e-2 and error > before / 2):
            break
        before = error
        growth = math.acosh(max(2 * first / edge - 1, 1 + 1e-6))  # of the first vector, for each degree
        block = _chebyshev(apply, block, images, edge, max(1, min(_DEGREE, int(_GROWTH / growth))))
    return Leading(values, block, error)


def _chebyshev(apply: Map, block: Tensor, images: Tensor, edge: float, degree: int) -> Tensor:
    """T_degree(2 S / edge - 1) times a block whose image under S is known, made orthonormal."""
    before, now = block, images * (2 / edge) - block
    for _ in range(degree - 1):
        before, now = now, apply(now).mul_(4 / edge).sub_(now, alpha=2).sub_(before)
    return orthonormal(now)


def smallest(
    forward: Map, backward: Map, inverse: Tensor, unit: Tensor, vectors: Tensor, count: int
) -> tuple[Tensor, Tensor] | None:
    """Left singular vectors of A (n, m) for its smallest values, from vectors that are nearly those (Jacobi-Davidson).

    How good the inverse is decides how many steps are needed, not how exact the result is: an approximation would be found
    wanting in the residuals, which are those of A itself.

    Args:
        forward: x -> x A.
        backward: y -> y A^T.
        inverse: about (A A^T / unit^2)^-1, (n, n) float32.
        unit: a float64 number.
        vectors: more than `count`, (width, n) float64.

    Returns:
        Vectors (count, n) and values (count,), ascending. None if they do not become exact in a few steps.
    """
    width, vectors = len(vectors), orthonormal(vectors)
    images, before = forward(vectors), 1.0
    for _ in range(6):
        # The singular vectors within the span: V A = P S Q^T.
        rotation, values, _ = torch.linalg.svd(torch.linalg.qr(images.mT, mode="r").R.mT)
        rotation, values = rotation.flip(1).mT[:width], values.flip(0)[:width]
        vectors, images = rotation @ vectors, rotation @ images
        squares = values[:count, None].square()
        residuals = backward(images[:count]) / squares - vectors[:count]
        lacking = _correction(residuals, inverse, (values[:count, None] / unit).square(), vectors)
        size, rounding = (torch.stack([lacking.norm(), 1e-6 * residuals.norm()]) / math.sqrt(count)).tolist()
        if size + rounding <= 2e-5:
            return orthonormal(vectors[:count] - lacking), values[:count]
        if not size < before:
            return None
        before = size
        lacking = orthonormal(outside(orthonormal(lacking), vectors))
        vectors, images = torch.cat([vectors, lacking]), torch.cat([images, forward(lacking)])
    return None


def _correction(residuals: Tensor, inverse: Tensor, factors: Tensor, vectors: Tensor) -> Tensor:
    """What singular vectors lack: x outside the span of all `vectors` with A A^T x - value^2 x = value^2 residual.

    With S = (A A^T)^-1 this is (1 - value^2 S) x = value^2 S residual. The eigenvalues are from 0 to 1, the farther from 0 the
    wider the block is. So a few steps of conjugate gradients in float32 solve it well enough.

    Args:
        inverse: see `smallest`.
        factors: (value / unit)^2 of each vector, (count, 1).
    """
    factors, vectors = factors.float(), vectors.float()
    remaining = outside(residuals.float() @ inverse * factors, vectors)
    result, step, size = torch.zeros_like(remaining), remaining, remaining.square().sum(1, keepdim=True)
    for _ in range(8):
        image = step - outside(step @ inverse * factors, vectors)
        length = size / (step * image).sum(1, keepdim=True).clamp_min(1e-30)
        result, remaining = result + length * step, remaining - length * image
        size, before = remaining.square().sum(1, keepdim=True), size
        step = remaining + size / before.clamp_min(1e-30) * step
    return result.double()


def outside(x: Tensor, vectors: Tensor) -> Tensor:
    """The rows of x without their part in the span of orthonormal vectors. It is removed twice, against rounding."""
    for _ in range(2):
        x = x - x @ vectors.mT @ vectors
    return x


def _symmetric(x: Tensor) -> Tensor:
    return (x + x.mT) / 2


def orthonormal(x: Tensor) -> Tensor:
    """Orthonormal rows that span the same space."""
    return torch.linalg.qr(x.mT).Q.mT.contiguous()


def random_rows(rows: int, columns: int, like: Tensor) -> Tensor:
    """Normal numbers, the same in every run and on every device."""
    generator = torch.Generator().manual_seed(0)
    # mergekit's workers make their GPU the default device, which would refuse this generator.
    return torch.randn(rows, columns, generator=generator, dtype=like.dtype, device="cpu").to(like.device)
