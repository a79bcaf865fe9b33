"""One request in a process of its own: ``python -m ltdd_scale.launch.work < REQUEST``."""

from __future__ import annotations

import argparse
import os
import sys

from ltdd_scale.launch.guard import guarded, leave
from ltdd_scale.runtime import place, signals


def main() -> int:
    """Read a request, as JSON, from the standard input; return the exit code."""
    signals.install(term_saves=place.here().notified)  # before anything that takes time
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # see cli.main
    parser = argparse.ArgumentParser(prog="ltdd_scale.launch.work", description=__doc__)
    parser.add_argument("--nproc", type=int, help="ranks (default: as for 'ltdd-scale run')")
    args = parser.parse_args()
    text = sys.stdin.read()
    return guarded(lambda: _run(text, args.nproc))


def _run(text: str, nproc: int | None) -> int:
    from ltdd_scale.launch import run
    from ltdd_scale.request import Request

    return run.run(Request.from_json(text), nproc)


if __name__ == "__main__":
    leave(main())
