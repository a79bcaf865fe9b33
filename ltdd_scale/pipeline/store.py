"""The folders of the store: complete or not, damaged, locked, sealed.

A folder is complete when its ``stage.json`` is there and true. It is written last, and holds the
size and the hash of every file.
"""

from __future__ import annotations

import errno
import fcntl
import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ltdd_scale import __version__
from ltdd_scale.errors import UserError
from ltdd_scale.pipeline.graph import Node
from ltdd_scale.runtime import files, signals

RECORD = "stage.json"
SCRATCH = (".tmp", ".progress.json")  # files that only the work needs, as folders are


def complete(folder: Path) -> dict[str, Any] | None:
    """The record of a finished folder whose files all have the recorded sizes, or None."""
    record = folder / RECORD
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
    saved, wrong = files.read_json(folder / RECORD), []
    for name, (size, digest) in saved["files"].items():
        path = folder / name
        if not path.exists():
            wrong.append(f"{path}: missing")
        elif path.stat().st_size != size or files.sha256(path) != digest:
            wrong.append(f"{path}: damaged (its hash does not match)")
    return wrong


_TRUSTED: set[Path] = set()


def trust(folder: Path) -> None:
    """Hash an input before a stage reads it, once a process. Raises `UserError` where it is
    damaged."""
    if folder in _TRUSTED:
        return
    wrong = damage(folder)
    if wrong:
        raise UserError(f"{wrong[0]}; delete the folder {folder} and run the same command again")
    _TRUSTED.add(folder)


def part_mark(k: int, n: int) -> str:
    """The file that says that the k-th of n parts of a stage is done."""
    return f".part-{k}-{n}"


def parts_done(folder: Path, n: int) -> bool:
    """Whether all of n parts of a stage are done."""
    return all((folder / part_mark(k, n)).exists() for k in range(n))


def is_running(folder: Path) -> bool:
    """Whether a process works there. Another user's folder is looked at without writing."""
    path = folder / ".lock"
    try:
        fd = os.open(path, os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY)
    except (FileNotFoundError, PermissionError):
        return False  # nobody has worked there, or who may not look cannot tell
    try:
        return not files.lock(fd, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
        # NFS gives an exclusive lock only to who may write. Parts are not seen like this.
        return not files.lock(fd, fcntl.LOCK_SH)
    finally:
        os.close(fd)


@contextmanager
def locked(
    folder: Path, say: Callable[[str], None], part: tuple[int, int] | None = None
) -> Generator[None]:
    """Lock a folder, or a part of it, for one process. The kernel releases the lock if the process
    dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:

        def hold(name: str, kind: int) -> None:
            fd = os.open(folder / name, os.O_CREAT | os.O_RDWR)
            held.callback(os.close, fd)
            if not files.lock(fd, kind):
                say(f"waiting: another run is at work on {folder}")
                while not files.lock(fd, kind):
                    signals.check()
                    time.sleep(0.2)

        # Parts tolerate each other, but not a process that works on the whole.
        hold(".lock", fcntl.LOCK_EX if part is None else fcntl.LOCK_SH)
        if part is not None:
            hold(f".lock-{part[0]}-{part[1]}", fcntl.LOCK_EX)
        yield


def unseal(folder: Path) -> None:
    """A folder that is worked on is not complete. One that was, and has lost a file since, is
    emptied: what is left of it does not tell what is missing."""
    if not (folder / RECORD).exists():
        return
    (folder / RECORD).unlink()
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif not path.name.startswith(".lock"):
            path.unlink()


def seal(node: Node, folder: Path, how: dict[str, Any]) -> None:
    """Write ``stage.json``, then clear what only the work needed. `how`: facts, seconds, ranks,
    …

    In this order: a run that dies in between has all that it made, or still has its checkpoints.
    """
    listed = sorted(p for p in folder.iterdir() if _is_result(p))
    record = {
        "name": node.name,
        "stage": node.kind,
        "version": node.stage.version,
        "fingerprint": node.fingerprint,
        "reads": node.settings.hashed(),
        **how,
        "software": software(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "files": {p.name: [p.stat().st_size, files.sha256(p)] for p in listed},
    }
    files.write_json(folder / RECORD, record)
    tidy(folder)


def tidy(folder: Path) -> None:
    """Clear what only the work on a finished folder needed."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.endswith(SCRATCH):
            path.unlink(missing_ok=True)


def _is_result(path: Path) -> bool:
    own = path.name == RECORD or path.name.startswith(".") or path.name.endswith(SCRATCH)
    return path.is_file() and not own


def software() -> dict[str, str]:
    names = ("torch", "torchvision", "numpy")
    found = {name: importlib.metadata.version(name) for name in names}
    return {"ltdd_scale": __version__, **found, "python": platform.python_version()}
