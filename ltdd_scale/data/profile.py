"""What is in a shard set, for people: its long tail, sizes, samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ltdd_scale.data.longtail import GROUPS
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.runtime import files

WIDTH, HEIGHT = 64, 10
EIGHTHS = " ▁▂▃▄▅▆▇█"


def plot(counts: list[int], width: int = WIDTH, height: int = HEIGHT) -> str:
    """Images of each class, largest first, on a logarithmic scale, in block characters."""
    ranked = np.sort(np.asarray(counts))[::-1]
    columns = [
        float(np.exp(np.log(part).mean()))
        for part in np.array_split(np.maximum(ranked, 1), min(width, len(ranked)))
    ]
    top = max(columns[0], 2.0)
    levels = [round(np.log(c) / np.log(top) * height * 8) for c in columns]
    repeat = max(1, width // len(columns))
    lines = []
    for row in reversed(range(height)):
        bars = "".join(EIGHTHS[int(np.clip(level - row * 8, 0, 8))] * repeat for level in levels)
        label = f"{top ** ((row + 1) / height):6.0f}" if row % 3 == (height - 1) % 3 else " " * 6
        lines.append(f"{label} ┤{bars}".rstrip())
    lines.append(" " * 7 + "└" + "─" * (repeat * len(columns)))
    return "\n".join([*lines, f"{'':8}classes, largest first ({len(ranked)})"])


def describe(folder: Path, samples: int = 5) -> str:
    """The page that ``ltdd-scale inspect`` prints. Raises `UserError` where a shard is missing
    or of another size."""
    manifest = files.read_json(folder / "manifest.json")
    counts = manifest["splits"]["train"]["counts"]
    official = manifest["notes"].get("official ImageNet-LT") == "yes"
    title = f"{folder}: {manifest['name']}, {len(counts)} classes"
    parts = (
        title + (", the official ImageNet-LT training list" if official else ""),
        _splits(folder, manifest),
        plot(counts),
        _tail(counts, manifest["groups"]) + "\n" + _stored(folder, manifest),
        _samples(folder, samples),
    )
    return "\n\n".join(parts)


def _splits(folder: Path, manifest: dict[str, Any]) -> str:
    """A table: images, shards and sizes of each split."""
    rows = [("split", "images", "listed", "shards", "MB", "width × height (median)")]
    for name, info in manifest["splits"].items():
        megabytes = sum(s["bytes"] for s in info["shards"]) / 1e6
        numbers = (info["num_images"], sum(info["listed"]), len(info["shards"]))
        sizes = _sizes(ShardSplit(folder, name).sizes)
        rows.append((name, *map(str, numbers), f"{megabytes:.1f}", sizes))
    wide = [max(len(r[k]) for r in rows) for k in range(6)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(w) if k in (0, 5) else cell.rjust(w)
            for k, (cell, w) in enumerate(zip(row, wide, strict=True))
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def _sizes(sizes: np.ndarray) -> str:
    if not len(sizes):
        return "–"
    width, height = (int(v) for v in np.median(sizes, 0))
    return f"{width} × {height}, from {sizes.min()} to {sizes.max()}"


def _tail(counts: list[int], groups: list[str]) -> str:
    members = {g: [n for n, h in zip(counts, groups, strict=True) if h == g] for g in GROUPS}
    shots = "; ".join(f"{g} {len(n)} classes, {sum(n)} images" for g, n in members.items() if n)
    most, fewest = max(counts), min(counts)
    return f"imbalance factor {most / fewest:.0f} ({most} … {fewest} images a class); {shots}"


def _stored(folder: Path, manifest: dict[str, Any]) -> str:
    stored, quarantined = manifest.get("stored", "original bytes"), manifest["quarantined"]
    if isinstance(stored, dict):
        kind = f"JPEG of quality {stored['jpeg_quality']}" if stored["jpeg_quality"] else "PNG"
        stored = f"centre squares of {stored['side']} pixels, {kind}"
    where = f" (see {folder / 'quarantine.json'})" if quarantined else ""
    return f"stored: {stored}; quarantined: {quarantined}{where}"


def _samples(folder: Path, samples: int) -> str:
    split = ShardSplit(folder, "train")
    names, lines = split.names, ["samples"]
    for i in np.linspace(0, len(split) - 1, min(samples, len(split))).astype(int):
        label, (width, height) = split.labels[i], split.sizes[i]
        lines.append(
            f"  {names[i]}  class {label} ({split.classes[label]}), {width} × {height}, "
            f"{len(split.view(int(i)))} bytes"
        )
    return "\n".join(lines)
