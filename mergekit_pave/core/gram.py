"""Symmetric sums x^T x: half of them computed, half of them stored."""

from __future__ import annotations

from collections.abc import Iterator

import scipy.linalg.blas
import scipy.linalg.lapack
import torch
from torch import Tensor

# Rows that are worked on together: what lies to the left of a strip mirrors what is above it.
_STRIP = 256
_PACKED = 64  # the fewer, the less memory it takes to tell the triangles on the diagonal from the rest
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
    """The upper triangle of gram (n, n) in n (n + 1) / 2 numbers, 64 rows after 64 rows.

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
        block, right = gram[strip, strip], gram[strip, strip.stop :]
        block[row, column] = block[column, row] = numbers[start : start + len(row)]
        start += len(row)
        right.copy_(numbers[start : start + right.numel()].view(right.shape))
        gram[strip.stop :, strip] = right.mT
        start += right.numel()
    return gram


def _strips(n: int, height: int = _STRIP) -> Iterator[slice]:
    return (slice(start, min(start + height, n)) for start in range(0, n, height))


def _triangles(gram: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The strips of a matrix, and the places in its triangle on the diagonal, counted from there."""
    for strip in _strips(len(gram), _PACKED):
        height = strip.stop - strip.start
        yield strip, *torch.triu_indices(height, height, device=gram.device)
