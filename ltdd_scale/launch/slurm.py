"""SLURM by way of submitit: a job's sbatch file, its submission, its state."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltdd_scale.errors import UserError
from ltdd_scale.launch.jobs import Job
from ltdd_scale.launch.profile import Profile
from ltdd_scale.launch.task import Task

# States after which SLURM does not run a job again unless asked. NODE_FAIL is none: the job comes back (where the cluster requeues).
OVER = frozenset(
    ["BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "OUT_OF_MEMORY", "TIMEOUT"]
)

# After srun, in the batch script. A job that was killed or broke down goes back into the queue, up to so many times, with the reason kept; one that
# SLURM itself ends (cancelled, preempted, requeued) is not RUNNING any more here; one that ended with the user's error has left a `.final` note.
# slurmstepd is root's: whether it lives is asked of our own status (its child gets another parent), not by a signal that we may not send.
# A controller that is being restarted is asked again for a minute or two.
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
"""


def parameters(
    job: Job, profile: Profile, folder: Path, code: Path, dependency: str, lane: str
) -> dict[str, Any]:
    """submitit's parameters for a job that runs the package in `code`."""
    wants = profile.of(job.stage)
    env = [f'export {k}="{v}"' for k, v in profile.env.items()]
    # The snapshot of the code comes before all else; safe path, or else a checkout in the current folder would come first.
    env += [
        f'export PYTHONSAFEPATH=1 PYTHONPATH="{code}${{PYTHONPATH:+:$PYTHONPATH}}"',
        "export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}",
    ]
    teardown = (
        (_TEARDOWN % {"ends": shlex.quote(str(folder / "ends")), "retries": profile.retries})
        .strip()
        .splitlines()
    )
    out = {
        "job_name": lane or job.name,
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
        "dependency": dependency,
        "signal_delay_s": profile.signal_delay_s,
        "array_parallelism": profile.array_parallelism,
        "setup": [*profile.setup, *env],
        "teardown": teardown,
        # Without it a job in which one task has died waits for the others until its limit, and holds its GPUs.
        "srun_args": ["--kill-on-bad-exit=1", *profile.srun_args],
        "additional_parameters": {"requeue": True, "kill-on-invalid-dep": "yes", **profile.extra},
    }
    return {k: v for k, v in out.items() if v not in (None, "")}


def dependency_of(ids: list[str], lane: str, kind: str = "afterok") -> str:
    """What must have ended (well); in a lane, also whatever was submitted there before: at most as many jobs run as there are lanes."""
    return ",".join(
        [*([f"{kind}:" + ":".join(ids)] if ids else []), *(["singleton"] if lane else [])]
    )


def script(job: Job, profile: Profile, folder: Path, code: Path, dependency: str, lane: str) -> str:
    """The sbatch file that submitit writes."""
    from submitit.slurm import slurm as submitit_slurm

    count = {"map_count": len(job.commands)} if len(job.commands) > 1 else {}
    command = f"{profile.python or shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder / 'logs'))}"
    return submitit_slurm._make_sbatch_string(
        command,
        folder / "logs",
        **count,
        **parameters(job, profile, folder, code, dependency, lane),
    )


def submit(job: Job, profile: Profile, folder: Path, code: Path, dependency: str, lane: str) -> str:
    """Submit a job, or an array; return its SLURM id. Raises `UserError` with what sbatch said."""
    import submitit

    executor = submitit.SlurmExecutor(
        folder / "logs", max_num_timeout=1000, python=profile.python or None
    )
    executor.update_parameters(**parameters(job, profile, folder, code, dependency, lane))
    tasks = [Task(c, os.getcwd(), code.name, str(folder)) for c in job.commands]
    # From inside a job (a shell on a node, say) its SLURM_ variables would be taken for wishes.
    clean = submitit.helpers.clean_env() if "SLURM_JOB_ID" in os.environ else nullcontext()
    try:
        with clean:
            if len(tasks) == 1:
                return executor.submit(tasks[0]).job_id
            with executor.batch():
                made = [executor.submit(t) for t in tasks]
            return made[0].job_id.split("_")[0]
    except (
        submitit.core.utils.FailedJobError,
        submitit.core.utils.FailedSubmissionError,
        subprocess.SubprocessError,
    ) as error:
        raise UserError(
            f"sbatch refuses the job {job.name}: {' '.join(str(error).split())}"
        ) from None


def need_slurm() -> None:
    for tool in ("sbatch", "squeue", "scontrol", "srun"):
        if shutil.which(tool) is None:
            raise UserError(
                f'{tool} is not found: run this where SLURM\'s commands are, or try a cluster on this machine with: eval "$(slurm/testbed up)"'
            )


@dataclass
class State:
    """Of one job, or of one element of an array."""

    state: str
    reason: str
    restarts: int


def states() -> dict[str, State]:
    """The user's jobs that SLURM still knows, by id (123 or 123_4), in one call."""
    done = subprocess.run(
        [
            "squeue",
            "--me",
            "-h",
            "-r",
            "-t",
            "all",
            "-O",
            "JobArrayID:32,State:20,RestartCnt:8,Reason:64",
        ],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise UserError(
            f"SLURM does not answer: {(done.stderr.strip() or 'squeue failed').splitlines()[-1]}"
        )
    out = {}
    for line in done.stdout.splitlines():
        job, state, restarts, reason = (
            line[:32].strip(),
            line[32:52].strip(),
            line[52:60].strip(),
            line[60:].strip(),
        )
        out[job] = State(state, reason if reason != "None" else "", int(restarts or 0))
    return out


def alive(known: dict[str, State]) -> set[str]:
    """Ids, of arrays as a whole, that SLURM runs or will run."""
    return {i.split("_")[0] for i, s in known.items() if s.state not in OVER}


def cancel(ids: list[str]) -> None:
    subprocess.run(["scancel", *ids], check=True)
