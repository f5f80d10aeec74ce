"""What should make a user look twice before any work is done."""

from __future__ import annotations

import itertools
from collections.abc import Collection

from mergekit.common import ModelReference

from mergekit_pave.cache import Artefact
from mergekit_pave.calibration.drawing import ENOUGH
from mergekit_pave.calibration.run import has_covariances
from mergekit_pave.core.linear import Linear
from mergekit_pave.planning.calibration import PlannedCalibration
from mergekit_pave.planning.merge import Merge
from mergekit_pave.planning.plan import PlannedWeight

# Merge methods whose base model is one of the two models that are merged.
BETWEEN_TWO = {"slerp", "nearswap", "arcee_fusion"}


def sample_warnings(
    calibrations: dict[ModelReference, PlannedCalibration], layers: dict[ModelReference, list[Linear]]
) -> list[str]:
    """What the samples alone show: there are few of them, or two models have the same.

    Args:
        layers: of each model, those whose covariances are needed.
    """
    warnings = []
    for model, calibration in calibrations.items():
        widest = max(linear.shape[1] for linear in layers[model])
        if calibration.tokens < widest // ENOUGH:
            warnings.append(
                f"{model}: {calibration.tokens} calibration tokens for layers that are up to {widest} wide; directions that no "
                f"token shows are ranked by the weights alone. A merge gains little from more than {widest // ENOUGH} or so: "
                "give more data, or raise calibration.samples or max_tokens"
            )
    for (model, calibration), (other, of_other) in itertools.combinations(calibrations.items(), 2):
        shared = len(calibration.contents & of_other.contents)
        smaller = min(len(calibration.contents), len(of_other.contents))
        if 2 * shared > smaller:
            warnings.append(
                f"{model} and {other}: {shared} of {smaller} calibration samples are the same, so what one model's task needs "
                "cannot be distinguished from what the other's needs; give each model samples of its own task"
            )
    return warnings


def precision_warnings(calibrations: Collection[PlannedCalibration]) -> list[str]:
    """Which calibrations repeat what the cache has in another precision.

    Args:
        calibrations: those that are still to be done.
    """
    return [
        f"{calibration.source.model}: it will be calibrated in {calibration.dtype}, although it has been with these samples in "
        f"{dtype}, on another kind of device. To use that, merge with the options of that run"
        + (f", or give the model `covariance: {folder}` instead of data" if has_covariances(Artefact(folder), kept=True) else "")
        for calibration in calibrations
        for dtype, folder in calibration.elsewhere.items()
    ]


def unchanged_warnings(selected: list[PlannedWeight], changed: list[PlannedWeight]) -> list[str]:
    """Which models have nothing to purify, because all their selected weights equal the base model's.

    Args:
        selected: the weights that were to be purified.
        changed: those among them that do not equal the base model's.
    """
    at_work = {weight.model for weight in changed}
    idle = dict.fromkeys(weight.model for weight in selected if weight.model not in at_work)
    return [
        f"{model}: all {sum(weight.model == model for weight in selected)} weights of it that would be purified equal the base "
        "model's, so it is neither calibrated nor purified. Unless its other tensors differ, it adds nothing to the merge: check "
        "that it is the model you mean"
        for model in idle
    ]


def base_is_merged(merge: Merge, weights: list[PlannedWeight]) -> list[str]:
    """What purification and its figures mean where the base model is one of the two models that are merged."""
    if merge.method not in BETWEEN_TWO or not weights:
        return []
    bases = " and ".join(dict.fromkeys(str(tensor.base) for tensor in merge.tensors if tensor.base))
    return [
        f"{merge.method} merges two models, and the base model of the config, {bases}, is one of them. The base model is merged "
        "as it is, without purification. For the other model, what is called its change here is its distance from the base "
        "model, not from the model that both were fine-tuned from"
    ]


def idle_block(has_work: bool) -> list[str]:
    """That the block changes nothing of the merge."""
    advice = "It only says what data `mergekit-pave score` and `tune` use; to do more, add `refine` or `vocabulary`"
    return (
        []
        if has_work
        else [
            f"every model has `purify: false` or a rank_ratio of 1, so the `pave:` block changes nothing of this merge. {advice}"
        ]
    )
