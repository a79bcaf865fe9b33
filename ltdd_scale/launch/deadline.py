"""How many devices each job gets, so that all are done by a deadline for the fewest device-hours.

Jobs that do not need each other run side by side. The choice is greedy: where the longest chain of
jobs is too long, the job of it that gains most for what it costs more gets more devices. It says
what it found, not that nothing is cheaper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ltdd_scale.launch.jobs import Job
from ltdd_scale.launch.profile import Profile
from ltdd_scale.stage import Division, Resources, Stage

NUMBERS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Kind:
    """The jobs of one stage: what a profile sets together. `seconds(number)`: of each of `jobs` on
    so many devices. `stage`: the one that they make; None: one without an estimate."""

    name: str
    jobs: tuple[Job, ...]
    stage: Stage | None
    seconds: Callable[[Job, int], float]

    def numbers(self, wants: Profile) -> tuple[int, ...]:
        """Of devices that the stage can use on the cluster `wants`, fewest first."""
        stage, node = self.stage, max(wants.gpus_per_node, 1)
        whole = _whole_nodes(wants)
        nodes = tuple(node * n for n in NUMBERS if node * n <= NUMBERS[-1]) or (node,)
        if stage is None or stage.resources is Resources.CPU or stage.division is Division.ONE:
            return (1,)
        if stage.division in (Division.CHUNKS, Division.UNITS):
            return tuple(
                n
                for n in (nodes if whole else NUMBERS)
                if n <= wants.array_parallelism * (node if whole else 1)
            )
        within = () if whole else tuple(n for n in NUMBERS if n < node)
        return within + (nodes if stage.resources is Resources.NODES else nodes[:1])

    def cost(self, number: int) -> float:
        """Device-seconds of all its jobs."""
        return number * sum(self.seconds(job, number) for job in self.jobs)


@dataclass(frozen=True)
class Choice:
    """Kind → devices; what all jobs take then, in seconds, and their device-seconds."""

    numbers: dict[str, int]
    seconds: float
    cost: float


def chain(jobs: Sequence[Job], seconds: Mapping[str, float]) -> tuple[float, list[str]]:
    """How long all jobs take where each begins when those that it needs are done, and the names of
    the longest chain of jobs, first to last."""
    ends: dict[str, float] = {}
    before: dict[str, str | None] = {}

    def end(job: Job) -> float:
        if job.name not in ends:
            needed = [other for other in jobs if other.name in job.needs]
            last = max(needed, key=end, default=None)
            before[job.name] = last.name if last else None
            ends[job.name] = (end(last) if last else 0.0) + seconds.get(job.name, 0.0)
        return ends[job.name]

    at: str | None = max(jobs, key=end).name if jobs else None
    total, names = ends.get(at or "", 0.0), []
    while at is not None:
        names.append(at)
        at = before[at]
    return total, names[::-1]


def choose(
    jobs: Sequence[Job], kinds: Iterable[Kind], wants: Profile, deadline: float
) -> tuple[Choice, bool]:
    """The cheapest choice found by which `jobs` are done in `deadline` seconds, and True; or the
    fastest one and False."""
    by_name = {kind.name: kind for kind in kinds}
    kind_of = {job.name: kind.name for kind in by_name.values() for job in kind.jobs}
    numbers = {name: kind.numbers(wants)[0] for name, kind in by_name.items()}

    def now(changed: Mapping[str, int]) -> tuple[float, list[str]]:
        used = {**numbers, **changed}
        each = {
            job.name: kind.seconds(job, used[kind.name])
            for kind in by_name.values()
            for job in kind.jobs
        }
        return chain(jobs, each)

    total, waited = now({})
    while total > deadline:
        late = {kind_of[name]: by_name[kind_of[name]] for name in waited if name in kind_of}
        better = [
            (_worth(kind, numbers[name], more), name, more)
            for name, kind in late.items()
            for more in kind.numbers(wants)
            if more > numbers[name] and _faster(kind, numbers[name], more)
        ]
        if not better:
            return _choice(numbers, by_name, total), False
        _, name, more = max(better)
        numbers[name] = more
        total, waited = now({})
    # What was given in vain is taken back, what saves most first.
    while True:
        less = [
            (kind.cost(numbers[name]) - kind.cost(fewer), name, fewer)
            for name, kind in by_name.items()
            for fewer in kind.numbers(wants)
            if fewer < numbers[name] and now({name: fewer})[0] <= deadline
        ]
        if not less:
            return _choice(numbers, by_name, now({})[0]), True
        _, name, fewer = max(less)
        numbers[name] = fewer


def _faster(kind: Kind, number: int, more: int) -> bool:
    return any(kind.seconds(job, more) < kind.seconds(job, number) for job in kind.jobs)


def _worth(kind: Kind, number: int, more: int) -> float:
    """Seconds gained for each device-second more."""
    gained = sum(kind.seconds(j, number) - kind.seconds(j, more) for j in kind.jobs)
    return gained / max(kind.cost(more) - kind.cost(number), 1e-9)


def _choice(numbers: dict[str, int], kinds: Mapping[str, Kind], seconds: float) -> Choice:
    cost = sum(kind.cost(numbers[name]) for name, kind in kinds.items())
    return Choice(dict(numbers), seconds, cost)


def _whole_nodes(wants: Profile) -> bool:
    """Whether a job gets its nodes alone, and so takes all of their devices."""
    return bool(wants.extra.get("exclusive"))


def lines(choice: Choice, kinds: Iterable[Kind], wants: Profile) -> list[str]:
    """What a profile says of its stages, beside what it said, to ask for `choice`."""
    return [
        f"  {kind.name}: {{{', '.join(_asked(choice.numbers[kind.name], kind.stage, wants))}}}"
        for kind in kinds
        if kind.stage is not None and kind.stage.resources is not Resources.CPU
    ]


def _asked(number: int, stage: Stage, wants: Profile) -> list[str]:
    """`number` devices for `stage`: of a node that is shared, a share of its memory too."""
    node = max(wants.gpus_per_node, 1)
    array = stage.division in (Division.CHUNKS, Division.UNITS)
    each = (node if _whole_nodes(wants) else 1) if array else min(number, node)
    out = [f"array: {number // each}"] if array else [f"nodes: {number // each}"]
    if wants.gpus_per_node:
        out.append(f"gpus_per_node: {each}")
    if wants.mem_gb and each < node and not _whole_nodes(wants):
        out.append(f"mem_gb: {wants.mem_gb * each / node:g}")
    return out
