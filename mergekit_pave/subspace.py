"""The mathematics of PAVE on single tensors: which directions of a weight to drop, and dropping them.

With W (d_out, d_in), C_s = C + shift * I and W C_s = U S V^T, PAVE keeps the top r components of the
context-oriented SVD (CorDA, arXiv 2406.05223) and multiplies C_s's inverse back. Since
U_r S_r V_r^T = U_r U_r^T W C_s, the inverse cancels:

    W' = U_r U_r^T W = W - U_t U_t^T W,    U_t: the left singular vectors of the dropped tail,

so only the few smallest singular directions are ever computed. All of it is float64: the tail lives at the far end of
a spectrum that covers six decades and more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import scipy.linalg
import torch
from torch import Tensor

from mergekit_pave.covariance import Covariance


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

    A QR factorisation reduces W C_s to a triangle T with the same singular values. The tail of T is the head of
    (T T^T)^-1 = T^-T T^-1, where it is well separated and so computed to full accuracy; in T T^T itself it would
    drown in the rounding error of the largest values, which can be 1e7 times larger. Only a triangle too close to
    singular to be inverted safely (a weight that is rank-deficient, say) gets a full SVD instead.

    Where two singular values at the cut coincide the components are not unique, and LAPACK's choice is taken.

    Args:
        weight: W, (d_out, d_in), any float dtype.
        covariance: of the layer's input, width d_in, on the weight's device.
        shift: the regularisation added to C's diagonal, > 0.
        count: how many components, 0 < count < min(d_out, d_in).
    """
    activated = covariance.multiply(weight.double(), shift)  # (d_out, d_in)
    d_out, d_in = activated.shape
    energy = activated.square().sum().item()
    if energy == 0:
        directions = torch.eye(d_out, count, dtype=torch.float64, device=weight.device)
        return Tail(directions, directions.new_zeros(count), 0.0, 0.0)
    if d_out <= d_in:
        # A^T = Q R, so A A^T = R^T R and R^T has A's left singular vectors.
        triangle = torch.linalg.qr(activated.mT, mode="r").R.mT  # lower, (d_out, d_out)
    else:
        # A = Q R, so A's left singular vectors are Q times those of R.
        reflectors, scales = torch.geqrf(activated)
        triangle = reflectors[:d_in].triu()  # upper, (d_in, d_in)
    del activated

    directions = _smallest_left(triangle, count, upper=d_out > d_in)  # (n, count)
    values = (triangle.mT @ directions).norm(dim=0)
    order = values.argsort()
    directions, values = directions[:, order], values[order]
    largest = _largest_singular_value(triangle)
    if d_out > d_in:
        directions = torch.cat([directions, directions.new_zeros(d_out - d_in, count)])
        directions = torch.ormqr(reflectors, scales, directions)
    return Tail(directions, values, largest, energy)


def _smallest_left(triangle: Tensor, count: int, upper: bool) -> Tensor:
    """Left singular vectors of a triangular (n, n) matrix for its `count` smallest singular values."""
    n = triangle.shape[0]
    if triangle.diagonal().abs().min() > 0:
        values, vectors = _head_of_inverse(triangle, count, upper)
        # Rounding in the inverse Gram matrix moves the cut by about eps * (cut / smallest)^2.
        if n * torch.finfo(torch.float64).eps * values[0] < 1e-7 * values[-1]:
            return vectors
    return torch.linalg.svd(triangle).U[:, -count:]


def _head_of_inverse(triangle: Tensor, count: int, upper: bool) -> tuple[Tensor, Tensor]:
    """Largest `count` eigenvalues of (T T^T)^-1, descending, and their eigenvectors (n, count), for a triangular T."""
    n = triangle.shape[0]
    identity = torch.eye(n, dtype=triangle.dtype, device=triangle.device)
    inverse = torch.linalg.solve_triangular(triangle, identity, upper=upper)
    gram = inverse.mT @ inverse
    if not gram.isfinite().all():
        return gram.new_tensor([math.inf, 0.0]), gram
    if gram.device.type == "cpu":
        # LAPACK's subset driver: less than half the time of all n eigenpairs.
        values, vectors = scipy.linalg.eigh(
            gram.numpy(), subset_by_index=[n - count, n - 1], overwrite_a=True, check_finite=False
        )
        values, vectors = torch.from_numpy(values), torch.from_numpy(vectors)
    else:
        values, vectors = torch.linalg.eigh(gram)
        values, vectors = values[-count:], vectors[:, -count:]
    return values.flip(0), vectors.flip(1)


def _largest_singular_value(matrix: Tensor, steps: int = 60) -> float:
    """Largest singular value of an (n, n) matrix by Golub-Kahan-Lanczos with full reorthogonalisation."""
    n = matrix.shape[0]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(n, generator=generator, dtype=matrix.dtype).to(matrix.device)
    basis = [start / start.norm()]
    krylov = []
    for _ in range(min(steps, n)):
        krylov.append(matrix.mT @ basis[-1])
        vector = matrix @ krylov[-1]
        scale = vector.norm()
        span = torch.stack(basis)  # (steps so far, n)
        for _ in range(2):
            vector = vector - span.mT @ (span @ vector)
        norm = vector.norm()
        if norm <= 1e-12 * scale:  # the subspace is invariant; what is left is rounding error
            break
        basis.append(vector / norm)
    return torch.linalg.matrix_norm(torch.stack(krylov), ord=2).item()


def drop_components(weight: Tensor, directions: Tensor, base: Tensor | None = None) -> Tensor:
    """The part that purification removes: U_t U_t^T W, or U_t U_t^T (W - W_base) when a base is given.

    Args:
        weight: W, (d_out, d_in).
        directions: U_t, (d_out, k), orthonormal columns.
        base: W_base, (d_out, d_in), to remove only from what fine-tuning changed.

    Returns:
        (d_out, d_in) float64, to be subtracted from W.
    """
    change = weight.double() if base is None else weight.double() - base.double()
    directions = directions.double()
    return directions @ (directions.mT @ change)


def purify(weight: Tensor, covariance: Covariance, rank: int, *, shift: float) -> Tensor:
    """W', the best rank-`rank` approximation of W as seen through C (PAVE section 3.2).

    Args:
        weight: W, (d_out, d_in).
        covariance: of the layer's inputs, width d_in.
        rank: components kept, 1 <= rank <= min(d_out, d_in).
        shift: the regularisation added to C's diagonal, > 0.

    Returns:
        (d_out, d_in) in the weight's dtype.
    """
    components = min(weight.shape)
    if not 1 <= rank <= components:
        raise ValueError(f"rank must be between 1 and {components} for a weight of shape {tuple(weight.shape)}, not {rank}")
    if rank == components:
        return weight.clone()
    tail = tail_components(weight, covariance, shift, components - rank)
    return (weight.double() - drop_components(weight, tail.directions)).to(weight.dtype)
