"""Estimates where no data is, and the configs of published recipes, which are looked at like that."""

import dataclasses
import itertools
import re

import pytest
import yaml
from conftest import ROOT, TINY, cli, image_folder, said_plainly

from ltdd_scale import recipe
from ltdd_scale.config import load
from ltdd_scale.config.root import check
from ltdd_scale.data import sources
from ltdd_scale.data.settings import Data
from ltdd_scale.errors import UserError
from ltdd_scale.launch import deadline, devices, estimate, sweep
from ltdd_scale.launch.jobs import Job, Point
from ltdd_scale.launch.parts import PARTS, part_of
from ltdd_scale.launch.profile import Profile
from ltdd_scale.pipeline import graph
from ltdd_scale.stage import Cost, Division, Facts, Resources, Stage

CONFIGS = ROOT / "configs"
PUBLISHED = sorted((CONFIGS / "published").glob("*.yaml"))
SWEEPS = sorted([*(CONFIGS / "sweeps").glob("*.yaml"), *CONFIGS.glob("published/sweeps/*.yaml")])


def table(text: str) -> dict[str, list[str]]:
    """The first table of what was printed: first cell → the others."""
    lines = itertools.dropwhile(lambda line: line[:1] != "|", text.splitlines())
    first = itertools.takewhile(lambda line: line[:1] == "|", lines)
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in first]
    return {row[0]: row[1:] for row in rows[:1] + rows[2:]}


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda p: p.stem)
def test_a_published_recipe_says_what_it_is(path):
    config = load.load(path)
    assert check(config) == []
    assert load.from_text(load.to_yaml(config)) == config
    comment = "".join(x for x in path.read_text().splitlines(True) if x.startswith("#"))
    for words in ("# Source: ", "# As published: ", "# Not as published: ", "Not reproduced here"):
        assert words in comment, words
    assert sources.expected(config.data) is not None


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: f"{p.parent.parent.name}-{p.stem}")
def test_every_point_loads_and_has_its_numbers(path):
    """No setting without effect, and a point or a row for every published number."""
    found = sweep.load(path)
    good, bad = found.load_points([])
    assert good and not bad
    assert {n: said for n, c in good.items() if (said := check(c))} == {}
    for row in found.published:
        fit = [c for c in good.values() if row.fits(c)]
        assert row.labels or len(fit) == 1 or not row.where, row
        assert all(not row.net or row.net in c.evaluate.nets for c in fit), row


@pytest.mark.parametrize(
    "path", [p for p in SWEEPS if p.parent.parent.name == "published"], ids=lambda p: p.stem
)
def test_every_published_table_has_an_estimate(path, tmp_path):
    """Of each point: experts, synthesis and students cost something, without data."""
    good, _ = sweep.load(path).load_points([])
    points = [Point(name, config, tmp_path, "not here") for name, config in good.items()]
    known = estimate.all_facts(points, tmp_path)
    costs = estimate.costs(points, known)
    for point in points:
        flops = dict.fromkeys(PARTS, 0.0)
        for name, cost in (costs[point.name] or {}).items():
            if part := part_of(point.nodes[name].stage):
                flops[part] += cost.flops
        own = [part for part in PARTS if part != "experts" or experts(point.config)]
        assert all(flops[part] > 0 for part in own), (point.name, flops)


def experts(config) -> bool:
    """Whether the method needs networks that are trained on the real set."""
    return config.method in ("rldd", "mtt", "damed")


def test_the_class_counts_are_the_documented_ones():
    """Of "ImageNet-LT" and the exponential sets, as `configs/sets` state them in words."""
    numbers = {}
    for path in sorted((CONFIGS / "sets").glob("*.yaml")):
        said = re.findall(r"(?:IF )?(\d+): ([\d,]+)(?: images)?", path.read_text().splitlines()[0])
        for factor, images in said:
            data = load.load(path, [f"data.imbalance_factor={factor}"]).data
            numbers[path.stem, factor] = sum(sources.expected(data).counts)
            assert numbers[path.stem, factor] == int(images.replace(",", ""))
    assert len(numbers) == 11
    whole = sources.expected(load.load(CONFIGS / "sets" / "imagenet_lt.yaml").data)
    assert (whole.num_images, whole.num_classes, whole.judged) == (115_846, 1000, 50_000)
    assert (max(whole.counts), min(whole.counts)) == (1280, 5)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_per_class": 100, "imbalance_factor": 20, "test_per_class": 40},
        {"imbalance_factor": 5, "test_per_class": 10, "val_per_class": 20},
        {"profile": "full", "test_per_class": 3},
        {"profile": "counts", "counts": list(range(30, 40)), "test_per_class": 3},
        {"profile": "counts", "counts": list(range(30, 40)), "val_per_class": 4},
        {"profile": "counts", "counts": list(range(30, 40)), "val_fraction": 0.2},
        {"imbalance_factor": 5, "test_per_class": 10, "val_fraction": 0.2},
    ],
)
def test_what_is_expected_is_what_is_there(settings):
    """For a config that states its source rightly."""
    data = Data(source="digits", **settings)
    module = sources.kind(data)
    there = module.available(data)
    stated = {"expected_counts": there.train, "expected_test": there.test}
    assert sources.expected(Data(source="digits", **settings, **stated)) == sources.facts(data)


def test_little_said_is_nothing_known():
    assert sources.expected(Data(source="folder", expected_classes=3)) is None
    assert sources.expected(Data(source="folder", expected_per_class=3)) is None
    said = Data(source="folder", expected_classes=2, max_per_class=9, imbalance_factor=9)
    assert sources.expected(said).counts == (9, 1)
    shards = Data(source="shards", expected_counts=[4, 3], profile="full", expected_test=8)
    assert sources.expected(shards).counts == (4, 3)
    with pytest.raises(UserError, match="leaves nothing of class 1"):
        sources.expected(Data(source="folder", expected_counts=[4, 3], val_per_class=5))


def test_expectations_change_no_fingerprint(tiny):
    stated = ["data.expected_classes=3", "data.expected_per_class=9", "data.expected_counts=[1, 2]"]
    nodes = []
    for sets in ([], [*stated, "data.expected_test=4"]):
        config = load.load(tiny, sets)
        built = graph.build(recipe.stages(config, "digits"), config)
        nodes.append({name: node.where for name, node in built.items()})
    assert nodes[0] == nodes[1] and len(nodes[0]) > 9


@pytest.fixture
def absent(tmp_path):
    """A sweep whose images are not there."""
    text = TINY.replace("source: digits", f"source: folder, path: {tmp_path / 'nowhere'}")
    (tmp_path / "absent.yaml").write_text(text)
    path = tmp_path / "s.yaml"
    path.write_text("config: absent.yaml\nset: {relabel.labels: single}\ngrid: {ipc: [1, 4]}\n")
    return path


STATED = ("data.expected_classes=10", "data.expected_per_class=160", "data.expected_test=100")


def test_a_dry_run_where_no_data_is(absent, tmp_path):
    where = ["--out", tmp_path / "runs" / "s"]
    done = cli("sweep", absent, *where, "--dry-run", "--set", *STATED)
    assert done.returncode == 0, done.stderr
    found = table(done.stdout)
    assert list(found) == ["point", "ipc1", "ipc4", "all, shared once"]
    assert found["point"] == ["experts", "synthesis", "students", "all"]
    assert "the images of 2 points are not here" in done.stdout and "estimated, one" in done.stdout
    assert "no estimate" not in done.stdout and "\nipc4/recover " in done.stdout
    # One point of it, for SLURM, with the plain network's place to be decided.
    cluster = ["--cluster", "slurm", "--profile", ROOT / "slurm/preemptible.yaml", "--dry-run"]
    plain = [*STATED, "evaluate.plain=auto"]
    one = cli("run", tmp_path / "absent.yaml", *where, *cluster, "--set", *plain)
    assert one.returncode == 0 and list(table(one.stdout)) == ["point", "absent"], one.stderr
    assert "the images are not here" in one.stdout and "#SBATCH" in one.stdout
    assert "# ---- recover" in one.stdout and "# ----" not in done.stdout
    assert "the set: 10 classes, " in one.stdout and "100 to be tested on" in one.stdout
    assert not (tmp_path / "runs").exists()


def test_what_is_not_here_cannot_run(absent, tmp_path):
    where = ["--out", tmp_path / "runs" / "s", "--set", *STATED]
    said_plainly(cli("run", tmp_path / "absent.yaml", *where), "no such folder")
    said_plainly(
        cli("run", tmp_path / "absent.yaml", "--cluster", "local", *where), "no such folder"
    )
    assert not (tmp_path / "runs").exists()
    done = cli("sweep", absent, *where)
    assert done.returncode == 1 and done.stdout.count("is refused: data.path: no such folder") == 2
    assert not list(tmp_path.rglob("stage.json"))
    # Without a word on what is not here there is no estimate either.
    done = cli("sweep", absent, "--out", tmp_path / "o", "--dry-run")
    assert done.returncode == 1 and done.stdout.count("is refused: data.path: no such folder") == 2


def test_a_set_that_is_not_the_expected_one_is_said(tmp_path):
    image_folder(tmp_path / "set", {"a": 12, "b": 12})
    image_folder(tmp_path / "set", {"a": 3, "b": 3}, "test")
    place = f"source: folder, path: {tmp_path / 'set'}, val_per_class: 2"
    (tmp_path / "c.yaml").write_text(
        TINY.replace("source: digits", place).replace(", val_per_class: 5", "")
    )
    (tmp_path / "s.yaml").write_text("config: c.yaml\ngrid: {ipc: [1, 2]}\n")
    for stated, words in (
        (["expected_classes=3", "expected_per_class=12"], "expects 3 classes, and the set has 2"),
        (["expected_classes=2", "expected_per_class=22"], "training images, and the set has"),
        (
            ["expected_classes=2", "expected_per_class=12", "expected_test=9"],
            "expects 9 test images",
        ),
        (["expected_classes=2", "expected_per_class=12", "expected_test=6"], ""),
        (["expected_classes=2", "expected_per_class=2"], "leaves nothing of class 0"),
    ):
        sets = [f"data.{s}" for s in stated]
        done = cli(
            "sweep", tmp_path / "s.yaml", "--out", tmp_path / "o", "--dry-run", "--set", *sets
        )
        lines = [x for x in done.stderr.splitlines() if "data.expected_*" in x]
        assert done.returncode == 0 and len(lines) == bool(words), done.stderr
        assert all(words in line for line in lines) and "not here" not in done.stdout


def test_what_is_done_costs_nothing_more(finished):
    """The table is of whole points; the jobs and the sum are of what is left."""
    config, run = finished
    shown = ["--out", run, "--cluster", "local", "--dry-run"]
    done = cli("run", config, *shown)
    assert done.returncode == 0 and "0 of 11 jobs are left" in done.stdout, done.stderr
    assert table(done.stdout)["tiny"][3] != "–" and "estimated" not in done.stdout
    more = cli("run", config, *shown, "--set", "evaluate.seeds=2")
    assert "3 of 11 jobs are left" in more.stdout and "students   about" in more.stdout
    assert re.search(r"\| 1 core +\| \d+ s", more.stdout), more.stdout


FAST = devices.Device("fast", 1e12, 0.5, 1e-2, "made up")


def takes(division=Division.RANKS, number=1, cores=1, **cost):
    stage = Stage(name="s", kind="s", version=1, run="", division=division)
    return estimate.taken(Cost(**cost), stage, FAST, number, cores)


def test_what_takes_longest_bounds_a_stage():
    assert takes(flops=3e12, decodes=640, steps=100) == estimate.Taken(3.0, "arithmetic")
    assert takes(flops=3e12, decodes=640 * 4, steps=100) == estimate.Taken(4.0, "decoding")
    assert takes(flops=3e12, decodes=640 * 4, cores=4) == estimate.Taken(3.0, "arithmetic")
    assert takes(flops=3e12, steps=500) == estimate.Taken(5.0, "steps")


def test_ranks_share_out_steps_and_wait_for_each_other():
    """Half of each device's speed is left where several train one network; BatchNorm over all ranks
    comes on top; steps get no fewer."""
    assert takes(flops=8e12, number=4).seconds == 8 / (4 * 0.5)
    assert takes(flops=8e12, number=4, meetings=1000).seconds == 4 + 1000 * 50e-6 * 2
    met = takes(flops=8e12, number=4, meetings=1e5)
    assert met == estimate.Taken(4 + 10.0, "BatchNorm over ranks")
    assert takes(steps=100, number=8).seconds == 1


def test_chunks_and_students_are_dealt():
    assert takes(Division.CHUNKS, flops=8e12, steps=800, number=8).seconds == 1
    assert takes(Division.CHUNKS, flops=8e12, number=8, pieces=1).seconds == 8
    assert takes(Division.CHUNKS, flops=9e12, number=8, pieces=9).seconds == 2, "a second round"
    assert takes(Division.UNITS, flops=8e12, number=8).seconds == 8, "one student is one device's"
    students = [estimate.Taken(2.0, "steps")] * 6
    assert estimate.of_many(students, 4).seconds == 3 and estimate.of_many(students, 8).seconds == 2
    assert estimate.of_many([], 8) == estimate.Taken()


def test_a_student_that_makes_its_own_labels_pays_for_them():
    """Stored ones, of random real images and of a trial: a pass of the teacher each epoch."""
    text = ["evaluate.epochs=40", "relabel.labels=stored", "choose.how=always", "data.path=x"]
    config = load.load(CONFIGS / "quickstart.yaml", [*text, "evaluate.matrix=false"])
    nodes, facts = graph.build(recipe.stages(config, "x"), config), Facts((5,) * 10, 30)
    names = [f"{at}-stored-convnet3-s0" for at in ("student/distilled", "student/random")]
    made, own = (estimate.limits.costs([nodes[n]], facts)[n] for n in names)
    assert own.flops == pytest.approx(made.flops * (3 + 1) / 3) and own.steps == made.steps == 40
    trial = "trial/distilled-stored-convnet3-s0"
    short = estimate.limits.costs([nodes[trial]], facts)[trial]
    assert short.flops / short.steps > 1.2 * made.flops / made.steps


def test_students_of_chosen_images_cost_nothing_where_others_stand_for_them():
    sets = ["relabel.labels=single", "choose.how=always", "data.path=x"]
    steps = []
    for matrix in ("true", "false"):
        config = load.load(CONFIGS / "quickstart.yaml", [*sets, f"evaluate.matrix={matrix}"])
        nodes = graph.build(recipe.stages(config, "x"), config)
        name = "student/chosen-single-convnet3-s0"
        steps.append(estimate.limits.costs([nodes[name]], Facts((5,) * 10, 30))[name].steps)
    assert steps[0] == 0 < steps[1], "without the matrix initial images have none"


def test_devices_are_published_rates_or_measured():
    assert devices.of(Profile(), local=False).name == "a100"
    assert devices.of(Profile(device="v100"), local=True).flops == 1200 * devices.RESNET50
    own = devices.of(Profile(device="h100", tflops=5), local=False)
    assert own.flops == 5e12 and "profile" in own.source
    core = devices.core()
    assert core.name == "cpu" and 1e8 < core.flops < 1e13


def test_an_expert_decodes_what_does_not_fit_and_waits_for_batchnorm():
    """ImageNet-LT's observer: two streams an epoch; nothing that is held in memory."""
    config = load.load(CONFIGS / "imagenet_lt_if256_ipc10.yaml")
    facts = sources.expected(config.data)
    node = graph.build(recipe.stages(config, "x"), config)["observer"]
    cost = estimate.limits.costs([node], facts)["observer"]
    assert cost.decodes == 2 * 135 * facts.num_images
    assert cost.steps == 135 * (facts.num_images // 256) and cost.meetings == 2 * 53 * cost.steps
    held = load.load(CONFIGS / "imagenet_lt_if256_ipc10.yaml", ["data.memory_gb=99"])
    node = graph.build(recipe.stages(held, "x"), held)["observer"]
    assert estimate.limits.costs([node], facts)["observer"].decodes == facts.num_images


def test_students_of_a_set_too_large_for_memory_decode_it_each_epoch():
    text = ["evaluate.plain=own", "evaluate.plain_epochs=60", "data.path=x"]
    decodes = []
    for memory in (0, 99):
        sets = [*text, f"data.memory_gb={memory}"]
        config = load.load(CONFIGS / "imagenet_lt_if256_ipc10.yaml", sets)
        facts = sources.expected(config.data)
        nodes = graph.build(recipe.stages(config, "x"), config)
        (name,) = (n for n in nodes if n.startswith("student/plain"))
        decodes.append(estimate.limits.costs([nodes[name]], facts)[name].decodes - facts.judged)
    assert decodes == [2 * 60 * facts.num_images, facts.num_images], "CutMix pastes others"


def test_a_net_that_cannot_be_built_without_data_has_a_cost():
    """RegNet reckons with tensors while it is made."""
    sets = ["observer.net=regnet_y_400mf", "data.resolution=32"]
    config = load.load(CONFIGS / "quickstart.yaml", sets)
    nodes = graph.build(recipe.stages(config, "x"), config)
    found = estimate.limits.costs(nodes.values(), Facts((9,) * 10, 30))
    assert found["recover"].memory > found["initialize"].memory > 0


# What two experts, side by side, chunks and a report take on one device, and the share of a
# device's speed that is left where they work together.
NODES = Profile(gpus_per_node=4, array_parallelism=64)
ALONE = {"a": (80.0, 0.8), "b": (40.0, 0.8), "chunks": (40.0, 1.0), "report": (5.0, 1.0)}


def jobs():
    return [
        Job("a", "a"),
        Job("b", "b"),
        Job("chunks", "chunks", needs=["a", "b"]),
        Job("report", "report", needs=["chunks"]),
    ]


def kinds(made):
    def stage(name):
        how = {"chunks": (Division.CHUNKS, Resources.GPU), "report": (Division.ONE, Resources.CPU)}
        division, resources = how.get(name, (Division.RANKS, Resources.NODES))
        return Stage(
            name=name, kind=name, version=1, run="", division=division, resources=resources
        )

    def seconds(job, number):
        alone, kept = ALONE[job.name]
        return alone / (number * (kept if number > 1 else 1))

    return [deadline.Kind(job.stage, (job,), stage(job.name), seconds) for job in made]


def test_the_longest_chain_is_what_is_waited_for():
    made = jobs()
    each = {name: alone for name, (alone, _) in ALONE.items()}
    assert deadline.chain(made, each) == (125.0, ["a", "chunks", "report"])
    assert deadline.chain(made, {**each, "a": 1.0}) == (85.0, ["b", "chunks", "report"])
    assert deadline.chain([], {}) == (0.0, [])


@pytest.mark.parametrize("seconds", [1000, 125, 110, 60, 30, 12])
def test_a_deadline_is_met_for_about_the_least(seconds):
    made = jobs()
    own = kinds(made)
    found, met = deadline.choose(made, own, NODES, seconds)
    every = []
    for numbers in itertools.product(*(kind.numbers(NODES) for kind in own)):
        by_job = {k.name: k.seconds(k.jobs[0], n) for k, n in zip(own, numbers, strict=True)}
        if deadline.chain(made, by_job)[0] <= seconds:
            every.append(sum(k.cost(n) for k, n in zip(own, numbers, strict=True)))
    assert met and found.seconds <= seconds
    assert min(every) <= found.cost <= 1.05 * min(every)
    if seconds == 1000:
        assert set(found.numbers.values()) == {1}, "no more devices than the deadline asks for"
    if seconds == 110:  # chunks share out what they do without loss
        assert found.numbers == {"a": 1, "b": 1, "chunks": 2, "report": 1}


def test_a_deadline_that_cannot_be_met_says_the_fastest():
    made = jobs()
    found, met = deadline.choose(made, kinds(made), NODES, 5)
    assert not met and found.seconds == pytest.approx(80 / 64 / 0.8 + 40 / 64 + 5)
    assert found.numbers["report"] == 1


@pytest.mark.parametrize(
    ("wants", "numbers", "lines"),
    [
        (
            {"gpus_per_node": 4, "mem_gb": 100},
            {"a": 16, "b": 2, "chunks": 8},
            [
                "a: {nodes: 4, gpus_per_node: 4}",
                "b: {nodes: 1, gpus_per_node: 2, mem_gb: 50}",
                "chunks: {array: 8, gpus_per_node: 1, mem_gb: 25}",
            ],
        ),
        (
            {"gpus_per_node": 6, "extra": {"exclusive": True}},
            {"a": 12, "b": 6, "chunks": 24},
            [
                "a: {nodes: 2, gpus_per_node: 6}",
                "b: {nodes: 1, gpus_per_node: 6}",
                "chunks: {array: 4, gpus_per_node: 6}",
            ],
        ),
        (
            {"gpus_per_node": 0},
            {"a": 4, "b": 1, "chunks": 2},
            ["a: {nodes: 4}", "b: {nodes: 1}", "chunks: {array: 2}"],
        ),
    ],
)
def test_what_a_profile_gets_for_a_deadline(wants, numbers, lines):
    own, wants = kinds(jobs()), Profile(**wants)
    assert all(numbers[kind.name] in kind.numbers(wants) for kind in own[:3])
    chosen = deadline.Choice({**numbers, "report": 1}, 0.0, 0.0)
    assert deadline.lines(chosen, own, wants) == [f"  {line}" for line in lines]


def test_the_devices_that_a_stage_can_use():
    a, _, chunks, report = kinds(jobs())
    assert a.numbers(NODES) == deadline.NUMBERS and report.numbers(NODES) == (1,)
    assert a.numbers(Profile(gpus_per_node=6)) == (1, 2, 4, 6, 12, 24, 48)
    assert chunks.numbers(Profile(array_parallelism=5)) == (1, 2, 4)
    node = deadline.Kind("s", (), dataclasses.replace(a.stage, resources=Resources.GPU), a.seconds)
    assert node.numbers(NODES) == (1, 2, 4)
    alone = Profile(gpus_per_node=4, array_parallelism=4, extra={"exclusive": True})
    assert node.numbers(alone) == (4,) and chunks.numbers(alone) == (4, 8, 16)


def test_a_dry_run_with_a_deadline(absent, tmp_path):
    """The lines are those of a profile, and with them the jobs take no longer."""
    profile = tmp_path / "shared.yaml"
    profile.write_text("gpus_per_node: 8\ncpus_per_task: 12\n")
    config = CONFIGS / "imagenet_lt_if256_ipc10.yaml"
    where = ["--out", tmp_path / "o", "--cluster", "slurm", "--dry-run"]
    done = cli("run", config, *where, "--profile", profile, "--deadline", "3")
    assert done.returncode == 0, done.stderr
    said, _, rest = done.stdout.partition("by a deadline of 3 h: ")[2].partition("stages:\n")
    assert "GPU-hours, done in 2:" in said
    stages = yaml.safe_load(rest.partition("\n\n")[0])
    assert {"calibrate", "recover", "students"} < set(stages)
    (tmp_path / "p.yaml").write_text(
        yaml.safe_dump({**yaml.safe_load(profile.read_text()), "stages": stages})
    )
    again = cli("run", config, *where, "--profile", tmp_path / "p.yaml")
    number = stages["observer"]["gpus_per_node"]
    line = next(x for x in again.stdout.splitlines() if x.startswith("observer "))
    assert f"on {number} GPUs" in line
    hurried = cli("run", config, *where, "--profile", profile, "--deadline", "0.1")
    assert "not in 0.1 h: " in hurried.stdout
    # Preemptions take time, and no GPU-hours.
    often = {**yaml.safe_load(profile.read_text()), "preempted_hours": 1, "requeue_minutes": 30}
    (tmp_path / "often.yaml").write_text(yaml.safe_dump(often))
    slow = cli("run", config, *where, "--profile", tmp_path / "often.yaml")
    assert "Preempted jobs wait 50% on top" in slow.stdout
    first, last = (
        next(x for x in shown.stdout.splitlines() if x.startswith("| 1 GPU ")).split("|")
        for shown in (done, slow)
    )
    assert first[3] == last[3] and first[2] != last[2]
    said_plainly(cli("run", config, "--deadline", "3"), "go with --cluster")
    said_plainly(
        cli("run", config, "--cluster", "slurm", "--profile", profile, "--deadline", "3"),
        "--deadline goes with --dry-run and --cluster slurm",
    )
    said_plainly(cli("sweep", absent, "--dry-run", "--deadline", "3"), "and --cluster slurm")
    wrong = cli("sweep", absent, "--dry-run", "--deadline", "soon")
    assert wrong.returncode == 2 and "expected hours, such as 4 or 0.5" in wrong.stderr


def test_memory_is_that_of_the_tightest_group_we_are_in(tmp_path):
    """A batch system sets its limit on a group on the way down, of either version."""
    own = tmp_path / "cgroup"
    own.write_text("4:cpu,cpuacct:/x\n3:memory:/slurm/job_7/step_0\n0::/system/job_8\n")
    limits = estimate.limits
    found = [p for p, *_ in limits._groups(tmp_path / "root", own)]
    at = tmp_path / "root"
    assert found == [
        at / "system" / "job_8" / "memory.max",
        at / "system" / "memory.max",
        at / "memory.max",
        *(
            at / "memory" / g / "memory.limit_in_bytes"
            for g in ("slurm/job_7/step_0", "slurm/job_7", "slurm", "")
        ),
    ]
    assert len(list(limits._groups(at, tmp_path / "none"))) == 2
