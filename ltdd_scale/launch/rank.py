"""What one of several ranks of this machine runs: ``python -m ltdd_scale.launch.rank FILE``,
the file of a request."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ltdd_scale import session
from ltdd_scale.launch.guard import guarded, leave
from ltdd_scale.request import Request
from ltdd_scale.runtime import place, signals
from ltdd_scale.session import Session


def main() -> None:
    signals.install(term_saves=place.here().notified)  # before anything that takes time
    work = Session(Request.from_json(Path(sys.argv[1]).read_text()))

    def action() -> int:
        session.execute(work)
        return 0

    leave(guarded(action))


if __name__ == "__main__":
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # see cli.main
    main()
