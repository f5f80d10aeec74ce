"""The pictures of a purified merge, drawn with matplotlib, and how they are written.

A figure has light colours. As SVG, inside of a page, it takes on those of the page: each of `THEMED` becomes a CSS
variable, so that it is readable on a dark page, too.
"""

from __future__ import annotations

import functools
import io
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from mergekit_pave.page.measure import Interference, pair_mean
from mergekit_pave.page.measured import Inputs, Overlap, Spectrum
from mergekit_pave.page.places import Grid, place, short, short_models

INK, MUTED, LINE = "#1b1f24", "#69707a", "#dfe3e8"
THEMED = {INK: "currentColor", MUTED: "var(--muted)", LINE: "var(--line)"}
# Of middling lightness: told apart on white and on black.
COLOURS = ("#3b82f6", "#ea6a0c", "#0c9a6b", "#db2777", "#8b5cf6", "#a97f00", "#0891b2", "#8a6d5b")

_STYLE = {
    "font.family": "DejaVu Sans",
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
}
_WIDTH = 10.0  # inches


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
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": plot.name}):
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
    opening = f'<svg role="img" aria-label="{plot.title}" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" '
    return re.sub(r"<svg[^>]*>", f'{opening}xmlns:xlink="http://www.w3.org/1999/xlink">', drawn, count=1)


def png(plot: Plot) -> bytes:
    """The figure on white."""
    data = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        plot.figure.savefig(data, format="png", bbox_inches="tight", dpi=160, facecolor="white", metadata={"Software": None})
    return data.getvalue()


def colours(models: Sequence[str]) -> dict[str, Any]:
    """A colour for each model."""
    if len(models) <= len(COLOURS):
        return dict(zip(models, COLOURS))
    return dict(zip(models, matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, len(models)))))


def _figure(columns: int, rows: int, height: float, **more: Any) -> tuple[Figure, np.ndarray]:
    """A figure with panels, each `height` inches high."""
    figure = Figure(figsize=(_WIDTH, rows * height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **more)


def _legend(figure: Figure, axes: Axes, count: int, **more: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=min(count, 6), fontsize=8.5, **more)


def _title(stack: str, several: bool) -> str:
    return f" · {stack or 'outside of layers'}" if several else ""


def _file(name: str, stack: str, several: bool) -> str:
    return f"{name}-{re.sub(r'[^a-z0-9]+', '-', stack.lower()) or 'other'}" if several else name


# --- Heat maps of every row of the report ----------------------------------------------------------------------------


def ranks(grid: Grid, several: bool = False) -> Plot:
    """Kept rank by layer, projection and model; a grid of shares."""
    lowest = min((np.nanmin(values) for values in grid.values.values() if not np.isnan(values).all()), default=1.0)
    figure = _heat_maps(
        grid,
        matplotlib.colormaps["viridis"],
        Normalize(min(lowest, 0.9999), 1),
        "share of rank kept",
        lambda share: f"{100 * share:.1f}",
        FuncFormatter(lambda share, _: f"{100 * share:.4g} %"),
    )
    caption = "Per cent of the components that are kept of each weight. Yellow loses nothing; dark loses most."
    return Plot(_file("kept-rank", grid.stack, several), f"Kept rank{_title(grid.stack, several)}", caption, figure)


def energies(grid: Grid, several: bool = False) -> Plot:
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
        "Share of ‖W (C + λI)‖² in the dropped components: how much of what a layer computes on the model's own data goes. "
        "Blank: nothing dropped."
    )
    return Plot(_file("energy", grid.stack, several), f"Energy dropped{_title(grid.stack, several)}", caption, figure)


def removed(grid: Grid, several: bool = False) -> Plot:
    """Length of the removed part over that of the change."""
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
    title = f"Removed part beside the change{_title(grid.stack, several)}"
    return Plot(_file("removed", grid.stack, several), title, caption, figure)


def _log_norm(grid: Grid) -> LogNorm:
    values = np.concatenate([v[v > 0] for v in grid.values.values()])
    if not len(values):
        return LogNorm(1e-9, 1)
    low, high = values.min(), values.max()
    return LogNorm(low, high if high > low else 10 * low)


def _heat_maps(grid: Grid, colormap: Colormap, norm: Normalize, label: str, told, ticks: FuncFormatter) -> Figure:
    """A panel for each model."""
    models, labels = short_models(grid.values), list(short(grid.projections).values())
    across = 1 if len(grid.layers) > 40 else min(len(models), 2 if len(grid.layers) > 12 else 3)
    down = -(-len(models) // across)
    with matplotlib.rc_context(_STYLE | {"axes.grid": False, "axes.spines.left": False, "axes.spines.bottom": False}):
        figure, axes = _figure(across, down, 0.75 + 0.23 * len(labels), sharey=True, sharex=True)
        room = _WIDTH / across / len(grid.layers)  # inches a cell
        for panel, (model, values) in zip(axes.flat, grid.values.items()):
            shown = np.where(values > 0, values, np.nan)
            image = panel.imshow(shown, cmap=colormap, norm=norm, aspect="auto", interpolation="nearest")
            panel.set_title(models[model])
            panel.set_yticks(range(len(labels)), labels)
            panel.tick_params(length=0, left=False)
            step = max(1, round(0.3 / room))
            panel.set_xticks(range(0, len(grid.layers), step), grid.layers[::step])
            if room > 0.42:
                _write_into(panel, shown, colormap, norm, told)
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


def _write_into(panel: Axes, values: np.ndarray, colormap: Colormap, norm: Normalize, told) -> None:
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = colormap(norm(value))
            dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            panel.text(j, i, told(value), ha="center", va="center", fontsize=7, color="#ffffff" if dark else "#000000")


# --- Spectra ---------------------------------------------------------------------------------------------------------


def spectra(found: Iterable[Spectrum], kept: dict[tuple[str, str, int | None], int], models: Sequence[str]) -> list[Plot]:
    """A figure for each layer that was looked at.

    Args:
        kept: components kept by model, output and expert.
        models: all of them, for their colours.
    """
    layers: dict[tuple[str, int], dict[str, list[Spectrum]]] = {}
    for one in found:
        where = place(one.output)
        layers.setdefault((where.stack, where.layer), {}).setdefault(where.projection, []).append(one)
    several = len({stack for stack, _ in layers}) > 1
    return [_spectra_of_layer(stack, layer, panels, kept, models, several) for (stack, layer), panels in sorted(layers.items())]


def _spectra_of_layer(stack, layer, panels, kept, models, several) -> Plot:
    names, labels, palette = short_models(models), short(panels), colours(models)
    across = min(4, len(panels))
    down = -(-len(panels) // across)
    whole = True
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(across, down, 2.3, sharey=True)
        for panel, (projection, members) in zip(axes.flat, panels.items()):
            for one in members:
                values, colour = one.values[::-1], palette[one.model]
                whole = whole and len(values) == one.components
                dropped = one.components - kept[one.model, one.output, one.expert]
                numbers = np.arange(1, len(values) + 1)
                shown = np.unique(np.geomspace(1, len(values), 200).round().astype(int)) - 1
                panel.plot(numbers[shown], values[shown], color=colour, label=names[one.model])
                if dropped:
                    thick = {"color": colour, "linewidth": 4.5, "alpha": 0.45, "solid_capstyle": "butt"}
                    panel.plot(numbers[:dropped], values[:dropped], **thick)
                    panel.plot(dropped, values[dropped - 1], "|", color=colour, markersize=13, markeredgewidth=1.8)
            experts = ", ".join(str(expert) for expert in dict.fromkeys(one.expert for one in members) if expert is not None)
            panel.set_title(labels[projection] + (f" (expert {experts})" if experts else ""))
            panel.set_xscale("log")
            panel.set_yscale("log")
            panel.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
            panel.minorticks_off()
        for panel in axes.flat[len(panels) :]:
            panel.axis("off")
        for panel in axes[:, 0]:
            panel.set_ylabel("σ / largest σ")
        for panel in axes.flat[max(0, len(panels) - across) : len(panels)]:
            panel.set_xlabel("component, from the smallest")
        _legend(figure, axes.flat[0], len(models))
    where = f"layer {layer}" if stack else "outside of layers"
    where = f"{stack}, {where}" if several and stack else where
    caption = (
        "Singular values of W (C + λI), counted from the smallest. The thick part up to the mark is dropped; the cut of each "
        "model is where allocation over the models has put it."
    )
    if not whole:
        caption += " Only the cached tail is shown where the covariance is no longer in the cache."
    return Plot(_file(f"spectra-{layer}", stack, several), f"Spectra, {where}", caption, figure)


# --- Covariances -----------------------------------------------------------------------------------------------------


def covariances(found: Iterable[Inputs], models: Sequence[str]) -> list[Plot]:
    """Effective rank and condition by layer, a figure for each stack."""
    stacks: dict[str, dict[str, dict[str, list[tuple[int, Inputs]]]]] = {}
    for one in found:
        places = [place(output) for output in one.outputs]
        projections = ", ".join(dict.fromkeys(where.projection for where in places))
        by_model = stacks.setdefault(places[0].stack, {}).setdefault(projections, {})
        by_model.setdefault(one.model, []).append((places[0].layer, one))
    return [_covariances_of_stack(stack, kinds, models, len(stacks) > 1) for stack, kinds in stacks.items()]


def _covariances_of_stack(stack, kinds, models, several) -> Plot:
    names, palette = short_models(models), colours(models)
    labels = short({projection for kind in kinds for projection in kind.split(", ")})
    across = len(kinds)
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(across, 2, 2.2, sharex=True, sharey="row")
        for column, (kind, by_model) in enumerate(kinds.items()):
            for model, points in by_model.items():
                layers = [layer for layer, _ in points]
                line = {"color": palette[model], "label": names[model], "marker": "o", "markersize": 3}
                axes[0, column].plot(layers, [one.effective_rank for _, one in points], **line)
                axes[1, column].plot(layers, [one.condition for _, one in points], **line)
            width = next(iter(by_model.values()))[0][1].width
            shown = ", ".join(labels[projection] for projection in kind.split(", "))
            axes[0, column].set_title(f"input of {shown}\n{width} wide")
            axes[1, column].set_xlabel("layer")
            axes[1, column].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes[0, 0].set_ylabel("effective rank of C")
        axes[1, 0].set_ylabel("condition of C + λI")
        for row in axes:
            row[0].set_yscale("log")
            row[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            row[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            row[0].minorticks_off()
        _legend(figure, axes[0, 0], len(models))
    caption = (
        "Effective rank: (Σ λᵢ)² / Σ λᵢ² over the eigenvalues of C, the number of directions that the inputs fill evenly. "
        "Condition: the largest eigenvalue of C + λI over the smallest. Few directions and a large condition mean that what is "
        "dropped depends on the calibration samples; more samples make it steadier."
    )
    return Plot(_file("covariances", stack, several), f"Covariances of the inputs{_title(stack, several)}", caption, figure)


# --- Interference ----------------------------------------------------------------------------------------------------


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
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(2, 2, 2.5)
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
        _legend(figure, axes[0, 0], 2)
    caption = (
        "Between the task vectors of each two models: their cosine, and the share of elements in which they have opposite signs "
        "(a half where they are unrelated). Mean over the pairs and over the weights of a layer (left) or a projection (right). "
        "With target weights, a cosine that rises means that the models have the same part of the base removed."
    )
    title = f"Interference of the task vectors{_title(stack, several)}"
    return Plot(_file("interference", stack, several), title, caption, figure)


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
    with matplotlib.rc_context(_STYLE | {"axes.grid": False, "axes.spines.left": False, "axes.spines.bottom": False}):
        figure, axes = _figure(4, 1, max(2.4, 0.8 + 0.16 * len(models)), sharey=True)
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
                    _write_into(panel, shown, matplotlib.colormaps["viridis"], norm, lambda value: f"{value:.2f}")
    caption = "The same for each two models, over all weights together."
    return [Plot("pairs", "Interference, pair by pair", caption, figure)]
