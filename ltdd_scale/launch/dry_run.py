"""What ``--dry-run`` prints: device-hours of each point, the jobs that are left, what each takes
and is bound by, and how long all of it takes on more devices."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass

from ltdd_scale import __version__
from ltdd_scale.launch import campaign, deadline, devices, estimate
from ltdd_scale.launch.campaign import Campaign
from ltdd_scale.launch.deadline import NUMBERS, Kind
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
Costs = dict[str, dict[str, Cost] | None]


@dataclass(frozen=True)
class Work:
    """A folder of the store that is left to be made, and its cost."""

    node: Node
    cost: Cost


@dataclass(frozen=True)
class Machine:
    """What jobs run on. `cores` of each device; `lost`: the share of a job's time that it waits,
    preempted, on top of the time that it runs."""

    device: Device
    cores: int
    lost: float

    @property
    def unit(self) -> str:
        return "core" if self.device.name == "cpu" else "GPU"


def show(
    made: Campaign,
    wants: Profile,
    max_jobs: int,
    absent: set[str],
    hours: float | None = None,
) -> int:
    """Print it and return the exit code. `absent`: points whose images are not here. `hours`: what
    is cheapest by this deadline is said too."""
    known = estimate.all_facts(made.points, made.store)
    for line in estimate.surprises(made.points, known):
        print(f"warning: {line}", file=sys.stderr)
    costs = estimate.costs(made.points, known)
    scripts = campaign.describe(made, wants, max_jobs)
    print(
        f"{made.name}: {len(scripts)} of {len(made.jobs)} jobs are left "
        f"(ltdd_scale {__version__})\n"
    )
    sets = {of for of in known.values() if of is not None}
    if len(sets) == 1:
        (of,) = sets
        print(
            f"the set: {of.num_classes} classes, {of.num_images:,} training images "
            f"({max(of.counts):,} … {min(of.counts):,} a class), {of.judged:,} to be tested on\n"
        )
    on = _machine(made, wants)
    if any(costs.values()):
        unit, table = on.unit, _table(made, costs, on)
        print(f"{unit[:1].upper()}{unit[1:]}-hours of each point, were it alone:\n\n{table}\n")
    left = _left(made, costs)
    work = {job.name: [left.pop(n) for n in job.nodes if n in left] for job in made.jobs}
    for job in made.jobs:
        if job.name in scripts:
            print(_line(job, scripts, work[job.name], on))
    if made.open().detached:  # on this machine a job is a line of the list above
        for name, text in scripts.items():
            print(f"\n# ---- {name}\n{text.rstrip()}")
    if any(work[name] for name in scripts):
        _say_all([work[name] for name in scripts], on)
        if hours is not None:
            left_jobs = [job for job in made.jobs if job.name in scripts]
            _say_cheapest(left_jobs, work, wants, on, hours)
            if max_jobs:
                print(f"\nWith no more than {max_jobs} jobs at a time it takes longer.")
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


def _machine(made: Campaign, wants: Profile) -> Machine:
    device = devices.of(wants, made.cluster == "local")
    lost = wants.requeue_minutes / 60 / wants.preempted_hours if wants.preempted_hours else 0.0
    return Machine(device, wants.cpus_per_task, lost)


def _table(made: Campaign, costs: Costs, on: Machine) -> str:
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
            seconds = estimate.taken(cost, node.stage, on.device, 1, on.cores).seconds
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
    wanted = {where for job in made.left() for where in (*job.nodes, *job.joins)}
    left: dict[str, Work] = {}
    for point in made.points:
        for name, cost in (costs[point.name] or {}).items():
            node = point.nodes[name]
            if node.where in wanted and not store.complete(node.folder(made.store)):
                left[node.where] = Work(node, cost)
    return left


def _takes(work: Iterable[Work], on: Machine, number: int, cores: int = 0) -> Taken:
    """What the work of a job takes on `number` devices, which run all the time. `cores` of each,
    where it is not the machine's."""
    alone, dealt = [], []
    for one in work:
        stage = one.node.stage
        found = estimate.taken(one.cost, stage, on.device, number, cores or on.cores)
        (dealt if stage.division is Division.UNITS else alone).append(found)
    every = [*alone, estimate.of_many(dealt, number)]
    longest = max(every, key=lambda found: found.seconds)
    return Taken(sum(found.seconds for found in every), longest.bound)


def _line(job: Job, scripts: dict[str, str], work: list[Work], on: Machine) -> str:
    many = f" × {job.elements}" if job.elements > 1 else ""
    needs = [n for n in job.needs if n in scripts]
    after = f"   after {', '.join(needs)}" if needs else ""
    number = job.elements * job.wants.nodes * job.wants.tasks_per_node
    found = _takes(work, on, number, job.wants.cpus_per_task) if work else Taken()
    if not found.seconds:
        return f"{job.name}{many}{after}"
    devices = f" on {number} {on.unit}s" if number > 1 else ""
    took = duration(found.seconds * (1 + on.lost))
    return f"{job.name}{many}{after}   about {took}{devices} ({found.bound})"


def _say_all(work: list[list[Work]], on: Machine) -> None:
    """How long all jobs take one after the other, on more and more devices."""
    unit, rows = on.unit, [["", "time", "hours of all", "bound by"]]
    for number in NUMBERS:
        found = [_takes(of, on, number) for of in work if of]
        seconds = sum(one.seconds for one in found)
        longest = max(found, key=lambda one: one.seconds)
        many = f"{number} {unit}{'s' * (number > 1)}"
        took = duration(seconds * (1 + on.lost))
        rows.append([many, took, _hours(seconds * number / HOUR), longest.bound])
    device = on.device
    print(
        f"\nestimated, one job after the other:\n\n{markdown(rows)}\n\n"
        f"{device.name}: {device.flops / 1e12:.3g} TFLOP/s ({device.source}); "
        f"{estimate.DECODED:.0f} images a second and core, {on.cores} a {unit}. {_waits(on)}"
    )


def _waits(on: Machine) -> str:
    if not on.lost:
        return "The queue and preemptions are not counted."
    return f"Preempted jobs wait {on.lost:.0%} on top; the queue before they start is not counted."


def _say_cheapest(
    jobs: list[Job], work: dict[str, list[Work]], wants: Profile, on: Machine, hours: float
) -> None:
    """The fewest device-hours with which `jobs` are done in `hours`, as lines of a profile."""
    kinds = []
    for stage in dict.fromkeys(job.stage for job in jobs):
        of = tuple(job for job in jobs if job.stage == stage)
        made = next((one.node.stage for job in of for one in work[job.name]), None)
        kinds.append(Kind(stage, of, made, lambda job, n: _whole(work[job.name], on, n)))
    found, met = deadline.choose(jobs, kinds, wants, hours * HOUR)
    unit, took = on.unit, duration(found.seconds)
    beside = "with jobs side by side that do not need each other"
    if not met:
        print(f"\nnot in {hours:g} h: {took} at the fastest, {beside}")
        return
    cost = _hours(found.cost / (1 + on.lost) / HOUR)
    print(
        f"\nby a deadline of {hours:g} h: {cost} {unit}-hours, done in {took}, {beside}. "
        "Merge this into the profile:\n\nstages:"
    )
    print("\n".join(deadline.lines(found, kinds, wants)))


def _whole(work: list[Work], on: Machine, number: int) -> float:
    return _takes(work, on, number).seconds * (1 + on.lost) if work else 0.0
