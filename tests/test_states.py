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
from ltdd_scale.pipeline import store
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
    edited = code_digest(tmp_path)
    assert edited != before
    make(tmp_path / "templates").joinpath("page.css").write_text("a {}")
    styled = code_digest(tmp_path)
    assert styled != edited
    make(tmp_path / "__pycache__").joinpath("a.pyc").write_bytes(b"x")
    assert code_digest(tmp_path) == styled


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


class Queue(slurm.Slurm):
    """SLURM without SLURM: what it is told, and what it says of its jobs."""

    def __init__(self, folder, known):
        super().__init__(folder)
        self.known, self.cancelled, self.submitted = known, [], []

    def available(self):
        return True

    def need(self):
        pass

    def states(self):
        return self.known

    def cancel(self, ids):
        self.cancelled += ids

    def submit(self, order):
        self.submitted.append((order.job.name, order.after))
        return str(100 + len(self.submitted))


def of(state):
    return State(state, slurm.phase_of(state))


def test_what_waits_for_a_job_that_failed_is_submitted_anew(tmp_path):
    """Else it would wait for the old one, and be cancelled by the queue in a while."""
    made = made_of(tmp_path, point(tmp_path, ""))
    names = [j.name for j in made.jobs]
    made.ids = {name: str(k) for k, name in enumerate(names)}
    ended = {"shard": "COMPLETED", "observer": "FAILED", "teacher": "RUNNING"}
    known = {made.ids[n]: of(ended.get(n, "PENDING")) for n in names}
    queue = Queue(tmp_path, known)
    for node in made.points[0].nodes.values():
        if node.name == "shard":
            files.write_json(make(node.folder(made.store)) / "stage.json", {"files": {}})
    campaign.submit(made, queue, profile.Profile(), 0, print)
    sent = dict(queue.submitted)
    assert "teacher" not in sent and {"observer", "calibrate", "students"} <= set(sent)
    assert made.ids["observer"] in sent["calibrate"], "the new one"
    assert {known_id for known_id in queue.cancelled} >= {str(names.index("calibrate"))}
    assert str(names.index("teacher")) not in queue.cancelled


def test_what_is_cancelled_is_forgotten_where_nothing_else_is_left(tmp_path):
    made = made_of(tmp_path, point(tmp_path, ""))
    campaign.prepare(made)
    made.jobs, made.replaced = [], ["7", "8"]
    queue = Queue(tmp_path, {"7": of("PENDING"), "8": of("COMPLETED")})
    made.save()
    campaign.tidy(made, queue, print)
    assert queue.cancelled == ["7"]
    assert json.loads((tmp_path / "jobs" / "jobs.json").read_text())["replaced"] == []
    made.replaced = ["7"]
    assert campaign.submit(made, queue, profile.Profile(), 0, print) == 0
    assert json.loads((tmp_path / "jobs" / "jobs.json").read_text())["replaced"] == []


def test_a_campaign_does_not_go_on_elsewhere_while_its_jobs_wait(tmp_path, monkeypatch):
    made = made_of(tmp_path, point(tmp_path, ""))
    campaign.prepare(made)
    made.ids = {"shard": "7"}
    made.save()
    shell = campaign.Campaign("tiny", made.folder, made.store, "local", made.points)
    again = campaign.make(shell, profile.Profile())
    assert again.ids == {} and again.elsewhere == ("slurm", ["7"])
    queue = Queue(made.folder, {"7": of("PENDING")})
    monkeypatch.setattr(campaign, "open_cluster", lambda name, folder: queue)
    with pytest.raises(UserError, match="wait or run on SLURM: cancel them first"):
        campaign.refuse_elsewhere(again)
    queue.known = {"7": of("CANCELLED")}
    campaign.refuse_elsewhere(again)
    campaign.refuse_elsewhere(made)
    queue.available = lambda: False
    with pytest.raises(UserError, match="cannot be asked here"):
        campaign.refuse_elsewhere(again)


def test_a_queue_that_does_not_answer_has_lost_nothing(tmp_path):
    made = made_of(tmp_path, point(tmp_path, ""))
    made.ids = {"shard": "7"}
    silent = Look(made, Queue(tmp_path, {}), {}, "SLURM does not answer")
    found = {j.name: silent.state(j).state for j in made.jobs}
    assert found["shard"] == "unknown" and found["observer"] == "to do"


def test_a_job_that_runs_here_is_seen(tmp_path):
    made = made_of(tmp_path, point(tmp_path, ""))
    made.cluster = "local"
    shard = next(j for j in made.jobs if j.name == "shard")
    with store.locked(made.store / shard.nodes[0], print):
        seen = Look(made, made.open(), {})
        assert seen.state(shard).state == "running"
    assert Look(made, made.open(), {}).state(shard).state == "to do"


@pytest.mark.parametrize(
    ("wants", "line"),
    [
        ({"extra": {"exclusive": False, "hold": None, "nice": 5}}, "nice=5"),
        ({"env": {"SAID": 'a "b" $HOME'}}, r'export SAID="a \"b\" $HOME"'),
    ],
)
def test_lines_of_a_job_that_sbatch_and_the_shell_can_read(tmp_path, wants, line):
    job = made_of(tmp_path, point(tmp_path, "")).jobs[0]
    given = slurm.parameters(Order(job, profile.Profile(**wants), tmp_path / "co de"), tmp_path)
    text = json.dumps(given["additional_parameters"]).replace('": ', "=") + "\n".join(
        given["setup"]
    )
    assert line in text and "exclusive" not in text and "hold" not in text
    assert f"PYTHONPATH='{tmp_path}/co de'" in text
    with pytest.raises(UserError, match="no colon"):
        slurm.parameters(Order(job, profile.Profile(), tmp_path / "10:30"), tmp_path)


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
