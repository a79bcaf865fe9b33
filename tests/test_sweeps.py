"""Sweeps, and the cluster that every machine is."""

import itertools
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY, clean_environment, cli, digests, folder_of
from jobs_tools import campaign_of, make, point

from ltdd_scale.errors import UserError
from ltdd_scale.launch import campaign, jobs, parts, sweep, sweep_table
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


def test_a_point_may_have_a_config_of_its_own(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "dm.yaml").write_text("base: tiny.yaml\nmethod: dm\nrelabel: {labels: hard}\n")
    path = tmp_path / "s.yaml"
    path.write_text(
        "config: tiny.yaml\nset: {ipc: 3}\n"
        "points: [{name: a}, {name: b, config: dm.yaml, dm.iterations: 7}, {config: no.yaml}]\n"
        "published: [{method: DM, where: {method: dm}, top1: 1}, {method: GM, labels: hard, top1: 2}]\n"
    )
    found = sweep.load(path)
    good, bad = found.load_points([])
    assert list(found.points) == ["a", "b", "all"] and "no.yaml" in bad["all"]
    assert [(c.name, c.method, c.ipc) for c in good.values()] == [
        ("tiny", "rldd", 3),
        ("dm", "dm", 3),
    ]
    assert good["b"].dm.iterations == 7
    fits = [[row.fits(c) for c in good.values()] for row in found.published]
    assert fits == [[False, True], [False, False]]  # the second has a row of its own


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
        ("config: a.yaml\npublished: [1]\npoints: [{}]", r"published\[0\]: expected a row"),
        ("config: a.yaml\npublished: [{top1: 1}]\npoints: [{}]", "say whose number"),
        ("config: a.yaml\npublished: [{method: X, top: 1}]\npoints: [{}]", r"published\[0\].top"),
        (
            "config: a.yaml\npublished: [{method: X, where: {ipcs: 1}}]\npoints: [{}]",
            "no setting 'ipcs'",
        ),
    ],
)
def test_a_wrong_sweep_is_said(tmp_path, text, words):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(UserError, match=words):
        sweep.load(tmp_path / "s.yaml")


def test_the_ablation_switches_each_strategy_off():
    found = sweep.load(ROOT / "configs" / "sweeps" / "ablation.yaml")
    good, _ = found.load_points(["data.path=/somewhere"])
    off = {
        name: (
            config.observer.prior > 0,
            config.calibrate.fair,
            config.initialize.select,
            config.recover.matching > 0,
        )
        for name, config in good.items()
    }
    assert off == {
        "full": (True, True, "herding", True),
        "no-debiasing": (False, True, "herding", True),
        "no-calibration": (True, False, "herding", True),
        "random-images": (True, True, "random", True),
        "confident-crops": (True, True, "confident", True),
        "no-matching": (True, True, "herding", False),
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
    text = sweep_table.write(found, made, tmp_path, lambda job: f"{job.name} broke")
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
    assert ["all", "2", mean] in [row[:3] for row in rows], rows
    assert set(files.read_json(tmp_path / "results.json")["points"]) == {"a", "b"}


def cells_of(text: str, start: str) -> dict[str, dict[str, str]]:
    """The first table after `start`: first cell of a row → heading → cell."""
    lines = text[text.index(start) :].splitlines()
    first = next(k for k, line in enumerate(lines) if line.startswith("|"))
    rows = [
        [c.strip() for c in x.split("|")[1:-1]] for x in itertools.takewhile(bool, lines[first:])
    ]
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}


def matrix_of(top1: dict[tuple[str, str, str], float], labels: str, plain: float = 40.0) -> dict:
    """Results of a point: (set, labels, net) → top-1; the spread over classes is a tenth of it."""
    students = [
        {
            "set": which,
            "labels": kind,
            "net": net,
            "top1": n,
            "balanced": n,
            "class_std": n / 10,
            "top1_std": 0.5,
        }
        for (which, kind, net), n in top1.items()
    ]
    rows = [
        {"title": t, "net": "convnet3", "top1": plain, "class_std": 4.0}
        for t in ("plain, whole set", "plain, logit-adjusted")
    ]
    summary = {
        "labels": labels,
        "baseline": "hard",
        "balanced_test": True,
        "students": students,
        "plain": rows,
        "experts": {},
    }
    return {"summary": summary}


def test_the_table_of_images_and_labels(tmp_path):
    """What points share has one row, what differs one each; published rows stand where they belong."""
    nets = ("convnet3", "resnet32")
    random = {("random", kind, net): 30.0 for kind in ("hard", "single") for net in nets}
    mine = {
        "a": {**random, ("distilled", "hard", "convnet3"): 41.0, ("initial", "hard", "convnet3"): 35.0, ("distilled", "hard", "resnet32"): 21.0},
        "b": {**random, ("distilled", "hard", "convnet3"): 42.0, ("distilled", "learned", "convnet3"): 43.0},
        "c": {("random", "hard", "convnet3"): 29.0, ("distilled", "hard", "convnet3"): 44.0},
    }  # fmt: skip
    points = [point(tmp_path, name, "ipc=" + str(k + 1)) for k, name in enumerate(mine)]
    for name, top1 in mine.items():
        found = matrix_of(top1, "learned" if name == "b" else "hard", 50.0 if name == "c" else 40.0)
        files.write_json(make(tmp_path / name) / "results.json", found)
    beside = [
        sweep.Published(method="P", top1=1.5, where={"ipc": 2}),
        sweep.Published(method="Q", top1=2.5, where={"ipc": 1}, net="resnet32"),
        sweep.Published(method="R", top1=3.5, labels="hard", class_std=7.5),
    ]
    found = sweep.Sweep("s", Path("c.yaml"), {name: {} for name in mine}, published=beside)
    made = campaign.Campaign("s", tmp_path / "jobs", tmp_path, "local", points=points)
    text = sweep_table.write(found, made, tmp_path, lambda job: "")
    first, second = cells_of(text, "\nconvnet3:"), cells_of(text, "\nresnet32:")
    assert list(first) == [
        "random real (a, b)", "random real (c)", "initial images of a", "a", "b", "c",
        "plain, whole set (a, b)", "plain, whole set (c)",
        "plain, logit-adjusted (a, b)", "plain, logit-adjusted (c)", "R, published",
    ]  # fmt: skip
    assert first["random real (a, b)"]["single"] == "30.0 ± 0.5"
    assert first["random real (c)"]["single"] == "–"
    assert first["b"]["hard"] == "42.0 ± 0.5" and first["b"]["learned"] == "43.0 ± 0.5"
    assert first["b"]["std over classes"] == "4.3 (learned)" and first["b"]["published"] == "P 1.5"
    assert first["a"]["std over classes"] == "4.1 (hard)" and first["a"]["published"] == "–"
    assert first["R, published"]["hard"] == "3.5"
    assert first["R, published"]["std over classes"] == "7.5 (hard)"
    assert first["plain, logit-adjusted (c)"]["hard"] == "50.0"
    assert list(second) == ["random real", "a"]
    assert second["a"]["published"] == "Q 2.5" and second["a"]["std over classes, hard"] == "2.1"
    assert cells_of(text, "# s")["a"]["published"] == "–"  # its students are of another network


def test_random_images_with_classes_have_a_column_and_make_no_matrix(tmp_path):
    """One kind of labels beside them: no table of images × labels. A column stands only where a
    point has what it shows."""
    mine = {
        "a": {("distilled", "single", "convnet3"): 41.0, ("random", "single", "convnet3"): 30.0, ("random", "hard", "convnet3"): 31.0, ("chosen", "single", "convnet3"): 42.0},
        "b": {("distilled", "hard", "convnet3"): 43.0, ("random", "hard", "convnet3"): 33.0},
    }  # fmt: skip

    def written(*names):
        points = [point(tmp_path, name) for name in names]
        for name in names:
            found = matrix_of(mine[name], "single" if name == "a" else "hard")
            found["summary"]["baseline"] = found["summary"]["labels"]
            files.write_json(make(tmp_path / name) / "results.json", found)
        asked = sweep.Sweep("s", Path("c.yaml"), {name: {"seed": 0} for name in names})
        made = campaign.Campaign("s", tmp_path / "jobs", tmp_path, "local", points=points)
        return sweep_table.write(asked, made, tmp_path, lambda job: "")

    text = written("a")
    assert "Images × labels" not in text
    row = cells_of(text, "# s")["a"]
    assert (row["random real"], row["random real, plain labels"]) == ("30.0 ± 0.5", "31.0 ± 0.5")
    assert row["chosen"] == "42.0 ± 0.5" and row["distilled, top-1"] == "41.0 ± 0.5"
    assert cells_of(text, "Means over `seed`")["all"]["random real, plain labels"] == "31.0"
    text = written("b")
    assert "plain labels" not in text and "chosen" not in text
    assert cells_of(text, "# s")["b"]["random real"] == "33.0 ± 0.5"
    assert "Images × labels" in written("a", "b"), "two kinds of labels"


def test_the_table_of_two_stages(tmp_path):
    """One stage first, then a row a pair; a dash where a point has no such pair."""

    def row(first, second, routing, top1):
        numbers = {"top1": top1, "top1_std": 0.5, "class_std": 9.25}
        return {"first": first, "second": second, "routing": routing, **numbers}

    mine = {
        "a": [row("G", "S", "hard", 40.0), row(None, "distilled", None, 38.0)],
        "b": [row(None, "distilled", None, 39.0), row("G", "T", "soft", 41.0)],
        "c": [],
    }
    points = [point(tmp_path, name, "ipc=" + str(k + 1)) for k, name in enumerate(mine)]
    for name, rows in mine.items():
        found = matrix_of({("distilled", "hard", "convnet3"): 38.0}, "hard", 50.0)
        if rows:
            found["two_stage"] = {"rows": rows}
        files.write_json(make(tmp_path / name) / "results.json", found)
    beside = [sweep.Published(method="R", top1=3.5, labels="hard", class_std=7.5)]
    found = sweep.Sweep("s", Path("c.yaml"), {name: {} for name in mine}, published=beside)
    made = campaign.Campaign("s", tmp_path / "jobs", tmp_path, "local", points=points)
    text = sweep_table.write(found, made, tmp_path, lambda job: "")
    table = text[text.index("Two stages:") :]
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines()]
    assert [line for line in lines if len(line) == 5 and "--" not in line[0]] == [
        ["first stage", "second stage", "routing", "a", "b"],
        ["– (one stage)", "distilled", "–", "38.0 ± 0.5 / 9.2", "39.0 ± 0.5 / 9.2"],
        ["G", "S", "hard", "40.0 ± 0.5 / 9.2", "–"],
        ["G", "T", "soft", "–", "41.0 ± 0.5 / 9.2"],
    ]
    assert "R 3.5 / 7.5" in table


def test_what_the_set_of_a_point_took(finished, tmp_path):
    """Summed from the records of a run that was done: experts that the set needs, and the method."""
    config, run = finished
    one = campaign_of(run, config)
    took = parts.spent(one.points[0], one.store)
    wanted = {
        "experts": ["observer", "teacher"],
        "synthesis": ["calibrate", "initialize", "recover"],
    }
    for part, names in wanted.items():
        records = [files.read_json(folder_of(run, n) / "stage.json") for n in names]
        assert took[part].seconds == pytest.approx(sum(r["seconds"] * r["ranks"] for r in records))
        assert took[part].peak_mb == max(r["peak_mb"]["cpu"] for r in records) > 0
        assert took[part].devices == (records[0]["device"],)
    # With labels of the teacher, but a method that does not read it, the teacher is not its cost.
    without = ("recover.teacher_ce=0", "recover.settle=0", "recover.ce=1")
    other = campaign_of(run, config, "initialize.select=random", *without)
    assert "teacher" in other.points[0].nodes
    left = parts.spent(other.points[0], one.store)
    observer = files.read_json(folder_of(run, "observer") / "stage.json")
    assert left["experts"].seconds == observer["seconds"] and "synthesis" not in left
    found = sweep.Sweep("s", config, {"": {}}, published=[sweep.Published(method="X", experts=7.0)])
    text = sweep_table.write(found, one, tmp_path, lambda job: "")
    (row,) = cells_of(text, "What the distilled sets took").values()
    assert row["experts, s"] == f"{took['experts'].seconds:,.0f}"
    assert row["synthesis, MB"] == f"{took['synthesis'].peak_mb:,}"
    assert row["published: experts, synthesis"] == "X 7 s, –"


@pytest.mark.slow
def test_a_sweep_on_this_machine(tmp_path):
    """A point that breaks down at run time stops what needs it and nothing else; sweeping again does
    what is missing. Points differ in settings or in strategies: an ablation is a sweep."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    text = (
        "config: tiny.yaml\nset: {relabel.labels: single}\npoints:\n  - {name: a, ipc: 1}\n"
        "  - {name: broken, ipc: 2, evaluate.lr: 1.0e+30}\n"
        "  - {name: c, ipc: 4, initialize.select: random}\n"
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
        f"broken/{stage}" for stage in ("students", "embedding", "evaluate", "report")
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


def test_a_point_whose_settings_do_not_suit_its_images_stops_no_other(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    bad = "{name: bad, evaluate.nets: [vgg11_cifar], data.resolution: 16, evaluate.plain: own}"
    (tmp_path / "s.yaml").write_text(f"config: tiny.yaml\npoints:\n  - {{name: good}}\n  - {bad}\n")
    done = cli("sweep", tmp_path / "s.yaml", "--dry-run", "--out", tmp_path / "s")
    assert "point bad is refused: vgg11_cifar" in done.stdout, done.stdout + done.stderr
    assert "good/students" in done.stdout and "bad/students" not in done.stdout
