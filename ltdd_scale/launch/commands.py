"""`run --cluster` and `sweep`: make the campaign, then show, submit, run or follow it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ltdd_scale import __version__
from ltdd_scale.config import Config
from ltdd_scale.errors import UserError
from ltdd_scale.launch import board, campaign, profile, sweep
from ltdd_scale.launch.jobs import Job
from ltdd_scale.runtime.progress import duration

POLL = 5.0  # seconds between two looks at the queue: 12 calls a minute


def _profile(args) -> profile.Profile:
    if args.cluster == "slurm" and args.profile is None:
        raise UserError(
            "--cluster slurm needs --profile: slurm/testbed.yaml, or a copy of slurm/preemptible.yaml or slurm/dedicated.yaml with your cluster's names"
        )
    return profile.load(args.profile) if args.profile else profile.Profile()


def _say(quiet: bool) -> Callable[[str], None]:
    return (lambda text: None) if quiet else lambda text: print(text, flush=True)


def _dry_run(made: campaign.Campaign, wants: profile.Profile, max_jobs: int) -> int:
    from ltdd_scale.launch import estimate

    scripts, jobs = campaign.describe(made, wants, max_jobs), {j.name: j for j in made.jobs}
    print(
        f"{made.name}: {len(scripts)} of {len(made.jobs)} jobs are left (ltdd_scale {__version__})\n"
    )
    spent, costs = 0.0, {p.name: estimate.flops(p.config, made.store) for p in made.points}
    for name in scripts:
        job = jobs[name]
        many = f" × {len(job.commands)}" if len(job.commands) > 1 else ""
        needs = [n for n in job.needs if n in scripts]
        hours = ""
        cost = costs.get(job.point)
        if cost and cost.get(job.stage):
            spent += cost[job.stage] / wants.tflops / 1e12 / 3600
            hours = f"   about {_hours(cost[job.stage] / wants.tflops / 1e12)}"
        after = f"   after {', '.join(needs)}" if needs else ""
        print(f"{name}{many}{after}{hours}")
    for name, text in scripts.items():
        print(f"\n# ---- {name}\n{text.rstrip()}")
    if spent:
        print(
            f"\nestimated: {_hours(spent * 3600)} in all, at an assumed {wants.tflops:g} TFLOP/s a GPU (tflops in the profile), decoding and waiting not counted"
        )
    unknown = sorted(p or made.name for p, c in costs.items() if c is None)
    if unknown:
        print(
            f"\nno estimate for {', '.join(unknown)}: the images or their list are not found here (data.path, data.train_list)"
        )
    for name, why in made.refused.items():
        print(f"point {name} is refused: {why}")
    return 1 if made.refused else 0


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} GPU-hours" if seconds >= 360 else f"{duration(seconds)} of a GPU"


def _start(made: campaign.Campaign, args, max_jobs: int, folder: Path) -> int | None:
    """Run the campaign here or submit it. The exit code, or None where nothing was left to do."""
    wants, say = _profile(args), _say(args.quiet)
    if args.dry_run:
        return _dry_run(made, wants, max_jobs)
    left = [j for j in made.jobs if not made.done(j) and j.stage != "summary"]
    if not left:
        return None
    if args.cluster == "local":
        return campaign.run_here(made, args.nproc, args.quiet)
    count = campaign.submit(made, wants, max_jobs, say)
    flying = len(made.ids)
    print(
        f"{count} jobs submitted"
        if count
        else f"nothing to submit: what is left is in the queue ({flying} jobs)"
    )
    print(
        f"see them with   ltdd-scale status {folder} --watch\nend them with   ltdd-scale cancel {folder}"
    )
    if args.wait:
        return board.wait(folder, POLL, say)
    return 0


def run(args, config: Config, out: Path, store: Path, enter: Callable[[], None]) -> int | None:
    """One config as jobs. None where everything is done already. `enter` makes the run folder."""
    made = campaign.make(config.name, out / "jobs", store, {"": (config, out)}, _profile(args))
    if not args.dry_run:
        enter()
    return _start(made, args, 0, out)


def run_sweep(args) -> int:
    """All points of a sweep; in the end one report. Called again, just what is missing."""
    found = sweep.load(args.file)
    configs, refused = found.load_points(args.set)
    out = (args.out or Path("runs") / found.name).absolute()
    store = (args.store or out.parent / "store").absolute()
    wants = _profile(args)
    settings = [f"--set={s}" for s in args.set]
    last = Job(
        "report",
        "summary",
        "",
        [
            [
                "sweep",
                str(args.file.absolute()),
                "--out",
                str(out),
                "--store",
                str(store),
                "--report",
                *settings,
            ]
        ],
        [],
        [],
    )
    points = {name: (config, out / name) for name, config in configs.items()}
    made = campaign.make(
        found.name,
        out / "jobs",
        store,
        points,
        wants,
        refused,
        last if args.cluster == "slurm" else None,
    )
    if not args.report:
        for name, why in refused.items():
            print(f"point {name} is refused: {why}", flush=True)
        code = _start(
            made, args, args.max_jobs if args.max_jobs is not None else found.max_jobs, out
        )
        if code is not None and (args.dry_run or args.cluster == "slurm" or code not in (0, 1)):
            return code  # on a cluster the last job writes the report; here it is written now, unless we were stopped
    out.mkdir(parents=True, exist_ok=True)
    print(sweep.write_report(found, made, out))
    print(
        f"report            {out / 'sweep.md'}, {out / 'results.json'}; every point has its own page, {out}/<point>/report.html"
    )
    unfinished = [j for j in made.jobs if j.report and not made.done(j)]
    return 1 if (unfinished or refused) and not args.report else 0
