"""What is planned, without a cluster."""

import shutil
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
from conftest import ROOT, cli, digests, process, said_plainly
from jobs_tools import RLDD, campaign_of, load, made_of, make, of, point

from ltdd_scale import recipe
from ltdd_scale.errors import UserError
from ltdd_scale.launch import campaign, estimate, jobs, limits, profile
from ltdd_scale.launch.cluster import Order
from ltdd_scale.launch.clusters import slurm, slurm_task
from ltdd_scale.pipeline import store as folders
from ltdd_scale.runtime import files
from ltdd_scale.runtime.place import Place
from ltdd_scale.stage import Cost, Division, Facts, Resources, Stage


@pytest.mark.parametrize("path", sorted((ROOT / "slurm").glob("*.yaml")), ids=lambda p: p.name)
def test_the_profiles_that_are_there_load(path):
    found = profile.load(path)
    assert of(found, "shard").tasks_per_node == 1 and of(found, "report").gpus_per_node == 0
    assert of(found, "recover").array > 1 and of(found, "observer").array == 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"partitoin": "x"}, "unknown config key 'partitoin'"),
        ({"minutes": 0}, "minutes: must be at least 1, got 0"),
        ({"stages": {"recovr": {}}}, "stages.recovr: unknown stage"),
        ({"stages": {"recover": {"gpus": 2}}}, "unknown config key 'stages.recover.gpus'"),
        ({"stages": {"recover": {"array": 0}}}, "stages.recover.array: must be at least 1"),
        ({"stages": {"recover": 3}}, "stages.recover: expected settings"),
        ({"setup": "module load"}, "setup: expected a list"),
        ({"env": {"A": True}}, "env.A: expected str, got True"),
        ({"minutes": 2}, "minutes: 2 .* too short for signal_delay_s: 90"),
    ],
)
def test_a_wrong_profile_is_said(tmp_path, values, words):
    with pytest.raises(UserError, match=words):
        load(tmp_path, **values)


def test_one_task_a_gpu_and_each_stage_its_own(tmp_path):
    own = {"observer": {"nodes": 2}, "recover": {"gpus_per_node": 1, "array": 8}}
    found = load(tmp_path, gpus_per_node=4, minutes=30, stages=own)
    observer, recover = of(found, "observer"), of(found, "recover")
    assert (observer.nodes, observer.tasks_per_node, of(found, "teacher").nodes) == (2, 4, 1)
    assert (recover.array, recover.tasks_per_node, of(found, "shard").tasks_per_node) == (8, 1, 1)


def test_a_job_gets_what_its_stage_can_use(tmp_path):
    own = {"recover": {"gpus_per_node": 1}, "report": {"partition": "cpu", "mem_gb": 8}}
    four = {"nodes": 2, "gpus_per_node": 4, "gres": "gpu:a100:4", "mem_gb": 400, "array": 3}
    wide = load(tmp_path, stages=own, **four)
    names = ("observer", "calibrate", "recover", "students", "evaluate", "shard")
    assert [of(wide, s).nodes for s in names] == [2, 1, 1, 1, 1, 1]
    assert [of(wide, s).array for s in names] == [1, 1, 3, 3, 1, 1]
    # Here the teacher is the observer: a file is copied.
    gres = [of(wide, s).gres for s in ("observer", "recover", "evaluate", "shard", "teacher")]
    assert gres == ["gpu:a100:4", "gpu:a100:1", "gpu:a100:1", "", ""]
    table = wide.of("summary")
    assert (table.partition, table.mem_gb, table.gpus_per_node) == ("cpu", 8, 0)


def test_jobs_come_after_what_they_need(tmp_path):
    wants = load(tmp_path, stages={"recover": {"array": 3}, "students": {"array": 9}})
    made = jobs.plan([point(tmp_path, "")], tmp_path / "store", wants)
    by_name = {j.name: j for j in made}
    assert list(by_name) == RLDD
    for k, job in enumerate(made):
        assert all(n in [j.name for j in made[:k]] for n in job.needs)
    assert set(by_name["observer"].needs) == set(by_name["teacher"].needs) == {"shard"}
    assert "recover" in by_name["relabel"].needs and by_name["report"].needs == ["evaluate"]
    assert [r.part for r in by_name["recover"].requests] == [(k, 3) for k in range(3)]
    students = [n for n in point(tmp_path, "").nodes.values() if n.stage.job == "students"]
    assert by_name["students"].elements == len(students) == 4  # no more elements than students
    assert by_name["report"].requests[0].report and by_name["report"].requests[0].targets == ()


def test_parts_are_put_together_by_the_next_job_that_reads_them(tmp_path, monkeypatch):
    """Whatever the stages are called: the names here are no method's."""

    def stage(name: str, *inputs: str, division=Division.RANKS, group="") -> Stage:
        return Stage(
            name, "kind", 1, "", given={"name": name}, inputs={i: i for i in inputs},
            division=division, group=group,
        )  # fmt: skip

    chunks, units = Division.CHUNKS, Division.UNITS
    stages = (
        stage("a"),
        stage("b", "a", division=chunks),
        stage("c", "a", "b", division=chunks),
        stage("u1", "b", "c", division=units, group="many"),
        stage("u2", "b", division=units, group="many"),
        stage("evaluate", "u1", "u2"),
    )
    monkeypatch.setattr(recipe, "stages", lambda config, source: stages)
    wants = profile.Profile(stages={n: {"array": 2} for n in ("a", "b", "c", "many")})
    one = point(tmp_path, "")
    by_name = {j.name: j for j in jobs.plan([one], tmp_path / "store", wants)}
    at = {name: node.where for name, node in one.nodes.items()}
    assert list(by_name) == ["a", "b", "c", "many", "evaluate", "report"]
    assert [by_name[n].elements for n in by_name] == [1, 2, 2, 2, 1, 1]
    b, c, many = by_name["b"], by_name["c"], by_name["many"]
    assert b.parts and b.nodes == [at["b"]] and not b.joins
    assert c.parts and c.joins == [at["b"]] and c.needs == ["b", "a"]
    assert not many.parts and many.joins == [at["c"]] and many.nodes == [at["u1"], at["u2"]]
    assert set(many.needs) == {"a", "b", "c"} - {"b"}  # "c" has put the parts of "b" together
    # Without arrays every job makes its own folder whole.
    plain = jobs.plan([one], tmp_path / "store", profile.Profile())
    assert all(not j.joins and not j.parts and j.requests[0].part is None for j in plain)
    # Which is done when: parts by their marks, what is put together by its record.
    (tmp_path / "store" / at["c"]).mkdir(parents=True)
    for k in range(2):
        (tmp_path / "store" / at["c"] / folders.part_mark(k, 2)).touch()
    assert not jobs.is_done(c, tmp_path / "store")
    files.write_json(make(tmp_path / "store" / at["b"]) / "stage.json", {"files": {}})
    assert jobs.is_done(c, tmp_path / "store") and not jobs.is_done(many, tmp_path / "store")


def test_resources_of_stages_that_no_method_has(tmp_path):
    wants = profile.Profile(nodes=3, gpus_per_node=2, array=5)
    stage = Stage("x", "x", 1, "", division=Division.ONE, resources=Resources.NODES)
    assert (wants.of("x", stage).nodes, wants.of("x", stage).gpus_per_node) == (3, 1)
    chunks = Stage("x", "x", 1, "", division=Division.CHUNKS, resources=Resources.CPU)
    assert (wants.of("x", chunks).array, wants.of("x", chunks).gpus_per_node) == (5, 0)


def test_points_share_what_they_have_in_common(tmp_path):
    sets = [(i, s) for i in (2, 4) for s in (0, 1)]
    points = [point(tmp_path, f"ipc{i}-s{s}", f"ipc={i}", f"seed={s}") for i, s in sets]
    made = jobs.plan(points, tmp_path / "store", profile.Profile())
    count = {stage: sum(j.stage == stage for j in made) for stage in RLDD}
    shared = {"shard": 1, "observer": 2, "teacher": 2, "calibrate": 2}
    assert count == {**dict.fromkeys(RLDD, 4), **shared}
    made_once = [f for j in made for f in j.nodes if j.stage not in ("students", "report")]
    assert len(made_once) == len(set(made_once))
    (later,) = [j for j in made if j.name == "ipc4-s1/initialize"]
    assert "ipc2-s1/teacher" in later.needs
    # Points that differ in recovery alone have the same students on random images: the later waits
    # for them instead of training them.
    both = [point(tmp_path, "a"), point(tmp_path, "b", "recover.lr=0.02")]
    made = jobs.plan(both, tmp_path / "store", profile.Profile())
    (later,) = [j for j in made if j.name == "b/students"]
    assert "a/students" in later.needs


def test_what_is_done_is_not_planned_again(finished):
    config, run = finished
    made = campaign_of(run, config)
    assert all(made.done(j) for j in made.jobs) and campaign.missing(made, set()) == []
    other = campaign_of(run, config, "recover.lr=0.02")
    left = ["recover", "relabel", "students", "embedding", "evaluate", "report"]
    assert [j.name for j in campaign.missing(other, set())] == left
    other.ids["recover"] = "17"
    assert [j.name for j in campaign.missing(other, {"17"})] == left[1:]


def test_what_finished_stages_have_read_is_not_made_again(finished, tmp_path):
    """As a run, which leaves alone what nobody needs any more."""
    config, run = finished
    shutil.copytree(run.parent / "store", tmp_path / "store")
    shutil.copytree(run, tmp_path / "run")
    for kind in ("shard", "experts", "calibrate"):
        shutil.rmtree(tmp_path / "store" / kind)
    made = campaign_of(tmp_path / "run", config)
    assert not all(made.done(j) for j in made.jobs)
    assert made.left() == [] and campaign.missing(made, set()) == []
    other = campaign_of(tmp_path / "run", config, "recover.lr=0.02")
    assert {"shard", "observer", "calibrate", "recover"} <= {j.name for j in other.left()}
    assert "initialize" not in {j.name for j in other.left()}


def test_a_report_that_is_to_be_another_is_another_job(tmp_path):
    made, licensed = (
        {j.name: j.identity for j in made_of(tmp_path, point(tmp_path, "a", *sets)).jobs}
        for sets in ((), ("publish.license=cc-by-4.0",))
    )
    assert [n for n in made if made[n] != licensed[n]] == ["a/report"]


def test_an_error_of_any_rank_is_final(tmp_path, monkeypatch):
    """A share of the work that cannot be done fails on the rank that has it."""
    codes: list[int] = []
    (tmp_path / "ends").mkdir()
    task = slurm_task.Task("t", ".", "", str(tmp_path))
    monkeypatch.setattr(slurm_task.Task, "_work", lambda self, here: 1)
    monkeypatch.setattr(slurm_task.os, "_exit", codes.append)
    monkeypatch.setattr(slurm_task.threading.Thread, "start", lambda self: None)
    monkeypatch.setattr(slurm_task.signals, "install", lambda **more: None)
    monkeypatch.setattr(slurm_task.files, "guard", None)
    second = Place(rank=1, world_size=2, job="7", step="7.0")
    monkeypatch.setattr(slurm_task.place, "become_task", lambda: second)
    task()
    assert codes == [1] and (tmp_path / "ends" / "7.final").exists()


def test_jobs_are_compared_with_what_all_of_them_need(tmp_path, monkeypatch):
    made = made_of(tmp_path, *(point(tmp_path, f"p{k}", f"seed={k}") for k in range(3)))
    known = dict.fromkeys((p.name for p in made.points), Facts((90,) * 10, 30))
    costs = {node.where: cost for p in made.points for node, cost in _costs(p, known[p.name])}
    all_disk = sum(c.disk for c in costs.values())
    check = partial(limits.check_jobs, made.points, made.left(), known, made.store)
    monkeypatch.setattr(limits, "free_disk", lambda folder: all_disk * 1.01)
    check()
    monkeypatch.setattr(limits, "free_disk", lambda folder: all_disk * 0.9)
    with pytest.raises(UserError, match="of disk"):
        check()


def _costs(one, facts):
    found = limits.costs(one.nodes.values(), facts)
    return [(one.nodes[name], cost) for name, cost in found.items()]


def test_a_batch_is_that_of_all_nodes(tmp_path, monkeypatch):
    one = point(tmp_path, "a")
    cost = Cost(memory=0.5e9, batch=3e9)
    monkeypatch.setattr(limits, "costs", lambda nodes, facts: {n.name: cost for n in nodes})
    monkeypatch.setattr(limits, "free_disk", lambda folder: 1e15)
    for nodes, refused in ((1, True), (4, False)):
        wants = profile.Profile(nodes=nodes, mem_gb=2, gpus_per_node=0)
        made = made_of(tmp_path, one, wants=wants)
        mine = [j for j in made.left() if j.stage == "observer"]
        check = partial(limits.check_jobs, [one], mine, {"a": Facts((9,), 3)}, made.store)
        with pytest.raises(UserError, match="mem_gb") if refused else nullcontext():
            check()


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
        env={"A": "b", "N": 3},
        extra={"reservation": "r1"},
    )
    made = jobs.plan([point(tmp_path, "")], tmp_path / "store", found)
    order = Order(made[1], found, tmp_path / "code", ("5", "6"), lane="lane-1")
    text = slurm.Slurm(tmp_path / "jobs").script(order)
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
        'export N="3"',
    ):
        assert line in text.splitlines(), text
    assert "--gpus-per-node" not in text and "--kill-on-bad-exit=1" in text and "-le 2 ]" in text
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_a_dry_run_shows_all_and_submits_nothing(tmp_path, tiny):
    wanted = ["--cluster", "slurm", "--profile", ROOT / "slurm/preemptible.yaml", "--dry-run"]
    done = cli("run", tiny, "--out", tmp_path / "run", *wanted)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "run").exists()
    for words in (
        "11 of 11 jobs are left",
        "relabel   after recover",
        "#SBATCH --partition=scavenge",
        "estimated, one job after the other",
        "a100: 60.6 TFLOP/s",
        "--array=",
    ):
        assert words in done.stdout, done.stdout


def test_slurm_without_slurm_says_what_to_do(tmp_path, tiny):
    env = {"PATH": str(Path(sys.executable).parent)}
    out = ["--out", tmp_path / "r"]
    slurm_here = ["--cluster", "slurm", "--profile", "slurm/testbed.yaml"]
    said_plainly(
        process("run", tiny, *out, *slurm_here, env=env), "sbatch is not found", "slurm/testbed up"
    )
    said_plainly(cli("run", tiny, *out, "--cluster", "slurm"), "--cluster slurm needs --profile")
    said_plainly(cli("run", tiny, *out, "--dry-run"), "go with --cluster")
    said_plainly(cli("status", tmp_path / "nothing"), "is not a run folder")
    said_plainly(cli("logs", tmp_path / "nothing"), "no jobs were made there")


def test_an_estimate_of_every_job_but_the_report(tmp_path):
    one = point(tmp_path, "", "relabel.labels=single")
    nowhere = point(tmp_path, "nowhere", "data.source=folder", "data.path=/nowhere")
    known = estimate.all_facts([one, nowhere], tmp_path / "store")
    found = estimate.costs([one, nowhere], known)
    assert known["nowhere"] is None and found["nowhere"] is None
    flops = dict.fromkeys(RLDD, 0.0)
    for name, cost in (found[""] or {}).items():
        flops[one.nodes[name].stage.job] += cost.flops
    without = [job for job, n in flops.items() if not n]
    assert without == ["shard", "embedding", "evaluate", "report"]


def test_parts_are_each_pieces_once(tmp_path, tiny):
    """Shares of recovery, done in any order and by any number of ranks, are put together to the
    bytes of the whole."""
    run = ["--out", tmp_path / "run", "--nproc", 1]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cli("relabel", tiny, *run, "--store", whole).returncode == 0
    assert cli("initialize", tiny, *run, "--store", parts).returncode == 0
    for part in ("2/3", "0/3", "1/3"):
        done = cli("recover", tiny, *run, "--store", parts, "--part", part)
        assert done.returncode == 0 and f"part {part[0]} of 3 done" in done.stdout, done.stderr
    (folder,) = (parts / "recover").iterdir()
    assert len(list(folder.glob(".part-?-?"))) == 3 and not (folder / "stage.json").exists()
    assert cli("relabel", tiny, *run, "--store", parts).returncode == 0
    ours, theirs = digests(parts), digests(whole)
    of_both = [k for k in theirs if k.startswith("rec") or k.startswith("rel")]
    assert len(of_both) == 2 and {k: ours[k] for k in of_both} == {k: theirs[k] for k in of_both}
    refused = cli("recover", tiny, *run, "--part", "0/3", "--nproc", 0)
    assert refused.returncode == 2 and "--nproc: '0': expected a whole number" in refused.stderr
    assert "expected K/N" in cli("recover", tiny, "--part", "3/3").stderr
