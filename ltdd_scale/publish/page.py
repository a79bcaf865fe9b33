"""The report page: one HTML file that needs no network. Charts and images are inline."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ltdd_scale.data.distilled import Distilled
from ltdd_scale.data.shards import ShardSplit, square
from ltdd_scale.publish.material import Material
from ltdd_scale.publish.pictures import bars, contact_sheet, curves
from ltdd_scale.publish.tables import HEADINGS, SHOWN, matrix_table, numbers, table
from ltdd_scale.results import WHOLE_SETS, labels_of
from ltdd_scale.runtime import files
from ltdd_scale.runtime.progress import duration

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1240px;margin:2rem auto;padding:0 1rem;
color:#1e293b}
h1{font-size:1.7rem;margin-bottom:.2rem}
h2{font-size:1.15rem;margin-top:2.2rem;border-bottom:1px solid #cbd5e1}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:.6rem 0}
th,td{padding:.25rem .7rem;text-align:right;border-bottom:1px solid #e2e8f0}
td{white-space:nowrap}th{font-weight:600;background:#f8fafc}
td:first-child,th:first-child,td.t{text-align:left}
tr.main td{font-weight:600;background:#eff6ff}
.wide{overflow-x:auto}.note{color:#475569;font-size:.92em}
img{image-rendering:pixelated;max-width:100%}
pre{background:#f8fafc;padding:.8rem;overflow:auto;font-size:.82em}
svg text{font:11px system-ui,sans-serif;fill:#334155}
details summary{cursor:pointer}.sheet{overflow-x:auto}
"""
PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>{style}</style></head><body>
<h1>{title}</h1>
<p class="note">{about}</p>
<h2>Results</h2>{results}
{matrix}
<h2>Accuracy of each class</h2>{bars}
<h2>{sheet_title}</h2>{sheets}
<h2>Loss</h2>{curves}
<h2>Stages</h2><div class="wide"><table>
<tr><th>stage</th><th>time</th><th>on</th><th>facts</th></tr>{stages}</table></div>
<p class="note">{software}</p>
<h2>Config</h2><details><summary>all settings</summary><pre>{config}</pre></details>
</body></html>
"""
ONLINE = (
    "With online labels the teacher sees every view, so almost any images will do: "
    "read this column beside the others."
)
UNBALANCED = (
    "The judged images are not balanced, so top-1 tells mostly of the head: "
    "balanced, the mean over classes, comes first."
)


def render(material: Material, split: ShardSplit, results: dict[str, Any]) -> str:
    """The page as HTML. `split` is the real training set, `results` the verdict's record."""
    summary = results["summary"]
    sheet_title, sheets = _sheets(material, split)
    notes = [ONLINE] if material.labels == "online" else []
    notes += [] if summary.get("balanced_test", True) else [UNBALANCED]
    main = _table(table({**results, "matrix": []}))
    losses = curves(_expert_losses(material), "epochs")
    losses += curves(_student_losses(material, results), "epochs")
    software = files.read_json(material.folder("verdict") / "stage.json")["software"]
    return PAGE.format(
        title=html.escape(material.name),
        style=STYLE,
        about=_about(material, split, summary),
        results=main + "".join(_note(n) for n in notes),
        matrix=_matrix(results),
        bars=bars(split.classes, split.counts, _class_accuracies(material, summary)),
        sheet_title=sheet_title,
        sheets=sheets,
        curves=losses or _note("No losses were kept."),
        stages=_stages(material, summary),
        software=html.escape(", ".join(f"{k} {v}" for k, v in software.items())),
        config=html.escape(material.config_yaml),
    )


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def _about(material: Material, split: ShardSplit, summary: dict[str, Any]) -> str:
    counts, seeds = split.counts, material.config["evaluate"]["seeds"]
    return html.escape(
        f"{material.ipc} images a class for {len(counts)} classes, from {counts.sum():,} "
        f"long-tailed images ({counts.max()} … {counts.min()} a class); {material.resolution} px; "
        f"method {material.config['method']}, {material.labels} labels; judged on "
        f"{summary['split']} images, per cent, mean ± standard deviation over {seeds} "
        f"seed{'s' * (seeds != 1)}."
    )


def _table(markdown: str) -> str:
    """A Markdown table as HTML; the row of the distilled set stands out."""
    lines = [line for line in markdown.splitlines() if not line.startswith("|--")]
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    out = ["<tr>" + "".join(f"<th>{html.escape(c)}</th>" for c in rows[0]) + "</tr>"]
    for row in rows[1:]:
        main = ' class="main"' if row[0] == "distilled" else ""
        out.append(f"<tr{main}>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>")
    return f'<div class="wide"><table>{"".join(out)}</table></div>'


def _matrix(results: dict[str, Any]) -> str:
    if not results["matrix"]:
        return ""
    number = HEADINGS[numbers(results["summary"])[0]]
    said = f"Students trained on each kind of image with each kind of label: {number}."
    return f"<h2>The label matrix</h2>{_note(said)}{_table(matrix_table(results))}"


def _class_accuracies(material: Material, summary: dict[str, Any]) -> dict[str, list[float | None]]:
    """Series of the bar chart: students of the first net, plain networks, the teacher."""
    net = material.student["net"]
    cells = {(e["set"], e["labels"], e["net"]): e for e in summary["students"]}
    wanted = [(s, labels_of(s, summary)) for s in ("distilled", "random")]
    wanted += [("full", "online"), ("full", "hard")]
    out = {SHOWN[s]: cells[s, y, net]["per_class"] for s, y in wanted if (s, y, net) in cells}
    named = [(e["title"], e) for e in summary.get("plain", [])]
    named += [(t, e) for t, e in summary["experts"].items() if t == "teacher"]
    return out | {title: e["per_class"] for title, e in named if e.get("per_class")}


def _sheets(material: Material, split: ShardSplit) -> tuple[str, str]:
    """(heading, HTML) of real, initial (if there are such) and distilled images."""
    size = material.resolution
    order = np.argsort(-split.counts, kind="stable")
    every = np.unique(np.linspace(0, len(order) - 1, min(12, len(order))).astype(int))
    shown = [int(c) for c in order[every]]
    n = min(material.ipc, 8 if size <= 64 else 4)
    kinds = {"real": [_real(split, c, n, size) for c in shown]}
    for role in ("initial", "distilled"):
        folder = material.find(role)
        if folder is not None:
            kept = Distilled(folder, len(split.classes))
            kinds[role] = [_filled(np.asarray(kept.load(c)[:n]), n) for c in shown]
    names = ", ".join(f"{split.classes[c]} ({split.counts[c]})" for c in shown)
    note = f"A row a class, from head to tail: {names}. Left to right: {', '.join(kinds)}."
    scale = max(1, round(900 / (len(kinds) * n * (size + 2) + 20))) if size <= 64 else 1
    *first, last = kinds
    heading = f"{', '.join(first)} and {last} images".capitalize()
    return heading, _note(note) + contact_sheet(list(kinds.values()), scale)


def _real(split: ShardSplit, label: int, n: int, size: int) -> np.ndarray:
    members = np.flatnonzero(split.labels == label)[:n]
    images = [np.asarray(square(split.image(int(i)), size)).transpose(2, 0, 1) for i in members]
    return _filled(np.stack(images), n)


def _filled(images: np.ndarray, n: int) -> np.ndarray:
    """`n` images; blank ones where there are fewer."""
    missing = max(n - len(images), 0)
    return np.concatenate([images[:n], np.full((missing, *images.shape[1:]), 245, np.uint8)])


def _record(folder: Path) -> dict[str, Any]:
    return files.read_json(folder / "stage.json")


def _kind(record: dict[str, Any]) -> str:
    return record.get("kind") or record.get("stage") or ""


def _expert_losses(material: Material) -> dict[str, list[float]]:
    """The loss of each epoch of every expert of the run."""
    out = {}
    for name, folder in material.stages:
        if _kind(_record(folder)) == "experts":
            out[name] = [entry["loss"] for entry in files.read_json(folder / "log.json")]
    return out


def _student_losses(material: Material, results: dict[str, Any]) -> dict[str, Sequence[float]]:
    """The first seed's students of the first net: the configured labels, and the whole set."""
    net, summary = material.student["net"], results["summary"]
    records = results["loss_curves"]
    first = min((r["seed"] for r in records), default=0)
    shown = [
        r
        for r in records
        if r["seed"] == first
        and r["net"] == net
        and (r["set"] in WHOLE_SETS or r["labels"] == labels_of(r["set"], summary))
    ]
    return {f"{r['set']} {r['labels']} {r['net']}": r["loss"] for r in shown}


def _stages(material: Material, summary: dict[str, Any]) -> str:
    """Rows of the table of stages; all students share one."""
    rows: dict[str, list[str]] = {}
    seconds, num_students = 0.0, 0
    for name, folder in material.stages:
        record = _record(folder)
        if _kind(record) == "student":
            seconds, num_students = seconds + record["seconds"], num_students + 1
            cells = f"{num_students} students in {len(summary['students'])} cells"
            rows["students"] = ["students", f"{duration(seconds)} of one rank", "", cells]
            continue
        facts = ", ".join(f"{k} {v}" for k, v in record["facts"].items())
        where = f"{record['ranks']} × {record['device']}"
        rows[name] = [name, duration(record["seconds"]), where, facts]
    return "".join(
        "<tr>" + "".join(f"<td class=t>{html.escape(str(c))}</td>" for c in row) + "</tr>"
        for row in rows.values()
    )
