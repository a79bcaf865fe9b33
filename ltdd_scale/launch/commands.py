"""`run --cluster` and `sweep`: make the campaign, then show, submit, run or follow it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ltdd_scale import session
from ltdd_scale.config import root
from ltdd_scale.errors import UserError
from ltdd_scale.launch import (
    board,
    campaign,
    dry_run,
    estimate,
    limits,
    perform,
    profile,
    sweep,
    sweep_table,
)
from ltdd_scale.launch.campaign import Campaign
from ltdd_scale.launch.jobs import Point, Summary
from ltdd_scale.launch.profile import Profile
from ltdd_scale.launch.states import last_error
from ltdd_scale.request import Request
from ltdd_scale.session import Session

POLL = 5.0  # seconds between two looks at the queue: 12 calls a minute


@dataclass(frozen=True)
class Options:
    """How jobs are made. `profile`: a file. `deadline`: hours, of a dry run. `nproc`: ranks of a
    job on this machine. `max_jobs`: jobs at a time; None: as the sweep's file says."""

    cluster: str
    profile: Path | None = None
    dry_run: bool = False
    deadline: float | None = None
    wait: bool = False
    nproc: int | None = None
    quiet: bool = False
    max_jobs: int | None = None
    force: bool = False

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, flush=True)

    def load_profile(self) -> Profile:
        if self.cluster == "slurm" and self.profile is None:
            raise UserError(
                "--cluster slurm needs --profile: slurm/testbed.yaml, or a copy of "
                "slurm/preemptible.yaml or slurm/dedicated.yaml with your cluster's names"
            )
        return profile.load(self.profile) if self.profile else Profile()


def run(options: Options, request: Request, absent: bool = False) -> int:
    """A whole run as jobs; return the exit code. Where everything is done the report is shown.

    `absent`: the images are not here (`perform.resolve`), which only a dry run lets pass.
    """
    work, wants = Session(request), options.load_profile()
    point = Point("", work.config, work.out, request.source, request.asked)
    made = Campaign(work.config.name, work.out / "jobs", work.store, options.cluster, [point])
    campaign.make(made, wants, force=options.force)
    limits.check_settings(point.nodes.values())
    if options.dry_run:
        lacking = {point.name} if absent else set()
        return dry_run.show(made, wants, 0, lacking, options.deadline)
    _check(made)
    session.enter(work)  # only now: a request that is refused leaves the run folder as it was
    code = _start(made, options, wants, 0)
    stayed = options.wait or not made.open().detached
    if code is None or (code == 0 and stayed):
        return perform.finish(work)
    return code


def run_sweep(
    options: Options,
    file: Path,
    sets: Sequence[str],
    out: Path | None = None,
    store: Path | None = None,
    report_only: bool = False,
    data_root: Path | None = None,
) -> int:
    """All points of a sweep; in the end one table. Called again, just what is missing."""
    found, wants = replace(sweep.load(file), data_root=data_root), options.load_profile()
    if report_only:
        options = replace(options, dry_run=False)
    out = (out or Path("runs") / found.name).absolute()
    store = (store or out.parent / "store").absolute()
    made, absent = _campaign_of(found, sets, out, store, options)
    # On a cluster the last job writes the table; here it is written below.
    detached = made.open().detached
    summary = Summary(str(file.absolute()), str(out), str(store), tuple(sets))
    campaign.make(made, wants, summary if detached else None, options.force)
    if not report_only:
        max_jobs = found.max_jobs if options.max_jobs is None else options.max_jobs
        if options.dry_run:
            return dry_run.show(made, wants, max_jobs, absent, options.deadline)
        for name, why in made.refused.items():
            print(f"point {name} is refused: {why}", flush=True)
        _check(made)
        code = _start(made, options, wants, max_jobs)
        if code is not None and detached:
            return code
    out.mkdir(parents=True, exist_ok=True)
    cluster = made.open()
    print(sweep_table.write(found, made, out, lambda job: last_error(made, cluster, job)))
    print(
        f"report            {out / 'sweep.md'}, {out / 'results.json'}; every point has its own "
        f"page, {out}/<point>/report.html"
    )
    unfinished = [j for j in made.left() if j.report]
    return 1 if (unfinished or made.refused) and not report_only else 0


def _campaign_of(
    found: sweep.Sweep, sets: Sequence[str], out: Path, store: Path, options: Options
) -> tuple[Campaign, set[str]]:
    """The campaign of a sweep's points, and those whose images are not here.

    A point whose images cannot be read is refused too, unless this is a dry run and its config
    says what they are; and so is one whose settings do not suit its images.
    """
    configs, refused = found.load_points(sets)
    points: list[Point] = []
    absent: set[str] = set()
    read: dict[str, str] = {}
    for name, config in configs.items():
        try:
            resolved = perform.resolve(config, out / name, read=read, dry_run=options.dry_run)
        except UserError as error:
            refused[name] = str(error)
            continue
        absent |= {name} if resolved.absent else set()
        points.append(Point(name, resolved.config, out / name, resolved.source, resolved.asked))
    known = estimate.all_facts(points, store)
    for point in list(points):
        try:
            limits.check_settings(point.nodes.values())
            estimate.costs([point], known)  # which asks whether the stages can work
        except UserError as error:
            refused[point.name] = str(error)
            points.remove(point)
    if not options.quiet:
        _warn(configs.values())
    made = Campaign(
        found.name, out / "jobs", store, options.cluster, points=points, refused=refused
    )
    return made, absent


def _warn(configs: Any) -> None:
    """Say once what has no effect, however many points it is so for."""
    for warning in dict.fromkeys(w for config in configs for w in root.check(config)):
        print(f"warning: {warning}", file=sys.stderr)


def _check(made: Campaign) -> None:
    """Raise `UserError` where all jobs together ask for more than there is: before any begins."""
    known = estimate.all_facts(made.points, made.store)
    for line in estimate.surprises(made.points, known):
        print(f"warning: {line}", file=sys.stderr)
    limits.check_jobs(made.points, made.left(), known, made.store)


def _start(made: Campaign, options: Options, wants: Profile, max_jobs: int) -> int | None:
    """Run the campaign here or submit it. The exit code, or None where nothing was left to do."""
    cluster, folder = made.open(options.nproc, options.quiet), made.folder.parent
    if all(j.summary for j in made.left()):
        campaign.tidy(made, cluster, options.say)
        return None
    campaign.refuse_elsewhere(made)  # only now: what is done may be looked at from anywhere
    count = campaign.submit(made, cluster, wants, max_jobs, options.say)
    if not cluster.detached:
        return 1 if made.refused or made.left() else 0
    if count:
        print(f"{count} jobs submitted")
    else:
        print(f"nothing to submit: what is left is in the queue ({len(made.ids)} jobs)")
    print(
        f"see them with   ltdd-scale status {folder} --watch\n"
        f"end them with   ltdd-scale cancel {folder}"
    )
    return board.wait(folder, POLL, options.say) if options.wait else 0
