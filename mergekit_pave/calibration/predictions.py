"""What a language model predicts on its samples."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mergekit_pave.core.head import predictions


class Predictions:
    """How likely a language model thinks each token to come next, added up over all tokens of its samples that count.

    Attributes:
        path: of its head.
        sums: (tokens,) float64.
    """

    def __init__(self, path: str, tokens: int):
        self.path = path
        self.sums = torch.zeros(tokens, dtype=torch.float64)

    def add(self, head: nn.Module, rows: Tensor) -> None:
        """Add what is predicted from last hidden states, (n, d)."""
        self.sums = self.sums + predictions(head.weight, rows, head.bias)  # in place would fail on a tensor of inference mode
