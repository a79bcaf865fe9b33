"""Checkpoints of one piece of work: the numerically newest valid one counts, older ones go once a newer is verified."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ltdd_scale.errors import UserError
from ltdd_scale.runtime import tensors


class Checkpoints:
    """``step-000000000120.pt`` files in `folder`, written by one rank and read by all.

    `owner` (the fingerprint of the work) is stored inside, and a checkpoint of other work is refused. At least `keep` valid
    ones stay. `seconds` is the time between saves that `due` asks for.
    """

    def __init__(self, folder: str | Path, owner: str, seconds: float, keep: int = 2):
        self.folder, self.owner, self.seconds, self.keep = Path(folder), owner, seconds, keep
        self._last = time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self._last >= self.seconds

    def save(self, step: int, state: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:012d}.pt"
        tensors.save(path, {"owner": self.owner, "step": step, "state": state})
        if tensors.is_whole(path.read_bytes()):
            for old in self._numbered()[self.keep :]:
                old.unlink(missing_ok=True)
        self._last = time.monotonic()

    def _numbered(self) -> list[Path]:
        """Newest first."""
        return sorted(self.folder.glob("step-*.pt"), key=lambda p: int(p.stem.split("-")[1]), reverse=True)

    def load(self, device: Any = "cpu") -> tuple[int, dict[str, Any]] | None:
        """(step, state) of the newest valid checkpoint, or None. A damaged one is passed over for the one before."""
        for path in self._numbered():
            try:
                saved = tensors.load(path, device)
            except UserError:
                continue
            if saved["owner"] != self.owner:
                raise UserError(f"{path} belongs to other work ({saved['owner']}, not {self.owner}); delete it or choose another --store")
            return saved["step"], saved["state"]
        return None

    def clear(self) -> None:
        for path in self._numbered():
            path.unlink(missing_ok=True)
        if self.folder.exists():
            for tmp in self.folder.glob(".*.tmp"):
                tmp.unlink(missing_ok=True)
            self.folder.rmdir()
