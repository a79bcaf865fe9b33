"""The jobs of a campaign: a table, drawn once or again and again, or a line a change of state."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ltdd_scale.launch.campaign import Campaign, load
from ltdd_scale.launch.states import ACTIVE, Look, look
from ltdd_scale.publish.tables import markdown

_SEEN = 90.0  # seconds in which a network file system shows what another node has written


def table(campaign: Campaign) -> tuple[str, Counter, Look]:
    """The table, how many jobs are in which state, and the look that found it so."""
    seen = look(campaign)
    rows, counts = [["job", "id", "state", "progress", "restarts", "note"]], Counter()
    for job in campaign.jobs:
        found = seen.state(job)
        counts[found.state] += 1
        progress = seen.progress(job) if found.state == "running" else ""
        number, restarts = campaign.ids.get(job.name, ""), str(found.restarts or "")
        rows.append([job.name, number, found.state, progress, restarts, found.note])
    text = markdown(rows)
    text += f"\n{seen.silent}: what is not done may be running" if seen.silent else ""
    text += "".join(f"\npoint {n} is refused: {why}" for n, why in campaign.refused.items())
    return text, counts, seen


def records(campaign: Campaign) -> list[dict[str, Any]]:
    """The same for programs: a record a job."""
    seen = look(campaign)
    out = []
    for job in campaign.jobs:
        found = seen.state(job)
        out.append(
            {
                "job": job.name,
                "id": campaign.ids.get(job.name),
                "state": found.state,
                "restarts": found.restarts,
                "note": found.note,
                "progress": seen.entries(job) if found.state == "running" else [],
            }
        )
    return out


class _End:
    """Whether a campaign is over. What the cluster calls completed gets some time to be seen here;
    while the cluster is silent nothing is over."""

    def __init__(self) -> None:
        self.since = time.monotonic()

    def reached(self, counts: Counter, seen: Look) -> bool:
        unsure = seen.silent and seen.cluster.available()
        if unsure or any(counts[s] for s in ACTIVE):
            self.since = time.monotonic()
            return False
        return not counts["finished"] or time.monotonic() - self.since > _SEEN


def watch(folder: Path, seconds: float) -> int:
    """Draw the table again and again until no job runs or waits. 0 where all are done."""
    end = _End()
    while True:
        text, counts, seen = table(load(folder))
        if sys.stdout.isatty():
            print("\x1b[H\x1b[2J", end="")
        print(text + "\n" + ", ".join(f"{n} {s}" for s, n in counts.items()), flush=True)
        if end.reached(counts, seen):
            return 0 if set(counts) == {"done"} else 1
        time.sleep(seconds)


def wait(folder: Path, seconds: float, say: Callable[[str], None]) -> int:
    """Say each change of state until no job runs or waits. 0 where all are done."""
    before: dict[str, str] = {}
    end, quiet = _End(), ""
    while True:
        campaign = load(folder)
        seen = look(campaign)
        if seen.silent and not quiet:
            say(f"  {time.strftime('%H:%M:%S')}  {seen.silent}: waiting for it to answer")
        quiet = seen.silent
        if not seen.silent:
            before = _say_changes(seen, before, say)
        counts = Counter(before.values())
        if end.reached(counts, seen):
            return 0 if set(counts) == {"done"} and not campaign.refused else 1
        time.sleep(seconds)


def _say_changes(seen: Look, before: dict[str, str], say: Callable[[str], None]) -> dict[str, str]:
    """Say which jobs are in another state than `before`; return job → state."""
    now = {job.name: seen.state(job) for job in seen.campaign.jobs}
    for name, found in now.items():
        if before.get(name) != found.state:
            note = f" ({found.note})" if found.note else ""
            say(f"  {time.strftime('%H:%M:%S')}  {name}: {found.state}{note}")
    return {name: found.state for name, found in now.items()}
