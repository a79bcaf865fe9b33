"""Bringing nodes up to date: which stage runs next, on which ranks, and when its folder is done."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ltdd_scale.data import sampling
from ltdd_scale.errors import UserError
from ltdd_scale.pipeline import store
from ltdd_scale.pipeline.graph import Node, needed
from ltdd_scale.runtime import files, memory, place, signals
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.progress import duration
from ltdd_scale.runtime.ranks import Ranks
from ltdd_scale.stage import Division, Facts, function


@dataclass(frozen=True)
class How:
    """How work is done, not what: nothing here changes a result.

    `part` (k, n): only the k-th of n shares of the targets. `facts()` tells what is known of the
    real set once its shards are written.
    """

    facts: Callable[[], Facts]
    workers: int = 4
    checkpoint_seconds: float = 60.0
    quiet: bool = False
    part: tuple[int, int] | None = None
    location: Any = None


def bring_up_to_date(
    nodes: dict[str, Node], folder: Path, targets: list[str], ranks: Ranks, how: How
) -> None:
    """Do what is left of `targets` and of what they need. `folder` is the store.

    Units of one group are dealt to ranks, group after group; all other stages use all ranks. With
    `how.part` a target of chunks or of units is left unfinished, with its share done; what it needs
    is done whole.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise files.explain(error, folder) from error
    work = _Work(nodes, folder, targets, ranks, how)
    pending = work.left()
    for names in batches(nodes, pending):
        if nodes[names[0]].stage.division is Division.UNITS:
            work.deal(names)
        else:
            work.together(nodes[names[0]])


def batches(nodes: dict[str, Node], pending: list[str]) -> list[list[str]]:
    """`pending` in what is done at a time, in order: the units of one group, or one other stage.

    A group is done where its first unit stands. Units of a group do not need each other.
    """
    out: dict[str, list[str]] = {}
    for name in pending:
        stage = nodes[name].stage
        # A group may have the name of a stage.
        together = f"units {stage.job}" if stage.division is Division.UNITS else name
        out.setdefault(together, []).append(name)
    return list(out.values())


@dataclass
class _Work:
    nodes: dict[str, Node]
    store: Path
    targets: list[str]  # nodes of one job, where only a part of them is asked for
    ranks: Ranks
    how: How

    def say(self, text: str) -> None:
        if self.ranks.is_main and not self.how.quiet:
            print(text, flush=True)

    def left(self) -> list[str]:
        """Names of the nodes that have to be worked on, the same on every rank."""
        missing = None
        if self.ranks.is_main:
            names = needed(self.nodes, self.targets)
            folders = {n: self.nodes[n].folder(self.store) for n in names}
            missing = [n for n in names if not store.complete(folders[n])]
            for name in set(names) - set(missing):
                store.tidy(folders[name])  # one may have died just after it was sealed
        return needed(self.nodes, self.targets, set(self.ranks.broadcast(missing)))

    def idle(self, node: Node) -> str:
        """What to say where the ranks of all parts are more than the stage's pieces."""
        parts = self.how.part[1] if self.how.part and node.name in self.targets else 1
        world_size = self.ranks.world_size * parts
        if world_size == 1 or not node.stage.pieces:
            return ""
        pieces = function(node.stage.pieces)(node.settings, self.how.facts())
        if world_size <= pieces:
            return ""
        chunks = f"{pieces} chunk{'s' * (pieces > 1)}"
        return f"{node.name} has {chunks} for {world_size} ranks: the others have nothing to do"

    def together(self, node: Node) -> None:
        """A stage on all ranks."""
        part = self.how.part if node.name in self.targets else None
        # Here all ranks stop at once, with nothing begun.
        if self.ranks.agree(signals.requested())[0]:
            raise signals.Preempted(f"request before {node.name}")
        begin = time.monotonic()
        self.say(f"{node.name} …")
        if idle := self.idle(node):
            self.say(idle)
        self.execute(node, self.ranks, part)
        self.say(f"{node.name}: done in {duration(time.monotonic() - begin)}")

    def deal(self, units: list[str]) -> None:
        """Units of one group, each on one rank, the costly ones first onto the least loaded
        rank."""
        begin, part, job = time.monotonic(), self.how.part, self.nodes[units[0]].stage.job
        # A part's share is of all targets of the group, not of those left: parts that start at
        # different times must agree on it.
        asked = [n for n in self.targets if self.nodes[n].stage.job == job]
        if part and not asked:
            part = None  # it is needed first, so each part needs the whole of it
        share, shares = part or (0, 1)
        among = asked if part else units
        facts = self.how.facts()
        efforts = np.asarray([self._effort(self.nodes[n], facts) for n in among])
        dealt = sampling.spread(efforts, shares * self.ranks.world_size)
        mine = [among[k] for k in dealt[share * self.ranks.world_size + self.ranks.rank]]
        mine = [n for n in mine if n in units]
        of = f"part {share} of {shares} of " if part else ""
        self.say(f"{of}{len(among)} {job} …")
        alone = Ranks(0, 1, self.ranks.device, self.ranks.autocast_dtype)
        for done, name in enumerate(mine, 1):
            facts_of = self.execute(self.nodes[name], alone, None)
            if not self.how.quiet:
                left = duration((time.monotonic() - begin) / done * (len(mine) - done))
                note = facts_of.get("note", "done")
                print(
                    f"  {name.partition('/')[2] or name}: {note}; rank {self.ranks.rank} has done "
                    f"{done} of {len(mine)}, {left} left",
                    flush=True,
                )
        self.ranks.barrier()
        self.say(f"{job}: done in {duration(time.monotonic() - begin)}")

    def _effort(self, node: Node, facts: Facts) -> float:
        return function(node.stage.cost)(node.settings, facts).flops if node.stage.cost else 1.0

    def execute(self, node: Node, ranks: Ranks, part: tuple[int, int] | None) -> dict[str, Any]:
        """Run a stage unless its folder is complete; return its facts."""
        folder = node.folder(self.store)
        if "precision" not in node.settings:  # such a stage gives the same bytes with any
            ranks = replace(ranks, autocast_dtype=None)
        inputs = {role: self.nodes[n].folder(self.store) for role, n in node.stage.inputs.items()}
        if ranks.is_main:  # for all: it is hashed once, not by every rank
            for path in inputs.values():
                store.trust(path)
        # Units run side by side: only rank 0 shows a progress line.
        quiet = self.how.quiet or not self.ranks.is_main
        how = (self.how.checkpoint_seconds, self.how.workers, quiet, part, self.how.location)
        context = Context(ranks, folder, inputs, node.fingerprint, *how)
        begin, meter = time.monotonic(), memory.Meter()
        if not ranks.is_main:
            if not ranks.broadcast(None):  # rank 0 has the lock: is the folder complete?
                self._run(node, context)
                ranks.gather(meter.used())
                ranks.barrier()  # rank 0 has sealed the folder: what comes next may read it
            return {}
        try:
            with store.locked(folder, context.say, part):
                saved = ranks.broadcast(store.complete(folder))
                if saved:
                    return saved["facts"]
                store.unseal(folder)
                facts = self._run(node, context)
                used = ranks.gather(meter.used())
                if part is not None:
                    (folder / store.part_mark(*part)).touch()
                else:
                    self._seal(node, ranks, facts, time.monotonic() - begin, used)
                ranks.barrier()
                return facts
        except OSError as error:
            raise files.explain(error, folder) from error

    def _run(self, node: Node, context: Context) -> dict[str, Any]:
        if node.stage.division is Division.ONE and not context.ranks.is_main:
            return {}
        try:
            return function(node.stage.run)(node.settings, context)
        except torch.OutOfMemoryError as error:
            on, said = context.ranks.device, str(error).partition(". ")[0]
            raise UserError(
                f"{node.name} needs more memory than {on} has: lower {node.stage.smaller} ({said})"
            ) from error

    def _seal(
        self,
        node: Node,
        ranks: Ranks,
        facts: dict[str, Any],
        seconds: float,
        used: list[memory.Used],
    ) -> None:
        gpu, peaks = ranks.device.type == "cuda", [own.peak_mb for own in used]
        how = {
            "facts": facts,
            "seconds": round(seconds, 2),
            "peak_mb": {k: max(p.get(k, 0) for p in peaks) for k in peaks[0]},
            "read_mb": sum(own.read_mb for own in used),
            "core_seconds": round(sum(own.core_seconds for own in used), 2),
            "ranks": ranks.world_size,
            "precision": str(ranks.autocast_dtype or torch.float32).removeprefix("torch."),
            "device": torch.cuda.get_device_name() if gpu else f"{platform.machine()} CPU",
        }
        store.seal(node, node.folder(self.store), how)
        if place.here().in_slurm:  # for who reads the logs of a hundred jobs
            print(f"sealed {node.where}", file=sys.stderr, flush=True)
