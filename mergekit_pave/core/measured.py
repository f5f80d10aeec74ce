"""Covariances that are in memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mergekit_pave.core.covariance import Covariance, Covariances


class MeasuredCovariances(Covariances):
    """The covariances of some layers, by name. A layer that is not among them saw no token."""

    def __init__(self, by_layer: Mapping[str, Covariance]):
        self._by_layer = by_layer

    def _tokens(self, layer: str) -> int:
        return self._by_layer[layer].tokens if layer in self._by_layer else 0

    def _load(self, layer: str, device: torch.device | str) -> Covariance:
        return self._by_layer[layer].to(torch.device(device))
