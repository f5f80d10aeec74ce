"""What is done with covariances while calibration has them in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod

from mergekit_pave.core.covariance import Measurement


class Use(ABC):
    """Something that is made of a model's covariances, block by block, so that they need not be stored for it.

    Attributes:
        is_complete: what is made is there already.
    """

    is_complete: bool

    @abstractmethod
    def take(self, block: str | None, measurements: list[Measurement]) -> None:
        """Use the covariances of the layers of one block, or of all that remain."""

    @abstractmethod
    def start_again(self) -> None:
        """The model has to be measured in another way: forget what was made."""

    @abstractmethod
    def finish(self) -> None:
        """All of the model has been measured: what was made can be relied on."""


class NoUse(Use):
    """Covariances are only stored."""

    is_complete = True

    def take(self, block: str | None, measurements: list[Measurement]) -> None:
        """Nothing is made."""

    def start_again(self) -> None:
        """There is nothing to forget."""

    def finish(self) -> None:
        """There is nothing to rely on."""
