"""The heat map of kept ranks in a model card, drawn by Pillow alone: to import matplotlib takes longer than a small merge.

It looks as `heatmaps.ranks` does, and has matplotlib's font, whose files can be found without an import.
"""

from __future__ import annotations

import importlib.util
import io
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mergekit_pave.report.places import Grid, short, short_models

INK, MUTED = "#1b1f24", "#69707a"
_WIDTH, _LEAST = 1600, 200  # pixels: of the picture, and the least height that has room for the colour bar's title
_ROW, _GAP, _LINE = 37, 16, 30  # the height of a projection, what is between panels, the height of a line of text
_BAR, _TICK = 18, 8  # the width of the colour bar, the length of its ticks
_LEGIBLE = 67  # a cell as wide as that has its value in it
_FONT = "mpl-data/fonts/ttf/DejaVuSans.ttf"
_LAST_LETTER = 0x52F  # the font has Latin, Greek and Cyrillic ones
# matplotlib's viridis at 17 places.
_VIRIDIS = np.array(
    [
        *((68, 1, 84), (72, 24, 106), (71, 45, 123), (66, 64, 134), (59, 82, 139), (51, 99, 141), (44, 114, 142)),
        *((38, 130, 142), (33, 145, 140), (31, 160, 136), (40, 174, 128), (63, 188, 115), (94, 201, 98), (132, 212, 75)),
        *((173, 220, 48), (216, 226, 25), (253, 231, 37)),
    ]
)


def ranks(grid: Grid) -> bytes | None:
    """A PNG, or None where there is no font, or where a name has letters that it lacks.

    Args:
        grid: shares of the components that are kept.
    """
    models, labels = short_models(grid.values), list(short(grid.projections).values())
    file = Path(importlib.util.find_spec("matplotlib").submodule_search_locations[0], _FONT)
    if not file.is_file() or any(ord(letter) > _LAST_LETTER for text in (*models.values(), *labels) for letter in text):
        return None
    font, small = (ImageFont.truetype(str(file), size) for size in (19, 15))
    lowest = min((np.nanmin(values) for values in grid.values.values() if not np.isnan(values).all()), default=1.0)
    low, columns, rows = min(float(lowest), 0.9999), len(grid.layers), len(labels)
    across = 1 if columns > 40 else min(len(models), 2 if columns > 12 else 3)
    down = -(-len(models) // across)
    ticks = _ticks(low)
    left = _GAP + math.ceil(max(map(font.getlength, labels))) + 8
    right = _WIDTH - _BAR - _TICK - math.ceil(max(map(font.getlength, ticks.values()))) - _LINE - _GAP
    width, height = (right - left - _GAP * across) / across, rows * _ROW
    picture = Image.new("RGB", (_WIDTH, max(_LEAST, down * (_LINE + height + _GAP) + 2 * _LINE)), "white")
    draw = ImageDraw.Draw(picture)
    step = max(1, round(48 * columns / width))
    for number, (model, values) in enumerate(grid.values.items()):
        x, y = left + number % across * (width + _GAP), number // across * (_LINE + height + _GAP) + _LINE
        edges = [round(x + width * i / columns) for i in range(columns + 1)]
        draw.text((x, y - 6), models[model], INK, font, anchor="ls")
        for i, j in zip(*np.nonzero(values > 0)):
            colour, top = _colour(values[i, j], low), y + i * _ROW
            draw.rectangle((edges[j], top, edges[j + 1] - 1, top + _ROW - 1), colour)
            if width / columns > _LEGIBLE:
                middle = ((edges[j] + edges[j + 1]) / 2, top + _ROW / 2)
                ink = "white" if np.dot(colour, (0.3, 0.59, 0.11)) < 127 else "black"
                draw.text(middle, f"{100 * values[i, j]:.1f}", ink, small, anchor="mm")
        for i, label in enumerate(labels) if number % across == 0 else ():
            draw.text((left - 8, y + (i + 0.5) * _ROW), label, INK, font, anchor="rm")
        if number + across >= len(models):
            for j in range(0, columns, step):
                draw.text(((edges[j] + edges[j + 1]) / 2, y + height + 8), str(grid.layers[j]), INK, font, anchor="mt")
            draw.text((x + width / 2, y + height + 8 + _LINE), "layer", INK, font, anchor="mt")
    _draw_bar(picture, right, height + (down > 1) * (_LINE + _GAP + height), low, ticks, font)
    data = io.BytesIO()
    picture.save(data, "png")
    return data.getvalue()


def _draw_bar(
    picture: Image.Image, x: int, height: int, low: float, ticks: dict[float, str], font: ImageFont.FreeTypeFont
) -> None:
    draw = ImageDraw.Draw(picture)
    for i in range(height):
        draw.line((x, _LINE + i, x + _BAR, _LINE + i), _colour(1 - (1 - low) * i / (height - 1), low))
    for share, label in ticks.items():
        y = _LINE + (height - 1) * (1 - share) / (1 - low)
        draw.line((x + _BAR, y, x + _BAR + _TICK, y), MUTED)
        draw.text((x + _BAR + _TICK + 4, y), label, INK, font, anchor="lm")
    title = "share of rank kept"
    turned = Image.new("RGB", (math.ceil(font.getlength(title)), _LINE), "white")
    ImageDraw.Draw(turned).text((0, _LINE / 2), title, INK, font, anchor="lm")
    turned = turned.rotate(90, expand=True)
    picture.paste(turned, (_WIDTH - _LINE, max(0, _LINE + (height - turned.height) // 2)))


def _colour(share: float, low: float) -> tuple[int, ...]:
    place = (share - low) / (1 - low) * (len(_VIRIDIS) - 1)
    return tuple(round(np.interp(place, range(len(_VIRIDIS)), of_channel)) for of_channel in _VIRIDIS.T)


def _ticks(low: float) -> dict[float, str]:
    """A handful of round shares, with their labels."""
    rough = (1 - low) / 6
    power = 10 ** math.floor(math.log10(rough))
    step = next(step for factor in (1, 2, 2.5, 5, 10) if (step := factor * power) >= rough * (1 - 1e-9))
    shares = [1 - i * step for i in range(7) if 1 - i * step >= low]
    return {share: f"{100 * share:.4g} %" for share in shares}
