"""What a SLURM task runs: one request, and what becomes of it when SLURM wants the node back.

Progress is found on the disk, so nothing that changes is in the pickle, and submitit's own
checkpointing has nothing to do: SIGUSR2 sets a flag, ranks agree on a step, save, rank 0 asks SLURM
to requeue the job. No task returns a result: whether a job did its work is judged by the disk.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from ltdd_scale.errors import PassingError
from ltdd_scale.launch.jobs import Summary
from ltdd_scale.runtime import files, place, signals
from ltdd_scale.runtime.code import PACKAGE, code_digest
from ltdd_scale.runtime.place import Place

BROKEN = PassingError.code  # an error that is not the user's: another attempt may go well
LOOK = 1.0  # seconds between two looks at whether this attempt still counts

# Of what scontrol says: the controller is away, or very busy.
_LATER = re.compile(r"timed out|contact|connect|communicat|transmitted|standby", re.IGNORECASE)


def requeue(job: str, why: str) -> bool:
    """Ask SLURM to start the job again, for two minutes where it does not answer. False where it
    does not want to, as where it has begun to do so itself."""
    for turn in range(12):
        if turn:
            time.sleep(10)
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        refused = f"scontrol requeue says: {done.stderr.strip()}"
        said = "the job is queued again" if done.returncode == 0 else refused
        print(f"  {why}: {said}", file=sys.stderr, flush=True)
        if done.returncode == 0 or not _LATER.search(done.stderr):
            break
    return done.returncode == 0


class Fence:
    """Of two attempts of one job, only the later may write: a node that SLURM gave up may still be
    at work on the earlier one."""

    def __init__(self, folder: Path, here: Place):
        self.job, self.mine = here.job, here.attempt
        self.path = folder / here.job

    def latest(self) -> int:
        try:
            return int(self.path.read_text())
        except (OSError, ValueError):
            return -1

    def claim(self) -> None:
        if self.latest() < self.mine:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            files.write_text(self.path, str(self.mine))

    def check(self) -> None:
        if self.latest() > self.mine:
            print(
                f"  attempt {self.latest()} of job {self.job} has begun: attempt {self.mine} ends "
                "here, unwritten",
                file=sys.stderr,
                flush=True,
            )
            os._exit(signals.STOP_CODE)


def _watch(fence: Fence, parent: int) -> None:
    """In a thread: end when a later attempt has begun, and ask for one when slurmstepd, who would
    report our end, is dead."""
    while True:
        time.sleep(LOOK)
        fence.check()
        if os.getppid() != parent:
            requeue(fence.job, "the slurmstepd of this task is gone")
            os._exit(BROKEN)


def _make_room(here: Place) -> None:
    """Have the job queued again, and end when nobody loses by it: the end of one task ends the
    others (``--kill-on-bad-exit``)."""
    begin = time.monotonic()
    if here.is_main:
        requeue(here.job, "saved")
        place.all_have_left(10)
        return
    place.have_left()
    # An end of ours before rank 0 has spoken would count as the job's. SIGTERM says that SLURM has
    # heard it.
    spoken = False
    while time.monotonic() - begin < 120 and not signals.save_wanted(begin):
        # Rank 0 waits in a collective for us, and hears nothing there.
        if not spoken and time.monotonic() - begin > 15:
            spoken = True
            requeue(here.job, "saved, and rank 0 is silent")
        time.sleep(0.05)


@dataclass
class Task:
    """A request as JSON, or the record of a sweep's summary, worked on in the folder `cwd`.

    `digest` is that of the source at submission, `folder` where the jobs of the campaign keep their
    notes.
    """

    title: str
    cwd: str
    digest: str
    folder: str
    request: str = ""
    summary: Summary | None = None

    def checkpoint(self):
        """For a signal that comes before `__call__` has its own handlers."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)

    def __call__(self) -> None:
        parent = os.getppid()
        signals.install(term_saves=True)
        here = place.become_task()
        folder = Path(self.folder)
        fence = Fence(folder / "fences", here)
        if here.is_main:
            fence.claim()
            for torn in (folder / "logs").glob(f"{here.job}_*.save_tmp"):
                torn.unlink(missing_ok=True)  # else submitit refuses to write there for ever
        files.guard = fence.check
        threading.Thread(target=_watch, args=(fence, parent), daemon=True).start()
        code = self._work(here)
        if code == signals.STOP_CODE:
            _make_room(here)
        if code == 1:  # whichever rank it is: trying again would not help
            note = folder / "ends" / f"{here.job}.final"
            files.write_text(note, "the error is in the job's log\n")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(
            code
        )  # submitit has no result to write, and a left-over thread of a library no say

    def _work(self, here: Place) -> int:
        try:
            os.chdir(self.cwd)
        except OSError as error:
            print(
                f"error: {self.cwd}, where this job was submitted, is not to be entered on "
                f"{here.node} ({error.strerror}): submit from a folder that all nodes share",
                file=sys.stderr,
            )
            return 1
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # see cli.main
        if here.is_main:
            print(
                f"== job {here.job}, attempt {here.attempt}, on {here.node}: {self.title}",
                file=sys.stderr,
                flush=True,
            )
        now = code_digest()
        if now != self.digest:
            print(
                f"error: the code in {PACKAGE} has changed since this job was submitted "
                f"({self.digest}, now {now}): submit again",
                file=sys.stderr,
            )
            return 1
        try:
            return self._perform()
        except BaseException:
            traceback.print_exc()
            return BROKEN

    def _perform(self) -> int:
        summary = self.summary
        if summary:
            from ltdd_scale.launch import sweep_table
            from ltdd_scale.launch.guard import guarded

            return guarded(lambda: sweep_table.write_summary(summary))
        from ltdd_scale.launch.perform import perform
        from ltdd_scale.request import Request

        return perform(Request.from_json(self.request))
