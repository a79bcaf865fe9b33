"""Charts and image sheets for the page: inline SVG and inline PNG, nothing from a network."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

COLOURS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#dc2626", "#0891b2", "#a16207", "#64748b")
GRID, DASHED = "#e2e8f0", "#94a3b8"
NAMED = 40  # as many classes as a chart has room to name


def _text(x: float, y: float, text: str, end: bool = False, turned: bool = False) -> str:
    anchor = ' text-anchor="end"' if end else ""
    turn = f' transform="rotate(-35 {x:.1f} {y:.1f})"' if turned else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{anchor}{turn}>{html.escape(text)}</text>'


def _grid_line(left: float, right: float, y: float, value: str) -> str:
    line = f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="{GRID}"/>'
    return line + _text(left - 6, y + 4, value, end=True)


def _key(x: float, y: float, colour: str, text: str) -> str:
    """An entry of a legend."""
    square = f'<rect x="{x:.1f}" y="{y - 9:.1f}" width="11" height="11" fill="{colour}"/>'
    return square + _text(x + 16, y, text)


def _line(xs: np.ndarray, ys: np.ndarray, colour: str, style: str) -> str:
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(xs, ys, strict=True))
    return f'<polyline points="{points}" fill="none" stroke="{colour}" {style}/>'


def bars(
    classes: Sequence[str], counts: np.ndarray, series: Mapping[str, Sequence[float | None]]
) -> str:
    """Per-class accuracy of each series (0–100; None, which has no bar, where a class has no judged
    images) over classes from head to tail; training images a class as a grey line (log scale)."""
    order = np.argsort(-counts, kind="stable")
    named = len(classes) <= NAMED
    width, height, left, bottom = 940, 250, 40, 62 if named else 22
    step = (width - left - 10) / len(classes)
    plot = height - bottom - 14
    keys_a_row = 4
    extra = 20 * ((len(series) - 1) // keys_a_row)

    def y(value):
        return 14 + plot * (1 - value / 100)

    out = [f'<svg viewBox="0 0 {width} {height + 34 + extra}" width="100%">']
    out += [_grid_line(left, width - 10, y(tick), str(tick)) for tick in (0, 25, 50, 75, 100)]
    bar = step * 0.82 / max(len(series), 1)
    for k, (name, values) in enumerate(series.items()):
        colour = COLOURS[k % len(COLOURS)]
        for i, c in enumerate(order):
            if (value := values[c]) is None:
                continue
            x = left + i * step + step * 0.09 + k * bar
            said = f"{classes[c]}: {name} {value:.1f} %, {counts[c]} training images"
            out.append(
                f'<rect x="{x:.2f}" y="{y(value):.1f}" width="{bar * 0.95:.2f}" '
                f'height="{plot * value / 100:.1f}" fill="{colour}">'
                f"<title>{html.escape(said)}</title></rect>"
            )
        row, column = divmod(k, keys_a_row)
        out.append(_key(left + column * 220, height + 13 + 20 * row, colour, name))
    scale = np.log10(np.maximum(counts[order], 1)) / max(np.log10(counts.max()), 1e-9) * 100
    middles = left + (np.arange(len(order)) + 0.5) * step
    out.append(_line(middles, y(scale), DASHED, 'stroke-width="1.5" stroke-dasharray="4 3"'))
    said = f"dashed: training images a class, log scale, {counts.max()} … {counts.min()}"
    out.append(_text(width - 12, height + 29 + extra, said, end=True))
    if named:
        below = height - bottom + 12
        out += [
            _text(x, below, f"{classes[c][:14]} · {counts[c]}", end=True, turned=True)
            for x, c in zip(middles, order, strict=True)
        ]
    return "".join(out) + "</svg>"


def curves(series: Mapping[str, Sequence[float]], unit: str) -> str:
    """Loss over time, all curves on one scale: from the least to the 99th percentile of all."""
    series = {name: values for name, values in series.items() if len(values) > 1}
    if not series:
        return ""
    width, height, left, top = 460, 190, 48, 10
    everything = np.concatenate([np.asarray(v) for v in series.values()])
    low, high = float(everything.min()), float(np.percentile(everything, 99))
    high = high if high > low else low + 1

    def y(values):
        return top + (height - 40) * (1 - (np.clip(values, low, high) - low) / (high - low))

    out = [f'<svg viewBox="0 0 {width} {height + 16 * len(series)}" width="{width}">']
    for tick in np.linspace(low, high, 5):
        out.append(_grid_line(left, width - 8, float(y(tick)), f"{tick:.3g}"))
    for k, (name, values) in enumerate(series.items()):
        colour, n = COLOURS[k % len(COLOURS)], len(values)
        shown = np.asarray(values)[np.linspace(0, n - 1, min(n, 200)).astype(int)]
        xs = left + (width - left - 8) * np.linspace(0, 1, len(shown))
        out.append(_line(xs, y(shown), colour, 'stroke-width="1.4"'))
        out.append(_key(left, height - 4 + 16 * k, colour, f"{name} ({n} {unit})"))
    return "".join(out) + "</svg>"


def contact_sheet(kinds: Sequence[Sequence[np.ndarray]], scale: int) -> str:
    """Rows of classes; in each the kinds' images [classes][n, 3, R, R] side by side, as a PNG."""
    rows = []
    for parts in zip(*kinds, strict=True):
        strips: list[np.ndarray] = []
        for images in parts:
            framed = [np.pad(x, ((0, 0), (1, 1), (1, 1)), constant_values=255) for x in images]
            strip = np.concatenate(framed, 2)
            strips += [strip, np.full((3, strip.shape[1], 10), 255, np.uint8)]
        rows.append(np.concatenate(strips[:-1], 2))
    pixels = np.concatenate(rows, 1).transpose(1, 2, 0)
    sheet = Image.fromarray(np.ascontiguousarray(pixels))
    size = (sheet.width * scale, sheet.height * scale)
    sheet = sheet.resize(size, Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    content = base64.b64encode(buffer.getvalue()).decode()
    source = f"data:image/png;base64,{content}"
    return f'<div class="sheet"><img width="{sheet.width}" src="{source}"></div>'
