"""How one model is measured, before any graph is run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from mergekit_pave.cache import Artefact
from mergekit_pave.calibration import distributed
from mergekit_pave.calibration.estimate import Estimate
from mergekit_pave.calibration.job import Job, Runtime
from mergekit_pave.calibration.run import calibrate, has_covariances
from mergekit_pave.calibration.stored import stored_covariances
from mergekit_pave.core.linear import Linear
from mergekit_pave.core.purification import missed_layers
from mergekit_pave.errors import PaveError
from mergekit_pave.tasks.decompose import DecomposeOnTheWay, DecomposeWeight


@dataclass(frozen=True)
class _Calibration:
    """Makes sure that what a model shows on its samples is there. It runs before any graph, so it is not a task of one.

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
    def is_measured(self) -> bool:
        """Whether it is known how many tokens each layer sees."""
        return Artefact(Path(self.folder)).manifest() is not None

    @property
    def is_done(self) -> bool:
        """Whether the cache has all that is needed; it may still turn out to be damaged."""
        return self.is_measured

    def never_called(self) -> list[Linear]:
        """See `missed_layers`. Layers that are measured for `regmean` alone do not count: it falls back, and reports that."""
        if not self.purified:
            return []
        return missed_layers(self.model, self.purified, self.num_weights, stored_covariances(self.folder))


@dataclass(frozen=True)
class CalibrateModel(_Calibration):
    """Measures the covariances, unless the cache has them, and decomposes weights while they are in memory.

    Attributes:
        decompositions: of weights whose tails the cache lacks. If it has the covariances, they are left to the caller.
    """

    job: Job
    runtime: Runtime
    decompositions: tuple[DecomposeWeight, ...] = ()

    @property
    def is_done(self) -> bool:
        needed = self.job.keep or not all(task.is_done for task in self.decompositions)
        return has_covariances(Artefact(Path(self.folder)), kept=needed)

    @property
    def is_again(self) -> bool:
        """Whether the model has been measured before, but the covariances were not kept."""
        return self.is_measured and not self.is_done

    def estimate(self) -> Estimate:
        """What it needs."""
        at_work = max((task.memory for task in self.decompositions), default=0)
        return replace(self.job.estimate(self.runtime.device), decomposition=at_work)

    def execute(self) -> None:
        use = DecomposeOnTheWay(self.decompositions, self.runtime.device)
        calibrate(self.job, Artefact(Path(self.folder)), self.runtime, use)
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
