"""``ltdd-scale <command>``: parses, calls one function, prints; nothing else."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from ltdd_scale import __version__
from ltdd_scale.errors import UserError
from ltdd_scale.runtime import signals

STAGES = {
    "shard": "write the WebDataset shards of the real set",
    "calibrate": "measure fair BatchNorm statistics",
    "initialize": "choose confident crops",
    "recover": "align the images with the statistics",
    "relabel": "make the soft labels",
    "evaluate": "train and judge students",
    "report": "write the report of a finished run",
}


def _part(text: str) -> tuple[int, int]:
    k, _, n = text.partition("/")
    if not (k.isdecimal() and n.isdecimal() and int(k) < int(n)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected K/N with 0 <= K < N, such as 0/4")
    return int(k), int(n)


def _parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="ltdd-scale",
        description="Distill a long-tailed image set into a small balanced one, and say honestly how good it is.",
    )
    top.add_argument("--version", action="version", version=f"ltdd-scale {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def clustered(p: argparse.ArgumentParser, default: str | None = None) -> None:
        p.add_argument(
            "--cluster",
            choices=("slurm", "local"),
            default=default,
            help="run the stages as jobs: of SLURM, or one after the other on this machine",
        )
        p.add_argument(
            "--profile", type=Path, help="the cluster's settings, such as slurm/testbed.yaml"
        )
        p.add_argument(
            "--dry-run",
            action="store_true",
            help="print the jobs, their sbatch lines and the estimated GPU-hours; submit nothing",
        )
        p.add_argument(
            "--wait",
            action="store_true",
            help="stay until the jobs are over (they go on without it)",
        )

    def working(name: str, text: str) -> argparse.ArgumentParser:
        p = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        if name == "train":
            p.add_argument("role", choices=("observer", "teacher"))
        p.add_argument("config", type=Path, help="a YAML file, such as configs/quickstart.yaml")
        p.add_argument("--out", type=Path, help="run folder (default: runs/NAME)")
        p.add_argument(
            "--store",
            type=Path,
            help="where stages keep their results, shared between runs (default: 'store' beside the run folder)",
        )
        p.add_argument(
            "--set",
            nargs="+",
            action="extend",
            default=[],
            metavar="KEY=VALUE",
            help="settings laid over the config, such as --set ipc=50 recover.lr=0.01",
        )
        p.add_argument(
            "--nproc",
            type=int,
            help="ranks on this machine (default: one a GPU; without GPUs one a core, up to 8)",
        )
        p.add_argument(
            "--max-restarts",
            type=int,
            default=3,
            help="times that all ranks start again after one was killed (default: 3)",
        )
        p.add_argument("--quiet", action="store_true", help="results and errors only")
        return p

    clustered(working("run", "all stages, then the report"))
    working("train", "train one expert")
    for name, text in STAGES.items():
        p = working(name, text)
        if name in ("recover", "evaluate"):
            p.add_argument(
                "--part",
                type=_part,
                metavar="K/N",
                help="only the K-th (from 0) of N shares of the work, as an array job does it",
            )
    working("ablation", "the run, and the run with each of the three strategies off, in one report")
    p = commands.add_parser(
        "sweep",
        help="many configs as one campaign, with one report",
        description="Run all points of a sweep; what points share is done once. Again: just what is missing.",
    )
    p.add_argument("file", type=Path, help="a sweep, such as configs/sweeps/cifar10_lt.yaml")
    p.add_argument("--out", type=Path, help="folder of the sweep (default: runs/NAME)")
    p.add_argument(
        "--store",
        type=Path,
        help="where stages keep their results (default: 'store' beside the sweep's folder)",
    )
    p.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="settings laid over every point",
    )
    p.add_argument(
        "--max-jobs",
        type=int,
        help="SLURM jobs at a time, an array counting as one (default: the file's max_jobs; 0: no limit)",
    )
    p.add_argument("--nproc", type=int, help="ranks a job with --cluster local")
    p.add_argument("--report", action="store_true", help="only write the report of what is there")
    p.add_argument("--quiet", action="store_true", help="results and errors only")
    clustered(p, default="local")
    p = commands.add_parser(
        "status",
        help="what of a run or a sweep is done, running, stale, missing",
        description="What of a run is done, running, stale, missing; the jobs of a run or a sweep.",
    )
    p.add_argument("run", type=Path, help="a run folder, such as runs/quickstart, or a sweep's")
    p.add_argument(
        "--watch",
        nargs="?",
        type=float,
        const=5.0,
        metavar="SECONDS",
        help="draw it again every so many seconds (default: 5) until no job runs or waits",
    )
    p = commands.add_parser(
        "cancel",
        help="cancel the jobs of a run or a sweep",
        description="Cancel the SLURM jobs of a run or a sweep. What they have made stays.",
    )
    p.add_argument("run", type=Path)
    p = commands.add_parser(
        "logs",
        help="the ends of jobs' logs",
        description="The ends of the logs of a job or a point; without a name, of the jobs that failed.",
    )
    p.add_argument("run", type=Path)
    p.add_argument(
        "job", nargs="?", default="", help="a job, a point or a stage, as 'status' calls them"
    )
    p.add_argument("--lines", type=int, default=30, help="lines of each log (default: 30)")
    p = commands.add_parser(
        "verify",
        help="re-hash an artefact",
        description="Re-hash a run folder, a stage folder, a shard set or a distilled set.",
    )
    p.add_argument("path", type=Path)
    p = commands.add_parser(
        "inspect",
        help="what is in a shard set",
        description="The long-tail profile, sizes and samples of a shard set.",
    )
    p.add_argument("path", type=Path, help="a shard set or a run folder")
    p = commands.add_parser(
        "fit",
        help="train a network on a distilled set",
        description="Train a network on a distilled set: no config, no real data needed.",
    )
    p.add_argument(
        "distilled", type=Path, help="a distilled set, such as runs/quickstart/distilled"
    )
    p.add_argument("--net", help="network (default: the one the set was judged with)")
    p.add_argument("--epochs", type=int, help="epochs (default: as the set was judged)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--test", type=Path, help="folder <class>/<image> to judge it on")
    p.add_argument("--save", type=Path, help="where to write the weights")
    commands.add_parser(
        "config",
        help="every setting, its default and its meaning",
        description="Every setting, its default and its meaning.",
    )
    return top


def _work(args: argparse.Namespace, arguments: list[str]) -> int:
    signals.install(term_saves="SLURM_STEP_ID" in os.environ)  # before anything that takes time
    from ltdd_scale import config as configuration
    from ltdd_scale import graph, session
    from ltdd_scale.launch import local
    from ltdd_scale.runtime import place

    config = configuration.load(args.config, args.set)
    launched = place.adopt()
    if args.nproc is not None and args.nproc < 1:
        raise UserError(f"--nproc {args.nproc}: at least 1")
    out = args.out or Path("runs") / config.name
    store = args.store or out.parent / "store"
    targets = {"run": list(graph.STAGES), "report": [], "train": [getattr(args, "role", "")]}.get(
        args.command, [args.command]
    )
    job = session.Session(
        config, out.absolute(), store.absolute(), targets, args.quiet, getattr(args, "part", None)
    )
    if args.command == "ablation" and launched:
        raise UserError(
            "ablation starts its own ranks: run it without torchrun, with --nproc where you want another number"
        )
    if args.command == "ablation":
        return session.ablation(args, config, main)
    if args.command == "run" and (args.dry_run or args.wait or args.profile) and not args.cluster:
        raise UserError(
            "--profile, --dry-run and --wait go with --cluster slurm or --cluster local"
        )
    # Ranks that `--nproc` started leave the run folder to who started them; under torchrun rank 0 sees to it.
    leading = "LTDD_RENDEZVOUS" not in os.environ and os.environ.get("RANK", "0") == "0"
    reporting = args.command in ("run", "report")
    if args.command == "run" and args.cluster:
        from ltdd_scale.launch import commands

        code = commands.run(args, config, job.out, job.store, job.enter)
        done = not args.dry_run and (
            code is None or (code == 0 and (args.wait or args.cluster == "local"))
        )
        return job.finish(True) if done else code
    if leading:
        for warning in configuration.check(config):
            print(f"warning: {warning}", file=sys.stderr)
        job.enter()
    if not launched:
        if not job.pending():
            return job.finish(reporting)
        num = args.nproc or local.default_ranks(config.runtime.device)
        if num > 1:
            return local.run_ranks(
                num, arguments, auto=args.nproc is None, max_restarts=args.max_restarts
            ) or job.finish(reporting)
    job.work(auto_ranks=os.environ.get("LTDD_AUTO_RANKS", "0" if launched else "1") == "1")
    return job.finish(reporting) if leading else 0


def _look(args: argparse.Namespace) -> int:
    """Commands that do no stage's work themselves."""
    from ltdd_scale import session

    match args.command:
        case "status" if args.watch:
            from ltdd_scale.launch import board

            return board.watch(args.run, args.watch)
        case "status":
            return session.status(args.run)
        case "verify":
            return session.verify(args.path)
        case "inspect":
            return session.inspect(args.path)
        case "fit":
            from ltdd_scale import fit

            return fit.run(args.distilled, args.net, args.epochs, args.seed, args.test, args.save)
        case "sweep":
            from ltdd_scale.launch import commands

            signals.install(term_saves="SLURM_STEP_ID" in os.environ)
            return commands.run_sweep(args)
        case _:
            from ltdd_scale.launch import board

            return (
                board.cancel(args.run)
                if args.command == "cancel"
                else board.logs(args.run, args.job, args.lines)
            )


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    os.environ.setdefault(
        "THP_MEM_ALLOC_ENABLE", "1"
    )  # torch reads it when it is imported: large pages save page faults on a CPU
    args = _parser().parse_args(arguments)
    try:
        if args.command == "config":
            from ltdd_scale.config import reference

            print(reference())
            code = 0
        elif args.command in ("status", "verify", "inspect", "fit", "cancel", "logs", "sweep"):
            code = _look(args)
        else:
            code = _work(args, arguments)
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(1)  # what all ranks found out is said once: rank 0's end ends the others
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = error.code
    except signals.Preempted as request:
        if os.environ.get("RANK", "0") == "0" and "LTDD_RENDEZVOUS" not in os.environ:
            print(
                f"stopped by {request}; the same command goes on from here",
                file=sys.stderr,
                flush=True,
            )
        code = signals.STOP_CODE
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        code = 0
    return code


def console() -> None:
    """The command's entry point: `main`'s code as the process's."""
    code = main()
    signals.ignore()
    sys.stdout.flush()
    sys.stderr.flush()
    if "RANK" in os.environ:
        os._exit(code)  # peers may hang in a collective; the launcher ends them
    sys.exit(code)
