"""What a long piece of work says while it goes on."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable


def duration(seconds: float) -> str:
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60}:{seconds % 60:02d} min"
    return f"{seconds // 3600}:{seconds % 3600 // 60:02d} h"


class Progress:
    """What is done, the time left, a note; `pause` is called at each update, where work may stop.

    ``recover  34 % (17/50 chunks)  0:41 min left  loss 0.123``: redrawn on a terminal, a line now and then in a log."""

    def __init__(
        self,
        title: str,
        total: int,
        unit: str,
        quiet: bool = False,
        done: int = 0,
        pause: Callable[[], None] = lambda: None,
    ):
        self._pause = pause
        self.title, self.total, self.unit, self.quiet = title, max(total, 1), unit, quiet
        self.done = self._first = done
        self._start = self._shown = time.monotonic()
        self._tty = sys.stderr.isatty()

    def update(self, done: int, note: str = "") -> None:
        self._pause()
        self.done = done
        now = time.monotonic()
        # A log file gets a line every 30 s, a person two a second.
        if self.quiet or (now - self._shown < (0.5 if self._tty else 30) and done < self.total):
            return
        if done >= self.total and not self._tty and now - self._start < 5:
            return
        self._shown = now
        worked = done - self._first
        left = (now - self._start) / worked * (self.total - done) if worked else None
        rest = (
            ""
            if left is None
            else f"  {duration(left)} left"
            if done < self.total
            else f"  took {duration(now - self._start)}"
        )
        note = note or (
            f"{worked / (now - self._start):.0f} {self.unit}/s"
            if self.unit == "images" and worked
            else ""
        )
        line = f"  {self.title}  {100 * done // self.total} % ({done}/{self.total} {self.unit}){rest}  {note}".rstrip()
        if self._tty:
            print(
                f"\r\x1b[2K{line}",
                end="\n" if done >= self.total else "",
                file=sys.stderr,
                flush=True,
            )
        else:
            print(line, file=sys.stderr, flush=True)
