"""What of a run is done, running, stale, damaged, partial or missing. Quick: nothing here needs
torch."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ltdd_scale import recipe
from ltdd_scale.config import load
from ltdd_scale.errors import UserError
from ltdd_scale.pipeline import graph, store
from ltdd_scale.pipeline.graph import Node
from ltdd_scale.runtime import files, progress
from ltdd_scale.runtime.progress import duration

RECORD = "run.json"


@dataclass(frozen=True)
class Line:
    """One stage, or the stages of one group: its state, and what there is to say of it."""

    name: str
    state: str
    note: str = ""
    folder: str = ""
    progress: list[dict[str, Any]] | None = None


def load_run(run: Path) -> tuple[Any, dict[str, Node], dict[str, Any]]:
    """(config, nodes, record) of a run folder, as its last command left them."""
    if not (run / RECORD).exists():
        raise UserError(f"{run} is not a run folder (no {RECORD} in it), nor a sweep's")
    record = files.read_json(run / RECORD)
    if not (run / "config.yaml").exists():
        raise UserError(f"{run / 'config.yaml'} is missing: the next 'ltdd-scale run' writes it")
    config = load.from_text((run / "config.yaml").read_text())
    nodes = graph.build(recipe.stages(config, record.get("source", "")), config)
    return config, nodes, record


def lines(nodes: dict[str, Node], record: dict[str, Any]) -> list[Line]:
    """A line a stage, and one a group of stages."""
    root, out, groups = Path(record["store"]), [], set()
    for name, node in nodes.items():
        group = node.stage.group
        if not group:
            out.append(_line(name, node, root, record["stages"].get(name)))
        elif group not in groups:
            groups.add(group)
            members = [n for n in nodes.values() if n.stage.group == group]
            done = sum(bool(store.complete(n.folder(root))) for n in members)
            state = "done" if done == len(members) else "missing"
            running = [n for n in members if store.is_running(n.folder(root))]
            note = f"{done} of {len(members)}"
            said = [p for n in running for p in progress.read(n.folder(root))]
            if running:
                state, note = "running", f"{note}, {len(running)} at work"
            out.append(Line(group, state, note, progress=said))
    return out


def _line(name: str, node: Node, root: Path, before: str | None) -> Line:
    folder = node.folder(root)
    saved = store.complete(folder)
    if saved:
        note = f"{duration(saved['seconds'])} on {saved['ranks']} × {saved['device']}"
        peak = saved.get("peak_mb", {})
        note += "".join(f", {v} MB {k}" for k, v in peak.items() if v)
        return Line(name, "done", note, str(folder))
    if store.is_running(folder):
        said = progress.read(folder)
        since = f"since {duration(time.time() - folder.stat().st_mtime)}"
        note = "; ".join(map(progress.said, said)) or since
        return Line(name, "running", note, str(folder), said)
    if (folder / store.RECORD).exists():
        note = "a file is missing or of another size; the next run makes it again"
        return Line(name, "damaged", note, str(folder))
    if before not in (None, node.where):
        return Line(name, "stale", "made for other settings", str(folder))
    if folder.exists():
        note = "interrupted; the next run goes on from there"
        return Line(name, "partial", note, str(folder))
    return Line(name, "missing", "", str(folder))


def show(run: Path, as_json: bool = False) -> int:
    """Print the table of jobs, if there are any, and of a run a line a stage."""
    jobs = (run / "jobs" / "jobs.json").exists()
    if as_json:
        print(json.dumps(_record(run, jobs), indent=1, ensure_ascii=False))
        return 0
    if jobs:
        from ltdd_scale.launch import board, campaign

        print(board.table(campaign.load(run))[0])
        if not (run / RECORD).exists():
            return 0
    config, nodes, record = load_run(run)
    print(f"{run}: {config.name}, {config.method}, IPC {config.ipc}")
    found = lines(nodes, record)
    for line in found:
        where = os.path.relpath(line.folder, run) if line.folder else ""
        print(f"  {line.name:<12} {line.state:<9} {line.note}  {where}".rstrip())
    left = sum(line.state != "done" for line in found)
    print("everything is done" if not left else f"{left} stages left: ltdd-scale run goes on")
    return 0


def _record(run: Path, jobs: bool) -> dict[str, Any]:
    out: dict[str, Any] = {"run": str(run)}
    if jobs:
        from ltdd_scale.launch import board, campaign

        out["jobs"] = board.records(campaign.load(run))
        if not (run / RECORD).exists():
            return out
    config, nodes, record = load_run(run)
    found = [asdict(line) for line in lines(nodes, record)]
    done = all(line["state"] == "done" for line in found)
    head = {"config": config.name, "method": config.method, "ipc": config.ipc, "done": done}
    return {**out, **head, "stages": found}


def _folder_of(run: Path, stage: str) -> Path:
    """The folder of a stage of a run, as its last finished command left it; while none is finished,
    the one that is to be."""
    record = files.read_json(run / RECORD)
    root = Path(record["store"])
    where = record["stages"].get(stage)
    if where and (root / where / store.RECORD).exists():
        return root / where
    return load_run(run)[1][stage].folder(root)


def inspect(path: Path) -> int:
    """Print what is in a shard set, or in the one that a run reads."""
    if (path / RECORD).exists():
        path = _folder_of(path, recipe.SHARD)
    if not (path / "manifest.json").exists():
        raise UserError(
            f"{path}: no shard set there (no manifest.json); 'ltdd-scale shard CONFIG' makes one"
        )
    from ltdd_scale.data import profile

    print(profile.describe(path))
    return 0


def verify(path: Path) -> int:
    """Re-hash a run folder, a stage's folder, a shard set or a distilled set. 0 where every byte is
    as recorded."""
    from ltdd_scale.publish import set as published

    if not path.exists():
        raise UserError(f"no such path: {path}")
    folders = [path]
    if (path / RECORD).exists():
        record = files.read_json(path / RECORD)
        root = Path(record["store"])
        folders = [root / where for where in record["stages"].values()]
        with suppress(UserError):  # of an older version, or with weights that are gone
            folders += [node.folder(root) for node in load_run(path)[1].values()]
        folders = list(dict.fromkeys(folders))
        # A run need not have all: it may go on, and what finished stages have read may be deleted.
        finished = [f for f in folders if (f / store.RECORD).exists()]
        for where in dict.fromkeys(record["stages"].values()):
            if (folder := root / where) not in finished:
                print(f"{folder}: {'not finished' if folder.exists() else 'not there any more'}")
        if not finished:
            raise UserError(f"{path}: no stage of it is finished, so there is nothing to verify")
        folders = finished
        folders += [path / "distilled"] * (path / "distilled" / "files.json").exists()
    wrong = []
    for folder in folders:
        if (folder / "files.json").exists():
            found = published.damage(folder)
        elif (folder / store.RECORD).exists():
            found = store.damage(folder)
        elif (folder / "manifest.json").exists():
            from ltdd_scale.data import shards

            found = shards.verify(folder, quiet=False)
        else:
            raise UserError(
                f"{folder}: nothing to verify here (no run.json, stage.json, manifest.json or "
                "files.json)"
            )
        print(f"{folder}: {'as recorded' if not found else f'{len(found)} damaged'}")
        wrong += found
    for line in wrong:
        print(f"error: {line}")
    return 1 if wrong else 0
