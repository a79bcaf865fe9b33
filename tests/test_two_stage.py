"""The protocol two_stage: students of groups, and all pairs of stages out of saved logits."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, cli, folder_of, said_plainly
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ltdd_scale import recipe
from ltdd_scale.config import load
from ltdd_scale.config.root import Config, check
from ltdd_scale.data.images import MemoryImages
from ltdd_scale.data.settings import Data
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.errors import UserError
from ltdd_scale.judging import (
    cost,
    pairs,
    routing,
    single_stage,
    student,
    subsets,
    training,
    two_stage,
)
from ltdd_scale.judging.contract import Roles
from ltdd_scale.judging.metrics import metrics
from ltdd_scale.judging.settings import Evaluate, Training, TwoStage
from ltdd_scale.judging.subsets import Part
from ltdd_scale.labels.catalog import KINDS
from ltdd_scale.labels.contract import Maker
from ltdd_scale.labels.cost import stored_bytes
from ltdd_scale.labels.settings import Adjusted
from ltdd_scale.labels.views import draw_epoch, mix, onehot, view_spec
from ltdd_scale.launch import perform
from ltdd_scale.models import flops, frozen, registry
from ltdd_scale.results import NUMBERS, Student
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.ranks import Ranks
from ltdd_scale.stage import Facts, settings_of

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU, None)
ROLES = Roles("recover", "initialize", judged={"teacher": ("teacher", "weights.pt")})
GROUPS = [[0, 2], [1, 3, 4]]

# Hard labels, no experts, and two seeds: a whole run in seconds.
RUN = """
protocol: two_stage
method: dm
data: {source: digits, resolution: 8, mirror: false, max_per_class: 20, imbalance_factor: 4, test_per_class: 8}
ipc: 3
dm: {iterations: 2, width: 8, real_batch: 4}
relabel: {labels: hard}
evaluate: {width: 8, epochs: 30, seeds: 2, batch_size: 10, lr: 0.01, crop_scale: [0.9, 1.0], plain: own, plain_epochs: 12, embedding: false}
two_stage:
  criterion: given
  given: [[0, 1, 2], [3, 4, 5, 6, 7], [8, 9]]
  first: [trained_whole, plain, plain_adjusted, distilled]
  second: [trained_distilled, distilled, random]
"""


# --- Out of logits --------------------------------------------------------------------------------


def test_two_stages_by_hand():
    """Two groups of two classes, one image each of 0 … 3."""
    groups = [[0, 3], [1, 2]]
    log = math.log
    first = torch.tensor([[log(0.6), log(0.4)]] * 4)
    second = torch.tensor([[log(0.5), log(0.9), log(0.1), log(0.5)]] * 4)
    soft = routing.routed(first, second, groups, "soft").exp()
    assert torch.allclose(soft[0], torch.tensor([0.3, 0.36, 0.04, 0.3]))
    hard = routing.routed(first, second, groups, "hard")
    assert hard[0].argsort(descending=True, stable=True).tolist() == [0, 3, 1, 2]
    labels = np.arange(4)
    judged = routing.judge(soft.log(), labels, ["few"] * 4, groups)
    assert judged["group_acc"] == 50 and judged["top1"] == 25 and judged["per_class"][1] == 100
    judged = routing.judge(hard, labels, ["few"] * 4, groups)
    assert judged["group_acc"] == 50 and judged["per_class"] == [100, 0, 0, 0]
    assert routing.in_group(second, labels, groups) == 50, "0 of [0, 3] and 1 of [1, 2]"


def logits_of(seed: int, n: int, num_classes: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 3, (n, num_classes))).float()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), num_classes=st.integers(4, 12), k=st.integers(2, 4))
def test_laws_of_two_stages(seed, num_classes, k):
    draw = np.random.default_rng(seed)
    groups = [g.tolist() for g in np.array_split(draw.permutation(num_classes), k)]
    one, other = (logits_of(seed + s, 30, num_classes) for s in (1, 2))
    labels = draw.integers(0, num_classes, 30)
    first, second = routing.summed(one, groups), routing.restricted(other, groups)
    assert torch.allclose(first.exp().sum(1), torch.ones(30), atol=1e-5)
    for group in groups:
        assert torch.allclose(second[:, group].exp().sum(1), torch.ones(30), atol=1e-5)
    # A network with itself is that network, softly.
    same = routing.routed(first, routing.restricted(one, groups), groups, "soft")
    assert torch.allclose(same, one.log_softmax(1), atol=1e-4)
    in_group = routing.in_group(second, labels, groups)
    shots = ["few"] * num_classes
    for how in routing.ROUTINGS:
        scores = routing.routed(first, second, groups, how)
        row = routing.judge(scores, labels, shots, groups)
        assert row["top1"] <= row["group_acc"] + 1e-6 and torch.isfinite(scores).all()
        if how == "hard":  # exactly what the paper does
            for i in range(30):
                group = groups[int(first[i].argmax())]
                assert int(scores[i].argmax()) == group[int(second[i, group].argmax())]
            # All images whose group is right and class is right in it, and no other.
            true = [next(g for g in groups if c in g) for c in labels]
            right = [
                g is groups[int(first[i].argmax())] and g[int(second[i, g].argmax())] == labels[i]
                for i, g in enumerate(true)
            ]
            assert row["top1"] == pytest.approx(100 * np.mean(right), abs=1e-3)
    within = [
        groups[g][int(second[i, groups[g]].argmax())] == labels[i]
        for i in range(30)
        for g in range(k)
        if labels[i] in groups[g]
    ]
    assert in_group == pytest.approx(100 * np.mean(within), abs=1e-3)


def test_a_student_for_each_group_is_joined_in_the_order_of_the_classes():
    parts = [logits_of(1, 4, 2), logits_of(2, 4, 3)]
    found = routing.joined(parts, GROUPS)
    assert torch.equal(found[:, [0, 2]], parts[0].log_softmax(1))
    assert torch.equal(found[:, [1, 3, 4]], parts[1].log_softmax(1))


def test_confusion_counts_images():
    scores = torch.eye(3)[[0, 0, 1, 2, 2]]
    found = pairs.confusion(scores, np.asarray([0, 1, 1, 2, 0]))
    assert found.tolist() == [[1, 0, 1], [1, 1, 0], [0, 0, 1]] and found.dtype == np.int32


def test_bytes_of_labels():
    assert stored_bytes("hard", 100, 10, 600) == 0
    assert stored_bytes("single", 100, 10, 600) == stored_bytes("learned", 100, 10, 1) == 4000
    assert stored_bytes("stored", 100, 10, 600) == 2 * 100 * 10 * 600
    assert stored_bytes("stored", 100, 10, 600, topk=3) == 2 * 7 * 100 * 600
    assert stored_bytes("stored", 100, 10, 600, topk=10) == stored_bytes("stored", 100, 10, 600)
    assert stored_bytes("online", 100, 10, 600) is None


# --- Targets of parts -----------------------------------------------------------------------------

COUNTS = np.asarray([40, 20, 10, 5, 2])


def maker(kind: str, adjust=False) -> Maker:
    """What labels of 15 images of 5 classes are made from; the teacher is untrained."""

    def made():
        return registry.TwoHeads(registry.backbone("convnet3", 4, "instance", 8), 5, 0)

    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (15, 3, 8, 8), dtype=np.uint8)
    images = MemoryImages(pixels, np.tile(np.arange(5), 3), CPU)
    teacher = registry.seeded(made, "t").eval()
    with torch.no_grad():
        teacher.fc_cb.bias += torch.tensor([2.0, 1, 0, -1, -2])  # it has seen a long tail
    recipe = frozen.recipe("convnet3", 4, "instance", 8, 5)
    kind_of = KINDS[kind].settings or Adjusted
    return Maker(
        images=images,
        teacher=frozen.Frozen(teacher, recipe, ALONE),
        normalize=lambda x: x,
        spec=view_spec(Training(), 8, False),
        views=Training(),
        relabel=kind_of(adjust=adjust) if kind != "hard" else None,
        num_classes=5,
        train_counts=COUNTS,
        seed=0,
        epochs=2,
        ranks=ALONE,
        temperature=None,
        learned=draw.normal(0, 2, (15, 5)),
    )


@pytest.mark.parametrize("adjust", [False, True])
@pytest.mark.parametrize("kind", ["hard", "single", "online", "stored", "learned"])
def test_targets_of_parts_are_those_of_all_classes(kind, adjust):
    """In-group: the rows and columns of the group, CutMix partners among its images. Groups: sums,
    and logits whose softmax sums. Adjusted labels have the τ of the whole set."""
    m = maker(kind, adjust)
    labels = KINDS[kind].code().fresh(m)
    x = torch.rand(4, 3, 8, 8)
    whole = draw_epoch(m.spec, m.images.sizes, "k", 0, True)
    indices = np.asarray([3, 0, 14, 7])
    classes, logits = labels.targets(0, whole, indices, x, ALONE)
    images, summed = Part(GROUPS, 5, None).of(m.images, labels)
    assert images is m.images
    sums, joint = summed.targets(0, whole, indices, x, ALONE)
    assert torch.allclose(sums, torch.stack([classes[:, g].sum(1) for g in GROUPS], 1))
    assert torch.allclose(sums.sum(1), torch.ones(4))
    if logits is None:
        assert joint is None
    else:
        p = logits.softmax(1)
        assert torch.allclose(
            joint.softmax(1), torch.stack([p[:, g].sum(1) for g in GROUPS], 1), atol=1e-6
        )
    if kind == "stored":
        return  # they belong to views of the whole set: in-group students cannot have them
    part = Part(GROUPS, 5, 1)
    images, within = part.of(m.images, labels)
    members = part.members(m.images.labels)
    assert set(m.images.labels[members]) == {1, 3, 4} and len(images.labels) == 9
    drawn = draw_epoch(m.spec, images.sizes, "k", 0, True)
    assert (drawn.lam < 1).any()
    own, kept = within.targets(0, drawn, np.asarray([0, 8, 4, 2]), x, ALONE)
    # By hand: the image and its partner, both of the group, as the whole set knows them.
    for row, i in enumerate((0, 8, 4, 2)):
        lam = float(drawn.lam[i])
        ends = [members[i], members[drawn.partners[i]]]
        still = draw_epoch(m.spec, m.images.sizes, "k", 0, False)
        y = [labels.targets(0, still, np.asarray([e]), x[row : row + 1], ALONE) for e in ends]
        mixed = lam * y[0][0] + (1 - lam) * y[1][0]
        columns = mixed[0, [1, 3, 4]]
        assert torch.allclose(own[row], columns / columns.sum(), atol=1e-6)
        if logits is not None:
            soft = lam * y[0][1] + (1 - lam) * y[1][1]
            assert torch.allclose(kept[row], soft[0, [1, 3, 4]], atol=1e-5)
    assert torch.allclose(own.sum(1), torch.ones(4))
    assert part.own(np.asarray([1, 4, 3])).tolist() == [0, 2, 1]
    assert Part(GROUPS, 5, None).own(np.asarray([0, 1, 2])).tolist() == [0, 1, 0]


def test_images_of_a_part_are_those_of_its_classes():
    m = maker("hard")
    subset, _ = Part(GROUPS, 5, 0).of(m.images, KINDS["hard"].code().fresh(m))
    assert subset.labels.tolist() == [0, 2] * 3 and subset.sizes.shape == (6, 2)
    (shown,) = subset.stream([(np.asarray([1, 4]), None)], m.spec)
    assert torch.equal(shown, m.images.pixels[[2, 10]].float() / 255)


# --- The units ------------------------------------------------------------------------------------


def config_of(labels="hard", two=None, **evaluate):
    return Config(
        ipc=2,
        protocol="two_stage",
        data=Data(resolution=8, mirror=False),
        relabel=Config().relabel.model_copy(update={"labels": labels}),
        evaluate=Evaluate(**{"seeds": 2, "plain": "own", "embedding": False, **evaluate}),
        two_stage=TwoStage(**(two or {})),
    )


def test_units():
    """Those of single_stage, the plain network of every seed, and parts of what is asked for."""
    config = config_of(
        "single",
        {"groups": 3, "first": ["trained_whole", "plain"], "second": ["trained_random"]},
        plain_epochs=7,
        epochs=5,
    )
    found = {s.name: s for s in two_stage.stages(config, ROLES)}
    single = {s.name: s for s in single_stage.stages(config, ROLES)}
    for name, stage in single.items():
        if name != "evaluate":
            assert found[name] == stage, "the same record, so the same fingerprint"
    more = [n for n in found if n not in single]
    seeds = (0, 1)
    assert more == [
        "student/plain-hard-convnet3-s1",
        "grouping",
        *(f"student/plain-hard-convnet3-s{s}-groups" for s in seeds),
        *(f"student/random-single-convnet3-s{s}-g{g}" for s in seeds for g in range(3)),
    ]
    whole = found["student/plain-hard-convnet3-s0-groups"]
    assert whole.given["epochs"] == 7 and whole.group == "group-students"
    assert whole.inputs == {"shard": "shard", "grouping": "grouping"}
    part = found["student/random-single-convnet3-s1-g2"]
    assert part.given["epochs"] == 5 and "teacher" in part.inputs
    names = list(found)
    assert all(
        names.index(i) < names.index(n) for n in names for i in found[n].inputs if i in names
    )
    assert set(found["evaluate"].inputs) >= {"grouping", *more}
    facts = Facts((100, 50, 10), 1)
    costs = [
        cost.student(settings_of(found[n], config), facts)
        for n in ("student/random-single-convnet3-s0", part.name)
    ]
    passes = [c.flops / flops.forward("convnet3", 128, "instance", 8) for c in costs]
    # Five epochs of 6 images, 2 of them in a group; the teacher labels all before.
    assert passes == pytest.approx([5 * 6 * 3 + 6, 5 * 2 * 3 + 6])
    views = config.model_copy(update={"relabel": config.relabel.model_copy(update={"views": 3})})
    more = cost.student(settings_of(found[part.name], views), facts).flops - costs[1].flops
    assert more == pytest.approx(2 * 6 * flops.forward("convnet3", 128, "instance", 8))
    assert costs[0].memory == costs[1].memory, "a student of a group holds all images"
    assert costs[0].activations == pytest.approx(3 * costs[1].activations)


def test_a_student_of_all_classes_is_told_as_ever():
    assert Student("random", "hard", "n", 3).to_dict() == {
        "set": "random",
        "labels": "hard",
        "net": "n",
        "seed": 3,
    }
    part = Student("random", "hard", "n", 3, "g1")
    assert part.to_dict()["part"] == "g1" and part.title.endswith("seed 3 g1")
    assert student.key_of(3) == "student 3" != student.key_of(3, "g1")


def test_experts_that_are_asked_for():
    assert not two_stage.needs_teacher(config_of())
    assert two_stage.needs_teacher(config_of("online"))
    assert two_stage.needs_teacher(config_of(two={"network": "teacher"}))
    assert two_stage.needs_observer(config_of(two={"network": "observer"}))
    stage = {s.name: s for s in two_stage.stages(config_of(two={"network": "observer"}), ROLES)}
    assert stage["grouping"].inputs["network"] == "observer"


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["two_stage.groups=0"], "leave trained_… out"),
        (["two_stage.groups=1"], "one group"),
        (["relabel.labels=stored"], "belong to views of the whole set"),
        (["evaluate.plain=none"], "another two_stage.network"),
        (["two_stage.criterion=given"], "two lists of classes"),
        (["two_stage.criterion=best"], "none of maxcut, linkage"),
        (["two_stage.first=[]"], "name at least one"),
        (["two_stage.first=[full]"], "first: the run has none of them: full (it needs evaluate"),
        (["two_stage.second=[teacher]"], "teacher (it needs labels of a teacher"),
        (["two_stage.first=[random]", "evaluate.random=false"], "evaluate.random=true"),
        (
            [
                "two_stage.network=distilled",
                "evaluate.plain=none",
                "two_stage.second=[plain,plain_adjusted]",
            ],
            "plain_adjusted (it needs evaluate.plain=own)",
        ),
        (["data.zca=true", "two_stage.network=teacher"], "two_stage.network (now teacher)"),
        (["two_stage.second=[nobody]"], "'nobody' is none of"),
        (["two_stage.criterion=random", "two_stage.groups=0", "two_stage.second=[random]"], "to 2"),
    ],
)
def test_settings_that_cannot_work(sets, words, tmp_path):
    (tmp_path / "c.yaml").write_text(RUN.replace("given", "linkage", 1).replace("  given:", "  #"))
    with pytest.raises(UserError) as error:
        load.load(tmp_path / "c.yaml", sets)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_settings_without_effect(tmp_path):
    (tmp_path / "c.yaml").write_text(RUN)
    config = load.load(tmp_path / "c.yaml", ["two_stage.criterion=linkage"])
    assert check(config) == ["two_stage.given has no effect with criterion=linkage"]
    config = load.load(tmp_path / "c.yaml", ["protocol=single_stage"])
    assert check(config) == ["two_stage has no effect with protocol=single_stage"]
    for sets, words in (
        (["evaluate.plain=expert"], "evaluate.plain=expert has no effect with protocol=two_stage"),
        (["two_stage.first=[plain,teacher]"], "first: the run does not have teacher (it needs"),
        (["two_stage.second=[plain,full_adjusted]"], "not have full_adjusted (it needs"),
        (["two_stage.centres=9"], "two_stage.centres has no effect with criterion=given"),
        (["two_stage.smallest=3"], "two_stage.smallest has no effect with criterion=given"),
    ):
        (warning,) = check(load.load(tmp_path / "c.yaml", sets))
        assert words in warning
    more = ["evaluate.matrix=true", "evaluate.random=false", "evaluate.matrix_labels=[hard]"]
    assert check(load.load(tmp_path / "c.yaml", more)) == [], "random images are in the matrix"
    defaults = RUN.split("  criterion")[0].replace("two_stage:", "")
    (tmp_path / "d.yaml").write_text(defaults)
    assert check(load.load(tmp_path / "d.yaml")) == [], "the default lists are for every run"
    loaded = load.load(tmp_path / "c.yaml")
    assert check(loaded) == [] and load.from_text(load.to_yaml(loaded)) == loaded


# --- A whole run ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(config, run folder) of a finished run. Do not change it."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "two.yaml").write_text(RUN)
    done = cli("run", folder / "two.yaml", "--out", folder / "run", "--nproc", 1)
    assert done.returncode == 0, done.stderr
    return folder / "two.yaml", folder / "run"


def judged(out) -> np.ndarray:
    return ShardSplit(folder_of(out, "shard"), "test").labels


def saved(run, name: str) -> torch.Tensor:
    return torch.from_numpy(np.load(folder_of(run, f"student/{name}") / "logits.npy")).float()


def test_a_run_judges_all_pairs(run):
    _, out = run
    results = json.loads((out / "results.json").read_text())
    two, groups = results["two_stage"], [[0, 1, 2], [3, 4, 5, 6, 7], [8, 9]]
    assert (two["network"], two["criterion"]) == ("plain, whole set", "given")
    assert two["groups"] == groups
    keys = [(r["first"], r["second"], r["routing"]) for r in two["rows"]]
    assert len(keys) == len(set(keys))
    single = [(None, t, None) for t in ("distilled", "random real")]
    single += [(None, t, None) for t in ("plain, whole set", "plain, logit-adjusted")]
    assert keys[:4] == single, "there is no teacher in this run, and no student of its labels"
    firsts = ["group classifier, whole set", "summed, plain, whole set"]
    firsts += ["summed, plain, logit-adjusted", "summed, distilled"]
    seconds = ["in-group students, distilled", "restricted, distilled", "restricted, random real"]
    every = set(itertools.product(firsts, seconds, routing.ROUTINGS))
    assert set(keys[4:]) == every - {("summed, distilled", "restricted, distilled", "soft")}
    # Again from the files, for one pair of each kind.
    labels = judged(out)
    shard = json.loads((folder_of(out, "shard") / "manifest.json").read_text())
    for seed_rows in ("hard", "soft"):
        accuracies = []
        for s in (0, 1):
            first = saved(out, f"plain-hard-convnet3-s{s}-groups").log_softmax(1)
            assert first.shape == (80, 3)
            parts = [saved(out, f"distilled-hard-convnet3-s{s}-g{g}") for g in range(3)]
            scores = routing.routed(first, routing.joined(parts, groups), groups, seed_rows)
            accuracies.append(metrics(scores, labels, shard["groups"])["top1"])
        row = two["rows"][keys.index((firsts[0], seconds[0], seed_rows))]
        assert row["top1"] == round(np.mean(accuracies), 2) and row["num_seeds"] == 2
        assert row["top1_std"] == round(np.std(accuracies, ddof=1), 2) and row["net"] == "convnet3"
        assert len(row["per_class"]) == 10
    for row in two["rows"]:
        assert {"group_acc", "group_acc_std", "in_group_acc", "in_group_acc_std"} <= set(row)
        assert set(NUMBERS) <= set(row) and row["top1"] <= row["group_acc"]
    assert max(r["top1"] for r in two["rows"]) > 20, "they have learned something"
    one = two["rows"][0]
    (entry,) = [e for e in results["summary"]["students"] if e["set"] == "distilled"]
    assert {n: one[n] for n in NUMBERS} == {n: entry[n] for n in NUMBERS}
    assert entry["label_bytes"] == 0
    assert [e["num_seeds"] for e in results["summary"]["plain"]] == [2, 2]
    assert all("part" not in r for r in results["rows"])


def test_a_run_keeps_its_confusions(run):
    _, out = run
    with np.load(folder_of(out, "evaluate") / "confusion.npz") as found:
        titles = {"distilled", "random", "plain", "plain, logit-adjusted", "two stages"}
        assert set(found) == titles
        for title in titles:
            assert found[title].dtype == np.int32 and (found[title].sum(1) == 8).all()
        guessed = saved(out, "distilled-hard-convnet3-s0").argmax(1).numpy()
        of_class_3 = guessed[judged(out) == 3]
        assert np.bincount(of_class_3, minlength=10).tolist() == found["distilled"][3].tolist()


def test_rows_of_parts_are_of_their_own_images(run):
    _, out = run
    row = json.loads(
        (folder_of(out, "student/distilled-hard-convnet3-s1-g1") / "result.json").read_text()
    )["row"]
    logits = saved(out, "distilled-hard-convnet3-s1-g1")
    assert logits.shape == (80, 5) and row["part"] == "g1" and len(row["per_class"]) == 5
    members = np.isin(judged(out), range(3, 8))
    right = logits.argmax(1).numpy()[members] == judged(out)[members] - 3
    assert row["top1"] == pytest.approx(100 * right.mean(), abs=1e-3) and row["few"] is None
    row = json.loads(
        (folder_of(out, "student/plain-hard-convnet3-s0-groups") / "result.json").read_text()
    )["row"]
    assert len(row["per_class"]) == 3 and "adjusted" not in row


def test_a_student_of_a_group_goes_on_where_it_was_stopped(run, tmp_path, monkeypatch):
    """Stopped at any step, its files have the same bytes."""
    from ltdd_scale.pipeline import graph
    from ltdd_scale.recipe import stages
    from ltdd_scale.runtime import signals

    path, out = run
    name = "student/distilled-hard-convnet3-s0-g1"
    config = load.load(path)
    source = json.loads((out / "run.json").read_text())["source"]
    node = graph.build(stages(config, source), config)[name]
    above = {role: folder_of(out, n) for role, n in node.stage.inputs.items()}
    steps, stops = 0, [1, 3]
    real = training._Work.step

    def step(work, *arguments):
        nonlocal steps
        real(work, *arguments)
        steps += 1

    def check():
        if steps in stops:
            stops.remove(steps)
            raise signals.Preempted("SIGTERM")

    monkeypatch.setattr(training._Work, "step", step)
    monkeypatch.setattr(signals, "requested", lambda: steps in stops)
    monkeypatch.setattr(signals, "check", check)
    context = Context(ALONE, tmp_path, above, node.fingerprint, quiet=True, workers=0)
    for _ in range(2):
        with pytest.raises(signals.Preempted):
            student.run(node.settings, context)
    student.run(node.settings, context)
    assert steps == 30 * 2, "15 images of the group, 10 a step"
    for file in ("logits.npy", "weights.pt", "result.json"):
        assert (tmp_path / file).read_bytes() == (folder_of(out, name) / file).read_bytes()


def test_other_pairs_need_no_training(run):
    """Another list, without new trained ones, makes the verdict anew and nothing else."""
    config, out = run
    shown = ("--out", out, "--cluster", "local", "--dry-run")
    more = cli("run", config, *shown, "--set", "two_stage.second=[plain,distilled]")
    assert more.returncode == 0, more.stderr
    assert re.search(r"\b2 of \d+ jobs are left", more.stdout), "evaluate and report"


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (
            ["two_stage.criterion=linkage", "two_stage.given=[]", "two_stage.groups=6"],
            "two_stage.groups=6: 10 classes make 2 to 5 groups",
        ),
        (["two_stage.given=[[0,1,2],[3,4]]"], "two_stage.given: 5 names for 10 classes"),
    ],
)
def test_groups_that_the_classes_do_not_make(run, tmp_path, sets, words):
    """They are refused before anything is trained."""
    config, _ = run
    done = cli("run", config, "--out", tmp_path / "r", "--nproc", 1, "--set", *sets)
    said_plainly(done, words)
    assert not list((tmp_path / "store").glob("*/*/stage.json")), "no stage has run"
    assert pairs.first_title("trained_random") == "group classifier, random real"


def test_labels_belong_to_the_images(run):
    """A part's class is one that `mix` knows: a guard against columns in another order."""
    classes = np.asarray([0, 1, 2, 3, 4])
    drawn = draw_epoch(view_spec(Training(), 8, False), np.full((5, 2), 8), "k", 0, False)
    table = mix(onehot(classes, 5, CPU), drawn, np.arange(5))
    for k, group in enumerate(GROUPS):
        part = Part(GROUPS, 5, k)
        members = part.members(classes)
        assert torch.equal(
            table[members][:, group].argmax(1), torch.from_numpy(part.own(classes[members]))
        )
    assert torch.allclose(
        subsets.log_sums(torch.zeros(1, 5), GROUPS).exp(), torch.tensor([[2.0, 3]])
    )


@pytest.mark.slow
def test_the_tool_compares_groups_of_networks(run):
    """Two plain networks and two students, each criterion; random groups agree by chance only."""
    script = ROOT / "tools" / "group_stability.py"
    command = [sys.executable, script, run[1], "--per-class", 10, "--centres", 2]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    cells = [[c.strip() for c in x.split("|")] for x in done.stdout.splitlines() if x[:1] == "|"]
    assert cells[0][1:-1] == ["sets", "networks", "maxcut", "linkage", "confusion", "random"]
    found = {row[1]: row[2:-1] for row in cells[2:5]}
    sets = ("plain, run: over seeds", "plain, run : distilled, run", "distilled, run: over seeds")
    assert tuple(found) == sets and found[sets[1]][0] == "2 × 2"
    assert all(-1 <= float(v) <= 1 for row in found.values() for v in row[1:])
    assert all(abs(float(row[-1])) < 0.2 for row in found.values())
    none = subprocess.run(
        [sys.executable, script, run[0].parent / "none"], capture_output=True, text=True, timeout=60
    )
    assert (
        none.returncode == 1
        and none.stderr.startswith("error: ")
        and "Traceback" not in none.stderr
    )


# --- Units of training ----------------------------------------------------------------------------


def test_an_image_alone_joins_the_step_before_it():
    """BatchNorm learns nothing from one image. Students of all classes keep their steps."""

    def steps(n: int, joins: bool) -> list[np.ndarray]:
        images = MemoryImages(np.zeros((n, 3, 8, 8), np.uint8), np.arange(n) % 2, CPU)
        m = dataclasses.replace(maker("hard"), images=images, num_classes=2)
        setup = training.Setup(
            images=images,
            labels=KINDS["hard"].code().fresh(m),
            normalize=lambda x: x,
            spec=m.spec,
            training=Training(batch_size=4),
            epochs=1,
            key="k",
            title="t",
            joins=joins,
        )
        found = [i for _, i, _ in training._Work(setup, nn.Linear(1, 1), ALONE).rest_of_epoch()]
        assert sorted(np.concatenate(found)) == list(range(n)) and len(found) == setup.steps
        return found

    def sizes(n: int, joins: bool) -> list[int]:
        return [len(i) for i in steps(n, joins)]

    assert sizes(9, True) == [4, 5] and sizes(9, False) == [4, 4, 1]
    assert sizes(8, True) == [4, 4] and sizes(1, True) == [1] and sizes(10, True) == [4, 4, 2]
    assert np.concatenate(steps(9, True)).tolist() == np.concatenate(steps(9, False)).tolist()


def test_only_parts_with_batchnorm_have_other_steps(run, tmp_path, monkeypatch):
    """15 images of a group in steps of 7: with a network that has BatchNorm at 1×1."""
    from ltdd_scale.pipeline import graph
    from ltdd_scale.recipe import stages

    path, out = run
    seen = {}

    def train(setup, network, context):
        seen[setup.title] = setup.steps
        return real(dataclasses.replace(setup, epochs=1), network, context)

    real = student.train
    monkeypatch.setattr(student, "train", train)
    source = json.loads((out / "run.json").read_text())["source"]
    for net, steps in (("resnet18_cifar", 2), ("convnet3", 3)):
        config = load.load(path, [f"evaluate.nets=[{net}]", "evaluate.batch_size=7"])
        name = f"student/distilled-hard-{net}-s0-g1"
        node = graph.build(stages(config, source), config)[name]
        above = {
            role: folder_of(out, n.replace(net, "convnet3"))
            for role, n in node.stage.inputs.items()
        }
        folder = tmp_path / net
        folder.mkdir()
        student.run(node.settings, Context(ALONE, folder, above, net, quiet=True, workers=0))
        assert seen == {f"distilled hard {net} seed 0 g1": steps}
        seen.clear()


def test_logits_beyond_half_precision_stay_in_order(run, tmp_path, monkeypatch):
    """Infinite ones would give probabilities that are no numbers."""
    from ltdd_scale.pipeline import graph
    from ltdd_scale.recipe import stages

    path, out = run
    config = load.load(path)
    source = json.loads((out / "run.json").read_text())["source"]
    node = graph.build(stages(config, source), config)["student/distilled-hard-convnet3-s0"]
    above = {role: folder_of(out, n) for role, n in node.stage.inputs.items()}
    real = frozen.predict
    monkeypatch.setattr(student, "train", lambda setup, network, context: (network.eval(), [0.0]))
    monkeypatch.setattr(frozen, "predict", lambda *arguments: real(*arguments) * 1e7)
    student.run(node.settings, Context(ALONE, tmp_path, above, "w", quiet=True, workers=0))
    kept = torch.from_numpy(np.load(tmp_path / "logits.npy")).float()
    assert kept.abs().max() == 65504 and torch.isfinite(kept).all()
    groups = [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert torch.isfinite(routing.summed(kept, groups)).all()


# --- Adjusted networks ----------------------------------------------------------------------------


class Nobody:
    """Students of two seeds that have saved no logits but those of the whole set."""

    rows = ({"set": "distilled", "seed": 0}, {"set": "distilled", "seed": 1})
    net = "n"

    def logits(self, which: str, seed: int, part: str = "") -> torch.Tensor | None:
        return logits_of(seed, 8, 4) if which in ("full", "distilled") and not part else None


def test_every_network_can_be_adjusted():
    counts = np.asarray([100, 10, 10, 1])
    teacher = logits_of(7, 8, 4)
    table = pairs.Table(
        Nobody(), {"teacher": teacher}, np.arange(8) % 4, counts, ["few"] * 4, [[0, 1], [2, 3]]
    )
    prior = torch.from_numpy(np.log(counts / counts.sum())).float()
    for name, base in (("teacher", teacher), ("full", logits_of(1, 8, 4))):
        found = table.logits(f"{name}_adjusted", 1)
        assert torch.allclose((base - prior).softmax(1), found.softmax(1), atol=1e-6)
    assert table.logits("plain_adjusted", 0) is None
    names = ["teacher_adjusted", "full_adjusted", "distilled"]
    found = {(r["first"], r["second"], r["routing"]): r for r in pairs.rows(table, names, names)}
    key = ("summed, teacher, logit-adjusted", "restricted, whole set, same labels, logit-adjusted")
    assert found[*key, "soft"]["num_seeds"] == 2
    own = ("summed, teacher, logit-adjusted", "restricted, teacher, logit-adjusted", "hard")
    assert found[own]["num_seeds"] == 1, "the same with every seed, so judged once"
    assert found[None, "teacher, logit-adjusted", None]["num_seeds"] == 1
    assert found[None, "whole set, same labels, logit-adjusted", None]["num_seeds"] == 2


def test_a_plain_network_that_is_trained_all_the_same_needs_no_expert():
    asked = {"relabel": {"labels": "hard"}, "evaluate": {"plain": "expert"}}
    config = Config(method="gm", protocol="two_stage", **asked)
    assert recipe.experts(config) == ()


def test_the_plain_network_is_trained_whatever_it_costs(tmp_path):
    text = RUN.replace("labels: hard", "labels: online").replace(
        "plain_epochs: 12", "plain_epochs: 90000"
    )
    (tmp_path / "c.yaml").write_text(text.replace("plain: own", "plain: auto"))
    found = [
        perform.plain_network(load.load(tmp_path / "c.yaml", [f"protocol={name}"]), "x")
        for name in ("single_stage", "two_stage")
    ]
    assert found == ["expert", "own"]
