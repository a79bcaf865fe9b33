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
from slurm_tools import DRAG, until

from ltdd_scale.launch import slurm

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
    path.write_text(
        PROFILE.format(more=json.dumps({"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", **env}))
        + more
    )
    return path


def test_four_ranks_on_two_nodes_make_what_four_ranks_on_one_machine_make(nodes, tmp_path, tiny):
    here = cli(
        "train",
        "observer",
        tiny,
        "--out",
        tmp_path / "here",
        "--store",
        tmp_path / "store1",
        "--nproc",
        4,
    )
    assert here.returncode == 0, here.stderr
    path = profile(
        tmp_path, "stages: {observer: {nodes: 2, gpus_per_node: 2}}\narray_parallelism: 2\n"
    )
    there = cli(
        "run",
        tiny,
        "--out",
        tmp_path / "there",
        "--store",
        tmp_path / "store2",
        "--cluster",
        "slurm",
        "--profile",
        path,
    )
    assert there.returncode == 0, there.stderr
    number = json.loads((tmp_path / "there/jobs/jobs.json").read_text())["ids"]["observer"]
    shown = subprocess.run(
        ["scontrol", "show", "job", number], capture_output=True, text=True
    ).stdout
    assert "NumNodes=2" in shown and "NumTasks=4" in shown and "TresPerNode=gres:gpu:2" in shown, (
        shown
    )
    done = until(
        lambda: (
            (m := list((tmp_path / "store2/experts").glob("*/stage.json")))
            and any(json.loads(p.read_text())["name"] == "observer" for p in m)
        ),
        120,
        "no observer",
    )
    assert done
    assert cli("cancel", tmp_path / "there").returncode == 0
    ours, theirs = digests(tmp_path / "store1"), digests(tmp_path / "store2")
    (name,) = [k for k in ours if k.startswith("experts/")]
    assert ours[name] == theirs[name]
    nodelist = sorted(
        set(
            re.findall(
                r"on (node\d)",
                "".join(
                    p.read_text()
                    for p in (tmp_path / "there/jobs/logs").glob(f"{number}_0_log.err")
                ),
            )
        )
    )
    assert nodelist == ["node1"]  # rank 0's


def test_plain_srun_is_enough(nodes, tmp_path, tiny):
    """The tasks of a step find each other by themselves: no launcher of ours, no port to choose."""
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "ltdd_scale",
        "train",
        "observer",
        str(tiny),
        "--out",
        str(tmp_path / "there"),
        "--store",
        str(tmp_path / "store2"),
        "--quiet",
    ]
    there = subprocess.run(
        ["srun", "-N2", "-n2", "--mem=500M", *command],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert there.returncode == 0, there.stderr
    here = cli(
        "train",
        "observer",
        tiny,
        "--out",
        tmp_path / "here",
        "--store",
        tmp_path / "store1",
        "--nproc",
        2,
    )
    assert here.returncode == 0, here.stderr
    assert digests(tmp_path / "store1") == digests(tmp_path / "store2")


def test_the_quickstart_through_slurm_is_the_quickstart(nodes, tmp_path):
    """The distilled set is the same to the byte, whoever starts the ranks."""
    config = ROOT / "configs" / "quickstart.yaml"
    quick = [
        "--set",
        "evaluate.epochs=20",
        "evaluate.seeds=1",
        "evaluate.full_epochs=0",
    ]  # students do not touch the distilled set
    path = profile(
        tmp_path,
        "stages: {observer: {nodes: 2}, teacher: {nodes: 2}, recover: {array: 2}, students: {array: 2}}\n",
    )
    there = cli(
        "run",
        config,
        *quick,
        "--out",
        tmp_path / "there",
        "--store",
        tmp_path / "store2",
        "--cluster",
        "slurm",
        "--profile",
        path,
        "--wait",
        timeout=600,
    )
    assert there.returncode == 0, there.stdout + there.stderr
    here = cli(
        "run",
        config,
        *quick,
        "--out",
        tmp_path / "here",
        "--store",
        tmp_path / "store1",
        "--nproc",
        2,
        timeout=600,
    )
    assert here.returncode == 0, here.stderr

    def images(run: str) -> dict:
        folder = tmp_path / run / "distilled" / "images"
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.png")}

    assert len(images("here")) == 100 and images("here") == images("there")
    assert (tmp_path / "there" / "report.html").exists()
    again = cli(
        "run",
        config,
        *quick,
        "--out",
        tmp_path / "there",
        "--store",
        tmp_path / "store2",
        "--cluster",
        "slurm",
        "--profile",
        path,
    )
    assert again.returncode == 0 and "submitted" not in again.stdout, again.stdout
    table = cli("status", tmp_path / "there").stdout
    assert table.count("| done") == 10 and "everything is done" in table, table


SWEEP = """
config: tiny.yaml
set: {{evaluate.random: false, observer.epochs: 20, relabel.labels: single, runtime.checkpoint_seconds: 1}}
max_jobs: 4
points:
{points}
"""


def test_a_sweep_with_preemptions_and_a_poisoned_point(nodes, tmp_path, tiny):
    """2 IF × 2 IPC × 2 seeds, shared experts, two preemptions, one bad point: 7 results, 1 clear failure, no work done twice."""
    points = [(f, i, s) for f in (3, 6) for i in (2, 4) for s in (0, 1)]
    lines = [
        f"  - {{data.imbalance_factor: {f}, ipc: {i}, seed: {s}{', evaluate.lr: 1.0e+30, name: bad' if (f, i, s) == (6, 2, 0) else ''}}}"
        for f, i, s in points
    ]
    (tmp_path / "sweep.yaml").write_text(SWEEP.format(points="\n".join(lines)))
    (tmp_path / "tiny.yaml").write_text(TINY)
    out = tmp_path / "sweep"
    command = [
        "sweep",
        tmp_path / "sweep.yaml",
        "--out",
        out,
        "--store",
        tmp_path / "store",
        "--cluster",
        "slurm",
        "--profile",
        profile(tmp_path, **{**DRAG, "LTDD_DRAG": "0.05"}),
    ]
    begun = cli(*command)
    assert begun.returncode == 0 and "jobs submitted" in begun.stdout, begun.stdout + begun.stderr
    until(
        lambda: list((tmp_path / "store").glob("experts/*/checkpoints/step-*.pt")),
        120,
        "nobody trains",
    )
    for turn in range(12):  # whoever is at work on a node makes room, unless it ends just then
        if sum(s.restarts for s in slurm.states().values()) >= 2:
            break
        node = f"node{turn % 2 + 1}"
        until(
            lambda n=node: one(["squeue", "-h", "-t", "R", "-w", n, "-o", "%i"]),
            120,
            f"nothing runs on {node}",
        )
        wanted = [
            "sbatch",
            "--parsable",
            "-p",
            "high",
            "-w",
            node,
            "--exclusive",
            "-c",
            "4",
            "-t",
            "5",
            "-o",
            "/dev/null",
            "--wrap",
            "sleep 1",
        ]
        number = subprocess.run(wanted, capture_output=True, text=True, check=True).stdout.strip()
        until(
            lambda n=number: one(["squeue", "-h", "-t", "all", "-j", n, "-o", "%T"]) == "COMPLETED",
            120,
            "high did not run",
        )
    waited = cli(*command, "--wait", timeout=900)
    assert waited.returncode == 1 and "nothing to submit" in waited.stdout, (
        waited.stdout + waited.stderr
    )
    found = json.loads((out / "results.json").read_text())
    assert len(found["points"]) == 7 and [m[:8] for m in found["missing"]] == ["- **bad*"], found[
        "missing"
    ]
    assert "lower evaluate.lr" in found["missing"][0]
    # The failure is clear, stops what needs it and nothing else.
    table = cli("status", out).stdout
    (failed,) = [line for line in table.splitlines() if "| failed" in line]
    assert "bad/students" in failed and "the loss is" in failed and "lower evaluate.lr" in failed, (
        failed
    )
    assert sorted(
        line.split("|")[1].strip() for line in table.splitlines() if "| stopped" in line
    ) == ["bad/evaluate", "bad/report"], table
    assert "lower evaluate.lr" in cli("logs", out).stdout
    # Every piece of work was finished once: as many seals as folders.
    logs = "".join(p.read_text() for p in (out / "jobs" / "logs").glob("*_log.*"))
    assert len(re.findall(r"== job \w+, attempt [1-9]", logs)) >= 2, "nobody was preempted"
    sealed = re.findall(r"sealed (\w+/\w{16})", logs)
    folders = [
        str(p.parent.relative_to(tmp_path / "store"))
        for p in (tmp_path / "store").glob("*/*/stage.json")
    ]
    assert sorted(sealed) == sorted(folders)
    assert (
        sum(f.startswith("experts/") for f in folders) == 8
        and sum(f.startswith("shard/") for f in folders) == 2
    )  # IF × seed × 2; IF
    # At most four jobs at a time: in each of the four lanes one ends before the next begins.
    begins = one(
        [
            "sacct",
            "-D",
            "-X",
            "-n",
            "-P",
            "-S",
            "now-1hour",
            "-o",
            "JobName,Start,End",
            "--name",
            "sweep-0,sweep-1,sweep-2,sweep-3",
        ]
    )
    spans = [
        line.split("|")
        for line in begins.splitlines()
        if "Unknown" not in line and "None" not in line
    ]
    assert {s[0] for s in spans} == {f"sweep-{k}" for k in range(4)}
    for lane in {s[0] for s in spans}:
        mine = sorted(s[1:] for s in spans if s[0] == lane)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(mine)), mine
    again = cli(*command)
    assert again.returncode == 0 and "4 jobs submitted" in again.stdout, (
        again.stdout
    )  # the bad point's students, evaluate, report; the table
    assert cli("cancel", out).returncode == 0


def one(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()
