"""Result tables, and whether a run folder's report is up to date. What writes it is `export`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ltdd_scale import config as configuration
from ltdd_scale.config import Config
from ltdd_scale.runtime import files

VERSION = 1
SHOWN = {
    "distilled": "distilled",
    "initial": "initial (confident crops)",
    "random": "random real",
    "full": "whole long-tailed set",
}


def cell(entry: dict[str, Any], number: str) -> str:
    if entry.get(number) is None:
        return "–"
    spread = entry.get(f"{number}_std")
    return f"{entry[number]:.1f}" + (f" ± {spread:.1f}" if spread is not None else "")


def table(results: dict[str, Any]) -> str:
    """The Markdown result table: mean ± standard deviation over seeds, per cent."""
    summary = results["summary"]
    rows = [
        [
            "set",
            "labels",
            "net",
            "IPC",
            "top-1",
            "top-5",
            "std over classes",
            "many",
            "medium",
            "few",
            "seeds",
        ]
    ]
    order = {"distilled": 0, "initial": 1, "random": 2, "full": 3}
    kind = summary["labels"]
    shown = [
        e
        for e in summary["students"]
        if e["set"] == "full" or (e["labels"] == kind and e["set"] != "initial")
    ]
    for e in sorted(shown, key=lambda e: (e["net"], order[e["set"]])):
        rows.append(
            [
                SHOWN[e["set"]],
                e["labels"],
                e["net"],
                str(e["ipc"] or "–"),
                *(cell(e, n) for n in ("top1", "top5", "class_std", "many", "medium", "few")),
                str(e["num_seeds"]),
            ]
        )
    for role, e in summary["experts"].items():
        rows.append(
            [
                role,
                "–",
                e["net"],
                "–",
                *(cell(e, n) for n in ("top1", "top5", "class_std", "many", "medium", "few")),
                "1",
            ]
        )
    text = markdown(rows)
    if results["matrix"]:
        text += "\n\nThe label matrix (top-1):\n\n" + matrix_table(results)
    return text


def matrix_table(results: dict[str, Any]) -> str:
    """Images × labels, top-1 mean ± standard deviation over seeds."""
    cells = {(e["set"], e["labels"], e["net"]): e for e in results["summary"]["students"]}
    nets = sorted({k[2] for k in cells})
    kinds = ("online", "stored", "single", "hard")
    rows = [["images", *kinds, "net"]]
    for net in nets:
        for which in ("random", "initial", "distilled"):
            rows.append(
                [
                    SHOWN[which],
                    *(
                        cell(cells[which, y, net], "top1") if (which, y, net) in cells else "–"
                        for y in kinds
                    ),
                    net,
                ]
            )
    return markdown(rows)


def ablation_table(config: Config, rows: list[tuple[str, dict[str, Any]]]) -> str:
    """One line a variant: the distilled set's numbers."""
    out = [
        [
            "variant",
            "top-1",
            "std over classes",
            "many",
            "medium",
            "few",
            "teacher",
            "random real, same teacher",
        ]
    ]
    for title, results in rows:
        kind, cells = (
            results["summary"]["labels"],
            {(e["set"], e["labels"]): e for e in results["summary"]["students"]},
        )
        e, random = cells["distilled", kind], cells.get(("random", kind), {})
        teacher = results["summary"]["experts"]["teacher"]
        out.append(
            [
                title,
                *(cell(e, n) for n in ("top1", "class_std", "many", "medium", "few")),
                f"{teacher['top1']:.1f}",
                cell(random, "top1"),
            ]
        )
    kind = rows[0][1]["summary"]["labels"]
    return f"# Ablation of {config.name}\n\nIPC {config.ipc}, {kind} labels, {config.evaluate.seeds} seeds, {config.evaluate.split} images, per cent.\n\n{markdown(out)}\n"


def markdown(rows: list[list[str]]) -> str:
    widths = [max(len(r[k]) for r in rows) for k in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(v.ljust(w) for v, w in zip(r, widths, strict=True)) + " |" for r in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def damage(folder: Path) -> list[str]:
    """What of a distilled set is not as its ``files.json`` records."""
    wrong = []
    for name, digest in files.read_json(folder / "files.json").items():
        path = folder / name
        if not path.exists():
            wrong.append(f"{path}: missing")
        elif files.sha256(path) != digest:
            wrong.append(f"{path}: damaged (its hash does not match)")
    return wrong


def mark(config: Config, nodes: dict) -> str:
    """What a report was written for."""
    inputs = [nodes[n].fingerprint for n in ("evaluate", "recover", "relabel", "initialize")]
    return hashlib.sha256(
        json.dumps([VERSION, inputs, configuration.to_dict(config)]).encode()
    ).hexdigest()[:16]


def is_current(config: Config, nodes: dict, out: Path) -> bool:
    whole = (".report", "results.json", "results.md", "report.html", "distilled/files.json")
    return all((out / p).exists() for p in whole) and (out / ".report").read_text() == mark(
        config, nodes
    )
