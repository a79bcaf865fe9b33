"""A campaign: the jobs of one run, or of a sweep, and a record of what was submitted. Started again it submits just what is missing."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ltdd_scale
from ltdd_scale import config as configuration
from ltdd_scale.config import Config
from ltdd_scale.errors import UserError
from ltdd_scale.launch import slurm
from ltdd_scale.launch.jobs import Job, Point, is_done, plan
from ltdd_scale.launch.profile import Profile
from ltdd_scale.launch.task import code_digest
from ltdd_scale.runtime import files, signals


@dataclass
class Campaign:
    """`folder` (the ``jobs`` folder of a run or a sweep) holds ``jobs.json``, the jobs' configs, code, logs, and notes of how they ended."""

    name: str
    folder: Path
    store: Path
    points: list[Point]
    jobs: list[Job] = field(default_factory=list)
    ids: dict[str, str] = field(default_factory=dict)  # job -> SLURM id of its last submission
    refused: dict[str, str] = field(default_factory=dict)  # point -> why its config is none
    failed: dict[str, int] = field(default_factory=dict)  # job -> exit code, where jobs run here
    replaced: list[str] = field(
        default_factory=list
    )  # ids of jobs that an earlier submission made and this one does not want

    @property
    def configs(self) -> dict[str, Config]:
        return {p.name: p.config for p in self.points}

    def done(self, job: Job) -> bool:
        """Whether the disk has what the job makes: the summary, a table that is not older than any point's results."""
        if not _is_summary(job):
            return is_done(job, self.store, self.configs)
        table, results = (
            self.folder.parent / "sweep.md",
            [p.out / "results.json" for p in self.points],
        )
        return table.exists() and all(
            r.stat().st_mtime <= table.stat().st_mtime for r in results if r.exists()
        )

    def save(self) -> None:
        record = {
            "name": self.name,
            "store": str(self.store),
            "points": {p.name: {"config": str(p.path), "out": str(p.out)} for p in self.points},
            "refused": self.refused,
            "ids": self.ids,
            "failed": self.failed,
            "replaced": self.replaced,
            "jobs": [j.to_dict() for j in self.jobs],
        }
        files.write_json(self.folder / "jobs.json", record)


def make(
    name: str,
    folder: Path,
    store: Path,
    configs: dict[str, tuple[Config, Path]],
    profile: Profile,
    refused: dict[str, str] | None = None,
    last: Job | None = None,
) -> Campaign:
    """Plan the jobs of `configs` (point → config, run folder); what an earlier submission recorded is kept. Writes nothing."""
    # Named by content: a job in the queue reads its config when it starts, or starts again, and must find what it was submitted with.
    points = [
        Point(p, c, folder / "configs" / f"{p or name}-{_digest(c)}.yaml", out)
        for p, (c, out) in configs.items()
    ]
    out = Campaign(name, folder, store, points, plan(points, store, profile), refused=refused or {})
    if last:
        last.needs = [j.name for j in out.jobs if j.report]
        out.jobs.append(last)
    if (folder / "jobs.json").exists():
        before = files.read_json(folder / "jobs.json")
        same = {j["name"]: (j["nodes"], len(j["commands"])) for j in before["jobs"]}
        # An id counts for the job that it was given to: one with the same name that makes other things, or in other parts, is another job.
        out.ids = {
            j.name: before["ids"][j.name]
            for j in out.jobs
            if j.name in before["ids"] and same.get(j.name) == (j.nodes, len(j.commands))
        }
        for (
            job
        ) in out.jobs:  # and what waits in the queue for a job that is replaced would never run
            if any(n in before["ids"] and n not in out.ids for n in job.needs):
                out.ids.pop(job.name, None)
        out.replaced = sorted(
            {*before.get("replaced", []), *before["ids"].values()} - {*out.ids.values()}
        )
    return out


def _digest(config: Config) -> str:
    return hashlib.sha256(configuration.to_yaml(config).encode()).hexdigest()[:8]


def load(folder: Path) -> Campaign:
    """What ``jobs.json`` records. `folder` is that of a run or a sweep."""
    record = folder / "jobs" / "jobs.json"
    if not record.exists():
        raise UserError(
            f"{folder}: no jobs were made there (no {record}): start them with 'ltdd-scale run … --cluster slurm' or 'ltdd-scale sweep …'"
        )
    saved = files.read_json(record)
    points = [
        Point(n, configuration.load(Path(p["config"])), Path(p["config"]), Path(p["out"]))
        for n, p in saved["points"].items()
    ]
    jobs = [Job(**j) for j in saved["jobs"]]
    return Campaign(
        saved["name"],
        folder / "jobs",
        Path(saved["store"]),
        points,
        jobs,
        saved["ids"],
        saved["refused"],
        saved["failed"],
        saved.get("replaced", []),
    )


def _code(campaign: Campaign) -> Path:
    """Where the snapshot of this code belongs. Each state of the code has a folder of its own: jobs in the queue keep theirs."""
    return campaign.folder / "code" / code_digest(Path(ltdd_scale.__file__).parent)


def prepare(campaign: Campaign) -> Path:
    """Write the points' configs and a snapshot of the code, which the jobs run: edits after this do not reach them. Returns the snapshot's folder."""
    for folder in ("logs", "ends", "fences", "configs"):
        (campaign.folder / folder).mkdir(parents=True, exist_ok=True)
    for point in campaign.points:
        point.out.mkdir(parents=True, exist_ok=True)
        files.write_text(point.path, configuration.to_yaml(point.config))
    code = _code(campaign)
    if not code.exists():
        whole = code.with_suffix(".tmp")
        shutil.rmtree(whole, ignore_errors=True)
        shutil.copytree(
            Path(ltdd_scale.__file__).parent,
            whole / "ltdd_scale",
            ignore=shutil.ignore_patterns("__pycache__"),
        )
        whole.rename(code)
    return code


def missing(campaign: Campaign, alive: set[str]) -> list[Job]:
    """Jobs whose work is not on the disk and that no submitted job is about to do."""
    left = [
        j
        for j in campaign.jobs
        if not _is_summary(j) and not campaign.done(j) and campaign.ids.get(j.name) not in alive
    ]
    return left and left + [
        j for j in campaign.jobs if _is_summary(j)
    ]  # a sweep's table is written after whatever is done again


def _is_summary(job: Job) -> bool:
    return job.stage == "summary"


def _order(
    campaign: Campaign, job: Job, number: int, max_jobs: int, waits: list[str]
) -> tuple[str, str]:
    """The lane and the dependency of the `number`-th job to be submitted, which waits for the ids `waits`."""
    lane = f"{campaign.name}-{number % max_jobs}" if max_jobs else ""
    return lane, slurm.dependency_of(waits, lane, "afterany" if _is_summary(job) else "afterok")


def submit(campaign: Campaign, profile: Profile, max_jobs: int, say) -> int:
    """Submit what is missing, in order; return how many jobs. `max_jobs`: at most so many run at a time (an array counts as one); 0: any number."""
    slurm.need_slurm()
    alive = slurm.alive(slurm.states())
    todo = missing(campaign, alive)
    # A table that waits for what was submitted before would not wait for what is submitted now.
    late = [campaign.ids[j.name] for j in todo if campaign.ids.get(j.name) in alive]
    stale = [i for i in campaign.replaced if i in alive]
    if late or stale:
        slurm.cancel([*late, *stale])
    if stale:
        say(f"  {', '.join(stale)}: cancelled, as the settings are others now")
    campaign.replaced = []
    if not todo:
        return 0
    code = prepare(campaign)
    for number, job in enumerate(todo):
        lane, dependency = _order(
            campaign,
            job,
            number,
            max_jobs,
            [campaign.ids[n] for n in job.needs if campaign.ids.get(n) in alive],
        )
        for note in (campaign.folder / "ends").glob(f"{campaign.ids.get(job.name, 'none')}*"):
            note.unlink()
        campaign.ids[job.name] = slurm.submit(job, profile, campaign.folder, code, dependency, lane)
        alive.add(campaign.ids[job.name])
        campaign.save()  # after each: a submission that dies half-way is picked up where it was
        array = f" ({len(job.commands)} elements)" if len(job.commands) > 1 else ""
        say(f"  {campaign.ids[job.name]}  {job.name}{array}")
    return len(todo)


def run_here(campaign: Campaign, nproc: int | None, quiet: bool) -> int:
    """The same jobs on this machine, one after the other. A failed one stops what needs it and nothing else. Returns the exit code."""
    prepare(campaign)
    campaign.failed = {}
    for job in campaign.jobs:
        if campaign.done(job):
            continue
        broken = [n for n in job.needs if n in campaign.failed and not _is_summary(job)]
        if broken:
            campaign.failed[job.name] = 0
            print(f"== {job.name}: left out, as {broken[0]} failed", flush=True)
            continue
        for command in job.commands:
            print(f"== {job.name}: ltdd-scale {' '.join(command)}", flush=True)
            more = (
                ["--nproc", str(nproc)] if nproc and not job.report and not _is_summary(job) else []
            ) + ["--quiet"] * (quiet and not _is_summary(job))
            process = subprocess.Popen([sys.executable, "-m", "ltdd_scale", *command, *more])
            passed_on = False
            while (code := process.poll()) is None:
                if signals.requested() and not passed_on:
                    passed_on = True
                    process.terminate()
                time.sleep(0.1)
            signals.check()
            if code in (signals.STOP_CODE, 130):
                return code
            if code:
                campaign.failed[job.name] = code
                break
        campaign.save()
    return 1 if campaign.failed or campaign.refused else 0


def describe(campaign: Campaign, profile: Profile, max_jobs: int) -> dict[str, Any]:
    """For a dry run: the jobs left, what each waits for, its sbatch file."""
    todo = [j for j in campaign.jobs if not campaign.done(j)]
    names = {j.name for j in todo}
    out = {}
    for number, job in enumerate(todo):
        lane, dependency = _order(
            campaign, job, number, max_jobs, [f"<{n}>" for n in job.needs if n in names]
        )
        out[job.name] = slurm.script(
            job, profile, campaign.folder, _code(campaign), dependency, lane
        )
    return out
