"""Errors as lines and exit codes, and the end of a process."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from ltdd_scale.errors import UserError
from ltdd_scale.runtime import place, signals

CUT = 141  # what a shell says of a process that writes to nobody


def guarded(action: Callable[[], int], looks: bool = False) -> int:
    """`action`'s exit code. What people are meant to read is printed, a line each. Where nobody
    reads any more, one that only `looks` is done, and one that works is not."""
    try:
        return action()
    except UserError as error:
        if not place.speaks():
            time.sleep(1)  # what all ranks found out is said once: rank 0's end ends the others
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.code
    except signals.Preempted as request:
        if place.speaks() and not place.here().rendezvous:
            print(
                f"stopped by {request}; the same command goes on from here",
                file=sys.stderr,
                flush=True,
            )
        return signals.STOP_CODE
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0 if looks else CUT


def leave(code: int) -> None:
    """End this process with `code`, whoever hangs where.

    Peers in a collective are ended by whoever started them. Left-over threads of libraries have no
    say: at Python's own end they turn a good code into an abort now and then.
    """
    signals.ignore()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
