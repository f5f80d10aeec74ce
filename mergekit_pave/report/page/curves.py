"""Curves of singular values with the cut, and of the covariances of the inputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import matplotlib
import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from mergekit_pave.report.page.drawing import STYLE, Plot, colours, legend, panels_of, stack_plot
from mergekit_pave.report.page.measure import Inputs, Spectrum
from mergekit_pave.report.places import place, short, short_models

Panels = dict[str, list[Spectrum]]  # by projection
InputPanels = dict[str, dict[str, list[tuple[int, Inputs]]]]  # by projections that share an input, by model: (layer, input)


def plot_spectra(spectra: Iterable[Spectrum], kept: dict[tuple[str, str, int | None], int], models: Sequence[str]) -> list[Plot]:
    """A figure for each layer that was measured.

    Args:
        kept: components kept by model, output and expert.
        models: all of them, for their colours.
    """
    layers: dict[tuple[str, int], Panels] = {}
    for spectrum in spectra:
        where = place(spectrum.output)
        layers.setdefault((where.stack, where.layer), {}).setdefault(where.projection, []).append(spectrum)
    several_stacks = len({stack for stack, _ in layers}) > 1
    return [
        _spectra_of_layer(stack, layer, panels, kept, models, several_stacks) for (stack, layer), panels in sorted(layers.items())
    ]


def _spectra_of_layer(
    stack: str,
    layer: int,
    panels: Panels,
    kept: dict[tuple[str, str, int | None], int],
    models: Sequence[str],
    several_stacks: bool,
) -> Plot:
    names, labels, palette = short_models(models), short(panels), colours(models)
    across = min(4, len(panels))
    down = -(-len(panels) // across)
    complete = True
    with matplotlib.rc_context(STYLE):
        figure, axes = panels_of(across, down, 2.3, sharey=True)
        for panel, (projection, members) in zip(axes.flat, panels.items()):
            for spectrum in members:
                values, colour = spectrum.values[::-1], palette[spectrum.model]
                complete = complete and len(values) == spectrum.components
                dropped = spectrum.components - kept[spectrum.model, spectrum.output, spectrum.expert]
                numbers = np.arange(1, len(values) + 1)
                shown = np.unique(np.geomspace(1, len(values), 200).round().astype(int)) - 1
                panel.plot(numbers[shown], values[shown], color=colour, label=names[spectrum.model])
                if dropped:
                    thick = {"color": colour, "linewidth": 4.5, "alpha": 0.45, "solid_capstyle": "butt"}
                    panel.plot(numbers[:dropped], values[:dropped], **thick)
                    panel.plot(dropped, values[dropped - 1], "|", color=colour, markersize=13, markeredgewidth=1.8)
            experts = ", ".join(
                str(expert) for expert in dict.fromkeys(spectrum.expert for spectrum in members) if expert is not None
            )
            panel.set_title(labels[projection] + (f" (expert {experts})" if experts else ""))
            panel.set_xscale("log")
            panel.set_yscale("log")
            panel.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
            panel.yaxis.set_major_formatter(
                FuncFormatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-").replace("e+00", ""))
            )
            panel.minorticks_off()
        for panel in axes.flat[len(panels) :]:
            panel.axis("off")
        for panel in axes[:, 0]:
            panel.set_ylabel("σ / largest σ")
        for panel in axes.flat[max(0, len(panels) - across) : len(panels)]:
            panel.set_xlabel("component, from the smallest")
        legend(figure)
    caption = (
        "Singular values of W (C + λI), counted from the smallest. The thick part up to the mark is dropped; allocation "
        "over the models decides where that is."
    )
    if not complete:
        caption += " Only the cached tail is shown if the covariance was not kept, or is no longer in the cache."
    title = f"Spectra, layer {layer}" if stack else "Spectra"
    return stack_plot(f"spectra-{layer}", title, stack, several_stacks, caption, figure)


def plot_covariances(inputs: Iterable[Inputs], models: Sequence[str]) -> list[Plot]:
    """Effective rank and condition by layer, a figure for each stack."""
    stacks: dict[str, InputPanels] = {}
    for layer_input in inputs:
        places = [place(output) for output in layer_input.outputs]
        projections = ", ".join(dict.fromkeys(where.projection for where in places))
        by_model = stacks.setdefault(places[0].stack, {}).setdefault(projections, {})
        by_model.setdefault(layer_input.model, []).append((places[0].layer, layer_input))
    return [_covariances_of_stack(stack, panels, models, len(stacks) > 1) for stack, panels in stacks.items()]


def _covariances_of_stack(stack: str, panels: InputPanels, models: Sequence[str], several_stacks: bool) -> Plot:
    names, palette = short_models(models), colours(models)
    labels = short({projection for projections in panels for projection in projections.split(", ")})
    across = len(panels)
    with matplotlib.rc_context(STYLE):
        figure, axes = panels_of(across, 2, 2.2, sharex=True, sharey="row")
        for column, (projections, by_model) in enumerate(panels.items()):
            for model, points in by_model.items():
                layers = [layer for layer, _ in points]
                line = {"color": palette[model], "label": names[model], "marker": "o", "markersize": 3}
                axes[0, column].plot(layers, [layer_input.effective_rank for _, layer_input in points], **line)
                axes[1, column].plot(layers, [layer_input.condition for _, layer_input in points], **line)
            width = next(iter(by_model.values()))[0][1].width
            title = ", ".join(labels[projection] for projection in projections.split(", "))
            axes[0, column].set_title(f"input of {title}\n{width} wide")
            axes[1, column].set_xlabel("layer")
            axes[1, column].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes[0, 0].set_ylabel("effective rank of C")
        axes[1, 0].set_ylabel("condition of C + λI")
        for row in axes:
            row[0].set_yscale("log")
            row[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            row[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            row[0].minorticks_off()
        legend(figure)
    caption = (
        "Effective rank: (Σ λᵢ)² / Σ λᵢ² over the eigenvalues of C, the number of directions that the inputs fill evenly. "
        "Condition: the largest eigenvalue of C + λI over the smallest. With few directions and a large condition, what is "
        "dropped depends on the calibration samples, and more samples make it steadier."
    )
    return stack_plot("covariances", "Covariances of the inputs", stack, several_stacks, caption, figure)
