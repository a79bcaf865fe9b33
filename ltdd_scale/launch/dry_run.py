"""What ``--dry-run`` prints: GPU-hours of each point, the jobs that are left, what each runs."""

from __future__ import annotations

import sys

from ltdd_scale import __version__
from ltdd_scale.launch import campaign, estimate
from ltdd_scale.launch.campaign import Campaign
from ltdd_scale.launch.jobs import Job
from ltdd_scale.launch.parts import PARTS, part_of
from ltdd_scale.launch.profile import Profile
from ltdd_scale.pipeline import store
from ltdd_scale.publish.tables import markdown
from ltdd_scale.runtime.progress import duration
from ltdd_scale.stage import Cost

HOUR = 3600.0
Costs = dict[str, dict[str, Cost] | None]


def show(made: Campaign, wants: Profile, max_jobs: int, absent: set[str]) -> int:
    """Print it and return the exit code. `absent`: points whose images are not here."""
    known = estimate.all_facts(made.points, made.store)
    for line in estimate.surprises(made.points, known):
        print(f"warning: {line}", file=sys.stderr)
    costs = estimate.costs(made.points, known)
    flops = wants.tflops * 1e12
    scripts = campaign.describe(made, wants, max_jobs)
    print(
        f"{made.name}: {len(scripts)} of {len(made.jobs)} jobs are left "
        f"(ltdd_scale {__version__})\n"
    )
    if any(costs.values()):
        print(f"GPU-hours of each point, were it alone:\n\n{_table(made, costs, flops)}\n")
    spent = _jobs(made, scripts, costs, flops)
    for name, text in scripts.items():
        print(f"\n# ---- {name}\n{text.rstrip()}")
    if spent:
        print(
            f"\nestimated: {_duration(spent)} in all, at an assumed {wants.tflops:g} TFLOP/s a GPU "
            "(tflops in the profile; networks on small images reach far less); decoding and "
            "waiting are not counted"
        )
    if absent:
        few = f" of {len(absent)} points" if len(made.points) > 1 else ""
        print(
            f"\nthe images{few} are not here: estimated from what the config expects "
            "(data.expected_…); nothing can be run like this"
        )
    _say_unknown(made, costs)
    for name, why in made.refused.items():
        print(f"point {name} is refused: {why}")
    return 1 if made.refused else 0


def _say_unknown(made: Campaign, costs: Costs) -> None:
    unknown = sorted(p or made.name for p, c in costs.items() if c is None)
    if unknown:
        print(
            f"\nno estimate for {', '.join(unknown)}: the images or their list are not found here "
            "(data.path, data.train_list)"
        )


def _table(made: Campaign, costs: Costs, flops: float) -> str:
    """GPU-hours of each point by part, and of all with what they share counted once."""
    everything: dict[str, tuple[str, float]] = {}  # folder → part and FLOPs
    rows = [["point", *PARTS, "all"]]
    for point in made.points:
        of = costs[point.name]
        if of is None:
            continue
        nodes = point.nodes
        mine = {nodes[n].where: (part_of(nodes[n].stage), c.flops) for n, c in of.items()}
        everything |= mine
        rows.append([point.name or made.name, *_by_part(mine, flops)])
    if len(rows) > 2:
        rows.append(["all, shared once", *_by_part(everything, flops)])
    return markdown(rows)


def _by_part(folders: dict[str, tuple[str, float]], flops: float) -> list[str]:
    hours = {
        part: sum(f for p, f in folders.values() if p == part) / flops / HOUR for part in PARTS
    }
    return [_hours(h) for h in (*hours.values(), sum(hours.values()))]


def _hours(hours: float) -> str:
    if hours == 0:
        return "–"
    digits = 0 if hours >= 100 else 1 if hours >= 10 else 2 if hours >= 1 else 3
    return f"{hours:.{digits}f}" if hours >= 0.0005 else "< 0.001"


def _jobs(made: Campaign, scripts: dict[str, str], costs: Costs, flops: float) -> float:
    """A line a job; return the seconds of a GPU in all. `flops`: what a GPU reaches, a second.

    A folder counts for the first job that makes it, and not at all once it is there.
    """
    left: dict[str, float] = {}
    for point in made.points:
        for name, cost in (costs[point.name] or {}).items():
            if not store.complete(point.nodes[name].folder(made.store)):
                left[point.nodes[name].where] = cost.flops
    spent = 0.0
    for job in made.jobs:
        if job.name not in scripts:
            continue
        seconds = sum(left.pop(folder, 0.0) for folder in job.nodes) / flops
        spent += seconds
        print(_line(job, scripts, seconds))
    return spent


def _line(job: Job, scripts: dict[str, str], seconds: float) -> str:
    many = f" × {job.elements}" if job.elements > 1 else ""
    needs = [n for n in job.needs if n in scripts]
    after = f"   after {', '.join(needs)}" if needs else ""
    about = f"   about {_duration(seconds)}" if seconds else ""
    return f"{job.name}{many}{after}{about}"


def _duration(seconds: float) -> str:
    if seconds >= 360:
        return f"{seconds / HOUR:.1f} GPU-hours"
    return f"{duration(seconds)} of a GPU"
