"""What is in a shard set, for people: its long tail, sizes, samples."""

from __future__ import annotations

from pathlib import Path

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
    """The page that ``ltdd-scale inspect`` prints. Raises `UserError` where a shard is missing or of another size."""
    manifest = files.read_json(folder / "manifest.json")
    counts = manifest["splits"]["train"]["counts"]
    groups = manifest["groups"]
    official = (
        ", the official ImageNet-LT training list"
        if manifest["notes"].get("official ImageNet-LT") == "yes"
        else ""
    )
    out = [f"{folder}: {manifest['name']}, {len(counts)} classes{official}", ""]
    rows = [("split", "images", "listed", "shards", "MB", "width × height (median)")]
    for name, info in manifest["splits"].items():
        sizes = ShardSplit(folder, name).sizes
        middle = (
            "–"
            if not len(sizes)
            else f"{int(np.median(sizes[:, 0]))} × {int(np.median(sizes[:, 1]))}, from {sizes.min()} to {sizes.max()}"
        )
        megabytes = sum(s["bytes"] for s in info["shards"]) / 1e6
        rows.append(
            (
                name,
                str(info["num_images"]),
                str(sum(info["listed"])),
                str(len(info["shards"])),
                f"{megabytes:.1f}",
                middle,
            )
        )
    wide = [max(len(r[k]) for r in rows) for k in range(6)]
    out += [
        "  "
        + "  ".join(
            cell.ljust(w) if k in (0, 5) else cell.rjust(w)
            for k, (cell, w) in enumerate(zip(row, wide, strict=True))
        ).rstrip()
        for row in rows
    ]
    members = {g: [n for n, h in zip(counts, groups, strict=True) if h == g] for g in GROUPS}
    shots = "; ".join(f"{g} {len(n)} classes, {sum(n)} images" for g, n in members.items() if n)
    out += [
        "",
        plot(counts),
        "",
        f"imbalance factor {max(counts) / min(counts):.0f} ({max(counts)} … {min(counts)} images a class); {shots}",
    ]
    stored = manifest.get("stored", "original bytes")
    if isinstance(stored, dict):
        kind = f"JPEG of quality {stored['jpeg_quality']}" if stored["jpeg_quality"] else "PNG"
        stored = f"centre squares of {stored['side']} pixels, {kind}"
    out.append(
        f"stored: {stored}; quarantined: {manifest['quarantined']}"
        + (f" (see {folder / 'quarantine.json'})" if manifest["quarantined"] else "")
    )
    split = ShardSplit(folder, "train")
    names = split.names
    out += ["", "samples"]
    for i in np.linspace(0, len(split) - 1, min(samples, len(split))).astype(int):
        out.append(
            f"  {names[i]}  class {split.labels[i]} ({manifest['classes'][split.labels[i]]}), {split.sizes[i][0]} × {split.sizes[i][1]}, {len(split.view(int(i)))} bytes"
        )
    return "\n".join(out)
