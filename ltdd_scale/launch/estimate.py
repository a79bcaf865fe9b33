"""What a run should take: FLOPs over what a GPU is assumed to reach, and bytes on the disk.

An order of magnitude, not a promise.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ltdd_scale import recipe
from ltdd_scale.data import sources
from ltdd_scale.errors import UserError
from ltdd_scale.launch import limits, perform
from ltdd_scale.launch.jobs import Point
from ltdd_scale.stage import Cost, Facts


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
