"""The calibration pass: run a model over its samples, and store the covariance of each linear layer's inputs."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_pave import cache
from mergekit_pave.calibration import distributed
from mergekit_pave.calibration.batches import Batch
from mergekit_pave.calibration.blame import NotFiniteError, explained
from mergekit_pave.calibration.forward import UnalignedInputError, runner
from mergekit_pave.calibration.job import Job, Runtime
from mergekit_pave.calibration.lockstep import run_in_lockstep
from mergekit_pave.calibration.masks import packed_masks
from mergekit_pave.calibration.models import find_blocks, inference_dtype, load_model
from mergekit_pave.calibration.observe import DivergedError, Observer, ReenteredError
from mergekit_pave.calibration.predictions import Predictions
from mergekit_pave.calibration.use import NoUse, Use
from mergekit_pave.calibration.weights import Checkpoint, StreamedModel, UnknownWeightError, stored_weights
from mergekit_pave.core.covariance import Measurement
from mergekit_pave.core.failures import is_out_of_memory
from mergekit_pave.errors import PaveError
from mergekit_pave.files import readable
from mergekit_pave.progress import bar

LOG = logging.getLogger(__name__)

# Files of the artefact; those of other versions may have none.
COUNTS, PREDICTED = "counts.safetensors", "predicted.safetensors"


def has_covariances(artefact: cache.Artefact, *, kept: bool) -> bool:
    """Whether the cache has what was measured; a file may still turn out to be damaged when it is read.

    Args:
        kept: with the covariances themselves.
    """
    manifest = artefact.manifest()
    if manifest is None or not artefact.has_files(manifest):
        return False
    return not kept or all(layer["file"] for layer in manifest["layers"].values())


def calibrate(job: Job, artefact: cache.Artefact, runtime: Runtime, use: Use | None = None) -> None:
    """Make sure that what a model shows on its samples is in the cache, and what `use` makes of it.

    An interruption leaves nothing behind but what `use` has made so far. Only a kill leaves files, which the next run replaces.

    Args:
        use: what is made of the covariances while they are in memory. Where the cache has them, or several processes measure
            together and keep them, it is left to the caller to make it of these.

    Raises:
        PaveError: an activation is not finite, memory runs out, or the cache cannot be written.
    """
    together = distributed.world_size() > 1
    use = NoUse() if use is None or together else use

    def is_done() -> bool:
        return has_covariances(artefact, kept=job.keep or not use.is_complete)

    if distributed.agree(is_done()):  # without a lock, so that it works in a read-only cache
        LOG.info("%s: what it shows on its samples is in the cache", job.name)
        return
    if distributed.rank() > 0:
        for _ in _measure(job, runtime, _predictions(job), use):
            pass
        return
    with artefact.lock():
        if not together and is_done():
            return  # another process has made it meanwhile
        is_again = artefact.is_complete()  # and others may be reading what is there
        if artefact.manifest() and not is_again:
            LOG.warning("%s: what is in the cache is damaged; measuring anew", job.name)
        try:
            with artefact.kept_on_error() if is_again else artefact.discarded_on_error():
                manifest = _measure_and_store(job, artefact, runtime, use)
                use.finish()
                artefact.complete(manifest)
                artefact.remove_others()
        except Exception as error:
            if is_out_of_memory(error):
                raise PaveError(_out_of_memory(job, runtime.device)) from error
            raise


def _measure_and_store(job: Job, artefact: cache.Artefact, runtime: Runtime, use: Use) -> dict[str, Any]:
    files, layers, taken = {}, {}, (artefact.manifest() or {"files": ()})["files"]

    def store(name: str, tensors: dict[str, Tensor]) -> str:
        while name in taken:
            name = f"again-{name}"
        files[name] = artefact.write(name, tensors)
        return name

    head = _predictions(job)
    for block, measurements in _measure(job, runtime, head, use):
        covariance = None
        for layers_that_share, covariance in measurements:
            name = None
            if job.keep or (head and head.path in layers_that_share):  # that of a head is small
                name = store(f"{len(files):05}.safetensors", covariance.to_tensors())
            for layer in layers_that_share:
                layers[layer] = {"file": name, "tokens": covariance.tokens, "dim": covariance.dim}
        use.take(block, measurements)
        del measurements, covariance  # or they would be in memory while the next block runs
    used = {entry["file"] for entry in layers.values()}
    for name in files.keys() - used:  # a later measurement of the same layers has replaced it
        del files[name]
    manifest = {"files": files, "layers": layers, **job.about}
    if head and head.sums.isfinite().all() and head.path in layers:
        manifest["head"] = {"layer": head.path, "file": store(PREDICTED, {"predicted": head.sums})}
    if job.counts:
        manifest["counts"] = store(COUNTS, job.counts.to_tensors())
    return manifest


def _predictions(job: Job) -> Predictions | None:
    path = job.architecture.head
    return Predictions(path, job.architecture.weights[f"{path}.weight"][0]) if path else None


def _out_of_memory(job: Job, device: str) -> str:
    cost = job.estimate(device)
    halved = max(1, job.batch_size // 2)
    return (
        f"{job.name}: calibration ran out of memory on {device}. It needs about {readable(cost.peak)}: "
        f"{readable(cost.weights)} for a block's weights, {readable(cost.covariances)} for its covariances, "
        f"{readable(cost.hidden)} for hidden states and {readable(cost.batch)} for one batch. "
        f"pave.calibration.batch_size: {halved} would save about {readable(cost.batch * (1 - halved / job.batch_size))}, "
        f"half of `max_length` about {readable(cost.hidden / 2)}, and a smaller `max_tokens` some of the covariances; or use "
        "another device"
    )


Measured = tuple[str | None, list[Measurement]]  # of a block; or of all layers that remain


def _measure(job: Job, runtime: Runtime, head: Predictions | None, use: Use) -> Iterator[Measured]:
    """Covariances of all layers, block by block and in batches if possible. Later ones replace earlier ones of the same layer.

    Args:
        head: gets the model's predictions, and has its head measured, too.
        use: is told when measuring starts again.
    """
    measure, batch_size, apart = measure_in_lockstep, job.batch_size, frozenset()
    if any(sample.is_pictured for sample in job.run):
        batch_size = 1
    while True:
        if head:
            head.sums.zero_()
        try:
            yield from measure(job, runtime, batch_size, apart, head)
            if head:
                head.sums = distributed.total(head.sums)
            return
        except DivergedError as error:
            # DeBERTa also computes queries and keys, but not values, of relative positions.
            LOG.info("%s: measuring the inputs of %s, and of layers with the same role, apart", job.name, error)
            apart |= {error.role}
        except (ReenteredError, UnknownWeightError) as error:
            # ALBERT calls one block many times; some checkpoints need transformers' own loader.
            LOG.info("%s: cannot be run block by block (%s), loading it whole", job.name, error)
            measure = measure_whole
        except NotFiniteError as error:
            dtype = inference_dtype(job.config, runtime.device)
            raise explained(error, job.name, dtype, stored_weights(job.folder)) from None
        except UnalignedInputError as error:
            LOG.info("%s: running samples one by one, because padding cannot be told from tokens in %s", job.name, error)
            batch_size = 1
        use.start_again()


def measure_in_lockstep(
    job: Job, runtime: Runtime, batch_size: int, apart: frozenset[str] = frozenset(), head: Predictions | None = None
) -> Iterator[Measured]:
    """The covariances of all layers, block by block.

    Args:
        head: see `Observer`.

    Raises:
        ReenteredError: the model calls a block again after all batches have left it.
        UnknownWeightError: a weight cannot be found in the checkpoint.
        UnalignedInputError: batches must have no padding.
        DivergedError: the role of a layer has to be added to `apart`.
        NotFiniteError: a layer's input is not finite.
    """
    dtype = inference_dtype(job.config, runtime.device)
    streamed = StreamedModel(job.architecture.cls, job.config, Checkpoint(job.folder), dtype, runtime.device)
    run = runner(streamed.model, unpadded=batch_size == 1, with_head=head is not None)
    observer = Observer(streamed.model, job.layers, job.name, apart, unpadded=batch_size == 1, head=head)
    batches = [batch.to(runtime.device) for batch in distributed.share(job.run, batch_size)]
    tokens = sum(sample.length for sample in job.run) / distributed.world_size()
    blocks = len(find_blocks(streamed.model))
    with (
        torch.inference_mode(False),  # in that mode tensors do not count how often they are written to
        torch.no_grad(),
        packed_masks(),
        observer.watching() as begin,
        bar(blocks, f"Calibrating {job.name}", "blocks", runtime.quiet) as progress,
    ):
        start = time.monotonic()
        for block, _ in run_in_lockstep(streamed, batches, run, begin):
            if block is not None:
                yield block, distributed.add_up(distributed.together(lambda path=block: observer.take(path)))
                speed = tokens * (progress.n + 1) / blocks / (time.monotonic() - start)
                progress.set_postfix_str(f"{speed:.0f} tokens/s", refresh=False)
                progress.update()
    yield None, distributed.add_up(distributed.together(observer.take))


def measure_whole(
    job: Job, runtime: Runtime, batch_size: int, apart: frozenset[str] = frozenset(), head: Predictions | None = None
) -> Iterator[Measured]:
    """The same, with the whole model and all of its covariances in memory.

    Raises:
        UnalignedInputError: batches must have no padding.
        DivergedError, NotFiniteError: see `measure_in_lockstep`.
    """
    model = load_model(job.architecture.cls, job.config, job.folder, runtime.device)
    batches = distributed.share(job.run, batch_size)
    unpadded = batch_size == 1
    measure = functools.partial(measure_model, model, job.layers, job.name, batches, apart, unpadded)
    yield None, distributed.add_up(distributed.together(lambda: measure(runtime.device, runtime.quiet, head)))


def measure_model(
    model: nn.Module,
    layers: list[str],
    name: str,
    batches: list[Batch],
    apart: frozenset[str],
    unpadded: bool,
    device: str,
    quiet: bool,
    head: Predictions | None = None,
) -> list[Measurement]:
    """The covariances of all layers of a model that is in memory.

    Args:
        layers, name, apart, unpadded, head: see `Observer`.

    Raises:
        UnalignedInputError: batches must have no padding.
        DivergedError: the role of a layer has to be added to `apart`.
        NotFiniteError: a layer's input is not finite.
    """
    run = runner(model, unpadded, with_head=head is not None)
    observer = Observer(model, layers, name, apart, unpadded, head)
    with (
        torch.inference_mode(False),  # see `measure_in_lockstep`
        torch.no_grad(),
        observer.watching() as begin,
        bar(len(batches), f"Calibrating {name}", "batches", quiet) as progress,
    ):
        for batch in batches:
            batch = batch.to(device)
            begin(batch)
            run(batch)
            progress.update()
        return observer.take()
