"""What purification adds to a merge."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference

from mergekit_pave import cache
from mergekit_pave.calibration.generation import Generation
from mergekit_pave.core.linear import Linear
from mergekit_pave.files import readable
from mergekit_pave.planning.emr import PlannedEmr
from mergekit_pave.settings import RelativeRegularization
from mergekit_pave.tasks.calibrate import CalibrateModel, GivenCovariance
from mergekit_pave.tasks.decompose import DecomposeWeight
from mergekit_pave.tasks.purify import GatherPurified, PurificationStats
from mergekit_pave.tasks.refine import Refinement
from mergekit_pave.tasks.regmean import ClosedForm
from mergekit_pave.tasks.vocabulary import Heads, Rows

LOG = logging.getLogger(__name__)

# By model and tensor, why the tensor is merged as it is.
Reasons = dict[ModelReference, dict[str, str]]


@dataclass(frozen=True)
class PlannedWeight:
    """One weight of one model that is to be purified.

    Attributes:
        output: the name of the tensor that it is merged into.
        number: that tensor's number in `Merge.tensors`.
        drop: components that each of its matrices would lose on its own; allocation moves them between models.
        regularization: λ.
        unchanged: the experts that stay as they are, because they equal the base model's.
        cached: its decomposition is in the cache.
        covariances: the folder of the model's covariances, where they are in the cache.
    """

    model: ModelReference
    tensor: str
    output: str
    number: int
    layer: Linear
    drop: int
    regularization: float | RelativeRegularization
    unchanged: tuple[int, ...] = ()
    cached: bool = False
    covariances: str = ""


@dataclass(frozen=True)
class Plan:
    """What purification adds to a merge.

    Attributes:
        weights: what is to be purified.
        gathers: the new gather task by the output tensor's number in `Merge.tensors`.
        calibrations: the tasks that fill the cache of covariances. Models of which nothing is to be decomposed have none.
        decompositions: the tasks that fill the cache of subspaces.
        stats: the tasks that make the rows of the report.
        header: the report without its rows.
        closed_forms: what regmean merges in closed form, by the output tensor's number.
        rows: what is merged by token counts, by the output tensor's number.
        heads: likewise what is merged by predictions.
        emr: what `emr` keeps for each model; None with any other merge method.
        refinement: how the merge is refined; None where it is not.
        warnings: what should make a user look twice before any work is done.
        compared: it is known of all weights whether they equal the base model's; otherwise only of those in the cache.
        samples: by model a key of the samples that it is calibrated with, or of the covariances that it is given.
        to_write: by model how it is to write its samples, where that is still to be done.
        left: by model how many rows its data sets have beside its samples; None where that is not known.
        remember: has the cache remember what planning has read, so that it need not be read again.
    """

    weights: list[PlannedWeight]
    gathers: dict[int, GatherPurified]
    calibrations: list[CalibrateModel | GivenCovariance]
    decompositions: list[DecomposeWeight]
    stats: list[PurificationStats]
    header: dict[str, Any]
    closed_forms: dict[int, ClosedForm]
    rows: dict[int, Rows]
    heads: dict[int, Heads]
    emr: PlannedEmr | None
    refinement: Refinement | None
    warnings: list[str]
    compared: bool
    samples: dict[str, str]
    left: dict[str, int | None]
    to_write: dict[str, Generation]
    remember: list[Callable[[], None]]

    @property
    def decomposed(self) -> int:
        """How many different weights are decomposed, now or before; in a frankenmerge one may go to several output tensors."""
        return len({(weight.model, weight.tensor) for weight in self.weights})

    @property
    def to_calibrate(self) -> list[CalibrateModel]:
        """The calibrations that the cache lacks."""
        return [task for task in self.calibrations if isinstance(task, CalibrateModel) and not task.is_done]

    @property
    def missing(self) -> int:
        """Bytes that the cache will have more, about."""
        covariances = sum(task.estimate().cache for task in self.to_calibrate)
        return covariances + sum(task.cache for task in self.decompositions)


def announce(plan: Plan) -> None:
    """Log the warnings, what is in the cache, and what the calibrations that are still to be done will cost.

    Raises:
        PaveError: the disk has no room for what the cache lacks.
    """
    for warning in plan.warnings:
        LOG.warning(warning)
    if plan.stats:
        LOG.info("PAVE: %d of %d weights are in the cache", plan.decomposed - len(plan.decompositions), plan.decomposed)
    for task in plan.to_calibrate:
        cost = task.estimate()
        LOG.info(
            "%s: to be calibrated%s with %d tokens in %s; takes about %s of cache and %s of memory",
            task.job.name,
            " again, because its covariances were not kept (pave.keep_covariances)," if task.is_again else "",
            task.job.about["tokens"],
            task.job.about["dtype"],
            readable(cost.cache),
            readable(cost.peak),
        )
    if num_bytes := plan.missing:
        folders = [task.folder for task in (*plan.to_calibrate, *plan.decompositions)]
        cache.require_space(Path(folders[0]), num_bytes)


def announce_refinement(plan: Plan) -> None:
    """Log what refining will cost.

    Raises:
        PaveError: the disk has no room for the merged model's tensors beside what the cache lacks.
    """
    if plan.refinement is None:
        return
    layers, size = len(plan.refinement.layers), plan.refinement.size
    tokens = sum(job.about["tokens"] for job in plan.refinement.experts.values())
    LOG.info(
        "%d layers to be refined with %d tokens of %d models; takes %s of disk while the merge runs, and about %s of memory",
        layers,
        tokens,
        len(plan.refinement.experts),
        readable(size),
        readable(plan.refinement.estimate().peak),
    )
    cache.require_space(plan.refinement.folder, plan.missing + size, "leave `refine` out")
