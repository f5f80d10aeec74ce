"""What sees to the covariances of one model, before any graph is run."""

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
    """What sees to the covariances of one model. It is executed before any graph, so it is no task of one.

    Attributes:
        folder: where they are, or will be.
        model: the model's name, for messages.
        layers: those that are to be purified, or whose covariances `regmean` needs.
        purified: those among them that are to be purified.
        size: the number of weights in all of the model's linear layers.
    """

    folder: str
    model: str
    layers: tuple[Linear, ...]
    purified: tuple[Linear, ...]
    size: int

    @property
    def is_done(self) -> bool:
        """Whether the cache has the covariances; they may still turn out to be damaged."""
        return Artefact(Path(self.folder)).manifest() is not None

    def never_called(self) -> list[Linear]:
        """See `missed_layers`. What is measured for `regmean` alone may be missed: it falls back, and says so."""
        if not self.purified:
            return []
        return missed_layers(self.model, self.purified, self.size, stored_covariances(self.folder))


@dataclass(frozen=True)
class CalibrateModel(_Calibration):
    """Make sure that a model's covariances are in the cache."""

    job: Job
    runtime: Runtime

    def execute(self) -> None:
        calibrate(self.job, Artefact(Path(self.folder)), self.runtime)
        if distributed.rank() == 0:  # the others need not wait until it has written all
            self.never_called()


@dataclass(frozen=True)
class GivenCovariance(_Calibration):
    """Make sure that covariances which somebody else has made are intact."""

    def execute(self) -> None:
        if not Artefact(Path(self.folder)).is_intact():
            raise PaveError(
                f"the covariances at {self.folder} are damaged: a file is not what their manifest says; fetch them again"
            )
        self.never_called()
