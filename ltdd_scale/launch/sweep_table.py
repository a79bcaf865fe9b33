"""The tables of a sweep: all points beside published numbers, images × labels or sets × all that
was judged, what it took."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ltdd_scale.launch import campaign, sweep_matrix, sweep_pictures, sweep_sets, sweep_stages
from ltdd_scale.launch.campaign import Campaign
from ltdd_scale.launch.jobs import Job, Summary
from ltdd_scale.launch.parts import Spent, spent
from ltdd_scale.launch.states import last_error
from ltdd_scale.launch.sweep import Published, Sweep, load, point_name
from ltdd_scale.publish.tables import HEADINGS, cell, markdown, numbers
from ltdd_scale.results import (
    CHOSEN,
    LABELLERS,
    NUMBERS,
    RANDOM_PLAIN,
    RANDOM_PLAIN_TITLE,
    WHOLE_SETS,
    labels_of,
)
from ltdd_scale.runtime import files

# What stands beside the distilled set in a sweep's table: key → heading.
BESIDE = {
    CHOSEN: "chosen",
    "random": "random real",
    "random_plain": RANDOM_PLAIN_TITLE,
    "full": "whole set",
    "plain": "plain, logit-adjusted",
    "teacher": "teacher",
}
SOMETIMES = (CHOSEN, "random_plain")  # of them: no column where no point has it
SPREADS = ("class_std", "many", "medium", "few")


@dataclass(frozen=True)
class Finished:
    """A point whose results are there. `settings` are the point's own, `numbers` those of each set
    with the configured labels, `spent` what the parts of its method took."""

    name: str
    settings: Mapping[str, Any]
    config: Any
    summary: Mapping[str, Any]
    numbers: Mapping[str, Mapping[str, Any]]
    spent: Mapping[str, Spent]

    def to_dict(self) -> dict[str, Any]:
        took = {part: dataclasses.asdict(s) for part, s in self.spent.items()}
        return {"settings": dict(self.settings), **self.numbers, "spent": took}


def write(sweep: Sweep, made: Campaign, out: Path, why: Callable[[Job], str]) -> str:
    """Write ``results.json`` and ``sweep.md``, and return its text.

    Tables of all points with published numbers; of images × labels, where points have several kinds
    of labels or of networks; of means over seeds; of all pairs of two stages. Pictures, where
    points differ in IPC or imbalance factor. Points of several data sets share no row of images and
    no curve: they have a column each in one table instead (`sweep_sets`).

    `why(job)`: the last error of a job, or nothing.
    """
    found: list[Finished] = []
    missing: list[str] = []
    pairs: dict[str, list[dict[str, Any]]] = {}
    points = {p.name: p for p in made.points}
    for name, settings in sweep.points.items():
        point = points.get(name)
        if point is None or not (point.out / "results.json").exists():
            missing.append(f"- **{name}**: {_why_missing(made, name, why)}")
            continue
        results = files.read_json(point.out / "results.json")
        summary, pairs[name] = results["summary"], results.get("two_stage", {}).get("rows", [])
        took = spent(point, made.store)
        own = _numbers_of(summary)
        found.append(Finished(name, settings, point.config, summary, own, took))
    # One point that is judged on images that are not balanced decides for all.
    summaries = [f.summary for f in found]
    unbalanced = [s for s in summaries if not s.get("balanced_test", True)]
    shown = numbers(dict((unbalanced or summaries or [{}])[0]))[:2]
    apart = sweep_sets.differ(p.source for p in made.points)
    text = _page(sweep, found, missing, shown, apart)
    text += sweep_stages.table(found, pairs, sweep.published, shown[0])
    features = {
        f.name: node.folder(made.store)
        for f in found
        if (node := points[f.name].nodes.get("embedding"))
    }
    text += sweep_pictures.write(found, sweep.published, features, shown[0], out, curves=not apart)
    record = {"points": {f.name: f.to_dict() for f in found}, "missing": missing}
    files.write_json(out / "results.json", record)
    files.write_text(out / "sweep.md", text)
    return text


def _numbers_of(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The numbers of each set with the configured labels, of the first net; of random real images
    with classes, where these are not the same; of the plain network after logit adjustment; of the
    teacher, if there is one: of teacher and observer where both label together."""
    entries: dict[str, dict[str, Any]] = {}
    for e in summary["students"]:
        if e["set"] in WHOLE_SETS or e["labels"] == labels_of(e["set"], summary):
            entries.setdefault(e["set"], e)
        elif (e["set"], e["labels"]) == RANDOM_PLAIN:
            entries.setdefault("random_plain", e)
    for e in summary.get("plain", []):
        if e["title"].endswith("logit-adjusted"):
            entries.setdefault("plain", e)
    for title in LABELLERS:
        if title in summary["experts"]:
            entries.setdefault("teacher", summary["experts"][title])
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
    sweep: Sweep, found: list[Finished], missing: list[str], shown: list[str], apart: bool
) -> str:
    """``sweep.md``. `shown`: top-1 and the mean over classes, the one that counts first. `apart`:
    points have different data sets."""
    first = shown[0]
    text = (
        f"# {sweep.name}\n\n{len(found)} of {len(sweep.points)} points, in per cent (mean ± "
        "standard deviation over students). Of what stands beside the distilled set: "
        f"{HEADINGS[first]}.\n\n"
    )
    if found:
        text += markdown(_rows(sweep, found, shown)) + "\n"
    if apart:
        text += sweep_sets.tables(found)
    else:
        text += sweep_matrix.tables(found, sweep.published, first)
    text += _costs(sweep.published, found)
    over = _over_seeds(found, first)
    if over:
        means = "Means over `seed` (the whole run repeated, experts included)"
        text += f"\n{means}, {HEADINGS[first]}:\n\n{markdown(over)}\n"
    sources = dict.fromkeys(r.source for r in sweep.published if r.source)
    text += "".join(f"\nPublished: {s}.\n" for s in sources)
    if missing:
        text += "\nNot there:\n\n" + "\n".join(missing) + "\n"
    return text


def _rows(sweep: Sweep, found: list[Finished], shown: list[str]) -> list[list[str]]:
    own, there = [*shown, *SPREADS], _beside(found)
    heading = [f"distilled, {HEADINGS[shown[0]]}", *(HEADINGS[n] for n in own[1:])]
    rows = [["point", *heading, *there.values(), "published"]]
    for point in found:
        net = point.config.evaluate.nets[0]
        published = [
            f"{r.method} {r.top1:g}"
            for r in sweep.published
            if r.top1 is not None and r.net in ("", net) and r.fits(point.config)
        ]
        cells = [cell(dict(point.numbers["distilled"]), n) for n in own]
        beside = [cell(dict(point.numbers.get(key, {})), shown[0]) for key in there]
        rows.append([point.name, *cells, *beside, "; ".join(published) or "–"])
    return rows


def _beside(found: Sequence[Finished]) -> dict[str, str]:
    """The columns of `BESIDE` that a table of these points has."""
    some = {key for point in found for key in point.numbers}
    return {key: title for key, title in BESIDE.items() if key not in SOMETIMES or key in some}


def _costs(published: Sequence[Published], found: list[Finished]) -> str:
    """What the set of each point took, beside what was published; nothing where it is not known."""
    rows = [["point", *sweep_matrix.SPENT, "on", "published: experts, synthesis"]]
    for point in found:
        said = [
            f"{r.method} {_seconds(r.experts)}, {_seconds(r.synthesis)}"
            for r in published
            if (r.experts is not None or r.synthesis is not None) and r.fits(point.config)
        ]
        devices = dict.fromkeys(d for s in point.spent.values() for d in s.devices)
        took = sweep_matrix.spent_cells(point.spent)
        rows.append([point.name, *took, ", ".join(devices) or "–", "; ".join(said) or "–"])
    if all(row[1:5] == ["–"] * 4 for row in rows[1:]):
        return ""
    return (
        "\nWhat the distilled sets took: seconds of cores or GPUs, summed over ranks (of a stage "
        "that was interrupted: since it last began), and the largest peak memory of a rank. "
        f"Networks that only label or judge a set are left out.\n\n{markdown(rows)}\n"
    )


def _seconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds:,.0f} s"


def _over_seeds(found: list[Finished], number: str) -> list[list[str]]:
    """Means over points that differ in ``seed`` alone, or nothing where there are none."""
    groups: dict[str, list[Finished]] = {}
    several = len({point.config.name for point in found}) > 1
    for point in found:
        if "seed" in point.settings:
            others = {k: v for k, v in point.settings.items() if k != "seed"}
            name = f"{point.config.name} {point_name(others)}" if several else point_name(others)
            groups.setdefault(name, []).append(point)
    if not groups:
        return []
    there = _beside(found)
    shown = ("distilled", *there)
    rows = [["settings", "seeds", "distilled", *there.values()]]
    for name, members in groups.items():
        values = [[m.numbers[k][number] for m in members if k in m.numbers] for k in shown]
        rows.append([name, str(len(members)), *map(_mean, values)])
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
