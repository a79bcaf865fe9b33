"""Features of images as points in the plane, and curves of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ltdd_scale.publish.pictures.canvas import (
    INK,
    MARKERS,
    MUTED,
    SERIES,
    drawn,
    plain_ticks,
    sheet,
)

# Points float [n, 2], their classes int [n], centres of classes float [C, 2].
Cloud = tuple[np.ndarray, np.ndarray, np.ndarray]
NAMED = 12  # so many classes have a colour that is told apart, and their names at the centres
# Dots are pixels, whose colour no page can change: these have a contrast of 3 on white and on a
# dark page.
CLASSES = (
    *("#1a80c4", "#d05f1a", "#12875f", "#b65a9e", "#8f7412", "#6078ee"),
    *("#cf4658", "#6d8090", "#6e8b0a", "#a06a3c", "#1c8c9c", "#9a62d8"),
)
PANELS = 3  # side by side


@drawn
def embeddings(panels: Mapping[str, Cloud], classes: Sequence[str]) -> Figure:
    """t-SNE, a panel for each network: points are dots, centres of classes triangles. The centre
    of a class without points is NaN."""
    columns = min(len(panels), PANELS)
    rows = -(-len(panels) // columns)
    figure = sheet(3.6 * columns, 3.8 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    colours = class_colours(len(classes))
    dot = 5.0 if sum(len(p[0]) for p in panels.values()) < 6000 else 2.0
    for axes, (title, (xy, labels, centres)) in zip(grid, panels.items(), strict=False):
        axes.scatter(
            xy[:, 0], xy[:, 1], s=dot, c=colours[labels], linewidth=0, alpha=0.7, rasterized=True
        )
        there = np.isfinite(centres).all(1)
        axes.scatter(
            centres[there, 0],
            centres[there, 1],
            s=70 if len(classes) <= NAMED else 18,
            c=colours[: len(centres)][there],
            marker="^",
            edgecolor=INK,
            linewidth=1.0 if len(classes) <= NAMED else 0.5,
            rasterized=len(classes) > 200,
        )
        if len(classes) <= NAMED:
            for c in np.flatnonzero(there):
                axes.annotate(
                    classes[c][:14],
                    (float(centres[c, 0]), float(centres[c, 1])),
                    (0, 7),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                    color=INK,
                )
        axes.set_title(title)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(True)
        axes.margins(0.06)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    return figure


def class_colours(num_classes: int) -> np.ndarray:
    """A colour for each class, float [C, 4], none so light or dark that a page would swallow it.

    Up to twelve are told apart; more shade from purple to orange in label order."""
    if num_classes <= NAMED:
        return np.asarray([matplotlib.colors.to_rgba(c) for c in CLASSES[:num_classes]])
    return matplotlib.colormaps["plasma"](np.linspace(0.2, 0.8, num_classes))


@dataclass
class Curve:
    """Points (x, per cent, spread or None) of one method. `whole`: networks on the whole set."""

    name: str
    points: list[tuple[float, float, float | None]]
    kind: str = "distilled"  # or "random", "plain"
    family: int = 0  # curves of one family share a colour


@dataclass
class Panel:
    """`published`: whose → points (x, per cent)."""

    title: str
    curves: list[Curve] = field(default_factory=list)
    published: dict[str, list[tuple[float, float]]] = field(default_factory=dict)


STYLES = {"distilled": "-", "random": (0, (5, 2)), "plain": (0, (1, 1.5))}


@drawn
def sweep_curves(panels: Sequence[Panel], axis: str, number: str) -> Figure:
    """Accuracy over `axis` (IPC, imbalance factor), on a logarithmic scale; panels share the
    vertical axis. Published numbers are hollow markers, joined to nothing."""
    columns = min(len(panels), PANELS)
    rows = -(-len(panels) // columns)
    figure = sheet(max(3.3 * columns, 5.6), 3.0 * rows + 0.9)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    whose = list(dict.fromkeys(name for panel in panels for name in panel.published))
    for axes, panel in zip(grid, panels, strict=False):
        axes.set_xscale("log")
        xs: set[float] = set()
        for curve in panel.curves:
            points = sorted(curve.points)
            xs |= {p[0] for p in points}
            colour = INK if curve.kind == "plain" else SERIES[curve.family % len(SERIES)]
            axes.errorbar(
                [p[0] for p in points],
                [p[1] for p in points],
                yerr=[p[2] or 0.0 for p in points],
                marker=MARKERS[curve.family % len(MARKERS)] if curve.kind == "distilled" else ".",
                linestyle=STYLES[curve.kind],
                color=colour,
                capsize=2,
                markersize=5,
                label=curve.name,
            )
        for name, found in panel.published.items():
            xs |= {x for x, _ in found}
            k = whose.index(name)
            axes.plot(
                [x for x, _ in found],
                [y for _, y in found],
                linestyle="none",
                marker=MARKERS[(k + 2) % len(MARKERS)],
                markerfacecolor="none",
                color=MUTED if k >= len(SERIES) else SERIES[-1 - k % len(SERIES)],
                markersize=7,
                label=f"{name}, published",
            )
        if xs:
            plain_ticks(axes.xaxis, sorted(xs))
            axes.set_xlim(min(xs) / 1.25, max(xs) * 1.25)
        axes.set_title(panel.title)
        axes.set_xlabel(axis)
        axes.grid(axis="y")
    for first in grid[::columns]:
        first.set_ylabel(f"{number}, %")
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    handles: dict[str, Any] = {}
    for axes in grid[: len(panels)]:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(list(handles.values()), list(handles), loc="outside upper left", ncols=columns)
    return figure
