"""MTT and DAMED: what they match, what they refuse, what they write."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import TINY, cli, digests

from ltdd_scale import recipe
from ltdd_scale.config import load
from ltdd_scale.data import distilled, siamese
from ltdd_scale.errors import UserError
from ltdd_scale.experts.trajectories.kept import Form, Kept, Snapshots
from ltdd_scale.methods.damed import match as damed
from ltdd_scale.methods.damed.settings import Damed
from ltdd_scale.methods.matching.experts import Experts
from ltdd_scale.methods.matching.unroll import Unroll
from ltdd_scale.models.flat import Flat
from ltdd_scale.pipeline import graph

CLASSES, SIZE = 3, 8
FLAT = Flat("convnet3", 8, "instance", SIZE, CLASSES)
SMALL = {
    "trajectories": {"experts": 2, "width": 8, "steps": 12, "every": 3, "batch_size": 16},
    "classifiers": {"steps": 6, "every": 2, "batch_size": 16},
    "relabel": {"labels": "hard"},
}
UNROLLED = {"iterations": 4, "inner_steps": 2, "max_start": 2, "batch_size": 16, "rate": 0.1}


@pytest.fixture(autouse=True)
def one_thread():
    """As ranks have it: the tests compare bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def kept(folder: Path, rows: list[torch.Tensor], last: torch.Tensor) -> Kept:
    folder.mkdir(parents=True)
    with Snapshots(folder, Form(len(rows), len(last), 3)) as snapshots:
        snapshots.begin()
        for row in rows:
            snapshots.add(row)
        snapshots.finish(last)
    return Kept(folder)


@pytest.fixture(scope="module")
def ways(tmp_path_factory) -> Experts:
    """Two experts with four snapshots each, and balanced heads; all weights are made up."""
    folder = tmp_path_factory.mktemp("ways")
    own, heads = [], []
    for k in range(2):
        rows = [FLAT.initial("way", k, s) for s in range(4)]
        own.append(kept(folder / f"t{k}", rows, FLAT.initial("last", k)))
        rows = [FLAT.initial("head", k, s)[FLAT.head] for s in range(3)]
        heads.append(kept(folder / f"c{k}", rows, FLAT.initial("last head", k)[FLAT.head]))
    return Experts(FLAT, own, heads)


def pair(ways: Experts, **changes) -> damed.Pair:
    own = Damed(**{**UNROLLED, "classifier_steps": 3, **changes})
    images = torch.randn(12, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    weights = damed.class_weights(np.array([60, 30, 6]), own.matching)
    return damed.Pair(own, ways, images, weights, siamese.choices(own.dsa), 0)


def test_weights_are_the_frequencies_of_mean_one():
    found = damed.class_weights(np.array([60, 30, 10]))
    assert torch.allclose(found, torch.tensor([1.8, 0.9, 0.3])) and float(
        found.mean()
    ) == pytest.approx(1)
    assert damed.class_weights(np.array([60, 30, 10]), False).tolist() == [1, 1, 1]


def test_with_images_that_stand_for_their_class_the_weighted_loss_is_the_experts(ways):
    """One image a class with weights w gives the gradient of a set that holds it n_c times."""
    made = pair(ways, learn_labels=False)
    theta, counts = FLAT.initial("any").requires_grad_(), (60, 30, 6)
    x, y = made.images[:3], torch.eye(3)
    weighted = made.weighted_loss(made.network_logits(theta, x, theta[:0]), y)
    classes = torch.tensor([0] * 60 + [1] * 30 + [2] * 6)
    whole = F.cross_entropy(FLAT.logits(theta, x)[classes], classes)
    torch.testing.assert_close(weighted, whole)
    assert sum(counts) == len(classes)


def test_an_iteration_matches_the_backbone_and_the_classifier(ways):
    made = pair(ways, backbone_weight=0.5, classifier_weight=2.0, inner_steps=3)
    backbone, classifier = made.pick(1, 0)
    assert (backbone.weight, classifier.weight) == (0.5, 2.0)
    assert backbone.segment.compared == FLAT.backbone
    assert len(backbone.segment.start) == FLAT.size and len(backbone.segment.batches) == 3
    head = classifier.segment
    assert len(head.start) == FLAT.head.stop - FLAT.head.start and len(head.batches) == 3
    k = int(head.name.split()[-1])
    assert torch.equal(head.fixed, ways.ways[k].last())
    assert torch.equal(head.start, ways.heads[k].vector(0))
    assert torch.equal(head.target, ways.heads[k].vector(made.own.classifier_target))
    labels = torch.zeros(12, CLASSES)
    theta = Unroll().student(head, made.images, labels, torch.tensor(0.1))
    assert all(len(t) == len(head.start) for t in theta) and not torch.equal(theta[-1], theta[0])
    (alone,) = pair(ways, decoupling=False).pick(1, 0)
    assert alone.weight == 1 and alone.segment.compared == slice(0, FLAT.size)


def test_starts_grow_from_early_to_late(ways):
    made = pair(ways, max_start=20, current_start=5, expansion=100)
    assert [made.last_start(t) for t in (0, 50, 100, 1000)] == [5, 12, 20, 20]
    assert pair(ways, max_start=20).last_start(0) == 20
    late = pair(ways, max_start=20, min_start=8, current_start=5, expansion=100)
    assert late.last_start(0) == 8


def test_first_labels_are_of_the_experts_that_are_right(ways):
    images = torch.randn(12, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    logits = [
        FLAT.classify(h.last(), FLAT.features(w.last(), images))
        for w, h in zip(ways.ways, ways.heads, strict=True)
    ]
    predicted = [z.argmax(1) for z in logits]
    classes = predicted[0].clone()
    classes[-1] = next(c for c in range(3) if all(int(p[-1]) != c for p in predicted))
    found = damed.initial_labels(ways, images, classes)
    for i in range(11):
        right = [z[i] for z, p in zip(logits, predicted, strict=True) if p[i] == classes[i]]
        torch.testing.assert_close(found[i], torch.stack(right).mean(0))
    assert float(F.softmax(found[-1], 0)[classes[-1]]) == pytest.approx(damed.SURE)
    without = damed.initial_labels(Experts(FLAT, ways.ways, []), images, classes)
    assert not torch.equal(without, found)


def config_of(folder: Path, method: str, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    values = {**yaml.safe_load(TINY), **SMALL, method: UNROLLED, "method": method}
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**values, **changes}))
    return folder / "tiny.yaml"


@pytest.fixture(scope="module", params=["mtt", "damed"])
def run(request, tmp_path_factory) -> tuple[str, Path, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    config = config_of(folder, request.param)
    done = cli("match", config, "--out", folder / "run", "--nproc", 1)
    assert done.returncode == 0, done.stderr
    return request.param, config, folder


def folder_of(run: Path, stage: str) -> Path:
    record = json.loads((run / "run.json").read_text())
    return run.parent / "store" / record["stages"][stage]


def test_what_is_written(run):
    method, _, folder = run
    out = folder_of(folder / "run", "match")
    held = distilled.Distilled(out, 10)
    assert len(held) == 40 and held.hints()["rate"] > 0
    assert [len(held.provenance(c)) for c in range(10)] == [4] * 10
    learned = held.learned()
    assert (learned is not None) == (method == "damed")
    if learned is not None:
        assert learned.shape == (40, 10) and np.isfinite(learned).all()
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert last["iteration"] == 4 and last["distance"] > 0


def test_an_expert_that_is_gone_is_made_again(run, tmp_path):
    """One in the middle is missing, another is damaged: a line for the second, then the bytes."""
    _, config, folder = run
    shutil.copytree(folder / "store", tmp_path / "store")
    match = folder_of(folder / "run", "match").relative_to(folder / "store")
    shutil.rmtree(tmp_path / "store" / match)
    gone = folder_of(folder / "run", "trajectory/001").relative_to(folder / "store")
    shutil.rmtree(tmp_path / "store" / gone)
    where = ("--out", tmp_path / "r", "--store", tmp_path / "store", "--nproc", 1)
    done = cli("match", config, *where)
    assert done.returncode == 0, done.stderr
    theirs, ours = digests(folder / "store"), digests(tmp_path / "store")
    assert ours[str(match)] == theirs[str(match)] and ours[str(gone)] == theirs[str(gone)]
    shutil.rmtree(tmp_path / "store" / match)
    with open(tmp_path / "store" / gone / "snapshots.npy", "r+b") as file:
        file.seek(200)
        file.write(b"\xff\xff")
    done = cli("match", config, *where)
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("error")]
    assert done.returncode == 1 and "snapshots.npy: damaged" in line and "delete the folder" in line


def test_a_set_that_has_lost_a_file_is_made_again(run, tmp_path):
    """What is left of it must not be taken for all of it."""
    _, config, folder = run
    shutil.copytree(folder / "store", tmp_path / "store")
    match = folder_of(folder / "run", "match").relative_to(folder / "store")
    (tmp_path / "store" / match / "00003.npy").unlink()
    where = ("--out", tmp_path / "r", "--store", tmp_path / "store", "--nproc", 1)
    done = cli("match", config, *where)
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "store")[str(match)] == digests(folder / "store")[str(match)]


def test_a_run_that_dies_before_its_seal_keeps_its_iterations(run, tmp_path, monkeypatch):
    from ltdd_scale.pipeline import store

    _, config, folder = run
    shutil.copytree(folder / "store", tmp_path / "store")
    match = folder_of(folder / "run", "match").relative_to(folder / "store")
    shutil.rmtree(tmp_path / "store" / match)
    where = ("--out", tmp_path / "r", "--store", tmp_path / "store", "--nproc", 1)

    def dying(*_):
        raise UserError("the end")

    with monkeypatch.context() as patched:
        patched.setattr(store, "seal", dying)
        assert cli("match", config, *where).returncode == 1
    done = cli("match", config, *where)
    assert done.returncode == 0 and "resumed at iteration 4 of 4" in done.stderr
    assert digests(tmp_path / "store")[str(match)] == digests(folder / "store")[str(match)]


@pytest.mark.parametrize(
    ("method", "changes", "said"),
    [
        ("mtt", {"mtt": {**UNROLLED, "max_start": 9}}, "a segment may end at snapshot 11"),
        ("mtt", {"mtt": {**UNROLLED, "min_start": 3}}, "mtt.min_start=3 is behind"),
        ("mtt", {"mtt": {**UNROLLED, "dsa": "blur"}}, "'blur' is none of"),
        ("damed", {"damed": {**UNROLLED, "current_start": 3}}, "damed.current_start=3 grows"),
        ("damed", {"damed": {**UNROLLED, "classifier_target": 9}}, "has 3 snapshots"),
        (
            "damed",
            {"damed": {**UNROLLED, "learn_labels": False}, "relabel": {"labels": "learned"}},
            "learns no labels with these settings",
        ),
        ("mtt", {"relabel": {"labels": "learned"}}, "learns no labels with these settings"),
        (
            "mtt",
            {"trajectories": {**SMALL["trajectories"], "lr": 0}},
            "experts that do not move cannot be followed",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_starts(
    tmp_path, method, changes, said
):
    config = config_of(tmp_path / "c", method, **changes)
    done = cli("match", config, "--out", tmp_path / "run", "--nproc", 1)
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("error")]
    assert done.returncode == 1 and said in line
    assert not (tmp_path / "store").exists()


def test_experts_of_another_network_are_refused(ways, tmp_path):
    other = Flat("convnet3", 4, "instance", SIZE, CLASSES)
    assert other.size != FLAT.size
    from ltdd_scale.experts.trajectories.settings import Trajectory
    from ltdd_scale.methods.matching import experts
    from ltdd_scale.runtime.context import Context
    from ltdd_scale.runtime.ranks import Ranks

    inputs = {f"trajectory/00{k}": way.folder for k, way in enumerate(ways.ways)}
    context = Context(Ranks(0, 1, torch.device("cpu"), None), tmp_path, inputs, "me")
    assert len(experts.load(Trajectory(width=8), SIZE, CLASSES, context)) == 2
    with pytest.raises(UserError, match="these experts are of another network") as error:
        experts.load(Trajectory(width=4), SIZE, CLASSES, context)
    assert "\n" not in str(error.value)


def test_methods_and_recipes_share_experts(tmp_path):
    """MTT and DAMED read the same folders; another recipe of matching leaves them as they are."""
    found = {}
    for method in ("mtt", "damed"):
        config = load.load(config_of(tmp_path / method, method))
        found[method] = graph.build(recipe.stages(config, ""), config)
    names = ("shard", "trajectory/000", "trajectory/001")
    assert all(found["mtt"][n].where == found["damed"][n].where for n in names)
    assert "classifier/001" in found["damed"] and "classifier/001" not in found["mtt"]
    more = load.load(tmp_path / "mtt" / "tiny.yaml", ["trajectories.experts=3", "mtt.rate=0.2"])
    again = graph.build(recipe.stages(more, ""), more)
    assert all(again[n].where == found["mtt"][n].where for n in names) and "trajectory/002" in again
    assert again["match"].where != found["mtt"]["match"].where
    for changed in ("trajectories.width=4", "data.split_seed=1", "trajectories.lr=0.1"):
        other = load.load(tmp_path / "mtt" / "tiny.yaml", [changed])
        nodes = graph.build(recipe.stages(other, ""), other)
        assert nodes["trajectory/000"].where != found["mtt"]["trajectory/000"].where
