"""The stages of one config as a graph: what depends on what, and the fingerprint of each.

A node's folder is named by its fingerprint: a hash of what the stage reads, of its inputs'
fingerprints and of the stage's version. So two IPCs of one set share experts and calibration
without anyone saying so, a finished command does nothing when run again, and a changed setting
redoes just what depends on it. Nothing here needs torch, so that asking is quick.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltdd_scale.errors import UserError
from ltdd_scale.stage import Division, Given, Stage, settings_of


@dataclass(frozen=True)
class Node:
    """A stage with its settings. Its results lie in the folder `kind`/`fingerprint` of the
    store."""

    stage: Stage
    settings: Given
    fingerprint: str

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def kind(self) -> str:
        return self.stage.kind

    @property
    def where(self) -> str:
        """The folder, as seen from the store."""
        return f"{self.kind}/{self.fingerprint}"

    def folder(self, store: Path) -> Path:
        return store / self.kind / self.fingerprint

    @property
    def inputs(self) -> list[str]:
        """Names of the nodes that it reads, each once."""
        return list(dict.fromkeys(self.stage.inputs.values()))


def build(stages: Iterable[Stage], config: Any) -> dict[str, Node]:
    """The nodes of `stages` by name, inputs before what reads them."""
    nodes: dict[str, Node] = {}
    for stage in stages:
        settings = settings_of(stage, config)
        above = {role: nodes[name].fingerprint for role, name in stage.inputs.items()}
        text = json.dumps([stage.kind, stage.version, settings.hashed(), above], sort_keys=True)
        fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        nodes[stage.name] = Node(stage, settings, fingerprint)
    return nodes


def needed(
    nodes: dict[str, Node], targets: Iterable[str], missing: set[str] | None = None
) -> list[str]:
    """`targets` and all that they depend on, in order.

    With `missing` of these nodes only: what a finished node reads need not be there.
    """
    want: set[str] = set()

    def visit(name: str) -> None:
        if name not in want and (missing is None or name in missing):
            want.add(name)
            for i in nodes[name].inputs:
                visit(i)

    for target in targets:
        visit(target)
    return [name for name in nodes if name in want]


def goals(nodes: dict[str, Node], targets: Iterable[str]) -> list[str]:
    """The nodes that `targets` stand for: a target is a node's name or a group's.

    Raises `UserError` for a target that this config does not have.
    """
    out = []
    for target in targets:
        found = [n for n, node in nodes.items() if target in (n, node.stage.group)]
        if not found:
            jobs = ", ".join(dict.fromkeys(node.stage.job for node in nodes.values()))
            raise UserError(f"this config has no stage '{target}': it has {jobs}")
        out += found
    return list(dict.fromkeys(out))


def check_part(nodes: dict[str, Node], targets: Iterable[str], part: tuple[int, int]) -> None:
    """Raise `UserError` for a target whose work cannot be done in parts, and for targets of which
    one needs all of another."""
    targets = list(targets)
    whole = [n for n in targets if nodes[n].stage.division not in (Division.CHUNKS, Division.UNITS)]
    if whole:
        able = [node.stage.job for node in nodes.values() if node.name not in whole]
        able = [j for j in dict.fromkeys(able) if _divisible(nodes, j)]
        raise UserError(
            f"--part {part[0]}/{part[1]}: {whole[0]} cannot be done in parts, only "
            f"{' and '.join(able)} can"
        )
    jobs = list(dict.fromkeys(nodes[n].stage.job for n in targets))
    if len(jobs) > 1:
        raise UserError(
            f"--part {part[0]}/{part[1]}: of one job at a time, not of {' and '.join(jobs)}"
        )


def _divisible(nodes: dict[str, Node], job: str) -> bool:
    parted = (Division.CHUNKS, Division.UNITS)
    return any(n.stage.job == job and n.stage.division in parted for n in nodes.values())
