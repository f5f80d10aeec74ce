"""How pictures are drawn with matplotlib, and how a figure becomes SVG or PNG.

A figure is drawn in light colours. In its SVG, which becomes part of a page, each colour of `THEMED` is replaced by a CSS
variable of the page, so that it is readable on a dark page, too.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, MUTED, LINE = "#1b1f24", "#69707a", "#dfe3e8"
THEMED = {INK: "currentColor", MUTED: "var(--muted)", LINE: "var(--line)"}
# Of medium lightness, so that they can be distinguished on white and on black.
COLOURS = ("#3b82f6", "#ea6a0c", "#0c9a6b", "#db2777", "#8b5cf6", "#a97f00", "#0891b2", "#8a6d5b")

# Fonts with Chinese, Japanese or Korean letters, for names of models and data.
_CJK_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei", "Droid Sans Fallback", "PingFang SC"),
    *("Hiragino Sans", "Apple SD Gothic Neo", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "SimHei", "Arial Unicode MS"),
)
_INSTALLED = {font.name for font in font_manager.fontManager.ttflist}

STYLE = {
    "font.family": ["DejaVu Sans", *(name for name in _CJK_FONTS if name in _INSTALLED)],
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
_LONGEST = 56  # letters of a label
_NOT_XML = re.compile("[^\t\n\r\x20-\ufffd\U00010000-\U0010ffff]")  # characters that a name may have, but XML may not
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


@dataclass(frozen=True)
class Plot:
    """A figure, the name of its file, and the texts around it."""

    name: str
    title: str
    caption: str
    figure: Figure


def svg(plot: Plot) -> str:
    """The figure as an element of a page, in the page's colours."""
    drawn = io.BytesIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": plot.name}), _missing_letters_allowed():
        plot.figure.savefig(drawn, format="svg", bbox_inches="tight", dpi=220, metadata=_NO_METADATA)
    root = ElementTree.fromstring(_NOT_XML.sub("\ufffd", drawn.getvalue().decode()))
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {_local(name): _on_page(_local(name), value, plot.name) for name, value in element.attrib.items()}
    root.attrib = {"role": "img", "aria-label": plot.title, "viewBox": root.attrib["viewBox"]}
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    """A name without its namespace, which SVG inside of HTML does not need."""
    return name.rpartition("}")[2]


def _on_page(attribute: str, value: str, figure: str) -> str:
    """The value that an attribute of a figure has on a page with other figures, in the page's colours."""
    if attribute == "id":
        return f"{figure}-{value}"
    if attribute == "href" and value.startswith("#"):
        return f"#{figure}-{value[1:]}"
    if attribute == "style":
        declarations = (declaration.partition(": ") for declaration in value.split("; "))
        return "; ".join(name + colon + THEMED.get(setting, setting) for name, colon, setting in declarations)
    return value.replace("url(#", f"url(#{figure}-")


def png(plot: Plot) -> bytes:
    """The figure on white."""
    data = io.BytesIO()
    with matplotlib.rc_context(STYLE), _missing_letters_allowed():
        plot.figure.savefig(data, format="png", bbox_inches="tight", dpi=160, facecolor="white", metadata={"Software": None})
    return data.getvalue()


@contextlib.contextmanager
def _missing_letters_allowed() -> Iterator[None]:
    """Without matplotlib's warning of each letter that no font has: a page shows the letter all the same, a PNG a box."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


def colours(models: Sequence[str]) -> dict[str, Any]:
    """A colour for each model."""
    if len(models) <= len(COLOURS):
        return dict(zip(models, COLOURS))
    return dict(zip(models, matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, len(models)))))


def shortened(name: str) -> str:
    """A name as a label: in one line, and without its middle if it is long."""
    name = " ".join(name.split())
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST // 2]}…{name[-_LONGEST // 2 + 1 :]}"


def panels_of(columns: int, rows: int, height: float, **more: Any) -> tuple[Figure, np.ndarray]:
    """A figure with panels, each `height` inches high."""
    figure = Figure(figsize=(WIDTH, rows * height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **more)


def label_layers(axes: np.ndarray, count: int, quantity: str) -> None:
    """Label panels whose curves go over the layers, and hide those that are left over.

    Args:
        axes: of the panels.
        count: how many have curves.
        quantity: what the curves are of.
    """
    across = axes.shape[1]
    for panel in axes.flat[count:]:
        panel.axis("off")
    for panel in axes[:, 0]:
        panel.set_ylabel(quantity)
    for panel in axes.flat[:count]:
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    for panel in axes.flat[max(0, count - across) : count]:
        panel.set_xlabel("layer")
        panel.tick_params(labelbottom=True)


def legend(figure: Figure) -> None:
    """One legend for all panels, above them."""
    handles = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=min(len(handles), 6), fontsize=8.5)


def stack_plot(name: str, title: str, stack: str, several_stacks: bool, caption: str, figure: Figure) -> Plot:
    """A plot whose name and title name its stack of layers, if there are several."""
    if not several_stacks:
        return Plot(name, title, caption, figure)
    suffix = re.sub(r"[^a-z0-9]+", "-", stack.lower()) or "other"
    return Plot(f"{name}-{suffix}", f"{title} · {stack or 'outside of layers'}", caption, figure)
