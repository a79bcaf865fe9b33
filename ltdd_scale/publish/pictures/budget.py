"""What a set reaches: at each kind of labels, by bytes of labels, and with two stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ltdd_scale.publish.pictures.canvas import (
    GRID,
    INK,
    MARKERS,
    MUTED,
    SERIES,
    drawn,
    legend_above,
    one,
    plain_ticks,
)

Point = tuple[float, float | None]  # the mean over seeds, and its spread where there are several
LINES = ((0, (6, 3)), (0, (1, 2)), (0, (4, 2, 1, 2)))


@drawn
def message(
    kinds: Sequence[str],
    series: Mapping[str, Sequence[Point | None]],
    lines: Mapping[str, Point],
    number: str,
) -> Figure:
    """Each series over kinds of labels, per cent, the first with its values; whole networks as
    lines. `number` is what the vertical axis shows. None where a set has no such labels."""
    figure, axes = one(5.6, 3.7)
    places = np.arange(len(kinds), dtype=float)
    _lines(axes, lines)
    offsets = (np.arange(len(series)) - (len(series) - 1) / 2) * 0.16
    for k, (name, points) in enumerate(series.items()):
        there = [i for i, p in enumerate(points) if p is not None]
        _points(axes, places[there] + offsets[k], [points[i] for i in there], k, name)
        for i in there if not k else ():
            mean, _ = points[i] or (0.0, None)
            axes.annotate(
                f"{mean:.1f}",
                (places[i] + offsets[k], mean),
                (-6, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=8.5,
                color=SERIES[0],
            )
    plain_ticks(axes.xaxis, places.tolist(), kinds)
    axes.set_xlim(-0.7, len(kinds) - 0.4)
    axes.set_xlabel("labels of the images")
    _percent(axes, number)
    legend_above(figure, axes, 2)
    return figure


@drawn
def label_bytes(
    series: Mapping[str, Sequence[tuple[str, int | None, Point]]],
    lines: Mapping[str, Point],
    number: str,
) -> Figure:
    """Accuracy over bytes of labels, on a logarithmic axis: (kind, bytes, accuracy) of each set.

    No bytes at all stand at the left. None, where the labels need the teacher itself, stands at
    the right."""
    figure, axes = one(5.6, 3.7)
    known = [b for points in series.values() for _, b, _ in points if b]
    low = 10 ** np.floor(np.log10(min(known, default=1e3)))
    high = 10 ** np.ceil(np.log10(max(known, default=1e4) * 1.01))
    zero, teacher = low / 10, high * 10
    every = [b for points in series.values() for _, b, _ in points]
    axes.set_xscale("log")
    _lines(axes, lines)
    named: dict[float, list[str]] = {}  # place → kinds
    for k, (name, points) in enumerate(series.items()):
        xs = [teacher if b is None else (b or zero) for _, b, _ in points]
        shift = 1.06 ** (k - (len(series) - 1) / 2)  # error bars side by side
        _points(axes, np.asarray(xs) * shift, [p for _, _, p in points], k, name)
        for (kind, _, _), x in zip(points, xs, strict=True):
            if kind not in named.setdefault(x, []):
                named[x].append(kind)
    for x, kinds in named.items():
        axes.text(
            x,
            0.02,
            "\n".join(kinds),
            transform=axes.get_xaxis_transform(),
            ha="center",
            fontsize=8,
            color=MUTED,
        )
    inner = [10.0**e for e in range(round(np.log10(low)), round(np.log10(high)) + 1)]
    ticks = [zero] * (0 in every) + inner * bool(known) + [teacher] * (None in every)
    names = ["none"] * (0 in every) + [size(v) for v in inner] * bool(known)
    plain_ticks(axes.xaxis, ticks, names + ["teacher\nneeded"] * (None in every))
    axes.set_xlim(ticks[0] / 2.5, ticks[-1] * 2.5)
    axes.set_xlabel("bytes of labels")
    _percent(axes, number)
    low, top = axes.get_ylim()
    axes.set_ylim(low - 0.12 * (top - low), top)  # room for the kinds' names
    legend_above(figure, axes, 2)
    return figure


@drawn
def pairs_of_stages(
    firsts: Sequence[str], seconds: Sequence[str], values: np.ndarray, number: str
) -> Figure:
    """A number of each pair of stages, float [firsts, seconds], NaN where a pair was not made."""
    width, height = 3.6 + 0.95 * len(seconds), 1.5 + 0.42 * len(firsts)
    figure, axes = one(min(width, 9.0), height)
    image = axes.imshow(values, cmap="viridis", aspect="auto", interpolation="none")
    low, high = np.nanmin(values), np.nanmax(values)
    for i, j in np.ndindex(values.shape):
        if np.isfinite(values[i, j]):
            dark = (values[i, j] - low) / max(high - low, 1e-9) < 0.6
            axes.text(
                j,
                i,
                f"{values[i, j]:.1f}",
                ha="center",
                va="center",
                color="white" if dark else "black",
            )
    axes.set_xticks(range(len(seconds)), [wrapped(s) for s in seconds], rotation=25, ha="right")
    axes.set_yticks(range(len(firsts)), list(firsts))
    axes.set_xlabel("second stage: the class in the group")
    axes.set_ylabel("first stage: the group")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label=f"{number}, %").outline.set_visible(False)
    return figure


def wrapped(text: str, width: int = 18) -> str:
    """`text` in lines of about so many letters."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return "\n".join(lines)


def size(count: float) -> str:
    """Bytes as people read them, in decimal units."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"


def _points(axes: Axes, xs, points: Sequence[Point | None], k: int, name: str) -> None:
    there = [p for p in points if p is not None]
    axes.errorbar(
        xs,
        [mean for mean, _ in there],
        yerr=[spread or 0.0 for _, spread in there],
        fmt=MARKERS[k % len(MARKERS)],
        markersize=6,
        capsize=3,
        elinewidth=1.2,
        color=SERIES[k % len(SERIES)],
        label=name,
    )


def _lines(axes: Axes, lines: Mapping[str, Point]) -> None:
    for k, (name, (mean, spread)) in enumerate(lines.items()):
        if spread:
            axes.axhspan(mean - spread, mean + spread, color=GRID, alpha=0.5, linewidth=0)
        label = f"{name}: {mean:.1f}"
        axes.axhline(mean, color=INK, linestyle=LINES[k % len(LINES)], linewidth=1.3, label=label)


def _percent(axes: Axes, number: str) -> None:
    axes.set_ylabel(f"{number}, %")
    axes.grid(axis="y")
    axes.margins(y=0.12)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -2), min(high, 102))
