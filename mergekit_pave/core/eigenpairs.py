"""The leading eigenpairs of a symmetric matrix, by whichever routine is fastest where the matrix is."""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch
from torch import Tensor


def leading_eigenpairs(gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest eigenvalues, descending, and their vectors as columns, (n, count).

    Args:
        gram: (n, n) float64, finite. Only its upper triangle is read, and it may be overwritten.

    Raises:
        LinAlgError: of torch or numpy: the routine does not converge, or does not find all of them.
    """
    n = len(gram)
    # LAPACK's driver for a subset takes a third of the time for few eigenpairs, but is slower than all of them for many.
    if gram.device.type == "cpu" and 3 * count <= n:
        found, columns = scipy.linalg.eigh(
            gram.numpy(), subset_by_index=[n - count, n - 1], lower=False, overwrite_a=True, check_finite=False
        )
        if len(found) < count:  # happens on some processors if many eigenvalues coincide
            raise np.linalg.LinAlgError(f"LAPACK found {len(found)} of {count} eigenvalues")
        values, vectors = torch.from_numpy(found), torch.from_numpy(columns)
    else:
        values, vectors = torch.linalg.eigh(gram, UPLO="U")
        values, vectors = values[n - count :], vectors[:, n - count :]
    return values.flip(0), vectors.flip(1)
