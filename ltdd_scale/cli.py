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


def _parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="ltdd-scale", description="Distill a long-tailed image set into a small balanced one, and say honestly how good it is.")
    top.add_argument("--version", action="version", version=f"ltdd-scale {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def working(name: str, text: str) -> argparse.ArgumentParser:
        p = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        if name == "train":
            p.add_argument("role", choices=("observer", "teacher"))
        p.add_argument("config", type=Path, help="a YAML file, such as configs/quickstart.yaml")
        p.add_argument("--out", type=Path, help="run folder (default: runs/NAME)")
        p.add_argument("--store", type=Path, help="where stages keep their results, shared between runs (default: 'store' beside the run folder)")
        p.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="settings laid over the config, such as --set ipc=50 recover.lr=0.01")
        p.add_argument("--nproc", type=int, help="ranks on this machine (default: one a GPU; without GPUs one a core, up to 8)")
        p.add_argument("--max-restarts", type=int, default=3, help="times that all ranks start again after one was killed (default: 3)")
        p.add_argument("--quiet", action="store_true", help="results and errors only")
        return p

    working("run", "all stages, then the report")
    working("train", "train one expert")
    for name, text in STAGES.items():
        working(name, text)
    working("ablation", "the run, and the run with each of the three strategies off, in one report")
    p = commands.add_parser("status", help="what of a run is done, running, stale, missing", description="What of a run is done, running, stale, missing.")
    p.add_argument("run", type=Path, help="a run folder, such as runs/quickstart")
    p = commands.add_parser("verify", help="re-hash an artefact", description="Re-hash a run folder, a stage folder, a shard set or a distilled set.")
    p.add_argument("path", type=Path)
    p = commands.add_parser("inspect", help="what is in a shard set", description="The long-tail profile, sizes and samples of a shard set.")
    p.add_argument("path", type=Path, help="a shard set or a run folder")
    p = commands.add_parser("fit", help="train a network on a distilled set", description="Train a network on a distilled set: no config, no real data needed.")
    p.add_argument("distilled", type=Path, help="a distilled set, such as runs/quickstart/distilled")
    p.add_argument("--net", help="network (default: the one the set was judged with)")
    p.add_argument("--epochs", type=int, help="epochs (default: as the set was judged)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--test", type=Path, help="folder <class>/<image> to judge it on")
    p.add_argument("--save", type=Path, help="where to write the weights")
    commands.add_parser("config", help="every setting, its default and its meaning", description="Every setting, its default and its meaning.")
    return top


def _work(args: argparse.Namespace, arguments: list[str]) -> int:
    signals.install()  # before anything that takes time
    from ltdd_scale import config as configuration
    from ltdd_scale import graph, launch, session

    config = configuration.load(args.config, args.set)
    launched = "RANK" in os.environ
    if args.nproc is not None and args.nproc < 1:
        raise UserError(f"--nproc {args.nproc}: at least 1")
    out = args.out or Path("runs") / config.name
    store = args.store or out.parent / "store"
    targets = {"run": list(graph.STAGES), "report": [], "train": [getattr(args, "role", "")]}.get(args.command, [args.command])
    job = session.Session(config, out.absolute(), store.absolute(), targets, args.quiet)
    if args.command == "ablation" and launched:
        raise UserError("ablation starts its own ranks: run it without torchrun, with --nproc where you want another number")
    if args.command == "ablation":
        return session.ablation(args, config, main)
    # Ranks that `--nproc` started leave the run folder to who started them; under torchrun rank 0 sees to it.
    leading = "LTDD_RENDEZVOUS" not in os.environ and os.environ.get("RANK", "0") == "0"
    reporting = args.command in ("run", "report")
    if leading:
        for warning in configuration.check(config):
            print(f"warning: {warning}", file=sys.stderr)
        job.enter()
    if not launched:
        if not job.pending():
            return job.finish(reporting)
        num = args.nproc or launch.default_ranks(config.runtime.device)
        if num > 1:
            return launch.run_ranks(num, arguments, auto=args.nproc is None, max_restarts=args.max_restarts) or job.finish(reporting)
    job.work(auto_ranks=os.environ.get("LTDD_AUTO_RANKS", "0" if launched else "1") == "1")
    return job.finish(reporting) if leading else 0


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it when it is imported: large pages save page faults on a CPU
    args = _parser().parse_args(arguments)
    try:
        if args.command == "config":
            from ltdd_scale.config import reference

            print(reference())
            code = 0
        elif args.command in ("status", "verify", "inspect", "fit"):
            from ltdd_scale import session

            if args.command == "status":
                code = session.status(args.run)
            elif args.command == "verify":
                code = session.verify(args.path)
            elif args.command == "inspect":
                code = session.inspect(args.path)
            else:
                from ltdd_scale import fit

                code = fit.run(args.distilled, args.net, args.epochs, args.seed, args.test, args.save)
        else:
            code = _work(args, arguments)
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(1)  # what all ranks found out is said once: rank 0's end ends the others
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = 1
    except signals.Preempted as request:
        if os.environ.get("RANK", "0") == "0" and "LTDD_RENDEZVOUS" not in os.environ:
            print(f"stopped by {request}; the same command goes on from here", file=sys.stderr, flush=True)
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
