"""What ``ltdd-scale`` is told: its commands and their options."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from ltdd_scale import __version__, recipe
from ltdd_scale.experts.stage import ROLES
from ltdd_scale.launch.clusters.catalog import CLUSTERS
from ltdd_scale.publish.settings import EXPORTS, NAMED_SETS, SET, Images


def _part(text: str) -> tuple[int, int]:
    k, _, n = text.partition("/")
    if not (k.isdecimal() and n.isdecimal() and int(k) < int(n)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected K/N with 0 <= K < N, such as 0/4")
    return int(k), int(n)


def _hours(text: str) -> float:
    try:
        hours = float(text)
    except ValueError:
        hours = 0.0
    if not 0 < hours < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected hours, such as 4 or 0.5")
    return hours


def _whole(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from {least} up")
        return int(text)

    return number


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected seconds, such as 5, from 0.1 up")
    return seconds


def _clustered(p: argparse.ArgumentParser, default: str | None = None) -> None:
    p.add_argument(
        "--cluster",
        choices=CLUSTERS,
        default=default,
        help="run the stages as jobs: of SLURM, or one after the other on this machine",
    )
    p.add_argument("--profile", type=Path, help="the cluster's settings: slurm/testbed.yaml, say")
    p.add_argument(
        "--dry-run",
        action="store_true",
        help="print the jobs, their sbatch lines and the estimated GPU-hours; submit nothing",
    )
    p.add_argument(
        "--deadline",
        type=_hours,
        metavar="HOURS",
        help="with --dry-run on SLURM: how many GPUs for each job meet it for the fewest GPU-hours",
    )
    p.add_argument(
        "--wait", action="store_true", help="stay until the jobs are over (they go on without it)"
    )


def _common(p: argparse.ArgumentParser, what: str) -> None:
    p.add_argument("--out", type=Path, help=f"folder of the {what} (default: runs/NAME)")
    p.add_argument(
        "--store",
        type=Path,
        help="where stages keep their results, shared between runs "
        "(default: 'store' beside the folder)",
    )
    p.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="settings laid over the config, such as --set ipc=50 recover.lr=0.02",
    )
    p.add_argument(
        "--nproc",
        type=_whole(1),
        help="ranks on this machine (default: one a GPU; without GPUs one a core, up to 8)",
    )
    p.add_argument("--quiet", action="store_true", help="results and errors only")
    p.add_argument(
        "--force", action="store_true", help="go on where the machine seems too small for it"
    )


def _working(commands, name: str, text: str) -> argparse.ArgumentParser:
    p = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    if name == "train":
        p.add_argument("role", choices=ROLES)
    p.add_argument("config", type=Path, help="a YAML file, such as configs/quickstart.yaml")
    _common(p, "run")
    p.add_argument(
        "--max-restarts",
        type=_whole(0),
        help="times that all ranks start again after one was killed (default: 3)",
    )
    p.add_argument(
        "--part",
        type=_part,
        metavar="K/N",
        help="only the K-th (from 0) of N shares of the work, as an array job does it; evaluate "
        "--part: of students of all classes, group-students --part: of those of groups of classes",
    )
    return p


def parser() -> argparse.ArgumentParser:
    """The parser of all commands: ``args.command`` is the one that was asked for."""
    top = argparse.ArgumentParser(
        prog="ltdd-scale",
        description="Distill a long-tailed image set into a small balanced one, and say honestly "
        "how good it is.",
    )
    top.add_argument("--version", action="version", version=f"ltdd-scale {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _clustered(_working(commands, "run", "all stages, then the report"))
    _add_sweep(commands)
    _add_looking(commands)
    # Last in the list: most people need none of them.
    _working(commands, "train", "one stage: train one expert")
    for name, text in recipe.commands().items():
        if name not in (*ROLES, recipe.STUDENTS):
            _working(commands, name, f"one stage: {text}")
    _working(commands, "report", "the last step: write the report of a finished run")
    return top


def _add_sweep(commands) -> None:
    p = commands.add_parser(
        "sweep",
        help="many configs as one campaign, with one report",
        description="Run all points of a sweep; what points share is done once. Again: just what "
        "is missing.",
    )
    p.add_argument("file", type=Path, help="a sweep, such as configs/sweeps/cifar10_lt.yaml")
    _common(p, "sweep")
    p.add_argument(
        "--max-jobs",
        type=_whole(0),
        help="SLURM jobs at a time, an array counting as one (default: the file's max_jobs; "
        "0: no limit)",
    )
    p.add_argument("--report", action="store_true", help="only write the report of what is there")
    p.add_argument(
        "--data-root",
        type=Path,
        metavar="DIR",
        help="folder that the data sets of the points lie in: DIR/cifar10 where a config says "
        "data.path: data/cifar10",
    )
    _clustered(p, default="local")


def _add_looking(commands) -> None:
    p = commands.add_parser(
        "status",
        help="what of a run or a sweep is done, running, stale, missing",
        description="What of a run is done, running, stale, missing; the jobs of a run or a sweep.",
    )
    p.add_argument("run", type=Path, help="a run folder, such as runs/quickstart, or a sweep's")
    p.add_argument("--json", action="store_true", help="the same for programs")
    p.add_argument(
        "--watch",
        nargs="?",
        type=_seconds,
        const=5.0,
        metavar="SECONDS",
        help="draw it again every so many seconds (default: 5) until no job runs or waits",
    )
    p = commands.add_parser(
        "cancel",
        help="cancel the jobs of a run or a sweep",
        description="Cancel the jobs of a run or a sweep. What they have made stays.",
    )
    p.add_argument("run", type=Path, help="a run folder, or a sweep's")
    p = commands.add_parser(
        "logs",
        help="the ends of jobs' logs",
        description="The ends of the logs of a job or a point; without a name, of the jobs that "
        "failed.",
    )
    p.add_argument("run", type=Path, help="a run folder, or a sweep's")
    p.add_argument("job", nargs="?", default="", help="a job, a point or a stage ('status' lists)")
    p.add_argument("--lines", type=_whole(1), default=30, help="lines of each log (default: 30)")
    p = commands.add_parser(
        "verify",
        help="re-hash an artefact",
        description="Re-hash a run folder, a stage folder, a shard set or a distilled set.",
    )
    p.add_argument(
        "path", type=Path, help="a run folder, a stage's, a shard set or a distilled set"
    )
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
    p.add_argument("--epochs", type=_whole(1), help="epochs (default: as the set was judged)")
    p.add_argument("--seed", type=_whole(0), default=0, help="of its draws (default: 0)")
    p.add_argument("--test", type=Path, help="folder <class>/<image> to judge it on")
    p.add_argument(
        "--save", type=Path, help="where to write the weights: NAME.safetensors, or torch's format"
    )
    p.add_argument("--labels", help="another kind that is in the set, such as single or hard")
    _add_export(commands)
    about = "Every setting, its default and its meaning."
    commands.add_parser("config", help=f"{about[0].lower()}{about[1:-1]}", description=about)


def _add_export(commands) -> None:
    p = commands.add_parser(
        "export",
        help="a distilled set in another format, with other images or a licence",
        description="Write a distilled set again, in another format, with other images or a "
        "licence.",
    )
    p.add_argument("path", type=Path, help="a run folder, or a distilled set")
    p.add_argument(
        "--format",
        choices=EXPORTS,
        default=SET,
        help="set: the whole set again; else one format alone (default: set)",
    )
    p.add_argument("--out", type=Path, help="folder (default: beside the set, SET-FORMAT)")
    p.add_argument("--images", choices=get_args(Images), help="format of the images")
    p.add_argument("--quality", type=int, help="of webp-lossy and jpeg images, of 100")
    p.add_argument("--license", help="licence of the source images, such as cc-by-4.0")
    p.add_argument(
        "--dataset",
        choices=NAMED_SETS,
        help="ddranking: its name of the data set, whose mean and std it is to use",
    )
    p.add_argument(
        "--measure",
        type=Path,
        metavar="TEST",
        help="folder <class>/<image>: train on the set's images and on the new ones, and write "
        "into the card what the change costs there",
    )
    p.add_argument("--seeds", type=_whole(1), default=3, help="of --measure (default: 3)")
