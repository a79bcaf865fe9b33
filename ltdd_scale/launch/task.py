"""What a SLURM task runs: one `ltdd-scale` command, and what becomes of it when SLURM wants the node back.

Progress is found on the disk, so nothing that changes is in the pickle, and submitit's own checkpointing has nothing to do: SIGUSR2 sets a flag, ranks
agree on a step, save, rank 0 asks SLURM to requeue the job. No task returns a result: whether a job did its work is judged by the disk.
"""

from __future__ import annotations

import hashlib
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
from ltdd_scale.runtime import files, place, signals

BROKEN = PassingError.code  # an error that is not the user's: another attempt may go well
LOOK = 1.0  # seconds between two looks at whether this attempt still counts


def code_digest(package: Path) -> str:
    """Hash of the package's source."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def job_id() -> str:
    """As SLURM's commands take it: 123, or 123_4 for an array's element."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


_LATER = re.compile(
    r"timed out|contact|connect|communicat|transmitted|standby", re.IGNORECASE
)  # the controller is away, or very busy


def requeue(why: str) -> bool:
    """Ask SLURM to start this job again, for two minutes where it does not answer. False where it does not want to, as where it has begun to do so itself."""
    for turn in range(12):
        if turn:
            time.sleep(10)
        done = subprocess.run(["scontrol", "requeue", job_id()], capture_output=True, text=True)
        said = (
            "the job is queued again"
            if done.returncode == 0
            else f"scontrol requeue says: {done.stderr.strip()}"
        )
        print(f"  {why}: {said}", file=sys.stderr, flush=True)
        if done.returncode == 0 or not _LATER.search(done.stderr):
            break
    return done.returncode == 0


class Fence:
    """Of two attempts of one job, only the later may write: a node that SLURM gave up may still be at work on the earlier one."""

    def __init__(self, folder: Path):
        self.path, self.mine = folder / job_id(), int(os.environ.get("SLURM_RESTART_COUNT", 0))

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
                f"  attempt {self.latest()} of job {job_id()} has begun: attempt {self.mine} ends here, unwritten",
                file=sys.stderr,
                flush=True,
            )
            os._exit(signals.STOP_CODE)


def _watch(fence: Fence, parent: int) -> None:
    """In a thread: end when a later attempt has begun, and ask for one when slurmstepd, who would report our end, is dead."""
    while True:
        time.sleep(LOOK)
        fence.check()
        if os.getppid() != parent:
            requeue("the slurmstepd of this task is gone")
            os._exit(BROKEN)


def _make_room(first: bool) -> None:
    """Have the job queued again, and end when nobody loses by it: the end of one task ends the others (``--kill-on-bad-exit``)."""
    begin = time.monotonic()
    if first:
        requeue("saved")
        place.all_have_left(10)
        return
    place.have_left()
    # An end of ours before rank 0 has spoken would count as the job's. SIGTERM says that SLURM has heard it.
    spoken = False
    while time.monotonic() - begin < 120 and not signals.save_wanted(begin):
        if (
            not spoken and time.monotonic() - begin > 15
        ):  # rank 0 waits in a collective for us, and hears nothing there
            spoken = True
            requeue("saved, and rank 0 is silent")
        time.sleep(0.05)


@dataclass
class Task:
    """`ltdd-scale ARGUMENTS` in the folder `cwd`; `digest` is that of the source at submission, `folder` where the jobs of the campaign keep their notes."""

    arguments: list[str]
    cwd: str
    digest: str
    folder: str

    def checkpoint(self):
        """For a signal that comes before `__call__` has its own handlers."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)

    def __call__(self) -> None:
        parent = os.getppid()
        signals.install(term_saves=True)
        first = os.environ["SLURM_PROCID"] == "0"
        os.environ["LTDD_AUTO_RANKS"] = "1"  # ranks without work are idle, not an error
        folder, fence = Path(self.folder), Fence(Path(self.folder) / "fences")
        if first:
            fence.claim()
            for torn in (folder / "logs").glob(f"{job_id()}_*.save_tmp"):
                torn.unlink(missing_ok=True)  # else submitit refuses to write there for ever
        files.guard = fence.check
        threading.Thread(target=_watch, args=(fence, parent), daemon=True).start()
        code = self._work(first)
        if code == signals.STOP_CODE:
            _make_room(first)
        if code == 1 and first:
            files.write_text(
                folder / "ends" / f"{job_id()}.final", "the error is in the job's log\n"
            )  # trying again would not help
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(
            code
        )  # submitit has no result to write, and a left-over thread of a library no say

    def _work(self, first: bool) -> int:
        import ltdd_scale
        from ltdd_scale import cli

        os.chdir(self.cwd)
        # One task is one rank: without this a job of one task would start as many as it sees cores.
        os.environ.update(
            RANK=os.environ["SLURM_PROCID"],
            WORLD_SIZE=os.environ["SLURM_STEP_NUM_TASKS"],
            LOCAL_RANK=os.environ["SLURM_LOCALID"],
        )
        for leaked in (
            "MASTER_ADDR",
            "MASTER_PORT",
            "LTDD_RENDEZVOUS",
        ):  # of whoever submitted, as from inside another job
            os.environ.pop(leaked, None)
        if first:
            attempt, node = (
                os.environ.get("SLURM_RESTART_COUNT", "0"),
                os.environ.get("SLURMD_NODENAME", ""),
            )
            print(
                f"== job {job_id()}, attempt {attempt}, on {node}: ltdd-scale {' '.join(self.arguments)}",
                file=sys.stderr,
                flush=True,
            )
        now = code_digest(Path(ltdd_scale.__file__).parent)
        if now != self.digest:
            print(
                f"error: the code in {Path(ltdd_scale.__file__).parent} has changed since this job was submitted ({self.digest}, now {now}): submit again",
                file=sys.stderr,
            )
            return 1
        try:
            return cli.main(self.arguments)
        except BaseException:
            traceback.print_exc()
            return BROKEN
