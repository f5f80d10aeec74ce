"""What is measured of each merge for `--scored`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from choice import COUNTS
from decoder import Decoder
from likeness import DecoderLikeness, EncoderLikeness, Rows
from merging import Arm, Laboratory, Scores
from product import Product, product

ROWS = max(COUNTS)
ROUNDS = 5
DRAWN = Arm("", ()).samples  # of each model's rows, into C


class Scorer:
    """Scores merges of one seed's fine-tunes, and the base model where there is no arm."""

    def __init__(self, laboratory: Laboratory, seed: int):
        self._laboratory, self._family, self._seed = laboratory, laboratory.family, seed

    def measure(self, arm: Arm | None) -> dict[str, Any]:
        """All there is to measure, by name: scores on the test parts, and distances to each expert on held-out rows."""
        inspect = {"test": self._test, "reference": self._reference, "product": lambda merged: self.product(merged)}
        return self._laboratory.inspected(arm, self._seed, inspect)

    def test(self, arm: Arm) -> Scores:
        return self.measure(arm)["test"]

    def rows(self, arm: Arm | None) -> Rows:
        """Everything that was measured on held-out rows."""
        measured = [found for name, found in self.measure(arm).items() if name != "test"]
        return {task: {name: row for found in measured for name, row in found[task].items()} for task in self._family.tasks}

    def seconds(self, arm: Arm) -> dict[str, list[float]]:
        """See `Product.seconds`."""
        inspect = {"seconds": lambda merged: self.product.seconds(merged, ROUNDS)}
        return self._laboratory.inspected(arm, self._seed, inspect)["seconds"]

    def _test(self, merged: Path) -> Scores:
        return self._family.score(merged, self._seed, "test", list(self._family.tasks))

    def _reference(self, merged: Path) -> Rows:
        return self._likeness.measure(merged)

    @functools.cached_property
    def _likeness(self) -> DecoderLikeness | EncoderLikeness:
        kind = DecoderLikeness if isinstance(self._family, Decoder) else EncoderLikeness
        return kind(self._family, self._seed, DRAWN, ROWS)

    @functools.cached_property
    def product(self) -> Product:
        return product(self._family, self._seed, DRAWN, ROWS)
