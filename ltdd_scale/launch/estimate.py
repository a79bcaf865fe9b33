"""What a run should take: of arithmetic, decoding, and steps that wait for each other, the longest.

An order of magnitude, not a promise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ltdd_scale import recipe
from ltdd_scale.data import sources
from ltdd_scale.errors import UserError
from ltdd_scale.launch import limits, perform
from ltdd_scale.launch.devices import DECODED, Device
from ltdd_scale.launch.jobs import Point
from ltdd_scale.stage import Cost, Division, Facts, Stage

MESSAGE = 50e-6  # seconds of a small reduction, for each doubling of the ranks; assumed


def facts(point: Point, store: Path) -> Facts | None:
    """What is known of the point's set: of its shards or its source, else what the config expects.

    None where neither is here and the config does not say enough.
    """
    try:
        return perform.known_facts(point.config, point.source, store)
    except UserError:
        return sources.expected(point.config.data)


def all_facts(points: Iterable[Point], store: Path) -> dict[str, Facts | None]:
    """`facts` by the point's name; what points with the same images know is looked up once."""
    known: dict[str, Facts | None] = {}
    out = {}
    for point in points:
        shard = point.nodes[recipe.SHARD].where
        if shard not in known:
            known[shard] = facts(point, store)
        out[point.name] = known[shard]
    return out


def surprises(points: Iterable[Point], known: dict[str, Facts | None]) -> list[str]:
    """Where the images are others than the configs expect: a line each."""
    found = (
        sources.surprise(p.config.data, of) for p in points if (of := known[p.name]) is not None
    )
    return list(dict.fromkeys(line for line in found if line))


def costs(
    points: Iterable[Point], known: dict[str, Facts | None]
) -> dict[str, dict[str, Cost] | None]:
    """The cost of each node of each point: point → name of the node → cost.

    A point of which nothing is known has None.
    """
    seen: dict[str, Cost] = {}  # by folder: points share most of what they do
    out: dict[str, dict[str, Cost] | None] = {}
    for point in points:
        of = known[point.name]
        if of is None:
            out[point.name] = None
            continue
        nodes = point.nodes
        new = limits.costs((n for n in nodes.values() if n.where not in seen), of)
        seen |= {nodes[name].where: cost for name, cost in new.items()}
        out[point.name] = {n: seen[node.where] for n, node in nodes.items() if node.where in seen}
    return out


@dataclass(frozen=True)
class Taken:
    """Seconds of a stage, and what they are bound by."""

    seconds: float = 0.0
    bound: str = ""


def taken(cost: Cost, stage: Stage, device: Device, number: float = 1, cores: int = 1) -> Taken:
    """What a stage takes on `number` devices with `cores` cores each.

    Ranks that train one network together share each step out, and wait for each other. Chunks and
    students are dealt: their steps do not wait for those of others, and the last round of chunks
    may leave devices idle.
    """
    together = stage.division is Division.RANKS
    number = 1 if stage.division in (Division.ONE, Division.UNITS) else number
    if cost.pieces:
        number = cost.pieces / math.ceil(cost.pieces / number)
    kept = device.together if together and number > 1 else 1.0
    parts = {
        "arithmetic": cost.flops / (device.flops * kept * number),
        "decoding": cost.decodes / (DECODED * cores * number),
        "steps": cost.steps * device.step / (1 if together else number),
    }
    bound = max(parts, key=lambda name: parts[name])
    met = cost.meetings * MESSAGE * math.log2(number) if together else 0.0
    if bound == "arithmetic" and met > parts[bound]:
        bound = "BatchNorm over ranks"
    return Taken(max(parts["arithmetic"] + met, *parts.values()), bound)


def of_many(each: Iterable[Taken], number: int) -> Taken:
    """Several stages that `number` devices take one after the other, each by itself."""
    each = list(each)
    longest = max(each, key=lambda one: one.seconds, default=Taken())
    seconds = max(longest.seconds, sum(one.seconds for one in each) / number)
    return Taken(seconds, longest.bound)
