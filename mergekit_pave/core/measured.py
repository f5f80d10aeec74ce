"""Covariances that are in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from mergekit_pave.core.covariance import Covariance, Covariances


class MeasuredCovariances(Covariances):
    """The covariances of some layers, by name. A layer that is not among them saw no token.

    Args:
        share: what is remembered of a covariance serves all weights that need it, and stays in memory as long as it does.
    """

    def __init__(self, by_layer: Mapping[str, Covariance], share: bool = True):
        self._by_layer, self._share = by_layer, share

    def _tokens(self, layer: str) -> int:
        return self._by_layer[layer].tokens if layer in self._by_layer else 0

    def _load(self, layer: str, device: torch.device | str) -> Covariance:
        covariance = self._by_layer[layer].to(torch.device(device))
        return covariance if self._share else dataclasses.replace(covariance)
