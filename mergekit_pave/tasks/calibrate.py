"""How one model's covariances get into the cache, before any graph is run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mergekit_pave.cache import Artefact
from mergekit_pave.calibration import distributed
from mergekit_pave.calibration.job import Job, Runtime
from mergekit_pave.calibration.run import calibrate
from mergekit_pave.calibration.stored import stored_covariances
from mergekit_pave.core.linear import Linear
from mergekit_pave.core.purification import missed_layers
from mergekit_pave.errors import PaveError


@dataclass(frozen=True)
class _Calibration:
    """Makes sure that one model's covariances are in the cache. It runs before any graph, so it is not a task of one.

    Attributes:
        folder: of the covariances.
        model: the model's name, for messages.
        purified: the layers that are to be purified.
        num_weights: in all of the model's linear layers.
    """

    folder: str
    model: str
    purified: tuple[Linear, ...]
    num_weights: int

    @property
    def is_done(self) -> bool:
        """Whether the cache has the covariances; they may still turn out to be damaged."""
        return Artefact(Path(self.folder)).manifest() is not None

    def never_called(self) -> list[Linear]:
        """See `missed_layers`. Layers that are measured for `regmean` alone do not count: it falls back, and reports that."""
        if not self.purified:
            return []
        return missed_layers(self.model, self.purified, self.num_weights, stored_covariances(self.folder))


@dataclass(frozen=True)
class CalibrateModel(_Calibration):
    """Measures the covariances, unless the cache has them."""

    job: Job
    runtime: Runtime

    def execute(self) -> None:
        calibrate(self.job, Artefact(Path(self.folder)), self.runtime)
        if distributed.rank() == 0:  # the others need not wait until it has written everything
            self.never_called()


@dataclass(frozen=True)
class GivenCovariance(_Calibration):
    """Checks covariances that somebody else has measured, as far as that can be done without reading them."""

    def execute(self) -> None:
        if not Artefact(Path(self.folder)).is_complete():
            raise PaveError(
                f"the covariances at {self.folder} are damaged: a file is gone, or has not the size that their manifest says; "
                "fetch them again"
            )
        self.never_called()
