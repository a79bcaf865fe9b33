"""What a long piece of work says while it goes on: a line for people, a small file for programs."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

NAME = ".progress.json"
EVERY = 2.0  # seconds between two writes of the file


def duration(seconds: float) -> str:
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60}:{seconds % 60:02d} min"
    return f"{seconds // 3600}:{seconds % 3600 // 60:02d} h"


class Progress:
    """What is done, the time left, a note; `pause` is called at each update, where work may stop.

    ``recover  34 % (17/50 chunks)  0:41 min left  loss 0.123``: redrawn on a terminal, a line now
    and then in a log. With `file` the same is written there as JSON, every few seconds.
    """

    def __init__(
        self,
        title: str,
        total: int,
        unit: str,
        quiet: bool = False,
        done: int = 0,
        pause: Callable[[], None] = lambda: None,
        file: Path | None = None,
    ):
        self._pause, self._file = pause, file
        self.title, self.total, self.unit, self.quiet = title, max(total, 1), unit, quiet
        self.done = self._first = done
        self._start = self._shown = time.monotonic()
        self._written = float("-inf")
        self._tty = sys.stderr.isatty()

    def update(self, done: int, note: str = "") -> None:
        self._pause()
        self.done = done
        now = time.monotonic()
        worked = done - self._first
        left = (now - self._start) / worked * (self.total - done) if worked else None
        if not note and self.unit == "images" and worked:
            note = f"{worked / max(now - self._start, 1e-9):.0f} {self.unit}/s"
        if self._file is not None and (now - self._written >= EVERY or done >= self.total):
            self._written = now
            self._write(self._file, left, note)
        if not self.quiet:
            self._show(now, left, note)

    def _write(self, file: Path, left: float | None, note: str) -> None:
        values = {
            "title": self.title,
            "done": self.done,
            "total": self.total,
            "unit": self.unit,
            "seconds_left": left and round(left, 1),
            "note": note,
            "time": time.time(),
        }
        tmp = file.with_name(f"{file.name}.{os.getpid()}.tmp")
        with suppress(OSError):  # a full disk is the work's to tell; this file is a courtesy
            tmp.write_text(json.dumps(values))
            os.rename(tmp, file)

    def _show(self, now: float, left: float | None, note: str) -> None:
        # A log file gets a line every 30 s, a person two a second.
        if now - self._shown < (0.5 if self._tty else 30) and self.done < self.total:
            return
        if self.done >= self.total and not self._tty and now - self._start < 5:
            return
        self._shown = now
        line = f"  {self.title}  {share(self.done, self.total, self.unit)}"
        if self.done >= self.total:
            line += f"  took {duration(now - self._start)}"
        elif left is not None:
            line += f"  {duration(left)} left"
        line = f"{line}  {note}".rstrip()
        if self._tty:
            end = "\n" if self.done >= self.total else ""
            print(f"\r\x1b[2K{line}", end=end, file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)


def share(done: int, total: int, unit: str) -> str:
    return f"{100 * done // total} % ({done}/{total} {unit})"


def read(folder: Path) -> list[dict[str, Any]]:
    """The progress that work on a stage's folder has written, one entry for each part of it."""
    out = []
    for path in sorted(folder.glob(f"*{NAME}")):
        with suppress(OSError, ValueError):
            out.append(json.loads(path.read_text()))
    return out


def said(entry: dict[str, Any]) -> str:
    """An entry of `read` as people read it: ``34 % (17/50 chunks), 0:41 min left``."""
    text = share(entry["done"], entry["total"], entry["unit"])
    left = entry.get("seconds_left")
    return text + (f", {duration(left)} left" if left and entry["done"] < entry["total"] else "")
