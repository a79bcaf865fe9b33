"""Loaded by every Python process of a fault test (by PYTHONPATH): kills the process with SIGKILL at a chosen moment, once.

LTDD_FAULT = "replace:7" (before the 7th rename: written, not yet in place) or "fsync:7" (before the 7th flush: the file is half there);
LTDD_FAULT_RANK = the rank that dies (all processes without RANK where it is unset); LTDD_FAULT_MARK = file that records the kill.
"""

import os
import signal

_FAULT, _MARK = os.environ.get("LTDD_FAULT"), os.environ.get("LTDD_FAULT_MARK", "")


def _arm() -> None:
    name, count = _FAULT.split(":")
    real, calls = getattr(os, name), [0]

    def counted(*args, **kwargs):
        calls[0] += 1
        if calls[0] == int(count) and not os.path.exists(_MARK):
            with open(_MARK, "w") as mark:
                mark.write(f"{_FAULT} {args}")
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(os, name, counted)


if _FAULT and os.environ.get("RANK") == os.environ.get("LTDD_FAULT_RANK"):
    _arm()
