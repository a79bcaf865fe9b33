"""The parts of a run, experts, synthesis and students: which stage belongs to which, and what each
took."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ltdd_scale import recipe
from ltdd_scale.launch.jobs import Point
from ltdd_scale.pipeline import graph, store
from ltdd_scale.stage import Stage

PARTS = ("experts", "synthesis", "students")
# A stage belongs to the part of the room that its code lives in. Sharding belongs to none: it is
# the same for all methods.
_ROOMS = {
    "experts": "experts",
    "methods": "synthesis",
    "labels": "students",
    "judging": "students",
}


def part_of(stage: Stage) -> str:
    """One of `PARTS`, or nothing."""
    names = stage.run.split(".")
    return _ROOMS.get(names[1], "") if len(names) > 1 else ""


@dataclass(frozen=True)
class Spent:
    """Seconds of cores or GPUs, summed over ranks; the largest peak of a rank's memory in MB, of
    the GPU where there is one; the devices."""

    seconds: float = 0.0
    peak_mb: int = 0
    devices: tuple[str, ...] = ()


def spent(point: Point, folder: Path) -> dict[str, Spent]:
    """What the distilled set of a point took: part → `Spent`, of "experts" and "synthesis".

    Experts are those that the set depends on: the teacher that labels it for students only is
    none of them. A part is left out where one of its stages is not in the store `folder`. The
    seconds of a stage that was interrupted are those since it last began.
    """
    distilled = recipe.roles(point.config).distilled
    out: dict[str, Spent] = {part: Spent() for part in PARTS[:2]}
    for name in graph.needed(point.nodes, [distilled]):
        node = point.nodes[name]
        part = part_of(node.stage)
        if part not in out:
            continue
        record = store.complete(node.folder(folder))
        if record is None:
            del out[part]
            continue
        peaks, before = record["peak_mb"], out[part]
        out[part] = Spent(
            before.seconds + record["seconds"] * record["ranks"],
            max(before.peak_mb, peaks.get("gpu", peaks.get("cpu", 0))),
            tuple(dict.fromkeys((*before.devices, record["device"]))),
        )
    return out
