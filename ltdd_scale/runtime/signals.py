"""SIGTERM and SIGUSR2: a request to save and make room.

The handler sets a flag and says so, no more: repeated signals are harmless, and nothing happens in
the middle of anything. Work looks at the flag where it can stop: training at every step, and all
ranks hear of it at the next one; other work between two pieces. It then saves and leaves with
`STOP_CODE`.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import time
from types import FrameType

from ltdd_scale.runtime import place

# What the parent holds is not a fork's to collect: it would free a DALI pipeline of the parent, and
# hang or crash in it.
os.register_at_fork(before=gc.freeze, after_in_parent=gc.unfreeze)

# EX_TEMPFAIL, "try again later": launchers take it for "start me again, I go on from here".
STOP_CODE = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR2)

_requested: str | None = None
_term_saves = False
_save_wanted = float("-inf")


class Preempted(BaseException):
    """Work stopped on request with everything saved. Not an `Exception`: code that survives bad
    images must not survive this."""


def _request(number: int, _: FrameType | None) -> None:
    global _requested, _save_wanted
    if _term_saves and number == signal.SIGTERM:
        _save_wanted = time.monotonic()
        if place.speaks():
            os.write(2, b"  SIGTERM: saving, then going on until the end\n")
        return
    if _requested is None and place.speaks():
        os.write(
            2, f"  {signal.Signals(number).name}: saving, then making room\n".encode()
        )  # print is not safe in a handler
    _requested = signal.Signals(number).name


def install(term_saves: bool = False) -> None:
    """`term_saves`: SIGTERM asks for a checkpoint only, as it must under SLURM. Said once, it holds
    for this process."""
    global _term_saves
    _term_saves = _term_saves or term_saves
    for number in SIGNALS:
        signal.signal(number, _request)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # what came before is heard now


def hold() -> None:
    """For a process that is being started: a request waits until it is ready to hear it
    (`install`). By default it would die of it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def helper() -> None:
    """In a helper process: its parent answers signals, and ends it; it does not outlive its parent.
    Signals to the parent's group do not reach it."""
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    # SIGTERM is how its parent ends it; but where SLURM keeps track by cgroups its notice reaches
    # every process of the job, whatever its group,
    # and a loader whose worker died is an error. There a helper ends when it is told to through its
    # queue, or with its parent.
    signal.signal(signal.SIGTERM, signal.SIG_IGN if place.here().notified else signal.SIG_DFL)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def ignore() -> None:
    """For a process that is about to end with its code known: Python's own end would set the
    default answer again, which is to die."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def requested() -> bool:
    return _requested is not None


def save_wanted(since: float) -> bool:
    """Whether a notice came after `since` (`time.monotonic`)."""
    return _save_wanted > since


def check() -> None:
    """Raise `Preempted` where a signal has come: call it where nothing would be lost."""
    if _requested is not None:
        raise Preempted(_requested)
