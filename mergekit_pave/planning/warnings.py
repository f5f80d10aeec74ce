"""What should make a user look twice before any work is done."""

from __future__ import annotations

import itertools

from mergekit.common import ModelReference

from mergekit_pave.planning.merge import Environment, PlannedTensor
from mergekit_pave.planning.source import Source

# Merge methods whose base model is one of two fine-tunes, as good as the other.
_BETWEEN_TWO = {"slerp", "nearswap", "arcee_fusion"}


def sample_warnings(sources: dict[ModelReference, Source]) -> list[str]:
    """What the samples alone give away: that they are few, or the same for two models."""
    found = []
    for model, source in sources.items():
        widest = max((linear.shape[1] for linear in source.calibration.layers), default=0)
        if source.tokens < widest:
            found.append(
                f"{model}: {source.tokens} calibration tokens for layers that are up to {widest} wide; directions that no token "
                f"shows are told apart by the weights alone. Several times {widest} tokens make the result steadier: raise "
                "calibration.samples or max_tokens"
            )
        for dtype, folder in source.elsewhere.items():
            found.append(
                f"{model}: it will be measured in {source.dtype}, though with these samples it has been in {dtype}, on another "
                f"kind of device. To use that, merge with the options of that run, or give the model `covariance: {folder}` "
                "instead of data"
            )
    for (model, source), (other, beside) in itertools.combinations(sources.items(), 2):
        shared, smaller = len(source.contents & beside.contents), min(len(source.contents), len(beside.contents))
        if 2 * shared > smaller:
            found.append(
                f"{model} and {other}: {shared} of {smaller} calibration samples are the same, so what one model's task needs "
                "cannot be told from what the other's does; give each model samples of its own task"
            )
    return found


def base_is_merged(tensors: list[PlannedTensor], purified: set[ModelReference], environment: Environment) -> list[str]:
    """What purification and its figures mean where the base model is one of two fine-tunes that are merged."""
    if environment.merge_method not in _BETWEEN_TWO or not purified:
        return []
    bases = dict.fromkeys(str(planned.base) for planned in tensors if planned.base)
    return [
        f"{environment.merge_method} merges {' and '.join(bases)}, which the config names as the base model, as one of two ends. "
        "It is merged as it is, and what is called the change of the other model is its distance from it, not from the model "
        "that both come from"
    ]
