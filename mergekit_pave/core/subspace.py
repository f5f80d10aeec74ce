"""The mathematics of PAVE on single tensors: which directions of a weight to drop, and dropping them.

With W (d_out, d_in), C_s = C + shift * I and W C_s = U S V^T, PAVE keeps the top r components of the
context-oriented SVD (CorDA, arXiv 2406.05223) and multiplies C_s's inverse back. Since
U_r S_r V_r^T = U_r U_r^T W C_s, the inverse cancels:

    W' = U_r U_r^T W = W - U_t U_t^T W,    U_t: the left singular vectors of the dropped tail,

so only the few smallest singular directions are ever computed. The tail lives at the far end of a spectrum that covers six
decades and more. In A A^T (A = W C_s) it would drown in the rounding error of the largest values. In (A A^T)^-1 it comes first
and is well separated. So that is where it is sought, in one of two ways:

- From an inverse in float32, which is cheap, but so rough that it only suggests directions: products of these few with A in
  float64 tell what they lack, until that is nothing. Thus for weights that are not square and drop few of many components.
- From a factorisation of A in float64: for all others. Square weights are too ill-conditioned for the first way.

Where A is singular to working precision, as for a weight that is rank-deficient, a full SVD takes over. Only a checked result
leaves this file: each direction and value is exact. That none is missing among the smallest rests on blocks that are wider than
what is asked for. Taking the directions out of W is an ordinary product in W's precision.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_pave.core.covariance import Covariance
from mergekit_pave.core.eigenpairs import leading_eigenpairs
from mergekit_pave.core.exact import float32_products, in_float64
from mergekit_pave.core.failures import NOT_CONVERGED
from mergekit_pave.core.gram import inverse_of_gram, mirror_upper, upper_gram
from mergekit_pave.core.iteration import Map, leading, orthonormal, random_rows, smallest, width_of_block
from mergekit_pave.core.krylov import leading_by_krylov

_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Tail:
    """The smallest singular components of W C_s, smallest first.

    Attributes:
        directions: left singular vectors, (d_out, k).
        values: singular values, (k,) float64, ascending.
        largest: the largest singular value of W C_s.
        energy: ||W C_s||_F^2, the sum of all squared singular values.
    """

    directions: Tensor
    values: Tensor
    largest: float
    energy: float


def tail_components(weight: Tensor, covariance: Covariance, shift: float, count: int) -> Tail:
    """The `count` smallest singular components of W C_s.

    If several singular values coincide at the cut, the components are not unique: those below the cut are among the result, and
    of the coinciding ones as many as `count` leaves room for, in the basis that the iteration arrives at.

    Args:
        weight: W, (d_out, d_in), any float dtype.
        covariance: of the layer's input, width d_in, on the weight's device.
        shift: the regularisation added to C's diagonal, > 0.
        count: how many components, 0 < count < min(d_out, d_in).

    Returns:
        The tail, on the weight's device, or on the CPU if that device has no float64.

    Raises:
        OverflowError: values are so large that they cannot be squared in float64.
    """
    weight = in_float64(weight)
    d_out, d_in = weight.shape
    # W = Q R with d_out > d_in: the left singular vectors of W C_s are Q times those of R C_s, which is square.
    triangle, times_q = _triangle(weight) if d_out > d_in else (weight, None)
    tail = _tail_by_correction(triangle, covariance, shift, count) if d_out != d_in else None
    if tail is None:
        tail = _tail_of_product(covariance.multiply(triangle, shift), count)
    return tail if times_q is None else dataclasses.replace(tail, directions=times_q(tail.directions))


def _tail_by_correction(weight: Tensor, covariance: Covariance, shift: float, count: int) -> Tail | None:
    """The tail of A = W C_s for a well-conditioned W (n, d), n <= d, without A in float64; None if this does not succeed."""
    if not _is_worth_iterating(len(weight), count):
        return None
    scale = weight.abs().max()  # float32 has a narrow range
    rough = (weight / scale).float()
    with contextlib.suppress(*NOT_CONVERGED), float32_products(weight.device):
        product = covariance.multiply(rough, shift)
        inverse = _inverse_of_square(rough, covariance, shift) if len(weight) == covariance.dim else _inverse_of_gram(product)
        if inverse is None:
            return None
        inverse, unit = inverse
        covariance = covariance.with_exact_rows()
        forward = lambda x: covariance.multiply(x @ weight, shift)  # noqa: E731
        backward = lambda y: covariance.multiply(y, shift) @ weight.mT  # noqa: E731
        vectors = leading(lambda x: x @ inverse, len(inverse), count, inverse, tolerance=1e-4).vectors.double()
        pairs = smallest(forward, backward, inverse, scale * unit, vectors, count)
        if pairs is None:
            return None
        top = leading(lambda x: x @ product @ product.mT, len(product), 1, product, tolerance=1e-4)
        energy = torch.linalg.vector_norm(product, dim=1).double().square().sum()
        largest, *found = torch.stack([forward(top.vectors[:1].double()).norm(), top.values[0].sqrt(), energy]).tolist()
        scale = scale.item()
        # In float32 little is left of a product in which most cancels, or of very small or large values.
        if top.error < 1e-2 and math.isclose(found[0] * scale, largest, rel_tol=3e-6):
            return Tail(pairs[0].mT, pairs[1], largest, found[1] * scale**2)
    return None


def _inverse_of_square(triangle: Tensor, covariance: Covariance, shift: float) -> tuple[Tensor, float] | None:
    """(A A^T / u^2)^-1 in float32 and the number u, for A = R C_s with an upper triangle R (n, n) in float32."""
    inverse = covariance.inverse(shift)
    if inverse is None:
        return None
    root = torch.linalg.solve_triangular(triangle, inverse, upper=True, left=False)
    return mirror_upper(upper_gram(root)), shift


def _inverse_of_gram(a: Tensor) -> tuple[Tensor, Tensor] | None:
    """The same for A (n, d) in float32."""
    # This squares the condition of A. What float64 leaves of it is enough for an inverse that only suggests directions.
    inverse = inverse_of_gram(upper_gram(a.mT.double()))
    if inverse is None:
        return None
    largest = inverse.abs().max()
    return (inverse / largest).float(), largest.rsqrt()


def _tail_of_product(a: Tensor, count: int) -> Tail:
    """The tail of A (n, m), n <= m."""
    energy = a.square().sum().item()
    if not math.isfinite(energy):
        raise OverflowError("the weight or its layer's inputs have values too large to be squared in float64")
    if energy == 0:
        directions = torch.eye(len(a), count, dtype=torch.float64, device=a.device)
        return Tail(directions, directions.new_zeros(count), 0.0, 0.0)
    largest = _largest(a)
    vectors, values = _smallest(a, count, largest)
    return Tail(vectors.mT, values, largest, energy)


def _triangle(weight: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """R of W = Q R for a tall W, and the product with Q."""
    # W^T W = R^T R costs a fraction of Householder's QR. It squares the condition of W, but that of C, the larger, is not in it.
    triangle, failed = torch.linalg.cholesky_ex(upper_gram(weight), upper=True)
    if not failed:
        probes = random_rows(weight.shape[1], 8, weight)  # (d_in, 8)
        condition = triangle.norm() * torch.linalg.solve_triangular(triangle, probes, upper=True).norm()
        if condition < 1e4:
            return triangle, lambda x: torch.linalg.qr(weight @ torch.linalg.solve_triangular(triangle, x, upper=True)).Q
    orthogonal, triangle = torch.linalg.qr(weight)
    return triangle, lambda x: orthogonal @ x


def _is_worth_iterating(n: int, count: int) -> bool:
    """Whether the iteration takes less time than LAPACK on the whole of a symmetric matrix (n, n)."""
    return n >= 256 and width_of_block(count) <= n // 8


def _largest(a: Tensor) -> float:
    """The largest singular value of A (n, m)."""
    if len(a) >= 64:
        with contextlib.suppress(*NOT_CONVERGED):
            top = leading(lambda x: x @ a @ a.mT, len(a), 1, a, tolerance=1e-4)
            if top.error < 1e-2:  # the error of a value is the square of its vector's error
                return top.values[0].sqrt().item()
    return torch.linalg.matrix_norm(a, ord=2).item()


# From here on, vectors are rows.


def _smallest(a: Tensor, count: int, largest: float) -> tuple[Tensor, Tensor]:
    """Left singular vectors (count, n) and values of A (n, m), n <= m, for its `count` smallest values, ascending."""
    triangle = None
    with contextlib.suppress(*NOT_CONVERGED):
        if len(a) < a.shape[1]:
            triangle = torch.linalg.qr(a.mT, mode="r").R  # A A^T = R^T R
        if pairs := _smallest_by_inverse(a, triangle, count, largest):
            return pairs
    left, values, _ = torch.linalg.svd(a if triangle is None else triangle.mT, full_matrices=False)
    return left[:, -count:].flip(1).mT, values[-count:].flip(0)


def _smallest_by_inverse(a: Tensor, triangle: Tensor | None, count: int, largest: float) -> tuple[Tensor, Tensor] | None:
    """The same, or None where rounding may have spoilt it. With a triangle R A is R^T Q^T, else it is square."""
    n = len(a)
    root = _inverse_root(a, triangle)
    if root is None:
        return None
    inverse = lambda x: root[1](root[0](x))  # noqa: E731
    pairs = leading_by_krylov(inverse, n, count, a) or _leading_dense(
        root[0](torch.eye(n, dtype=a.dtype, device=a.device)), count
    )
    values, vectors = pairs[0].rsqrt(), pairs[1]  # values of A, ascending
    # Rounding moves the cut by about eps * (cut / smallest)^2, and below eps * largest everything is rounding.
    if values[0] > 10 * n * _EPS * largest and n * _EPS * (values[-1] / values[0]) ** 2 < 1e-7:
        # One more step takes out the rest of the largest directions, which weigh most in A.
        vectors = orthonormal(inverse(vectors))
        # Within their span, the singular vectors themselves: U_t^T A = P S_t V_t^T.
        rotation, exact, _ = torch.linalg.svd(vectors @ a, full_matrices=False)
        if (exact.flip(0) - values).norm() < 1e-6 * values[-1]:
            return rotation.flip(1).mT @ vectors, exact.flip(0)
    return None


def _inverse_root(a: Tensor, triangle: Tensor | None) -> tuple[Map, Map] | None:
    """The maps x -> H x^T and y -> y^T H with H^T H = (A A^T)^-1; None if A does not have full rank."""
    # A A^T = R^T R. Or A^T = P L U with pivoting, so A A^T = U^T L^T L U.
    upper = torch.linalg.lu_factor_ex(a.mT).LU if triangle is None else triangle
    upper = upper.mT.contiguous().mT  # the layout that LAPACK takes without a copy
    if not upper.diagonal().abs().min() > 0:
        return None

    def forward(x: Tensor) -> Tensor:
        y = torch.linalg.solve_triangular(upper.mT, x.mT, upper=False)
        return torch.linalg.solve_triangular(upper.mT, y, upper=True, unitriangular=True) if triangle is None else y

    def backward(y: Tensor) -> Tensor:
        y = torch.linalg.solve_triangular(upper, y, upper=False, unitriangular=True) if triangle is None else y
        return torch.linalg.solve_triangular(upper, y, upper=True).mT

    return forward, backward


def _leading_dense(root: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Leading eigenpairs of H^T H, as `leading_by_krylov` returns them, for an explicit H (n, n)."""
    gram = upper_gram(root)
    if not gram.isfinite().all():
        return gram.new_full((count,), torch.inf), gram[:count]
    values, vectors = leading_eigenpairs(gram, count)
    return values, vectors.mT
