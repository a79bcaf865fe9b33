"""A campaign: the jobs of one run, or of a sweep, and a record of what was submitted.

Started again it submits just what is missing.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ltdd_scale import recipe
from ltdd_scale.config import load as configuration
from ltdd_scale.errors import UserError
from ltdd_scale.launch.cluster import Cluster, Order, alive, waiting
from ltdd_scale.launch.clusters.catalog import open_cluster
from ltdd_scale.launch.jobs import Job, Point, Summary, is_done, plan, summary_job
from ltdd_scale.launch.profile import Profile
from ltdd_scale.pipeline import graph
from ltdd_scale.pipeline.store import complete
from ltdd_scale.runtime import files
from ltdd_scale.runtime.code import PACKAGE, code_digest

RECORD = "jobs.json"
VERSION = 2  # of the record


@dataclass
class Campaign:
    """`folder` (``jobs`` in the folder of a run or a sweep) holds ``jobs.json``, code, logs, and
    notes of how jobs ended.

    `cluster` is its name in the catalog. `ids`: job → id of its last submission. `refused`: point →
    why it has no config. `replaced`: ids of jobs that an earlier submission made and this one does
    not want. `elsewhere`: the cluster of an earlier submission, where it was another, and the ids
    there.
    """

    name: str
    folder: Path
    store: Path
    cluster: str
    points: list[Point] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    ids: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    replaced: list[str] = field(default_factory=list)
    elsewhere: tuple[str, list[str]] = ("", [])

    def open(self, nproc: int | None = None, quiet: bool = False) -> Cluster:
        return open_cluster(self.cluster, self.folder, nproc, quiet)

    def done(self, job: Job) -> bool:
        """Whether the disk has what the job makes.

        A summary: a table that is not older than any point's results.
        """
        if job.summary is None:
            return is_done(job, self.store)
        table = self.folder.parent / "sweep.md"
        results = [p.out / "results.json" for p in self.points]
        return table.exists() and all(
            r.stat().st_mtime <= table.stat().st_mtime for r in results if r.exists()
        )

    def left(self) -> list[Job]:
        """Jobs whose work is needed and not on the disk, in order. What finished stages have read
        need not be there any more."""
        wanted: set[str] = set()
        for point in self.points:
            nodes = point.nodes
            missing = {n for n, node in nodes.items() if not complete(node.folder(self.store))}
            needed = graph.needed(nodes, [recipe.VERDICT], missing)
            wanted |= {nodes[name].where for name in needed}
        return [
            job
            for job in self.jobs
            if (job.report or job.summary or not wanted.isdisjoint((*job.nodes, *job.joins)))
            and not self.done(job)
        ]

    def save(self) -> None:
        record = {
            "version": VERSION,
            "name": self.name,
            "cluster": self.cluster,
            "store": str(self.store),
            "points": {
                p.name: {
                    "config": p.text,
                    "out": str(p.out),
                    "source": p.source,
                    "asked": p.asked,
                }
                for p in self.points
            },
            "refused": self.refused,
            "ids": self.ids,
            "replaced": self.replaced,
            "jobs": [j.to_dict() for j in self.jobs],
        }
        files.write_json(self.folder / RECORD, record)


def make(
    campaign: Campaign, profile: Profile, summary: Summary | None = None, force: bool = False
) -> Campaign:
    """Plan the jobs of the campaign's points; what an earlier submission recorded is kept.

    `summary`: the last job writes a sweep's table. Writes nothing.
    """
    campaign.jobs = plan(campaign.points, campaign.store, profile, force)
    if summary:
        last = summary_job(summary, profile)
        last.needs = [j.name for j in campaign.jobs if j.report]
        campaign.jobs.append(last)
    if (campaign.folder / RECORD).exists():
        _take_over(campaign, _read(campaign.folder / RECORD))
    return campaign


def _take_over(campaign: Campaign, before: Mapping[str, Any]) -> None:
    """Keep the ids of jobs that are the same as before, on the same cluster."""
    ids = before["ids"]
    if before["cluster"] != campaign.cluster:
        campaign.elsewhere = before["cluster"], sorted({*ids.values(), *before["replaced"]})
        return
    # An id counts for the job that it was given to: one with the same name that makes other things,
    # or in other parts, is another job.
    same = {j["name"]: Job.from_dict(j, "").identity for j in before["jobs"]}
    campaign.ids = {
        j.name: ids[j.name]
        for j in campaign.jobs
        if j.name in ids and same.get(j.name) == j.identity
    }
    for job in campaign.jobs:  # what waits in the queue for a job that is replaced would never run
        if any(n in ids and n not in campaign.ids for n in job.needs):
            campaign.ids.pop(job.name, None)
    submitted = {*before["replaced"], *ids.values()}
    campaign.replaced = sorted(submitted - {*campaign.ids.values()})


def load(folder: Path) -> Campaign:
    """What ``jobs.json`` records. `folder` is that of a run or a sweep."""
    record = folder / "jobs" / RECORD
    if not record.exists():
        raise UserError(
            f"{folder}: no jobs were made there (no {record}): start them with "
            "'ltdd-scale run … --cluster slurm' or 'ltdd-scale sweep …'"
        )
    saved = _read(record)
    points = [
        Point(name, configuration.from_text(p["config"]), Path(p["out"]), p["source"], p["asked"])
        for name, p in saved["points"].items()
    ]
    configs = {name: p["config"] for name, p in saved["points"].items()}
    return Campaign(
        name=saved["name"],
        folder=folder / "jobs",
        store=Path(saved["store"]),
        cluster=saved["cluster"],
        points=points,
        jobs=[Job.from_dict(j, configs.get(j["point"], "")) for j in saved["jobs"]],
        ids=saved["ids"],
        refused=saved["refused"],
        replaced=saved["replaced"],
    )


def _read(record: Path) -> dict[str, Any]:
    saved = files.read_json(record)
    if saved.get("version") != VERSION:
        raise UserError(
            f"{record} was written by another version of ltdd_scale: cancel its jobs with that "
            "one, then delete the file"
        )
    return saved


def snapshot_of(campaign: Campaign) -> Path:
    """Where the snapshot of this code belongs. Each state of the code has a folder of its own: jobs
    in the queue keep theirs."""
    return campaign.folder / "code" / code_digest()


def prepare(campaign: Campaign) -> Path:
    """Make the folders, and a snapshot of the code, which the jobs run: edits after this do not
    reach them. Returns the snapshot's folder."""
    for name in ("logs", "ends", "fences"):
        (campaign.folder / name).mkdir(parents=True, exist_ok=True)
    for point in campaign.points:
        point.out.mkdir(parents=True, exist_ok=True)
    code = snapshot_of(campaign)
    if not code.exists():
        whole = code.with_suffix(".tmp")
        shutil.rmtree(whole, ignore_errors=True)
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PACKAGE, whole / PACKAGE.name, ignore=ignored)
        whole.rename(code)
    return code


def missing(campaign: Campaign, living: set[str], waiting: Iterable[str] = ()) -> list[Job]:
    """Jobs whose work is not on the disk and that no submitted job is about to do.

    `living`: ids of jobs that the cluster runs or will run; `waiting`: those that have not begun.
    What waits for a job that is submitted anew would wait for the one that has failed.
    """
    todo: dict[str, Job] = {}
    for job in campaign.left():
        number = campaign.ids.get(job.name)
        in_vain = number in waiting and any(name in todo for name in job.needs)
        if job.summary is None and (number not in living or in_vain):
            todo[job.name] = job
    # A sweep's table is written after whatever is done again.
    return [*todo.values(), *(j for j in campaign.jobs if todo and j.summary)]


def _order(number: int, job: Job, after: list[str], around: _Around) -> Order:
    """The `number`-th job to be submitted, which waits for the ids `after`."""
    lane = f"{around.name}-{number % around.max_jobs}" if around.max_jobs else ""
    after_any = job.summary is not None
    return Order(job, around.profile, around.code, tuple(after), after_any, lane)


@dataclass(frozen=True)
class _Around:
    """What all orders of one submission have in common."""

    name: str
    profile: Profile
    code: Path
    max_jobs: int


def submit(
    campaign: Campaign,
    cluster: Cluster,
    profile: Profile,
    max_jobs: int,
    say: Callable[[str], None],
) -> int:
    """Submit what is missing, in order; return how many jobs.

    `max_jobs`: at most so many run at a time (an array counts as one); 0: any number.
    """
    cluster.need()
    states = cluster.states()
    living = alive(states)
    todo = missing(campaign, living, waiting(states))
    _clear(campaign, cluster, todo, living, say)
    if not todo:
        campaign.save()
        return 0
    around = _Around(campaign.name, profile, prepare(campaign), max_jobs)
    campaign.save()  # a job that runs here is seen while it runs
    for number, job in enumerate(todo):
        after = [i for n in job.needs if (i := campaign.ids.get(n)) in living]
        campaign.ids[job.name] = cluster.submit(_order(number, job, after, around))
        living.add(campaign.ids[job.name])
        campaign.save()  # after each: a submission that dies half-way is picked up where it was
        array = f" ({job.elements} elements)" if job.elements > 1 else ""
        if cluster.detached:
            say(f"  {campaign.ids[job.name]}  {job.name}{array}")
    return len(todo)


def tidy(campaign: Campaign, cluster: Cluster, say: Callable[[str], None]) -> None:
    """Where nothing is left to do: cancel what an earlier submission still has in the queue, which
    would write over what is done."""
    if campaign.replaced and cluster.available():
        _clear(campaign, cluster, [], alive(cluster.states()), say)
        campaign.save()


def refuse_elsewhere(campaign: Campaign) -> None:
    """Raise `UserError` where another cluster still has jobs of this campaign, or cannot be asked:
    two would do the same work, and nobody would know of the others."""
    name, ids = campaign.elsewhere
    if not ids:
        return
    cluster = open_cluster(name, campaign.folder)
    if not cluster.available():
        raise UserError(
            f"{campaign.folder.parent} has jobs of {cluster.title}, which cannot be asked here "
            f"({cluster.absent}): go on there, or delete {campaign.folder / RECORD} if none is left"
        )
    if alive(cluster.states()).intersection(ids):
        raise UserError(
            f"jobs of {campaign.folder.parent} wait or run on {cluster.title}: cancel them first "
            f"(ltdd-scale cancel {campaign.folder.parent}), or go on with --cluster {name}"
        )


def _clear(
    campaign: Campaign,
    cluster: Cluster,
    todo: list[Job],
    living: set[str],
    say: Callable[[str], None],
) -> None:
    """Cancel what would be in the way of `todo`, and forget how it ended before."""
    # A table that waits for what was submitted before would not wait for what is submitted now.
    late = [campaign.ids[j.name] for j in todo if campaign.ids.get(j.name) in living]
    stale = [i for i in campaign.replaced if i in living]
    if late or stale:
        cluster.cancel([*late, *stale])
    if stale:
        say(f"  {', '.join(stale)}: cancelled, as the settings are others now")
    campaign.replaced = []
    for job in todo:
        if number := campaign.ids.pop(job.name, None):
            cluster.forget(number)


def describe(campaign: Campaign, profile: Profile, max_jobs: int) -> dict[str, str]:
    """For a dry run: the jobs left, and of each what is run."""
    cluster = campaign.open()
    todo = campaign.left()
    names = {j.name for j in todo}
    around = _Around(campaign.name, profile, snapshot_of(campaign), max_jobs)
    return {
        job.name: cluster.script(
            _order(number, job, [f"<{n}>" for n in job.needs if n in names], around)
        )
        for number, job in enumerate(todo)
    }
