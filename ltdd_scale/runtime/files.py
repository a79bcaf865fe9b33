"""Files that are whole or not there: tmp -> fsync -> rename -> fsync(dir), with hashes."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ltdd_scale.errors import PassingError, UserError

# Asked before a file appears under its name: a process that has lost the right to write raises here
# (see `launch/clusters/slurm_task.py`).
guard: Callable[[], None] = lambda: None  # noqa: E731


@contextmanager
def replacing(path: str | Path) -> Generator[BinaryIO]:
    """A file to write to, which becomes `path` when all went well: a crash leaves the old file or
    the new one, never a torn one."""
    path = Path(path)
    tmp = path.with_name(
        f".{path.name}.{os.urandom(6).hex()}.tmp"
    )  # not the process's number: two nodes may share a folder and have the same one
    try:
        with open(tmp, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        guard()
        os.replace(tmp, path)
        sync_folder(path.parent)
    except OSError as error:
        tmp.unlink(missing_ok=True)
        raise explain(error, path) from error
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all."""
    with replacing(path) as f:
        f.write(content)


# Of file servers that fail over, and machines that are short of memory: none of the user's making.
_PASSING = frozenset(
    (
        errno.EIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.ESHUTDOWN,
        errno.EREMOTEIO,
        errno.ENOTCONN,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.EAGAIN,
        errno.ENOMEM,
        errno.EPIPE,
    )
)


def kind(error: OSError) -> type[UserError]:
    return PassingError if error.errno in _PASSING else UserError


def explain(error: OSError, path: Path) -> UserError:
    """A full disk or a read-only folder, in words."""
    if error.errno == errno.ENOSPC:
        return UserError(
            f"{path}: no space left on the device; free some and run the same command again: "
            "finished work is kept"
        )
    if (
        error.filename is not None
        and Path(error.filename).parent != path.parent
        and path not in Path(error.filename).parents
    ):
        # Something that was read, not what was being written.
        return kind(error)(f"{error.filename}: {error.strerror or error}")
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return UserError(
            f"{path}: cannot write here ({error.strerror}); choose another folder with --out "
            "and --store"
        )
    return kind(error)(f"{path}: {error.strerror or error}")


def lock(fd: int, how: int) -> bool:
    """Lock an open file, or say that another process has it. Raises `UserError` on file systems
    without locks."""
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
        name = os.readlink(f"/proc/self/fd/{fd}")
        raise UserError(
            f"{name}: this file system has no flock, which keeps two runs apart: mount it "
            "with locks (Lustre: -o flock) or choose another --store"
        ) from None
    return True


def sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_text(path: str | Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    path = Path(path)
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise kind(error)(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete it and run the stage again") from None


def sha256(path: str | Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
