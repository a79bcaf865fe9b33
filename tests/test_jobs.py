"""What is planned, without a cluster."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, TINY, cli, digests, said_plainly

from ltdd_scale import config as configuration
from ltdd_scale.errors import UserError
from ltdd_scale.launch import campaign, estimate, jobs, profile, slurm, sweep
from ltdd_scale.launch.task import Fence, code_digest
from ltdd_scale.runtime import files


def load(tmp_path: Path, name: str = "p.yaml", **values) -> profile.Profile:
    (tmp_path / name).write_text(yaml.safe_dump(values))
    return profile.load(tmp_path / name)


def point(tmp_path: Path, name: str, *sets: str) -> jobs.Point:
    (tmp_path / "tiny.yaml").write_text(TINY)
    return jobs.Point(
        name,
        configuration.load(tmp_path / "tiny.yaml", sets),
        tmp_path / f"{name}.yaml",
        tmp_path / name,
    )


@pytest.mark.parametrize("path", sorted((ROOT / "slurm").glob("*.yaml")), ids=lambda p: p.name)
def test_the_profiles_that_are_there_load(path):
    found = profile.load(path)
    assert found.of("shard").tasks_per_node == 1 and found.of("report").gpus_per_node == 0
    assert found.of("recover").array > 1 and found.of("observer").array == 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"partitoin": "x"}, "unknown config key 'partitoin'"),
        ({"minutes": 0}, "minutes: must be at least 1"),
        ({"stages": {"recovr": {}}}, "stages.recovr: unknown stage"),
        ({"stages": {"recover": {"gpus": 2}}}, "unknown config key 'stages.recover.gpus'"),
        ({"stages": {"recover": {"array": 0}}}, "stages.recover.array: must be at least 1"),
        ({"setup": "module load"}, "setup: expected a list"),
        ({"minutes": 2}, "minutes: 2 .* too short for signal_delay_s: 90"),
    ],
)
def test_a_wrong_profile_is_said(tmp_path, values, words):
    with pytest.raises(UserError, match=words):
        load(tmp_path, **values)


def test_one_task_a_gpu_and_each_stage_its_own(tmp_path):
    found = load(
        tmp_path,
        gpus_per_node=4,
        minutes=30,
        stages={"observer": {"nodes": 2}, "recover": {"gpus_per_node": 1, "array": 8}},
    )
    assert (
        found.of("observer").nodes,
        found.of("observer").tasks_per_node,
        found.of("teacher").nodes,
    ) == (2, 4, 1)
    assert (
        found.of("recover").array,
        found.of("recover").tasks_per_node,
        found.of("shard").tasks_per_node,
    ) == (8, 1, 1)
    wide = load(
        tmp_path,
        nodes=2,
        gpus_per_node=4,
        gres="gpu:a100:4",
        mem_gb=400,
        stages={"recover": {"gpus_per_node": 1}, "report": {"partition": "cpu", "mem_gb": 8}},
    )
    assert [
        wide.of(s).nodes
        for s in ("observer", "calibrate", "recover", "students", "evaluate", "shard")
    ] == [2, 1, 1, 1, 1, 1]
    assert [wide.of(s).gres for s in ("teacher", "recover", "evaluate", "shard")] == [
        "gpu:a100:4",
        "gpu:a100:1",
        "gpu:a100:1",
        "",
    ]
    assert (
        wide.of("summary").partition,
        wide.of("summary").mem_gb,
        wide.of("summary").gpus_per_node,
    ) == ("cpu", 8, 0)


def test_jobs_come_after_what_they_need(tmp_path):
    made = jobs.plan(
        [point(tmp_path, "")],
        tmp_path / "store",
        load(tmp_path, stages={"recover": {"array": 3}, "students": {"array": 9}}),
    )
    by_name = {j.name: j for j in made}
    assert list(by_name) == [
        "shard",
        "observer",
        "teacher",
        "calibrate",
        "initialize",
        "recover",
        "relabel",
        "students",
        "evaluate",
        "report",
    ]
    for k, job in enumerate(made):
        assert all(n in [j.name for j in made[:k]] for n in job.needs)
    assert set(by_name["observer"].needs) == set(by_name["teacher"].needs) == {"shard"}
    assert "recover" in by_name["relabel"].needs and by_name["report"].needs == ["evaluate"]
    assert [c[-2:] for c in by_name["recover"].commands] == [["--part", f"{k}/3"] for k in range(3)]
    assert len(by_name["students"].commands) == 2  # no more elements than students


def test_points_share_what_they_have_in_common(tmp_path):
    points = [
        point(tmp_path, f"ipc{i}-s{s}", f"ipc={i}", f"seed={s}") for i in (2, 4) for s in (0, 1)
    ]
    made = jobs.plan(points, tmp_path / "store", profile.Profile())
    count = {
        stage: sum(j.stage == stage for j in made)
        for stage in (
            "shard",
            "observer",
            "teacher",
            "calibrate",
            "initialize",
            "recover",
            "report",
        )
    }
    assert count == {
        "shard": 1,
        "observer": 2,
        "teacher": 2,
        "calibrate": 2,
        "initialize": 4,
        "recover": 4,
        "report": 4,
    }
    folders = [f for j in made for f in j.nodes if j.stage not in ("recover", "report")]
    assert len(folders) == len(set(folders))
    (later,) = [j for j in made if j.name == "ipc4-s1/initialize"]
    assert "ipc2-s1/teacher" in later.needs
    # Points that differ in recovery alone have the same students on random images: the later waits for them instead of training them.
    made = jobs.plan(
        [point(tmp_path, "a"), point(tmp_path, "b", "recover.lr=0.01")],
        tmp_path / "store",
        profile.Profile(),
    )
    (later,) = [j for j in made if j.name == "b/students"]
    assert "a/students" in later.needs


def test_what_is_done_is_not_planned_again(finished, tmp_path):
    config, run = finished
    made = campaign.make(
        "tiny",
        tmp_path / "jobs",
        run.parent / "store",
        {"": (configuration.load(config), run)},
        profile.Profile(),
    )
    assert all(made.done(j) for j in made.jobs) and campaign.missing(made, set()) == []
    other = campaign.make(
        "tiny",
        tmp_path / "jobs",
        run.parent / "store",
        {"": (configuration.load(config, ["recover.lr=0.01"]), run)},
        profile.Profile(),
    )
    assert [j.name for j in campaign.missing(other, set())] == [
        "recover",
        "relabel",
        "students",
        "evaluate",
        "report",
    ]
    other.ids["recover"] = "17"
    assert [j.name for j in campaign.missing(other, {"17"})] == [
        "relabel",
        "students",
        "evaluate",
        "report",
    ]


def test_the_sbatch_file_asks_for_what_the_profile_says(tmp_path):
    found = load(
        tmp_path,
        partition="scavenge",
        account="me",
        gres="gpu:a100:4",
        gpus_per_node=4,
        mem_gb=1.5,
        retries=2,
        setup=["module load cuda"],
        env={"A": "b"},
        extra={"reservation": "r1"},
    )
    made = jobs.plan([point(tmp_path, "")], tmp_path / "store", found)
    text = slurm.script(
        made[1],
        found,
        tmp_path / "jobs",
        tmp_path / "code",
        slurm.dependency_of(["5", "6"], "lane-1"),
        "lane-1",
    )
    for line in (
        "#SBATCH --partition=scavenge",
        "#SBATCH --account=me",
        "#SBATCH --gres=gpu:a100:4",
        "#SBATCH --ntasks-per-node=4",
        "#SBATCH --mem=1536MB",
        "#SBATCH --dependency=afterok:5:6,singleton",
        "#SBATCH --job-name=lane-1",
        "#SBATCH --comment=observer",
        "#SBATCH --requeue",
        "#SBATCH --kill-on-invalid-dep=yes",
        "#SBATCH --reservation=r1",
        "#SBATCH --signal=USR2@90",
        "module load cuda",
        'export A="b"',
    ):
        assert line in text.splitlines(), text
    assert "--gpus-per-node" not in text and "--kill-on-bad-exit=1" in text and "-le 2 ]" in text
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_a_sweep_file(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    path = tmp_path / "s.yaml"
    path.write_text(
        "config: tiny.yaml\nset: {evaluate.seeds: 2}\ngrid: {data.imbalance_factor: [2, 6], ipc: [1, 2]}\npoints: [{name: odd, recover.betas: [0.5, 0.9], ipc: 0}]\n"
    )
    found = sweep.load(path)
    assert list(found.points) == [
        "imbalance_factor2-ipc1",
        "imbalance_factor2-ipc2",
        "imbalance_factor6-ipc1",
        "imbalance_factor6-ipc2",
        "odd",
    ]
    good, bad = found.load_points(["seed=3"])
    assert good["imbalance_factor6-ipc2"].data.imbalance_factor == 6 and all(
        c.seed == 3 and c.evaluate.seeds == 2 for c in good.values()
    )
    assert bad == {"odd": "ipc: must be at least 1, got 0"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("grid: {ipc: [1]}", "'config' at least"),
        ("config: a.yaml\ngrid: {ipc: 1}", "grid.ipc: expected a list"),
        ("config: a.yaml", "neither 'grid' nor 'points'"),
        ("config: a.yaml\npoints: [{ipc: 1}, {ipc: 1}]", "two points are called ipc1"),
        ("config: a.yaml\ngird: {}", "a sweep has the keys"),
        ("config: [", "not valid YAML"),
    ],
)
def test_a_wrong_sweep_is_said(tmp_path, text, words):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(UserError, match=words):
        sweep.load(tmp_path / "s.yaml")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "sweeps").glob("*.yaml")), ids=lambda p: p.name
)
def test_the_sweeps_that_are_there_load(path):
    good, bad = sweep.load(path).load_points(["data.path=/somewhere"])
    assert good and not bad


@pytest.mark.slow
def test_a_sweep_on_this_machine(tmp_path):
    """A point that breaks down at run time stops what needs it and nothing else; sweeping again does what is missing."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    text = "config: tiny.yaml\nset: {relabel.labels: single}\npoints:\n  - {name: a, ipc: 1}\n  - {name: broken, ipc: 2, recover.lr: 1.0e+30, evaluate.lr: 1.0e+30}\n  - {name: c, ipc: 4}\n"
    (tmp_path / "s.yaml").write_text(text)
    command = [
        "sweep",
        tmp_path / "s.yaml",
        "--out",
        tmp_path / "s",
        "--store",
        tmp_path / "store",
        "--nproc",
        1,
    ]
    done = cli(*command)
    assert done.returncode == 1 and "2 of 3 points" in done.stdout, done.stdout + done.stderr
    assert (
        "**broken**: not finished" in done.stdout
        and "broken/report: left out, as broken/" in done.stdout
    )
    table = cli("status", tmp_path / "s").stdout
    assert (
        "| broken/students" in table
        and "failed" in table
        and "stopped" in table
        and "| c/report" in table
    )
    before = digests(tmp_path / "store")
    (tmp_path / "s.yaml").write_text(
        text.replace(", recover.lr: 1.0e+30, evaluate.lr: 1.0e+30", "")
    )
    again = cli(*command)
    assert again.returncode == 0 and "3 of 3 points" in again.stdout, again.stdout + again.stderr
    assert (
        "== a/" not in again.stdout
        and "== c/" not in again.stdout
        and "== broken/shard" not in again.stdout
    )
    assert all(digests(tmp_path / "store")[k] == v for k, v in before.items())


def test_a_dry_run_shows_all_and_submits_nothing(tmp_path, tiny):
    done = cli(
        "run",
        tiny,
        "--out",
        tmp_path / "run",
        "--cluster",
        "slurm",
        "--profile",
        "slurm/preemptible.yaml",
        "--dry-run",
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "run").exists()
    for words in (
        "10 of 10 jobs are left",
        "relabel   after recover",
        "#SBATCH --partition=scavenge",
        "estimated: ",
        "--array=",
    ):
        assert words in done.stdout, done.stdout


def test_slurm_without_slurm_says_what_to_do(tmp_path, tiny):
    env = {"PATH": str(Path(sys.executable).parent)}
    said_plainly(
        cli(
            "run",
            tiny,
            "--out",
            tmp_path / "r",
            "--cluster",
            "slurm",
            "--profile",
            "slurm/testbed.yaml",
            env=env,
        ),
        "sbatch is not found",
        "slurm/testbed up",
    )
    said_plainly(
        cli("run", tiny, "--out", tmp_path / "r", "--cluster", "slurm"),
        "--cluster slurm needs --profile",
    )
    said_plainly(cli("run", tiny, "--out", tmp_path / "r", "--dry-run"), "go with --cluster")
    said_plainly(cli("status", tmp_path / "nothing"), "is not a run folder")
    said_plainly(cli("logs", tmp_path / "nothing"), "no jobs were made there")


def test_flops_are_those_that_papers_give():
    """ResNet-50 at 224 px: 4.09 thousand million multiply-adds without its head; ResNet-18 1.81."""
    assert estimate.forward_flops("resnet50", 0, "batch", 224) == pytest.approx(
        2 * 4.09e9, rel=0.01
    )
    assert estimate.forward_flops("resnet18", 0, "batch", 224) == pytest.approx(
        2 * 1.81e9, rel=0.01
    )


def test_parts_are_each_pieces_once(tmp_path, tiny):
    """Shares of recovery, done in any order and by any number of ranks, are put together to the bytes of the whole."""
    run = ["--out", tmp_path / "run", "--nproc", 1]
    assert cli("relabel", tiny, *run, "--store", tmp_path / "whole").returncode == 0
    assert cli("initialize", tiny, *run, "--store", tmp_path / "parts").returncode == 0
    for part in ("2/3", "0/3", "1/3"):
        done = cli("recover", tiny, *run, "--store", tmp_path / "parts", "--part", part)
        assert done.returncode == 0 and f"part {part[0]} of 3 done" in done.stdout, done.stderr
    (folder,) = (tmp_path / "parts" / "recover").iterdir()
    assert len(list(folder.glob(".part-*"))) == 3 and not (folder / "stage.json").exists()
    assert cli("relabel", tiny, *run, "--store", tmp_path / "parts").returncode == 0
    assert {k: v for k, v in digests(tmp_path / "parts").items() if k[:3] in ("rec", "rel")} == {
        k: v for k, v in digests(tmp_path / "whole").items() if k[:3] in ("rec", "rel")
    }
    said_plainly(cli("recover", tiny, *run, "--part", "0/3", "--nproc", 0), "at least 1")
    assert "expected K/N" in cli("recover", tiny, "--part", "3/3").stderr


FENCED = """
import sys, os
from pathlib import Path
from ltdd_scale.launch.task import Fence
from ltdd_scale.runtime import files
folder = Path(sys.argv[1])
mine = Fence(folder / "fences")
mine.claim()
files.guard = mine.check
files.write_text(folder / "first", "written")
os.environ["SLURM_RESTART_COUNT"] = "1"
Fence(folder / "fences").claim()
files.write_text(folder / "second", "written")
"""


def test_an_attempt_that_was_replaced_cannot_write(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FENCED, tmp_path],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "SLURM_JOB_ID": "9"},
    )
    assert done.returncode == 75 and "attempt 0 ends here, unwritten" in done.stderr
    assert (tmp_path / "first").exists() and not (tmp_path / "second").exists()


def test_a_fence_does_not_go_back(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    Fence(tmp_path).claim()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    Fence(tmp_path).claim()
    assert Fence(tmp_path).latest() == 2


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
        [sys.executable, "-c", NOTICE, tmp_path / "saves"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


def test_a_record_keeps_ids_of_jobs_that_are_the_same(tmp_path):
    config = point(tmp_path, "").config
    made = campaign.make(
        "tiny",
        tmp_path / "jobs",
        tmp_path / "store",
        {"": (config, tmp_path / "run")},
        profile.Profile(),
    )
    campaign.prepare(made)
    made.ids = {j.name: str(k) for k, j in enumerate(made.jobs)}
    made.save()
    changed = dataclasses.replace(config, ipc=2)
    again = campaign.make(
        "tiny",
        tmp_path / "jobs",
        tmp_path / "store",
        {"": (changed, tmp_path / "run")},
        profile.Profile(),
    )
    assert set(again.ids) == {"shard", "observer", "teacher", "calibrate"}
    assert set(again.replaced) == set(made.ids.values()) - set(again.ids.values())
    # Other parts of recovery: what would wait for the old ones is another job too.
    parts = profile.Profile(stages={"recover": {"array": 2}})
    other = campaign.make(
        "tiny", tmp_path / "jobs", tmp_path / "store", {"": (config, tmp_path / "run")}, parts
    )
    assert set(other.ids) == {"shard", "observer", "teacher", "calibrate", "initialize"}
    # What waits in the queue finds its own settings.
    campaign.prepare(again)
    assert made.points[0].path.exists() and again.points[0].path != made.points[0].path
    assert (
        configuration.load(made.points[0].path).ipc == config.ipc
        and configuration.load(again.points[0].path).ipc == 2
    )
    assert (
        files.read_json(tmp_path / "jobs" / "jobs.json")["ids"]["shard"] == "0"
        and json.loads((tmp_path / "jobs" / "jobs.json").read_text())["name"] == "tiny"
    )


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root, to be somebody else"
)
def test_a_good_end_is_one_where_slurmstepd_is_roots():
    """A job may not signal its slurmstepd: that it lives must be seen otherwise. And a folder may have a blank in its name."""
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
    job = jobs.Job("a", "shard", "", [["shard"]], [], [])
    text = "\n".join(
        slurm.parameters(job, profile.Profile(retries=1), folder / "my run", folder, "", "")[
            "teardown"
        ]
    )
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
    env = {k: v for k, v in os.environ.items() if k != "SLURM_STEP_ID"} | (
        {"SLURM_STEP_ID": "0"} if in_job else {}
    )
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
