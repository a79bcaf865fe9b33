"""What ``--dry-run`` prints: device-hours of each point, the jobs that are left, what each takes
and is bound by, and how long all of it takes on more devices."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass

from ltdd_scale import __version__
from ltdd_scale.launch import campaign, devices, estimate
from ltdd_scale.launch.campaign import Campaign
from ltdd_scale.launch.devices import Device
from ltdd_scale.launch.estimate import Taken
from ltdd_scale.launch.jobs import Job
from ltdd_scale.launch.parts import PARTS, part_of
from ltdd_scale.launch.profile import Profile
from ltdd_scale.pipeline import store
from ltdd_scale.pipeline.graph import Node
from ltdd_scale.publish.tables import markdown
from ltdd_scale.runtime.progress import duration
from ltdd_scale.stage import Cost, Division

HOUR = 3600.0
NUMBERS = (1, 2, 4, 8, 16, 32, 64)  # devices, in the last table
Costs = dict[str, dict[str, Cost] | None]


@dataclass(frozen=True)
class Work:
    """A folder of the store that is left to be made, and its cost."""

    node: Node
    cost: Cost


def show(made: Campaign, wants: Profile, max_jobs: int, absent: set[str]) -> int:
    """Print it and return the exit code. `absent`: points whose images are not here."""
    known = estimate.all_facts(made.points, made.store)
    for line in estimate.surprises(made.points, known):
        print(f"warning: {line}", file=sys.stderr)
    costs = estimate.costs(made.points, known)
    scripts = campaign.describe(made, wants, max_jobs)
    print(
        f"{made.name}: {len(scripts)} of {len(made.jobs)} jobs are left "
        f"(ltdd_scale {__version__})\n"
    )
    device, cores = devices.of(wants, made.cluster == "local"), wants.cpus_per_task
    if any(costs.values()):
        unit, table = _unit(device), _table(made, costs, device, cores)
        print(f"{unit[:1].upper()}{unit[1:]}-hours of each point, were it alone:\n\n{table}\n")
    left = _left(made, costs)
    work = {job.name: [left.pop(n) for n in job.nodes if n in left] for job in made.jobs}
    for job in made.jobs:
        if job.name in scripts:
            print(_line(job, scripts, work[job.name], device))
    for name, text in scripts.items():
        print(f"\n# ---- {name}\n{text.rstrip()}")
    if any(work[name] for name in scripts):
        _say_all([work[name] for name in scripts], device, cores)
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


def _unit(device: Device) -> str:
    return "core" if device.name == "cpu" else "GPU"


def _table(made: Campaign, costs: Costs, device: Device, cores: int) -> str:
    """Hours of one device of each point by part, and of all with what they share counted once."""
    everything: dict[str, tuple[str, float]] = {}  # folder → part and seconds
    rows = [["point", *PARTS, "all"]]
    for point in made.points:
        of = costs[point.name]
        if of is None:
            continue
        mine = {}
        for name, cost in of.items():
            node = point.nodes[name]
            seconds = estimate.taken(cost, node.stage, device, 1, cores).seconds
            mine[node.where] = part_of(node.stage), seconds
        everything |= mine
        rows.append([point.name or made.name, *_by_part(mine)])
    if len(rows) > 2:
        rows.append(["all, shared once", *_by_part(everything)])
    return markdown(rows)


def _by_part(folders: dict[str, tuple[str, float]]) -> list[str]:
    hours = {part: sum(s for p, s in folders.values() if p == part) / HOUR for part in PARTS}
    return [_hours(h) for h in (*hours.values(), sum(hours.values()))]


def _hours(hours: float) -> str:
    if hours == 0:
        return "–"
    digits = 0 if hours >= 100 else 1 if hours >= 10 else 2 if hours >= 1 else 3
    return f"{hours:.{digits}f}" if hours >= 0.0005 else "< 0.001"


def _left(made: Campaign, costs: Costs) -> dict[str, Work]:
    """What is left to be made: folder → `Work`. It counts for the first job that makes it."""
    left: dict[str, Work] = {}
    for point in made.points:
        for name, cost in (costs[point.name] or {}).items():
            node = point.nodes[name]
            if not store.complete(node.folder(made.store)):
                left[node.where] = Work(node, cost)
    return left


def _takes(work: Iterable[Work], device: Device, number: int, cores: int) -> Taken:
    """What the work of a job takes on `number` devices."""
    alone, dealt = [], []
    for one in work:
        found = estimate.taken(one.cost, one.node.stage, device, number, cores)
        (dealt if one.node.stage.division is Division.UNITS else alone).append(found)
    every = [*alone, estimate.of_many(dealt, number)]
    longest = max(every, key=lambda found: found.seconds)
    return Taken(sum(found.seconds for found in every), longest.bound)


def _line(job: Job, scripts: dict[str, str], work: list[Work], device: Device) -> str:
    many = f" × {job.elements}" if job.elements > 1 else ""
    needs = [n for n in job.needs if n in scripts]
    after = f"   after {', '.join(needs)}" if needs else ""
    number = job.elements * job.wants.nodes * job.wants.tasks_per_node
    found = _takes(work, device, number, job.wants.cpus_per_task) if work else Taken()
    if not found.seconds:
        return f"{job.name}{many}{after}"
    on = f" on {number} {_unit(device)}s" if number > 1 else ""
    return f"{job.name}{many}{after}   about {duration(found.seconds)}{on} ({found.bound})"


def _say_all(work: list[list[Work]], device: Device, cores: int) -> None:
    """How long all jobs take one after the other, on more and more devices."""
    unit, rows = _unit(device), [["", "time", "hours of all", "bound by"]]
    for number in NUMBERS:
        found = [_takes(of, device, number, cores) for of in work if of]
        seconds = sum(one.seconds for one in found)
        longest = max(found, key=lambda one: one.seconds)
        many = f"{number} {unit}{'s' * (number > 1)}"
        rows.append([many, duration(seconds), _hours(seconds * number / HOUR), longest.bound])
    print(
        f"\nestimated, one job after the other:\n\n{markdown(rows)}\n\n"
        f"{device.name}: {device.flops / 1e12:.3g} TFLOP/s ({device.source}); "
        f"{estimate.DECODED:.0f} images a second and core, {cores} a {unit}. "
        "The queue and preemptions are not counted."
    )
