"""Sweeps, and the cluster that every machine is."""

import itertools
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY, clean_environment, cli, digests
from jobs_tools import make, point

from ltdd_scale.errors import UserError
from ltdd_scale.launch import campaign, jobs, sweep
from ltdd_scale.runtime import files


def test_a_sweep_file(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    path = tmp_path / "s.yaml"
    path.write_text(
        "config: tiny.yaml\nset: {evaluate.seeds: 2}\n"
        "grid: {data.imbalance_factor: [2, 6], ipc: [1, 2]}\n"
        "points: [{name: odd, recover.betas: [0.5, 0.9], ipc: 0}]\n"
    )
    found = sweep.load(path)
    names = [f"imbalance_factor{f}-ipc{i}" for f, i in itertools.product((2, 6), (1, 2))]
    assert list(found.points) == [*names, "odd"]
    good, bad = found.load_points(["seed=3"])
    assert good["imbalance_factor6-ipc2"].data.imbalance_factor == 6
    assert all(c.seed == 3 and c.evaluate.seeds == 2 for c in good.values())
    assert bad == {"odd": "ipc: must be at least 1, got 0"}


def test_a_long_value_of_a_point_arrives_whole(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    counts = list(range(100, 200))
    values = {"data.profile": "counts", "data.counts": counts, "name": "long"}
    files.write_json(tmp_path / "s.yaml", {"config": "tiny.yaml", "points": [values]})
    good, bad = sweep.load(tmp_path / "s.yaml").load_points([])
    assert good["long"].data.counts == counts, bad


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("grid: {ipc: [1]}", "'config' at least"),
        ("config: a.yaml\ngrid: {ipc: 1}", "grid.ipc: expected a list"),
        ("config: a.yaml", "neither 'grid' nor 'points'"),
        ("config: a.yaml\npoints: [{ipc: 1}, {ipc: 1}]", "two points are called ipc1"),
        ("config: a.yaml\npoints: [ipc]", "points: expected settings, got 'ipc'"),
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


def test_the_ablation_switches_each_strategy_off():
    found = sweep.load(ROOT / "configs" / "sweeps" / "ablation.yaml")
    good, _ = found.load_points(["data.path=/somewhere"])
    off = {
        name: (config.train.debias, config.calibrate.fair, config.initialize.confident)
        for name, config in good.items()
    }
    assert off == {
        "full": (True, True, True),
        "no-debiasing": (False, True, True),
        "no-calibration": (True, False, True),
        "no-confident-init": (True, True, False),
    }


def results(balanced: bool, top1: float, teacher: bool = True) -> dict:
    numbers = {"class_std": 1.0, "many": 60.0, "medium": 50.0, "few": None}
    one = {"net": "convnet3", **numbers, "top1": top1, "top1_std": 0.5, "balanced": top1 - 10}
    students = [
        {**one, "set": "distilled", "labels": "single"},
        {**one, "set": "distilled", "labels": "hard", "top1": 0.0},
        {**one, "set": "full", "labels": "online", "top1": 77.0, "balanced": 66.0},
    ]
    plain = [
        {**one, "title": "plain, whole set", "top1": 1.0},
        {**one, "title": "plain, logit-adjusted", "top1": 88.0, "balanced": 55.0},
    ]
    summary = {"labels": "single", "balanced_test": balanced, "students": students, "plain": plain}
    experts = {"observer": one, **({"teacher": {**one, "top1": 99.0}} if teacher else {})}
    return {"summary": {**summary, "experts": experts}}


@pytest.mark.parametrize("balanced", [True, False])
def test_the_table_of_a_sweep(tmp_path, balanced):
    """Balanced accuracy beside top-1, and first where top-1 tells mostly of the head."""
    found = sweep.Sweep("s", Path("c.yaml"), {"a": {"seed": 0}, "b": {"seed": 1}, "c": {"seed": 2}})
    points = [point(tmp_path, name) for name in "abc"]
    made = campaign.Campaign("s", tmp_path / "jobs", tmp_path, "local", points=points)
    made.jobs = [jobs.Job("c/recover", "recover", "c")]
    files.write_json(make(tmp_path / "a") / "results.json", results(True, 40.0))
    files.write_json(make(tmp_path / "b") / "results.json", results(balanced, 42.0, teacher=False))
    text = sweep.write(found, made, tmp_path, lambda job: f"{job.name} broke")
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    heading, a, b = rows[0], rows[2], rows[3]
    first, second = ("top-1", "balanced") if balanced else ("balanced", "top-1")
    assert heading[1:3] == [f"distilled, {first}", second]
    assert a[1:3] == (["40.0 ± 0.5", "30.0"] if balanced else ["30.0", "40.0 ± 0.5"])
    beside = dict(zip(heading, a, strict=True))
    whole, adjusted = ("77.0", "88.0") if balanced else ("66.0", "55.0")
    assert beside["random real"] == "–" and beside["few"] == "–"
    assert beside["whole set"].startswith(whole)
    assert beside["plain, logit-adjusted"].startswith(adjusted)
    assert dict(zip(heading, b, strict=True))["teacher"] == "–"
    assert "2 of 3 points" in text and "**c**: not finished: c/recover broke" in text
    mean = "41.0 ± 1.4" if balanced else "31.0 ± 1.4"
    assert rows[6][:3] == ["all", "2", mean], rows
    assert set(files.read_json(tmp_path / "results.json")["points"]) == {"a", "b"}


@pytest.mark.slow
def test_a_sweep_on_this_machine(tmp_path):
    """A point that breaks down at run time stops what needs it and nothing else; sweeping again does
    what is missing. Points differ in settings or in strategies: an ablation is a sweep."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    text = (
        "config: tiny.yaml\nset: {relabel.labels: single}\npoints:\n  - {name: a, ipc: 1}\n"
        "  - {name: broken, ipc: 2, evaluate.lr: 1.0e+30}\n"
        "  - {name: c, ipc: 4, initialize.confident: false}\n"
    )
    (tmp_path / "s.yaml").write_text(text)
    where = ["--out", tmp_path / "s", "--store", tmp_path / "store"]
    command = ["sweep", tmp_path / "s.yaml", *where, "--nproc", 1]
    done = cli(*command)
    assert done.returncode == 1 and "2 of 3 points" in done.stdout, done.stdout + done.stderr
    assert "**broken**: not finished" in done.stdout
    assert "broken/report: left out, as broken/" in done.stdout
    table = cli("status", tmp_path / "s").stdout
    states = {
        c[1].strip(): c[3].strip() for line in table.splitlines() if len(c := line.split("|")) > 3
    }
    assert states["broken/students"] == "failed" and states["broken/report"] == "stopped", table
    assert states["c/report"] == "done" and states["a/shard"] == "done", table
    before = digests(tmp_path / "store")
    (tmp_path / "s.yaml").write_text(text.replace(", evaluate.lr: 1.0e+30", ""))
    again = cli(*command)
    assert again.returncode == 0 and "3 of 3 points" in again.stdout, again.stdout + again.stderr
    assert re.findall(r"== (\S+):", again.stdout) == [
        f"broken/{stage}" for stage in ("students", "evaluate", "report")
    ]
    assert all(digests(tmp_path / "store")[k] == v for k, v in before.items())
    third = cli(*command)
    assert third.returncode == 0 and "==" not in third.stdout, third.stdout


@pytest.mark.slow
def test_a_signal_reaches_the_job_that_runs_here(tmp_path):
    """The job saves, the jobs after it do not start, and the same command goes on."""
    (tmp_path / "tiny.yaml").write_text(TINY.replace("epochs: 6", "epochs: 60"))
    where = ["--out", tmp_path / "run", "--nproc", 1, "--set", "runtime.checkpoint_seconds=0"]
    command = [sys.executable, "-m", "ltdd_scale", "run", tmp_path / "tiny.yaml", *where]
    command = list(map(str, [*command, "--cluster", "local"]))
    begun = subprocess.Popen(
        command, cwd=ROOT, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    until = time.monotonic() + 120
    while not list((tmp_path / "store").glob("experts/*/checkpoints/step-*.pt")):
        assert begun.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    begun.send_signal(signal.SIGTERM)
    out, err = begun.communicate(timeout=60)
    assert begun.returncode == 75 and b"the same command goes on from here" in err, err.decode()
    assert out.count(b"== ") == 2 and b"== observer" in out, out.decode()
    done = cli(*command[3:])
    assert done.returncode == 0 and "resumed at step" in done.stderr, done.stdout + done.stderr
    assert "page to look at" in done.stdout and "== shard" not in done.stdout
