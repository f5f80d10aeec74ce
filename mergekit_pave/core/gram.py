"""Symmetric sums x^T x: half of them computed, half of them stored."""

from __future__ import annotations

from collections.abc import Iterator

import scipy.linalg.blas
import scipy.linalg.lapack
import torch
from torch import Tensor

_STRIP = 256  # rows that are worked on together: what lies to the left of a strip mirrors what is above it
_SYRK = {torch.float64: scipy.linalg.blas.dsyrk, torch.float32: scipy.linalg.blas.ssyrk}


def add_upper_gram(gram: Tensor, x: Tensor) -> None:
    """Add the upper triangle of x^T x, for x (rows, n), to gram (n, n): half of the work of the whole product."""
    for strip in _strips(x.shape[1]):
        gram[strip, strip.start :] += x[:, strip].mT @ x[:, strip.start :]


def upper_gram(x: Tensor) -> Tensor:
    """The upper triangle of x^T x for x (rows, n), in an (n, n) tensor. What is below the triangle is of no use."""
    if x.device.type == "cpu" and x.dtype in _SYRK:
        # BLAS takes matrices column by column, so it is given x^T and told that the triangle is the lower one.
        x, by_rows = x.detach(), x.is_contiguous()
        transposed = x.numpy().T if by_rows else x.mT.contiguous().numpy().T
        return torch.from_numpy(_SYRK[x.dtype](1.0, transposed, trans=not by_rows, lower=True).T)
    gram = x.new_zeros(x.shape[1], x.shape[1])
    add_upper_gram(gram, x)
    return gram


def mirror_upper(gram: Tensor) -> Tensor:
    """Complete a sum of `add_upper_gram`, in place."""
    for strip in _strips(len(gram)):
        block = gram[strip, strip]
        block.copy_(block.triu() + block.triu(1).mT)
        gram[strip.stop :, strip] = gram[strip, strip.stop :].mT
    return gram


def inverse_of_gram(gram: Tensor) -> Tensor | None:
    """The inverse of a positive definite float64 matrix, of which the upper triangle is given and lost; None if it is not one."""
    if gram.device.type == "cpu":
        # On some processors the LAPACK of scipy takes half the time of that of torch.
        factor, failed = scipy.linalg.lapack.dpotrf(gram.numpy().T, lower=True, clean=False, overwrite_a=True)
        if failed:
            return None
        inverse, failed = scipy.linalg.lapack.dpotri(factor, lower=True, overwrite_c=True)
        return None if failed else mirror_upper(torch.from_numpy(inverse.T))
    factor, failed = torch.linalg.cholesky_ex(gram, upper=True)
    return None if failed else torch.cholesky_inverse(factor, upper=True)


def packed(gram: Tensor) -> Tensor:
    """The upper triangle of gram (n, n) in n (n + 1) / 2 numbers, 256 rows after 256 rows.

    Of each strip first the triangle on gram's diagonal comes, row by row, then what is to its right.
    """
    parts = []
    for strip, row, column in _triangles(gram):
        parts += [gram[strip, strip][row, column], gram[strip, strip.stop :].flatten()]
    return torch.cat(parts)


def unpacked(numbers: Tensor, n: int) -> Tensor:
    """The whole matrix (n, n), from its triangle as `packed` returns it."""
    gram, start = numbers.new_empty(n, n), 0
    for strip, row, column in _triangles(gram):
        gram[strip, strip][row, column] = numbers[start : start + len(row)]
        start += len(row)
        right = gram[strip, strip.stop :]
        right.copy_(numbers[start : start + right.numel()].view(right.shape))
        start += right.numel()
    return mirror_upper(gram)


def _strips(n: int) -> Iterator[slice]:
    return (slice(start, min(start + _STRIP, n)) for start in range(0, n, _STRIP))


def _triangles(gram: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The strips of a matrix, and the places in its triangle on the diagonal, counted from there."""
    for strip in _strips(len(gram)):
        height = strip.stop - strip.start
        yield strip, *torch.triu_indices(height, height, device=gram.device)
