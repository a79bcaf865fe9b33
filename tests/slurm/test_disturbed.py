"""Jobs that SLURM, or fate, ends in the middle: each ends in the bytes of an undisturbed run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import cli
from slurm_tools import TESTBED, occupy, queue, until

from ltdd_scale.launch.clusters.slurm import Slurm
from ltdd_scale.runtime import files

pytestmark = pytest.mark.slow
TWO = {"nodes": 2, "gpus_per_node": 1}


def same_bytes(jobs) -> None:
    ours, calm = (
        files.read_json(base / "store" / jobs.job.nodes[0] / "stage.json")["files"]
        for base in (jobs.folder, jobs.calm)
    )
    assert ours == calm


def resumed(jobs) -> list[int]:
    """The steps at which attempts went on."""
    return [int(n) for n in re.findall(r"resumed at step (\d+)", jobs.log())]


def is_step(env, command) -> bool:
    return (
        command.startswith("slurmstepd:") and ".batch]" not in command and ".extern]" not in command
    )


def is_task(rank: str):
    return lambda env, command: (
        env.get("SLURM_PROCID") == rank and "SLURM_STEP_ID" in env and "submitit" in command
    )


def kill(pids: list[int]) -> None:
    """All of them: one of an earlier attempt may be about to go."""
    assert pids, "there is nobody to kill"
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def requeue(jobs) -> None:
    subprocess.run(["scontrol", "requeue", jobs.made.ids["observer"]], check=True)


def preempt(jobs) -> None:
    occupy("node2")


def kill_task(jobs) -> None:
    kill(jobs.processes(is_task("1")))


def kill_step(jobs) -> None:
    kill(jobs.processes(is_step))


def kill_batch(jobs) -> None:
    kill(
        jobs.processes(
            lambda env, command: command.startswith("slurmstepd:") and ".batch]" in command
        )
    )


def test_training_that_is_disturbed_again_and_again(jobs):
    """Requeued, preempted, a task killed, its slurmstepd killed, the batch script's slurmstepd killed: each attempt goes on where the last one was."""
    run = jobs("observer", **TWO)
    run.submit()
    last = 0
    for number, event in enumerate((requeue, preempt, kill_task, kill_step, kill_batch)):
        last = run.checkpoint(after=last)
        event(run)
        if event is not kill_batch:  # of which nobody hears until the work is done
            # The next attempt must be there: the last one may work, and save, until it is killed.
            until(
                lambda n=number: f"attempt {n + 1}, on" in run.log(),
                90,
                f"{event.__name__}: no new attempt",
            )
    end = run.ended()
    assert end.state == "COMPLETED" and end.restarts >= 5, (end, run.log(), run.ends())
    steps = resumed(run)
    assert len(steps) >= 3 and steps[0] > 0 and steps == sorted(steps), (
        run.log()
    )  # the second attempt may be stopped before it has read its checkpoint
    same_bytes(run)
    assert "exit code 137" in run.ends() and "slurmstepd gone" in run.ends()  # the reasons are kept
    assert (
        "SIGUSR2: saving, then making room" in run.log()
        and "the slurmstepd of this task is gone" in run.log()
    )


def test_preemption_without_notice(jobs):
    """GraceTime 0: SLURM has requeued the job before we ask for it."""
    run = jobs("observer", **TWO, partition="abrupt")
    run.submit()
    run.checkpoint()
    preempt(run)
    assert run.ended().state == "COMPLETED" and resumed(run)[0] > 0, run.log()
    same_bytes(run)


def test_sigterm_alone_saves_and_goes_on(jobs, testbed):
    """A cluster without preempt_send_user_signal: a job that ended by itself in its grace time would count as failed."""
    conf = Path(os.environ["SLURM_CONF"])
    text = conf.read_text()
    try:
        conf.write_text(
            text.replace("\nSlurmctldParameters=preempt_send_user_signal", "\n").replace(
                "GraceTime=30", "GraceTime=10"
            )
        )
        subprocess.run(["scontrol", "reconfigure"], check=True)
        run = jobs("observer", **TWO, env={"LTDD_DRAG": "0.2"})
        run.submit()
        run.checkpoint()
        preempt(run)
        end = run.ended()
        # Killed when the grace is over, it is requeued and resumes. It must not have stopped, which counts as an end.
        assert end.state == "COMPLETED" and resumed(run), (end, run.log())
        assert (
            "SIGTERM: saving, then going on until the end" in run.log()
            and "making room" not in run.log()
        )
        same_bytes(run)
    finally:
        conf.write_text(text)
        subprocess.run(["scontrol", "reconfigure"], check=True)


def test_the_time_limit(jobs):
    """Work that is longer than a turn goes on in the next one."""
    run = jobs("observer", **TWO, minutes=1, signal_delay_s=30, env={"LTDD_DRAG": "0.2"})
    run.submit()
    end = run.ended(600)  # several turns of a minute, each of which waits for the queue
    assert end.state == "COMPLETED" and end.restarts >= 1 and "SIGUSR2" in run.log(), (
        end,
        run.log(),
    )
    same_bytes(run)


def test_a_node_that_slurm_gave_up_writes_no_more(jobs, testbed):
    """slurmd dies, the job's processes live on; SLURM requeues the job elsewhere: the earlier attempt must end, unwritten."""
    run = jobs("observer", gpus_per_node=2, cpus_per_task=1)
    number = run.submit()
    run.checkpoint()
    for pid in run.processes(is_task("0")) + run.processes(is_task("1")):
        os.kill(
            pid, signal.SIGSTOP
        )  # a machine that hangs: it must not finish before SLURM has noticed
    stopped = run.processes(lambda env, command: "submitit" in command and "SLURM_STEP_ID" in env)
    node = subprocess.run(
        ["squeue", "-h", "-j", number, "-o", "%N"], capture_output=True, text=True
    ).stdout.strip()
    os.kill(int((testbed / f"run/slurmd-{node}.pid").read_text()), signal.SIGKILL)
    until(lambda: run.state().restarts >= 1, 90, f"SLURM has not noticed that {node} is gone")
    # The lock is let go only once the old attempt has ended: it finds, awake, that it has been replaced.
    until(
        lambda: (run.folder / "run/jobs/fences" / number).read_text() == "1",
        90,
        "no second attempt",
    )
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    end = run.ended()
    assert end.state == "COMPLETED", (end, run.log())
    assert "attempt 1 of job" in run.log() and "attempt 0 ends here, unwritten" in run.log(), (
        run.log()
    )
    same_bytes(run)
    subprocess.run([TESTBED, "up"], check=True, capture_output=True)


def test_an_element_of_recovery_resumes_within_its_chunk(jobs):
    run = jobs("recover", array_parallelism=1, stages={"recover": {"array": 2}})
    number = run.submit()
    run.checkpoint()
    subprocess.run(["scontrol", "requeue", f"{number}_0"], check=True)
    assert run.ended().state == "COMPLETED", run.log()
    attempts = re.findall(rf"== job {number}_(\d), attempt (\d)", run.log())
    assert attempts == [("0", "0"), ("0", "1"), ("1", "0")], attempts
    assert re.search(r"recover: chunk 0 goes on at iteration \d+", run.log()), run.log()
    assert not (run.work / "stage.json").exists()
    # The parts put together are the whole.
    where = ["--out", run.folder / "run", "--store", run.store, "--nproc", 1]
    done = cli("recover", run.calm / "long.yaml", *where)
    assert done.returncode == 0, done.stderr
    same_bytes(run)


def test_a_rank_that_waits_for_others_does_not_keep_their_job_from_the_queue(jobs):
    """Rank 0 has done its students and waits, in a collective that hears no signal, for rank 1, who is asked to stop."""
    run = jobs(
        "students",
        "evaluate.epochs=60",
        gpus_per_node=2,
        cpus_per_task=1,
        env={"LTDD_DRAG": "0.3", "LTDD_DRAG_TASK": "1"},
    )
    number = run.submit()
    until(
        lambda: any(
            re.search(r"rank 0 has done (\d+) of \1,", p.read_text())
            for p in (run.folder / "run/jobs/logs").glob("*_0_log.out")
        ),
        90,
        "rank 0 is not done",
    )
    subprocess.run(["scancel", "--signal=USR2", number], check=True)
    end = run.ended()
    assert end.state == "COMPLETED" and end.restarts == 1, (end, run.log())
    assert "rank 0 is silent" in run.log(), run.log()
    # Distilled and random real images with single labels, random real ones with plain labels.
    assert len(run.job.nodes) == 3 and all(
        (run.store / n / "stage.json").exists() for n in run.job.nodes
    )


def test_a_job_that_keeps_dying_is_given_up_with_the_reason(jobs, tmp_path):
    fault = {
        "LTDD_FAULT": "replace:step-:1:KILL:me",
        "LTDD_FAULT_MARK": f"{tmp_path}/mark-$SLURM_RESTART_COUNT",
    }
    run = jobs("observer", **TWO, retries=1, env=fault)
    run.submit()
    end = run.ended()
    assert end.state == "FAILED" and end.restarts == 1, (end, run.log())
    assert run.ends().count("exit code 137") == 2


def test_an_error_of_the_user_is_not_tried_again(jobs):
    run = jobs("observer", "observer.batch_size=4096", **TWO)
    run.submit()
    end = run.ended()
    assert end.state == "FAILED" and end.restarts == 0, (end, run.log())
    assert "error: observer.batch_size=4096, but there are" in run.log()


def test_code_that_changed_since_submission_is_refused(jobs):
    run = jobs("observer", **TWO, extra={"hold": True})
    number = run.submit()
    (code,) = (run.folder / "run/jobs/code").iterdir()
    with open(code / "ltdd_scale/recipe.py", "a") as f:
        f.write("# edited\n")
    subprocess.run(["scontrol", "release", number], check=True)
    assert (
        run.ended().state == "FAILED" and "has changed since this job was submitted" in run.log()
    ), run.log()


def test_the_queue_is_read_in_one_call(nodes, tmp_path):
    number = subprocess.run(
        ["sbatch", "--parsable", "-a", "0-2", "-o", "/dev/null", "--wrap", "sleep 30"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()

    def mine() -> dict:
        return {i: s for i, s in queue().items() if i.startswith(number)}

    assert set(mine()) == {f"{number}_{k}" for k in range(3)}
    assert all(s.state in ("PENDING", "RUNNING") and not s.phase.over for s in mine().values())
    Slurm(tmp_path).cancel([number])
    until(lambda: all(s.state == "CANCELLED" for s in mine().values()), 20, "not cancelled")
