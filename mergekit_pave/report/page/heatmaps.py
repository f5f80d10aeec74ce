"""Heat maps over layers and projections, with a panel for each model: every row of the report at a glance."""

from __future__ import annotations

from collections.abc import Callable

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from mergekit_pave.report.page.drawing import STYLE, WIDTH, Plot, panels_of, stack_plot
from mergekit_pave.report.places import Grid, short, short_models


def ranks(grid: Grid, several_stacks: bool = False) -> Plot:
    """Kept rank by layer, projection and model. The grid holds shares of the components."""
    lowest = min((np.nanmin(values) for values in grid.values.values() if not np.isnan(values).all()), default=1.0)
    figure = _heat_maps(
        grid,
        matplotlib.colormaps["viridis"],
        Normalize(min(lowest, 0.9999), 1),
        "share of rank kept",
        lambda share: f"{100 * share:.1f}",
        FuncFormatter(lambda share, _: f"{100 * share:.4g} %"),
    )
    caption = "Per cent of the components that each weight keeps. Yellow loses nothing; dark loses most."
    return stack_plot("kept-rank", "Kept rank", grid.stack, several_stacks, caption, figure)


def energies(grid: Grid, several_stacks: bool = False) -> Plot:
    """Share of activated energy dropped."""
    figure = _heat_maps(
        grid,
        matplotlib.colormaps["YlOrRd"],
        _log_norm(grid),
        "share of energy dropped",
        lambda share: f"{share:.0e}".replace("e-0", "e-"),
        FuncFormatter(lambda share, _: f"{share:.0e}"),
    )
    caption = (
        "Share of ‖W (C + λI)‖² in the dropped components: how much is lost of what a layer computes on the model's own data. "
        "Blank: nothing dropped."
    )
    return stack_plot("energy", "Energy dropped", grid.stack, several_stacks, caption, figure)


def removed(grid: Grid, several_stacks: bool = False) -> Plot:
    """Norm of the removed part over the norm of the change."""
    reach = max((abs(np.log10(v[v > 0])).max() for v in grid.values.values() if (v > 0).any()), default=1.0)
    reach = min(max(reach, 0.3), 2.0)
    figure = _heat_maps(
        grid,
        matplotlib.colormaps["RdBu"].reversed(),
        LogNorm(10**-reach, 10**reach),
        "removed part / change",
        lambda ratio: f"{ratio:.2g}",
        FuncFormatter(lambda ratio, _: f"{ratio:g} x"),
    )
    caption = (
        "‖W' - W‖ / ‖W - W_base‖. Above 1 (red) more is removed than fine-tuning had changed, so the removed part is mostly "
        "weight of the base model, and several models may remove the same part of it. Blank: nothing dropped."
    )
    return stack_plot("removed", "Removed part beside the change", grid.stack, several_stacks, caption, figure)


def _log_norm(grid: Grid) -> LogNorm:
    values = np.concatenate([v[v > 0] for v in grid.values.values()])
    if not len(values):
        return LogNorm(1e-9, 1)
    low, high = values.min(), values.max()
    return LogNorm(low, high if high > low else 10 * low)


def _heat_maps(
    grid: Grid, colormap: Colormap, norm: Normalize, label: str, format_value: Callable[[float], str], ticks: FuncFormatter
) -> Figure:
    """A panel for each model."""
    models, labels = short_models(grid.values), list(short(grid.projections).values())
    across = 1 if len(grid.layers) > 40 else min(len(models), 2 if len(grid.layers) > 12 else 3)
    down = -(-len(models) // across)
    with matplotlib.rc_context(STYLE | {"axes.grid": False, "axes.spines.left": False, "axes.spines.bottom": False}):
        figure, axes = panels_of(across, down, 0.75 + 0.23 * len(labels), sharey=True, sharex=True)
        cell = WIDTH / across / len(grid.layers)  # inches
        for panel, (model, values) in zip(axes.flat, grid.values.items()):
            shown = np.where(values > 0, values, np.nan)
            image = panel.imshow(shown, cmap=colormap, norm=norm, aspect="auto", interpolation="nearest")
            panel.set_title(models[model])
            panel.set_yticks(range(len(labels)), labels)
            panel.tick_params(length=0, left=False)
            step = max(1, round(0.3 / cell))
            panel.set_xticks(range(0, len(grid.layers), step), grid.layers[::step])
            if cell > 0.42:
                write_values(panel, shown, colormap, norm, format_value)
        for panel in axes.flat[len(models) :]:
            panel.axis("off")
        for panel in axes.flat[max(0, len(models) - across) : len(models)]:
            panel.set_xlabel("layer")
            panel.tick_params(labelbottom=True)
        bar = figure.colorbar(image, ax=axes[:2], format=ticks, label=label, aspect=15 * min(down, 2), pad=0.01, fraction=0.03)
        if isinstance(norm, LogNorm) and norm.vmax < 1000 * norm.vmin:
            bar.set_ticks(LogLocator(subs=(1, 2, 5)))
        bar.outline.set_visible(False)
        bar.minorticks_off()
    return figure


def write_values(
    panel: Axes, values: np.ndarray, colormap: Colormap, norm: Normalize, format_value: Callable[[float], str]
) -> None:
    """Write its value into each cell."""
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = colormap(norm(value))
            dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            panel.text(j, i, format_value(value), ha="center", va="center", fontsize=7, color="#ffffff" if dark else "#000000")
