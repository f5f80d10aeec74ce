"""A model on held-out rows, block by block as in calibration, and what it gives at each place."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_pave.calibration.batches import Batch
from mergekit_pave.calibration.forms import Form, Places
from mergekit_pave.calibration.forward import HeadReachedError, UnalignedInputError, counted_rows, runner
from mergekit_pave.calibration.held_out import Rows
from mergekit_pave.calibration.job import Runtime
from mergekit_pave.calibration.lockstep import Loads, run_in_lockstep
from mergekit_pave.calibration.masks import packed_masks
from mergekit_pave.calibration.models import find_blocks, inference_dtype
from mergekit_pave.calibration.subjects import Subject
from mergekit_pave.calibration.weights import UnknownWeightError
from mergekit_pave.core.failures import advising
from mergekit_pave.errors import PaveError
from mergekit_pave.progress import bar

LOG = logging.getLogger(__name__)

REMEDY = "A smaller pave.calibration.batch_size or max_length needs less, and so do fewer --rows"

# What is done with the number of a place, and the log-probabilities or the features there and at those behind it, (n, classes).
Take = Callable[[int, Tensor], None]

_AT_ONCE = 256  # places whose scores are in memory together


def run_over(subject: Subject, work: list[tuple[Rows, Take]], runtime: Runtime) -> None:
    """Run a model once over the rows of some experts, all of one form.

    A place may be given twice, as a model that has to be loaded or batched otherwise begins again.

    Raises:
        PaveError: the model cannot be run, what it gives is not finite, or memory runs out.
    """
    one_by_one, whole = False, False
    while True:
        try:
            with advising(f"running {subject.name}", runtime.device, REMEDY):
                return _run(_opened(subject, whole, runtime.device), subject.name, work, one_by_one, runtime)
        except UnknownWeightError as error:
            if whole:
                raise
            LOG.info("%s: cannot be run block by block (%s), loading it whole", subject.name, error)
            whole = True
        except UnalignedInputError as error:
            LOG.info("%s: running rows one by one, because padding cannot be told from tokens in %s", subject.name, error)
            one_by_one = True


def _opened(subject: Subject, whole: bool, device: str) -> Loads:
    return subject.whole(device) if whole else subject.streamed(inference_dtype(subject.config, device), device)


def _run(loads: Loads, name: str, work: list[tuple[Rows, Take]], one_by_one: bool, runtime: Runtime) -> None:
    form, model = work[0][0].form, loads.model
    places: dict[int, tuple[int, Take]] = {}  # by batch
    batches = []
    for rows, take in work:
        for batch, start in rows.batches(one_by_one, runtime.device):
            batches.append(batch)
            places[id(batch)] = start, take
    unpadded = all(len(batch.origins) == 1 for batch in batches)
    current: Batch | None = None

    def begin(batch: Batch) -> None:
        nonlocal current
        current = batch

    def give(batch: Batch, values: Tensor) -> None:
        # NaN is the largest of all. Of log-probabilities some may be -inf: classes that cannot be.
        if not (values.abs() if form.places is Places.NOWHERE else values).amax(dim=1).isfinite().all():
            raise PaveError(
                f"{name}: what it gives for {' or '.join(batch.origins[:3])} is not finite. Look for NaN or infinity in its "
                "weights. If there are none, run in float32 (without --cuda)"
            )
        start, take = places[id(batch)]
        take(start, values)
        places[id(batch)] = start + len(values), take

    def see_head(head: nn.Module, args: tuple) -> None:
        batch, x = current, args[0]
        counted = counted_rows(batch, form.head, x, unpadded)
        flat = x.reshape(-1, x.shape[-1])
        for part in (flat if counted is None else flat[counted]).split(_AT_ONCE):
            give(batch, nn.functional.linear(part, head.weight, head.bias).float().log_softmax(dim=1))
        raise HeadReachedError

    def take_output(batch: Batch, output: Any) -> None:
        if form.places is Places.NOWHERE:
            give(batch, _features(output, batch, name))
            return
        for part in _scores(output.logits, form, batch, unpadded).split(_AT_ONCE):
            give(batch, part.float().log_softmax(dim=1))

    hook = model.get_submodule(form.head).register_forward_pre_hook(see_head) if form.head else None
    run = runner(model, unpadded, form.places is not Places.NOWHERE, take_output)  # with a hook there is no output
    blocks = len(find_blocks(model))
    try:
        with (
            torch.inference_mode(False),  # as in calibration
            torch.no_grad(),
            packed_masks(),
            bar(blocks, f"Running {name}", "blocks", runtime.quiet, delay=1) as progress,
        ):
            for stop in run_in_lockstep(loads, batches, run, begin):
                progress.update(stop.path is not None)
    finally:
        if hook:
            hook.remove()


def _scores(logits: Tensor, form: Form, batch: Batch, unpadded: bool) -> Tensor:
    """The scores at each place of a batch, (places, classes)."""
    if form.places is Places.TOKENS:
        counted = counted_rows(batch, "its head", logits, unpadded)
        flat = logits.reshape(-1, logits.shape[-1])
        return flat if counted is None else flat[counted]
    if form.labels > 1:  # a label is given or not
        return torch.stack([logits, torch.zeros_like(logits)], dim=-1).flatten(0, 1)
    return logits


def _features(output: Any, batch: Batch, name: str) -> Tensor:
    """The mean of the last hidden states over the tokens, or patches, of each row, (rows, d).

    Raises:
        PaveError: the model gives none.
    """
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None or hidden.dim() != 3:
        raise PaveError(f"{name}: the model gives no hidden states that can be compared, so it cannot be scored")
    mask = next((counted for counted in batch.counted if counted.shape == hidden.shape[:2]), None)
    if mask is None:
        return hidden.float().mean(dim=1)
    weight = mask.to(hidden.device, torch.float32)[..., None]
    return (hidden.float() * weight).sum(dim=1) / weight.sum(dim=1)
