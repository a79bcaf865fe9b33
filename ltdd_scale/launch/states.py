"""What each job of a campaign is at: from the cluster's queue, the disk and the logs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ltdd_scale.errors import UserError
from ltdd_scale.launch.campaign import Campaign
from ltdd_scale.launch.cluster import Cluster, Phase, State
from ltdd_scale.launch.jobs import Job
from ltdd_scale.pipeline import store
from ltdd_scale.runtime import progress

ACTIVE = ("running", "waiting", "queued again")
_TAIL = 60_000  # bytes of a log's end that are looked at
# Prefer an error printed by ltdd_scale to one printed by SLURM.
_ERRORS = (r"error: |\w+(Error|Exception)\b", r"(slurmstepd\S*|srun): error")


@dataclass(frozen=True)
class JobState:
    """`state`: to do, waiting, running, queued again, done, finished (its files are not seen yet),
    failed, stopped, gone, unknown (the cluster does not answer)."""

    state: str
    restarts: int = 0
    note: str = ""


@dataclass(frozen=True)
class Look:
    """One look at a campaign. `silent`: why its cluster was not asked, or did not answer."""

    campaign: Campaign
    cluster: Cluster
    known: dict[str, State]
    silent: str = ""

    @cached_property
    def _left(self) -> set[str]:
        return {job.name for job in self.campaign.left()}

    def state(self, job: Job) -> JobState:
        number = self.campaign.ids.get(job.name)
        mine = [s for i, s in self.known.items() if number and i.split("_")[0] == number]
        restarts = sum(s.restarts for s in mine)
        if job.name not in self._left:
            return JobState("done", restarts)
        if number is None:
            return JobState("running" if self._runs_here(job) else "to do")
        if self.silent:
            return JobState("unknown", restarts, self.silent)
        if any(not s.phase.over for s in mine):
            return self._active(job, number, mine, restarts)
        return self._over(job, mine, restarts)

    def _runs_here(self, job: Job) -> bool:
        """Whether the job is at work on this machine, where one has an id only when it is over."""
        folders = (self.campaign.store / where for where in (*job.joins, *job.nodes))
        return not self.cluster.detached and any(store.is_running(f) for f in folders)

    def _active(self, job: Job, number: str, mine: list[State], restarts: int) -> JobState:
        running = sum(s.phase is Phase.RUNNING for s in mine)
        if running:
            many = f"{running} of {job.elements} run" if job.elements > 1 else ""
            ended = len(self.cluster.ends(number))
            early = f"{ended} ended early" if ended else ""
            return JobState("running", restarts, ", ".join(filter(None, (many, early))))
        reasons = sorted({s.reason for s in mine if not s.phase.over and s.reason})
        state = "waiting" if not restarts else "queued again"
        return JobState(state, restarts, ", ".join(reasons))

    def _over(self, job: Job, mine: list[State], restarts: int) -> JobState:
        """Of a job whose work is not on the disk."""
        phases = Counter(s.phase for s in mine)
        error = last_error(self.campaign, self.cluster, job)
        if phases[Phase.CANCELLED] and not error:
            return JobState("stopped", restarts, self._why_stopped(job, mine))
        if mine and phases[Phase.COMPLETED] == len(mine):
            # Parts may have been put together, a summary may be older than what was done since.
            if job.parts or job.summary:
                return JobState("done", restarts)
            return JobState("finished", restarts, "its files are not seen here yet")
        if not mine and not error:
            gone = f"{self.cluster.title} no longer knows it, and its work is not there"
            return JobState("gone", restarts, gone)
        reasons = dict.fromkeys(_word(s) for s in mine)
        return JobState("failed", restarts, error or ", ".join(reasons))

    def _why_stopped(self, job: Job, mine: list[State]) -> str:
        broken = [n for n in job.needs if n in self._left]
        return f"needs {broken[0]}" if broken else "cancelled"

    def progress(self, job: Job) -> str:
        """How far a running job is: ``34 % (17/50 chunks), 0:41 min left and 3 more``."""
        shown = [progress.said(entry) for entry in self.entries(job)]
        more = f" and {len(shown) - 1} more" if len(shown) > 1 else ""
        return shown[0] + more if shown else ""

    def entries(self, job: Job) -> list[dict]:
        """What work on the job's folders wrote of its progress, the newest first; of finished
        pieces only where there are no others."""
        folders = [self.campaign.store / f for f in (*job.joins, *job.nodes)]
        found = [e for f in folders if not store.complete(f) for e in progress.read(f)]
        found = [e for e in found if e["done"] < e["total"]] or found
        return sorted(found, key=lambda e: -e["time"])


def _word(state: State) -> str:
    return state.reason if state.state == state.phase and state.reason else state.state


def look(campaign: Campaign) -> Look:
    """Ask the cluster, where jobs are in its queue and it answers."""
    cluster = campaign.open()
    if not campaign.ids:
        return Look(campaign, cluster, {})
    if not cluster.available():
        return Look(campaign, cluster, {}, cluster.absent)
    try:
        return Look(campaign, cluster, cluster.states())
    except UserError as error:
        return Look(campaign, cluster, {}, str(error).splitlines()[0])


def tail(path: Path) -> list[str]:
    """The last lines of a log."""
    with open(path, "rb") as f:
        f.seek(0, 2)
        f.seek(max(0, f.tell() - _TAIL))
        return f.read().decode(errors="replace").replace("\r", "\n").splitlines()


def last_error(campaign: Campaign, cluster: Cluster, job: Job) -> str:
    """The last line of a job's logs that says what was wrong."""
    number = campaign.ids.get(job.name)
    tails: Iterable[list[str]] = [tail(p) for p in cluster.logs(number)] if number else []
    for pattern in _ERRORS:
        for lines in tails:
            for line in reversed(lines):
                if re.match(pattern, line):
                    return line.removeprefix("error: ")[:160]
    return ""
