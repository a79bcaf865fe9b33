"""Class by class: accuracy from head to tail, confusions, the tree of classes."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from scipy.cluster import hierarchy

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
    row,
)

NAMED = 40  # as many classes as a picture has room to name
FEW = 60  # so many classes have dots of their own that are told apart; more, a running mean
BLOCKS = 125  # a confusion matrix has at most so many rows; classes share rows where there are more

Accuracies = Mapping[str, Sequence[float | None]]  # series → per cent of each class, in label order


@drawn
def from_head_to_tail(classes: Sequence[str], counts: np.ndarray, series: Accuracies) -> Figure:
    """Accuracy of each class, from head to tail. None, which has no dot, where a class has no
    judged images. With many classes the line is a running mean."""
    order = np.argsort(-counts, kind="stable")
    named = len(classes) <= NAMED
    figure, axes = one(9.4, 4.0 if named else 3.6)
    places = np.arange(len(order), dtype=float)
    for k, (name, values) in enumerate(series.items()):
        shift = 0.0
        if len(classes) <= FEW:
            shift = (k - (len(series) - 1) / 2) * min(0.11, 0.7 / max(len(series), 1))
        _dots(axes, places + shift, _floats(values)[order], k, name)
    if named:
        names = [f"{classes[c][:14]} · {counts[c]:,}" for c in order]
        axes.set_xticks(places, names, rotation=35, ha="right", fontsize=8)
        for x in places[:-1] + 0.5:
            axes.axvline(x, color=GRID, linewidth=0.5)
        axes.set_xlabel("class · training images")
    else:
        axes.set_xlabel(
            f"classes from head ({counts.max():,} training images) to tail ({counts.min():,})"
        )
    axes.set_xlim(-0.6, len(order) - 0.4)
    _accuracy(axes)
    legend_above(figure, axes, 4)
    return figure


@drawn
def by_count(counts: np.ndarray, series: Accuracies) -> Figure:
    """Accuracy of each class over its training images, on a logarithmic axis."""
    figure, axes = one(5.6, 3.8)
    order = np.argsort(-counts, kind="stable")
    axes.set_xscale("log")
    shown = np.maximum(counts[order], 1).astype(float)
    for k, (name, values) in enumerate(series.items()):
        _dots(axes, shown, _floats(values)[order], k, name, join=True)
    low, high = shown.min(), shown.max()
    ticks = [v for v in _round_numbers(low, high) if low / 1.2 <= v <= high * 1.2]
    plain_ticks(axes.xaxis, ticks or [low], [f"{v:,.0f}" for v in ticks or [low]])
    axes.set_xlim(high * 1.15, low / 1.15)  # from head to tail, as the other picture
    axes.set_xlabel("training images of the class")
    _accuracy(axes)
    legend_above(figure, axes, 2)
    return figure


def _round_numbers(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, … from `low` to `high`; powers of 10 alone where there are many."""
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    steps = (1, 2, 5) if len(decades) <= 4 else (1,)
    return [s * 10.0**e for e in decades for s in steps]


def _floats(values: Sequence[float | None]) -> np.ndarray:
    return np.asarray([np.nan if v is None else v for v in values], float)


def _dots(axes, xs: np.ndarray, ys: np.ndarray, k: int, name: str, join: bool = False) -> None:
    colour, marker = SERIES[k % len(SERIES)], MARKERS[k % len(MARKERS)]
    if len(xs) <= FEW:
        style = "-" if join else "none"
        axes.plot(
            xs,
            ys,
            marker=marker,
            color=colour,
            markersize=5,
            linestyle=style,
            linewidth=0.8,
            label=name,
        )
        return
    axes.plot(
        xs, ys, ".", color=colour, markersize=2.5, alpha=0.35, rasterized=True, markeredgewidth=0
    )
    there = np.isfinite(ys)
    window = max(len(xs) // 20, 5)
    weights = np.ones(window)
    # At the ends fewer classes are in the window.
    sums = np.convolve(np.where(there, ys, 0.0), weights, "same")
    known = np.convolve(there.astype(float), weights, "same")
    smooth = sums / np.maximum(known, 1)
    every = np.unique(np.linspace(0, len(xs) - 1, 200).astype(int))
    axes.plot(xs[every], smooth[every], color=colour, linewidth=1.6, label=name)


def _accuracy(axes) -> None:
    axes.set_ylim(-2, 102)
    axes.set_yticks([0, 25, 50, 75, 100])
    axes.set_ylabel("accuracy, %")
    axes.grid(axis="y")


@drawn
def confusions(
    classes: Sequence[str],
    matrices: Mapping[str, np.ndarray],
    order: np.ndarray,
    bounds: Sequence[int] = (),
) -> Figure:
    """Confusion matrices side by side: int [C, C], rows truth, columns prediction; shown in per
    cent of a class, on a scale of square roots that shows small ones too. `order` int [C]: the
    classes as they stand; `bounds`: between which rows groups of them meet.
    """
    named, blocks = len(classes) <= NAMED, min(len(classes), BLOCKS)
    figure, panels = row(len(matrices), 4.6 * len(matrices) + 0.4, 4.7, sharey=True)
    image = None
    for k, (axes, (title, counted)) in enumerate(zip(panels, matrices.items(), strict=True)):
        shares = _shares(np.asarray(counted)[np.ix_(order, order)], blocks)
        image = axes.imshow(
            shares, cmap="viridis", norm=PowerNorm(0.5, 0, 100), interpolation="none"
        )
        axes.set_title(title)
        axes.set_xlabel("predicted")
        if len(classes) <= 12:
            _write(axes, shares)
        for bound in bounds:
            at = bound * blocks / len(classes) - 0.5
            axes.axhline(at, color="white", linewidth=1)
            axes.axvline(at, color="white", linewidth=1)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        if named:
            names = [classes[c][:14] for c in order]
            axes.set_xticks(range(len(order)), names, rotation=60, ha="right", fontsize=7)
            axes.set_yticks(range(len(order)), names, fontsize=7)
        else:
            axes.set_xticks([])
            axes.set_yticks([])
        if not k:
            axes.set_ylabel("true class")
    if image is not None:
        bar = figure.colorbar(image, ax=panels, label="% of the true class", shrink=0.8)
        bar.set_ticks([0, 5, 20, 50, 100])
        bar.outline.set_visible(False)
    return figure


def _shares(counted: np.ndarray, blocks: int) -> np.ndarray:
    """Per cent of each row, float [blocks, blocks]: a block's mean over its classes of how much of
    a class goes to the block's columns."""
    shares = 100 * counted / np.maximum(counted.sum(1, keepdims=True), 1)
    if blocks == len(counted):
        return shares
    starts = np.linspace(0, len(counted), blocks, endpoint=False).astype(int)
    sizes = np.diff([*starts, len(counted)])
    return np.add.reduceat(np.add.reduceat(shares, starts, 0), starts, 1) / sizes[:, None]


def _write(axes, shares: np.ndarray) -> None:
    for i, j in np.ndindex(shares.shape):
        if shares[i, j] >= 0.5:
            colour = "white" if shares[i, j] < 36 else "black"
            axes.text(
                j, i, f"{shares[i, j]:.0f}", ha="center", va="center", fontsize=7, color=colour
            )


def leaves(linkage: np.ndarray) -> np.ndarray:
    """Classes in the order in which the tree has them, int [C]. `linkage` as scipy's."""
    return np.asarray(hierarchy.leaves_list(np.asarray(linkage, float)))


def bounds(order: np.ndarray, groups: Sequence[Sequence[int]]) -> list[int]:
    """Where one group ends and the next begins, if each stands together in `order`; else none."""
    of = {c: g for g, members in enumerate(groups) for c in members}
    owners = [of.get(int(c), -1) for c in order]
    changes = [k for k in range(1, len(owners)) if owners[k] != owners[k - 1]]
    return changes if len(changes) == len(set(owners)) - 1 else []


def _dendrogram(linkage: np.ndarray) -> dict:
    """scipy's, which calls itself once a level: a tree of classes may be one long chain."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, 1000 + 4 * len(linkage)))
    try:
        return hierarchy.dendrogram(linkage, no_plot=True)
    finally:
        sys.setrecursionlimit(before)


@drawn
def tree(
    classes: Sequence[str],
    counts: np.ndarray,
    linkage: np.ndarray,
    groups: Sequence[Sequence[int]],
) -> Figure:
    """The tree of classes, leaves with their training images n_c; the groups' colours at the
    leaves; a dotted line where one cut through the tree makes just these groups."""
    linkage = np.asarray(linkage, float)
    found = _dendrogram(linkage)
    order, num_classes = found["leaves"], len(classes)
    named = num_classes <= 2 * NAMED
    figure, axes = one(7.2, min(1.2 + 0.19 * num_classes, 9.0) if named else 7.0)
    # All joins as one line with gaps.
    joins = [
        np.pad(found[k], ((0, 0), (0, 1)), constant_values=np.nan) for k in ("dcoord", "icoord")
    ]
    axes.plot(joins[0].ravel(), joins[1].ravel(), color=MUTED, linewidth=0.9)
    top = float(linkage[:, 2].max()) or 1.0
    of = {c: g for g, members in enumerate(groups) for c in members}
    places = 5 + 10 * np.arange(num_classes)
    for g in range(len(groups)):
        own = [places[k] for k, c in enumerate(order) if of.get(c) == g]
        axes.scatter(
            [-0.015 * top] * len(own),
            own,
            color=SERIES[g % len(SERIES)],
            marker=MARKERS[g % len(MARKERS)],
            s=22 if named else 6,
            label=f"group {g + 1} ({len(own)} classes)" if g < 8 else None,
            linewidth=0,
        )
    cut = _cut(linkage, groups)
    if cut is not None:
        axes.axvline(cut, color=INK, linestyle=(0, (2, 2)), label=f"cut into {len(groups)} groups")
    axes.set_xlim(top * 1.03, -0.04 * top)
    axes.set_ylim(0, 10 * num_classes)
    axes.yaxis.tick_right()
    axes.spines[:].set_visible(False)
    axes.spines["bottom"].set_visible(True)
    axes.tick_params(axis="y", length=0)
    if named:
        axes.set_yticks(places, [f"{classes[c][:24]} · {counts[c]:,}" for c in order], fontsize=8)
    else:
        axes.set_yticks([])
        axes.set_ylabel(f"{num_classes:,} classes")
    axes.set_xlabel("distance at which classes join")
    legend_above(figure, axes, 3)
    return figure


def _cut(linkage: np.ndarray, groups: Sequence[Sequence[int]]) -> float | None:
    """The height of the one cut that makes just these groups, or None where none does."""
    heights, count = np.sort(linkage[:, 2]), len(groups)
    if not 2 <= count <= len(heights):
        return None
    made = hierarchy.fcluster(linkage, count, "maxclust")
    own = {frozenset(np.flatnonzero(made == g).tolist()) for g in set(made.tolist())}
    if own != {frozenset(int(c) for c in members) for members in groups}:
        return None
    return float(heights[-count] + heights[-count + 1]) / 2
