"""What the work was like: losses over epochs, and when each stage ran on what."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ltdd_scale.publish.pictures.canvas import (
    GRID,
    INK,
    MUTED,
    PAPER,
    SERIES,
    drawn,
    legend_above,
    one,
    sheet,
)
from ltdd_scale.runtime.progress import duration

STYLES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))
SHOWN = 200  # points of a curve


@drawn
def losses(panels: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Losses over epochs, a panel each: curve → values. The vertical axis goes from the least to
    the 99th percentile of all, so that one spike does not flatten the rest; a loss that is not
    finite leaves a gap."""
    figure = sheet(4.4 * len(panels), 3.6)
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, series) in zip(grid, panels.items(), strict=True):
        everything = np.concatenate([np.asarray(v, float) for v in series.values()])
        finite = everything[np.isfinite(everything)]
        finite = finite if len(finite) else np.zeros(1)
        low, high = float(finite.min()), float(np.percentile(finite, 99))
        high = high if high > low else low + 1
        for k, (name, values) in enumerate(series.items()):
            at = np.unique(np.linspace(0, len(values) - 1, min(len(values), SHOWN)).astype(int))
            axes.plot(
                at + 1,
                np.asarray(values, float)[at],
                color=SERIES[k % len(SERIES)],
                linestyle=STYLES[k % len(STYLES)],
                label=f"{name} ({len(values):,} epochs)",
            )
        axes.set_ylim(low - 0.03 * (high - low), high + 0.03 * (high - low))
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y")
        axes.legend(loc="upper right", fontsize=8)
    grid[0].set_ylabel("loss")
    return figure


@dataclass(frozen=True)
class Bar:
    """One stage at work: from `begin` to `end` in seconds of one clock, on so many ranks."""

    name: str
    part: str  # the kind of stage: its colour
    begin: float
    end: float
    ranks: int = 1


@drawn
def timeline(bars: Sequence[Bar]) -> Figure:
    """When each stage ran. A row is a rank at work; a stage of several ranks fills as many rows.
    Times in which nothing ran are cut out, and written where they were."""
    at, idle = squeeze(bars)
    lanes = place(bars)
    height = max(low + bar.ranks for bar, low in zip(bars, lanes, strict=True))
    figure, axes = one(9.4, min(1.3 + 0.34 * height, 8.0))
    whole = max(at(bar.end) for bar in bars) or 1.0
    seen: set[str] = set()
    parts = list(dict.fromkeys(bar.part for bar in bars))
    for bar, low in zip(bars, lanes, strict=True):
        left, right = at(bar.begin), at(bar.end)
        axes.barh(
            low + bar.ranks / 2,
            max(right - left, whole / 800),
            left=left,
            height=bar.ranks - 0.14,
            color=SERIES[parts.index(bar.part) % len(SERIES)],
            label=None if bar.part in seen else bar.part,
        )
        seen.add(bar.part)
        if (right - left) > 0.011 * whole * len(bar.name):
            axes.text(
                (left + right) / 2,
                low + bar.ranks / 2,
                bar.name,
                ha="center",
                va="center",
                fontsize=7.5,
                color=PAPER,
            )
    for where, seconds in idle:
        axes.axvline(where, color=MUTED, linestyle=(0, (1, 2)), linewidth=1)
        axes.annotate(
            f"idle {duration(seconds)}",
            (where, -0.1),
            (0, 2),
            textcoords="offset points",
            ha="center",
            fontsize=7.5,
            color=INK,
            annotation_clip=False,
        )
    ticks = np.linspace(0, whole, 6)
    axes.set_xticks(ticks, [duration(t) for t in ticks])
    axes.set_xlim(-whole * 0.005, whole * 1.01)
    axes.set_ylim(height + 0.1, -0.1)
    axes.set_yticks([])
    axes.set_ylabel("ranks")
    axes.set_xlabel("time at work")
    axes.grid(axis="x", color=GRID)
    axes.spines["left"].set_visible(False)
    legend_above(figure, axes, 4)
    return figure


def place(bars: Sequence[Bar]) -> list[int]:
    """The first lane of each bar: the lowest at which its ranks are all free from its beginning
    on. A second of overlap is none: ends are known to a second. Bars that end in the same second
    ran in the order in which they are given."""
    free: list[float] = []
    lanes = [0] * len(bars)
    for k in sorted(range(len(bars)), key=lambda k: (bars[k].end, k)):
        bar, low = bars[k], 0
        while any(t > bar.begin + 1.0 for t in free[low : low + bar.ranks]):
            low += 1
        free += [-np.inf] * (low + bar.ranks - len(free))
        free[low : low + bar.ranks] = [bar.end] * bar.ranks
        lanes[k] = low
    return lanes


def squeeze(bars: Sequence[Bar]):
    """(a function from clock time to time at work, [(where, how long nothing ran), …]).

    Gaps of less than a minute or 5 % of the work stay."""
    spans: list[list[float]] = []
    for bar in sorted(bars, key=lambda b: b.begin):
        if spans and bar.begin <= spans[-1][1]:
            spans[-1][1] = max(spans[-1][1], bar.end)
        else:
            spans.append([bar.begin, bar.end])
    busy = sum(end - begin for begin, end in spans)
    knots, values, idle = [spans[0][0], spans[0][1]], [0.0, spans[0][1] - spans[0][0]], []
    for (_, before), (begin, end) in itertools.pairwise(spans):
        gap = begin - before
        if gap > max(60.0, 0.05 * busy):
            idle.append((values[-1] + 0.005 * busy, gap))
            gap = 0.01 * busy
        values += [values[-1] + gap, values[-1] + gap + end - begin]
        knots += [begin, end]

    def at(time: float) -> float:
        return float(np.interp(time, knots, values))

    return at, idle
