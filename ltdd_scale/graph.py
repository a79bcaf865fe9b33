"""The stages as a graph: what is done, what is stale, what is missing. Nothing here needs torch, so that asking is quick.

A node's folder is named by its fingerprint: a hash of the part of the config that the stage reads, of its inputs' fingerprints and of the stage's
version. So two IPCs of one set share experts and calibration without anyone saying so, a finished command does nothing when run again, and a changed
setting redoes just what depends on it. A folder is complete when its ``stage.json`` (written last, with size and hash of every file) is there and true.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltdd_scale.config import Config, to_dict
from ltdd_scale.runtime import files

# Raised when a stage's results change for the same settings: what was made before is then stale.
VERSIONS = {
    "shard": 2,
    "experts": 2,
    "calibrate": 3,
    "initialize": 1,
    "recover": 3,
    "relabel": 2,
    "student": 3,
    "evaluate": 1,
}
STAGES = (
    "shard",
    "observer",
    "teacher",
    "calibrate",
    "initialize",
    "recover",
    "relabel",
    "evaluate",
)
SETS = ("random", "initial", "distilled")
LABELS = ("online", "stored", "single", "hard")


@dataclass
class Node:
    """One piece of work: its results lie in the folder `stage`/`fingerprint` of the store. `work` is what of it a stage module is told."""

    name: str
    stage: str
    work: Any
    reads: dict[str, Any]
    inputs: list[str]
    fingerprint: str = ""
    effort: float = 1.0  # a student's epochs, for sharing students out over ranks

    def folder(self, store: Path) -> Path:
        return store / self.stage / self.fingerprint


def units(config: Config) -> list[dict[str, Any]]:
    """All students that the config asks for."""
    settings, out = config.evaluate, []
    kind = config.relabel.labels
    for net in settings.nets or [config.teacher.net]:
        cells = [("distilled", kind)]
        if settings.random:
            cells.append(("random", kind))
        if settings.full_epochs:
            cells.append(("full", "hard" if kind == "hard" else "online"))
        if settings.matrix:
            cells += [(s, y) for s in SETS for y in LABELS if (s, y) not in cells]
        out += [
            {"set": s, "labels": y, "net": net, "seed": config.seed + k}
            for s, y in cells
            for k in range(settings.seeds)
        ]
    return out


def graph(config: Config) -> dict[str, Node]:
    """All nodes of the config by name, inputs before what needs them, fingerprints set."""
    c = to_dict(config)
    net = {
        "seed": c["seed"],
        "resolution": config.data.resolution,
        "mirror": config.data.mirror,
        "memory_gb": config.data.memory_gb,
        "loader": config.data.loader,
        "precision": config.runtime.precision,
    }
    data = {
        k: v
        for k, v in c["data"].items()
        if k not in ("resolution", "mirror", "memory_gb", "loader")
    }
    judged = {
        k: v
        for k, v in c["evaluate"].items()
        if k not in ("nets", "seeds", "random", "matrix", "epochs", "full_epochs")
    }
    training = {k: v for k, v in c["train"].items() if k != "deepspeed"}
    if config.train.engine == "deepspeed" and Path(config.train.deepspeed).exists():
        training["deepspeed"] = files.read_json(config.train.deepspeed)
    nodes: dict[str, Node] = {}

    def add(
        name: str, stage: str, work: Any, reads: dict, inputs: list[str], effort: float = 1.0
    ) -> None:
        node = Node(name, stage, work, reads, inputs, effort=effort)
        above = {i: nodes[i].fingerprint for i in inputs}
        text = json.dumps([stage, VERSIONS[stage], reads, above], sort_keys=True)
        node.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        nodes[name] = node

    add("shard", "shard", None, data, [])
    for role in ("observer", "teacher"):
        reads = {
            "role": role,
            role: c[role],
            "debias": config.strategies.debias,
            "train": training,
            **net,
        }
        add(role, "experts", role, reads, ["shard"])
    add(
        "calibrate",
        "calibrate",
        None,
        {"on": config.strategies.calibrate, **c["calibrate"], **net},
        ["shard", "observer"],
    )
    reads = {
        "confident": config.strategies.confident_init,
        "ipc": config.ipc,
        **c["initialize"],
        **net,
    }
    add("initialize", "initialize", None, reads, ["shard", "teacher"])
    add(
        "recover",
        "recover",
        None,
        {"ipc": config.ipc, "variance": config.calibrate.variance, **c["recover"], **net},
        ["shard", "calibrate", "initialize", *(["teacher"] * (config.recover.teacher_ce > 0))],
    )
    reads = {
        "relabel": c["relabel"],
        **net,
        "views": {**judged, "epochs": config.evaluate.epochs}
        if config.relabel.labels == "stored"
        else {},
    }
    add("relabel", "relabel", None, reads, ["shard", "teacher", "recover"])
    students = []
    for unit in units(config):
        which = unit["set"]
        inputs = [
            "shard",
            "teacher",
            *{"distilled": ["recover"], "initial": ["initialize"]}.get(which, []),
        ]
        if which == "distilled" and unit["labels"] == config.relabel.labels:
            inputs.append("relabel")
        # Only what this kind of label depends on: a change of the stored labels' settings leaves students with others alone.
        soft = {
            "online": ("adjust", "batch_size"),
            "single": ("adjust", "batch_size"),
            "stored": ("adjust", "batch_size", "topk", "epochs"),
            "hard": (),
        }
        made = {k: c["relabel"][k] for k in soft[unit["labels"]]}
        epochs = config.evaluate.full_epochs if which == "full" else config.evaluate.epochs
        shape = {
            "width": config.teacher.width,
            "norm": config.teacher.norm,
            "ipc": None if which == "full" else config.ipc,
        }
        reads = {
            "unit": unit,
            "evaluate": {**judged, "epochs": epochs},
            "relabel": made,
            **shape,
            **net,
        }
        name = f"student/{which}-{unit['labels']}-{unit['net']}-s{unit['seed']}"
        add(name, "student", unit, reads, inputs, effort=epochs)
        students.append(name)
    add(
        "evaluate",
        "evaluate",
        None,
        {"labels": config.relabel.labels, **c["evaluate"]},
        ["shard", "observer", "teacher", "calibrate", *students],
    )
    return nodes


def needed(
    nodes: dict[str, Node], targets: list[str], missing: set[str] | None = None
) -> list[str]:
    """`targets` and all that they depend on, in order; of `missing` nodes only, where given: what a finished node reads need not be there."""
    want: set[str] = set()

    def visit(name: str) -> None:
        if name not in want and (missing is None or name in missing):
            want.add(name)
            for i in nodes[name].inputs:
                visit(i)

    for target in targets:
        visit(target)
    return [name for name in nodes if name in want]


def goals(nodes: dict[str, Node], targets: list[str], part: tuple[int, int] | None) -> list[str]:
    """The nodes that a command works towards: a part of "evaluate" is a share of the students, and no verdict over them."""
    return (
        [n for n, node in nodes.items() if node.stage == "student"]
        if part and targets == ["evaluate"]
        else targets
    )


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


def part_mark(k: int, n: int) -> str:
    """The file that says that the k-th of n parts of a stage is done."""
    return f".part-{k}-{n}"


def is_running(folder: Path) -> bool:
    if not (folder / ".lock").exists():
        return False
    fd = os.open(folder / ".lock", os.O_RDWR)
    try:
        return not files.lock(fd, fcntl.LOCK_EX)
    finally:
        os.close(fd)
