"""The ends of jobs' logs, and the end of jobs."""

from __future__ import annotations

from pathlib import Path

from ltdd_scale.errors import UserError
from ltdd_scale.launch.campaign import load
from ltdd_scale.launch.cluster import alive
from ltdd_scale.launch.jobs import Job
from ltdd_scale.launch.states import Look, look, tail

BROKEN = ("failed", "gone", "finished")
NOISE = ("submitit INFO", "submitit WARNING")  # of every attempt


def cancel(folder: Path) -> int:
    """End the jobs of a run or a sweep."""
    campaign = load(folder)
    cluster = campaign.open()
    if not cluster.available():
        raise UserError(f"{cluster.absent}: cancel jobs from where {cluster.title} can be asked")
    living = alive(cluster.states())
    ids = [i for i in campaign.ids.values() if i in living]
    if ids:
        cluster.cancel(ids)
    print(
        f"{len(ids)} jobs cancelled; what they have made stays, and the same command picks up from "
        "there"
    )
    return 0


def show(folder: Path, wanted: str, lines: int) -> int:
    """Print the ends of logs: of the job or point `wanted`, or of those that failed."""
    campaign = load(folder)
    if wanted in campaign.refused:
        print(f"{wanted} was not submitted: {campaign.refused[wanted]}")
        return 0
    seen = look(campaign)
    if wanted:
        chosen = [j for j in campaign.jobs if wanted in (j.name, j.point, j.stage)]
    else:
        chosen = [j for j in campaign.jobs if seen.state(j).state in BROKEN]
    if wanted and not chosen:
        raise UserError(
            f"no job or point is called {wanted}: 'ltdd-scale status {folder}' lists them"
        )
    for job in chosen:
        _show(seen, job, lines)
    if not chosen and seen.silent:
        print(f"{seen.silent}: which jobs have failed is not known")
    elif not chosen:
        print("no job has failed; name one to see its log")
    return 0


def _show(seen: Look, job: Job, lines: int) -> None:
    number = seen.campaign.ids.get(job.name)
    if number is None:
        return
    ends = seen.cluster.ends(number)
    if ends:
        print(f"== {job.name}: earlier ends\n" + "\n".join(ends))
    for path in seen.cluster.logs(number, "err") + seen.cluster.logs(number, "out"):
        kept = [line for line in tail(path) if not line.startswith(NOISE)][-lines:]
        if kept:
            print(f"== {job.name}: {path}\n" + "\n".join(kept))
