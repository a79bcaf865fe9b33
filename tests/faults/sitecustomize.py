"""Loaded by every Python process of a fault test (by PYTHONPATH): sends itself, or its whole session, a signal at a chosen moment, once.

LTDD_FAULT = "EVENT:TEXT:N:SIGNAL:WHOM". EVENT: "replace" (before a rename: written, not yet in place), "fsync" (before a flush: the file is half there),
"import" (as a module is imported). TEXT: part of the path or module, may be empty. N: the how-manieth time. SIGNAL: KILL, TERM, USR2, STOP. WHOM: "me" or "all".
LTDD_FAULT_RANK = the rank that it happens to (processes without RANK where it is unset). LTDD_FAULT_MARK = file that records that it happened.

LTDD_DRAG = seconds that each look at the flag of signals takes, which is once a step: work that must last long enough to be disturbed does so on any machine.
LTDD_DRAG_TASK = the SLURM task that is slowed; all where it is unset.
"""

import importlib.util
import os
import signal
import sys
import time

_FAULT, _MARK = os.environ.get("LTDD_FAULT"), os.environ.get("LTDD_FAULT_MARK", "")
_DRAG = float(os.environ.get("LTDD_DRAG", "0"))


def _arm() -> None:
    event, text, count, name, whom = _FAULT.split(":")
    calls = [0]

    def happens(what: str) -> None:
        if text not in what:
            return
        calls[0] += 1
        if calls[0] == int(count) and not os.path.exists(_MARK):
            with open(_MARK, "w") as mark:
                mark.write(f"{os.getpid()} {_FAULT} {what}")
            number = getattr(signal, f"SIG{name}")
            os.killpg(0, number) if whom == "all" else os.kill(os.getpid(), number)

    if event == "import":

        class Watcher:
            def find_spec(self, module, path=None, target=None):
                happens(module)

        sys.meta_path.insert(0, Watcher())
        return
    real = getattr(os, event)

    def counted(first, *args, **kwargs):
        happens(str(first) if event == "replace" else os.readlink(f"/proc/self/fd/{first}"))
        return real(first, *args, **kwargs)

    setattr(os, event, counted)


def arm() -> None:
    """Be ready for the fault, where this process is the one that it happens to."""
    if _FAULT and os.environ.get("RANK") == os.environ.get("LTDD_FAULT_RANK"):
        _arm()


arm()


class _Slow:
    """Finds `ltdd_scale.runtime.signals` as it is, and makes its `requested` slow."""

    def find_spec(self, module, path=None, target=None):
        if module != "ltdd_scale.runtime.signals":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(module)
        execute = spec.loader.exec_module

        def slowly(made):
            execute(made)
            asked = made.requested
            made.requested = lambda: time.sleep(_DRAG) or asked()

        spec.loader.exec_module = slowly
        return spec


if _DRAG and os.environ.get("LTDD_DRAG_TASK") in (None, os.environ.get("SLURM_PROCID")):
    sys.meta_path.insert(0, _Slow())
