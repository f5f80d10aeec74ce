"""A linear layer, or the experts of a mixture: the form of its weight, and the names of the layers that it stands for."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Linear:
    """A linear layer of the backbone, or one projection of the experts of a mixture. There each expert is a layer.

    Attributes:
        module: its path in the model; of experts the path of their 3-D parameter.
        shape: (d_out, d_in) of one matrix.
        transposed: a stored matrix is (d_in, d_out), as in GPT-2's Conv1D.
        experts: the numbers of the experts whose matrices the weight holds; empty for an ordinary layer.
        stacked: the matrices are stacked along the first dimension of the weight; otherwise the weight is one matrix.
        shared: the paths of other layers whose weight is the same parameter.
    """

    module: str
    shape: tuple[int, int]
    transposed: bool
    experts: tuple[int, ...] = ()
    stacked: bool = False
    shared: tuple[str, ...] = ()

    @property
    def layers(self) -> list[tuple[str, ...]]:
        """For each matrix, the names of the layers whose inputs it multiplies: its own and those that share the weight."""
        modules = (self.module, *self.shared)
        return [tuple(f"{module}.{expert}" for module in modules) for expert in self.experts] or [modules]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        shape = self.shape[::-1] if self.transposed else self.shape
        return (len(self.experts), *shape) if self.stacked else shape

    @property
    def num_weights(self) -> int:
        """The number of weights in all of its matrices."""
        return math.prod(self.shape) * len(self.layers)
