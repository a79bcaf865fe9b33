"""The report page: one HTML file that needs no network. Charts are inline SVG, pictures inline PNG."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ltdd_scale import config as configuration
from ltdd_scale.config import Config
from ltdd_scale.data import arrays
from ltdd_scale.data.shards import ShardSplit, square
from ltdd_scale.report import SHOWN, table
from ltdd_scale.runtime import files
from ltdd_scale.runtime.progress import duration

COLOURS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#dc2626", "#0891b2", "#a16207", "#64748b")
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2rem auto;padding:0 1rem;color:#1e293b}
h1{font-size:1.7rem;margin-bottom:.2rem}h2{font-size:1.15rem;margin-top:2.2rem;border-bottom:1px solid #cbd5e1}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:.6rem 0}th,td{padding:.25rem .7rem;text-align:right;border-bottom:1px solid #e2e8f0}
td{white-space:nowrap}th{font-weight:600;background:#f8fafc}td:first-child,th:first-child,td.t{text-align:left}tr.main td{font-weight:600;background:#eff6ff}
.note{color:#475569;font-size:.92em}img{image-rendering:pixelated;max-width:100%}pre{background:#f8fafc;padding:.8rem;overflow:auto;font-size:.82em}
svg text{font:11px system-ui,sans-serif;fill:#334155}details summary{cursor:pointer}.sheet{overflow-x:auto}
"""


def _markdown_table(text: str) -> str:
    rows = [
        [c.strip() for c in line.strip("|").split("|")]
        for line in text.splitlines()
        if not line.startswith("|--")
    ]
    out = ["<table><tr>" + "".join(f"<th>{html.escape(c)}</th>" for c in rows[0]) + "</tr>"]
    for r in rows[1:]:
        main = ' class="main"' if r[0] == "distilled" else ""
        out.append(f"<tr{main}>" + "".join(f"<td>{html.escape(c)}</td>" for c in r) + "</tr>")
    return "".join(out) + "</table>"


def bars(classes: list[str], counts: np.ndarray, series: dict[str, list[float]]) -> str:
    """Per-class accuracy of each series (0–100) over classes from head to tail, training images a class as a grey line (log scale)."""
    order = np.argsort(-counts, kind="stable")
    width, height, left, bottom = 940, 250, 40, 62 if len(classes) <= 40 else 22
    step = (width - left - 10) / len(classes)
    plot = height - bottom - 14
    y = lambda v: 14 + plot * (1 - v / 100)  # noqa: E731
    out = [f'<svg viewBox="0 0 {width} {height + 34}" width="100%">']
    for tick in (0, 25, 50, 75, 100):
        out.append(
            f'<line x1="{left}" x2="{width - 10}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#e2e8f0"/><text x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick}</text>'
        )
    bar = step * 0.82 / max(len(series), 1)
    for k, (name, values) in enumerate(series.items()):
        for i, c in enumerate(order):
            out.append(
                f'<rect x="{left + i * step + step * 0.09 + k * bar:.2f}" y="{y(values[c]):.1f}" width="{bar * 0.95:.2f}" height="{plot * values[c] / 100:.1f}" '
                f'fill="{COLOURS[k]}"><title>{html.escape(classes[c])}: {name} {values[c]:.1f} %, {counts[c]} training images</title></rect>'
            )
        out.append(
            f'<rect x="{left + k * 190}" y="{height + 4}" width="11" height="11" fill="{COLOURS[k]}"/><text x="{left + 16 + k * 190}" y="{height + 13}">{html.escape(name)}</text>'
        )
    scale = np.log10(np.maximum(counts[order], 1)) / max(np.log10(counts.max()), 1e-9) * 100
    line = " ".join(f"{left + (i + 0.5) * step:.1f},{y(v):.1f}" for i, v in enumerate(scale))
    out.append(
        f'<polyline points="{line}" fill="none" stroke="#94a3b8" stroke-width="1.5" stroke-dasharray="4 3"/>'
    )
    out.append(
        f'<text x="{width - 12}" y="{height + 29}" text-anchor="end">dashed: training images a class, log scale, {counts.max()} … {counts.min()}</text>'
    )
    if len(classes) <= 40:
        for i, c in enumerate(order):
            x = left + (i + 0.5) * step
            out.append(
                f'<text x="{x:.1f}" y="{height - bottom + 12}" text-anchor="end" transform="rotate(-35 {x:.1f} {height - bottom + 12})">{html.escape(classes[c][:14])} · {counts[c]}</text>'
            )
    return "".join(out) + "</svg>"


def curves(series: dict[str, list[float]], unit: str) -> str:
    """Loss over time, each curve scaled to the common range of all (5th–100th percentile)."""
    series = {k: v for k, v in series.items() if len(v) > 1}
    if not series:
        return ""
    width, height, left = 460, 190, 48
    everything = np.concatenate([np.asarray(v) for v in series.values()])
    low, high = float(everything.min()), float(np.percentile(everything, 99))
    high = high if high > low else low + 1
    out = [f'<svg viewBox="0 0 {width} {height + 16 * len(series)}" width="{width}">']
    for k in range(5):
        v = low + (high - low) * k / 4
        y = 10 + (height - 40) * (1 - k / 4)
        out.append(
            f'<line x1="{left}" x2="{width - 8}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e2e8f0"/><text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{v:.3g}</text>'
        )
    for k, (name, values) in enumerate(series.items()):
        shown = np.asarray(values)[
            np.linspace(0, len(values) - 1, min(len(values), 200)).astype(int)
        ]
        xs = left + (width - left - 8) * np.linspace(0, 1, len(shown))
        ys = 10 + (height - 40) * (1 - (np.clip(shown, low, high) - low) / (high - low))
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(xs, ys, strict=True))
        out.append(
            f'<polyline points="{points}" fill="none" stroke="{COLOURS[k % 8]}" stroke-width="1.4"/>'
        )
        y = height - 4 + 16 * k
        out.append(
            f'<rect x="{left}" y="{y - 9}" width="11" height="11" fill="{COLOURS[k % 8]}"/><text x="{left + 16}" y="{y}">{html.escape(name)} ({len(values)} {unit})</text>'
        )
    return "".join(out) + "</svg>"


def contact_sheet(kinds: list[np.ndarray], scale: int) -> str:
    """Rows of classes; in each the kinds' images [classes][n, 3, R, R] side by side, as an inline PNG."""
    rows = []
    for parts in zip(*kinds, strict=True):
        strips = []
        for p in parts:
            strip = np.concatenate(
                [np.pad(image, ((0, 0), (1, 1), (1, 1)), constant_values=255) for image in p], 2
            )
            strips += [strip, np.full((3, strip.shape[1], 10), 255, np.uint8)]
        rows.append(np.concatenate(strips[:-1], 2))
    sheet = Image.fromarray(np.ascontiguousarray(np.concatenate(rows, 1).transpose(1, 2, 0)))
    sheet = sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return f'<div class="sheet"><img width="{sheet.width}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"></div>'


def _sheets(config: Config, nodes: dict, store: Path, split: ShardSplit) -> str:
    size = config.data.resolution
    order = np.argsort(-split.counts, kind="stable")
    shown = order[np.unique(np.linspace(0, len(order) - 1, min(12, len(order))).astype(int))]
    n = min(config.ipc, 8 if size <= 64 else 4)

    def fill(images: np.ndarray) -> np.ndarray:
        blank = np.full((max(n - len(images), 0), 3, size, size), 245, np.uint8)
        return np.concatenate([images[:n], blank])

    real, initial, recovered = [], [], []
    for c in shown:
        members = np.flatnonzero(split.labels == c)[:n]
        real.append(
            fill(
                np.stack(
                    [
                        np.asarray(square(split.image(int(i)), size)).transpose(2, 0, 1)
                        for i in members
                    ]
                )
            )
        )
        initial.append(
            fill(arrays.load(arrays.class_file(nodes["initialize"].folder(store), int(c))))
        )
        recovered.append(
            fill(arrays.load(arrays.class_file(nodes["recover"].folder(store), int(c))))
        )
    names = ", ".join(f"{split.classes[c]} ({split.counts[c]})" for c in shown)
    scale = max(1, round(900 / (3 * n * (size + 2) + 20))) if size <= 64 else 1
    note = f'<p class="note">A row a class, from head to tail: {html.escape(names)}. Left to right: real, initial, recovered.</p>'
    return note + contact_sheet([real, initial, recovered], scale)


def render(
    config: Config,
    nodes: dict,
    store: Path,
    split: ShardSplit,
    results: dict[str, Any],
    matrix: str,
) -> str:
    summary = results["summary"]
    kind, counts = summary["labels"], split.counts
    main = table({**results, "matrix": []})
    net = config.evaluate.nets[0] if config.evaluate.nets else config.teacher.net
    cells = {(e["set"], e["labels"], e["net"]): e for e in summary["students"]}
    shown = {
        SHOWN[s]: cells[s, y, net]["per_class"]
        for s, y in (("distilled", kind), ("random", kind), ("full", "online"), ("full", "hard"))
        if (s, y, net) in cells
    }
    shown["teacher"] = summary["experts"]["teacher"]["per_class"]
    experts = {
        r: [e["loss"] for e in files.read_json(nodes[r].folder(store) / "log.json")]
        for r in ("observer", "teacher")
    }
    students = {
        k: v
        for k, v in results["loss_curves"].items()
        if k.split(" ")[1] in (kind, "online", "hard") and k.split(" ")[2] == net
    }
    students = {
        k: v for k, v in students.items() if k.split(" ")[0] == "full" or k.split(" ")[1] == kind
    }
    stages, seconds = [], 0.0
    for name, node in nodes.items():
        record = files.read_json(node.folder(store) / "stage.json")
        if node.stage == "student":
            seconds += record["seconds"]
            continue
        facts = ", ".join(f"{k} {v}" for k, v in record["facts"].items())
        stages.append(
            (name, duration(record["seconds"]), f"{record['ranks']} × {record['device']}", facts)
        )
    stages.insert(
        -1,
        (
            "students",
            f"{duration(seconds)} of one rank",
            "",
            f"{len(summary['students'])} cells × {config.evaluate.seeds} seeds",
        ),
    )
    software = files.read_json(nodes["evaluate"].folder(store) / "stage.json")["software"]
    timing = "".join(
        f"<tr>{''.join(f'<td class=t>{html.escape(str(c))}</td>' for c in row)}</tr>"
        for row in stages
    )
    online = (
        '<p class="note">With online labels the teacher sees every view, so almost any images will do: read this column beside the others.</p>'
        if kind == "online"
        else ""
    )
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(config.name)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(config.name)}</h1>
<p class="note">{config.ipc} images a class for {len(counts)} classes, from {counts.sum():,} long-tailed images ({counts.max()} … {counts.min()} a class); {config.data.resolution} px; {html.escape(kind)} labels;
judged on {summary["split"]} images, per cent, mean ± standard deviation over {config.evaluate.seeds} seeds.</p>
<h2>Results</h2>{_markdown_table(main)}{online}
{"<h2>The label matrix</h2><p class=note>Top-1 of students trained on each kind of image with each kind of label.</p>" + _markdown_table(matrix) if matrix else ""}
<h2>Accuracy of each class</h2>{bars(split.classes, counts, shown)}
<h2>Real, initial and recovered images</h2>{_sheets(config, nodes, store, split)}
<h2>Loss</h2>{curves(experts, "epochs")}{curves(students, "epochs")}
<h2>Stages</h2><table><tr><th>stage</th><th>time</th><th>on</th><th>facts</th></tr>{timing}</table>
<p class="note">{", ".join(f"{k} {v}" for k, v in software.items())}</p>
<h2>Config</h2><details><summary>all settings</summary><pre>{html.escape(configuration.to_yaml(config))}</pre></details>
</body></html>
"""
