"""Snapshots of weights on the disk: written one after the other, read memory-mapped.

A folder holds ``snapshots.npy`` [count, size], ``last.npy`` float32 [size], the weights after the
last step, and ``trajectory.json``, which says what they are. Snapshots are float32, or uint16 that
are the bits of bfloat16, of which numpy has no type.
"""

from __future__ import annotations

import io
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from ltdd_scale.errors import UserError
from ltdd_scale.runtime import files

SNAPSHOTS, LAST, RECORD = "snapshots.npy", "last.npy", "trajectory.json"
HELD = 16  # snapshots that wait on the device for being written together
BITS = "uint16: the bits of bfloat16"


@dataclass(frozen=True)
class Form:
    """What snapshots look like: `count` of them, the k-th after k · `every` steps, each of `size`
    numbers, which are `stored` as "float32" or "bfloat16"."""

    count: int
    size: int
    every: int
    stored: str = "float32"

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint16 if self.stored == "bfloat16" else np.float32)

    @property
    def header(self) -> bytes:
        """The first bytes of ``snapshots.npy``."""
        return _header(self.dtype, (self.count, self.size))

    def rows(self, steps: int) -> int:
        """How many snapshots there are after `steps` steps."""
        return min(steps // self.every + 1, self.count)

    def size_with(self, rows: int) -> int:
        """The size of ``snapshots.npy`` with `rows` snapshots in it."""
        return len(self.header) + rows * self.size * self.dtype.itemsize


class Snapshots:
    """``snapshots.npy`` while it is written. Use it in a ``with``.

    Plain writes, no memory map: a full disk is an error then, and not the end of the process.
    """

    def __init__(self, folder: Path, form: Form):
        self.path, self.form = folder / SNAPSHOTS, form
        self._held: list[Tensor] = []
        self._file: BinaryIO | None = None

    def begin(self) -> None:
        """An empty file, whatever is there."""
        self._open("w+b")
        self._write(self.form.header)

    def resume(self, rows: int) -> bool:
        """Go on after the first `rows` snapshots: what was written after them is cut off. False
        where the file does not have them."""
        header, size = self.form.header, self.form.size_with(rows)
        if not self.path.is_file() or self.path.stat().st_size < size:
            return False
        with open(self.path, "rb") as f:
            if f.read(len(header)) != header:
                return False
        file = self._open("r+b")
        file.truncate(size)
        file.seek(size)
        return True

    def add(self, weights: Tensor) -> None:
        """The next snapshot, float32 [size], which may change after this. Seldom waits for a
        GPU."""
        # A copy: on a CPU `.cpu()` is none, and all snapshots would be the last weights.
        self._held.append(weights.detach().clone())
        if len(self._held) == HELD:
            self._flush()

    def save(self) -> None:
        """All snapshots so far are on the disk when this returns."""
        self._flush()
        assert self._file is not None
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise files.explain(error, self.path) from error

    def finish(self, last: Tensor) -> None:
        """The last weights, and the record of it all."""
        self.save()
        folder, weights = self.path.parent, _numpy(last, "float32")
        with files.replacing(folder / LAST) as f:
            f.write(_header(weights.dtype, weights.shape))
            f.write(weights.data)
        record = {
            **asdict(self.form),
            "type": BITS if self.form.stored == "bfloat16" else "float32",
        }
        files.write_json(folder / RECORD, record)

    def __enter__(self) -> Snapshots:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def _open(self, mode: str) -> BinaryIO:
        files.guard()
        try:
            self._file = file = cast(BinaryIO, open(self.path, mode, buffering=0))  # noqa: SIM115
        except OSError as error:
            raise files.explain(error, self.path) from error
        return file

    def _flush(self) -> None:
        held, self._held = self._held, []
        for weights in held:
            self._write(_numpy(weights, self.form.stored).data.cast("B"))

    def _write(self, content: bytes | memoryview) -> None:
        assert self._file is not None
        left = memoryview(content)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise files.explain(error, self.path) from error


class Kept:
    """The weights that a trajectory, or a classifier, has kept. Pages are read when they are looked
    at: a hundred experts need not be in memory.

    `count` snapshots of `size` numbers, the k-th after k · `every` steps. Raises `UserError` where
    a file is missing, damaged, or not of the size that the record states.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if not (folder / RECORD).exists():
            raise UserError(
                f"{folder}: no trajectory there (no {RECORD}): 'ltdd-scale run CONFIG' makes it"
            )
        record: dict[str, Any] = files.read_json(folder / RECORD)
        try:
            self._form = Form(**{name: record[name] for name in Form.__dataclass_fields__})
        except (KeyError, TypeError):
            raise self._damaged(RECORD, "it is no record of a trajectory") from None
        self.count, self.size, self.every = self._form.count, self._form.size, self._form.every
        self._rows = self._map(SNAPSHOTS, (self.count, self.size), self._form.dtype)
        self._map(LAST, (self.size,), np.dtype(np.float32))

    def vector(self, k: int, device: torch.device | str = "cpu") -> Tensor:
        """Snapshot `k`, float32 [size]. Raises `UserError` where it was not kept."""
        if not 0 <= k < self.count:
            raise UserError(
                f"{self.folder}: snapshot {k} is wanted, and 0 to {self.count - 1} were kept: "
                "raise trajectories.keep or the steps of training"
            )
        row = torch.from_numpy(np.array(self._rows[k]).view(_PLAIN[self._form.stored]))
        row = row.view(torch.bfloat16) if self._form.stored == "bfloat16" else row
        return row.to(device, non_blocking=True).float()

    def last(self, device: torch.device | str = "cpu") -> Tensor:
        """The weights after the last step, float32 [size], always as exact as they were."""
        weights = self._map(LAST, (self.size,), np.dtype(np.float32))
        return torch.from_numpy(np.array(weights)).to(device, non_blocking=True)

    def _map(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        path = self.folder / name
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            raise self._damaged(name, "it is missing") from None
        except OSError as error:
            raise files.kind(error)(f"cannot read {path}: {error.strerror or error}") from None
        except (ValueError, EOFError):
            raise self._damaged(name, "it is cut off or no array") from None
        if (found.shape, found.dtype) != (shape, dtype):
            what = f"it holds {found.dtype} {list(found.shape)}, not {dtype} {list(shape)}"
            raise self._damaged(name, what)
        return found

    def _damaged(self, name: str, why: str) -> UserError:
        return UserError(
            f"{self.folder / name} is damaged: {why}; delete the folder {self.folder} and run the "
            "same command again"
        )


_PLAIN = {"float32": np.float32, "bfloat16": np.int16}  # what torch reads the bits as


def _numpy(weights: Tensor, stored: str) -> np.ndarray:
    """Weights float32 [size] as they are stored."""
    if stored == "bfloat16":
        return weights.detach().to(torch.bfloat16).view(torch.int16).cpu().numpy().view(np.uint16)
    return weights.detach().cpu().numpy()


def _header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """The bytes before the numbers of a ``.npy`` file."""
    buffer = io.BytesIO()
    about = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, about)
    return buffer.getvalue()
