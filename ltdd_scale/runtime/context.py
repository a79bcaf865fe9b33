"""What a stage is given: its folder, its inputs, its peers, and a voice."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ltdd_scale.runtime import signals
from ltdd_scale.runtime.checkpoint import Checkpoints
from ltdd_scale.runtime.progress import Progress
from ltdd_scale.runtime.ranks import Ranks


@dataclass
class Context:
    """`out` is the stage's own folder; `inputs` maps the names of earlier stages to theirs."""

    ranks: Ranks
    out: Path
    inputs: dict[str, Path]
    fingerprint: str
    checkpoint_seconds: float
    quiet: bool = False
    auto_ranks: bool = field(
        default=True
    )  # nobody asked for this number of ranks: too many are idle, not an error
    part: tuple[int, int] | None = (
        None  # (k, n): of the stage's pieces only the k-th of n shares; other jobs see to the others
    )

    def share(self, pieces: Sequence[Any]) -> list[Any]:
        """This rank's pieces of work: every n-th, n counting the ranks of all parts."""
        (k, n), ranks = self.part or (0, 1), self.ranks
        return list(pieces[k * ranks.world + ranks.rank :: n * ranks.world])

    def input(self, name: str) -> Path:
        return self.inputs[name]

    def say(self, text: str) -> None:
        if self.ranks.first and not self.quiet:
            print(f"  {text}", file=sys.stderr, flush=True)

    def progress(
        self, title: str, total: int, unit: str, done: int = 0, stops: bool = True
    ) -> Progress:
        """`stops`: each update is a place where work may stop on a signal, because what is done is on the disk or quickly done again."""
        return Progress(
            title,
            total,
            unit,
            self.quiet or not self.ranks.first,
            done,
            signals.check if stops else lambda: None,
        )

    def checkpoints(self, name: str = "checkpoints") -> Checkpoints:
        # What a GPU began in bfloat16 is not gone on with in float32: with precision "auto" the fingerprint does not tell them apart.
        precision = (
            ""
            if self.ranks.autocast_dtype is None
            else f" in {str(self.ranks.autocast_dtype).removeprefix('torch.')}"
        )
        return Checkpoints(self.out / name, self.fingerprint + precision, self.checkpoint_seconds)
