"""One rank's dealings with a run folder: enter it, see what is left, work, finish. Starts
nothing."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ltdd_scale import recipe
from ltdd_scale.config import load
from ltdd_scale.data.settings import Chosen, Location
from ltdd_scale.errors import UserError
from ltdd_scale.labels.catalog import KINDS
from ltdd_scale.labels.stage import labellers
from ltdd_scale.pipeline import graph, store
from ltdd_scale.pipeline.graph import Node
from ltdd_scale.publish.material import Material
from ltdd_scale.request import Request
from ltdd_scale.runtime import files, signals
from ltdd_scale.stage import Section, look_up

RECORD, CONFIG = "run.json", "config.yaml"


@dataclass(frozen=True)
class Session:
    """A request with its config and its graph."""

    request: Request

    @cached_property
    def config(self) -> Any:
        return load.from_text(self.request.config)

    @cached_property
    def nodes(self) -> dict[str, Node]:
        return graph.build(recipe.stages(self.config, self.request.source), self.config)

    @cached_property
    def targets(self) -> list[str]:
        found = graph.goals(self.nodes, self.request.targets)
        if self.request.part:
            graph.check_part(self.nodes, found, self.request.part)
        return found

    @property
    def out(self) -> Path:
        return Path(self.request.out)

    @property
    def store(self) -> Path:
        return Path(self.request.store)

    def pending(self) -> list[str]:
        """Names of the nodes that have to be worked on before the targets are done."""
        names = graph.needed(self.nodes, self.targets)
        missing = {n for n in names if not store.complete(self.nodes[n].folder(self.store))}
        return graph.needed(self.nodes, self.targets, missing)

    def material(self) -> Material:
        """What the report is written from."""
        roles, taught = recipe.roles(self.config), KINDS[self.config.relabel.labels].teacher
        names = {
            "shard": recipe.SHARD,
            "distilled": roles.distilled,
            "initial": roles.initial,
            "labels": roles.labels,
            "kept": roles.chosen,
            "kept_labels": roles.chosen_labels,
            **{role: role if taught else "" for role in labellers(self.config)},
            "zca": "whiten" if "whiten" in self.nodes else "",
            "verdict": recipe.VERDICT,
            "grouping": "grouping" if "grouping" in self.nodes else "",
            "embedding": "embedding" if "embedding" in self.nodes else "",
        }
        folders = {r: self.nodes[n].folder(self.store) if n else None for r, n in names.items()}
        return Material(
            name=self.config.name,
            config=self.config.model_dump(mode="json"),
            config_yaml=self.request.config,
            fingerprints={role: self.nodes[n].fingerprint for role, n in names.items() if n},
            folders=folders,
            stages=[(name, node.folder(self.store)) for name, node in self.nodes.items()],
        )


@contextmanager
def _alone(out: Path) -> Generator[None]:
    """Jobs of one run that end at once change its record one after the other."""
    try:
        fd = os.open(out / ".lock", os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise files.explain(error, out) from error
    try:
        while not files.lock(fd, fcntl.LOCK_EX):
            signals.check()
            time.sleep(0.05)
        yield
    finally:
        os.close(fd)


def enter(session: Session) -> None:
    """Make the run folder ours. Raises `UserError` where it holds a run of another config."""
    out = session.out
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise files.explain(error, out) from error
    with _alone(out):
        _take(session)


def _take(session: Session) -> None:
    out, name = session.out, session.config.name
    record = out / RECORD
    before = files.read_json(record) if record.exists() else {}
    if before and before.get("config") != name:
        raise UserError(
            f"{out} holds a run of the config '{before.get('config')}', not '{name}': choose "
            "another folder with --out"
        )
    mine = (RECORD, CONFIG, "jobs")
    if not before and any(p.name not in mine and not p.name.startswith(".") for p in out.iterdir()):
        raise UserError(
            f"{out} is not empty and is not a run folder: choose another one with --out"
        )
    known = {
        "config": name,
        "store": str(session.store),
        "source": session.request.source,
        "chosen": chosen_images(session.config),
        "location": look_up(session.config, Section("data", Location)).model_dump(),
        "stages": before.get("stages", {}),
    }
    if session.request.asked:
        known["asked"] = session.request.asked
        known["resolved"] = {
            "data.loader": session.config.data.loader,
            "evaluate.plain": session.config.evaluate.plain,
        }
    files.write_text(out / CONFIG, session.request.config)  # first: the record speaks of it
    files.write_json(record, {**before, **known})


def chosen_images(config: Any) -> str:
    """Which images of the source the config wants, wherever they lie: a hash."""
    chosen = look_up(config, Section("data", Chosen)).model_dump_json()
    return hashlib.sha256(chosen.encode()).hexdigest()[:16]


def execute(session: Session) -> None:
    """Do what is left, as one of as many ranks as the environment says."""
    # torch takes seconds to import: only where there is work.
    from ltdd_scale.data import shards
    from ltdd_scale.pipeline import run
    from ltdd_scale.runtime import ranks

    request, runtime = session.request, session.config.runtime
    # A node for sharding alone need not have a GPU.
    device = "cpu" if set(session.targets) <= {recipe.SHARD} else runtime.device
    how = runtime.precision, runtime.threads, session.store / ".meet", runtime.ranks_per_gpu
    peers = ranks.join(device, *how)
    how = run.How(
        facts=lambda: shards.facts(session.nodes[recipe.SHARD].folder(session.store)),
        workers=runtime.workers,
        checkpoint_seconds=runtime.checkpoint_seconds,
        quiet=request.quiet,
        part=request.part,
        location=look_up(session.config, Section("data", Location)),
    )
    try:
        run.bring_up_to_date(session.nodes, session.store, session.targets, peers, how)
        peers.barrier()
        ranks.leave()  # only here: after an error peers may be missing, and leaving would wait
    except RuntimeError as error:
        # Asked to stop, as our peers and helpers were, who have gone before us: what was saved last
        # counts.
        signals.check()
        lost = ranks.peer_lost(error)
        if lost is None:
            raise
        for _ in range(300):  # the launcher ends this rank too
            signals.check()
            time.sleep(0.1)
        raise lost from error


def note(session: Session) -> None:
    """Write into the run folder which stages its targets stand for."""
    names = graph.needed(session.nodes, session.targets)
    with _alone(session.out):
        record = files.read_json(session.out / RECORD)
        record["stages"].update({n: session.nodes[n].where for n in names})
        files.write_json(session.out / RECORD, record)


def publish(session: Session) -> None:
    """Write the report, unless it is there. Raises `UserError` where the run is not finished."""
    if not store.complete(session.nodes[recipe.VERDICT].folder(session.store)):
        raise UserError(
            f"{session.out} is not evaluated yet: run 'ltdd-scale run' first. Results of an older "
            "version do not count."
        )
    from ltdd_scale.publish import report  # with torch behind it: only where it is written

    material = session.material()
    if not report.is_current(material, session.out):
        report.write(material, session.out)


def is_published(session: Session) -> bool:
    from ltdd_scale.publish import report

    return report.is_current(session.material(), session.out)
