"""A linear layer, or the experts of a mixture: what their weight looks like, and by which names their inputs are known."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Linear:
    """A linear layer of the backbone, or the same projection of the experts of a mixture, each of which is a layer of its own.

    Attributes:
        module: its path in the model; of experts the path of their 3-D parameter.
        shape: (d_out, d_in) of one matrix.
        transposed: a stored matrix is (d_in, d_out), as in GPT-2's Conv1D.
        experts: the numbers of the experts whose matrices the weight holds; none for an ordinary layer.
        stacked: the matrices lie along a first dimension of the weight; otherwise it is one matrix.
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
        """What the covariances of each matrix are named by: the module, or the expert, and those that share its weight."""
        modules = (self.module, *self.shared)
        return [tuple(f"{module}.{expert}" for module in modules) for expert in self.experts] or [modules]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        shape = self.shape[::-1] if self.transposed else self.shape
        return (len(self.experts), *shape) if self.stacked else shape

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape) * len(self.layers)
