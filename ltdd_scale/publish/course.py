"""How a run went: pictures of its losses and of when each stage ran."""

from __future__ import annotations

import calendar
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ltdd_scale.publish.kept import kept
from ltdd_scale.publish.material import Material
from ltdd_scale.publish.pictures import work
from ltdd_scale.publish.pictures.canvas import Picture
from ltdd_scale.results import CHOSEN, WHOLE_SETS, labels_of
from ltdd_scale.runtime import files

# Of a stage, by the kind of its folder; all others make the set.
PARTS = {
    "shard": "real images",
    "zca": "real images",
    "experts": "experts",
    "brought": "experts",
    "shared": "experts",
    "trajectory": "experts",
    "classifier": "experts",
    "relabel": "labels",
    "student": "students",
    "evaluate": "judging",
    "grouping": "judging",
    "embedding": "judging",
    "choose": "the choice",
}
TRIAL = "trial/"  # how names of stages of the choice's short students begin


def pictures(material: Material, results: Mapping[str, Any], net: str) -> list[Picture | None]:
    """`net`: the one whose students are shown."""
    return [losses(material, results, net), timeline(material)]


def kind_of(folder: Path) -> str:
    """The kind of the stage that made a folder."""
    record = files.read_json(folder / "stage.json")
    return record.get("kind") or record.get("stage") or ""


def losses(material: Material, results: Mapping[str, Any], net: str) -> Picture | None:
    panels = {
        "experts": _long_enough(_expert_losses(material)),
        "students": _long_enough(_student_losses(results, net)),
    }
    panels = {title: series for title, series in panels.items() if series}
    if not panels:
        return None
    said = "; ".join(
        f"{name} from {values[0]:.3g} to {values[-1]:.3g}"
        for series in panels.values()
        for name, values in series.items()
    )
    note = "Students: those of the first seed, with the labels of the result."
    return Picture("losses", "Losses", f"{said}.", work.losses(panels), note)


def _expert_losses(material: Material) -> dict[str, Sequence[float]]:
    """The loss of each epoch of every expert of the run."""
    out = {}
    for name, folder in material.stages:
        if kind_of(folder) == "experts" and (folder / "log.json").exists():
            out[name] = [entry["loss"] for entry in files.read_json(folder / "log.json")]
    return out


def _student_losses(results: Mapping[str, Any], net: str) -> dict[str, Sequence[float]]:
    """The first seed's students of the first net: the configured labels, and the whole set."""
    records = results["loss_curves"]
    first = min((r["seed"] for r in records), default=0)
    shown = [
        r
        for r in records
        if r["seed"] == first
        and r["net"] == net
        and (r["set"] in WHOLE_SETS or r["labels"] == labels_of(r["set"], results["summary"]))
    ]
    if kept(results["summary"]) in {r["set"] for r in shown}:  # one student stands for both
        shown = [r for r in shown if r["set"] != CHOSEN]
    return {f"{r['set']} {r['labels']}": r["loss"] for r in shown}


def timeline(material: Material) -> Picture | None:
    bars = []
    for name, folder in material.stages:
        record = files.read_json(folder / "stage.json")
        if "finished" not in record:
            return None
        end = calendar.timegm(time.strptime(record["finished"], "%Y-%m-%dT%H:%M:%SZ"))
        part = PARTS.get(kind_of(folder), "the method")
        part = PARTS["choose"] if name.startswith(TRIAL) else part
        seconds = record["seconds"]
        bars.append(work.Bar(name, part, end - seconds, end, record["ranks"]))
    if not bars:
        return None
    spent = sum((b.end - b.begin) * b.ranks for b in bars)
    return Picture(
        "timeline",
        "When each stage ran",
        f"{len(bars)} stages on at most {max(b.ranks for b in bars)} ranks each; "
        f"{spent:,.0f} seconds summed over ranks. The table of stages has the numbers.",
        work.timeline(bars),
        "Each row is a rank. A stage that an earlier run made stands at the time of that run. "
        "Of a stage that was interrupted, only the time after its last start is shown.",
    )


def _long_enough(series: Mapping[str, Sequence[float]]) -> dict[str, Sequence[float]]:
    return {name: values for name, values in series.items() if len(values) > 1}
