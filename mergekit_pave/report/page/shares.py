"""Pictures of the share kept of each model: of one merge, and of every setting that was tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from mergekit_pave.report.page.drawing import COLOURS, INK, LINE, MUTED, STYLE, WIDTH, Plot, colours, shortened
from mergekit_pave.report.places import short_models
from mergekit_pave.report.scores import with_error

_LETTERS = 125  # that are as wide as a figure
_LEAST, _MOST = -1.0, 1.1  # no axis begins with a smaller share, or ends with a larger one
_OUTSIDE = " A point at the left edge: less than the axis shows."


def plot_score(score: Mapping[str, Any]) -> Plot:
    """The share kept of each model with its standard error, and the mean.

    Args:
        score: of a merge. A share is None where the base model gives what the expert gives.
    """
    models, names = score["models"], short_models(score["models"])
    values = np.array([[model["kept"], model["error"]] for model in models.values()], dtype=float)  # (models, 2)
    left, right = _limits(np.concatenate([values, [[0, 0], [1, 0]]]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, min(1.1 + 0.27 * len(models), 100)), layout="constrained")
        panel = figure.subplots()
        if score["mean"]:
            mean, error = score["mean"]["kept"], score["mean"]["error"] or 0
            panel.axvspan(*np.clip([mean - error, mean + error], left, right), color=LINE, linewidth=0)
            panel.axvline(mean, color=MUTED, linewidth=1.2)
            over = panel.get_xaxis_transform()
            text = f"mean {with_error(mean, None)}"
            panel.text(np.clip(mean, left, right), 1.01, text, transform=over, ha="center", va="bottom", color=MUTED)
        _points(panel, values, np.arange(len(models)), COLOURS[0], left, size=6)
        _finish(panel, [shortened(name) for name in names.values()], left, right)
    caption = "Each point is the share kept of one model with its standard error; the grey line is their mean, with its own."
    return Plot("share-kept", "Share kept of each model", caption + _outside(values, left), figure)


def plot_settings(labels: Sequence[str], scores: Sequence[Mapping[str, Any]], by: str) -> Plot:
    """The share kept by setting: a line for each model, and one for the mean, or the worst, with its standard error.

    Args:
        labels: of the settings, from the top. The first is the config as it is.
        scores: of the settings.
        by: what the settings are compared by, `mean` or `worst`.
    """
    models = list(scores[0]["models"])
    names, palette = short_models(models), colours(models)
    shares = np.array([[score["models"][model]["kept"] for model in models] for score in scores], dtype=float)
    summary = [score[by] or {"kept": None, "error": None} for score in scores]
    values = np.array([[of_score["kept"], of_score["error"]] for of_score in summary], dtype=float)  # (settings, 2)
    every = np.concatenate([values, np.stack([shares.ravel(), np.zeros(shares.size)], axis=1)])
    left, right = _limits(every)
    columns = min(len(models) + 1, 6, _LETTERS // (max(len(shortened(name)) for name in names.values()) + 6))
    height = 1.0 + 0.3 * len(scores) + 0.2 * -(-(len(models) + 1) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, min(height, 100)), layout="constrained")
        panel = figure.subplots()
        rows = np.arange(len(scores))
        lines = np.insert(rows.astype(float), 1, np.nan)  # none goes from the first to the others, which are sorted
        panel.axhline(0.5, color=LINE, linewidth=0.8)
        for model, of_model in zip(models, shares.T):
            line = {"color": palette[model], "label": shortened(names[model]), "marker": "o", "markersize": 3.5, "linewidth": 1.1}
            panel.plot(np.insert(np.maximum(of_model, left), 1, np.nan), lines, **line)
        thick = np.insert(np.maximum(values[:, 0], left), 1, np.nan)
        panel.plot(thick, lines, color=INK, linewidth=2.4, label=by, zorder=3)
        _points(panel, values, rows, INK, left, size=4)
        _finish(panel, [shortened(label) for label in labels], left, right)
        handles, texts = panel.get_legend_handles_labels()
        figure.legend(
            [handles[-1], *handles[:-1]], [texts[-1], *texts[:-1]], loc="outside upper left", ncols=columns, fontsize=8.5
        )
    caption = f"A line a model; the thick one is the {by} of the models, with its standard error."
    return Plot("share-kept", "Share kept by setting", caption + _outside(every, left), figure)


def _points(panel: Axes, values: np.ndarray, rows: np.ndarray, colour: str, left: float, size: float) -> None:
    """Points with error bars; a triangle at the edge for those that lie left of it."""
    shares, errors = values.T
    errors = np.minimum(np.nan_to_num(errors), _MOST - _LEAST)
    inside = shares >= left
    bars = {"xerr": errors[inside], "fmt": "o", "markersize": size, "elinewidth": 1.6, "capsize": 2.5}
    panel.errorbar(shares[inside], rows[inside], color=colour, zorder=4, **bars)
    outside = shares < left
    if outside.any():
        panel.plot(np.full(outside.sum(), left), rows[outside], "<", color=colour, markersize=size, clip_on=False, zorder=4)


def _finish(panel: Axes, labels: list[str], left: float, right: float) -> None:
    panel.set_yticks(range(len(labels)), labels)
    panel.set_ylim(len(labels) - 0.5, -0.5)
    panel.set_xlim(left, right)
    panel.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    panel.tick_params(axis="y", length=0)
    panel.grid(axis="y", visible=False)
    panel.set_xlabel("share kept: 0 % is the base model, 100 % the model")


def _limits(values: np.ndarray) -> tuple[float, float]:
    """The ends of the axis. All shares and errors are between them, but a few that are far below the others are not."""
    shares, errors = values[:, 0], np.nan_to_num(values[:, 1])
    known = np.isfinite(shares)
    if not known.any():
        return 0.0, 1.0
    left, right = (shares - errors)[known].min(), min((shares + errors)[known].max(), _MOST)
    low = np.quantile(shares[known], 0.1)
    left = max(left, low - 1.5 * (right - low), _LEAST)
    margin = 0.03 * max(right - left, 0.05)
    return left - margin, right + margin


def _outside(values: np.ndarray, left: float) -> str:
    return _OUTSIDE if (values[:, 0] < left).any() else ""
