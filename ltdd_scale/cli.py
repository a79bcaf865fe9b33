"""``ltdd-scale <command>``: parses, calls one function of `launch`, prints; nothing else."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path

from ltdd_scale import recipe
from ltdd_scale.arguments import parser
from ltdd_scale.errors import UserError
from ltdd_scale.launch.guard import guarded, leave
from ltdd_scale.runtime import place, signals

LOOKING = (
    "status",
    "cancel",
    "logs",
    "verify",
    "inspect",
    "fit",
    "export",
    "sweep",
    "config",
)

READING = ("status", "logs", "verify", "inspect", "config")  # all that they do is said


def _check_deadline(args: argparse.Namespace) -> None:
    if args.deadline and not (args.dry_run and args.cluster == "slurm"):
        raise UserError(
            "--deadline goes with --dry-run and --cluster slurm: it says what to ask for"
        )


def _check_ranks(args: argparse.Namespace) -> None:
    if args.cluster == "slurm" and args.nproc is not None:
        raise UserError(
            "--nproc is of ranks on this machine: with --cluster slurm the profile says how many "
            "(nodes, tasks_per_node)"
        )


def _targets(args: argparse.Namespace) -> tuple[str, ...]:
    """The stages that a command works towards."""
    match args.command:
        case "run":
            return (recipe.VERDICT,)
        case "report":
            return ()
        case "train":
            return (args.role,)
        case recipe.VERDICT:  # a share of it is a share of the students, and no verdict over them
            return (recipe.STUDENTS,) if args.part else (recipe.VERDICT,)
    return (args.command,)


def _options(args: argparse.Namespace):
    from ltdd_scale.launch import commands

    names = ("cluster", "profile", "dry_run", "deadline", "wait", "nproc")
    names += ("quiet", "max_jobs", "force")
    return commands.Options(**{n: getattr(args, n) for n in names if hasattr(args, n)})


def _work(args: argparse.Namespace) -> int:
    signals.install(term_saves=place.here().notified)  # before anything that takes time
    from ltdd_scale.config import load
    from ltdd_scale.launch import perform

    config = load.load(args.config, args.set)
    clustered = args.command == "run" and args.cluster
    asked = args.command == "run" and (args.dry_run or args.wait or args.profile or args.deadline)
    if asked and not clustered:
        raise UserError(
            "--profile, --dry-run, --deadline and --wait go with --cluster slurm or --cluster local"
        )
    if clustered:
        _check_deadline(args)
        _check_ranks(args)
        if args.max_restarts is not None:
            raise UserError(
                "--max-restarts does not go with --cluster: a profile says it of jobs (retries)"
            )
    if clustered and args.part:
        raise UserError(
            "--part and --cluster do not go together: a profile's array makes the parts"
        )
    out = args.out or Path("runs") / config.name
    store = args.store or out.parent / "store"
    showing = bool(clustered and args.dry_run)
    resolved = perform.resolve(config, out, quiet=not place.speaks(), dry_run=showing)
    request = perform.make_request(
        resolved,
        _targets(args),
        out,
        store,
        part=args.part,
        report=args.command in ("run", "report"),
        quiet=args.quiet,
        force=args.force,
    )
    if clustered:
        from ltdd_scale.launch import commands

        return commands.run(_options(args), request, resolved.absent)
    from ltdd_scale.launch import run

    restarts = {} if args.max_restarts is None else {"max_restarts": args.max_restarts}
    return run.run(request, args.nproc, **restarts)


def _look(args: argparse.Namespace) -> int:
    """Commands that do no stage's work themselves."""
    match args.command:
        case "config":
            from ltdd_scale.config.reference import reference

            print(reference())
            return 0
        case "fit":
            from ltdd_scale import fit

            where = (args.test, args.save)
            return fit.run(args.distilled, args.net, args.epochs, args.seed, *where, args.labels)
        case "export":
            from ltdd_scale.launch import export

            names = (f.name for f in dataclasses.fields(export.Options))
            return export.export(export.Options(**{n: getattr(args, n) for n in names}))
        case "sweep":
            from ltdd_scale.launch import commands

            _check_deadline(args)
            _check_ranks(args)
            signals.install(term_saves=place.here().notified)
            where = (args.out, args.store)
            more = (args.report, args.data_root)
            return commands.run_sweep(_options(args), args.file, args.set, *where, *more)
        case "cancel" | "logs":
            from ltdd_scale.launch import logs

            if args.command == "cancel":
                return logs.cancel(args.run)
            return logs.show(args.run, args.job, args.lines)
    from ltdd_scale.launch import status

    match args.command:
        case "status" if args.watch:
            if args.json:
                raise UserError("--json and --watch do not go together")
            from ltdd_scale.launch import board

            return board.watch(args.run, args.watch)
        case "status":
            return status.show(args.run, args.json)
        case "verify":
            return status.verify(args.path)
    return status.inspect(args.path)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return its exit code."""
    # torch reads it when it is imported: large pages save page faults on a CPU.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    args = parser().parse_args(arguments)
    action = _look if args.command in LOOKING else _work
    return guarded(lambda: action(args), looks=args.command in READING)


def console() -> None:
    """The command's entry point: `main`'s code as the process's."""
    leave(main())
