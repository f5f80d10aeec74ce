"""What the page shows beyond `pave_report.json`: spectra, covariances and interference, and how each is computed."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Optional

import numpy as np
import scipy.linalg
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from mergekit_pave.core.covariance import Covariance
from mergekit_pave.core.exact import in_float64


def spectrum(weight: Tensor, covariance: Covariance, shift: float) -> np.ndarray:
    """All singular values of W (C + shift * I), descending, (min(d_out, d_in),) float64.

    Args:
        weight: W, (d_out, d_in), any float dtype.
        covariance: of the layer's input, width d_in, on the weight's device.
        shift: the regularisation added to C's diagonal.
    """
    weight = in_float64(weight)
    if weight.shape[0] > weight.shape[1]:
        weight = torch.linalg.qr(weight, mode="r").R  # W = Q R and R C have the same singular values
    return torch.linalg.svdvals(covariance.multiply(weight, shift)).cpu().numpy()


def effective_rank(covariance: Covariance) -> float:
    """(Σ λ)² / Σ λ² of C's eigenvalues λ, the participation ratio: n if n of them are equal and the others zero."""
    moment = _smaller_moment(covariance)
    return (moment.trace().square() / moment.square().sum()).item()


def condition(covariance: Covariance, shift: float) -> float:
    """The largest eigenvalue of C + shift * I over the smallest, for shift > 0."""
    moment = _smaller_moment(covariance).cpu().numpy() / covariance.tokens
    largest = _largest_eigenvalue(lambda x: moment @ x, len(moment)) + shift
    smallest = shift
    if covariance.tokens >= covariance.dim:  # otherwise C is singular
        moment[np.diag_indices_from(moment)] += shift
        # C has no negative eigenvalues. If rounding made one that the shift does not outweigh, its true value is about zero.
        with contextlib.suppress(np.linalg.LinAlgError):
            factor = scipy.linalg.cho_factor(moment, overwrite_a=True, check_finite=False)
            inverse = _largest_eigenvalue(lambda x: scipy.linalg.cho_solve(factor, x, check_finite=False), len(moment))
            smallest = max(shift, 1 / inverse)
    return largest / smallest


def _smaller_moment(covariance: Covariance) -> Tensor:
    """X^T X or X X^T, float64, whichever is smaller: both have the same nonzero eigenvalues."""
    if covariance.rows is not None and covariance.tokens < covariance.dim:
        rows = in_float64(covariance.rows)
        return rows @ rows.mT
    return covariance.unscaled()


def _largest_eigenvalue(apply, dim: int) -> float:
    """Of a positive definite (dim, dim) operator."""
    if dim < 3:  # too small for Lanczos
        return float(np.linalg.eigvalsh(apply(np.eye(dim)))[-1])
    operator = LinearOperator((dim, dim), matvec=apply, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(dim)
    return float(eigsh(operator, k=1, which="LA", v0=start, tol=1e-6, return_eigenvectors=False)[0])


@dataclass(frozen=True)
class Interference:
    """How the task vectors of M models lie to each other in one tensor, or summed over several.

    Attributes:
        products: inner products, (M, M) float64.
        conflicts: elements in which two of them have opposite signs, (M, M).
        num_elements: elements of a task vector.
    """

    products: np.ndarray
    conflicts: np.ndarray
    num_elements: int

    def __add__(self, other: Interference) -> Interference:
        return Interference(
            self.products + other.products, self.conflicts + other.conflicts, self.num_elements + other.num_elements
        )

    def cosines(self) -> np.ndarray:
        """The cosine of every two task vectors, (M, M); 0 if one of them is zero."""
        norms = np.sqrt(self.products.diagonal())
        scale = np.outer(norms, norms)
        return np.divide(self.products, scale, out=np.zeros_like(scale), where=scale > 0)

    def sign_conflicts(self) -> np.ndarray:
        """The share of elements in which two of them have opposite signs, (M, M); about a half if they are unrelated."""
        return self.conflicts / self.num_elements


_BLOCK = 1 << 20  # elements: counts of so many are exact in float32


def interference(vectors: Sequence[Tensor]) -> Interference:
    """Of task vectors of the same shape, one for each model."""
    flat = [vector.reshape(-1) for vector in vectors]
    products = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    conflicts = torch.zeros_like(products)
    for start in range(0, flat[0].numel(), _BLOCK):
        block = torch.stack([vector[start : start + _BLOCK].float() for vector in flat])  # (M, block)
        exact = in_float64(block)
        products += (exact @ exact.mT).cpu()
        up, down = (block > 0).float(), (block < 0).float()
        opposite = (up @ down.mT).cpu().double()
        conflicts += opposite + opposite.mT
    return Interference(products.numpy(), conflicts.numpy(), flat[0].numel())


def pair_mean(matrix: np.ndarray) -> float:
    """Mean over the pairs of different models of a symmetric (M, M) matrix, M > 1."""
    return float(matrix[np.triu_indices(len(matrix), 1)].mean())


@dataclass(frozen=True)
class Spectrum:
    """Singular values of W C_s of one matrix.

    Attributes:
        output: the tensor that the weight is merged into.
        expert: the number of the expert in a mixture; the one that saw most tokens is taken.
        values: divided by the largest, descending; without the covariance only those in the cached tail.
        components: the number of singular values that the matrix has.
    """

    model: str
    output: str
    expert: Optional[int]
    values: np.ndarray
    components: int


@dataclass(frozen=True)
class Inputs:
    """The covariance of the input of one or several layers of a model.

    Attributes:
        outputs: the tensors that the weights of these layers are merged into.
        tokens: number of tokens seen.
        width: of the input.
        effective_rank: the participation ratio of C's eigenvalues.
        condition: of C + λI.
    """

    model: str
    outputs: list[str]
    tokens: int
    width: int
    effective_rank: float
    condition: float


@dataclass(frozen=True)
class Overlap:
    """How the task vectors that are merged into one tensor interfere, before and after purification."""

    output: str
    models: list[str]
    before: Interference
    after: Interference


@dataclass(frozen=True)
class Measurements:
    """Everything that the page shows beyond the report.

    Attributes:
        spectra: of a few layers.
        inputs: of some layers; none of a model whose covariances are not in the cache.
        overlaps: of every purified tensor; none without a base model, or if only one model is merged.
        left_out: what was not measured because it takes too long: ("Spectra" or "Covariances", stack of layers).
    """

    spectra: list[Spectrum]
    inputs: list[Inputs]
    overlaps: list[Overlap]
    left_out: list[tuple[str, str]] = field(default_factory=list)
