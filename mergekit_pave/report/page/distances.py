"""How far the models that `merge_method: emr` restores are from the models themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from mergekit_pave.report.page.drawing import COLOURS, INK, MUTED, STYLE, WIDTH, Plot, shortened
from mergekit_pave.report.places import short_models

_BASE = 1.0  # the distance of the base model


def plot_distances(models: Mapping[str, Mapping[str, Any]]) -> Plot:
    """A bar for each model.

    Args:
        models: of the report. The distance of a model that equals the base model is None.
    """
    names = short_models(models)
    distances = [of_model["distance"] for of_model in models.values()]
    right = 1.12 * max([_BASE, *(distance for distance in distances if distance is not None)])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, min(1.1 + 0.27 * len(models), 100)), layout="constrained")
        panel = figure.subplots()
        panel.barh(range(len(distances)), [distance or 0.0 for distance in distances], height=0.62, color=COLOURS[0])
        for row, distance in enumerate(distances):
            text = "equals the base model" if distance is None else f"{distance:.3g}"
            panel.text((distance or 0.0) + 0.006 * right, row, text, va="center", color=INK)
        panel.axvline(_BASE, color=MUTED, linewidth=1.2)
        over = panel.get_xaxis_transform()
        panel.text(_BASE, 1.01, "base model", transform=over, ha="center", va="bottom", color=MUTED)
        panel.set_yticks(range(len(names)), [shortened(name) for name in names.values()])
        panel.set_ylim(len(names) - 0.5, -0.5)
        panel.set_xlim(0, right)
        panel.tick_params(axis="y", length=0)
        panel.grid(axis="y", visible=False)
        panel.set_xlabel("distance: 0 is the model itself, 1 is as far as the base model")
    caption = "The distance of each restored model from the model itself, in units of the base model's: the grey line."
    return Plot("restored", "Distance of each restored model", caption, figure)
