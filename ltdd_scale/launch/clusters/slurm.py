"""SLURM by way of submitit: a job's sbatch file, its submission, its state."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ltdd_scale.errors import UserError
from ltdd_scale.launch.cluster import Cluster, Order, Phase, State
from ltdd_scale.launch.clusters.slurm_task import Task
from ltdd_scale.runtime import place

TOOLS = ("sbatch", "squeue", "scontrol", "srun")
# States after which SLURM does not run a job again unless asked. NODE_FAIL is none: the job comes
# back (where the cluster requeues).
OVER = frozenset(
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "OUT_OF_MEMORY", "TIMEOUT")
)

# After srun, in the batch script. A job that was killed or broke down goes back into the queue, up
# to so many times, with the reason kept; one that SLURM itself ends (cancelled, preempted,
# requeued) is not RUNNING any more here; one that ended with the user's error has left a `.final`
# note.
# slurmstepd is root's: whether it lives is asked of our own status (its child gets another parent),
# not by a signal that we may not send. A controller that is being restarted is asked again for a
# minute or two.
_TEARDOWN = r"""
code=$?
job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
note=%(ends)s/$job
parent=there; grep -q "^PPid:[[:space:]]*$PPID\$" /proc/$$/status || parent=gone
[ $code = 0 ] && [ $parent = there ] && exit 0
for turn in 1 2 3 4 5 6 7 8; do state=$(squeue -h -j $job -o %%T 2>/dev/null) && break; sleep 15; done
[ "$state" = RUNNING ] || exit $code
echo "$(date -u +%%FT%%TZ) attempt ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST: exit code $code, slurmstepd $parent" >> "$note"
if [ ! -e "$note.final" ] && [ $(wc -l < "$note") -le %(retries)d ]; then
for turn in 1 2 3 4; do scontrol requeue $job && sleep 300; sleep 15; done
fi
exit $code
"""  # noqa: E501


class Slurm(Cluster):
    """SLURM, as seen from a machine that has its commands."""

    title = "SLURM"
    absent = "there is no squeue here"

    def available(self) -> bool:
        return shutil.which("squeue") is not None

    def need(self) -> None:
        for tool in TOOLS:
            if shutil.which(tool) is None:
                raise UserError(
                    f"{tool} is not found: run this where SLURM's commands are, or try a cluster "
                    'on this machine with: eval "$(slurm/testbed up)"'
                )
        _submitit()

    def script(self, order: Order) -> str:
        """The sbatch file that submitit writes."""
        _submitit()
        from submitit.slurm import slurm as submitit_slurm

        count = order.job.elements if order.job.elements > 1 else None
        logs, python = self.folder / "logs", order.profile.python or shlex.quote(sys.executable)
        command = f"{python} -u -m submitit.core._submit {shlex.quote(str(logs))}"
        more = parameters(order, self.folder)
        return submitit_slurm._make_sbatch_string(command, logs, map_count=count, **more)

    def submit(self, order: Order) -> str:
        """Raises `UserError` with what sbatch said."""
        import submitit
        from submitit.core import utils

        executor = submitit.SlurmExecutor(
            self.folder / "logs", max_num_timeout=1000, python=order.profile.python or None
        )
        executor.update_parameters(**parameters(order, self.folder))
        tasks = self._tasks(order)
        # From inside a job (a shell on a node, say) its SLURM_ variables would be taken for wishes.
        inside = place.here().in_slurm
        clean = submitit.helpers.clean_env() if inside else nullcontext()
        try:
            with clean:
                if len(tasks) == 1:
                    return executor.submit(tasks[0]).job_id
                with executor.batch():
                    made = [executor.submit(t) for t in tasks]
                return made[0].job_id.split("_")[0]
        except (
            utils.FailedJobError,
            utils.FailedSubmissionError,
            subprocess.SubprocessError,
        ) as error:
            said = " ".join(str(error).split())
            raise UserError(f"sbatch refuses the job {order.job.name}: {said}") from None

    def _tasks(self, order: Order) -> list[Task]:
        job = order.job
        where = (os.getcwd(), order.code.name, str(self.folder))
        works = [request.to_json() for request in job.requests] or [""]
        return [
            Task(title, *where, work, job.summary)
            for title, work in zip(job.titles(), works, strict=True)
        ]

    def states(self) -> dict[str, State]:
        """In one call of squeue."""
        command = ["squeue", "--me", "-h", "-r", "-t", "all"]
        shown = ["-O", "JobArrayID:32,State:20,RestartCnt:8,Reason:64"]
        done = subprocess.run([*command, *shown], capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip() or "squeue failed").splitlines()[-1]
            raise UserError(f"SLURM does not answer: {said}")
        out = {}
        for line in done.stdout.splitlines():
            job, state, restarts = line[:32].strip(), line[32:52].strip(), line[52:60].strip()
            reason = line[60:].strip()
            reason = reason if reason != "None" else ""
            out[job] = State(state, phase_of(state), reason, int(restarts or 0))
        return out

    def cancel(self, ids: Sequence[str]) -> None:
        subprocess.run(["scancel", *ids], check=True)

    def logs(self, number: str, kind: str = "err") -> list[Path]:
        """The batch script's and rank 0's first."""
        logs = self.folder / "logs"
        found = [*logs.glob(f"{number}_*_log.{kind}"), *logs.glob(f"{number}_log.{kind}")]
        return sorted(found, key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)])

    def ends(self, number: str) -> list[str]:
        notes = sorted(p for p in self._notes(number) if p.suffix != ".final")
        return [line for note in notes for line in note.read_text().splitlines()]

    def forget(self, number: str) -> None:
        for note in self._notes(number):
            note.unlink()

    def _notes(self, number: str) -> list[Path]:
        """Of a job and of its elements: ``ends/123``, ``ends/123_4.final``."""
        notes = (self.folder / "ends").glob(f"{number}*")
        return [p for p in notes if re.split(r"[_.]", p.name)[0] == number]


def _submitit() -> None:
    if importlib.util.find_spec("submitit") is None:
        raise UserError("--cluster slurm needs submitit: pip install 'submitit>=1.5'")


def phase_of(state: str) -> Phase:
    """SLURM's word for a state in those of this house."""
    if state not in OVER:
        return Phase.RUNNING if state == "RUNNING" else Phase.WAITING
    known = {"COMPLETED": Phase.COMPLETED, "CANCELLED": Phase.CANCELLED}
    return known.get(state, Phase.FAILED)


def dependency_of(order: Order) -> str:
    """What must have ended (well); in a lane, also whatever was submitted there before: at most as
    many jobs run as there are lanes."""
    kind = "afterany" if order.after_any else "afterok"
    waits = [f"{kind}:" + ":".join(order.after)] if order.after else []
    return ",".join([*waits, *(["singleton"] if order.lane else [])])


def parameters(order: Order, folder: Path) -> dict[str, Any]:
    """submitit's parameters for a job that runs the package in ``order.code``."""
    job, profile, wants = order.job, order.profile, order.job.wants
    out = {
        "job_name": order.lane or job.name,
        "comment": job.name,
        "partition": wants.partition,
        "account": wants.account,
        "qos": wants.qos,
        "constraint": wants.constraint,
        "time": wants.minutes,
        "nodes": wants.nodes,
        "ntasks_per_node": wants.tasks_per_node,
        "cpus_per_task": wants.cpus_per_task,
        "mem": f"{round(wants.mem_gb * 1024)}MB" if wants.mem_gb else None,
        "gpus_per_node": wants.gpus_per_node if wants.gpus_per_node and not wants.gres else None,
        "gres": wants.gres,
        "dependency": dependency_of(order),
        "signal_delay_s": profile.signal_delay_s,
        "array_parallelism": profile.array_parallelism,
        "setup": [*profile.setup, *_environment(order)],
        "teardown": _teardown(folder, profile.retries),
        # Without it a job in which one task has died waits for the others until its limit, and
        # holds its GPUs.
        "srun_args": ["--kill-on-bad-exit=1", *profile.srun_args],
        # What is false is left out: sbatch has no --exclusive=False.
        "additional_parameters": {
            k: v
            for k, v in {"requeue": True, "kill-on-invalid-dep": "yes", **profile.extra}.items()
            if v not in (None, False)
        },
    }
    return {k: v for k, v in out.items() if v not in (None, "")}


def _environment(order: Order) -> list[str]:
    """Lines of shell. The snapshot of the code comes before all else; safe path, or else a checkout
    in the current folder would come first."""
    if ":" in str(order.code):
        raise UserError(
            f"{order.code}: PYTHONPATH takes no colon: choose another folder with --out"
        )
    code = shlex.quote(str(order.code))
    escaped = {k: str(v).replace('"', '\\"') for k, v in order.profile.env.items()}
    return [
        *(f'export {k}="{v}"' for k, v in escaped.items()),
        f'export PYTHONSAFEPATH=1 PYTHONPATH={code}"${{PYTHONPATH:+:$PYTHONPATH}}"',
        "export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}",
    ]


def _teardown(folder: Path, retries: int) -> list[str]:
    values = {"ends": shlex.quote(str(folder / "ends")), "retries": retries}
    return (_TEARDOWN % values).strip().splitlines()
