"""The stages as a graph: what is done, what is stale, what is next.

A node's folder is named by its fingerprint: a hash of the part of the config that the stage reads, of its inputs' fingerprints and of the stage's
version. So two IPCs of one set share experts and calibration without anyone saying so, a finished command does nothing when run again, and a changed
setting redoes just what depends on it. A folder is complete when its ``stage.json`` (written last, with size and hash of every file) is there and true.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator

import numpy as np
import torch
import torchvision

from ltdd_scale import __version__, calibrate, evaluate, initialize, recover, relabel
from ltdd_scale.config import Config, to_dict
from ltdd_scale.data import sampling, shards, sources
from ltdd_scale.errors import UserError
from ltdd_scale.experts import train
from ltdd_scale.runtime import files
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.progress import duration
from ltdd_scale.runtime.ranks import Ranks

# Raised when a stage's results change for the same settings: what was made before is then stale.
VERSIONS = {"shard": 1, "experts": 1, "calibrate": 1, "initialize": 1, "recover": 1, "relabel": 1, "student": 1, "evaluate": 1}
STAGES = ("shard", "observer", "teacher", "calibrate", "initialize", "recover", "relabel", "evaluate")


@dataclass
class Node:
    """One stage with its settings: `run(config, context)` fills the folder `stage`/`fingerprint` of the store."""

    name: str
    stage: str
    run: Callable[[Config, Context], dict[str, Any]]
    reads: dict[str, Any]
    inputs: list[str]
    fingerprint: str = ""
    effort: float = 1.0  # relative, for sharing students out over ranks

    def folder(self, store: Path) -> Path:
        return store / self.stage / self.fingerprint


def _run_shard(config: Config, context: Context) -> dict[str, Any]:
    if not context.ranks.first:
        return {}
    data = config.data
    source = sources.open_source(data)
    name = "set" if data.source != "digits" else "digits"
    manifest = shards.write(context.out, name, source, data.shard_images, data.store_resolution, quiet=context.quiet)
    counts = manifest["splits"]["train"]["counts"]
    context.say(f"shard: {sum(counts)} training images of {len(counts)} classes, {max(counts)} … {min(counts)} a class")
    if manifest["quarantined"]:
        context.say(f"shard: {manifest['quarantined']} images do not decode and are left out: see {context.out / 'quarantine.json'}")
    return {"train": sum(counts), "largest": max(counts), "smallest": min(counts), "quarantined": manifest["quarantined"]}


def graph(config: Config) -> dict[str, Node]:
    """All nodes of the config by name, inputs before what needs them, fingerprints set."""
    c = to_dict(config)
    net = {"seed": c["seed"], "resolution": config.data.resolution, "mirror": config.data.mirror, "precision": config.runtime.precision}
    data = {k: v for k, v in c["data"].items() if k not in ("resolution", "mirror")}
    judged = {k: v for k, v in c["evaluate"].items() if k not in ("nets", "seeds", "random", "matrix", "epochs", "full_epochs")}
    nodes: dict[str, Node] = {}

    def add(name: str, stage: str, run: Callable, reads: dict, inputs: list[str], effort: float = 1.0) -> None:
        node = Node(name, stage, run, reads, inputs, effort=effort)
        above = {i: nodes[i].fingerprint for i in inputs}
        text = json.dumps([stage, VERSIONS[stage], reads, above], sort_keys=True)
        node.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        nodes[name] = node

    add("shard", "shard", _run_shard, data, [])
    for role in ("observer", "teacher"):
        reads = {"role": role, role: c[role], "debias": config.strategies.debias, **net}
        add(role, "experts", partial(train.run, role), reads, ["shard"])
    add("calibrate", "calibrate", calibrate.run, {"on": config.strategies.calibrate, **c["calibrate"], **net}, ["shard", "observer"])
    reads = {"confident": config.strategies.confident_init, "ipc": config.ipc, **c["initialize"], **net}
    add("initialize", "initialize", initialize.run, reads, ["shard", "teacher"])
    add("recover", "recover", recover.run, {"ipc": config.ipc, "variance": config.calibrate.variance, **c["recover"], **net}, ["shard", "calibrate", "initialize"])
    reads = {**c["relabel"], **net, **({**judged, "epochs": config.evaluate.epochs} if config.relabel.labels == "stored" else {})}
    add("relabel", "relabel", relabel.run, reads, ["shard", "teacher", "recover"])
    students = []
    for unit in evaluate.units(config):
        which = unit["set"]
        inputs = ["shard", "teacher", *{"distilled": ["recover", "relabel"], "initial": ["initialize"]}.get(which, [])]
        epochs = config.evaluate.full_epochs if which == "full" else config.evaluate.epochs
        reads = {**unit, **judged, "epochs": epochs, "ipc": None if which == "full" else config.ipc, **c["relabel"], **net}
        reads.update(width=config.teacher.width, norm=config.teacher.norm)
        name = f"student/{which}-{unit['labels']}-{unit['net']}-s{unit['seed']}"
        add(name, "student", partial(evaluate.run_student, unit), reads, inputs, effort=epochs * (20 if which == "full" else 1))
        students.append(name)
    add("evaluate", "evaluate", evaluate.run, {"labels": config.relabel.labels, **c["evaluate"]}, ["shard", "observer", "teacher", "calibrate", *students])
    return nodes


def needed(nodes: dict[str, Node], targets: list[str]) -> list[str]:
    """`targets` and all that they depend on, in order."""
    want: set[str] = set()

    def visit(name: str) -> None:
        if name not in want:
            want.add(name)
            for i in nodes[name].inputs:
                visit(i)

    for target in targets:
        visit(target)
    return [name for name in nodes if name in want]


def complete(folder: Path) -> dict[str, Any] | None:
    """The ``stage.json`` of a finished folder whose files all have the recorded sizes, or None."""
    record = folder / "stage.json"
    if not record.exists():
        return None
    saved = files.read_json(record)
    for name, (size, _) in saved["files"].items():
        path = folder / name
        if not path.exists() or path.stat().st_size != size:
            return None
    return saved


def damage(folder: Path) -> list[str]:
    """Every file of a finished folder whose bytes are not the recorded ones, a line each."""
    saved, wrong = files.read_json(folder / "stage.json"), []
    for name, (size, digest) in saved["files"].items():
        path = folder / name
        if not path.exists():
            wrong.append(f"{path}: missing")
        elif path.stat().st_size != size or files.sha256(path) != digest:
            wrong.append(f"{path}: damaged (its hash does not match)")
    return wrong


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
def _alone(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """One process at work on a folder; the kernel lets go when it dies."""
    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting: another run is at work on {folder}")
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def is_running(folder: Path) -> bool:
    if not (folder / ".lock").exists():
        return False
    fd = os.open(folder / ".lock", os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


def _seal(node: Node, store: Path, facts: dict[str, Any], seconds: float, ranks: Ranks) -> None:
    """Clear what only the work needed, then write ``stage.json``."""
    folder = node.folder(store)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name.endswith(".tmp"):
            path.unlink()
    listed = sorted(p for p in folder.iterdir() if p.name not in ("stage.json", ".lock"))
    record = {
        "name": node.name,
        "stage": node.stage,
        "version": VERSIONS[node.stage],
        "fingerprint": node.fingerprint,
        "reads": node.reads,
        "facts": facts,
        "seconds": round(seconds, 2),
        "ranks": ranks.world,
        "device": torch.cuda.get_device_name() if ranks.device.type == "cuda" else f"{platform.machine()} CPU",
        "software": {"ltdd_scale": __version__, "torch": torch.__version__, "torchvision": torchvision.__version__, "numpy": np.__version__, "python": platform.python_version()},
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "files": {p.name: [p.stat().st_size, files.sha256(p)] for p in listed},
    }
    files.write_json(folder / "stage.json", record)


def _execute(node: Node, nodes: dict[str, Node], config: Config, store: Path, ranks: Ranks, quiet: bool, auto_ranks: bool) -> None:
    """Run one node on all `ranks`, unless another process has done it meanwhile."""
    folder = node.folder(store)
    inputs = {i: nodes[i].folder(store) for i in node.inputs}
    if ranks.first:
        for i in inputs.values():
            _trust(i)
    begin = time.monotonic()
    context = Context(ranks, folder, inputs, node.fingerprint, config.runtime.checkpoint_seconds, quiet, auto_ranks)
    if not ranks.first:
        if ranks.share(None):  # rank 0 has the lock now and says whether there is work left
            node.run(config, context)
            ranks.barrier()
        return
    try:
        with _alone(folder, context.say):
            if ranks.share(not complete(folder)):
                (folder / "stage.json").unlink(missing_ok=True)
                facts = node.run(config, context)
                ranks.barrier()
                _seal(node, store, facts, time.monotonic() - begin, ranks)
    except OSError as error:
        raise files.explain(error, folder) from error


def run(config: Config, store: Path, targets: list[str], ranks: Ranks, quiet: bool = False, auto_ranks: bool = True) -> dict[str, Node]:
    """Bring `targets` (node names) up to date; return the graph. Students are shared out over ranks, all other stages use all ranks."""
    nodes = graph(config)
    names = needed(nodes, targets)
    try:
        store.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise files.explain(error, store) from error

    def todo(batch: list[str]) -> list[str]:
        return ranks.share([n for n in batch if not complete(nodes[n].folder(store))] if ranks.first else None)

    def announce(text: str) -> None:
        if ranks.first and not quiet:
            print(text, flush=True)

    # A finished stage makes its inputs unnecessary: only what an unfinished one reads must be there.
    wanted = set(todo(names))
    pending = _unfinished(nodes, names, targets, wanted)
    plain = [n for n in pending if nodes[n].stage not in ("student", "evaluate")]
    students = [n for n in pending if nodes[n].stage == "student"]
    for name in plain:
        begin = time.monotonic()
        announce(f"{name} …")
        _execute(nodes[name], nodes, config, store, ranks, quiet, auto_ranks)
        announce(f"{name}: done in {duration(time.monotonic() - begin)}")
    if students:
        begin = time.monotonic()
        announce(f"{len(students)} students …")
        mine = sampling.spread(np.asarray([nodes[n].effort for n in students]), ranks.world)[ranks.rank]
        alone = Ranks(0, 1, ranks.device, ranks.autocast_dtype)
        for k in mine:
            _execute(nodes[students[k]], nodes, config, store, alone, quiet, auto_ranks)
            if not quiet:
                facts = files.read_json(nodes[students[k]].folder(store) / "stage.json")["facts"]
                print(f"  {students[k].removeprefix('student/')}: {facts['top1']:.1f} % (spread over classes {facts['class_std']:.1f})", flush=True)
        ranks.barrier()
        announce(f"students: done in {duration(time.monotonic() - begin)}")
    if "evaluate" in pending:
        _execute(nodes["evaluate"], nodes, config, store, ranks, quiet, auto_ranks)
    return nodes


def _unfinished(nodes: dict[str, Node], names: list[str], targets: list[str], missing: set[str]) -> list[str]:
    """Nodes to run, in order: missing ones that a target needs through missing ones."""
    want: set[str] = set()

    def visit(name: str) -> None:
        if name in missing and name not in want:
            want.add(name)
            for i in nodes[name].inputs:
                visit(i)

    for target in targets:
        visit(target)
    return [n for n in names if n in want]
