"""The calibration pass: run a model over its samples and store what each linear layer saw."""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from typing import Any

import torch
import tqdm
import transformers

from mergekit_pave import cache
from mergekit_pave.calibration.batches import Encoded, make_batches
from mergekit_pave.calibration.layers import load_model
from mergekit_pave.calibration.observe import Observer
from mergekit_pave.covariance import Covariance
from mergekit_pave.errors import PaveError

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """Everything that one model's calibration needs.

    Attributes:
        name: the model's name, for messages.
        folder: where its checkpoint lies.
        config: its configuration.
        encoded: its tokenised samples.
        layers: paths of the modules to watch.
        batch_size: samples in one forward pass.
        about: what the manifest says about the data, JSON-serialisable.
    """

    name: str
    folder: str
    config: transformers.PretrainedConfig
    encoded: list[Encoded]
    layers: list[str]
    batch_size: int
    about: dict[str, Any]


def covariance_key(weights: str, encoded: list[Encoded]) -> str:
    """Key of the covariances: the weights, and exactly the tokens that the model sees and that count.

    The tokens stand for the data set, its columns, the tokenizer, the chat template, the seed and all limits at once.
    """
    return cache.digest("covariance", weights, [[sample.inputs, sample.counted] for sample in encoded])


def calibrate(job: Job, artefact: cache.Artefact, device: str, trust_remote_code: bool, quiet: bool) -> None:
    """Make sure that the covariances of a model are in the cache, intact.

    Memory: the model, plus one float64 (d, d) matrix for each distinct layer input (or the rows, where fewer).

    Raises:
        PaveError: an activation is not finite, a watched layer is never called, or the cache cannot be written.
    """
    with artefact.lock():
        if artefact.is_intact():
            LOG.info("%s: covariances are in the cache", job.name)
            return
        artefact.discard()
        groups = measure(job, device, trust_remote_code, quiet)
        files, layers = {}, {}
        for i, (members, covariance) in enumerate(groups):
            name = f"{i:05}.safetensors"
            files[name] = artefact.write(name, covariance.to_tensors())
            for layer in members:
                layers[layer] = {"file": name, "tokens": covariance.tokens, "dim": covariance.dim}
        artefact.complete({"files": files, "layers": layers, **job.about})


def measure(job: Job, device: str, trust_remote_code: bool, quiet: bool) -> list[tuple[list[str], Covariance]]:
    """Run the model over all batches and return each covariance with the layers that it belongs to."""
    model = load_model(job.config, job.folder, device, trust_remote_code)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    # Heads are not measured, and a language model's is often the costliest layer: run the backbone alone.
    backbone = model.base_model
    accepted = inspect.signature(backbone.forward).parameters
    observer = Observer(model, job.layers, job.name)
    batches = make_batches(job.encoded, job.batch_size)
    total = sum(batch.counted.sum().item() for batch in batches)
    with (
        torch.no_grad(),
        observer.watching() as begin,
        tqdm.tqdm(total=total, desc=f"Calibrating {job.name}", unit="tok", disable=quiet) as progress,
    ):
        for batch in batches:
            batch = batch.to(device)
            begin(batch)
            backbone(**{name: values for name, values in batch.inputs.items() if name in accepted})
            progress.update(batch.counted.sum().item())
    results = observer.results()
    seen = {layer for members, _ in results for layer in members}
    if unseen := [layer for layer in job.layers if layer not in seen]:
        raise PaveError(
            f"{job.name}: {len(unseen)} of {len(job.layers)} linear layers were never called during calibration "
            f"(the first: {unseen[0]}); list them under pave.exclude to merge them as they are"
        )
    return results


def load_covariance(artefact: cache.Artefact, layer: str) -> Covariance:
    """The covariance of one layer's input, from an intact artefact."""
    entry = artefact.manifest()["layers"][layer]
    return Covariance.from_tensors(artefact.read(entry["file"]), entry["tokens"], entry["dim"])
