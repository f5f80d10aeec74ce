"""The pictures in the model card. They need matplotlib, which is an extra; without it the card has none."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mergekit_pave.errors import PaveError
from mergekit_pave.report.outputs import PICTURE_NAME, SCORES_PICTURE_NAME
from mergekit_pave.report.places import grids

LOG = logging.getLogger(__name__)


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def require_matplotlib() -> None:
    """
    Raises:
        PaveError: matplotlib is not installed; the message says how to install it.
    """
    if not can_draw():
        raise PaveError("the report is drawn with matplotlib, which is not installed: pip install 'mergekit-pave[report]'")


def draw_ranks(report: dict[str, Any], folder: str) -> str | None:
    """Write the kept ranks of the largest stack of layers as a PNG.

    Returns:
        The file's name; None if nothing was purified, or if the picture cannot be drawn.
    """
    if not report["purified"]:
        return None

    def draw() -> bytes:
        from mergekit_pave.report.page import quick

        grid = grids(report["purified"], lambda row: row["kept"] / row["components"])[0]
        if (drawn := quick.ranks(grid)) is not None:
            return drawn
        from mergekit_pave.report.page import drawing, heatmaps

        return drawing.png(heatmaps.ranks(grid))

    return _write(Path(folder, PICTURE_NAME), draw)


def draw_shares(score: dict[str, Any], folder: str) -> str | None:
    """Write the share that is kept of each model as a PNG.

    Returns:
        The file's name; None if the picture cannot be drawn. Then there is none of an earlier score, either.
    """

    def draw() -> bytes:
        from mergekit_pave.report.page import drawing, shares

        return drawing.png(shares.plot_score(score))

    Path(folder, SCORES_PICTURE_NAME).unlink(missing_ok=True)
    return _write(Path(folder, SCORES_PICTURE_NAME), draw)


def _write(path: Path, draw: Callable[[], bytes]) -> str | None:
    if not can_draw():
        return None
    try:
        path.write_bytes(draw())
    except Exception as error:  # what was to be shown is done and good, whatever fails in a drawing library
        LOG.warning("the model card gets no picture, because it could not be drawn: %s", error)
        return None
    return path.name
