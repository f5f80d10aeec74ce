"""What models give on held-out rows, as it is kept and compared."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_pave.calibration.forms import Places
from mergekit_pave.calibration.held_out import Rows
from mergekit_pave.core.likeness import Sketch, angular_distance, divergence, sketch

# Classes that are kept at a place, and how many of them are drawn if there are more.
KEPT, DRAWN = 256, 32


class Record:
    """What a model gives, place by place.

    Attributes:
        tensors: those of a `Sketch`, and `nats`, the loss of the token that follows, 0 where none does; or
            `features`, (rows, d). With a comparison also what it has for each row.
    """

    def __init__(self, rows: Rows, compares: Comparison | None = None, keeps: bool = True):
        """
        Args:
            compares: with what another model gives.
            keeps: what the model gives is kept. Otherwise only the loss and the comparison are.
        """
        self._rows, self._compares, self._keeps = rows, compares, keeps
        self.tensors: dict[str, Tensor] = {}

    def take(self, start: int, values: Tensor) -> None:
        """See `scoring.Take`."""
        if self._rows.form.places is Places.NOWHERE:
            self._write("features", start, values)
            return
        following = self._rows.following[start : start + len(values)].to(values.device)
        loss = -values.gather(1, following.clamp(min=0)[:, None])[:, 0]
        self._write("nats", start, torch.where(following < 0, 0.0, loss).double())
        if self._keeps:
            for name, part in sketch(values, KEPT, DRAWN, seed=start)._asdict().items():
                self._write(name, start, part)
        if self._compares:
            for name, part in self._compares.at(start, values).items():
                self._write(name, start, part)

    def _write(self, name: str, start: int, part: Tensor) -> None:
        if name not in self.tensors:
            self.tensors[name] = torch.zeros(len(self._rows.row_of), *part.shape[1:], dtype=part.dtype)
        self.tensors[name][start : start + len(part)] = part.cpu()

    def by_row(self) -> dict[str, Tensor]:
        """The sums over the places of each row, float64 (rows,): of the loss and of the comparison."""
        if "features" in self.tensors:
            return self._compares.features(self.tensors["features"]) if self._compares else {}
        return {name: self._rows.by_row(values) for name, values in self.tensors.items() if values.dim() == 1}


class Reference(NamedTuple):
    """What an expert, or the base model, gives on the expert's rows.

    Attributes:
        tensors: see `Record`.
        by_row: sums over the places of each row.
    """

    tensors: dict[str, Tensor]
    by_row: dict[str, Tensor]


class Comparison:
    """A model compared with an expert, and with the base model if that is given.

    The results are `divergence`, the distance to the expert; `agreed`, 1 where the most likely class is that of the expert; and
    `drift`, the distance to the base model.
    """

    def __init__(self, expert: Reference, base: Reference | None = None):
        self._expert, self._base = expert, base

    def at(self, start: int, logs: Tensor) -> dict[str, Tensor]:
        """At places from a number on, of log-probabilities (n, classes)."""
        of = _sketch_at(self._expert, start, logs)
        found = {"divergence": divergence(of, logs), "agreed": (logs.argmax(dim=1) == of.classes[:, 0]).double()}
        if self._base:
            found["drift"] = divergence(_sketch_at(self._base, start, logs), logs)
        return found

    def features(self, features: Tensor) -> dict[str, Tensor]:
        """For each row."""
        return {"divergence": angular_distance(features, self._expert.tensors["features"])}


def _sketch_at(reference: Reference, start: int, logs: Tensor) -> Sketch:
    place = slice(start, start + len(logs))
    return Sketch(*(reference.tensors[name][place].to(logs.device) for name in Sketch._fields))
