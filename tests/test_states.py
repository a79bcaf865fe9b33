"""What jobs are at: records, fences, notices, states."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT
from jobs_tools import made_of, make, point

from ltdd_scale.config import load as configuration
from ltdd_scale.errors import UserError
from ltdd_scale.launch import board, campaign, jobs, profile
from ltdd_scale.launch.cluster import Order, Phase, State
from ltdd_scale.launch.clusters import slurm
from ltdd_scale.launch.clusters.slurm_task import Fence
from ltdd_scale.launch.states import Look
from ltdd_scale.request import Request
from ltdd_scale.runtime import files
from ltdd_scale.runtime.code import code_digest
from ltdd_scale.runtime.place import Place

FENCED = """
import sys
from pathlib import Path
from ltdd_scale.launch.clusters.slurm_task import Fence
from ltdd_scale.runtime import files
from ltdd_scale.runtime.place import Place
folder = Path(sys.argv[1])
mine = Fence(folder / "fences", Place(job="9"))
mine.claim()
files.guard = mine.check
files.write_text(folder / "first", "written")
Fence(folder / "fences", Place(job="9", attempt=1)).claim()
files.write_text(folder / "second", "written")
"""


def test_an_attempt_that_was_replaced_cannot_write(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FENCED, tmp_path], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 75 and "attempt 0 ends here, unwritten" in done.stderr, done.stderr
    assert (tmp_path / "first").exists() and not (tmp_path / "second").exists()


def test_a_fence_does_not_go_back(tmp_path):
    Fence(tmp_path, Place(job="9", attempt=2)).claim()
    Fence(tmp_path, Place(job="9", attempt=1)).claim()
    assert Fence(tmp_path, Place(job="9")).latest() == 2


def test_the_digest_of_the_code_sees_every_edit(tmp_path):
    (tmp_path / "a.py").write_text("x = 1")
    before = code_digest(tmp_path)
    (tmp_path / "a.py").write_text("x = 2")
    assert code_digest(tmp_path) != before


NOTICE = """
import os, signal, sys, time
from ltdd_scale.runtime import signals
from ltdd_scale.runtime.checkpoint import Checkpoints
signals.install(term_saves=True)
saves = Checkpoints(sys.argv[1], "me", 3600)
assert not saves.due()
os.kill(os.getpid(), signal.SIGTERM)
assert saves.due() and not signals.requested()
saves.save(1, {}, wait=True)
assert not saves.due()
os.kill(os.getpid(), signal.SIGUSR2)
assert signals.requested()
"""


def test_sigterm_asks_for_one_save_where_it_is_a_notice(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", NOTICE, tmp_path / "saves"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr


def test_a_record_keeps_ids_of_jobs_that_are_the_same(tmp_path):
    made = made_of(tmp_path, point(tmp_path, ""))
    campaign.prepare(made)
    made.ids = {j.name: str(k) for k, j in enumerate(made.jobs)}
    made.save()
    again = made_of(tmp_path, point(tmp_path, "", "ipc=2"))
    # The plain network on the whole set does not know of IPC; the other students do.
    assert set(again.ids) == {"shard", "observer", "teacher", "calibrate"}
    assert set(again.replaced) == set(made.ids.values()) - set(again.ids.values())
    # Other parts of recovery: what would wait for the old ones is another job too.
    parts = profile.Profile(stages={"recover": {"array": 2}})
    other = made_of(tmp_path, point(tmp_path, ""), wants=parts)
    assert set(other.ids) == {"shard", "observer", "teacher", "calibrate", "initialize"}


def test_a_record_tells_what_jobs_there_are(tmp_path):
    """A job in the queue holds its own settings; the record has each point's config once."""
    parts = profile.Profile(stages={"recover": {"array": 3}})
    made = made_of(tmp_path, point(tmp_path, "a"), point(tmp_path, "b", "ipc=2"), wants=parts)
    table = jobs.Summary("s.yaml", str(tmp_path), str(made.store), ("seed=1",))
    campaign.make(made, parts, table)
    campaign.prepare(made)
    made.ids, made.refused = {"a/shard": "0"}, {"c": "why"}
    made.save()
    record = json.loads((tmp_path / "jobs" / "jobs.json").read_text())
    assert record["name"] == "tiny" and record["ids"] == {"a/shard": "0"}
    assert json.dumps(record).count("chunk_classes") == 2
    found = campaign.load(tmp_path)
    assert [j.to_dict() for j in found.jobs] == [j.to_dict() for j in made.jobs]
    assert found.jobs[-1].summary == table and found.refused == made.refused
    requests = {j.name: j.requests for j in found.jobs}
    assert requests == {j.name: j.requests for j in made.jobs}
    assert configuration.from_text(requests["a/recover"][2].config).ipc == 4
    assert configuration.from_text(requests["b/recover"][0].config).ipc == 2
    assert Request.from_json(requests["a/recover"][2].to_json()) == requests["a/recover"][2]


def test_a_record_of_another_version_is_refused(tmp_path):
    files.write_json(make(tmp_path / "jobs") / "jobs.json", {"jobs": []})
    with pytest.raises(UserError, match="another version of ltdd_scale"):
        campaign.load(tmp_path)


class Quiet(slurm.Slurm):
    """A cluster without a queue: what it knows is told."""

    def available(self) -> bool:
        return True


def looked_at(tmp_path: Path, name: str, known: dict[str, State], *, number="12", wants=None):
    made = made_of(tmp_path, point(tmp_path, ""), wants=wants)
    made.ids = {j.name: number for j in made.jobs if j.name == name}
    (job,) = [j for j in made.jobs if j.name == name]
    return Look(made, Quiet(tmp_path / "jobs"), known), job


def test_what_a_job_is_at(tmp_path):
    array = profile.Profile(stages={"recover": {"array": 3}})
    running = State("RUNNING", Phase.RUNNING)
    waiting = State("PENDING", Phase.WAITING, "Resources", 1)
    make(tmp_path / "jobs/ends")
    (tmp_path / "jobs/ends/12_1").write_text("exit code 137\n")
    (tmp_path / "jobs/ends/123").write_text("another job's\n")
    seen, job = looked_at(
        tmp_path, "recover", {"12_0": running, "12_1": waiting, "123": running}, wants=array
    )
    assert vars(seen.state(job)) == {
        "state": "running", "restarts": 1, "note": "1 of 3 run, 1 ended early",
    }  # fmt: skip
    for known, state, note in (
        ({"12": waiting}, "queued again", "Resources"),
        ({"12": State("PENDING", Phase.WAITING, "Priority")}, "waiting", "Priority"),
        ({"12": State("TIMEOUT", Phase.FAILED)}, "failed", "TIMEOUT"),
        ({"12": State("failed", Phase.FAILED, "exit code 3")}, "failed", "exit code 3"),
        ({"12": State("CANCELLED", Phase.CANCELLED)}, "stopped", "needs shard"),
        (
            {"12": State("COMPLETED", Phase.COMPLETED)},
            "finished",
            "its files are not seen here yet",
        ),
        ({"123": running}, "gone", "SLURM no longer knows it, and its work is not there"),
    ):
        seen, job = looked_at(tmp_path, "observer", known)
        assert (seen.state(job).state, seen.state(job).note) == (state, note)
    logs = make(tmp_path / "jobs/logs")
    (logs / "12_0_log.err").write_text("srun: error: x\nerror: the disk is full\n  and more\n")
    assert seen.state(job).note == "the disk is full"


def test_slurms_states_in_words_of_this_house():
    words = ("PENDING", "RUNNING", "NODE_FAIL", "COMPLETED", "CANCELLED", "OUT_OF_MEMORY")
    assert [slurm.phase_of(w) for w in words] == [
        "waiting", "running", "waiting", "completed", "cancelled", "failed",
    ]  # fmt: skip


def test_progress_comes_from_the_stages_folders(tmp_path):
    array = profile.Profile(stages={"recover": {"array": 3}})
    seen, job = looked_at(tmp_path, "recover", {"12": State("RUNNING", Phase.RUNNING)}, wants=array)
    folder = make(seen.campaign.store / job.nodes[0])
    for k, (done, at) in enumerate(((4, 5.0), (1, 7.0), (2, 6.0))):
        entry = {"title": "x", "done": done, "total": 4, "unit": "chunks", "time": at}
        files.write_json(folder / f".part-{k}.progress.json", {**entry, "seconds_left": 90.0})
    assert seen.progress(job) == "25 % (1/4 chunks), 1:30 min left and 1 more"
    (record,) = [r for r in board.records(seen.campaign) if r["job"] == "recover"]
    assert record["id"] == "12"
    files.write_json(folder / "stage.json", {"files": {}})
    assert seen.progress(job) == ""


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root, to be somebody else"
)
def test_a_good_end_is_one_where_slurmstepd_is_roots():
    """A job may not signal its slurmstepd: that it lives must be seen otherwise. A folder may have a
    blank in its name."""
    folder = Path(tempfile.mkdtemp())  # pytest's own are closed to others
    ends, tools, script = folder / "my run" / "ends", folder / "tools", folder / "job.sh"
    for made in (ends, tools):
        made.mkdir(parents=True)
    (tools / "squeue").write_text("#!/bin/sh\necho RUNNING\n")
    (tools / "scontrol").write_text(f"#!/bin/sh\necho requeued >> {folder}/asked\nkill $PPID\n")
    for path in (*tools.iterdir(), folder):
        path.chmod(0o755)
    for path in (ends, folder):
        path.chmod(0o777)
    order = Order(jobs.Job("a", "shard"), profile.Profile(retries=1), folder)
    text = "\n".join(slurm.parameters(order, folder / "my run")["teardown"])
    env = {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n1",
    }

    def end(code: int) -> int:
        script.write_text(f"(exit {code})\n{text}\n")
        script.chmod(0o644)
        return subprocess.run(
            ["setpriv", "--reuid=65534", "--clear-groups", "bash", script],
            env=env,
            capture_output=True,
            timeout=30,
        ).returncode

    assert end(0) == 0 and not list(ends.iterdir())
    end(137)
    assert (
        "exit code 137, slurmstepd there" in (ends / "7").read_text()
        and (folder / "asked").exists()
    )
    assert end(137) == 137  # the second time is one too many for retries: 1
    shutil.rmtree(folder)


HELPER = """
import os, signal, sys, time
from ltdd_scale.runtime import signals
pid = os.fork()
if pid == 0:
    signals.helper()
    os.write(1, b"ready")
    time.sleep(60)
    os._exit(0)
os.read(0, 1)
os.kill(pid, signal.SIGTERM)
time.sleep(0.5)
print("ended" if os.waitpid(pid, os.WNOHANG)[0] else f"lives {pid}", flush=True)
"""


@pytest.mark.parametrize("in_job", [False, True])
def test_helpers_survive_slurms_notice(in_job):
    """SIGTERM ends a loader's worker, but in a job, where it is SLURM's notice to everyone; there it goes with its parent."""
    job = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    env = {k: v for k, v in os.environ.items() if k not in job} | (job if in_job else {})
    parent = subprocess.Popen(
        [sys.executable, "-c", HELPER],
        cwd=ROOT,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert os.read(parent.stdout.fileno(), 5) == b"ready"
    out, _ = parent.communicate(
        b"x", timeout=30
    )  # ends when the helper, who holds the pipe too, is gone
    assert out.decode().startswith("lives" if in_job else "ended")
