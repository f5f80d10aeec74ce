"""Pictures of how the task vectors interfere, before and after purification."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator

from mergekit_pave.report.page.drawing import COLOURS, LINE, MUTED, STYLE, Plot, file_of, legend, panels_of, title_of
from mergekit_pave.report.page.heatmaps import write_into
from mergekit_pave.report.page.measure import Interference, Overlap, pair_mean
from mergekit_pave.report.places import place, short, short_models

_KINDS = (("cosine", Interference.cosines), ("opposite signs", Interference.sign_conflicts))


def overlaps(found: Sequence[Overlap]) -> list[Plot]:
    """Cosine and sign conflict before and after, by layer and projection for each stack, and for each pair of models."""
    stacks: dict[str, list[Overlap]] = {}
    for one in found:
        stacks.setdefault(place(one.output).stack, []).append(one)
    return [_overlaps_of_stack(stack, members, len(stacks) > 1) for stack, members in stacks.items()] + _pairs(found)


def _overlaps_of_stack(stack: str, members: list[Overlap], several: bool) -> Plot:
    layers: dict[int, list[Overlap]] = {}
    projections: dict[str, list[Overlap]] = {}
    for one in members:
        where = place(one.output)
        layers.setdefault(where.layer, []).append(one)
        projections.setdefault(where.projection, []).append(one)
    labels, numbers, rows = list(short(projections).values()), sorted(layers), np.arange(len(projections))
    with matplotlib.rc_context(STYLE):
        figure, axes = panels_of(2, 2, 2.5)
        for (left, right), (label, kind) in zip(axes, _KINDS):
            was, now = ([mean(layers[number], when, kind) for number in numbers] for when in ("before", "after"))
            left.plot(numbers, was, "o--", color=MUTED, markersize=3.5, label="as fine-tuned")
            left.plot(numbers, now, "o-", color=COLOURS[0], markersize=3.5, label="purified")
            left.set_ylabel(label)
            left.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            was, now = ([mean(group, when, kind) for group in projections.values()] for when in ("before", "after"))
            right.hlines(rows, was, now, color=LINE, linewidth=3)
            right.plot(was, rows, "o", color=MUTED, markersize=5)
            right.plot(now, rows, "o", color=COLOURS[0], markersize=5)
            right.set_yticks(rows, labels)
            right.invert_yaxis()
            right.set_xlabel(label)
        axes[1, 0].set_xlabel("layer")
        legend(figure)
    caption = (
        "Between the task vectors of each two models: their cosine, and the share of elements in which they have opposite signs "
        "(a half where they are unrelated). Mean over the pairs and over the weights of a layer (left) or a projection (right). "
        "With target weights, a cosine that rises means that the models have the same part of the base removed."
    )
    title = f"Interference of the task vectors{title_of(stack, several)}"
    return Plot(file_of("interference", stack, several), title, caption, figure)


def mean(members: Sequence[Overlap], when: str, kind: Callable[[Interference], np.ndarray]) -> float:
    """Over the pairs of models and, by their sizes, over tensors."""
    measured = [getattr(one, when) for one in members]
    return float(np.average([pair_mean(kind(one)) for one in measured], weights=[one.size for one in measured]))


def _pairs(found: Sequence[Overlap]) -> list[Plot]:
    """Which two models: only of interest with three and more."""
    models = list(dict.fromkeys(model for one in found for model in one.models))
    complete = [one for one in found if one.models == models]
    if len(models) < 3 or not complete:
        return []
    names = list(short_models(models).values())
    panels = []
    for when, told in (("before", "as fine-tuned"), ("after", "purified")):
        total = functools.reduce(operator.add, (getattr(one, when) for one in complete))
        panels += [(f"{label}, {told}", kind(total)) for label, kind in _KINDS]
    with matplotlib.rc_context(STYLE | {"axes.grid": False, "axes.spines.left": False, "axes.spines.bottom": False}):
        figure, axes = panels_of(4, 1, max(2.4, 0.8 + 0.16 * len(models)), sharey=True)
        for kind in range(2):
            pair = panels[kind::2]
            off = ~np.eye(len(models), dtype=bool)
            norm = Normalize(min(m[off].min() for _, m in pair), max(m[off].max() for _, m in pair))
            for panel, (title, matrix) in zip(axes[0, 2 * kind :], pair):
                shown = np.where(off, matrix, np.nan)
                panel.imshow(shown, cmap="viridis", norm=norm)
                panel.set_title(title)
                panel.set_xticks(range(len(models)), names, rotation=90)
                panel.set_yticks(range(len(models)), names)
                panel.tick_params(length=0)
                if len(models) <= 8:
                    write_into(panel, shown, matplotlib.colormaps["viridis"], norm, lambda value: f"{value:.2f}")
    caption = "The same for each two models, over all weights together."
    return [Plot("pairs", "Interference, pair by pair", caption, figure)]
