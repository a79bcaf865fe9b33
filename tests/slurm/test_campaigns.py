"""Whole runs and sweeps through a real SLURM, by the commands that a user types."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, cli, digests
from slurm_tools import DRAG, occupy, queue, until

pytestmark = pytest.mark.slow
PROFILE = """
partition: main
cpus_per_task: 1
mem_gb: 0.5
minutes: 10
signal_delay_s: 30
env: {more}
"""


def profile(folder: Path, more: str = "", **env: str) -> Path:
    path = folder / "profile.yaml"
    values = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", **env}
    path.write_text(PROFILE.format(more=json.dumps(values)) + more)
    return path


def on_slurm(path: Path) -> list:
    return ["--cluster", "slurm", "--profile", path]


def one(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def where(folder: Path, run: str, store: str) -> list:
    return ["--out", folder / run, "--store", folder / store]


def test_four_ranks_on_two_nodes_make_what_four_ranks_on_one_machine_make(nodes, tmp_path, tiny):
    here = cli("train", "observer", tiny, *where(tmp_path, "here", "store1"), "--nproc", 4)
    assert here.returncode == 0, here.stderr
    path = profile(
        tmp_path, "stages: {observer: {nodes: 2, gpus_per_node: 2}}\narray_parallelism: 2\n"
    )
    there = cli("run", tiny, *where(tmp_path, "there", "store2"), *on_slurm(path))
    assert there.returncode == 0, there.stderr
    number = json.loads((tmp_path / "there/jobs/jobs.json").read_text())["ids"]["observer"]
    shown = one("scontrol", "show", "job", number)
    for words in ("NumNodes=2", "NumTasks=4", "TresPerNode=gres:gpu:2"):
        assert words in shown, shown

    def sealed() -> bool:
        records = (tmp_path / "store2/experts").glob("*/stage.json")
        return any(json.loads(p.read_text())["name"] == "observer" for p in records)

    until(sealed, 120, "no observer")
    assert cli("cancel", tmp_path / "there").returncode == 0
    ours, theirs = digests(tmp_path / "store1"), digests(tmp_path / "store2")
    (name,) = [k for k in ours if k.startswith("experts/")]
    assert ours[name] == theirs[name]
    (log,) = (tmp_path / "there/jobs/logs").glob(f"{number}_0_log.err")
    assert set(re.findall(r"on (node\d)", log.read_text())) == {"node1"}  # rank 0's


def test_plain_srun_is_enough(nodes, tmp_path, tiny):
    """The tasks of a step find each other by themselves: no launcher of ours, no port to choose."""
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    work = ["train", "observer", tiny, *where(tmp_path, "there", "store2"), "--quiet"]
    command = ["srun", "-N2", "-n2", "--mem=500M", sys.executable, "-m", "ltdd_scale", *work]
    there = subprocess.run(
        list(map(str, command)), env=env, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert there.returncode == 0, there.stderr
    here = cli("train", "observer", tiny, *where(tmp_path, "here", "store1"), "--nproc", 2)
    assert here.returncode == 0, here.stderr
    assert digests(tmp_path / "store1") == digests(tmp_path / "store2")


def test_the_quickstart_through_slurm_is_the_quickstart(nodes, tmp_path):
    """The distilled set is the same to the byte, whoever starts the ranks."""
    config = ROOT / "configs" / "quickstart.yaml"
    # Students do not touch the distilled set.
    quick = ["evaluate.epochs=20", "evaluate.seeds=1", "evaluate.matrix=false"]
    quick = ["--set", *quick, "evaluate.full_epochs=0", "evaluate.plain=expert"]
    more = "observer: {nodes: 2}, teacher: {nodes: 2}, recover: {array: 2}, students: {array: 2}"
    path = profile(tmp_path, f"stages: {{{more}}}\n")
    there = ["run", config, *quick, *where(tmp_path, "there", "store2"), *on_slurm(path)]
    done = cli(*there, "--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    here = cli("run", config, *quick, *where(tmp_path, "here", "store1"), "--nproc", 2)
    assert here.returncode == 0, here.stderr

    def images(run: str) -> dict:
        folder = tmp_path / run / "distilled" / "images"
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.png")}

    assert len(images("here")) == 20 and images("here") == images("there")
    assert (tmp_path / "there" / "report.html").exists()
    again = cli(*there)
    assert again.returncode == 0 and "submitted" not in again.stdout, again.stdout
    table = cli("status", tmp_path / "there").stdout
    # Trials, the choice and the labels of what was chosen are jobs too.
    assert table.count("| done") == 14 and "everything is done" in table, table


SWEEP = """
config: tiny.yaml
set: {{evaluate.random: false, evaluate.embedding: false, observer.epochs: 20, relabel.labels: single, runtime.checkpoint_seconds: 1}}
max_jobs: 4
points:
{points}
"""


def sweep_file(folder: Path) -> Path:
    """2 IF × 2 IPC × 2 seeds, one of which is bad."""
    lines = []
    for f, i, s in itertools.product((3, 6), (2, 4), (0, 1)):
        bad = ", evaluate.lr: 1.0e+30, name: bad" if (f, i, s) == (6, 2, 0) else ""
        lines.append(f"  - {{data.imbalance_factor: {f}, ipc: {i}, seed: {s}{bad}}}")
    (folder / "sweep.yaml").write_text(SWEEP.format(points="\n".join(lines)))
    (folder / "tiny.yaml").write_text(TINY)
    return folder / "sweep.yaml"


def preempt_twice() -> None:
    """Whoever is at work on a node makes room, unless it ends just then."""
    for turn in range(12):
        if sum(s.restarts for s in queue().values()) >= 2:
            break
        node = f"node{turn % 2 + 1}"
        runs = ("squeue", "-h", "-t", "R", "-w", node, "-o", "%i")
        until(lambda runs=runs: one(*runs), 120, f"nothing runs on {node}")
        state = ("squeue", "-h", "-t", "all", "-j", occupy(node, 1), "-o", "%T")
        until(lambda state=state: one(*state) == "COMPLETED", 120, "high did not run")


def test_a_sweep_with_preemptions_and_a_poisoned_point(nodes, tmp_path):
    """Shared experts, two preemptions, one bad point: 7 results, 1 clear failure, no work done
    twice."""
    out, store = tmp_path / "sweep", tmp_path / "store"
    path = profile(tmp_path, **{**DRAG, "LTDD_DRAG": "0.05"})
    command = ["sweep", sweep_file(tmp_path), *where(tmp_path, "sweep", "store"), *on_slurm(path)]
    begun = cli(*command)
    assert begun.returncode == 0 and "jobs submitted" in begun.stdout, begun.stdout + begun.stderr
    until(lambda: list(store.glob("experts/*/checkpoints/step-*.pt")), 120, "nobody trains")
    preempt_twice()
    waited = cli(*command, "--wait")
    said = waited.stdout + waited.stderr
    assert waited.returncode == 1 and "nothing to submit" in waited.stdout, said
    found = json.loads((out / "results.json").read_text())
    missing = found["missing"]
    assert len(found["points"]) == 7 and [m[:8] for m in missing] == ["- **bad*"], missing
    assert "lower evaluate.lr" in missing[0]
    # The failure is clear, stops what needs it and nothing else.
    table = cli("status", out).stdout
    (failed,) = [line for line in table.splitlines() if "| failed" in line]
    for words in ("bad/students", "the loss is", "lower evaluate.lr"):
        assert words in failed, failed
    stopped = [line.split("|")[1].strip() for line in table.splitlines() if "| stopped" in line]
    assert sorted(stopped) == ["bad/evaluate", "bad/report"], table
    assert "lower evaluate.lr" in cli("logs", out).stdout
    logs = "".join(p.read_text() for p in (out / "jobs" / "logs").glob("*_log.*"))
    assert len(re.findall(r"== job \w+, attempt [1-9]", logs)) >= 2, "nobody was preempted"
    nothing_was_done_twice(store, logs)
    four_at_a_time()
    again = cli(*command)  # the bad point's students, evaluate, report; the table
    assert again.returncode == 0 and "4 jobs submitted" in again.stdout, again.stdout
    assert cli("cancel", out).returncode == 0


def nothing_was_done_twice(store: Path, logs: str) -> None:
    """As many seals as folders."""
    sealed = re.findall(r"sealed (\w+/\w{16})", logs)
    folders = [str(p.parent.relative_to(store)) for p in store.glob("*/*/stage.json")]
    assert sorted(sealed) == sorted(folders)
    count = {kind: sum(f.startswith(kind) for f in folders) for kind in ("experts/", "shard/")}
    assert count == {"experts/": 8, "shard/": 2}  # IF × seed × 2; IF


def four_at_a_time() -> None:
    """In each of the four lanes one job ends before the next begins."""
    lanes = [f"sweep-{k}" for k in range(4)]
    shown = ["-o", "JobName,Start,End", "--name", ",".join(lanes)]
    lines = one("sacct", "-D", "-X", "-n", "-P", "-S", "now-1hour", *shown).splitlines()
    spans = [x.split("|") for x in lines if "Unknown" not in x and "None" not in x]
    assert {s[0] for s in spans} == set(lanes)
    for lane in lanes:
        mine = sorted(s[1:] for s in spans if s[0] == lane)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(mine)), mine
