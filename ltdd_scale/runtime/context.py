"""What a stage needs at run time: its folder, its inputs, the process group, logging."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltdd_scale.runtime import files, progress, signals
from ltdd_scale.runtime.checkpoint import Checkpoints
from ltdd_scale.runtime.progress import Progress
from ltdd_scale.runtime.ranks import Ranks


@dataclass
class Context:
    """`out` is the stage's own folder; `inputs` maps what the stage asks for to folders.

    `owner` is the fingerprint of the work. `part` (k, n): of the stage's pieces only the k-th of n
    shares; other jobs see to the others. `location` tells where the real images lie
    (`data.settings.Location`). Nothing here may change a result.
    """

    ranks: Ranks
    out: Path
    inputs: dict[str, Path]
    owner: str
    checkpoint_seconds: float = 60.0
    workers: int = 4
    quiet: bool = False
    part: tuple[int, int] | None = None
    location: Any = None

    @property
    def world_size(self) -> int:
        """Ranks at work on this stage, in all parts of it."""
        return self.ranks.world_size * (self.part or (0, 1))[1]

    def mine(self, pieces: Sequence[Any]) -> list[Any]:
        """This rank's pieces of work: every n-th, n counting the ranks of all parts."""
        first = (self.part or (0, 1))[0] * self.ranks.world_size + self.ranks.rank
        return list(pieces[first :: self.world_size])

    def input(self, name: str) -> Path:
        return self.inputs[name]

    def say(self, text: str) -> None:
        if self.ranks.is_main and not self.quiet:
            print(f"  {text}", file=sys.stderr, flush=True)

    def progress(
        self, title: str, total: int, unit: str, done: int = 0, stops: bool = True
    ) -> Progress:
        """`stops`: each update is a place where work may stop on a signal, because what is done is
        on the disk or quickly done again. Rank 0 writes the progress file too."""
        name = progress.NAME if self.part is None else f".part-{self.part[0]}{progress.NAME}"
        return Progress(
            title,
            total,
            unit,
            self.quiet or not self.ranks.is_main,
            done,
            signals.check if stops else lambda: None,
            self.out / name if self.ranks.is_main and self.out.is_dir() else None,
        )

    def checkpoints(self, name: str = "checkpoints") -> Checkpoints:
        # Work goes on only on the kind of GPU and in the precision it was begun in. Others give
        # other bits, and the fingerprint does not know them.
        owner = " ".join([self.owner, *self.ranks.done_in_and_on()])
        return Checkpoints(self.out / name, owner, self.checkpoint_seconds)

    def log(self, history: Sequence[dict[str, Any]]) -> None:
        """Write ``log.jsonl`` anew: a line an epoch. Cheap, so called after each."""
        if self.ranks.is_main and self.out.is_dir():
            text = "".join(json.dumps(entry) + "\n" for entry in history)
            files.guard()
            (self.out / "log.jsonl").write_text(text)
