"""`run --cluster` and `sweep`: make the campaign, then show, submit, run or follow it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltdd_scale import __version__, session
from ltdd_scale.config import root
from ltdd_scale.errors import UserError
from ltdd_scale.launch import board, campaign, estimate, limits, perform, profile, sweep
from ltdd_scale.launch.campaign import Campaign
from ltdd_scale.launch.jobs import Point, Summary
from ltdd_scale.launch.profile import Profile
from ltdd_scale.launch.states import last_error
from ltdd_scale.request import Request
from ltdd_scale.runtime.progress import duration
from ltdd_scale.session import Session

POLL = 5.0  # seconds between two looks at the queue: 12 calls a minute


@dataclass(frozen=True)
class Options:
    """How jobs are made. `profile`: a file. `nproc`: ranks of a job on this machine. `max_jobs`:
    jobs at a time; None: as the sweep's file says."""

    cluster: str
    profile: Path | None = None
    dry_run: bool = False
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


def run(options: Options, request: Request) -> int:
    """A whole run as jobs; return the exit code. Where everything is done the report is shown."""
    work, wants = Session(request), options.load_profile()
    point = Point("", work.config, work.out, request.source, request.asked)
    made = Campaign(work.config.name, work.out / "jobs", work.store, options.cluster, [point])
    campaign.make(made, wants, force=options.force)
    if options.dry_run:
        return _dry_run(made, wants, 0)
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
) -> int:
    """All points of a sweep; in the end one table. Called again, just what is missing."""
    found, wants = sweep.load(file), options.load_profile()
    out = (out or Path("runs") / found.name).absolute()
    store = (store or out.parent / "store").absolute()
    made = _campaign_of(found, sets, out, store, options)
    # On a cluster the last job writes the table; here it is written below.
    detached = made.open().detached
    summary = Summary(str(file.absolute()), str(out), str(store), tuple(sets))
    campaign.make(made, wants, summary if detached else None, options.force)
    if not report_only:
        for name, why in made.refused.items():
            print(f"point {name} is refused: {why}", flush=True)
        max_jobs = found.max_jobs if options.max_jobs is None else options.max_jobs
        if options.dry_run:
            return _dry_run(made, wants, max_jobs)
        _check(made)
        code = _start(made, options, wants, max_jobs)
        if code is not None and detached:
            return code
    out.mkdir(parents=True, exist_ok=True)
    cluster = made.open()
    print(sweep.write(found, made, out, lambda job: last_error(made, cluster, job)))
    print(
        f"report            {out / 'sweep.md'}, {out / 'results.json'}; every point has its own "
        f"page, {out}/<point>/report.html"
    )
    unfinished = [j for j in made.jobs if j.report and not made.done(j)]
    return 1 if (unfinished or made.refused) and not report_only else 0


def _campaign_of(
    found: sweep.Sweep, sets: Sequence[str], out: Path, store: Path, options: Options
) -> Campaign:
    """The campaign of a sweep's points. A point whose images cannot be read is refused too."""
    configs, refused = found.load_points(sets)
    points: list[Point] = []
    read: dict[str, str] = {}
    for name, config in configs.items():
        try:
            resolved = perform.resolve(config, out / name, read=read)
        except UserError as error:
            refused[name] = str(error)
            continue
        points.append(Point(name, resolved.config, out / name, resolved.source, resolved.asked))
    if not options.quiet:
        _warn(configs.values())
    return Campaign(
        found.name, out / "jobs", store, options.cluster, points=points, refused=refused
    )


def _warn(configs: Any) -> None:
    """Say once what has no effect, however many points it is so for."""
    for warning in dict.fromkeys(w for config in configs for w in root.check(config)):
        print(f"warning: {warning}", file=sys.stderr)


def _check(made: Campaign) -> None:
    """Raise `UserError` where all jobs together ask for more than there is: before any begins."""
    for point in made.points:
        mine = [job for job in made.jobs if job.point == point.name]
        limits.check_jobs(point.nodes, mine, estimate.facts(point, made.store), made.store)


def _start(made: Campaign, options: Options, wants: Profile, max_jobs: int) -> int | None:
    """Run the campaign here or submit it. The exit code, or None where nothing was left to do."""
    if all(made.done(j) for j in made.jobs if j.summary is None):
        return None
    cluster, folder = made.open(options.nproc, options.quiet), made.folder.parent
    count = campaign.submit(made, cluster, wants, max_jobs, options.say)
    if not cluster.detached:
        return 1 if made.refused or not all(made.done(j) for j in made.jobs) else 0
    if count:
        print(f"{count} jobs submitted")
    else:
        print(f"nothing to submit: what is left is in the queue ({len(made.ids)} jobs)")
    print(
        f"see them with   ltdd-scale status {folder} --watch\n"
        f"end them with   ltdd-scale cancel {folder}"
    )
    return board.wait(folder, POLL, options.say) if options.wait else 0


def _dry_run(made: Campaign, wants: Profile, max_jobs: int) -> int:
    """Print the jobs that are left, what each runs, and what they should take."""
    scripts = campaign.describe(made, wants, max_jobs)
    print(
        f"{made.name}: {len(scripts)} of {len(made.jobs)} jobs are left "
        f"(ltdd_scale {__version__})\n"
    )
    costs = {p.name: estimate.costs(p, made.store) for p in made.points}
    spent = _print_jobs(made, scripts, costs, wants.tflops * 1e12)
    for name, text in scripts.items():
        print(f"\n# ---- {name}\n{text.rstrip()}")
    if spent:
        print(
            f"\nestimated: {_hours(spent)} in all, at an assumed {wants.tflops:g} TFLOP/s a GPU "
            "(tflops in the profile), decoding and waiting not counted"
        )
    unknown = sorted(p or made.name for p, c in costs.items() if c is None)
    if unknown:
        print(
            f"\nno estimate for {', '.join(unknown)}: the images or their list are not found here "
            "(data.path, data.train_list)"
        )
    for name, why in made.refused.items():
        print(f"point {name} is refused: {why}")
    return 1 if made.refused else 0


def _print_jobs(
    made: Campaign, scripts: dict[str, str], costs: dict[str, Any], flops: float
) -> float:
    """A line a job; return the seconds of a GPU in all. `flops`: what a GPU reaches, a second."""
    spent = 0.0
    for job in made.jobs:
        if job.name not in scripts:
            continue
        many = f" × {job.elements}" if job.elements > 1 else ""
        needs = [n for n in job.needs if n in scripts]
        after = f"   after {', '.join(needs)}" if needs else ""
        cost = (costs.get(job.point) or {}).get(job.stage)
        seconds = cost.flops / flops if cost else 0.0
        spent += seconds
        hours = f"   about {_hours(seconds)}" if seconds else ""
        print(f"{job.name}{many}{after}{hours}")
    return spent


def _hours(seconds: float) -> str:
    if seconds >= 360:
        return f"{seconds / 3600:.1f} GPU-hours"
    return f"{duration(seconds)} of a GPU"
