"""The one picture in the model card. It needs matplotlib, which is an extra; without it the card has no picture."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

from mergekit_pave.errors import PaveError
from mergekit_pave.report.outputs import PICTURE_NAME
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
    if not report["purified"] or not can_draw():
        return None
    try:
        from mergekit_pave.report.page import drawing, heatmaps

        grid = grids(report["purified"], lambda row: row["kept"] / row["components"])[0]
        Path(folder, PICTURE_NAME).write_bytes(drawing.png(heatmaps.ranks(grid)))
    except Exception as error:  # the merge is done and good, whatever fails in a drawing library
        LOG.warning("the model card gets no picture, because it could not be drawn: %s", error)
        return None
    return PICTURE_NAME
