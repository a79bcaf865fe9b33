"""Images themselves: sheets of them as PNG, and pairs enlarged."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ltdd_scale.publish.pictures.canvas import drawn, sheet


@drawn
def pairs(names: Sequence[str], initial: np.ndarray, recovered: np.ndarray, times: float) -> Figure:
    """Images before and after, uint8 [n, 3, R, R], one column each; their difference `times` as
    strong, grey where there is none."""
    n = len(names)
    figure = sheet(max(1.35 * n + 0.9, 3.2), 4.5)
    grid = figure.subplots(3, n, squeeze=False)
    change = recovered.astype(float) - initial
    difference = np.clip(128 + times * change, 0, 255).astype(np.uint8)
    rows = {"initial": initial, "recovered": recovered, f"difference\n× {times:g}": difference}
    for line, (title, images) in zip(grid, rows.items(), strict=True):
        for axes, pixels in zip(line, images, strict=True):
            axes.imshow(pixels.transpose(1, 2, 0), interpolation="none")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        line[0].set_ylabel(title)
    for axes, name in zip(grid[0], names, strict=True):
        axes.set_title(name[:16], loc="center")
    return figure


def amplification(initial: np.ndarray, recovered: np.ndarray) -> float:
    """By how much a difference is strengthened so that it is seen: 1, 2, 4, 8 or 16, such that
    99 % of it stay in range."""
    change = np.abs(recovered.astype(float) - initial)
    most = max(float(np.percentile(change, 99)), 1.0)
    return float(2 ** int(np.clip(np.floor(np.log2(127 / most)), 0, 4)))


def shrunk(images: np.ndarray, most: int) -> np.ndarray:
    """uint8 [n, 3, R, R] with sides of at most `most` pixels."""
    if images.shape[-1] <= most:
        return images
    small = [
        np.asarray(
            Image.fromarray(np.ascontiguousarray(x.transpose(1, 2, 0))).resize(
                (most, most), Image.Resampling.LANCZOS
            )
        )
        for x in images
    ]
    return np.stack(small).transpose(0, 3, 1, 2)


def contact_sheet(kinds: Sequence[Sequence[np.ndarray]], n: int) -> tuple[str, int]:
    """Rows of classes; in each the kinds' images [classes][≤ n, 3, R, R] side by side: a PNG as a
    data URL, and its width in pixels. Between images and where one is missing the page shows."""
    rows = []
    for parts in zip(*kinds, strict=True):
        strips: list[np.ndarray] = []
        for images in parts:
            side = images.shape[-1] + 2
            strip = np.zeros((side, n * side, 4), np.uint8)
            for k, pixels in enumerate(images[:n]):
                place = strip[1:-1, k * side + 1 : (k + 1) * side - 1]
                place[..., :3], place[..., 3] = pixels.transpose(1, 2, 0), 255
            strips += [strip, np.zeros((side, 10, 4), np.uint8)]
        rows.append(np.concatenate(strips[:-1], 1))
    drawing = Image.fromarray(np.concatenate(rows))
    buffer = io.BytesIO()
    drawing.save(buffer, "PNG", optimize=True)
    content = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/png;base64,{content}", drawing.width
