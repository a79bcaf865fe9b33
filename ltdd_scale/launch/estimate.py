"""What a run should take: FLOPs over what a GPU is assumed to reach, and bytes on the disk.

An order of magnitude, not a promise.
"""

from __future__ import annotations

from pathlib import Path

from ltdd_scale.errors import UserError
from ltdd_scale.launch import limits, perform
from ltdd_scale.launch.jobs import Point
from ltdd_scale.stage import Cost, Facts


def facts(point: Point, store: Path) -> Facts | None:
    """What is known of the point's set; None where neither its shards nor its source are here."""
    try:
        return perform.known_facts(point.config, point.source, store)
    except UserError:
        return None


def costs(point: Point, store: Path) -> dict[str, Cost] | None:
    """The cost of each job of a run, by the name of its stage; None where nothing is known of the
    set yet: neither its shards nor its source can be read here."""
    known = facts(point, store)
    if known is None:
        return None
    out: dict[str, Cost] = {}
    for name, cost in limits.costs(point.nodes.values(), known).items():
        job = point.nodes[name].stage.job
        so_far = out.get(job, Cost())
        out[job] = Cost(
            flops=so_far.flops + cost.flops,
            memory=max(so_far.memory, cost.memory),
            activations=max(so_far.activations, cost.activations),
            batch=max(so_far.batch, cost.batch),
            disk=so_far.disk + cost.disk,
        )
    return out
