"""Pictures of the interference between task vectors, before and after purification."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator

from mergekit_pave.report.page.drawing import COLOURS, LINE, MUTED, STYLE, Plot, legend, panels_of, stack_plot
from mergekit_pave.report.page.heatmaps import write_values
from mergekit_pave.report.page.measure import Interference, Overlap, pair_mean
from mergekit_pave.report.places import place, short, short_models

_MEASURES = (("cosine", Interference.cosines), ("opposite signs", Interference.sign_conflicts))


def plot_overlaps(overlaps: Sequence[Overlap]) -> list[Plot]:
    """Cosine and sign conflict before and after, by layer and projection for each stack, and for each pair of models."""
    stacks: dict[str, list[Overlap]] = {}
    for overlap in overlaps:
        stacks.setdefault(place(overlap.output).stack, []).append(overlap)
    return [_overlaps_of_stack(stack, members, len(stacks) > 1) for stack, members in stacks.items()] + _pairs(overlaps)


def _overlaps_of_stack(stack: str, members: list[Overlap], several_stacks: bool) -> Plot:
    layers: dict[int, list[Overlap]] = {}
    projections: dict[str, list[Overlap]] = {}
    for overlap in members:
        where = place(overlap.output)
        layers.setdefault(where.layer, []).append(overlap)
        projections.setdefault(where.projection, []).append(overlap)
    labels, numbers, rows = list(short(projections).values()), sorted(layers), np.arange(len(projections))
    with matplotlib.rc_context(STYLE):
        figure, axes = panels_of(2, 2, 2.5)
        for (left, right), (label, measure) in zip(axes, _MEASURES):
            before, after = ([mean(layers[number], when, measure) for number in numbers] for when in ("before", "after"))
            left.plot(numbers, before, "o--", color=MUTED, markersize=3.5, label="as fine-tuned")
            left.plot(numbers, after, "o-", color=COLOURS[0], markersize=3.5, label="purified")
            left.set_ylabel(label)
            left.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            before, after = ([mean(group, when, measure) for group in projections.values()] for when in ("before", "after"))
            right.hlines(rows, before, after, color=LINE, linewidth=3)
            right.plot(before, rows, "o", color=MUTED, markersize=5)
            right.plot(after, rows, "o", color=COLOURS[0], markersize=5)
            right.set_yticks(rows, labels)
            right.invert_yaxis()
            right.set_xlabel(label)
        axes[1, 0].set_xlabel("layer")
        legend(figure)
    caption = (
        "Between the task vectors of every two models: their cosine, and the share of elements in which they have opposite signs "
        "(a half if they are unrelated). Mean over the pairs and over the weights of a layer (left) or a projection (right). "
        "With target weights, a cosine that rises means that the same part of the base was removed from several models."
    )
    return stack_plot("interference", "Interference of the task vectors", stack, several_stacks, caption, figure)


def mean(overlaps: Sequence[Overlap], when: str, measure: Callable[[Interference], np.ndarray]) -> float:
    """Mean over the pairs of models and over tensors, weighted by their sizes.

    Args:
        when: "before" or "after" purification.
    """
    members = [getattr(overlap, when) for overlap in overlaps]
    return float(np.average([pair_mean(measure(one)) for one in members], weights=[one.num_elements for one in members]))


def _pairs(overlaps: Sequence[Overlap]) -> list[Plot]:
    """Every two models, if there are three or more."""
    models = list(dict.fromkeys(model for overlap in overlaps for model in overlap.models))
    complete = [overlap for overlap in overlaps if overlap.models == models]
    if len(models) < 3 or not complete:
        return []
    names = list(short_models(models).values())
    panels = []
    for when, state in (("before", "as fine-tuned"), ("after", "purified")):
        total = functools.reduce(operator.add, (getattr(overlap, when) for overlap in complete))
        panels += [(f"{label}, {state}", measure(total)) for label, measure in _MEASURES]
    with matplotlib.rc_context(STYLE | {"axes.grid": False, "axes.spines.left": False, "axes.spines.bottom": False}):
        figure, axes = panels_of(4, 1, max(2.4, 0.8 + 0.16 * len(models)), sharey=True)
        for column in range(2):
            pair = panels[column::2]
            off = ~np.eye(len(models), dtype=bool)
            norm = Normalize(min(m[off].min() for _, m in pair), max(m[off].max() for _, m in pair))
            for panel, (title, matrix) in zip(axes[0, 2 * column :], pair):
                shown = np.where(off, matrix, np.nan)
                panel.imshow(shown, cmap="viridis", norm=norm)
                panel.set_title(title)
                panel.set_xticks(range(len(models)), names, rotation=90)
                panel.set_yticks(range(len(models)), names)
                panel.tick_params(length=0)
                if len(models) <= 8:
                    write_values(panel, shown, matplotlib.colormaps["viridis"], norm, lambda value: f"{value:.2f}")
    caption = "The same for every two models, over all weights together."
    return [Plot("pairs", "Interference, pair by pair", caption, figure)]
