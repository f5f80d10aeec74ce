"""The score of a merge: how much of each expert it keeps, as JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mergekit_pave import versions
from mergekit_pave.core import score
from mergekit_pave.core.score import Distances, Estimate

FORMAT = 1


@dataclass(frozen=True)
class Scored:
    """What was measured on one expert's rows: float64 (rows,) each, sums over the places of a row.

    Attributes:
        place: what there are distances of: a `token`, a `row`, or a `label` of a row.
        places: how many there are in all rows.
        distances: in nats, or angular.
        agreed: places where the merged model's most likely class is the expert's; None of features.
        nats: the loss of merged model, expert and base model; None where no token follows.
        drift: KL from the base model to the merged model in nats; None of features.
        num_bytes: the length of the text that the loss is of.
    """

    place: str
    places: int
    distances: Distances
    agreed: Tensor | None
    nats: dict[str, Tensor] | None
    drift: Tensor | None
    num_bytes: int


def summarise(base: str, experts: dict[str, Scored]) -> dict[str, Any]:
    """
    Args:
        experts: by the model's name.
    """
    models = {name: _of_expert(name, experts) for name in experts}
    estimates = {name: found for name, scored in experts.items() if (found := score.kept(scored.distances))}
    worst = min(estimates, key=lambda name: estimates[name].value, default=None)
    return {
        "format": FORMAT,
        "versions": versions.installed(),
        "base": base,
        "models": models,
        "mean": as_json(score.mean(list(estimates.values()))) if estimates else None,
        "worst": {"model": worst, **as_json(estimates[worst])} if worst else None,
    }


def _of_expert(name: str, experts: dict[str, Scored]) -> dict[str, Any]:
    scored = experts[name]
    estimate = score.kept(scored.distances)
    bits = None
    if scored.nats and scored.num_bytes:
        bits = {of: values.sum().item() / math.log(2) / scored.num_bytes for of, values in scored.nats.items()}
    others = [other for key, other in experts.items() if key != name and other.drift is not None]
    return {
        "rows": len(scored.distances.merged),
        "place": scored.place,
        "places": scored.places,
        "measure": "cosine" if scored.agreed is None else "kl",
        **(as_json(estimate) if estimate else {"kept": None, "error": None}),
        "agreement": None if scored.agreed is None else scored.agreed.sum().item() / scored.places,
        "bits_per_byte": bits,
        "drift": sum(o.drift.sum().item() for o in others) / sum(o.places for o in others) / math.log(2) if others else None,
        "by_row": {of: values.tolist() for of, values in scored.distances._asdict().items()},
    }


def as_json(estimate: Estimate, name: str = "kept") -> dict[str, float | None]:
    """JSON has no infinity, which the error of a single row is.

    Args:
        name: of the value.
    """
    return {name: estimate.value, "error": estimate.error if math.isfinite(estimate.error) else None}
