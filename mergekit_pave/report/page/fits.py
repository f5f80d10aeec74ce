"""Curves of how well refined layers fit, before and after."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np

from mergekit_pave.report.page.drawing import COLOURS, MUTED, STYLE, Plot, label_layers, legend, panels_of, stack_plot
from mergekit_pave.report.places import Place, place, short


def plot_errors(rows: list[dict[str, Any]]) -> list[Plot]:
    """Relative errors by layer, a panel for each projection and a figure for each stack.

    Args:
        rows: of the report. An error is None where the models' outputs are zero.
    """
    stacks: dict[str, dict[str, list[tuple[Place, dict[str, Any]]]]] = {}
    for row in rows:
        where = place(row["tensor"])
        stacks.setdefault(where.stack, {}).setdefault(where.projection, []).append((where, row))
    return [_errors_of_stack(stack, panels, len(stacks) > 1) for stack, panels in stacks.items()]


def _errors_of_stack(stack: str, panels: dict[str, list[tuple[Place, dict[str, Any]]]], several_stacks: bool) -> Plot:
    labels, across = short(panels), min(4, len(panels))
    lines = {"error_before": ("before", MUTED, "--"), "error_after": ("after", COLOURS[0], "-")}
    with matplotlib.rc_context(STYLE):
        figure, axes = panels_of(across, -(-len(panels) // across), 1.9, sharey=True, sharex=True)
        for panel, (projection, members) in zip(axes.flat, panels.items()):
            members = sorted(members, key=lambda member: member[0].layer)
            layers = [where.layer for where, _ in members]
            for key, (label, colour, style) in lines.items():
                errors = np.array([row[key] for _, row in members], dtype=float)
                panel.plot(layers, errors, style, color=colour, label=label, marker="o", markersize=3)
            panel.set_title(labels[projection])
        axes[0, 0].set_ylim(bottom=0)  # of all panels, once all of them have their curves
        label_layers(axes, len(panels), "relative error")
        legend(figure)
    caption = (
        "‖W X - Wᵢ Xᵢ‖ / ‖Wᵢ Xᵢ‖ of each layer, over all models: how far its outputs are from those of model i, on samples of "
        "model i. Before (dashed): with the weight that the merge gave, when all layers before it had been refined."
    )
    return stack_plot("errors", "Relative error of refined layers", stack, several_stacks, caption, figure)
