"""What the closed form of `regmean` did: how far the merge goes each model's way, and how many weights it decided."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from mergekit_pave.report.closed_form import CLOSED_FORM
from mergekit_pave.report.page.drawing import (
    COLOURS,
    INK,
    MUTED,
    STYLE,
    WIDTH,
    Plot,
    colours,
    label_layers,
    legend,
    panels_of,
    stack_plot,
)
from mergekit_pave.report.places import place, short, short_models

# By stack, projection and model: the alignments of each layer; of experts there are several.
_Panels = dict[str, dict[str, dict[int, list[float]]]]


def plot_alignments(rows: list[dict[str, Any]]) -> list[Plot]:
    """Alignment with each model by layer, a panel for each projection and a figure for each stack.

    Args:
        rows: of the report. None is drawn for those of which it is not known.
    """
    stacks: dict[str, _Panels] = defaultdict(lambda: defaultdict(lambda: defaultdict(lambda: defaultdict(list))))
    for row in rows:
        where = place(row["tensor"])
        for model, alignment in row.get("alignment", {}).items():
            if alignment is not None:
                stacks[where.stack][where.projection][model][where.layer].append(alignment)
    models = list(dict.fromkeys(model for row in rows for model in row.get("alignment", {})))
    return [_of_stack(stack, panels, models, len(stacks) > 1) for stack, panels in stacks.items()]


def _of_stack(stack: str, panels: _Panels, models: list[str], several_stacks: bool) -> Plot:
    labels, across = short(panels), min(4, len(panels))
    names, palette = short_models(models), colours(models)
    with matplotlib.rc_context(STYLE):
        figure, axes = panels_of(across, -(-len(panels) // across), 1.9, sharey=True, sharex=True)
        lowest = 0.0
        for panel, (projection, by_model) in zip(axes.flat, panels.items()):
            for model, by_layer in by_model.items():
                layers = sorted(by_layer)
                means = [float(np.mean(by_layer[layer])) for layer in layers]
                lowest = min(lowest, *means)
                panel.plot(layers, means, color=palette[model], label=names[model], marker="o", markersize=3)
            panel.set_title(labels[projection])
        axes[0, 0].set_ylim(lowest - 0.02 * (lowest < 0), 1.02)
        label_layers(axes, len(panels), "cosine")
        legend(figure)
    caption = (
        "The cosine between the change of the merge, W - W_base, and that of each model, Wᵢ - W_base: 1 where the merge goes "
        "that model's way, 0 where it goes at a right angle to it. Of n models that have nothing in common, each can have 1 / √n."
    )
    return stack_plot("alignment", "Alignment with each model", stack, several_stacks, caption, figure)


def plot_weights(counts: Mapping[str, int]) -> Plot:
    """The shares of the merged model's weights, by the way in which they were merged.

    Args:
        counts: of weights, by way.
    """
    ways = sorted(counts, key=lambda way: (way != CLOSED_FORM, -counts[way]))
    shares = np.array([counts[way] for way in ways]) / sum(counts.values())
    others = iter((*COLOURS[1:], MUTED))
    with matplotlib.rc_context(STYLE | {"axes.grid": False, "axes.spines.left": False, "axes.spines.bottom": False}):
        figure = Figure(figsize=(WIDTH, 0.95), layout="constrained")
        panel, left = figure.subplots(), 0.0
        for way, share in zip(ways, shares):
            colour = COLOURS[0] if way == CLOSED_FORM else next(others, MUTED)
            label = f"{way} ({_percent(share)})"
            panel.barh([0], [share], left=left, color=colour, label=label, height=0.7, edgecolor="none")
            left += share
        panel.set_xlim(0, 1)
        panel.set_yticks([])
        panel.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
        panel.tick_params(length=0, colors=INK)
        legend(figure)
    caption = "The weights of the merged model, by the way in which they were merged."
    return Plot("ways", "Share of the closed form", caption, figure)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else f"{100 * share:.1g} %"
