"""What the jobs of a campaign are at: a table from SLURM's queue, the disk and the logs; logs; cancelling."""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

from ltdd_scale.errors import UserError
from ltdd_scale.launch import slurm
from ltdd_scale.launch.campaign import Campaign, load
from ltdd_scale.launch.jobs import Job
from ltdd_scale.report import markdown

_PROGRESS = re.compile(r"(\d+) % \((\d+/\d+ \w+)\)(?:  (.+?) left)?")
_TAIL = 60_000  # bytes of a log's end that are looked at


def _tail(path: Path) -> list[str]:
    with open(path, "rb") as f:
        f.seek(0, 2)
        f.seek(max(0, f.tell() - _TAIL))
        return f.read().decode(errors="replace").replace("\r", "\n").splitlines()


def log_files(campaign: Campaign, job: Job, kind: str = "err") -> list[Path]:
    """Logs of all attempts and elements of a job's last submission, the batch script's and rank 0's first."""
    number = campaign.ids.get(job.name)
    if number is None:
        return []
    found = [
        *campaign.folder.glob(f"logs/{number}_*_log.{kind}"),
        *campaign.folder.glob(f"logs/{number}_log.{kind}"),
    ]
    return sorted(found, key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)])


def _progress(lines: list[str]) -> str:
    for line in reversed(lines):
        if line.startswith("== job"):
            return ""  # of an earlier attempt
        if match := _PROGRESS.search(line):
            left = f", {match[3]} left" if match[3] else ""
            return f"{match[1]} % ({match[2]}){left}"
    return ""


def last_error(campaign: Campaign, job: Job) -> str:
    """The last line of a job's logs that says what was wrong: our own word before SLURM's."""
    tails = [_tail(path) for path in log_files(campaign, job)]
    for pattern in (r"error: |\w+(Error|Exception)\b", r"(slurmstepd\S*|srun): error"):
        for lines in tails:
            for line in reversed(lines):
                if re.match(pattern, line):
                    return line.removeprefix("error: ")[:160]
    return ""


def _state(campaign: Campaign, job: Job, known: dict[str, slurm.State]) -> tuple[str, int, str]:
    """(state, restarts, note)."""
    number = campaign.ids.get(job.name)
    mine = [s for i, s in known.items() if number is not None and i.split("_")[0] == number]
    kept = (
        [
            len(p.read_text().splitlines())
            for p in campaign.folder.glob(f"ends/{number}*")
            if p.suffix != ".final"
        ]
        if number
        else []
    )
    restarts = sum(s.restarts for s in mine)
    if campaign.done(job):
        return "done", restarts, ""
    if job.name in campaign.failed:
        code = campaign.failed[job.name]
        return (
            ("failed", 0, f"exit code {code}")
            if code
            else ("stopped", 0, "what it needs has failed")
        )
    if number is None:
        return "to do", 0, ""
    counts = Counter(s.state for s in mine)
    active = {s: n for s, n in counts.items() if s not in slurm.OVER}
    if active.get("RUNNING"):
        many = f"{counts['RUNNING']} of {len(job.commands)} run" if len(job.commands) > 1 else ""
        broke = f"{sum(kept)} ended early" if sum(kept) else ""
        return "running", restarts, ", ".join(filter(None, (many, broke)))
    if active:
        reasons = sorted({s.reason for s in mine if s.state not in slurm.OVER and s.reason})
        return "waiting" if not restarts else "queued again", restarts, ", ".join(reasons)
    error = last_error(campaign, job)
    if counts.get("CANCELLED") and not error:
        broken = [
            n for n in job.needs if n in {j.name for j in campaign.jobs if not campaign.done(j)}
        ]
        return "stopped", restarts, f"needs {broken[0]}" if broken else "cancelled"
    if counts.get("COMPLETED") == len(mine) and mine and job.stage in ("recover", "summary"):
        return "done", restarts, ""
    if mine and counts["COMPLETED"] == len(mine):
        return "finished", restarts, "its files are not seen here yet"
    if not mine and not error:
        return "gone", restarts, "SLURM no longer knows it, and its work is not there"
    return "failed", restarts, error or ", ".join(counts)


def _queue(campaign: Campaign) -> tuple[dict[str, slurm.State], str]:
    """SLURM's queue, where jobs are in it and SLURM answers; else why not."""
    if not campaign.ids:
        return {}, ""
    if shutil.which("squeue") is None:
        return {}, "there is no squeue here"
    try:
        return slurm.states(), ""
    except UserError as error:
        return {}, str(error).splitlines()[0]


def table(campaign: Campaign) -> tuple[str, Counter, str]:
    """The table, how many jobs are in which state, and why SLURM was not asked, if it was not."""
    known, silent = _queue(campaign)
    rows, counts = [["job", "id", "state", "progress", "restarts", "note"]], Counter()
    for job in campaign.jobs:
        state, restarts, note = _state(campaign, job, known)
        counts[state] += 1
        progress = ""
        if state == "running":
            shown = [p for path in log_files(campaign, job) if (p := _progress(_tail(path)))]
            progress = shown[0] if shown else ""
            if len(shown) > 1:
                progress += f" and {len(shown) - 1} more"
        rows.append(
            [job.name, campaign.ids.get(job.name, ""), state, progress, str(restarts or ""), note]
        )
    text = markdown(rows)
    text += f"\n{silent}: what is not done may be running" if silent else ""
    text += "".join(f"\npoint {name} is refused: {why}" for name, why in campaign.refused.items())
    return text, counts, silent


_SEEN = 90.0  # seconds in which a network file system shows what another node has written


class _End:
    """Whether a campaign is over. What SLURM calls completed gets some time to be seen here; while SLURM is silent nothing is over."""

    def __init__(self) -> None:
        self.since = time.monotonic()

    def reached(self, counts: Counter, silent: str) -> bool:
        if (silent and shutil.which("squeue")) or any(
            counts[s] for s in ("running", "waiting", "queued again")
        ):
            self.since = time.monotonic()
            return False
        return not counts["finished"] or time.monotonic() - self.since > _SEEN


def watch(folder: Path, seconds: float) -> int:
    """Draw the table again and again until no job runs or waits. 0 where all are done."""
    end = _End()
    while True:
        text, counts, silent = table(load(folder))
        if sys.stdout.isatty():
            print("\x1b[H\x1b[2J", end="")
        print(text + "\n" + ", ".join(f"{n} {s}" for s, n in counts.items()), flush=True)
        if end.reached(counts, silent):
            return 0 if set(counts) == {"done"} else 1
        time.sleep(seconds)


def wait(folder: Path, seconds: float, say) -> int:
    """Say each change of state until no job runs or waits. 0 where all are done."""
    before: dict[str, str] = {}
    end, quiet = _End(), ""
    while True:
        campaign = load(folder)
        known, silent = _queue(campaign)
        if silent and not quiet:
            say(f"  {time.strftime('%H:%M:%S')}  {silent}: waiting for it to answer")
        quiet = silent
        if not silent:
            now = {j.name: _state(campaign, j, known) for j in campaign.jobs}
            for name, (state, _, note) in now.items():
                if before.get(name) != state:
                    say(
                        f"  {time.strftime('%H:%M:%S')}  {name}: {state}{f' ({note})' if note else ''}"
                    )
            before = {name: s[0] for name, s in now.items()}
        counts = Counter(before.values())
        if end.reached(counts, silent):
            return 0 if set(counts) == {"done"} and not campaign.refused else 1
        time.sleep(seconds)


def cancel(folder: Path) -> int:
    campaign = load(folder)
    live = slurm.alive(slurm.states())
    ids = [i for i in campaign.ids.values() if i in live]
    if ids:
        slurm.cancel(ids)
    print(
        f"{len(ids)} jobs cancelled; what they have made stays, and the same command picks up from there"
    )
    return 0


def logs(folder: Path, wanted: str, lines: int) -> int:
    """Print the ends of logs: of the job or point `wanted`, or of those that failed."""
    campaign = load(folder)
    known, _ = _queue(campaign)
    chosen = (
        [j for j in campaign.jobs if wanted in (j.name, j.point, j.stage)]
        if wanted
        else [
            j
            for j in campaign.jobs
            if _state(campaign, j, known)[0] in ("failed", "gone", "finished")
        ]
    )
    if wanted in campaign.refused:
        print(f"{wanted} was not submitted: {campaign.refused[wanted]}")
        return 0
    if wanted and not chosen:
        raise UserError(
            f"no job or point is called {wanted}: 'ltdd-scale status {folder}' lists them"
        )
    for job in chosen:
        for note in sorted(campaign.folder.glob(f"ends/{campaign.ids.get(job.name, 'none')}*")):
            if note.suffix != ".final":
                print(f"== {job.name}: earlier ends\n{note.read_text().rstrip()}")
        for path in log_files(campaign, job, "err") + log_files(campaign, job, "out"):
            kept = [line for line in _tail(path) if "submitit" not in line][-lines:]
            if kept:
                print(f"== {job.name}: {path}\n" + "\n".join(kept))
    if not chosen:
        print("no job has failed; name one to see its log")
    return 0
