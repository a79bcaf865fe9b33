"""Checkpoints of one piece of work: the numerically newest valid one counts, older ones go once a
newer is verified."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from ltdd_scale.errors import PassingError, UserError
from ltdd_scale.runtime import place, signals, tensors


def not_ours(path: Path, owner: str, ours: str) -> UserError:
    """What to say of a checkpoint of another owner."""
    work, _, begun = owner.partition(" ")
    if work != ours.partition(" ")[0]:
        return UserError(
            f"{path} belongs to other work ({owner}, not {ours}); delete it or choose another "
            "--store"
        )
    now = ours.partition(" ")[2]
    error = PassingError if place.here().in_slurm else UserError  # another turn may be there again
    return error(
        f"{path} was begun {begun or 'on a CPU'}, and here it would continue {now or 'on a CPU'}: "
        "the bytes would be those of neither. Go on where it was begun (a profile asks for a kind "
        "of GPU by constraint or gres), or delete it to begin again"
    )


class Checkpoints:
    """``step-000000000120.pt`` files in `folder`, written by one rank and read by all.

    `owner` is stored inside, and a checkpoint of other work is refused: the fingerprint of the
    work, then, on a GPU, what it is done in and on. At least `keep` valid ones stay. `seconds` is
    the time between saves that `due` asks for.

    `save` copies the state and returns; a thread writes, verifies and prunes. What went wrong there
    is raised by the next `save` or by `wait`.
    """

    def __init__(self, folder: str | Path, owner: str, seconds: float, keep: int = 2):
        self.folder, self.owner, self.seconds, self.keep = Path(folder), owner, seconds, keep
        self._last = time.monotonic()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def due(self) -> bool:
        return time.monotonic() - self._last >= self.seconds or signals.save_wanted(self._last)

    def save(self, step: int, state: dict[str, Any], wait: bool = False) -> None:
        self.wait()
        value = {"owner": self.owner, "step": step, "state": tensors.snapshot(state)}
        self._thread = threading.Thread(target=self._write, args=(step, value), name="checkpoint")
        self._thread.start()
        self._last = time.monotonic()
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until the last save is on the disk. Raises what it raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, step: int, value: dict[str, Any]) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"step-{step:012d}.pt"
            tensors.save(path, value)
            if tensors.is_whole(path.read_bytes()):
                for old in self._numbered()[self.keep :]:
                    old.unlink(missing_ok=True)
        except BaseException as error:  # the thread has no one to tell; `wait` has
            self._error = error

    def _numbered(self) -> list[Path]:
        """Newest first."""
        return sorted(
            self.folder.glob("step-*.pt"), key=lambda p: int(p.stem.split("-")[1]), reverse=True
        )

    def load(
        self, device: Any = "cpu", step: int | None = None
    ) -> tuple[int, dict[str, Any]] | None:
        """(step, state) of the newest valid checkpoint, or None. A damaged one is passed over for
        the one before.

        With `step` that of this step alone, which another rank has found to be valid. Raises
        `PassingError` where it cannot be read here.
        """
        self.wait()
        if step is not None:
            return self._exactly(step, device)
        for path in self._numbered():
            try:
                saved = tensors.load(path, device)
            except UserError:
                continue
            if saved["owner"] != self.owner:
                raise not_ours(path, saved["owner"], self.owner)
            return saved["step"], saved["state"]
        return None

    def _exactly(self, step: int, device: Any) -> tuple[int, dict[str, Any]]:
        path = self.folder / f"step-{step:012d}.pt"
        for _ in range(
            60
        ):  # a network file system may remember for a while what the folder held before
            try:
                saved = tensors.load(path, device)
                return saved["step"], saved["state"]
            except UserError as found:
                error = found
            time.sleep(1)
        raise PassingError(
            f"the checkpoint that rank 0 goes on from is not to be read here: {error}"
        )

    def clear(self) -> None:
        self.wait()
        for path in self._numbered():
            path.unlink(missing_ok=True)
        if self.folder.exists():
            for tmp in self.folder.glob(".*.tmp"):
                tmp.unlink(missing_ok=True)
            self.folder.rmdir()
