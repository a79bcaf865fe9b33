"""Sweeps: a grid of settings over one config, as one campaign, with one report in the end."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ltdd_scale import config as configuration
from ltdd_scale import report
from ltdd_scale.config import Config
from ltdd_scale.errors import UserError
from ltdd_scale.launch import board
from ltdd_scale.launch.campaign import Campaign
from ltdd_scale.runtime import files

KEYS = ("config", "set", "grid", "points", "max_jobs", "published")


@dataclass
class Sweep:
    """`points`: name → settings laid over the config, in the file's order."""

    name: str
    config: Path
    points: dict[str, dict[str, Any]]
    max_jobs: int = 0
    published: list[dict[str, Any]] = field(default_factory=list)
    common: dict[str, Any] = field(default_factory=dict)

    def load_points(self, sets: list[str]) -> tuple[dict[str, Config], dict[str, str]]:
        """The configs of the points, and why others have none: one bad point does not stop its neighbours."""
        good, bad = {}, {}
        for name, settings in self.points.items():
            try:
                texts = [
                    f"{k}={yaml.safe_dump(v, default_flow_style=True).splitlines()[0]}"
                    for k, v in {**self.common, **settings}.items()
                ]
                good[name] = configuration.load(self.config, [*texts, *sets])
            except UserError as error:
                bad[name] = str(error)
        return good, bad


def point_name(settings: dict[str, Any]) -> str:
    """``imbalance_factor=10,ipc=50`` as a name for folders and jobs: ``imbalance_factor10-ipc50``."""
    parts = (f"{k.split('.')[-1]}{v}" for k, v in settings.items())
    return re.sub(r"[^A-Za-z0-9_.+-]+", "", "-".join(parts)) or "all"


def load(path: Path) -> Sweep:
    """Read a sweep file. Raises `UserError` where it is not one.

    ``config``: the config that all points start from; ``set``: settings of all; ``grid``: setting → values, all combinations; ``points``: single
    points, each its settings; ``max_jobs``: SLURM jobs at a time; ``published``: numbers to show beside ours, each with ``where`` (the settings it is for).
    """
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise UserError(f"cannot read the sweep {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or "config" not in values or set(values) - set(KEYS):
        raise UserError(
            f"{path}: a sweep has the keys {', '.join(KEYS)}, 'config' at least; got {', '.join(map(str, values)) if isinstance(values, dict) else values!r}"
        )
    kinds = {"set": dict, "grid": dict, "points": list, "max_jobs": int, "published": list}
    for key, kind in kinds.items():
        if not isinstance(values.get(key, kind()), kind):
            raise UserError(f"{path}: {key}: expected a {kind.__name__}, got {values[key]!r}")
    grid = values.get("grid", {})
    for key, choices in grid.items():
        if not isinstance(choices, list) or not choices:
            raise UserError(f"{path}: grid.{key}: expected a list of values, got {choices!r}")
    chosen = (
        [
            dict(zip(grid, combination, strict=True))
            for combination in itertools.product(*grid.values())
        ]
        if grid
        else []
    )
    chosen += [dict(p) for p in values.get("points", [])]
    points: dict[str, dict[str, Any]] = {}
    for settings in chosen:
        name = str(settings.pop("name", "")) or point_name(settings)
        if name in points:
            raise UserError(f"{path}: two points are called {name}: give them a 'name'")
        points[name] = settings
    if not points:
        raise UserError(f"{path}: neither 'grid' nor 'points' has a point")
    published = values.get("published", [])
    return Sweep(
        path.stem,
        (path.parent / values["config"]).resolve(),
        points,
        values.get("max_jobs", 0),
        published,
        values.get("set", {}),
    )


def _matches(row: dict[str, Any], settings: dict[str, Any]) -> bool:
    return all(settings.get(k) == v for k, v in row.get("where", {}).items())


def _distilled(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of each set the summary with the configured labels, of the first net."""
    summary = results["summary"]
    cells: dict[str, dict[str, Any]] = {}
    for e in summary["students"]:
        if e["labels"] == summary["labels"] or e["set"] == "full":
            cells.setdefault(e["set"], e)
    return {**cells, "teacher": summary["experts"]["teacher"]}


def write_report(sweep: Sweep, campaign: Campaign, out: Path) -> str:
    """Write ``results.json`` and ``sweep.md`` (one table of all points, one of the means over seeds, published numbers beside them); return the text."""
    rows = [
        [
            "point",
            "distilled",
            "spread over classes",
            "many",
            "medium",
            "few",
            "random real",
            "whole set",
            "teacher",
            "published",
        ]
    ]
    found: dict[str, Any] = {}
    missing = []
    for name, settings in sweep.points.items():
        folder = next((p.out for p in campaign.points if p.name == name), None)
        mine = {**sweep.common, **settings}
        beside = (
            "; ".join(f"{r['method']} {r['top1']}" for r in sweep.published if _matches(r, mine))
            or "–"
        )
        if name in campaign.refused:
            missing.append(f"- **{name}**: not run: {campaign.refused[name]}")
        elif folder is None or not (folder / "results.json").exists():
            reason = next(
                (
                    e
                    for j in campaign.jobs
                    if j.point == name and (e := board.last_error(campaign, j))
                ),
                "",
            )
            missing.append(
                f"- **{name}**: not finished{': ' + reason if reason else ''}; `ltdd-scale logs {campaign.folder.parent} {name}` says more"
            )
        else:
            cells = _distilled(files.read_json(folder / "results.json"))
            found[name] = {
                "settings": settings,
                **{
                    k: {
                        n: e.get(n)
                        for n in ("top1", "top1_std", "class_std", "many", "medium", "few")
                    }
                    for k, e in cells.items()
                },
            }
            d = cells["distilled"]
            others = [report.cell(cells.get(k, {}), "top1") for k in ("random", "full")]
            rows.append(
                [
                    name,
                    *(report.cell(d, n) for n in ("top1", "class_std", "many", "medium", "few")),
                    *others,
                    f"{cells['teacher']['top1']:.1f}",
                    beside,
                ]
            )
    text = f"# {sweep.name}\n\n{len(found)} of {len(sweep.points)} points, top-1 in per cent (mean ± standard deviation over students).\n\n"
    if found:
        text += report.markdown(rows) + "\n"
    over = _over_seeds(found)
    if over:
        text += f"\nMeans over `seed` (the whole run repeated, experts included):\n\n{report.markdown(over)}\n"
    notes = sorted({str(r["source"]) for r in sweep.published if "source" in r})
    text += "".join(f"\nPublished: {n}.\n" for n in notes)
    if missing:
        text += "\nNot there:\n\n" + "\n".join(missing) + "\n"
    files.write_json(out / "results.json", {"points": found, "missing": missing})
    files.write_text(out / "sweep.md", text)
    return text


def _over_seeds(found: dict[str, Any]) -> list[list[str]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in found.values():
        if "seed" in entry["settings"]:
            groups.setdefault(
                point_name({k: v for k, v in entry["settings"].items() if k != "seed"}), []
            ).append(entry)
    rows = [["settings", "seeds", "distilled", "random real", "teacher"]]
    for name, entries in groups.items():
        cells = []
        for which in ("distilled", "random", "teacher"):
            values = [e[which]["top1"] for e in entries if which in e]
            spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.1f}{spread}" if values else "–")
        rows.append([name, str(len(entries)), *cells])
    return rows if len(rows) > 1 else []
