"""How fast this machine is, measured on the spot."""

from __future__ import annotations

import time

import torch


def speed(dtype: torch.dtype, device: str | torch.device) -> float:
    """Operations a second in a product of matrices."""
    width = 1024
    x = torch.randn(width, width, device=device).to(dtype)
    best = 0.0
    for _ in range(4):
        start = time.perf_counter()
        (x @ x)[0, 0].item()
        best = max(best, 2 * width**3 / (time.perf_counter() - start))
    return best


def reading_speed(dtype: torch.dtype, device: str, rows: int) -> float:
    """Weights a second in a product with a few rows. The matrix is too large for most caches."""
    width = 4096
    x, w = torch.randn(rows, width, device=device).to(dtype), torch.randn(width, width, device=device).to(dtype)
    best = 0.0
    for _ in range(4):
        start = time.perf_counter()
        (x @ w)[0, 0].item()
        best = max(best, width**2 / (time.perf_counter() - start))
    return best
