"""How pictures are drawn with matplotlib: their style, and as what they are written.

A figure has light colours. As SVG, inside of a page, it takes on those of the page: each of `THEMED` becomes a CSS
variable, so that it is readable on a dark page, too.
"""

from __future__ import annotations

import contextlib
import html
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure

INK, MUTED, LINE = "#1b1f24", "#69707a", "#dfe3e8"
THEMED = {INK: "currentColor", MUTED: "var(--muted)", LINE: "var(--line)"}
# Of middling lightness: told apart on white and on black.
COLOURS = ("#3b82f6", "#ea6a0c", "#0c9a6b", "#db2777", "#8b5cf6", "#a97f00", "#0891b2", "#8a6d5b")

# Fonts with Chinese, Japanese or Korean for names of models and data: those of them that are installed.
_WIDER = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei", "Droid Sans Fallback", "PingFang SC")
_WIDER += ("Hiragino Sans", "Apple SD Gothic Neo", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "SimHei", "Arial Unicode MS")
_INSTALLED = {font.name for font in font_manager.fontManager.ttflist}

STYLE = {
    "font.family": ["DejaVu Sans", *(name for name in _WIDER if name in _INSTALLED)],
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a dollar in a name is a dollar
}
WIDTH = 10.0  # inches


@dataclass(frozen=True)
class Plot:
    """A figure under the name of its file, with what its reader has to know."""

    name: str
    title: str
    caption: str
    figure: Figure


def svg(plot: Plot) -> str:
    """The figure as an element of a page, in the page's colours."""
    text = io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": plot.name}), _any_letters():
        plot.figure.savefig(text, format="svg", bbox_inches="tight", dpi=220, metadata={"Date": None})
    drawn = text.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    # Several figures share one page.
    drawn = re.sub(r'\bid="', f'id="{plot.name}-', drawn)
    drawn = re.sub(r"url\(#", f"url(#{plot.name}-", drawn)
    drawn = re.sub(r'href="#', f'href="#{plot.name}-', drawn)
    # DejaVu Sans comes with matplotlib; the others are no wider, wherever the page is read.
    drawn = drawn.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, system-ui, sans-serif")
    for colour, variable in THEMED.items():
        drawn = drawn.replace(colour, variable)
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawn).groups()
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    opening = f'<svg role="img" aria-label="{html.escape(plot.title)}" viewBox="0 0 {width} {height}" {names}>'
    return opening + drawn[drawn.index(">") + 1 :]


def png(plot: Plot) -> bytes:
    """The figure on white."""
    data = io.BytesIO()
    with matplotlib.rc_context(STYLE), _any_letters():
        plot.figure.savefig(data, format="png", bbox_inches="tight", dpi=160, facecolor="white", metadata={"Software": None})
    return data.getvalue()


@contextlib.contextmanager
def _any_letters() -> Iterator[None]:
    """matplotlib warns of each letter that no font has. A page shows it all the same, a PNG a box."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


def colours(models: Sequence[str]) -> dict[str, Any]:
    """A colour for each model."""
    if len(models) <= len(COLOURS):
        return dict(zip(models, COLOURS))
    return dict(zip(models, matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, len(models)))))


def panels_of(columns: int, rows: int, height: float, **more: Any) -> tuple[Figure, np.ndarray]:
    """A figure with panels, each `height` inches high."""
    figure = Figure(figsize=(WIDTH, rows * height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **more)


def legend(figure: Figure) -> None:
    """Above the panels, with what any of them shows."""
    found = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            found.setdefault(label, handle)
    figure.legend(found.values(), found.keys(), loc="outside upper left", ncols=min(len(found), 6), fontsize=8.5)


def title_of(stack: str, several: bool) -> str:
    """What a title tells of the stack, where there are several."""
    return f" · {stack or 'outside of layers'}" if several else ""


def file_of(name: str, stack: str, several: bool) -> str:
    """A name that only this stack's figure has."""
    return f"{name}-{re.sub(r'[^a-z0-9]+', '-', stack.lower()) or 'other'}" if several else name
