"""Bringing the graph up to date: which stage runs next, on which ranks, and what makes its folder complete."""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ltdd_scale import __version__, calibrate, evaluate, initialize, recover, relabel
from ltdd_scale.config import Config
from ltdd_scale.data import sampling, shards, sources
from ltdd_scale.errors import UserError
from ltdd_scale.experts import train
from ltdd_scale.graph import VERSIONS, Node, complete, damage, goals, graph, needed, part_mark
from ltdd_scale.runtime import files, signals
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.progress import duration
from ltdd_scale.runtime.ranks import Ranks


def _run_shard(config: Config, context: Context) -> dict[str, Any]:
    if not context.ranks.first:
        return {}
    data = config.data
    if data.source == "shards":
        manifest = shards.adopt(Path(data.path), context.out, context.quiet)
    else:
        name = "set" if data.source != "digits" else "digits"
        manifest = shards.write(
            context.out,
            name,
            sources.open_source(data),
            data.shard_images,
            data.store_resolution,
            quiet=context.quiet,
            quality=data.store_quality,
        )
    counts = manifest["splits"]["train"]["counts"]
    context.say(
        f"shard: {sum(counts)} training images of {len(counts)} classes, {max(counts)} … {min(counts)} a class"
    )
    if manifest["notes"].get("official ImageNet-LT") == "yes":
        context.say("shard: the training list is the official one of ImageNet-LT")
    if manifest["quarantined"]:
        context.say(
            f"shard: {manifest['quarantined']} images do not decode and are left out: see {context.out / 'quarantine.json'}"
        )
    return {
        "train": sum(counts),
        "largest": max(counts),
        "smallest": min(counts),
        "quarantined": manifest["quarantined"],
    }


def _run(node: Node, config: Config, context: Context) -> dict[str, Any]:
    """The node's stage; the facts that it wants in ``stage.json``."""
    match node.stage:
        case "shard":
            return _run_shard(config, context)
        case "experts":
            return train.run(node.work, config, context)
        case "student":
            return evaluate.run_student(node.work, config, context)
    stage = {
        "calibrate": calibrate,
        "initialize": initialize,
        "recover": recover,
        "relabel": relabel,
        "evaluate": evaluate,
    }[node.stage]
    return stage.run(config, context)


_VERIFIED: set[Path] = set()


def _trust(folder: Path) -> None:
    """Hash an input once a process before a stage reads it."""
    if folder in _VERIFIED:
        return
    wrong = damage(folder)
    if wrong:
        raise UserError(f"{wrong[0]}; delete the folder {folder} and run the same command again")
    _VERIFIED.add(folder)


@contextmanager
def _alone(
    folder: Path, say: Callable[[str], None], part: tuple[int, int] | None = None
) -> Iterator[None]:
    """One process at work on a folder, or on a part of it; the kernel lets go when it dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:

        def hold(name: str, kind: int) -> None:
            fd = os.open(folder / name, os.O_CREAT | os.O_RDWR)
            held.callback(os.close, fd)
            if not files.lock(fd, kind):
                say(f"waiting: another run is at work on {folder}")
                while not files.lock(fd, kind):
                    signals.check()
                    time.sleep(0.2)

        # Parts tolerate each other, not who works on the whole.
        hold(".lock", fcntl.LOCK_EX if part is None else fcntl.LOCK_SH)
        if part is not None:
            hold(f".lock-{part[0]}-{part[1]}", fcntl.LOCK_EX)
        yield


def _seal(node: Node, store: Path, facts: dict[str, Any], seconds: float, ranks: Ranks) -> None:
    """Clear what only the work needed, then write ``stage.json``."""
    folder = node.folder(store)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name.endswith(".tmp"):
            path.unlink()
    listed = sorted(
        p for p in folder.iterdir() if p.name != "stage.json" and not p.name.startswith(".")
    )
    record = {
        "name": node.name,
        "stage": node.stage,
        "version": VERSIONS[node.stage],
        "fingerprint": node.fingerprint,
        "reads": node.reads,
        "facts": facts,
        "seconds": round(seconds, 2),
        "ranks": ranks.world,
        "precision": str(ranks.autocast_dtype or torch.float32).removeprefix("torch."),
        "device": torch.cuda.get_device_name()
        if ranks.device.type == "cuda"
        else f"{platform.machine()} CPU",
        "software": {
            "ltdd_scale": __version__,
            "torch": torch.__version__,
            "torchvision": importlib.metadata.version("torchvision"),
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "files": {p.name: [p.stat().st_size, files.sha256(p)] for p in listed},
    }
    files.write_json(folder / "stage.json", record)


def _execute(
    node: Node,
    nodes: dict[str, Node],
    config: Config,
    store: Path,
    ranks: Ranks,
    quiet: bool,
    auto_ranks: bool,
    part: tuple[int, int] | None,
) -> None:
    """Run one node, or a part of it, on all `ranks`, unless another process has done it meanwhile."""
    signals.check()
    folder = node.folder(store)
    inputs = {i: nodes[i].folder(store) for i in node.inputs}
    if ranks.first:
        for i in inputs.values():
            _trust(i)
    begin = time.monotonic()
    # Students run side by side: only rank 0's draws its progress.
    quiet = quiet or os.environ.get("RANK", "0") != "0"
    context = Context(
        ranks,
        folder,
        inputs,
        node.fingerprint,
        config.runtime.checkpoint_seconds,
        quiet,
        auto_ranks,
        part,
    )
    if not ranks.first:
        if ranks.share(None):  # rank 0 has the lock now and says whether there is work left
            _run(node, config, context)
            ranks.barrier()
            ranks.barrier()  # rank 0 has sealed the folder: what comes next may read it
        return
    try:
        with _alone(folder, context.say, part):
            if ranks.share(not complete(folder)):
                (folder / "stage.json").unlink(missing_ok=True)
                facts = _run(node, config, context)
                ranks.barrier()
                if part is not None:
                    (folder / part_mark(*part)).touch()
                else:
                    _seal(node, store, facts, time.monotonic() - begin, ranks)
                    if "SLURM_JOB_ID" in os.environ:  # for who reads the logs of a hundred jobs
                        print(
                            f"sealed {node.stage}/{node.fingerprint}", file=sys.stderr, flush=True
                        )
                ranks.barrier()
    except OSError as error:
        raise files.explain(error, folder) from error


def _efforts(students: list[Node], shard: Path, ipc: int) -> np.ndarray:
    """Image-epochs of each student."""
    counts = files.read_json(shard / "manifest.json")["splits"]["train"]["counts"]
    return np.asarray(
        [
            s.effort * (sum(counts) if s.work["set"] == "full" else len(counts) * ipc)
            for s in students
        ]
    )


def run(
    config: Config,
    store: Path,
    targets: list[str],
    ranks: Ranks,
    quiet: bool = False,
    auto_ranks: bool = True,
    part: tuple[int, int] | None = None,
) -> dict[str, Node]:
    """Bring `targets` (node names) up to date; return the graph. Students are shared out over ranks, all other stages use all ranks.

    With `part` (k, n) only the k-th of n shares of recovery's chunks ("recover") or of the students ("evaluate") is done, and the stage left unfinished.
    """
    nodes = graph(config)
    share, shares = part or (0, 1)
    targets = goals(nodes, targets, part)
    names = needed(nodes, targets)
    try:
        store.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise files.explain(error, store) from error

    def todo(batch: list[str]) -> list[str]:
        return ranks.share(
            [n for n in batch if not complete(nodes[n].folder(store))] if ranks.first else None
        )

    def announce(text: str) -> None:
        if ranks.first and not quiet:
            print(text, flush=True)

    pending = needed(nodes, targets, set(todo(names)))
    plain = [n for n in pending if nodes[n].stage not in ("student", "evaluate")]
    students = [n for n in pending if nodes[n].stage == "student"]
    for name in plain:
        if name != "shard" and "recover" in plain and not auto_ranks:
            manifest = files.read_json(nodes["shard"].folder(store) / "manifest.json")
            recover.check_ranks(config.recover, len(manifest["classes"]), config.ipc, ranks.world)
        begin = time.monotonic()
        announce(f"{name} …")
        _execute(
            nodes[name],
            nodes,
            config,
            store,
            ranks,
            quiet,
            auto_ranks,
            part if name == "recover" and "recover" in targets else None,
        )
        announce(f"{name}: done in {duration(time.monotonic() - begin)}")
    if students:
        begin = time.monotonic()
        # A part's share is of all students, not of those left: parts that start at different times must agree on it.
        several = targets if part else students
        efforts = _efforts([nodes[n] for n in several], nodes["shard"].folder(store), config.ipc)
        mine = [
            k
            for k in sampling.spread(efforts, shares * ranks.world)[
                share * ranks.world + ranks.rank
            ]
            if several[k] in students
        ]
        announce(
            f"{len(students)} students …"
            if not part
            else f"part {share} of {shares} of {len(several)} students …"
        )
        alone = Ranks(0, 1, ranks.device, ranks.autocast_dtype)
        for done, k in enumerate(mine, 1):
            _execute(nodes[several[k]], nodes, config, store, alone, quiet, auto_ranks, None)
            if not quiet:
                facts = files.read_json(nodes[several[k]].folder(store) / "stage.json")["facts"]
                left = duration((time.monotonic() - begin) / done * (len(mine) - done))
                text = f"{several[k].removeprefix('student/')}: {facts['top1']:.1f} % (spread over classes {facts['class_std']:.1f})"
                print(
                    f"  {text}; rank {ranks.rank} has done {done} of {len(mine)}, {left} left",
                    flush=True,
                )
        ranks.barrier()
        announce(f"students: done in {duration(time.monotonic() - begin)}")
    if "evaluate" in pending:
        _execute(nodes["evaluate"], nodes, config, store, ranks, quiet, auto_ranks, None)
    return nodes
