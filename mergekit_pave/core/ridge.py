"""Solving for a matrix with a ridge that is just large enough."""

from __future__ import annotations

import torch
from torch import Tensor

# Far above the rounding of the smallest eigenvalues of a sum of rank-deficient metrics, far below the eigenvalues that matter.
RIDGE = 1e-6


def divide(mixed: Tensor, total: Tensor, ridge: float = RIDGE) -> Tensor:
    """mixed (total + e I)^-1, (d_out, d_in) float64, with e = ridge times the mean of total's diagonal.

    Args:
        mixed: (d_out, d_in) float64. Where total is zero it is returned as it is.
        total: (d_in, d_in) float64, symmetric and semidefinite but for rounding. It is used up: it may be empty afterwards.
    """
    shift = ridge * total.diagonal().mean().item()
    if shift == 0:
        return mixed
    total.diagonal().add_(shift)
    factor, failed = torch.linalg.cholesky_ex(total)
    # In a sum of semidefinite metrics no square of a pivot lies below the shift. If one does, rounding in the covariances has
    # made the sum indefinite. Then eigenvalues smaller than the most negative one are noise, and the shift has to be larger.
    if not failed and factor.diagonal().square().min() > shift / 2:
        total.set_()  # its memory is free for the solver, which copies the factor
        return torch.cholesky_solve(mixed.mT, factor).mT
    del factor
    values, vectors = torch.linalg.eigh(total)
    noise = (shift - values[0]).clamp(min=0)
    return (mixed @ vectors / (values + 2 * noise)) @ vectors.mT
