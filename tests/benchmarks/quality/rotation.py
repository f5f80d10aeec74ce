"""Covariances with the directions of another: a control."""

from __future__ import annotations

import torch

from mergekit_pave import cache
from mergekit_pave.core.covariance import Covariance


def rotate(source: cache.Artefact, target: cache.Artefact, seed: int) -> None:
    """Covariances with the same spectra whose eigenvectors are random: the directions that they drop are random, too."""
    generator = torch.Generator().manual_seed(seed)
    manifest = source.manifest()
    sizes = {entry["file"]: (entry["tokens"], entry["dim"]) for entry in manifest["layers"].values()}
    files = {}
    for name, (tokens, dim) in sizes.items():
        gram = Covariance.from_tensors(source.read(name), tokens, dim).unscaled()
        rotation = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64)).Q
        files[name] = target.write(name, Covariance(tokens, gram=rotation @ gram @ rotation.mT).to_tensors())
    target.complete(manifest | {"files": files})
