"""Sweeps: a grid of settings over one config, as one campaign, with one table in the end."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ltdd_scale.config import load as configuration
from ltdd_scale.errors import UserError
from ltdd_scale.launch import campaign
from ltdd_scale.launch.campaign import Campaign
from ltdd_scale.launch.jobs import Job, Summary
from ltdd_scale.launch.states import last_error
from ltdd_scale.publish.tables import HEADINGS, cell, markdown, numbers
from ltdd_scale.results import NUMBERS, WHOLE_SETS
from ltdd_scale.runtime import files

KINDS = {
    "config": str,
    "set": dict,
    "grid": dict,
    "points": list,
    "max_jobs": int,
    "published": list,
}
# What stands beside the distilled set in a sweep's table: key → heading.
BESIDE = {
    "random": "random real",
    "full": "whole set",
    "plain": "plain, logit-adjusted",
    "teacher": "teacher",
}
SPREADS = ("class_std", "many", "medium", "few")


@dataclass
class Sweep:
    """`points`: name → settings laid over the config, in the file's order."""

    name: str
    config: Path
    points: dict[str, dict[str, Any]]
    max_jobs: int = 0
    published: list[dict[str, Any]] = field(default_factory=list)
    common: dict[str, Any] = field(default_factory=dict)

    def load_points(self, sets: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
        """The configs of the points, and why others have none: one bad point does not stop its
        neighbours."""
        good, bad = {}, {}
        for name, settings in self.points.items():
            try:
                texts = [f"{k}={_in_a_line(v)}" for k, v in {**self.common, **settings}.items()]
                good[name] = configuration.load(self.config, [*texts, *sets])
            except UserError as error:
                bad[name] = str(error)
        return good, bad


def _in_a_line(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=float("inf")).splitlines()[0]


def point_name(settings: Mapping[str, Any]) -> str:
    """``data.imbalance_factor=10,ipc=50`` as a name for folders and jobs:
    ``imbalance_factor10-ipc50``."""
    parts = (f"{k.split('.')[-1]}{v}" for k, v in settings.items())
    return re.sub(r"[^A-Za-z0-9_.+-]+", "", "-".join(parts)) or "all"


def load(path: Path) -> Sweep:
    """Read a sweep file. Raises `UserError` where it is not one.

    ``config``: the config that all points start from; ``set``: settings of all; ``grid``: setting →
    values, all combinations; ``points``: single points, each its settings; ``max_jobs``: jobs at a
    time; ``published``: numbers to show beside ours, each with ``where`` (the settings it is for).
    """
    values = _read(path)
    points: dict[str, dict[str, Any]] = {}
    for settings in [*_grid(path, values.get("grid", {})), *values.get("points", [])]:
        settings = dict(settings)
        name = str(settings.pop("name", "")) or point_name(settings)
        if name in points:
            raise UserError(f"{path}: two points are called {name}: give them a 'name'")
        points[name] = settings
    if not points:
        raise UserError(f"{path}: neither 'grid' nor 'points' has a point")
    return Sweep(
        name=path.stem,
        config=(path.parent / values["config"]).resolve(),
        points=points,
        max_jobs=values.get("max_jobs", 0),
        published=values.get("published", []),
        common=values.get("set", {}),
    )


def _read(path: Path) -> dict[str, Any]:
    """The file's values, each of its kind."""
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise UserError(f"cannot read the sweep {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or "config" not in values or set(values) - set(KINDS):
        got = ", ".join(map(str, values)) if isinstance(values, dict) else repr(values)
        raise UserError(
            f"{path}: a sweep has the keys {', '.join(KINDS)}, 'config' at least; got {got}"
        )
    for key, kind in KINDS.items():
        if not isinstance(values.get(key, kind()), kind):
            raise UserError(f"{path}: {key}: expected a {kind.__name__}, got {values[key]!r}")
    for point in values.get("points", []):
        if not isinstance(point, dict):
            raise UserError(f"{path}: points: expected settings, got {point!r}")
    return values


def _grid(path: Path, grid: dict[str, Any]) -> list[dict[str, Any]]:
    """All combinations."""
    for key, choices in grid.items():
        if not isinstance(choices, list) or not choices:
            raise UserError(f"{path}: grid.{key}: expected a list of values, got {choices!r}")
    combinations = itertools.product(*grid.values()) if grid else []
    return [dict(zip(grid, combination, strict=True)) for combination in combinations]


def write(sweep: Sweep, made: Campaign, out: Path, why: Callable[[Job], str]) -> str:
    """Write ``results.json`` and ``sweep.md``: one table of all points, with published numbers, and
    one of the means over seeds. Return the text.

    `why(job)`: the last error of a job, or nothing.
    """
    found: dict[str, dict[str, Any]] = {}
    missing: list[str] = []
    summaries = []
    for name, settings in sweep.points.items():
        folder = next((p.out for p in made.points if p.name == name), None)
        if folder is not None and (folder / "results.json").exists():
            summary = files.read_json(folder / "results.json")["summary"]
            summaries.append(summary)
            found[name] = {"settings": settings, **_numbers_of(summary)}
        else:
            missing.append(f"- **{name}**: {_why_missing(made, name, why)}")
    # One point that is judged on images that are not balanced decides for all.
    unbalanced = [s for s in summaries if not s.get("balanced_test", True)]
    shown = numbers((unbalanced or summaries or [{}])[0])[:2]
    text = _page(sweep, found, missing, shown)
    files.write_json(out / "results.json", {"points": found, "missing": missing})
    files.write_text(out / "sweep.md", text)
    return text


def _numbers_of(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The numbers of each set with the configured labels, of the first net; of the plain network
    after logit adjustment; of the teacher, if there is one."""
    entries: dict[str, dict[str, Any]] = {}
    for e in summary["students"]:
        if e["labels"] == summary["labels"] or e["set"] in WHOLE_SETS:
            entries.setdefault(e["set"], e)
    for e in summary.get("plain", []):
        if e["title"].endswith("logit-adjusted"):
            entries.setdefault("plain", e)
    if "teacher" in summary["experts"]:
        entries["teacher"] = summary["experts"]["teacher"]
    kept = [*NUMBERS, *(f"{n}_std" for n in NUMBERS)]
    return {key: {n: e[n] for n in kept if n in e} for key, e in entries.items()}


def _why_missing(made: Campaign, name: str, why: Callable[[Job], str]) -> str:
    if name in made.refused:
        return f"not run: {made.refused[name]}"
    reason = next((e for j in made.jobs if j.point == name and (e := why(j))), "")
    return (
        f"not finished{': ' + reason if reason else ''}; `ltdd-scale logs {made.folder.parent} "
        f"{name}` says more"
    )


def _page(
    sweep: Sweep, found: dict[str, dict[str, Any]], missing: list[str], shown: list[str]
) -> str:
    """``sweep.md``. `shown`: top-1 and the mean over classes, the one that counts first."""
    first = shown[0]
    text = (
        f"# {sweep.name}\n\n{len(found)} of {len(sweep.points)} points, in per cent (mean ± "
        "standard deviation over students). Of what stands beside the distilled set: "
        f"{HEADINGS[first]}.\n\n"
    )
    if found:
        text += markdown(_rows(sweep, found, shown)) + "\n"
    over = _over_seeds(found, first)
    if over:
        means = "Means over `seed` (the whole run repeated, experts included)"
        text += f"\n{means}, {HEADINGS[first]}:\n\n{markdown(over)}\n"
    sources = sorted({str(r["source"]) for r in sweep.published if "source" in r})
    text += "".join(f"\nPublished: {s}.\n" for s in sources)
    if missing:
        text += "\nNot there:\n\n" + "\n".join(missing) + "\n"
    return text


def _rows(sweep: Sweep, found: dict[str, dict[str, Any]], shown: list[str]) -> list[list[str]]:
    own = [*shown, *SPREADS]
    heading = [f"distilled, {HEADINGS[shown[0]]}", *(HEADINGS[n] for n in own[1:])]
    rows = [["point", *heading, *BESIDE.values(), "published"]]
    for name, entry in found.items():
        settings = {**sweep.common, **entry["settings"]}
        published = [f"{r['method']} {r['top1']}" for r in sweep.published if _fits(r, settings)]
        cells = [cell(entry["distilled"], n) for n in own]
        beside = [cell(entry.get(key, {}), shown[0]) for key in BESIDE]
        rows.append([name, *cells, *beside, "; ".join(published) or "–"])
    return rows


def _fits(row: dict[str, Any], settings: dict[str, Any]) -> bool:
    return all(settings.get(k) == v for k, v in row.get("where", {}).items())


def _over_seeds(found: dict[str, dict[str, Any]], number: str) -> list[list[str]]:
    """Means over points that differ in ``seed`` alone, or nothing where there are none."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in found.values():
        if "seed" in entry["settings"]:
            others = {k: v for k, v in entry["settings"].items() if k != "seed"}
            groups.setdefault(point_name(others), []).append(entry)
    if not groups:
        return []
    shown = ("distilled", *BESIDE)
    rows = [["settings", "seeds", "distilled", *BESIDE.values()]]
    for name, entries in groups.items():
        values = [[e[key][number] for e in entries if key in e] for key in shown]
        rows.append([name, str(len(entries)), *map(_mean, values)])
    return rows


def _mean(values: list[float]) -> str:
    if not values:
        return "–"
    spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread}"


def write_summary(summary: Summary) -> int:
    """What a sweep's last job does: the table of all points, as they are on the disk."""
    out = Path(summary.out)
    made = campaign.load(out)
    cluster = made.open()
    print(write(load(Path(summary.file)), made, out, lambda j: last_error(made, cluster, j)))
    return 0
