"""The mathematics of PAVE on single tensors: which directions of a weight to drop, and dropping them.

With W (d_out, d_in), C_s = C + shift * I and W C_s = U S V^T, PAVE keeps the top r components of the
context-oriented SVD (CorDA, arXiv 2406.05223) and multiplies C_s's inverse back. Since
U_r S_r V_r^T = U_r U_r^T W C_s, the inverse cancels:

    W' = U_r U_r^T W = W - U_t U_t^T W,    U_t: the left singular vectors of the dropped tail,

so only the few smallest singular directions are ever computed. Finding them is float64 throughout: the tail lives at the
far end of a spectrum that covers six decades and more. Taking them out of W is an ordinary product in W's precision.

In A A^T (A = W C_s) the tail would drown in the rounding error of the largest values, which can be 1e7 times larger.
In (A A^T)^-1 it comes first and is well separated. So the work is done on that matrix, in the form of a factorisation of A.
Block Krylov steps find a few leading eigenvectors, LAPACK finds many. Where A is singular to working precision, as for a weight
that is rank-deficient, a full SVD takes over. Only a checked result leaves this file.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from mergekit_pave.core.covariance import Covariance, upper_gram
from mergekit_pave.core.exact import in_float64
from mergekit_pave.core.failures import NOT_CONVERGED

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
    activated = covariance.multiply(triangle, shift)  # A, (n, d_in), n = min(d_out, d_in)
    energy = activated.square().sum().item()
    if not math.isfinite(energy):
        raise OverflowError("the weight or its layer's inputs have values too large to be squared in float64")
    if energy == 0:
        directions = torch.eye(d_out, count, dtype=torch.float64, device=weight.device)
        return Tail(directions, directions.new_zeros(count), 0.0, 0.0)
    largest = _largest(activated)
    directions, values = _smallest(activated, count, largest)
    return Tail(directions if times_q is None else times_q(directions), values, largest, energy)


def _triangle(weight: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """R of W = Q R for a tall W, and the product with Q."""
    # W^T W = R^T R costs a fraction of Householder's QR. It squares the condition of W, but that of C, the larger, is not in it.
    triangle, failed = torch.linalg.cholesky_ex(upper_gram(weight), upper=True)
    if not failed:
        probes = _random(weight.shape[1], 8, weight)  # (d_in, 8)
        condition = triangle.norm() * torch.linalg.solve_triangular(triangle, probes, upper=True).norm()
        if condition < 1e4:
            return triangle, lambda x: torch.linalg.qr(weight @ torch.linalg.solve_triangular(triangle, x, upper=True)).Q
    orthogonal, triangle = torch.linalg.qr(weight)
    return triangle, lambda x: orthogonal @ x


def _smallest(a: Tensor, count: int, largest: float) -> tuple[Tensor, Tensor]:
    """Left singular vectors (n, count) and values of A (n, m), n <= m, for its `count` smallest values, ascending."""
    result = None
    with contextlib.suppress(*NOT_CONVERGED):
        result = _smallest_by_inverse(a, count, largest)
    if result:
        return result
    left, values, _ = torch.linalg.svd(a, full_matrices=False)
    return left[:, -count:].flip(1), values[-count:].flip(0)


def _smallest_by_inverse(a: Tensor, count: int, largest: float) -> tuple[Tensor, Tensor] | None:
    """The same, or None where rounding may have spoilt it."""
    n = a.shape[0]
    root = _inverse_root(a)
    if root:
        inverse = lambda x: root[1](root[0](x))  # noqa: E731
        pairs = _leading(inverse, n, count, a) or _leading_dense(root[0](torch.eye(n, dtype=a.dtype, device=a.device)), count)
        values, vectors = pairs[0].rsqrt(), pairs[1]  # values of A, ascending
        # Rounding moves the cut by about eps * (cut / smallest)^2, and below eps * largest everything is rounding.
        if values[0] > 10 * n * _EPS * largest and n * _EPS * (values[-1] / values[0]) ** 2 < 1e-7:
            # One more step takes out the rest of the largest directions, which weigh most in A.
            vectors = _orthonormal(inverse(vectors))
            # Within their span, the singular vectors themselves: U_t^T A = P S_t V_t^T.
            rotation, exact, _ = torch.linalg.svd(vectors @ a, full_matrices=False)
            if (exact.flip(0) - values).norm() < 1e-6 * values[-1]:
                return vectors.mT @ rotation.flip(1), exact.flip(0)
    return None


def _largest(a: Tensor) -> float:
    """The largest singular value of A (n, m)."""
    pairs = None
    with contextlib.suppress(*NOT_CONVERGED):
        # The error of a value is the square of its vector's error, so this may stop early.
        pairs = _leading(lambda x: x @ a @ a.mT, a.shape[0], 1, a, tolerance=1e-5)
    return (pairs[0].max().sqrt() if pairs else torch.linalg.matrix_norm(a, ord=2)).item()


# From here on, vectors are rows, (vectors, n): thin products are up to twice as fast that way.


def _inverse_root(a: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None:
    """The maps x -> H x^T and y -> y^T H with H^T H = (A A^T)^-1 for A (n, m), n <= m; None if A does not have full rank."""
    n, m = a.shape
    # A^T = P L U with pivoting, so A A^T = U^T (L^T L) U. L is well-conditioned: its Gram matrix can be trusted, A's not.
    factors = torch.linalg.lu_factor_ex(a.mT).LU
    upper = factors[:n].mT.contiguous().mT  # the layout that LAPACK takes without a copy
    if not upper.diagonal().abs().min() > 0:
        return None
    square = n == m
    if square:
        middle = upper.mT  # L^T, which is unit upper triangular
    else:
        factors = factors.tril(-1)
        factors.diagonal().fill_(1)
        middle, failed = torch.linalg.cholesky_ex(upper_gram(factors), upper=True)
        middle = middle.contiguous().mT  # lower triangular, with middle middle^T = L^T L
        if failed:
            return None

    def forward(x: Tensor) -> Tensor:
        y = torch.linalg.solve_triangular(upper.mT, x.mT, upper=False)
        return torch.linalg.solve_triangular(middle, y, upper=square, unitriangular=square)

    def backward(y: Tensor) -> Tensor:
        y = torch.linalg.solve_triangular(middle.mT, y, upper=not square, unitriangular=square)
        return torch.linalg.solve_triangular(upper, y, upper=True).mT

    return forward, backward


def _leading(
    apply: Callable[[Tensor], Tensor], n: int, count: int, like: Tensor, tolerance: float | None = None
) -> tuple[Tensor, Tensor] | None:
    """Leading eigenpairs of a positive semidefinite (n, n) operator by block Krylov steps with full orthogonalisation.

    Returns:
        `count` eigenvalues, descending, and their vectors (count, n). None if LAPACK on the whole matrix would be no slower, or
        if the eigenvalues lie so close together that the residual does not become small in time.
    """
    width = 16 if count > 8 else 8
    limit = n // 3
    if count > limit // 4 or 2 * width > limit:
        return None
    basis, images, rank = like.new_empty(limit, n), like.new_empty(limit, n), 0  # of both, `rank` rows are filled
    block = _orthonormal(_random(width, n, like))
    next_check, settled, before = max(count + 1, 2 * width), None, None
    while rank + len(block) <= limit:
        image = apply(block)
        if not image.isfinite().all():
            return None
        basis[rank : rank + len(block)], images[rank : rank + len(block)] = block, image
        rank += len(block)
        block = _orthonormal(_remove(image, basis[:rank]))
        if rank < next_check:
            continue
        next_check = 1.25 * rank
        projected = images[:rank] @ basis[:rank].mT
        values, vectors = torch.linalg.eigh((projected + projected.mT) / 2)
        values, vectors = values.flip(0), vectors.flip(1)[:, :count].mT  # (m,), (count, m)
        # || v M - value v || of the Ritz vectors v. Divided by the gap this is the angle of their error at the cut.
        ritz = vectors @ basis[:rank]
        residual = (vectors @ images[:rank] - values[:count, None] * ritz).norm()
        allowed = (
            tolerance * values[0]
            if tolerance
            else torch.maximum(1e-5 * (values[count - 1] - values[count]), 1e-9 * values[count - 1])
        )
        if residual <= allowed:
            if count < width or (settled is not None and torch.allclose(values[:count], settled, rtol=1e-6)):
                return values[:count], ritz
            # A block finds an eigenvalue at most as often as it has rows. Other vectors look for further equal eigenvalues.
            settled = values[:count]
            block = _orthonormal(torch.cat([block, _remove(_random(width, n, like, seed=rank), basis[:rank])]))
            next_check = rank + 3 * len(block)
        elif settled is None:
            # Residuals fall faster and faster. If twice the present pace would not be enough, this will not end in time.
            rank_before, log_before = before or (rank, 0.0)
            before = rank, (residual / allowed).log().item()
            if log_before and rank + (rank - rank_before) / 2 * before[1] / max(log_before - before[1], 1e-3) > limit:
                return None
    return None


def _remove(x: Tensor, basis: Tensor) -> Tensor:
    """The rows of x without their part in the span of an orthonormal basis. It is removed twice, against rounding."""
    for _ in range(2):
        x = x - x @ basis.mT @ basis
    return x


def _leading_dense(root: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Leading eigenpairs of H^T H, as `_leading` returns them, for an explicit H (n, n)."""
    n = root.shape[0]
    gram = upper_gram(root)
    if not gram.isfinite().all():
        return gram.new_full((count,), torch.inf), gram[:count]
    if gram.device.type == "cpu":
        # LAPACK's driver for a subset takes less than half the time of all n eigenpairs.
        values, vectors = scipy.linalg.eigh(
            gram.numpy(), subset_by_index=[n - count, n - 1], lower=False, overwrite_a=True, check_finite=False
        )
        if len(values) < count:  # happens on some processors if many eigenvalues coincide
            raise np.linalg.LinAlgError(f"LAPACK found {len(values)} of {count} eigenvalues")
        values, vectors = torch.from_numpy(values), torch.from_numpy(vectors)
    else:
        values, vectors = torch.linalg.eigh(gram, UPLO="U")
        values, vectors = values[-count:], vectors[:, -count:]
    return values.flip(0), vectors.flip(1).mT


def _orthonormal(x: Tensor) -> Tensor:
    """Orthonormal rows that span the same space."""
    return torch.linalg.qr(x.mT).Q.mT.contiguous()


def _random(rows: int, columns: int, like: Tensor, seed: int = 0) -> Tensor:
    """Normal numbers, the same in every run and on every device."""
    generator = torch.Generator().manual_seed(seed)
    # mergekit's workers make their GPU the default device, which would refuse this generator.
    return torch.randn(rows, columns, generator=generator, dtype=like.dtype, device="cpu").to(like.device)
